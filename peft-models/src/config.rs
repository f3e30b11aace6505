//! The typed configurations that the model skeletons are built from.
//!
//! A decoder's comes from a Hugging Face `config.json` ([`DecoderConfig::from_hf_json`], both the transformers v4
//! and the v5 spellings) or from the metadata of a GGUF file ([`DecoderConfig::from_gguf`]). Both are untrusted: every
//! number is checked before anything is allocated from it, and a value that the skeleton cannot honour is an error,
//! never a silent default.
//!
//! **Adding a family** is one entry in [`FAMILIES`], [`ENCODER_FAMILIES`] or [`SEQ2SEQ_FAMILIES`]: what its files leave unsaid, which keys it
//! understands, what its blocks are made of, and how it names its layers.

use std::path::{Path, PathBuf};

use candle_core::DType;
use peft_core::{ClassToken, HeadKind, Task};
use serde_json::{Map, Value};

use crate::rope::RopeScaling;

mod encoder;
mod experts;
mod family;
mod gguf;
mod hf;
mod keys;
mod labels;
mod layer_kinds;
mod layout;
mod mixtures;
mod model;
mod seq2seq;
mod seq2seq_layout;

pub use encoder::{ENCODER_FAMILIES, EncoderConfig, EncoderFamily, EncoderNames, HeadActivation};
pub use experts::{ExpertsConfig, ExpertsRule};
pub use family::{DecoderKeys, FAMILIES, Family, GgufFamily, IsOf, RopeRule, Switch, WindowRule};
pub(crate) use gguf::GgufDescription;
pub(crate) use labels::check_outputs;
pub use layout::{DecoderLayout, ExpertsLayout, MlpLayout, Norm, Projections, QueryKeyNorm, SublayerNorms};
pub use model::ModelConfig;
pub use seq2seq::{RelativePositions, SEQ2SEQ_FAMILIES, Seq2SeqConfig, Seq2SeqFamily, Seq2SeqPositions};
pub use seq2seq_layout::{Seq2SeqLayout, SublayerNames};

/// Far more layers than any real model has.
const MOST_LAYERS: usize = 10_000;

/// Why a model configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// What the core crate found.
    #[error(transparent)]
    Core(#[from] peft_core::Error),
    /// The file is not a JSON object.
    #[error("{}: not a JSON object: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's message.
        reason: String,
    },
    /// A key that the model cannot be built without is absent.
    #[error("{}: `{key}` is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A key has the wrong type, an impossible number, or a value that is not supported.
    #[error("{}: `{key}`: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong and what would be right.
        reason: String,
    },
}

/// The non-linearity between the two halves of an MLP, by its name in transformers' `ACT2FN`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x · sigmoid(x)`; `silu` or `swish`.
    Silu,
    /// GELU through the error function; `gelu`.
    Gelu,
    /// GELU's tanh approximation; `gelu_new`, `gelu_pytorch_tanh` or `gelu_fast`.
    GeluTanh,
    /// `max(x, 0)`; `relu`.
    Relu,
    /// `max(x, 0)²`; `relu2`.
    ReluSquared,
    /// `x · sigmoid(1.702 x)`; `quick_gelu`.
    QuickGelu,
}

/// Names of activations in `config.json`, with the activation each one means.
const ACTIVATIONS: &[(&str, Activation)] = &[
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("relu", Activation::Relu),
    ("relu2", Activation::ReluSquared),
    ("quick_gelu", Activation::QuickGelu),
];

impl Activation {
    /// The activation that `name` means in a `config.json`, if it is a known one.
    pub fn from_name(name: &str) -> Option<Self> {
        ACTIVATIONS.iter().find(|(known, _)| *known == name).map(|(_, activation)| *activation)
    }

    /// The name to write into a `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_pytorch_tanh",
            Self::Relu => "relu",
            Self::ReluSquared => "relu2",
            Self::QuickGelu => "quick_gelu",
        }
    }
}

/// Rotary position embedding settings.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
    /// Share of each head's dimensions that is rotated, in (0, 1].
    pub partial_rotary_factor: f64,
}

