//! Rows for an encoder–decoder: framing, shifted targets, truncation, batches.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod data_support;

use data_support::Folder;
use peft_train::data::{
    Batch, DataError, DataSpec, Dataset, DecoderInputs, EncodeOptions, Format, HfTextTokenizer, Predictor, preview,
};
use serde_json::json;

/// Words as tokens, framed as T5 frames them: `text </s>`; with `frames` false without a frame.
fn tokenizer(frames: bool) -> HfTextTokenizer {
    let vocab = json!({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5, "d": 6});
    let frame = json!({
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        "post_processor": if frames { frame } else { json!(null) }
    });
    let inner = tokenizers::Tokenizer::from_bytes(tokenizer.to_string()).unwrap();
    HfTextTokenizer::new(inner, None, Some("</s>".into()), None).unwrap()
}

fn options() -> EncodeOptions {
    EncodeOptions {
        decoder: Some(DecoderInputs { start: 0, padding: 0 }),
        vocab_size: Some(7),
        ..EncodeOptions::new(Format::Text)
    }
}

fn load_framed(rows: &str, options: &EncodeOptions, frames: bool) -> Result<Dataset, DataError> {
    let folder = Folder::new();
    let path = folder.write("rows.jsonl", rows);
    Dataset::load(&DataSpec::from(path.as_path()), None, Some(&tokenizer(frames)), options).map(|(d, _)| d)
}

fn load(rows: &str, options: &EncodeOptions) -> Result<Dataset, DataError> {
    load_framed(rows, options, true)
}

#[test]
fn the_decoder_reads_its_target_one_place_later() {
    let d = load("{\"source\": \"a b\", \"target\": \"c d\"}\n{\"source\": \"d\", \"target\": \"a\"}\n", &options())
        .unwrap();
    assert_eq!((d.input_ids(0), d.source_tokens(0)), ([3, 4, 1, 0, 5, 6].as_slice(), 3));
    assert_eq!(d.labels(0), [-100, -100, -100, 5, 6, 1]);
    assert_eq!((d.predictor(), d.stats().counted_tokens, d.is_paired()), (Predictor::Own, 5, true));

    // What decoders read of all rows, then all sources.
    let b = Batch::new(&d, &[1, 0]);
    assert_eq!(b.input_ids, [0, 3, 0, 5, 6, 6, 1, 3, 4, 1]);
    assert_eq!((b.bounds.as_slice(), b.sequences()), ([0, 2, 5, 7, 10].as_slice(), 4));
    assert_eq!(b.position_ids, [0, 1, 0, 1, 2, 0, 1, 0, 1, 2]);
    assert_eq!((b.targets().positions, b.targets().ids), (vec![0, 1, 2, 3, 4], vec![3, 1, 5, 6, 1]));

    let shown = preview(&d, 1, &|ids| format!("{ids:?}"))[0].to_string();
    assert!(shown.contains("[3]|[4]|[1]⟦[5]|[6]|[1]⟧") && !shown.contains("class"), "{shown}");
}

#[test]
fn a_tokenizer_without_a_frame_still_closes_the_target() {
    let d = load_framed("{\"source\": \"a b\", \"target\": \"c\"}", &options(), false).unwrap();
    assert_eq!((d.input_ids(0), d.labels(0)), ([3, 4, 0, 5].as_slice(), vec![-100, -100, 5, 1]));
}

#[test]
fn other_formats_with_a_prompt_and_an_answer() {
    let of = |row: &str, template: Option<&str>| {
        let d = load(row, &EncodeOptions { template: template.map(str::to_string), ..options() }).unwrap();
        (d.input_ids(0).to_vec(), d.labels(0))
    };
    let want = (vec![3, 1, 0, 4], vec![-100, -100, 4, 1]);
    assert_eq!(of("{\"prompt\": \"a\", \"completion\": \"b\"}", None), want);
    assert_eq!(of("{\"instruction\": \"x\", \"output\": \"b\"}", Some("a")), want);
    assert_eq!(of("{\"source\": \"x\", \"target\": \"b\"}", Some("a")), want);
    assert_eq!(of("{\"text\": \"a\", \"label\": \"b\"}", Some("{{ text }}")), want);
    assert_eq!(of("{\"input_ids\": [3, 1], \"labels\": [4, 1]}", None), want);
    // A target that does not count is read as padding.
    let (ids, labels) = of("{\"input_ids\": [3], \"labels\": [-100, 5, 1]}", None);
    assert_eq!((ids, labels), (vec![3, 0, 0, 5], vec![-100, -100, 5, 1]));
}

#[test]
fn long_rows_lose_text_on_either_side() {
    let short = EncodeOptions { max_length: Some(3), ..options() };
    let d = load("{\"source\": \"a b c d\", \"target\": \"d c b\"}", &short).unwrap();
    assert_eq!((d.input_ids(0), d.labels(0)), ([3, 4, 1, 0, 6, 5].as_slice(), vec![-100, -100, -100, 6, 5, 1]));
    assert_eq!((d.stats().truncated_prompts, d.stats().truncated_targets), (1, 1));
    let d = load("{\"input_ids\": [3, 4, 5, 6], \"labels\": [3, 4, 5, 6]}", &short).unwrap();
    assert_eq!(d.input_ids(0), [3, 4, 5, 0, 3, 4]);
}

#[test]
fn what_does_not_fit_is_refused() {
    for (row, says) in [
        ("{\"text\": \"a\"}", "source"),
        ("{\"messages\": []}", "seq2seq"),
        ("{\"text\": \"a\", \"label\": \"b\"}", "data.template"),
        ("{\"source\": \"a\", \"target\": 3}", "target"),
        ("{\"input_ids\": [3]}", "labels"),
        ("{\"input_ids\": [], \"labels\": [3]}", "no tokens"),
        ("{\"input_ids\": [3], \"labels\": [-100]}", "counts"),
        ("{\"input_ids\": [3], \"labels\": [9]}", "outside the vocabulary"),
    ] {
        let message = load(row, &options()).unwrap_err().to_string();
        assert!(message.contains(says), "{row}: {message}");
    }
    // On a model without a decoder of its own the format is refused, with the way out.
    let message =
        load("{\"source\": \"a\", \"target\": \"b\"}", &EncodeOptions::new(Format::Text)).unwrap_err().to_string();
    assert!(message.contains("encoder-decoder"), "{message}");
}
