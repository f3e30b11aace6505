//! Configurations of encoders: one table entry a family.
//!
//! A family says how its `config.json` calls the sizes and how its model calls the layers (transformers
//! `models/bert/modeling_bert.py`, `models/roberta/modeling_roberta.py`, `models/distilbert/modeling_distilbert.py`); the
//! skeleton is [`Encoder`](crate::Encoder).

use std::path::Path;

use candle_core::DType;
use peft_core::{ClassToken, HeadKind, Task};
use serde_json::{Map, Value, json};

use super::keys::{Keys, activation, dtype, dtype_name, family, refuse_quantized};
use super::labels::{head, insert_labels};
use super::{Activation, ConfigError};

/// What tells an encoder family from the others.
#[derive(Debug)]
pub struct EncoderFamily {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// How the names of its classes in transformers begin: `Bert` of `BertForSequenceClassification`.
    pub class: &'static str,
    /// Keys of the sizes in `config.json`.
    keys: SizeKeys,
    /// Paths of the layers.
    pub names: EncoderNames,
    /// Whether positions are counted from `pad_token_id + 1`, and padding tokens stand at `pad_token_id`.
    pub positions_after_padding: bool,
    /// Activation between the dense layer of the head and its output layer.
    pub head_activation: HeadActivation,
    /// Whether the body takes keys and values in front of a layer's own (`past_key_values` of its `forward`).
    pub prefixes: bool,
    /// `type_vocab_size` where the key is absent; 0 for families without token types.
    type_vocab_size: usize,
    /// `layer_norm_eps` where the key is absent.
    layer_norm_eps: f64,
    /// `pad_token_id` where the key is absent.
    pad_token_id: u32,
}

/// What stands between the two layers of a class head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadActivation {
    /// BERT's pooler and RoBERTa's head.
    Tanh,
    /// DistilBERT's head.
    Relu,
}

/// How a family's `config.json` calls the sizes.
#[derive(Debug)]
struct SizeKeys {
    hidden_size: &'static str,
    intermediate_size: &'static str,
    num_hidden_layers: &'static str,
    num_attention_heads: &'static str,
    hidden_act: &'static str,
}