impl RopeConfig {
    /// Refuses what would make infinite or undefined angles; the error is the key and the reason.
    fn check(&self, head_dim: usize) -> Result<(), (&'static str, String)> {
        if !(self.theta.is_finite() && self.theta > 0.0) {
            return Err(("rope_theta", format!("{} is not a positive number", self.theta)));
        }
        let factor = self.partial_rotary_factor;
        if !(factor > 0.0 && factor <= 1.0) {
            return Err(("partial_rotary_factor", format!("{factor} is outside (0, 1]")));
        }
        let rotary_dim = self.rotary_dim(head_dim);
        // An odd number is rounded up to whole pairs, as in transformers; a whole head has none to spare.
        if rotary_dim == 0 || rotary_dim.next_multiple_of(2) > head_dim {
            let reason = format!(
                "{head_dim} with partial_rotary_factor {factor} rotates {rotary_dim} dimensions, which must be even in whole \
                 heads and not 0"
            );
            return Err(("head_dim", reason));
        }
        self.scaling.check(rotary_dim)
    }

    /// Rotated dimensions of a head of `head_dim`; the frequencies are made for this number, and where it is odd, one
    /// dimension more is rotated with them.
    pub fn rotary_dim(&self, head_dim: usize) -> usize {
        (head_dim as f64 * self.partial_rotary_factor) as usize
    }
}

/// How the layers of one kind attend. Most models have one kind; Gemma 3's layers with a window have a rotary table of their
/// own, and SmolLM3 has layers without one.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerKind {
    /// Keys further back than this many positions are not attended to.
    pub window: Option<usize>,
    /// Rotary position embedding.
    pub rope: Option<RopeConfig>,
}

/// Configuration of a decoder-only language model.
#[derive(Debug, Clone)]
pub struct DecoderConfig {
    /// What the family's files leave unsaid.
    pub family: &'static Family,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// The experts in the place of MLPs, where layers have them.
    pub experts: Option<ExpertsConfig>,
    /// Number of transformer blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Dimensions of one head.
    pub head_dim: usize,
    /// Activation of the MLP.
    pub hidden_act: Activation,
    /// Epsilon inside the norms.
    pub norm_eps: f64,
    /// The kinds of layers, one at least.
    pub layer_kinds: Vec<LayerKind>,
    /// Which of them each layer is.
    pub kind_of_layer: Vec<usize>,
    /// What products of queries and keys are divided by the root of, where it is not `head_dim`.
    pub query_pre_attn_scalar: Option<f64>,
    /// Positions that the model was made for.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Whether the layers that make queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether the layer behind attention has a bias.
    pub output_bias: bool,
    /// Whether the layers of the MLP have a bias.
    pub mlp_bias: bool,
    /// Whether attention and MLP read the same input, and both are added to it.
    pub parallel_residual: bool,
    /// `c · tanh(scores / c)` on attention scores.
    pub attn_logit_softcapping: Option<f64>,
    /// `c · tanh(logits / c)` on the output logits.
    pub final_logit_softcapping: Option<f64>,
    /// Id of the token that begins a sequence.
    pub bos_token_id: Option<u32>,
    /// Ids of the tokens that end a sequence, the first one being the one to write.
    pub eos_token_ids: Vec<u32>,
    /// Id of the padding token.
    pub pad_token_id: Option<u32>,
    /// Names of the classes, where the model is a `*ForSequenceClassification`: its head gives a logit each.
    pub labels: Option<Vec<String>>,
    /// What that head is for.
    pub kind: HeadKind,
    /// Floating-point type that the weights are stored in, where the file says so.
    pub dtype: Option<DType>,
    /// The `config.json` as read, with keys that this type does not know; empty if the source was a GGUF file.
    pub raw: Map<String, Value>,
}

