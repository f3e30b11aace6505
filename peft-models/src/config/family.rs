//! The decoder families: what their files leave unsaid, and which keys of `config.json` they understand.

use serde_json::{Map, Value};

use super::Activation;
use super::experts::ExpertsRule;
use super::layout::{self, DecoderLayout};
use super::mixtures::{MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE};

/// How a family's GGUF files differ from its folders.
#[derive(Debug, Clone, Copy)]
pub struct GgufFamily {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Whether llama.cpp stores the rows of `q_proj` and `k_proj` in the order of interleaved rotary embeddings.
    pub permutes_qk: bool,
}

/// The keys of `config.json` for sizes and the like.
#[derive(Debug, Clone, Copy)]
pub struct DecoderKeys {
    /// Width of the residual stream.
    pub hidden_size: &'static str,
    /// Width inside the MLP.
    pub intermediate_size: &'static str,
    /// Number of blocks.
    pub num_hidden_layers: &'static str,
    /// Query heads.
    pub num_attention_heads: &'static str,
    /// Heads of keys and values; `None` where the family's code fixes them.
    pub num_key_value_heads: Option<&'static str>,
    /// Activation of the MLP.
    pub hidden_act: &'static str,
    /// Epsilon of the norms; `None` where the family's code fixes it.
    pub norm_eps: Option<&'static str>,
    /// Positions that the model was made for.
    pub max_position_embeddings: &'static str,
}

/// Whether a family's models have something, biases for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// None has, whatever the file says.
    Never,
    /// Every one has.
    Always,
    /// The file says so under a key.
    Key(&'static str, bool),
}

/// Which layers attend to the last `sliding_window` keys only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowRule {
    /// None; the key is ignored.
    Never,
    /// All, where the key has a number.
    Everywhere {
        /// The window where the key is absent.
        default: Option<usize>,
    },
    /// All, where `use_sliding_window` is set.
    Switched {
        /// The window where the key is absent.
        default: usize,
    },
    /// Those that `layer_types` names. Without it, where `use_sliding_window` is set, the ones from `max_window_layers` on.
    Upper,
    /// Those that `layer_types` names. Without it, all but every `period`th.
    Periodic {
        /// The key of the period, where the family has one.
        key: Option<&'static str>,
        /// The period where it is absent.
        period: usize,
    },
}

/// How a family is configured about rotary embeddings.
#[derive(Debug, Clone, Copy)]
pub struct RopeRule {
    /// The key of the base.
    pub theta_key: &'static str,
    /// The base where the key is absent.
    pub theta: f64,
    /// The key of the rotated share of a head, and the share where it is absent; `None` where whole heads are rotated.
    pub partial: Option<(&'static str, f64)>,
    /// The base of layers with a sliding window where it is one of its own: its key, and the base where that is absent.
    pub local: Option<(&'static str, f64)>,
    /// `original_max_position_embeddings` where the key is absent; `None` stands for `max_position_embeddings`.
    pub original: Option<usize>,
    /// Whether `yarn` is an old name of `longrope`.
    pub yarn_is_longrope: bool,
    /// The keys of layers without rotary embeddings: a list of 0 for these and 1 for others, and the period at which they
    /// come where there is no list.
    pub skipped: Option<(&'static str, &'static str, usize)>,
}

/// Whether a `config.json` is a variant's.
pub type IsOf = fn(&Map<String, Value>) -> bool;

/// What a model family's files leave unsaid: its layout, the defaults of absent keys (those of its transformers configuration
/// class), and the optional features whose keys the family understands. Keys that transformers ignores for a family are
/// ignored here too.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// Where models of this type are made in several ways: which `config.json`s have this one. The first that takes a file reads it.
    pub variant: Option<IsOf>,
    /// The causal language model class in transformers, for the `architectures` of a written `config.json`.
    pub architecture: &'static str,
    /// The layer that gives every token a class in its `*ForTokenClassification`, where transformers has one.
    pub token_head: Option<&'static str>,
    /// Its GGUF files, where they are read and written.
    pub gguf: Option<GgufFamily>,
    /// What its models are made of.
    pub layout: DecoderLayout,
    /// What its `config.json` calls the sizes.
    pub keys: DecoderKeys,
    /// Biases of the layers that make queries, keys and values.
    pub qkv_bias: Switch,
    /// Bias of the layer behind attention.
    pub output_bias: Switch,
    /// Biases of the MLP.
    pub mlp_bias: Switch,
    /// Sliding windows.
    pub window: WindowRule,
    /// Mixtures of experts, where the family has them.
    pub experts: Option<ExpertsRule>,
    /// Rotary embeddings, where the family has them.
    pub rope: Option<RopeRule>,
    /// `attn_logit_softcapping` and `final_logit_softcapping` where they are absent; `None` where the family has no caps.
    pub softcaps: Option<[Option<f64>; 2]>,
    /// `query_pre_attn_scalar` where it is absent; `None` where scores are always divided by the root of `head_dim`.
    pub query_pre_attn_scalar: Option<f64>,
    /// Whether attention and MLP read the same input.
    pub parallel_residual: Switch,
    /// Keys of which one value only is implemented here, which is also transformers' default.
    pub fixed: &'static [(&'static str, bool)],
    /// Keys of widths that are implemented only where they are the hidden size, which is also transformers' default.
    pub as_wide: &'static [&'static str],
    /// `head_dim` where the key is absent; `None` divides the hidden size among the heads.
    pub head_dim: Option<usize>,
    /// Whether `head_dim` is a key of the family at all.
    pub has_head_dim: bool,
    /// Heads of keys and values where the key is absent; `None` is as many as query heads.
    pub num_key_value_heads: Option<usize>,
    /// The MLP's width in hidden sizes, where its key may be absent.
    pub intermediate_factor: Option<usize>,
    /// Epsilon of the norms where the key is absent.
    pub norm_eps: f64,
    /// `max_position_embeddings` where the key is absent.
    pub max_position_embeddings: usize,
    /// The activation where the key is absent.
    pub hidden_act: Activation,
    /// Whether the activation `gelu` means its tanh approximation, as in the first files of Gemma.
    pub gelu_is_tanh: bool,
    /// `tie_word_embeddings` where the key is absent.
    pub tie_word_embeddings: bool,
    /// `bos_token_id` where the key is absent.
    pub bos_token_id: Option<u32>,
    /// `eos_token_id` where the key is absent.
    pub eos_token_id: Option<u32>,
}

