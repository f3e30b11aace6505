//! Configurations of encoder–decoders: one table entry a family.
//!
//! A family says how its `config.json` calls the sizes and what its blocks are made of (transformers
//! `models/t5/modeling_t5.py`, `models/mt5/modeling_mt5.py`); the skeleton is [`EncoderDecoder`](crate::EncoderDecoder).

use std::path::Path;

use candle_core::DType;
use peft_core::Task;
use serde_json::{Map, Value, json};

use super::keys::{Keys, dtype, dtype_name, family, named_activation, refuse_quantized};
use super::{Activation, ConfigError, MOST_LAYERS, MlpLayout};

/// What tells an encoder–decoder family from the others.
#[derive(Debug)]
pub struct Seq2SeqFamily {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The class with a language model head in transformers.
    pub architecture: &'static str,
    /// `feed_forward_proj` where the key is absent.
    feed_forward: &'static str,
    /// Whether hidden states in front of the head are scaled where the file does not say so; `None` if they never are.
    scales_outputs: Option<bool>,
}

/// Every family that the encoder–decoder skeleton builds. The next one goes here.
pub const SEQ2SEQ_FAMILIES: &[Seq2SeqFamily] = &[
    Seq2SeqFamily {
        model_type: "t5",
        architecture: "T5ForConditionalGeneration",
        feed_forward: "relu",
        scales_outputs: Some(true),
    },
    Seq2SeqFamily {
        model_type: "mt5",
        architecture: "MT5ForConditionalGeneration",
        feed_forward: "gated-gelu",
        scales_outputs: None,
    },
];

/// Relative positions in attention: distances fall into buckets, and each has a bias for each head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelativePositions {
    /// Rows of the table; with keys on both sides of a query, half of them are for either.
    pub buckets: usize,
    /// The distance from which on all fall into one bucket.
    pub max_distance: usize,
}

impl RelativePositions {
    /// The bucket of `key − query`. With `both_sides`, later keys have buckets of their own (an encoder); otherwise there
    /// are none. A half of the buckets are for one distance each, the others grow with its logarithm up to
    /// `max_distance` (`_relative_position_bucket`).
    #[must_use]
    pub fn bucket(&self, distance: isize, both_sides: bool) -> usize {
        let buckets = if both_sides { self.buckets / 2 } else { self.buckets };
        let side = if both_sides && distance > 0 { buckets } else { 0 };
        let distance = if both_sides || distance < 0 { distance.unsigned_abs() } else { 0 };
        let exact = buckets / 2;
        if distance < exact {
            return side + distance;
        }
        // In f32, as transformers rounds it.
        let span = (self.max_distance as f64 / exact as f64).ln() as f32;
        let share = (distance as f32 / exact as f32).ln() / span * (buckets - exact) as f32;
        side + (exact + share as usize).min(buckets - 1)
    }
}

/// Configuration of an encoder–decoder with a language model head.
#[derive(Debug, Clone)]
pub struct Seq2SeqConfig {
    /// What the family's files leave unsaid.
    pub family: &'static Seq2SeqFamily,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Blocks of the encoder.
    pub encoder_layers: usize,
    /// Blocks of the decoder.
    pub decoder_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Dimensions of one head.
    pub head_dim: usize,
    /// The MLP's layers, by their names in it.
    pub mlp: MlpLayout,
    /// Activation of the MLP.
    pub hidden_act: Activation,
    /// Epsilon inside the norms.
    pub norm_eps: f64,
    /// Relative positions.
    pub positions: RelativePositions,
    /// Whether the file says that the head shares the embedding. What the checkpoint holds decides in the end.
    pub tie_word_embeddings: bool,
    /// Whether hidden states are multiplied by `hidden_size^−½` in front of the head.
    pub scales_outputs: bool,
    /// The token that the decoder begins with.
    pub decoder_start_token_id: u32,
    /// Id of the padding token, which stands in the decoder's input for targets that do not count.
    pub pad_token_id: u32,
    /// Ids of the tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Floating-point type that the weights are stored in, where the file says so.
    pub dtype: Option<DType>,
    /// The `config.json` as read, with keys that this type does not know.
    pub raw: Map<String, Value>,
}

