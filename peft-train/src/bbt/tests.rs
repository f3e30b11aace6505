//! The projection against its definition, deep prompts against prompts, a search on a tiny model.
#![allow(clippy::unwrap_used)]
use std::path::Path;
use std::sync::Arc;

use peft_core::{Adapter, AdapterSet, Ctx, Route};
use peft_models::Decoder;
use peft_models::config::DecoderConfig;
use peft_models::source::{Placement, RandomSource};
use peft_prompt::word_embedding;
use serde_json::json;

use super::*;
use crate::data::Batch;
use crate::driver::evaluate;
use crate::methods;

fn config(dim: usize) -> BbtConfig {
    BbtConfig { dim, population: 6, sigma: 1.0, alpha: 1.0, projection: Projection::Normal, seed: 5 }
}

fn tiny(model_type: &str) -> Decoder {
    let config = match model_type {
        "gpt2" => {
            json!({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 40, "n_embd": 12, "n_layer": 3,
            "n_head": 3, "n_positions": 64})
        }
        _ => json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 12,
            "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "hidden_act": "silu"}),
    };
    let config = DecoderConfig::from_hf_map(config.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
    let placement = Placement::cpu(None);
    let source = RandomSource { seed: 0, std: 0.3, untied_head: false, placement: placement.clone() };
    Decoder::load(config, &source, &placement).unwrap()
}

fn batch() -> Batch {
    let ids: Vec<u32> = (0..13).map(|i| i * 7 % 40).collect();
    Batch {
        labels: ids.iter().map(|&id| id as i32).collect(),
        position_ids: (0..5).chain(0..8).collect(),
        input_ids: ids,
        bounds: vec![0, 5, 13],
        ..Batch::default()
    }
}

fn adapter(model: &Decoder, table: serde_json::Value) -> Arc<Adapter> {
    Arc::new(methods::create(table.as_object().unwrap(), model, 1).unwrap().adapter)
}

fn loss(model: &Decoder, adapter: &Arc<Adapter>) -> f64 {
    let set = AdapterSet::one("a", adapter.clone());
    evaluate(model, &batch(), &Ctx::eval(&set, &Route::Uniform(0))).unwrap().nll
}

fn rows(model: &Decoder, ids: &[u32]) -> Tensor {
    word_embedding(model).unwrap().base(ids).unwrap()
}

/// Element by element from the same generator, piece by piece.
#[test]
fn a_prompt_is_its_start_and_the_projection_of_its_coordinates() {
    let (tokens, width, dim) = (90, 24, 3);
    let start: Vec<f32> = (0..tokens * width).map(|i| (i % 13) as f32 * 0.1).collect();
    let rows = Tensor::from_vec(start.clone(), (tokens, width), &Device::Cpu).unwrap();
    for (projection, scale) in
        [(Projection::Normal, 0.5 * 2.0 / 3f64.sqrt() / 4.0), (Projection::Uniform, 0.5 / 3f64.sqrt())]
    {
        let config = BbtConfig { sigma: 4.0, alpha: 0.5, projection, ..config(dim) };
        let other = StartRows { rows: rows.clone(), deviation: 1.0 };
        let bbt =
            Bbt::new(config, Depth::EveryBlock, &[other, StartRows { rows: rows.clone(), deviation: 2.0 }]).unwrap();
        let z = vec![vec![0.0; dim], vec![1.0, -2.0, 0.5]];
        let got = bbt.prompts(1, &z).unwrap();
        assert_eq!(got[0].flatten_all().unwrap().to_vec1::<f32>().unwrap(), start);
        let moved = got[1].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (mut squares, mut largest) = (0.0, 0.0f64);
        for (i, (moved, start)) in moved.iter().zip(&start).enumerate() {
            let stream = Stream { seed: 5 ^ PURPOSE, step: (i / ROWS) as u32, site: 1 };
            let count = (i % ROWS + 1) * dim;
            let a = match projection {
                Projection::Normal => stream.normal_vec(count, scale as f32),
                Projection::Uniform => stream.uniform_vec(count, -scale as f32, scale as f32),
            };
            let a = &a[count - dim..];
            let want = f64::from(*start) + a.iter().zip(&z[1]).map(|(a, z)| f64::from(*a) * z).sum::<f64>();
            assert!((f64::from(*moved) - want).abs() < 1e-6, "{i}: {moved} {want}");
            squares += a.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>() / dim as f64 / start_len(tokens, width);
            largest = a.iter().fold(largest, |m, a| m.max(f64::from(a.abs())));
        }
        match projection {
            Projection::Normal => assert!((squares.sqrt() / scale - 1.0).abs() < 0.05, "{squares} {scale}"),
            Projection::Uniform => assert!(largest <= scale && largest > 0.99 * scale),
        }
    }
}

fn start_len(tokens: usize, width: usize) -> f64 {
    (tokens * width) as f64
}

/// The same tokens as a prompt in front of the embeddings and as hidden states in front of every block.
#[test]
fn a_deep_search_begins_as_the_prompt_of_its_text() {
    for model_type in ["llama", "gpt2"] {
        let model = tiny(model_type);
        let text = [3u32, 17, 9, 3, 17];
        let prompt = adapter(&model, json!({"type": "prompt", "num_virtual_tokens": 5}));
        prompt.parameters()[0].set(&rows(&model, &text)).unwrap();
        let prefix = adapter(&model, json!({"type": "prefix", "num_virtual_tokens": 5}));
        let bbt = start(&model, &prefix, config(4), &text[..3]).unwrap();
        assert_eq!((bbt.depth(), bbt.layers.len()), (Depth::EveryBlock, 3));
        let (deep, shallow) = (loss(&model, &prefix), loss(&model, &prompt));
        assert!((deep - shallow).abs() < 1e-4 * shallow, "{model_type}: {deep} {shallow}");
        // Writing a block's start again changes nothing, other rows do.
        let before = prefix.parameters()[0].value().copy().unwrap();
        let again = bbt.prompts(1, &[vec![0.0; 4]]).unwrap();
        write_block(&model, prefix.parameters()[0], 1, &again[0]).unwrap();
        let same = |a: &Tensor, b: &Tensor| {
            let gap = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            gap < 1e-5
        };
        assert!(same(&before, &prefix.parameters()[0].value()));
        let other = bbt.prompts(1, &[vec![1.0; 4]]).unwrap();
        write_block(&model, prefix.parameters()[0], 1, &other[0]).unwrap();
        let now = prefix.parameters()[0].value();
        let width = now.dim(1).unwrap() / 3;
        for (layer, stays) in [(0, true), (1, false), (2, true)] {
            let part = |t: &Tensor| t.narrow(1, layer * width, width).unwrap();
            assert_eq!(same(&part(&before), &part(&now)), stays, "layer {layer}");
        }
    }
}

#[test]
fn a_search_lowers_the_loss_and_layers_take_turns() {
    let model = tiny("llama");
    for table in
        [json!({"type": "prompt", "num_virtual_tokens": 4}), json!({"type": "prefix", "num_virtual_tokens": 4})]
    {
        let adapter = adapter(&model, table.clone());
        let mut bbt = start(&model, &adapter, config(8), &[]).unwrap();
        let layers = bbt.layers.len();
        let before = loss(&model, &adapter);
        let prompt = prompt_of(&adapter).unwrap().clone();
        for step in 0..60 {
            assert_eq!(bbt.turn(), step % layers);
            let write = |block: usize, rows: &Tensor| match bbt_depth(layers) {
                Depth::Embeddings => prompt.set(rows),
                Depth::EveryBlock => write_block(&model, &prompt, block, rows),
            };
            let made = bbt.step(write, || Ok(loss(&model, &adapter))).unwrap();
            assert!(made.loss.is_finite() && made.norm > 0.0);
        }
        let after = loss(&model, &adapter);
        assert!(after < before - 1.0, "{table}: {before} {after}");
        // A loss that fails, or is nowhere a number, leaves the mean's prompt.
        let kept = prompt.value().copy().unwrap();
        let set = |_: usize, rows: &Tensor| prompt.set(rows);
        if layers == 1 {
            assert!(bbt.step(set, || Ok(f64::NAN)).unwrap().loss.is_nan());
            assert!(bbt.step(set, || Err(Error::msg("no"))).is_err());
            let gap = (kept - prompt.value()).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(gap == 0.0, "{gap}");
        }
    }
}

fn bbt_depth(layers: usize) -> Depth {
    if layers == 1 { Depth::Embeddings } else { Depth::EveryBlock }
}

#[test]
fn what_cannot_be_searched_is_refused_by_name() {
    let model = tiny("llama");
    let lora = adapter(&model, json!({"type": "lora", "target_modules": ["q_proj"]}));
    let e = start(&model, &lora, config(4), &[]).unwrap_err().to_string();
    assert!(e.contains("method.type") && e.contains("lora_A"), "{e}");
    let more = adapter(&model, json!({"type": "prompt", "num_virtual_tokens": 2, "modules_to_save": ["model.norm"]}));
    assert!(start(&model, &more, config(4), &[]).unwrap_err().to_string().contains("modules_to_save"));
    let network = adapter(&model, json!({"type": "prefix", "num_virtual_tokens": 2, "prefix_projection": true}));
    assert!(start(&model, &network, config(4), &[]).unwrap_err().to_string().contains("prefix_projection"));
    let prompt = adapter(&model, json!({"type": "prompt", "num_virtual_tokens": 2}));
    for (key, config) in [
        ("bbt_dim", config(0)),
        ("bbt_dim", config(MAX_DIM + 1)),
        ("bbt_population", BbtConfig { population: 3, ..config(4) }),
        ("bbt_sigma", BbtConfig { sigma: 0.0, ..config(4) }),
        ("bbt_alpha", BbtConfig { alpha: f64::NAN, ..config(4) }),
    ] {
        assert!(start(&model, &prompt, config, &[]).unwrap_err().to_string().contains(key), "{key}");
    }
    assert!("nromal".parse::<Projection>().unwrap_err().to_string().contains("did you mean `normal`"));
}