/// Where a family's layers are in its sequence classification model.
#[derive(Debug)]
pub struct EncoderNames {
    /// The encoder without its head: `bert`. Checkpoints of the encoder alone leave it out.
    pub body: &'static str,
    /// The list of blocks, in the body.
    pub blocks: &'static str,
    /// Query, key, value and output of attention, in a block.
    pub attention: [&'static str; 4],
    /// The norm after attention, in a block.
    pub attention_norm: &'static str,
    /// The two layers of the MLP, in a block.
    pub mlp: [&'static str; 2],
    /// The norm after the MLP, in a block.
    pub mlp_norm: &'static str,
    /// The dense layer of a head that reads a whole sequence, in the model.
    head_dense: &'static str,
    /// The output layer of such a head, in the model.
    head_out: &'static str,
}

const BERT_KEYS: SizeKeys = SizeKeys {
    hidden_size: "hidden_size",
    intermediate_size: "intermediate_size",
    num_hidden_layers: "num_hidden_layers",
    num_attention_heads: "num_attention_heads",
    hidden_act: "hidden_act",
};

const BERT_NAMES: EncoderNames = EncoderNames {
    body: "bert",
    blocks: "encoder.layer",
    attention: ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"],
    attention_norm: "attention.output.LayerNorm",
    mlp: ["intermediate.dense", "output.dense"],
    mlp_norm: "output.LayerNorm",
    head_dense: "bert.pooler.dense",
    head_out: "classifier",
};

const ROBERTA: EncoderFamily = EncoderFamily {
    model_type: "roberta",
    class: "Roberta",
    keys: BERT_KEYS,
    names: EncoderNames {
        body: "roberta",
        head_dense: "classifier.dense",
        head_out: "classifier.out_proj",
        ..BERT_NAMES
    },
    positions_after_padding: true,
    head_activation: HeadActivation::Tanh,
    prefixes: true,
    type_vocab_size: 2,
    layer_norm_eps: 1e-12,
    pad_token_id: 1,
};

/// Every family that the encoder skeleton builds. The next one goes here.
pub const ENCODER_FAMILIES: &[EncoderFamily] = &[
    EncoderFamily {
        model_type: "bert",
        class: "Bert",
        keys: BERT_KEYS,
        names: BERT_NAMES,
        positions_after_padding: false,
        head_activation: HeadActivation::Tanh,
        prefixes: true,
        type_vocab_size: 2,
        layer_norm_eps: 1e-12,
        pad_token_id: 0,
    },
    ROBERTA,
    EncoderFamily { model_type: "xlm-roberta", class: "XLMRoberta", ..ROBERTA },
    EncoderFamily {
        model_type: "distilbert",
        class: "DistilBert",
        keys: SizeKeys {
            hidden_size: "dim",
            intermediate_size: "hidden_dim",
            num_hidden_layers: "n_layers",
            num_attention_heads: "n_heads",
            hidden_act: "activation",
        },
        names: EncoderNames {
            body: "distilbert",
            blocks: "transformer.layer",
            attention: ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"],
            attention_norm: "sa_layer_norm",
            mlp: ["ffn.lin1", "ffn.lin2"],
            mlp_norm: "output_layer_norm",
            head_dense: "pre_classifier",
            head_out: "classifier",
        },
        positions_after_padding: false,
        head_activation: HeadActivation::Relu,
        prefixes: false,
        type_vocab_size: 0,
        layer_norm_eps: 1e-12,
        pad_token_id: 0,
    },
];

/// Configuration of an encoder with a head.
#[derive(Debug, Clone)]
pub struct EncoderConfig {
    /// Names of keys and layers, and what the files leave unsaid.
    pub family: &'static EncoderFamily,
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of transformer blocks.
    pub num_hidden_layers: usize,
    /// Attention heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Activation of the MLP.
    pub hidden_act: Activation,
    /// Epsilon inside the layer norms.
    pub layer_norm_eps: f64,
    /// Rows of the position embedding.
    pub max_position_embeddings: usize,
    /// Rows of the token type embedding; 0 for families that have none.
    pub type_vocab_size: usize,
    /// Id of the padding token.
    pub pad_token_id: u32,
    /// Names of the classes: the head gives a logit each.
    pub labels: Vec<String>,
    /// What the head is for.
    pub kind: HeadKind,
    /// Floating-point type that the weights are stored in, where the file says so.
    pub dtype: Option<DType>,
    /// The `config.json` as read, with keys that this type does not know.
    pub raw: Map<String, Value>,
}

impl EncoderConfig {
    /// Reads a parsed `config.json`; `path` is what messages name.
    ///
    /// # Errors
    /// An unknown `model_type`, an absent key, and a value that is impossible or not supported; the message names the
    /// file and the key.
    pub fn from_hf_map(raw: Map<String, Value>, path: &Path) -> Result<Self, ConfigError> {
        let keys = Keys { map: &raw, path, prefix: "" };
        let family = family(&keys, ENCODER_FAMILIES, |family| family.model_type, |_| true)?;
        refuse_quantized(&keys)?;
        if keys.flag("is_decoder")? == Some(true) {
            return Err(keys.invalid("is_decoder", "an encoder that is run as a decoder is not supported".into()));
        }
        if let Some(kind) = keys.text("position_embedding_type")?
            && kind != "absolute"
        {
            return Err(keys.invalid("position_embedding_type", format!("`{kind}` is not supported (known: absolute)")));
        }
        let names = &family.keys;
        let (kind, labels) = head(&keys)?;
        let config = Self {
            family,
            vocab_size: keys.required_count("vocab_size")?,
            hidden_size: keys.required_count(names.hidden_size)?,
            intermediate_size: keys.required_count(names.intermediate_size)?,
            num_hidden_layers: keys.required_count(names.num_hidden_layers)?,
            num_attention_heads: keys.required_count(names.num_attention_heads)?,
            hidden_act: activation(&keys, names.hidden_act)?.unwrap_or(Activation::Gelu),
            layer_norm_eps: keys.number("layer_norm_eps")?.unwrap_or(family.layer_norm_eps),
            max_position_embeddings: keys.count("max_position_embeddings")?.unwrap_or(512),
            type_vocab_size: match family.type_vocab_size {
                0 => 0,
                default => keys.count("type_vocab_size")?.unwrap_or(default),
            },
            pad_token_id: keys.token_ids("pad_token_id")?.first().copied().unwrap_or(family.pad_token_id),
            kind,
            labels,
            dtype: dtype(&keys)?,
            raw: Map::new(),
        };
        config.check(&keys)?;
        Ok(Self { raw, ..config })
    }

    fn check(&self, keys: &Keys<'_>) -> Result<(), ConfigError> {
        let names = &self.family.keys;
        // Far above any real model, low enough that no product of two of them overflows.
        let mut ranges = vec![
            ("vocab_size", self.vocab_size, 1 << 24),
            (names.hidden_size, self.hidden_size, 1 << 20),
            (names.intermediate_size, self.intermediate_size, 1 << 24),
            (names.num_hidden_layers, self.num_hidden_layers, 10_000),
            (names.num_attention_heads, self.num_attention_heads, 1 << 14),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 24),
        ];
        if self.family.type_vocab_size > 0 {
            ranges.push(("type_vocab_size", self.type_vocab_size, 1 << 16));
        }
        for (key, value, most) in ranges {
            if value == 0 || value > most {
                return Err(keys.invalid(key, format!("{value} is outside 1..={most}")));
            }
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(keys.invalid(
                names.hidden_size,
                format!(
                    "{} is not a multiple of {} = {}",
                    self.hidden_size, names.num_attention_heads, self.num_attention_heads
                ),
            ));
        }
        if !(self.layer_norm_eps.is_finite() && self.layer_norm_eps >= 0.0) {
            return Err(
                keys.invalid("layer_norm_eps", format!("{} is not a small positive number", self.layer_norm_eps))
            );
        }
        if self.max_length() == 0 {
            return Err(keys.invalid(
                "max_position_embeddings",
                format!(
                    "{} leaves no position after the padding token's {}",
                    self.max_position_embeddings, self.pad_token_id
                ),
            ));
        }
        Ok(())
    }

    /// What the head computes, of the first token or of every one.
    pub fn task(&self) -> Task {
        let reads = if self.kind.is_of_tokens() { ClassToken::Every } else { ClassToken::First };
        Task::Head { kind: self.kind, outputs: self.labels.len(), reads }
    }

    /// Path of the dense layer of the head, which those that read every token do without.
    pub fn head_dense(&self) -> Option<&'static str> {
        (!self.kind.is_of_tokens()).then_some(self.family.names.head_dense)
    }

