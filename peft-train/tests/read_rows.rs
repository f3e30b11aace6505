//! The last block makes the rows that are read, and no others: these are those of the whole block, forward and backward.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod model_support;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use peft_core::kernels::{
    self,
    testing::{close, randn},
};
use peft_core::{Adapter, AdapterSet, Ctx, ReadRows, Route, Segmented, StepRng, TokenBatch, first_pass};
use peft_models::config::{DecoderConfig, EncoderConfig};
use peft_models::source::{Placement, RandomSource};
use peft_models::{Decoder, Encoder};
use serde_json::{Value, json};

use self::model_support::{mixture, moved};

/// Three sequences, and of them rows of the first and the last.
const BOUNDS: [usize; 4] = [0, 5, 6, 9];
const READ: [u32; 4] = [0, 2, 3, 7];

fn decoder(changes: &Value) -> Decoder {
    let mut map = json!({
        "model_type": "llama", "vocab_size": 37, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64
    });
    map.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    let config = DecoderConfig::from_hf_map(map.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
    let placement = Placement::cpu(None);
    let source = RandomSource { seed: 3, std: 0.3, untied_head: true, placement: placement.clone() };
    Decoder::load(config, &source, &placement).unwrap()
}

fn encoder() -> Encoder {
    let map = json!({
        "model_type": "bert", "vocab_size": 37, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 16, "num_labels": 2
    });
    let config = EncoderConfig::from_hf_map(map.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
    let placement = Placement::cpu(None);
    let source = RandomSource { seed: 3, std: 0.3, untied_head: true, placement: placement.clone() };
    Encoder::load(config, &source, &placement, 5).unwrap()
}

/// The rows that are read, by the last block and by the whole block, and the gradient of each parameter and of the input.
fn both(model: &impl Segmented, adapters: &[Arc<Adapter>], route: &Route) {
    let named = adapters.iter().enumerate();
    let set = named.fold(AdapterSet::empty(), |set, (i, adapter)| set.with(i.to_string(), adapter.clone()));
    let ctx = Ctx::train(&set, route, StepRng::default());
    let ids: Vec<u32> = (0..9).map(|i| (i * 5 + 3) % 37).collect();
    let batch = TokenBatch { ids: &ids, positions: &[0, 1, 2, 3, 4, 0, 0, 1, 2], bounds: &BOUNDS, types: &[] };
    let first = first_pass(model, batch, &ctx).unwrap();
    assert_eq!(first.is_some(), adapters.iter().any(|adapter| adapter.first_pass()));
    let ctx = Ctx { first: first.as_ref(), ..ctx };
    let input = model.prepare(batch, &ctx).unwrap();
    let hidden = candle_core::Var::from_tensor(&model.embed(batch, &ctx.untracked()).unwrap()).unwrap();
    let (read, last) = (ReadRows::new(READ.to_vec(), &ctx).unwrap(), model.num_blocks() - 1);
    let gradient = randn(9, (READ.len(), 16), 1.0).unwrap();
    let run = |block: &dyn Fn() -> peft_core::Result<Tensor>| {
        let (out, record) = kernels::record(block).unwrap();
        let found: HashMap<_, _> = record.backward(&gradient).unwrap().into_iter().collect();
        let of = |x: &Tensor| found.get(&x.id()).cloned();
        let parameters = adapters.iter().flat_map(|a| a.parameters()).map(|p| of(p.var()));
        (out, of(&hidden), parameters.collect::<Vec<_>>())
    };
    let (some, d_some, of_some) = run(&|| model.last_block(&hidden, &read, &input, &ctx));
    let (all, d_all, of_all) = run(&|| read.of(&model.block(last, &hidden, &input, &ctx)?));
    close("rows", &some, &all, 1e-4).unwrap();
    close("gradient of the input", &d_some.unwrap(), &d_all.unwrap(), 1e-4).unwrap();
    assert!(of_all.iter().any(Option::is_some));
    for (a, b) in of_some.iter().zip(&of_all) {
        assert_eq!(a.is_some(), b.is_some());
        if let (Some(a), Some(b)) = (a, b) {
            close("gradient of a parameter", a, b, 1e-4).unwrap();
        }
    }
}

fn check(model: &impl Segmented, methods: &[Value]) {
    let adapters: Vec<_> = methods.iter().map(|method| moved(model, method)).collect();
    for adapter in &adapters {
        both(model, std::slice::from_ref(adapter), &Route::Uniform(0));
    }
    both(model, &adapters, &Route::rows(&BOUNDS, &[Some(1), None, Some(0)]));
    both(model, &adapters, &Route::rows(&BOUNDS, &[Some(0), Some(1), Some(1)]));
}

/// A prefix that is another one for each sequence.
fn gated() -> Value {
    json!({"type": "union", "methods": [{"type": "prefix", "num_virtual_tokens": 2, "use_gating": true}]})
}

#[test]
fn of_decoders() {
    let lora = json!({"type": "lora", "r": 2, "target_modules": "all-linear"});
    let bottleneck = json!({"type": "bottleneck", "preset": "seq_bn", "reduction_factor": 4});
    let window = json!({"model_type": "gemma2", "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 2});
    for changes in [json!({}), window] {
        check(&decoder(&changes), &[lora.clone(), bottleneck.clone()]);
        check(&decoder(&changes), &[gated(), lora.clone()]);
    }
    check(
        &decoder(&json!({"model_type": "gpt_neox", "rotary_pct": 1.0})),
        &[lora.clone(), json!({"type": "ln", "target_modules": ["post_attention_layernorm"]})],
    );
    let (model, dir) = (decoder(&json!({})), tempfile::tempdir().unwrap());
    let experts = [lora.clone(), json!({"r": 3, "target_modules": ["o_proj", "down_proj"]})];
    check(&model, &[mixture(&model, &experts, dir.path()), lora]);
}

/// A prefix that takes no positions lies in no window.
#[test]
fn rows_longer_than_a_window_behind_such_a_prefix_are_refused() {
    let model = decoder(&json!({"model_type": "mistral", "sliding_window": 6}));
    let prefix = json!({"type": "prefix", "num_virtual_tokens": 2, "moves_positions": false});
    let set = AdapterSet::one("a", moved(&model, &json!({"type": "union", "methods": [prefix]})));
    let ctx = Ctx::eval(&set, &Route::Uniform(0));
    let prepared = |tokens: usize| {
        let ids = vec![3; tokens];
        let positions: Vec<u32> = (0..tokens as u32).collect();
        let batch = TokenBatch { ids: &ids, positions: &positions, bounds: &[0, tokens], types: &[] };
        model.prepare(batch, &ctx).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(prepared(4), Ok(()));
    assert!(prepared(5).unwrap_err().contains("data.max_length = 4"));
}

#[test]
fn of_encoders() {
    let lora = json!({"type": "lora", "r": 2, "target_modules": "all-linear"});
    check(&encoder(), &[lora.clone(), json!({"type": "ia3"})]);
    let (model, dir) = (encoder(), tempfile::tempdir().unwrap());
    let experts = [lora.clone(), json!({"r": 3, "target_modules": ["output.dense"]})];
    check(&model, &[mixture(&model, &experts, dir.path()), lora]);
}