impl Family {
    /// `general.architecture` of its GGUF files.
    #[must_use]
    pub fn gguf_architecture(&self) -> Option<&'static str> {
        self.gguf.map(|gguf| gguf.architecture)
    }
}

const KEYS: DecoderKeys = DecoderKeys {
    hidden_size: "hidden_size",
    intermediate_size: "intermediate_size",
    num_hidden_layers: "num_hidden_layers",
    num_attention_heads: "num_attention_heads",
    num_key_value_heads: Some("num_key_value_heads"),
    hidden_act: "hidden_act",
    norm_eps: Some("rms_norm_eps"),
    max_position_embeddings: "max_position_embeddings",
};

pub(super) const ROPE: RopeRule = RopeRule {
    theta_key: "rope_theta",
    theta: 10_000.0,
    partial: None,
    local: None,
    original: None,
    yarn_is_longrope: false,
    skipped: None,
};

const ATTENTION_BIAS: Switch = Switch::Key("attention_bias", false);

pub(super) const LLAMA: Family = Family {
    model_type: "llama",
    variant: None,
    architecture: "LlamaForCausalLM",
    token_head: Some("score"),
    gguf: Some(GgufFamily { architecture: "llama", permutes_qk: true }),
    layout: layout::LLAMA,
    keys: KEYS,
    qkv_bias: ATTENTION_BIAS,
    output_bias: ATTENTION_BIAS,
    mlp_bias: Switch::Key("mlp_bias", false),
    window: WindowRule::Never,
    experts: None,
    rope: Some(ROPE),
    softcaps: None,
    query_pre_attn_scalar: None,
    parallel_residual: Switch::Never,
    fixed: &[],
    as_wide: &[],
    head_dim: None,
    has_head_dim: true,
    num_key_value_heads: None,
    intermediate_factor: None,
    norm_eps: 1e-6,
    max_position_embeddings: 2048,
    hidden_act: Activation::Silu,
    gelu_is_tanh: false,
    tie_word_embeddings: false,
    bos_token_id: Some(1),
    eos_token_id: Some(2),
};

pub(super) const MISTRAL: Family = Family {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    qkv_bias: Switch::Never,
    output_bias: Switch::Never,
    mlp_bias: Switch::Never,
    window: WindowRule::Everywhere { default: Some(4096) },
    num_key_value_heads: Some(8),
    max_position_embeddings: 4096 * 32,
    ..LLAMA
};

pub(super) const QWEN2: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    gguf: Some(GgufFamily { architecture: "qwen2", permutes_qk: false }),
    qkv_bias: Switch::Always,
    output_bias: Switch::Never,
    mlp_bias: Switch::Never,
    window: WindowRule::Upper,
    num_key_value_heads: Some(32),
    max_position_embeddings: 32768,
    bos_token_id: None,
    eos_token_id: None,
    ..LLAMA
};

pub(super) const QWEN3: Family = Family {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    gguf: Some(GgufFamily { architecture: "qwen3", permutes_qk: false }),
    layout: layout::QWEN3,
    qkv_bias: ATTENTION_BIAS,
    output_bias: ATTENTION_BIAS,
    head_dim: Some(128),
    ..QWEN2
};