    /// Path of the output layer of the head.
    pub fn head_out(&self) -> &'static str {
        match self.kind {
            HeadKind::QuestionAnswering => "qa_outputs",
            HeadKind::TokenClassification => "classifier",
            _ => self.family.names.head_out,
        }
    }

    /// The most tokens that a sequence may have.
    pub fn max_length(&self) -> usize {
        self.max_position_embeddings.saturating_sub(self.first_position())
    }

    /// The position of a sequence's first token.
    pub fn first_position(&self) -> usize {
        if self.family.positions_after_padding { self.pad_token_id as usize + 1 } else { 0 }
    }

    /// Dimensions of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// The `config.json` to write beside this model's weights: the one that was read, as that of the class with this head.
    pub fn to_hf_json(&self) -> Map<String, Value> {
        let mut map = self.raw.clone();
        map.insert("architectures".into(), json!([format!("{}{}", self.family.class, self.kind.architecture())]));
        map.insert("vocab_size".into(), json!(self.vocab_size));
        insert_labels(&mut map, self.kind, &self.labels);
        if let Some(name) = self.dtype.and_then(dtype_name) {
            let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            map.insert(key.into(), json!(name));
        }
        map
    }
}

#[cfg(test)]
#[path = "encoder_tests.rs"]
mod tests;
