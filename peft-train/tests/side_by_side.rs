//! Several adapters measured in one pass, beside each by itself.

#![allow(clippy::unwrap_used, missing_docs)]

mod model_support;

use std::path::Path;

use peft_core::{AdapterSet, ClassToken, Ctx, Route, Segmented};
use peft_models::EncoderDecoder;
use peft_models::config::Seq2SeqConfig;
use peft_models::source::{Placement, RandomSource};
use peft_train::data::{ClassHead, DataSpec, Dataset, DecoderInputs, EncodeOptions, Format};
use peft_train::{evaluate_classes, evaluate_dataset, evaluate_each};
use serde_json::{Value, json};

use self::model_support::encoders::encoder;
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
fn check(model: &impl Segmented, data: &Dataset, methods: &[Value], classes: Option<usize>) {
    let set = set_of(model, methods);
    let found = evaluate_each(model, data, &set, classes, 3, |_| {}).unwrap();
    assert_eq!(found.len(), methods.len());
    for (slot, of) in found.iter().enumerate() {
        let route = Route::Uniform(slot);
        let ctx = Ctx::eval(&set, &route);
        let want = match classes {
            None => evaluate_dataset(model, data, &ctx, 3, |_| {}).unwrap(),
            Some(classes) => {
                let (want, confusion) = evaluate_classes(model, data, classes, &ctx, 3, |_| {}).unwrap();
                assert_eq!(of.confusion, Some(confusion), "{}", methods[slot]);
                want
            }
        };
        assert_eq!((of.measured.counted, of.measured.hits), (want.counted, want.hits), "{}", methods[slot]);
        assert!((of.measured.nll - want.nll).abs() < 1e-4 * want.nll, "{}: {of:?}, not {want:?}", methods[slot]);
    }
    assert!((found[0].measured.nll - found[1].measured.nll).abs() > 1e-2);
}

#[test]
fn classes_of_an_encoder() {
    let head = ClassHead { labels: ["a", "b", "c"].map(str::to_owned).to_vec(), reads: ClassToken::First };
    let options = EncodeOptions { class_head: Some(head), ..EncodeOptions::new(Format::Tokens) };
    let rows: Vec<Value> = (0..8).map(|row| json!({"input_ids": ids(row, 2 + row % 5), "label": row % 3})).collect();
    let gated = json!({"type": "union", "methods": [
        {"type": "prefix", "num_virtual_tokens": 2, "use_gating": true},
        {"r": 2, "target_modules": ["query"], "use_gating": true}]});
    let methods =
        [json!({"r": 2, "target_modules": ["query"]}), gated, json!({"type": "prompt", "num_virtual_tokens": 2})];
    check(&encoder("bert", "-"), &data(&rows, &options), &methods, Some(3));
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
    check(&model, &data(&rows, &options), &methods, None);
}
