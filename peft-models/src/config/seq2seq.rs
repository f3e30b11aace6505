//! Configurations of encoder–decoders: one table entry a family.
//!
//! A family says how its `config.json` is read and what its blocks are made of (transformers `models/t5/modeling_t5.py`,
//! `models/mt5/modeling_mt5.py`, `models/bart/modeling_bart.py`); the skeleton is [`EncoderDecoder`](crate::EncoderDecoder).

use std::path::Path;

use candle_core::DType;
use peft_core::Task;
use serde_json::{Map, Value, json};

use super::keys::{Keys, activation, dtype, dtype_name, family, named_activation, refuse_quantized};
use super::seq2seq_layout::{self as layout, Seq2SeqLayout};
use super::{Activation, ConfigError, MOST_LAYERS, MlpLayout};

/// What tells an encoder–decoder family from the others.
#[derive(Debug)]
pub struct Seq2SeqFamily {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The class with a language model head in transformers.
    pub architecture: &'static str,
    /// What its models are made of.
    pub layout: Seq2SeqLayout,
    /// How its `config.json` is read.
    keys: Seq2SeqKeys,
}

/// What the keys of a family's `config.json` are called.
#[derive(Debug, Clone, Copy)]
enum Seq2SeqKeys {
    /// T5's.
    T5 {
        /// `feed_forward_proj` where the key is absent.
        feed_forward: &'static str,
        /// Whether hidden states in front of the head are scaled where the file does not say so; `None` if they never are.
        scales_outputs: Option<bool>,
    },
    /// BART's, which has some of them for either stack.
    Bart,
}

