//! Several adapters measured in one pass, beside each by itself.

#![allow(clippy::unwrap_used, missing_docs)]

mod model_support;

use std::path::Path;

use peft_core::{AdapterSet, ClassToken, Ctx, HeadKind, Route, Segmented, Task};
use peft_models::EncoderDecoder;
use peft_models::config::Seq2SeqConfig;
use peft_models::source::{Placement, RandomSource};
use peft_train::data::{ClassHead, DataSpec, Dataset, DecoderInputs, EncodeOptions, Format};
use peft_train::{evaluate_dataset, evaluate_each, evaluate_head};
use serde_json::{Value, json};

use self::model_support::encoders::{encoder, encoder_for};
use self::model_support::moved;

fn data(rows: &[Value], options: &EncodeOptions) -> Dataset {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    Dataset::load(&DataSpec::from(path.as_path()), Some(Format::Tokens), None, options).unwrap().0
}

fn ids(row: usize, n: usize) -> Vec<usize> {
    (0..n).map(|i| (row * 11 + i * 4 + 3) % 37).collect()
}

fn set_of(model: &impl Segmented, methods: &[Value]) -> AdapterSet {
    let named = methods.iter().enumerate();
    named.fold(AdapterSet::empty(), |set, (i, method)| set.with(i.to_string(), moved(model, method)))
}

/// Each adapter's loss, hits and counted tokens in one pass are those of a pass of its own.
fn check(model: &impl Segmented, data: &Dataset, methods: &[Value]) {
    let set = set_of(model, methods);
    let found = evaluate_each(model, data, &set, 3, |_| {}).unwrap();
    assert_eq!(found.len(), methods.len());
    for (slot, of) in found.iter().enumerate() {
        let route = Route::Uniform(slot);
        let ctx = Ctx::eval(&set, &route);
        let want = match model.task() {
            Task::Head { .. } => {
                let (want, scores) = evaluate_head(model, data, &ctx, 3, |_| {}).unwrap();
                for (name, value) in scores.all() {
                    let got = of.scores.as_ref().unwrap().get(name).unwrap();
                    assert!((got - value).abs() < 1e-4, "{}: {name} {got}, not {value}", methods[slot]);
                }
                want
            }
            _ => evaluate_dataset(model, data, &ctx, 3, |_| {}).unwrap(),
        };
        assert_eq!((of.measured.counted, of.measured.hits), (want.counted, want.hits), "{}", methods[slot]);
        assert!((of.measured.nll - want.nll).abs() < 1e-4 * want.nll, "{}: {of:?}, not {want:?}", methods[slot]);
    }
    assert!((found[0].measured.nll - found[1].measured.nll).abs() > 1e-2);
}

#[test]
fn classes_of_an_encoder() {
    let head = ClassHead {
        labels: ["a", "b", "c"].map(str::to_owned).to_vec(),
        reads: ClassToken::First,
        kind: HeadKind::Classification,
    };
    let options = EncodeOptions { class_head: Some(head), ..EncodeOptions::new(Format::Tokens) };
    let rows: Vec<Value> = (0..8).map(|row| json!({"input_ids": ids(row, 2 + row % 5), "label": row % 3})).collect();
    let gated = json!({"type": "union", "methods": [
        {"type": "prefix", "num_virtual_tokens": 2, "use_gating": true},
        {"r": 2, "target_modules": ["query"], "use_gating": true}]});
    let methods =
        [json!({"r": 2, "target_modules": ["query"]}), gated, json!({"type": "prompt", "num_virtual_tokens": 2})];
    check(&encoder("bert", "-"), &data(&rows, &options), &methods);
}

#[test]
fn other_heads_of_an_encoder() {
    let methods = [json!({"r": 2, "target_modules": ["query"]}), json!({"type": "prefix", "num_virtual_tokens": 2})];
    for kind in HeadKind::ALL.into_iter().filter(|kind| *kind != HeadKind::Classification) {
        let outputs = if kind == HeadKind::QuestionAnswering { 2 } else { 3 };
        let labels = (0..outputs).map(|i| i.to_string()).collect();
        let reads = if kind.is_of_tokens() { ClassToken::Every } else { ClassToken::First };
        let head = ClassHead { labels, reads, kind };
        let options = EncodeOptions { class_head: Some(head), ..EncodeOptions::new(Format::Tokens) };
        let row = |row: usize| {
            let n = 2 + row % 5;
            let flags: Vec<usize> = (0..3).map(|i| (row + i) % 2).collect();
            let tags: Vec<usize> = (0..n).map(|t| (row + t) % 3).collect();
            match kind {
                HeadKind::TokenClassification => json!({"input_ids": ids(row, n), "labels": tags}),
                HeadKind::QuestionAnswering => {
                    json!({"input_ids": ids(row, n), "start_positions": row % 2, "end_positions": n - 1})
                }
                _ => json!({"input_ids": ids(row, n), "labels": flags}),
            }
        };
        let rows: Vec<Value> = (0..8).map(row).collect();
        check(&encoder_for("bert", "-", kind), &data(&rows, &options), &methods);
    }
}

#[test]
fn targets_of_an_encoder_decoder() {
    let map = json!({
        "model_type": "t5", "vocab_size": 37, "d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 2, "num_heads": 3,
        "relative_attention_num_buckets": 6, "relative_attention_max_distance": 9,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0
    });
    let config = Seq2SeqConfig::from_hf_map(map.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
    let placement = Placement::cpu(None);
    let source = RandomSource { seed: 3, std: 0.3, untied_head: false, placement: placement.clone() };
    let model = EncoderDecoder::load(config, &source, &placement).unwrap();
    let decoder = DecoderInputs { start: 0, padding: 0 };
    let options = EncodeOptions { decoder: Some(decoder), ..EncodeOptions::new(Format::Tokens) };
    let row = |row| json!({"input_ids": ids(row, 2 + row % 5), "labels": ids(row + 3, 1 + row % 4)});
    let rows: Vec<Value> = (0..7).map(row).collect();
    let methods = [
        json!({"r": 2}),
        json!({"type": "prefix", "num_virtual_tokens": 2}),
        json!({"type": "prompt", "num_virtual_tokens": 2}),
    ];
    check(&model, &data(&rows, &options), &methods);
}
