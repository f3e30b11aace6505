#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;

use serde_json::json;

use super::*;
use crate::{
    config::DecoderConfig,
    gguf::{Gguf, GgufType, GgufWriteOptions, write_gguf},
};

fn tiny() -> (Gguf, Tokenizer) {
    let gguf = Gguf::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny.gguf")).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    (gguf, tokenizer)
}

fn cases() -> Vec<(String, Vec<u32>)> {
    let expected: Value = serde_json::from_str(include_str!("../../fixtures/tiny.json")).unwrap();
    serde_json::from_value(expected["ids"].clone()).unwrap()
}

fn assert_same(a: &Tokenizer, b: &Tokenizer, texts: impl IntoIterator<Item = String>) {
    for text in texts {
        assert_eq!(a.encode(&text, true).unwrap(), b.encode(&text, true).unwrap(), "{text:?}");
        let ids = a.encode(&text, false).unwrap();
        assert_eq!(ids, b.encode(&text, false).unwrap(), "{text:?}");
        assert_eq!(a.decode(&ids, false).unwrap(), b.decode(&ids, false).unwrap(), "{text:?}");
    }
    assert_eq!(
        (a.bos_token_id(), a.pad_token_id(), a.unk_token_id()),
        (b.bos_token_id(), b.pad_token_id(), b.unk_token_id())
    );
    assert_eq!((a.eos_token_ids(), a.chat_template()), (b.eos_token_ids(), b.chat_template()));
}

/// A byte-level tokenizer in a folder, with every byte, a few merges and two special tokens.
fn byte_level(folder: &Path) -> Value {
    // GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on.
    let printable =
        |byte: u32| (33..=126).contains(&byte) || (161..=172).contains(&byte) || (174..=255).contains(&byte);
    let mut next = 256;
    let mut vocab = Map::new();
    for byte in 0..256u32 {
        let code = if printable(byte) {
            byte
        } else {
            next += 1;
            next - 1
        };
        vocab.insert(char::from_u32(code).unwrap().to_string(), json!(byte));
    }
    let merges =
        [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("1", "2"), ("Ġ", "Ġ"), ("Ċ", "Ċ")];
    for (left, right) in merges {
        vocab.insert(format!("{left}{right}"), json!(vocab.len()));
    }
    let count = vocab.len();
    let special = |id: usize, content: &str, special: bool| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special});
    let tokenizer = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
        "added_tokens": [special(count, "<|end|>", true), special(count + 1, "<tool>", false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab,
            "merges": merges.iter().map(|(a, b)| json!([a, b])).collect::<Vec<_>>()},
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"eos_token": {"content": "<|end|>", "special": true}, "pad_token": "<|end|>", "bos_token": null,
        "chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]});
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    tokenizer
}

fn texts() -> Vec<String> {
    [
        "hello hello  hello",
        "hellohello",
        "12 112",
        "a  12\n\n3",
        "",
        "naïve 日本 🙂",
        "x<|end|>hello<tool>",
        "\u{200b} \t",
    ]
    .map(str::to_owned)
    .to_vec()
}

#[test]
fn ids_from_a_gguf_are_those_of_transformers() {
    let (_, tokenizer) = tiny();
    for (text, ids) in cases() {
        assert_eq!(tokenizer.encode(&text, true).unwrap(), ids, "{text:?}");
    }
    let expected: Value = serde_json::from_str(include_str!("../../fixtures/tiny.json")).unwrap();
    for case in expected["decoded"].as_array().unwrap() {
        let ids: Vec<u32> = serde_json::from_value(case[0].clone()).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), case[1].as_str().unwrap());
    }
    assert_eq!(tokenizer.bos_token().as_deref(), Some("<s>"));
    assert_eq!((tokenizer.eos_token_ids(), tokenizer.unk_token_id()), ([2].as_slice(), Some(0)));
    assert!(tokenizer.chat_template().unwrap().contains("<|user|>"));
}

#[test]
fn a_gguf_tokenizer_survives_a_folder() {
    let (_, tokenizer) = tiny();
    let folder = tempfile::tempdir().unwrap();
    tokenizer.save(folder.path().join("out")).unwrap();
    let back = Tokenizer::from_folder(folder.path().join("out")).unwrap();
    assert_same(&tokenizer, &back, cases().into_iter().map(|(text, _)| text));
    assert_eq!(fs::read_dir(folder.path().join("out")).unwrap().count(), 2);
}

