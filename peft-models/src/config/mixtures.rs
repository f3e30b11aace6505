//! The decoder families with mixtures of experts.

use super::experts::ExpertsRule;
use super::family::{Family, LLAMA, MISTRAL, QWEN2, QWEN3, ROPE, RopeRule, Switch, WindowRule};
use super::layout;

pub(super) const MIXTRAL: Family = Family {
    model_type: "mixtral",
    architecture: "MixtralForCausalLM",
    gguf: None,
    layout: layout::MIXTRAL,
    window: WindowRule::Everywhere { default: None },
    experts: Some(ExpertsRule {
        width: None,
        num_experts: 8,
        num_experts_per_tok: 2,
        norm_topk_prob: None,
        dense_layers: false,
        shared: None,
    }),
    rope: Some(RopeRule { theta: 1_000_000.0, ..ROPE }),
    norm_eps: 1e-5,
    ..MISTRAL
};

pub(super) const QWEN2_MOE: Family = Family {
    model_type: "qwen2_moe",
    architecture: "Qwen2MoeForCausalLM",
    gguf: None,
    layout: layout::QWEN2_MOE,
    qkv_bias: Switch::Key("qkv_bias", true),
    window: WindowRule::Never,
    experts: Some(ExpertsRule {
        width: Some(("moe_intermediate_size", 1408)),
        num_experts: 60,
        num_experts_per_tok: 4,
        norm_topk_prob: Some("norm_topk_prob"),
        dense_layers: true,
        shared: Some(("shared_expert_intermediate_size", 5632)),
    }),
    fixed: &[("use_sliding_window", false)],
    num_key_value_heads: Some(16),
    ..QWEN2
};

pub(super) const QWEN3_MOE: Family = Family {
    model_type: "qwen3_moe",
    architecture: "Qwen3MoeForCausalLM",
    gguf: None,
    layout: layout::QWEN3_MOE,
    window: WindowRule::Switched { default: 4096 },
    experts: Some(ExpertsRule {
        width: Some(("moe_intermediate_size", 768)),
        num_experts: 128,
        num_experts_per_tok: 8,
        norm_topk_prob: Some("norm_topk_prob"),
        dense_layers: true,
        shared: None,
    }),
    head_dim: None,
    num_key_value_heads: Some(4),
    ..QWEN3
};

pub(super) const OLMOE: Family = Family {
    model_type: "olmoe",
    architecture: "OlmoeForCausalLM",
    gguf: None,
    token_head: None,
    layout: layout::OLMOE,
    mlp_bias: Switch::Never,
    experts: Some(ExpertsRule {
        width: None,
        num_experts: 64,
        num_experts_per_tok: 8,
        norm_topk_prob: Some("norm_topk_prob"),
        dense_layers: false,
        shared: None,
    }),
    norm_eps: 1e-5,
    max_position_embeddings: 4096,
    bos_token_id: None,
    eos_token_id: Some(50_279),
    ..LLAMA
};
