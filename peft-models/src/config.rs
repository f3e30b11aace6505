//! The typed configurations that the model skeletons are built from.
//!
//! A decoder's comes from a Hugging Face `config.json` ([`DecoderConfig::from_hf_json`], both the transformers v4
//! and the v5 spellings) or from the metadata of a GGUF file ([`DecoderConfig::from_gguf`]). Both are untrusted: every
//! number is checked before anything is allocated from it, and a value that the skeleton cannot honour is an error,
//! never a silent default.
//!
//! **Adding a family** is one entry in [`FAMILIES`] or [`ENCODER_FAMILIES`]: what its files leave unsaid, which keys it
//! understands, and how it names its layers.

use std::path::{Path, PathBuf};

use candle_core::DType;
use peft_core::{ClassToken, Task};
use serde_json::{Map, Value};

use crate::rope::RopeScaling;

mod encoder;
mod gguf;
mod hf;
mod keys;
mod labels;
mod model;

pub use encoder::{ENCODER_FAMILIES, EncoderConfig, EncoderFamily, EncoderNames, HeadActivation};
pub(crate) use gguf::GgufDescription;
pub use model::ModelConfig;

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

/// What a model family's files leave unsaid: defaults of absent keys (those of its transformers configuration class),
/// and the optional features whose keys the family understands. Keys that transformers ignores for a family are
/// ignored here too.
#[derive(Debug)]
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The causal language model class in transformers, for the `architectures` of a written `config.json`.
    pub architecture: &'static str,
    /// `general.architecture` in GGUF files.
    pub gguf_architecture: &'static str,
    /// Whether llama.cpp stores the rows of `q_proj` and `k_proj` in the order of interleaved rotary embeddings.
    pub gguf_permutes_qk: bool,
    /// Whether `sliding_window` is a feature of the family.
    pub sliding_window: bool,
    /// Whether `attn_logit_softcapping` and `final_logit_softcapping` are features of the family.
    pub softcaps: bool,
    /// Whether `partial_rotary_factor` is a feature of the family.
    pub partial_rotary: bool,
    /// `rms_norm_eps` where the key is absent.
    pub rms_norm_eps: f64,
    /// `rope_theta` where the key is absent.
    pub rope_theta: f64,
    /// `max_position_embeddings` where the key is absent.
    pub max_position_embeddings: usize,
    /// `hidden_act` where the key is absent.
    pub hidden_act: Activation,
    /// `tie_word_embeddings` where the key is absent.
    pub tie_word_embeddings: bool,
    /// `attention_bias` where the key is absent.
    pub attention_bias: bool,
    /// `bos_token_id` where the key is absent.
    pub bos_token_id: Option<u32>,
    /// `eos_token_id` where the key is absent.
    pub eos_token_id: Option<u32>,
}

/// Every family that the decoder skeleton builds. The next one goes here.
pub const FAMILIES: &[Family] = &[Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    gguf_architecture: "llama",
    gguf_permutes_qk: true,
    sliding_window: false,
    softcaps: false,
    partial_rotary: false,
    rms_norm_eps: 1e-6,
    rope_theta: 10_000.0,
    max_position_embeddings: 2048,
    hidden_act: Activation::Silu,
    tie_word_embeddings: false,
    attention_bias: false,
    bos_token_id: Some(1),
    eos_token_id: Some(2),
}];

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
    /// Epsilon inside the RMS norms.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Positions that the model was made for.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Whether `q_proj`, `k_proj`, `v_proj` and `o_proj` have a bias.
    pub attention_bias: bool,
    /// Whether `gate_proj`, `up_proj` and `down_proj` have a bias.
    pub mlp_bias: bool,
    /// Keys further back than this many positions are not attended to.
    pub sliding_window: Option<usize>,
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

    /// What the head computes: the next token, or a class from the last token.
    pub fn task(&self) -> Task {
        match &self.labels {
            Some(labels) => Task::Classification { classes: labels.len(), reads: ClassToken::Last },
            None => Task::CausalLm,
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

    /// Rotated dimensions of a head (even).
    pub fn rotary_dim(&self) -> usize {
        (self.head_dim as f64 * self.rope.partial_rotary_factor) as usize
    }

    /// The id of the token that closes a sequence.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos_token_ids.first().copied()
    }

    /// The limits that hold whatever the source. `origin` and the key names go into the message.
    fn check(self, origin: &Path) -> Result<Self, ConfigError> {
        let invalid = |key: &str, reason: String| ConfigError::Invalid { path: origin.into(), key: key.into(), reason };
        // Far above any real model, low enough that no product of two of them overflows.
        let ranges = [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 24),
            ("num_hidden_layers", self.num_hidden_layers, 10_000),
            ("num_attention_heads", self.num_attention_heads, 1 << 14),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 14),
            ("head_dim", self.head_dim, 1 << 14),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 31),
        ];
        for (key, value, most) in ranges {
            if value == 0 || value > most {
                return Err(invalid(key, format!("{value} is outside 1..={most}")));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(invalid(
                "num_key_value_heads",
                format!(
                    "{} does not divide num_attention_heads = {}",
                    self.num_key_value_heads, self.num_attention_heads
                ),
            ));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(invalid("rms_norm_eps", format!("{} is not a small positive number", self.rms_norm_eps)));
        }
        if !(self.rope.theta.is_finite() && self.rope.theta > 0.0) {
            return Err(invalid("rope_theta", format!("{} is not a positive number", self.rope.theta)));
        }
        let factor = self.rope.partial_rotary_factor;
        if !(factor > 0.0 && factor <= 1.0) {
            return Err(invalid("partial_rotary_factor", format!("{factor} is outside (0, 1]")));
        }
        let rotary_dim = self.rotary_dim();
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(invalid(
                "head_dim",
                format!(
                    "{} with partial_rotary_factor {factor} rotates {rotary_dim} dimensions, which must be even and not 0",
                    self.head_dim
                ),
            ));
        }
        if self.sliding_window == Some(0) {
            return Err(invalid("sliding_window", "0 would attend to nothing; leave the key out or set null".into()));
        }
        for (key, cap) in [
            ("attn_logit_softcapping", self.attn_logit_softcapping),
            ("final_logit_softcapping", self.final_logit_softcapping),
        ] {
            if cap.is_some_and(|cap| !(cap.is_finite() && cap > 0.0)) {
                return Err(invalid(key, "must be a positive number or null".into()));
            }
        }
        self.rope.scaling.check(rotary_dim).map_err(|(key, reason)| invalid(key, reason))?;
        Ok(self)
    }
}

#[cfg(test)]
mod tests;