#[test]
fn a_folder_is_read_with_all_that_transformers_reads() {
    let folder = tempfile::tempdir().unwrap();
    byte_level(folder.path());
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    // Neither cut to 3 nor padded to 9.
    assert_eq!(tokenizer.encode("hello hello", true).unwrap(), [259, 260]);
    assert_eq!(tokenizer.encode("x<|end|>", true).unwrap(), [120, 264]);
    assert_eq!(tokenizer.encode("1 2", false).unwrap(), [49, 32, 50]);
    assert_eq!(tokenizer.decode(&[259, 264, 260], true).unwrap(), "hello hello");
    assert_eq!(tokenizer.decode(&[259, 264], false).unwrap(), "hello<|end|>");
    assert_eq!(
        (tokenizer.eos_token_id(), tokenizer.pad_token_id(), tokenizer.bos_token_id()),
        (Some(264), Some(264), None)
    );
    assert_eq!(tokenizer.chat_template(), Some("D"));
    assert_eq!(tokenizer.vocab_size(), 266);

    fs::write(folder.path().join("chat_template.jinja"), "J").unwrap();
    fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [264, 265, 9999]}"#).unwrap();
    fs::write(folder.path().join("special_tokens_map.json"), r#"{"bos_token": "<tool>", "eos_token": "!"}"#).unwrap();
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!(tokenizer.chat_template(), Some("J"));
    assert_eq!(tokenizer.eos_token_ids(), [264, 265]);
    assert_eq!(tokenizer.bos_token_id(), Some(265));

    // Tokens that only tokenizer_config.json knows get the ids it gives them.
    let added = json!({"eos_token": "<|end|>", "pad_token": "<pad>",
        "added_tokens_decoder": {"264": {"content": "<|end|>", "special": true}, "266": {"content": "<pad>", "special": true}}});
    fs::write(folder.path().join("tokenizer_config.json"), added.to_string()).unwrap();
    assert_eq!(Tokenizer::from_folder(folder.path()).unwrap().pad_token_id(), Some(266));

    // Saved elsewhere, the files are the same bytes.
    let other = folder.path().join("other");
    tokenizer.save(&other).unwrap();
    for name in ["tokenizer.json", "special_tokens_map.json", "chat_template.jinja"] {
        assert_eq!(fs::read(folder.path().join(name)).unwrap(), fs::read(other.join(name)).unwrap());
    }
}

#[test]
fn missing_and_corrupt_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: not found"), "{error}");
    fs::write(folder.path().join("tokenizer.model"), b"x").unwrap();
    assert!(Tokenizer::from_folder(folder.path()).unwrap_err().to_string().contains("save_pretrained"));
    let good = byte_level(folder.path());
    for (name, text) in [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", r#"{"eos_token": "<absent>"}"#),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"500": {"content": "<far>"}}}"#),
        ("special_tokens_map.json", "{{"),
        ("generation_config.json", "nonsense"),
    ] {
        byte_level(folder.path());
        fs::write(folder.path().join(name), text).unwrap();
        let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        fs::remove_file(folder.path().join(name)).unwrap();
    }
    // A merge of tokens that are not there.
    byte_level(folder.path());
    let mut bad = good;
    bad["model"]["merges"] = json!([["nowhere", "else"]]);
    fs::write(folder.path().join("tokenizer.json"), bad.to_string()).unwrap();
    assert!(Tokenizer::from_folder(folder.path()).is_err());
}

/// Writes a model without tensors around a tokenizer, and reads the tokenizer back.
fn through_gguf(tokenizer: &Tokenizer, rows: usize) -> Result<Tokenizer, String> {
    let (gguf, _) = tiny();
    let config = DecoderConfig {
        vocab_size: rows,
        bos_token_id: None,
        pad_token_id: None,
        eos_token_ids: Vec::new(),
        ..DecoderConfig::from_gguf(&gguf).unwrap()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let options = GgufWriteOptions { weights: GgufType::F16, name: None };
    write_gguf(&path, &config, tokenizer, &[], &options, |_| unreachable!()).map_err(|error| error.to_string())?;
    Tokenizer::from_gguf(&Gguf::open(&path).unwrap()).map_err(|error| error.to_string())
}

#[test]
fn tokenizers_survive_gguf() {
    let (_, sentence_piece) = tiny();
    let back = through_gguf(&sentence_piece, sentence_piece.vocab_size() + 5).unwrap();
    assert_same(&sentence_piece, &back, cases().into_iter().map(|(text, _)| text));

    let folder = tempfile::tempdir().unwrap();
    let mut json = byte_level(folder.path());
    let bytes = Tokenizer::from_folder(folder.path()).unwrap();
    assert_same(&bytes, &through_gguf(&bytes, bytes.vocab_size()).unwrap(), texts());
    let error = through_gguf(&bytes, bytes.vocab_size() - 1).unwrap_err();
    assert!(error.contains("embeddings"), "{error}");

    // One that llama.cpp has no name for.
    json["pre_tokenizer"] = json!({"type": "Whitespace"});
    fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    let error = through_gguf(&Tokenizer::from_folder(folder.path()).unwrap(), 300).unwrap_err();
    assert!(error.contains("pre_tokenizer"), "{error}");

    // Each known pre-tokenizer is recognised in its own tokenizer.json, up to names for the same thing.
    for pre in pre::PRE_TOKENIZERS {
        json["pre_tokenizer"] = pre.pre_tokenizer();
        json["normalizer"] = pre.normalizer();
        json["model"]["ignore_merges"] = json!(pre.ignore_merges);
        fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        assert_same(&tokenizer, &through_gguf(&tokenizer, tokenizer.vocab_size()).unwrap(), texts());
    }
}

#[test]
fn an_unknown_pre_tokenizer_is_refused() {
    let error = pre::PreTokenizer::named(Some("smolm")).unwrap_err();
    assert!(error.contains("did you mean `smollm`"), "{error}");
}

#[test]
fn damaged_tokenizer_files_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let good = byte_level(folder.path()).to_string().into_bytes();
    let start = good.windows(8).position(|window| window == b"\"merges\"").unwrap();
    let mut state = 11u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for round in 0..400 {
        let mut bytes = good.clone();
        let at = if round % 2 == 0 { random(1400) } else { start - 300 + random(bytes.len() - start + 300) };
        bytes[at] = b"0123456789\"{}[],:aze-"[random(21)];
        fs::write(folder.path().join("tokenizer.json"), &bytes).unwrap();
        if let Ok(tokenizer) = Tokenizer::from_folder(folder.path()) {
            for text in texts() {
                if let Ok(ids) = tokenizer.encode(&text, true) {
                    let _ = tokenizer.decode(&ids, true);
                }
            }
        }
    }
}
