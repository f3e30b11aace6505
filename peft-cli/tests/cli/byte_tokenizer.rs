//! A tokenizer for models that never saw one. `peft-serve`'s tests use this file too.

use std::path::Path;

use serde_json::json;

/// A byte-level tokenizer without merges: one id a byte, and `<eos>` at 0.
pub(crate) fn write_tokenizer(folder: &Path) {
    // GPT-2's alphabet of bytes: those that print stand for themselves, the others for characters from U+0100 on.
    let mut alphabet: Vec<char> = ('!'..='~').chain('\u{a1}'..='\u{ac}').chain('\u{ae}'..='\u{ff}').collect();
    alphabet.extend((0x100..0x144).filter_map(char::from_u32));
    let mut vocab = serde_json::Map::new();
    vocab.insert("<eos>".into(), 0.into());
    vocab.extend(alphabet.iter().enumerate().map(|(i, c)| (c.to_string(), (i + 1).into())));
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{"id": 0, "content": "<eos>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"});
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}
