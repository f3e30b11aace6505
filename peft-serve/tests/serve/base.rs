//! A tiny random base, adapters of many methods for it, and what a request gets alone.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Tensor;
use peft_core::kernels::testing::randn;
use peft_core::{Adapter, AdapterSet};
use peft_models::Decoder;
use peft_models::config::DecoderConfig;
use peft_models::generate::{GenerateOptions, Request, generate};
use peft_models::source::{Placement, RandomSource};
use peft_serve::Registry;
use peft_train::checkpoint::write_adapter_files;
use peft_train::methods;
use serde_json::{Value, json};

pub(crate) const VOCAB: u32 = 71;

pub(crate) fn base() -> Arc<Decoder> {
    base_with(json!({}))
}

/// The base with some keys of its config changed.
pub(crate) fn base_with(keys: Value) -> Arc<Decoder> {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 40,
        "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 5, "num_key_value_heads": 1,
        "head_dim": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 256,
        "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 1,
    });
    let map = config.as_object_mut().unwrap();
    map.extend(keys.as_object().unwrap().clone());
    let config = DecoderConfig::from_hf_map(map.clone(), "config.json".as_ref()).unwrap();
    let placement = Placement::cpu(None);
    let source = RandomSource { seed: 3, std: 0.4, untied_head: false, placement: placement.clone() };
    Arc::new(Decoder::load(config, &source, &placement).unwrap())
}

/// Names and `[method]` tables: what the serving form holds and what it does not, what looks at whole sequences, and virtual
/// tokens of both kinds.
pub(crate) fn kinds() -> Vec<(&'static str, Value)> {
    vec![
        ("lora", json!({"type": "lora", "r": 4, "target_modules": "all-linear"})),
        (
            "wide",
            json!({"type": "lora", "r": 16, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
        ),
        ("dora", json!({"type": "lora", "r": 4, "target_modules": ["q_proj", "up_proj"], "use_dora": true})),
        ("head", json!({"type": "lora", "r": 4, "target_modules": ["k_proj"], "modules_to_save": ["norm"]})),
        ("ia3", json!({"type": "ia3"})),
        ("loha", json!({"type": "loha", "r": 2, "target_modules": ["q_proj", "o_proj"]})),
        ("lokr", json!({"type": "lokr", "r": 2, "target_modules": ["v_proj", "down_proj"]})),
        ("oft", json!({"type": "oft", "oft_block_size": 8, "target_modules": ["q_proj"]})),
        ("bottleneck", json!({"type": "bottleneck", "preset": "seq_bn", "reduction_factor": 8})),
        ("gated", json!({"type": "bottleneck", "preset": "seq_bn", "reduction_factor": 8, "use_gating": true})),
        ("reft", json!({"type": "reft", "preset": "loreft", "r": 2, "prefix_positions": 2, "suffix_positions": 2})),
        ("prefix", json!({"type": "prefix", "num_virtual_tokens": 5})),
        ("prompt", json!({"type": "prompt", "num_virtual_tokens": 7})),
        ("p_tuning", json!({"type": "p_tuning", "num_virtual_tokens": 3, "encoder_hidden_size": 12})),
        ("bitfit", json!({"type": "bitfit", "add_biases": true})),
        ("llama_adapter", json!({"type": "adaption_prompt", "adapter_len": 4, "adapter_layers": 2})),
    ]
}

/// An adapter whose parameters have been moved, as training would.
pub(crate) fn trained(method: &Value, model: &Decoder, seed: u64) -> Adapter {
    let adapter = methods::create(method.as_object().unwrap(), model, seed).unwrap().adapter;
    for (i, p) in adapter.parameters().into_iter().enumerate() {
        let noise: Tensor = randn(seed * 1000 + i as u64, p.value().shape(), 0.2).unwrap();
        p.set(&(p.value() + noise).unwrap()).unwrap();
    }
    adapter
}

/// Writes such an adapter to a folder.
pub(crate) fn write(folder: &Path, method: &Value, model: &Decoder, seed: u64) -> PathBuf {
    write_adapter_files(folder, &trained(method, model, seed)).unwrap();
    folder.to_path_buf()
}

pub(crate) fn registry(model: &Arc<Decoder>, budget: Option<u64>) -> Registry {
    let model = model.clone();
    Registry::new(move |folder: &Path| Ok(methods::open(folder, &*model)?.adapter), budget)
}

/// What `generate` writes for one request alone.
pub(crate) fn alone(
    model: &Decoder,
    adapter: Option<&Arc<Adapter>>,
    prompt: &[u32],
    options: &GenerateOptions,
) -> Vec<u32> {
    let set = adapter.map_or_else(AdapterSet::empty, |a| AdapterSet::one("a", a.clone()));
    let request = Request { prompt: prompt.to_vec(), slot: adapter.map(|_| 0) };
    generate(model, &set, &[request], options, |_, _| true).unwrap().remove(0)
}

/// Numbers that look random.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }

    pub(crate) fn prompt(&mut self, longest: usize) -> Vec<u32> {
        let n = 1 + self.below(longest);
        (0..n).map(|_| self.below(VOCAB as usize) as u32).collect()
    }
}