const PHI3: Family = Family {
    model_type: "phi3",
    architecture: "Phi3ForCausalLM",
    gguf: None,
    layout: layout::PHI3,
    qkv_bias: Switch::Never,
    output_bias: Switch::Never,
    mlp_bias: Switch::Never,
    window: WindowRule::Everywhere { default: None },
    rope: Some(RopeRule {
        partial: Some(("partial_rotary_factor", 1.0)),
        original: Some(4096),
        yarn_is_longrope: true,
        ..ROPE
    }),
    norm_eps: 1e-5,
    max_position_embeddings: 4096,
    eos_token_id: Some(32_000),
    ..LLAMA
};

const GEMMA: Family = Family {
    model_type: "gemma",
    architecture: "GemmaForCausalLM",
    gguf: None,
    layout: layout::GEMMA,
    mlp_bias: Switch::Never,
    fixed: &[("use_bidirectional_attention", false)],
    head_dim: Some(256),
    num_key_value_heads: Some(16),
    max_position_embeddings: 8192,
    hidden_act: Activation::GeluTanh,
    gelu_is_tanh: true,
    tie_word_embeddings: true,
    bos_token_id: Some(2),
    eos_token_id: Some(1),
    ..LLAMA
};

const GEMMA2: Family = Family {
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    layout: layout::GEMMA2,
    keys: DecoderKeys { hidden_act: "hidden_activation", ..KEYS },
    window: WindowRule::Periodic { key: None, period: 2 },
    softcaps: Some([Some(50.0), Some(30.0)]),
    query_pre_attn_scalar: Some(256.0),
    num_key_value_heads: Some(4),
    gelu_is_tanh: false,
    ..GEMMA
};

const GEMMA3: Family = Family {
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    token_head: None,
    layout: layout::GEMMA3,
    window: WindowRule::Periodic { key: Some("sliding_window_pattern"), period: 6 },
    rope: Some(RopeRule { theta: 1_000_000.0, local: Some(("rope_local_base_freq", 10_000.0)), ..ROPE }),
    softcaps: Some([None, None]),
    max_position_embeddings: 131_072,
    ..GEMMA2
};

const GPT2: Family = Family {
    model_type: "gpt2",
    architecture: "GPT2LMHeadModel",
    token_head: Some("classifier"),
    gguf: None,
    layout: layout::GPT2,
    keys: DecoderKeys {
        hidden_size: "n_embd",
        intermediate_size: "n_inner",
        num_hidden_layers: "n_layer",
        num_attention_heads: "n_head",
        num_key_value_heads: None,
        hidden_act: "activation_function",
        norm_eps: Some("layer_norm_epsilon"),
        max_position_embeddings: "n_positions",
    },
    qkv_bias: Switch::Always,
    output_bias: Switch::Always,
    mlp_bias: Switch::Always,
    rope: None,
    fixed: &[("scale_attn_weights", true), ("scale_attn_by_inverse_layer_idx", false), ("add_cross_attention", false)],
    has_head_dim: false,
    intermediate_factor: Some(4),
    norm_eps: 1e-5,
    max_position_embeddings: 1024,
    hidden_act: Activation::GeluTanh,
    tie_word_embeddings: true,
    bos_token_id: Some(50_256),
    eos_token_id: Some(50_256),
    ..LLAMA
};

const GPT_NEOX: Family = Family {
    model_type: "gpt_neox",
    architecture: "GPTNeoXForCausalLM",
    token_head: Some("classifier"),
    gguf: None,
    layout: layout::GPT_NEOX,
    keys: DecoderKeys { norm_eps: Some("layer_norm_eps"), ..KEYS },
    qkv_bias: Switch::Key("attention_bias", true),
    output_bias: Switch::Key("attention_bias", true),
    mlp_bias: Switch::Always,
    rope: Some(RopeRule { theta_key: "rotary_emb_base", partial: Some(("rotary_pct", 0.25)), ..ROPE }),
    parallel_residual: Switch::Key("use_parallel_residual", true),
    has_head_dim: false,
    norm_eps: 1e-5,
    hidden_act: Activation::Gelu,
    bos_token_id: Some(0),
    ..LLAMA
};

const OLMO2: Family = Family {
    model_type: "olmo2",
    architecture: "Olmo2ForCausalLM",
    token_head: None,
    gguf: None,
    layout: layout::OLMO2,
    mlp_bias: Switch::Never,
    norm_eps: 1e-5,
    bos_token_id: None,
    eos_token_id: Some(50_279),
    ..LLAMA
};