impl Seq2SeqConfig {
    /// Reads a parsed `config.json`; `path` is what messages name.
    ///
    /// # Errors
    /// An unknown `model_type`, an absent key, and a value that is impossible or not supported; the message names the
    /// file and the key.
    pub fn from_hf_map(raw: Map<String, Value>, path: &Path) -> Result<Self, ConfigError> {
        let keys = Keys { map: &raw, path, prefix: "" };
        let family = family(&keys, SEQ2SEQ_FAMILIES, |family| family.model_type, |_| true)?;
        refuse_quantized(&keys)?;
        refuse_other_heads(&keys, family)?;
        let encoder_layers = keys.required_count("num_layers")?;
        let (mlp, hidden_act) = feed_forward(&keys, family)?;
        let tie_word_embeddings = keys.flag("tie_word_embeddings")?.unwrap_or(true);
        let pad_token_id = keys.token_ids("pad_token_id")?.first().copied().unwrap_or(0);
        let eos_token_ids = keys.token_ids("eos_token_id")?;
        let config = Self {
            family,
            vocab_size: keys.required_count("vocab_size")?,
            hidden_size: keys.required_count("d_model")?,
            intermediate_size: keys.required_count("d_ff")?,
            encoder_layers,
            decoder_layers: keys.count("num_decoder_layers")?.unwrap_or(encoder_layers),
            num_attention_heads: keys.required_count("num_heads")?,
            head_dim: keys.required_count("d_kv")?,
            mlp,
            hidden_act,
            norm_eps: keys.number("layer_norm_epsilon")?.unwrap_or(1e-6),
            positions: RelativePositions {
                buckets: keys.count("relative_attention_num_buckets")?.unwrap_or(32),
                max_distance: keys.count("relative_attention_max_distance")?.unwrap_or(128),
            },
            tie_word_embeddings,
            // Files of transformers 4 say it by tying alone, which those of T5 v1.1 do not.
            scales_outputs: match family.scales_outputs {
                None => false,
                Some(default) => {
                    let tied = keys.flag("tie_word_embeddings")?.unwrap_or(default);
                    keys.flag("scale_decoder_outputs")?.unwrap_or(tied)
                }
            },
            decoder_start_token_id: keys.token_ids("decoder_start_token_id")?.first().copied().unwrap_or(pad_token_id),
            pad_token_id,
            eos_token_ids: if eos_token_ids.is_empty() { vec![1] } else { eos_token_ids },
            dtype: dtype(&keys)?,
            raw: Map::new(),
        };
        config.check(&keys)?;
        Ok(Self { raw, ..config })
    }

    fn check(&self, keys: &Keys<'_>) -> Result<(), ConfigError> {
        // Far above any real model, low enough that no product of two of them overflows.
        let ranges = [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("d_model", self.hidden_size, 1 << 20),
            ("d_ff", self.intermediate_size, 1 << 24),
            ("num_layers", self.encoder_layers, MOST_LAYERS),
            ("num_decoder_layers", self.decoder_layers, MOST_LAYERS),
            ("num_heads", self.num_attention_heads, 1 << 14),
            ("d_kv", self.head_dim, 1 << 14),
        ];
        for (key, value, most) in ranges {
            if value == 0 || value > most {
                return Err(keys.invalid(key, format!("{value} is outside 1..={most}")));
            }
        }
        let RelativePositions { buckets, max_distance } = self.positions;
        if !(4..=1 << 16).contains(&buckets) {
            return Err(keys.invalid("relative_attention_num_buckets", format!("{buckets} is outside 4..=65536")));
        }
        // The exact buckets of the decoder end at half of them, and the logarithmic ones begin there.
        if max_distance <= buckets / 2 || max_distance > 1 << 24 {
            let reason = format!("{max_distance} is outside {}..={}", buckets / 2 + 1, 1 << 24);
            return Err(keys.invalid("relative_attention_max_distance", reason));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return Err(keys.invalid("layer_norm_epsilon", format!("{} is not a small positive number", self.norm_eps)));
        }
        for (key, id) in [("decoder_start_token_id", self.decoder_start_token_id), ("pad_token_id", self.pad_token_id)]
        {
            if id as usize >= self.vocab_size {
                return Err(keys.invalid(key, format!("{id} is outside the vocabulary of {}", self.vocab_size)));
            }
        }
        Ok(())
    }

    /// What the head computes: the next token of a target.
    pub fn task(&self) -> Task {
        Task::Seq2SeqLm
    }

    /// Rows of queries, keys and values: `num_attention_heads · head_dim`.
    pub fn attention_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// The `config.json` to write beside this model's weights, for transformers v4 and v5; `tied` says whether the head
    /// shares the embedding there.
    pub fn to_hf_json(&self, tied: bool) -> Map<String, Value> {
        let mut map = self.raw.clone();
        map.insert("architectures".into(), json!([self.family.architecture]));
        map.insert("vocab_size".into(), json!(self.vocab_size));
        map.insert("tie_word_embeddings".into(), json!(tied));
        if self.family.scales_outputs.is_some() {
            map.insert("scale_decoder_outputs".into(), json!(self.scales_outputs));
        }
        if let Some(name) = self.dtype.and_then(dtype_name) {
            let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            map.insert(key.into(), json!(name));
        }
        map
    }
}

/// `feed_forward_proj`: an activation's name, with `gated-` in front where there is a gate.
fn feed_forward(keys: &Keys<'_>, family: &Seq2SeqFamily) -> Result<(MlpLayout, Activation), ConfigError> {
    let key = "feed_forward_proj";
    let name = keys.text(key)?.unwrap_or(family.feed_forward);
    Ok(match name.strip_prefix("gated-") {
        // The approximation, whatever the name says (`T5Config`).
        Some("gelu") => (MlpLayout::Gated(["wi_0", "wi_1", "wo"]), Activation::GeluTanh),
        Some(act) => (MlpLayout::Gated(["wi_0", "wi_1", "wo"]), named_activation(keys, key, act)?),
        None => (MlpLayout::Plain(["wi", "wo"]), named_activation(keys, key, name)?),
    })
}

/// Refuses models of the family with another head.
fn refuse_other_heads(keys: &Keys<'_>, family: &Seq2SeqFamily) -> Result<(), ConfigError> {
    let others = ["EncoderModel", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"];
    let named = keys.value("architectures").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    match named.into_iter().find(|name| others.iter().any(|other| name.ends_with(other))) {
        None => Ok(()),
        Some(name) => Err(keys.invalid(
            "architectures",
            format!("`{name}` is not supported for {} models, only {}", family.model_type, family.architecture),
        )),
    }
}

#[cfg(test)]
#[path = "seq2seq_tests.rs"]
mod tests;
