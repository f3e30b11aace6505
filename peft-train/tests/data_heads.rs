//! Rows for heads over numbers, several classes, tokens and answers: labels, truncation, and what is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod data_support;

use data_support::Folder;
use peft_core::{ClassToken, HeadKind};
use peft_train::data::{
    Batch, ClassHead, DataError, DataSpec, Dataset, EncodeOptions, Format, HfTextTokenizer, preview,
};
use serde_json::{Value, json};

/// Letters and pairs of them as tokens, words of several letters cut into these; framed as BERT frames them.
fn tokenizer() -> HfTextTokenizer {
    let vocab =
        json!({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4, "c": 5, "##a": 6, "##b": 7, "##c": 8, "é": 9});
    let special = |id: u32, text: &str| json!({"id": text, "ids": [id], "tokens": [text]});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
        "model": {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100},
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

fn options(kind: HeadKind, labels: &[&str], max: usize) -> EncodeOptions {
    let reads = if kind.is_of_tokens() { ClassToken::Every } else { ClassToken::First };
    let labels = labels.iter().map(|s| s.to_string()).collect();
    EncodeOptions {
        class_head: Some(ClassHead { labels, reads, kind }),
        vocab_size: Some(10),
        max_length: Some(max),
        keep_answers: true,
        ..EncodeOptions::new(Format::Text)
    }
}

fn load(rows: &[Value], options: &EncodeOptions) -> Result<Dataset, DataError> {
    let folder = Folder::new();
    let path = folder.write("rows.jsonl", rows.iter().map(|row| format!("{row}\n")).collect::<String>());
    Dataset::load(&DataSpec::from(path.as_path()), None, Some(&tokenizer()), options).map(|(data, _)| data)
}

#[track_caller]
fn refused(row: Value, options: &EncodeOptions, says: &[&str]) {
    let e = load(std::slice::from_ref(&row), options).unwrap_err().to_string();
    for says in says.iter().chain(&["rows.jsonl:1"]) {
        assert!(e.contains(says), "{row}: {e}");
    }
}

#[test]
fn numbers_go_with_their_rows_into_batches() {
    let one = options(HeadKind::Regression, &["LABEL_0"], 9);
    let rows = [json!({"text": "a b", "label": 2.5}), json!({"text": "c", "text_pair": "a", "label": "-1"})];
    let d = load(&rows, &one).unwrap();
    assert_eq!((d.values(0), d.values(1), d.values(2)), ([2.5].as_slice(), [-1.0].as_slice(), [].as_slice()));
    let b = Batch::new(&d, &[1, 0, 1]);
    assert_eq!(
        (b.values.as_slice(), b.targets().positions.as_slice()),
        ([-1.0, 2.5, -1.0].as_slice(), [0, 5, 9].as_slice())
    );
    assert!(preview(&d, 1, &|ids| format!("{ids:?}"))[0].to_string().contains("value 2.5"));
    let several = options(HeadKind::MultiLabel, &["x", "y", "z"], 9);
    let d = load(&[json!({"text": "a", "labels": ["z", "x"]}), json!({"text": "a", "labels": [0, 1, 0]})], &several)
        .unwrap();
    assert_eq!((d.values(0), d.values(1)), ([1.0, 0.0, 1.0].as_slice(), [0.0, 1.0, 0.0].as_slice()));
    refused(json!({"text": "a", "label": "good"}), &one, &["`label`", "\"good\" is not a number"]);
    refused(json!({"text": "a", "label": [1, 2]}), &one, &["2 numbers", "1 outputs"]);
    refused(json!({"text": "a", "labels": ["w"]}), &several, &["outside the head", "`x`, `y`, `z`"]);
    refused(json!({"tokens": ["a"], "labels": [1]}), &one, &["columns"]);
}

#[test]
fn the_first_token_of_a_word_carries_its_class() {
    let o = |max| options(HeadKind::TokenClassification, &["O", "B", "I"], max);
    let row = json!({"tokens": ["ab", "c", "abc"], "ner_tags": ["B", -100, 2]});
    let d = load(std::slice::from_ref(&row), &o(20)).unwrap();
    assert_eq!(d.input_ids(0), [1, 3, 7, 5, 3, 7, 8, 2]);
    assert_eq!(d.labels(0), [-100, 1, -100, -100, 2, -100, -100, -100]);
    assert_eq!(Batch::new(&d, &[0]).targets().positions, [1, 4]);
    let d = load(std::slice::from_ref(&row), &o(5)).unwrap();
    assert_eq!((d.input_ids(0), d.labels(0)), ([1, 3, 7, 5, 2].as_slice(), vec![-100, 1, -100, -100, -100]));
    assert_eq!(d.stats().truncated_targets, 1);
    let d = load(&[json!({"input_ids": [3, 4, 5], "labels": [0, -100, 2]})], &o(20)).unwrap();
    assert_eq!(d.labels(0), [0, -100, 2]);
    refused(json!({"tokens": ["a", "b"], "labels": [1]}), &o(20), &["`labels` has 1 entries, `tokens` 2"]);
    refused(json!({"input_ids": [3, 4], "labels": [1]}), &o(20), &["`labels` has 1 entries, `input_ids` 2"]);
    refused(json!({"tokens": ["a", "b"], "labels": [1, 3]}), &o(20), &["`labels[1]`", "outside the head", "3 classes"]);
    refused(json!({"tokens": ["a", 7], "labels": [1, 0]}), &o(20), &["tokens[1]", "a number"]);
    refused(json!({"tokens": ["a"], "labels": [-100]}), &o(20), &["no token of this row counts"]);
    refused(json!({"tokens": ["c", "a"], "labels": [-100, 1]}), &o(3), &["once it is cut"]);
    refused(json!({"tokens": "a b", "labels": [1, 0]}), &o(20), &["`tokens`", "a list of words"]);
    let e = load(&[json!({"text": "a", "label": 1})], &o(20)).unwrap_err().to_string();
    assert!(
        e.contains("a head for token_classification") && e.contains("`tokens`") && e.contains("not classification"),
        "{e}"
    );
}

#[test]
fn answers_are_found_by_their_characters() {
    let o = |max| options(HeadKind::QuestionAnswering, &["start", "end"], max);
    // é is two bytes and one character.
    let row = |start: u64, text: &str| json!({"question": "c", "context": "é ab c a", "answers": {"text": [text], "answer_start": [start]}});
    let d = load(&[row(2, "ab c")], &o(20)).unwrap();
    assert_eq!(d.input_ids(0), [1, 5, 2, 9, 3, 7, 5, 3, 2]);
    assert_eq!(d.labels(0), [0, 0, 0, 0, 1, 0, 2, 0, 0]);
    assert_eq!(d.stats().counted_tokens, 1);
    let question = d.question(0).unwrap();
    assert_eq!((question.first, question.spans.as_slice()), (3, [0..2, 3..4, 4..5, 6..7, 8..9].as_slice()));
    assert!(preview(&d, 1, &|ids| format!("{ids:?}"))[0].to_string().contains("⟦[3]|[7]|[5]⟧"));
    let b = Batch::new(&d, &[0, 0]);
    assert_eq!((b.counted(), b.targets().ids.len(), b.targets().positions.len()), (2, 18, 18));
    // An answer inside a token has the whole of it; one of SQuAD's files is a list.
    let listed = json!({"question": "c", "context": "é ab c a", "answers": [{"text": "b", "answer_start": 3}]});
    assert_eq!(load(&[listed], &o(20)).unwrap().labels(0)[5], 3);
    // Cut away, or none at all: the first token.
    let cut = load(&[row(5, "c a")], &o(8)).unwrap();
    assert_eq!((cut.labels(0), cut.stats().truncated_targets), (vec![3, 0, 0, 0, 0, 0, 0, 0], 1));
    assert_eq!(cut.question(0).unwrap().answers, ["c a"]);
    let none = json!({"question": "c", "context": "a", "answers": {"text": [], "answer_start": []}});
    let none = load(&[none], &o(20)).unwrap();
    assert!(none.has_unanswerable() && none.labels(0)[0] == 3 && none.stats().truncated_targets == 0);
    refused(row(3, "ab c"), &o(20), &["`ab c` is not in its context at character 3", "`b c `"]);
    refused(row(90, "ab"), &o(20), &["character 90"]);
    refused(
        json!({"question": "c", "context": "a", "answers": {"text": ["a"], "answer_start": []}}),
        &o(20),
        &["1 texts and 0 starts"],
    );
    refused(json!({"question": "c", "context": "a", "answers": "a"}), &o(20), &["`answers`", "a string"]);
    refused(row(2, "ab"), &o(4), &["no room beside the question"]);
    let tokens = |from: Value, to: Value| json!({"input_ids": [3, 4, 5], "start_positions": from, "end_positions": to});
    assert_eq!(load(&[tokens(json!(1), json!(1))], &o(20)).unwrap().labels(0), [0, 3, 0]);
    refused(tokens(json!(1), json!(3)), &o(20), &["`end_positions` is 3", "3 tokens"]);
    refused(tokens(json!(2), json!(1)), &o(20), &["ends before it"]);
    refused(tokens(json!(-1), json!(1)), &o(20), &["start_positions"]);
}