const STABLELM: Family = Family {
    model_type: "stablelm",
    architecture: "StableLmForCausalLM",
    gguf: None,
    layout: layout::STABLELM,
    keys: DecoderKeys { norm_eps: Some("layer_norm_eps"), ..KEYS },
    qkv_bias: Switch::Key("use_qkv_bias", false),
    output_bias: Switch::Never,
    mlp_bias: Switch::Never,
    rope: Some(RopeRule { partial: Some(("partial_rotary_factor", 0.25)), ..ROPE }),
    fixed: &[("qk_layernorm", false), ("use_parallel_residual", false)],
    has_head_dim: false,
    num_key_value_heads: Some(32),
    norm_eps: 1e-5,
    max_position_embeddings: 4096,
    bos_token_id: Some(0),
    eos_token_id: Some(0),
    ..LLAMA
};

const SMOLLM3: Family = Family {
    model_type: "smollm3",
    architecture: "SmolLM3ForCausalLM",
    gguf: None,
    rope: Some(RopeRule { theta: 2_000_000.0, skipped: Some(("no_rope_layers", "no_rope_layer_interval", 4)), ..ROPE }),
    fixed: &[("use_sliding_window", false)],
    num_key_value_heads: Some(4),
    max_position_embeddings: 32768,
    tie_word_embeddings: true,
    bos_token_id: Some(128_000),
    eos_token_id: Some(128_001),
    ..LLAMA
};

const OPT: Family = Family {
    model_type: "opt",
    architecture: "OPTForCausalLM",
    token_head: None,
    gguf: None,
    layout: layout::OPT,
    keys: DecoderKeys {
        intermediate_size: "ffn_dim",
        hidden_act: "activation_function",
        norm_eps: None,
        num_key_value_heads: None,
        ..KEYS
    },
    qkv_bias: Switch::Key("enable_bias", true),
    output_bias: Switch::Key("enable_bias", true),
    mlp_bias: Switch::Key("enable_bias", true),
    rope: None,
    fixed: &[
        ("do_layer_norm_before", true),
        ("_remove_final_layer_norm", false),
        ("layer_norm_elementwise_affine", true),
    ],
    as_wide: &["word_embed_proj_dim"],
    has_head_dim: false,
    norm_eps: 1e-5,
    hidden_act: Activation::Relu,
    tie_word_embeddings: true,
    bos_token_id: Some(2),
    ..LLAMA
};

/// With one key and value head for all queries, and one norm for attention and MLP (7B).
const FALCON: Family = Family {
    model_type: "falcon",
    architecture: "FalconForCausalLM",
    token_head: Some("classifier"),
    gguf: None,
    layout: layout::FALCON,
    keys: DecoderKeys {
        intermediate_size: "ffn_hidden_size",
        hidden_act: "activation",
        norm_eps: Some("layer_norm_epsilon"),
        num_key_value_heads: None,
        ..KEYS
    },
    qkv_bias: Switch::Key("bias", false),
    output_bias: Switch::Key("bias", false),
    mlp_bias: Switch::Key("bias", false),
    parallel_residual: Switch::Always,
    fixed: &[("multi_query", true), ("parallel_attn", true), ("alibi", false)],
    has_head_dim: false,
    num_key_value_heads: Some(1),
    intermediate_factor: Some(4),
    norm_eps: 1e-5,
    hidden_act: Activation::Gelu,
    tie_word_embeddings: true,
    bos_token_id: Some(11),
    eos_token_id: Some(11),
    ..LLAMA
};

/// With groups of heads, and one norm for attention and MLP (11B).
const FALCON_GROUPED: Family = Family {
    variant: Some(|file| is_set(file, "new_decoder_architecture") && count(file, "num_ln_in_parallel_attn") == Some(1)),
    layout: layout::FALCON_GROUPED,
    keys: DecoderKeys { num_key_value_heads: Some("num_kv_heads"), ..FALCON.keys },
    fixed: &[("parallel_attn", true), ("alibi", false)],
    num_key_value_heads: None,
    ..FALCON
};

/// With groups of heads, and a norm each for attention and MLP (40B, 180B).
const FALCON_TWO_NORMS: Family = Family {
    variant: Some(|file| is_set(file, "new_decoder_architecture")),
    layout: layout::FALCON_TWO_NORMS,
    ..FALCON_GROUPED
};

fn is_set(file: &Map<String, Value>, key: &str) -> bool {
    file.get(key).and_then(Value::as_bool) == Some(true)
}

fn count(file: &Map<String, Value>, key: &str) -> Option<u64> {
    file.get(key).and_then(Value::as_u64)
}

/// Every family that the decoder skeleton builds. The next one goes here.
pub const FAMILIES: &[Family] = &[
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    PHI3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_NEOX,
    OLMO2,
    STABLELM,
    SMOLLM3,
    OPT,
    FALCON_GROUPED,
    FALCON_TWO_NORMS,
    FALCON,
];
