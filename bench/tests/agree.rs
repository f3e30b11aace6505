//! The naive step and ours are the same computation, or the comparison would mean nothing.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;

use candle_core::Tensor;
use peft_bench::{LINEARS, Settings, decode, naive, ours, shape};
use peft_core::kernels::testing::randn;
use peft_models::ModelFiles;
use serde_json::json;

/// A Llama of 2 blocks with grouped queries; the head tied or not.
fn tiny(dir: &std::path::Path, tied: bool) -> ModelFiles {
    let (vocab, hidden, inner, head_dim, heads, kv_heads) = (61, 24, 40, 8, 4, 2);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": 2, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 64,
        "rope_theta": 10000.0, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 1,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        let seed = tensors.len() as u64;
        let noise = randn(seed, shape, 0.2).unwrap();
        let value = if shape.len() == 1 { (noise + 1.0).unwrap() } else { noise };
        tensors.push((name, value));
    };
    add("model.embed_tokens.weight".into(), &[vocab, hidden]);
    add("model.norm.weight".into(), &[hidden]);
    if !tied {
        add("lm_head.weight".into(), &[vocab, hidden]);
    }
    for i in 0..2 {
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let shapes =
            [[q, hidden], [kv, hidden], [kv, hidden], [hidden, q], [inner, hidden], [inner, hidden], [hidden, inner]];
        for (name, shape) in LINEARS.iter().zip(shapes) {
            add(format!("model.layers.{i}.{name}.weight"), &shape);
        }
        add(format!("model.layers.{i}.input_layernorm.weight"), &[hidden]);
        add(format!("model.layers.{i}.post_attention_layernorm.weight"), &[hidden]);
    }
    let refs: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    peft_core::write_safetensors(dir.join("model.safetensors"), refs, &BTreeMap::new()).unwrap();
    ModelFiles::open(dir).unwrap()
}

#[test]
fn losses_agree_step_by_step() {
    for tied in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let files = tiny(dir.path(), tied);
        for keep in [usize::MAX, 1, 0] {
            let settings = Settings { batch: 3, seq: 17, steps: 4, rank: 4, keep, stored: false };
            let (naive, _) = naive::run(&files, &settings).unwrap();
            let (ours, report) = ours::run(&files, &settings).unwrap();
            for (step, (a, b)) in naive.iter().zip(&ours).enumerate() {
                assert!((a - b).abs() < 1e-4, "tied {tied}, step {}: naive {a}, ours {b}", step + 1);
            }
            assert!(ours.last() < ours.first(), "{ours:?}");
            assert!(report["tokens_per_second"].as_f64().unwrap() > 0.0, "{report}");
        }
    }
}

#[test]
fn random_models_have_the_shape_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let files = tiny(dir.path(), true);
    let config = files.decoder_config().unwrap();
    let other = shape::random(config, Some(5), Some(100)).unwrap();
    let made = other.decoder_config().unwrap();
    assert_eq!((made.num_hidden_layers, made.vocab_size), (5, 100));
    assert_eq!(made.hidden_size, config.hidden_size);
    let settings = Settings { batch: 1, seq: 5, steps: 1, rank: 2, keep: 5, stored: false };
    // Nothing was learned yet, so every token is about as likely as any other.
    let (losses, _) = ours::run(&other, &settings).unwrap();
    assert!((losses[0] - 100f64.ln()).abs() < 0.2, "{losses:?}");
    assert!(shape::random(config, Some(0), None).is_err());
}

#[test]
fn decoding_goes_on_from_every_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let files = tiny(dir.path(), true);
    let rows = dir.path().join("rows.jsonl");
    std::fs::write(&rows, "{\"input_ids\": [3, 4, 5]}\n{\"input_ids\": [9, 7, 5]}\n").unwrap();
    let prompts = decode::prompts(&rows).unwrap();
    assert_eq!(prompts, [[3, 4, 5], [9, 7, 5]]);
    let both = decode::run(&files, &prompts, 6, false).unwrap();
    let alone = decode::run(&files, &prompts[1..], 6, false).unwrap();
    assert_eq!(both["tokens"][0].as_array().unwrap().len(), 6);
    assert_eq!(both["tokens"][1], alone["tokens"][0]);
    for bad in ["", "{\"ids\": [1]}", "{\"input_ids\": [-1]}", "{"] {
        std::fs::write(&rows, bad).unwrap();
        let message = format!("{:#}", decode::prompts(&rows).unwrap_err());
        assert!(message.contains("rows.jsonl"), "{message}");
    }
}