impl DecoderConfig {
    /// `model_type` in `config.json`.
    pub fn model_type(&self) -> &'static str {
        self.family.model_type
    }

    /// What the head computes: the next token, or what a head of its own makes of the last token or of every one.
    pub fn task(&self) -> Task {
        let reads = if self.kind.is_of_tokens() { ClassToken::Every } else { ClassToken::Last };
        match &self.labels {
            Some(labels) => Task::Head { kind: self.kind, outputs: labels.len(), reads },
            None => Task::CausalLm,
        }
    }

    /// Path of a head of its own, and whether it has a bias (transformers `modeling_layers.py`).
    pub fn head_out(&self) -> (&'static str, bool) {
        match self.kind {
            HeadKind::TokenClassification => (self.family.token_head.unwrap_or("score"), true),
            _ => ("score", false),
        }
    }

    /// Rows of `q_proj`: `num_attention_heads · head_dim`.
    pub fn query_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Rows of `k_proj` and of `v_proj`: `num_key_value_heads · head_dim`.
    pub fn key_value_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// The width inside the MLPs that a token goes through in the widest block, experts among them.
    pub fn mlp_width(&self) -> usize {
        let sparse = |e: &ExpertsConfig| {
            e.intermediate_size.saturating_mul(e.num_experts_per_tok) + e.shared_intermediate_size.unwrap_or(0)
        };
        let dense = (0..self.num_hidden_layers).any(|i| !self.experts.as_ref().is_some_and(|e| e.is_sparse(i)));
        self.experts.as_ref().map_or(0, sparse).max(if dense { self.intermediate_size } else { 0 })
    }

    /// What products of queries and keys are multiplied with.
    pub fn attention_scale(&self) -> f64 {
        self.query_pre_attn_scalar.unwrap_or(self.head_dim as f64).powf(-0.5)
    }

    /// The rotary embedding of the first kind of layers that has one.
    pub fn rope(&self) -> Option<&RopeConfig> {
        self.layer_kinds.iter().find_map(|kind| kind.rope.as_ref())
    }

    /// The positions that the model has a table for, where positions are learned: no sequence may be longer.
    pub fn learned_positions(&self) -> Option<usize> {
        self.family.layout.positions.map(|_| self.max_position_embeddings)
    }

    /// The id of the token that closes a sequence.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos_token_ids.first().copied()
    }

    /// The limits that hold whatever the source. `origin` and the key names go into the message.
    fn check(self, origin: &Path) -> Result<Self, ConfigError> {
        let invalid = |key: &str, reason: String| ConfigError::Invalid { path: origin.into(), key: key.into(), reason };
        let keys = &self.family.keys;
        let kv_heads = keys.num_key_value_heads.unwrap_or(keys.num_attention_heads);
        // Far above any real model, low enough that no product of two of them overflows.
        let ranges = [
            ("vocab_size", self.vocab_size, 1 << 24),
            (keys.hidden_size, self.hidden_size, 1 << 20),
            (keys.intermediate_size, self.intermediate_size, 1 << 24),
            (keys.num_hidden_layers, self.num_hidden_layers, MOST_LAYERS),
            (keys.num_attention_heads, self.num_attention_heads, 1 << 14),
            (kv_heads, self.num_key_value_heads, 1 << 14),
            ("head_dim", self.head_dim, 1 << 14),
            (keys.max_position_embeddings, self.max_position_embeddings, 1 << 31),
        ];
        for (key, value, most) in ranges {
            if value == 0 || value > most {
                return Err(invalid(key, format!("{value} is outside 1..={most}")));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(invalid(
                kv_heads,
                format!(
                    "{} does not divide {} = {}",
                    self.num_key_value_heads, keys.num_attention_heads, self.num_attention_heads
                ),
            ));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return Err(invalid(
                keys.norm_eps.unwrap_or_default(),
                format!("{} is not a small positive number", self.norm_eps),
            ));
        }
        if self.query_pre_attn_scalar.is_some_and(|scalar| !(scalar.is_finite() && scalar > 0.0)) {
            return Err(invalid("query_pre_attn_scalar", "must be a positive number".into()));
        }
        for kind in &self.layer_kinds {
            if kind.window == Some(0) {
                let reason = "0 would attend to nothing; leave the key out or set null";
                return Err(invalid("sliding_window", reason.into()));
            }
            if let Some(rope) = &kind.rope {
                rope.check(self.head_dim).map_err(|(key, reason)| invalid(key, reason))?;
            }
        }
        for (key, cap) in [
            ("attn_logit_softcapping", self.attn_logit_softcapping),
            ("final_logit_softcapping", self.final_logit_softcapping),
        ] {
            if cap.is_some_and(|cap| !(cap.is_finite() && cap > 0.0)) {
                return Err(invalid(key, "must be a positive number or null".into()));
            }
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests;