/// Every family that the encoder–decoder skeleton builds. The next one goes here.
pub const SEQ2SEQ_FAMILIES: &[Seq2SeqFamily] = &[
    Seq2SeqFamily {
        model_type: "t5",
        architecture: "T5ForConditionalGeneration",
        layout: layout::T5,
        keys: Seq2SeqKeys::T5 { feed_forward: "relu", scales_outputs: Some(true) },
    },
    Seq2SeqFamily {
        model_type: "mt5",
        architecture: "MT5ForConditionalGeneration",
        layout: layout::T5,
        keys: Seq2SeqKeys::T5 { feed_forward: "gated-gelu", scales_outputs: None },
    },
    Seq2SeqFamily {
        model_type: "bart",
        architecture: "BartForConditionalGeneration",
        layout: layout::BART,
        keys: Seq2SeqKeys::Bart,
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

/// How a stack knows where a token stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seq2SeqPositions {
    /// By biases of attention.
    Relative(RelativePositions),
    /// By a table of so many positions for each stack, added to the embeddings.
    Learned(usize),
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
    /// Positions.
    pub positions: Seq2SeqPositions,
    /// Whether embeddings are multiplied by the root of the hidden size.
    pub scales_embeddings: bool,
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
        let config = match family.keys {
            Seq2SeqKeys::T5 { feed_forward, scales_outputs } => Self::t5(&keys, family, feed_forward, scales_outputs),
            Seq2SeqKeys::Bart => Self::bart(&keys, family),
        }?;
        config.check(&keys)?;
        Ok(Self { raw, ..config })
    }

    fn t5(
        keys: &Keys<'_>,
        family: &'static Seq2SeqFamily,
        default: &str,
        scales_outputs: Option<bool>,
    ) -> Result<Self, ConfigError> {
        let encoder_layers = keys.required_count("num_layers")?;
        let (mlp, hidden_act) = feed_forward(keys, default)?;
        let pad_token_id = first_id(keys, "pad_token_id")?.unwrap_or(0);
        Ok(Self {
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
            positions: Seq2SeqPositions::Relative(RelativePositions {
                buckets: keys.count("relative_attention_num_buckets")?.unwrap_or(32),
                max_distance: keys.count("relative_attention_max_distance")?.unwrap_or(128),
            }),
            scales_embeddings: false,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(true),
            // Files of transformers 4 say it by tying alone, which those of T5 v1.1 do not.
            scales_outputs: match scales_outputs {
                None => false,
                Some(default) => {
                    let tied = keys.flag("tie_word_embeddings")?.unwrap_or(default);
                    keys.flag("scale_decoder_outputs")?.unwrap_or(tied)
                }
            },
            decoder_start_token_id: first_id(keys, "decoder_start_token_id")?.unwrap_or(pad_token_id),
            pad_token_id,
            eos_token_ids: end_ids(keys, 1)?,
            dtype: dtype(keys)?,
            raw: Map::new(),
        })
    }

    fn bart(keys: &Keys<'_>, family: &'static Seq2SeqFamily) -> Result<Self, ConfigError> {
        let hidden_size = keys.required_count("d_model")?;
        // Both stacks are made alike here but for their number of blocks.
        let alike = |of_encoder: &str, of_decoder: &str| -> Result<usize, ConfigError> {
            let (encoder, decoder) = (keys.required_count(of_encoder)?, keys.required_count(of_decoder)?);
            match encoder == decoder {
                true => Ok(encoder),
                false => {
                    let reason = format!("{decoder} is not supported, only {encoder}, which is {of_encoder}");
                    Err(keys.invalid(of_decoder, reason))
                }
            }
        };
        let heads = alike("encoder_attention_heads", "decoder_attention_heads")?;
        if heads == 0 || !hidden_size.is_multiple_of(heads) {
            let reason = format!("{hidden_size} is not a multiple of encoder_attention_heads = {heads}");
            return Err(keys.invalid("d_model", reason));
        }
        Ok(Self {
            family,
            vocab_size: keys.required_count("vocab_size")?,
            hidden_size,
            intermediate_size: alike("encoder_ffn_dim", "decoder_ffn_dim")?,
            encoder_layers: keys.required_count("encoder_layers")?,
            decoder_layers: keys.required_count("decoder_layers")?,
            num_attention_heads: heads,
            head_dim: hidden_size / heads,
            mlp: MlpLayout::Plain(["fc1", "fc2"]),
            hidden_act: activation(keys, "activation_function")?.unwrap_or(Activation::Gelu),
            norm_eps: 1e-5,
            positions: Seq2SeqPositions::Learned(keys.count("max_position_embeddings")?.unwrap_or(1024)),
            scales_embeddings: keys.flag("scale_embedding")?.unwrap_or(false),
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(true),
            scales_outputs: false,
            decoder_start_token_id: first_id(keys, "decoder_start_token_id")?.unwrap_or(2),
            pad_token_id: first_id(keys, "pad_token_id")?.unwrap_or(1),
            eos_token_ids: end_ids(keys, 2)?,
            dtype: dtype(keys)?,
            raw: Map::new(),
        })
    }

    fn check(&self, keys: &Keys<'_>) -> Result<(), ConfigError> {
        let [intermediate, encoder, decoder, heads, head_dim] = match self.family.keys {
            Seq2SeqKeys::T5 { .. } => ["d_ff", "num_layers", "num_decoder_layers", "num_heads", "d_kv"],
            Seq2SeqKeys::Bart => {
                ["encoder_ffn_dim", "encoder_layers", "decoder_layers", "encoder_attention_heads", "d_model"]
            }
        };
        // Far above any real model, low enough that no product of two of them overflows.
        let ranges = [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("d_model", self.hidden_size, 1 << 20),
            (intermediate, self.intermediate_size, 1 << 24),
            (encoder, self.encoder_layers, MOST_LAYERS),
            (decoder, self.decoder_layers, MOST_LAYERS),
            (heads, self.num_attention_heads, 1 << 14),
            (head_dim, self.head_dim, 1 << 14),
            ("max_position_embeddings", self.learned_positions().unwrap_or(1), 1 << 31),
        ];
        for (key, value, most) in ranges {
            if value == 0 || value > most {
                return Err(keys.invalid(key, format!("{value} is outside 1..={most}")));
            }
        }
        if let Seq2SeqPositions::Relative(RelativePositions { buckets, max_distance }) = self.positions {
            if !(4..=1 << 16).contains(&buckets) {
                return Err(keys.invalid("relative_attention_num_buckets", format!("{buckets} is outside 4..=65536")));
            }
            // The exact buckets of the decoder end at half of them, and the logarithmic ones begin there.
            if max_distance <= buckets / 2 || max_distance > 1 << 24 {
                let reason = format!("{max_distance} is outside {}..={}", buckets / 2 + 1, 1 << 24);
                return Err(keys.invalid("relative_attention_max_distance", reason));
            }
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

    /// The positions that the model has tables for, where positions are learned: no sequence may be longer.
    pub fn learned_positions(&self) -> Option<usize> {
        match self.positions {
            Seq2SeqPositions::Learned(most) => Some(most),
            Seq2SeqPositions::Relative(_) => None,
        }
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
        if let Seq2SeqKeys::T5 { scales_outputs: Some(_), .. } = self.family.keys {
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
fn feed_forward(keys: &Keys<'_>, default: &str) -> Result<(MlpLayout, Activation), ConfigError> {
    let key = "feed_forward_proj";
    let name = keys.text(key)?.unwrap_or(default);
    Ok(match name.strip_prefix("gated-") {
        // The approximation, whatever the name says (`T5Config`).
        Some("gelu") => (MlpLayout::Gated(["wi_0", "wi_1", "wo"]), Activation::GeluTanh),
        Some(act) => (MlpLayout::Gated(["wi_0", "wi_1", "wo"]), named_activation(keys, key, act)?),
        None => (MlpLayout::Plain(["wi", "wo"]), named_activation(keys, key, name)?),
    })
}

fn first_id(keys: &Keys<'_>, key: &str) -> Result<Option<u32>, ConfigError> {
    Ok(keys.token_ids(key)?.first().copied())
}

fn end_ids(keys: &Keys<'_>, default: u32) -> Result<Vec<u32>, ConfigError> {
    let ids = keys.token_ids("eos_token_id")?;
    Ok(if ids.is_empty() { vec![default] } else { ids })
}

/// Refuses models of the family with another head.
fn refuse_other_heads(keys: &Keys<'_>, family: &Seq2SeqFamily) -> Result<(), ConfigError> {
    let others = [
        "EncoderModel",
        "BartForCausalLM",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
    ];
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
