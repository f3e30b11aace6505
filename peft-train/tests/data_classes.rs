//! Rows for a class head: framing, pairs, truncation, labels, batches.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod data_support;

use data_support::Folder;
use peft_core::{ClassToken, HeadKind};
use peft_train::data::{
    Batch, ClassHead, DataError, DataSpec, Dataset, EncodeOptions, Format, HfTextTokenizer, Predictor, preview,
};
use serde_json::json;

/// Words as tokens, framed as BERT frames them: `[CLS] text [SEP]`, `[CLS] text [SEP] pair [SEP]`.
fn tokenizer() -> HfTextTokenizer {
    let vocab = json!({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4, "c": 5, "d": 6, "e": 7});
    let special = |id: u32, text: &str| json!({"id": text, "ids": [id], "tokens": [text]});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "[SEP]", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}},
                     {"SpecialToken": {"id": "[SEP]", "type_id": 1}}],
            "special_tokens": {"[CLS]": special(1, "[CLS]"), "[SEP]": special(2, "[SEP]")}
        }
    });
    let inner = tokenizers::Tokenizer::from_bytes(tokenizer.to_string()).unwrap();
    HfTextTokenizer::new(inner, None, None, None).unwrap()
}

fn options(reads: ClassToken) -> EncodeOptions {
    let labels = ["no", "yes"].map(str::to_string).to_vec();
    EncodeOptions {
        class_head: Some(ClassHead { labels, reads, kind: HeadKind::Classification }),
        vocab_size: Some(8),
        ..EncodeOptions::new(Format::Classification)
    }
}

fn load(rows: &str, options: &EncodeOptions) -> Result<Dataset, DataError> {
    let folder = Folder::new();
    let path = folder.write("rows.jsonl", rows);
    Dataset::load(&DataSpec::from(path.as_path()), None, Some(&tokenizer()), options).map(|(d, _)| d)
}

#[test]
fn texts_and_pairs_are_framed_as_transformers_frames_them() {
    let rows = "{\"text\": \"a b\", \"label\": \"yes\"}\n{\"text\": \"a\", \"text_pair\": \"b c\", \"label\": 0}\n";
    let d = load(rows, &options(ClassToken::First)).unwrap();
    assert_eq!((d.input_ids(0), d.labels(0)), ([1, 3, 4, 2].as_slice(), vec![1, -100, -100, -100]));
    assert_eq!((d.input_ids(1), d.types(1)), ([1, 3, 2, 4, 5, 2].as_slice(), [0, 0, 0, 1, 1, 1].as_slice()));
    assert_eq!(d.types(0), [0, 0, 0, 0]);
    assert_eq!((d.stats().counted_tokens, d.predictor()), (2, Predictor::Own));
    let shown = preview(&d, 1, &|ids| format!("{ids:?}"))[0].to_string();
    assert!(shown.contains("class 1") && shown.contains("⟦[1]⟧"), "{shown}");

    let b = Batch::new(&d, &[1, 0]);
    assert_eq!((b.targets().positions, b.targets().ids), (vec![0, 6], vec![0, 1]));
    assert_eq!(b.types, [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]);
    // Without pairs there are no types to hold.
    let plain = load("{\"text\": \"a\", \"label\": 1}\n", &options(ClassToken::Last)).unwrap();
    let b = Batch::new(&plain, &[0, 0]);
    assert_eq!((b.types.as_slice(), b.targets().positions), ([].as_slice(), vec![2, 5]));
}

#[test]
fn long_rows_lose_text_and_keep_their_frame() {
    let cut = |text: &str, pair: Option<&str>, max| {
        let row = json!({"text": text, "text_pair": pair, "label": 0}).to_string();
        let d = load(&row, &EncodeOptions { max_length: Some(max), ..options(ClassToken::Last) });
        d.map(|d| (d.input_ids(0).to_vec(), d.labels(0), d.stats().truncated_prompts))
    };
    assert_eq!(cut("a b c d", None, 6).unwrap().2, 0);
    assert_eq!(cut("a b c d", None, 4).unwrap(), (vec![1, 3, 4, 2], vec![-100, -100, -100, 0], 1));
    // The longer text is cut first.
    assert_eq!(cut("a b c d e", Some("a b"), 7).unwrap().0, [1, 3, 4, 2, 3, 4, 2]);
    assert_eq!(cut("a b", Some("a b c d e"), 7).unwrap().0, [1, 3, 4, 2, 3, 4, 2]);
    assert_eq!(cut("a b", Some("c d"), 6).unwrap().0, [1, 3, 4, 2, 5, 2]);
    let message = cut("a", Some("b"), 2).unwrap_err().to_string();
    assert!(message.contains("rows.jsonl:1") && message.contains("data.max_length"), "{message}");
}

#[test]
fn rows_of_tokens_have_a_class_too() {
    let tokens = |rows: &str| load(rows, &options(ClassToken::Last));
    let d = tokens("{\"input_ids\": [3, 4], \"label\": 1}\n{\"input_ids\": [5], \"labels\": 0}\n").unwrap();
    assert_eq!((d.labels(0), d.labels(1)), (vec![-100, 1], vec![0]));
    for (row, says) in [
        ("{\"input_ids\": [3, 9], \"label\": 1}", "outside the vocabulary"),
        ("{\"input_ids\": [3], \"label\": 2}", "numbers 0 to 1"),
        ("{\"input_ids\": [], \"label\": 1}", "no tokens"),
        ("{\"input_ids\": [3]}", "label"),
        ("{\"input_ids\": [3], \"labels\": [1]}", "not a class"),
    ] {
        let message = tokens(row).unwrap_err().to_string();
        assert!(message.contains("rows.jsonl:1") && message.contains(says), "{row}: {message}");
    }
}

#[test]
fn what_does_not_fit_a_class_head_is_refused() {
    for (row, says) in [
        ("{\"text\": \"a\"}", "class head"),
        ("{\"prompt\": \"a\", \"completion\": \"b\"}", "class head"),
        ("{\"text\": \"a\", \"label\": \"yess\"}", "did you mean `yes`"),
        ("{\"text\": \"a\", \"label\": 0.5}", "whole numbers"),
        ("{\"text\": 3, \"label\": 0}", "text"),
    ] {
        let message = load(row, &options(ClassToken::First)).unwrap_err().to_string();
        assert!(message.contains(says), "{row}: {message}");
    }
    let words = EncodeOptions { label_words: [("a".into(), "b".into())].into(), ..options(ClassToken::First) };
    let message = load("{\"text\": \"a\", \"label\": 0}", &words).unwrap_err().to_string();
    assert!(message.contains("data.labels"), "{message}");
}
