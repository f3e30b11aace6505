//! The configuration of whatever model a folder holds.

use std::path::Path;

use candle_core::DType;
use peft_core::{HeadKind, Labels, Task};
use serde_json::{Map, Value};

use super::keys::{Keys, read_json};
use super::labels::named_head;
use super::{ConfigError, DecoderConfig, ENCODER_FAMILIES, EncoderConfig, SEQ2SEQ_FAMILIES, Seq2SeqConfig};

/// A configuration of one of the skeletons.
#[derive(Debug, Clone)]
pub enum ModelConfig {
    /// A decoder: causal language model, or one with a head of its own.
    Decoder(Box<DecoderConfig>),
    /// An encoder with a head.
    Encoder(Box<EncoderConfig>),
    /// An encoder–decoder that writes a target for a source.
    Seq2Seq(Box<Seq2SeqConfig>),
}

impl ModelConfig {
    /// Reads a `config.json`, or the one in a model folder; its `model_type` says what it is.
    ///
    /// # Errors
    /// As [`DecoderConfig::from_hf_json`], [`EncoderConfig::from_hf_map`] and [`Seq2SeqConfig::from_hf_map`].
    pub fn from_hf_json(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let (raw, path) = read_json(path.as_ref())?;
        let keys = Keys { map: &raw, path: &path, prefix: "" };
        let model_type = keys.model_type()?;
        if ENCODER_FAMILIES.iter().any(|family| family.model_type == model_type) {
            return EncoderConfig::from_hf_map(raw, &path).map(|c| Self::Encoder(Box::new(c)));
        }
        if SEQ2SEQ_FAMILIES.iter().any(|family| family.model_type == model_type) {
            return Seq2SeqConfig::from_hf_map(raw, &path).map(|c| Self::Seq2Seq(Box::new(c)));
        }
        DecoderConfig::from_hf_map(raw, &path).map(|c| Self::Decoder(Box::new(c)))
    }

    /// `model_type` in `config.json`.
    pub fn model_type(&self) -> &'static str {
        match self {
            Self::Decoder(c) => c.model_type(),
            Self::Encoder(c) => c.family.model_type,
            Self::Seq2Seq(c) => c.family.model_type,
        }
    }

    /// What the head computes.
    pub fn task(&self) -> Task {
        match self {
            Self::Decoder(c) => c.task(),
            Self::Encoder(c) => c.task(),
            Self::Seq2Seq(c) => c.task(),
        }
    }

    /// Rows of the token embedding.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Decoder(c) => c.vocab_size,
            Self::Encoder(c) => c.vocab_size,
            Self::Seq2Seq(c) => c.vocab_size,
        }
    }

    /// The most tokens that a sequence may have, where the model has a table of positions.
    pub fn max_length(&self) -> Option<usize> {
        match self {
            Self::Decoder(c) => c.learned_positions(),
            Self::Encoder(c) => Some(c.max_length()),
            Self::Seq2Seq(c) => c.learned_positions(),
        }
    }

    /// The type that the weights are stored in, where the file says so.
    pub fn dtype(&self) -> Option<DType> {
        match self {
            Self::Decoder(c) => c.dtype,
            Self::Encoder(c) => c.dtype,
            Self::Seq2Seq(c) => c.dtype,
        }
    }

    /// Names of the classes of the head, where the model has a class head.
    pub fn labels(&self) -> Option<&[String]> {
        match self {
            Self::Decoder(c) => c.labels.as_deref(),
            Self::Encoder(c) => Some(&c.labels),
            Self::Seq2Seq(_) => None,
        }
    }

    /// The head and its outputs, where it is not a language model's.
    pub fn head(&self) -> Option<Labels> {
        match self.task() {
            Task::Head { kind, .. } => Some(Labels { names: self.labels()?.to_vec(), kind }),
            _ => None,
        }
    }

    /// Says what the head is for; models of language are left as they are.
    pub(crate) fn set_head(&mut self, kind: HeadKind) {
        match self {
            Self::Decoder(c) => c.kind = kind,
            Self::Encoder(c) => c.kind = kind,
            Self::Seq2Seq(_) => {}
        }
    }

    /// The head that the file names, where it is not a language model's.
    pub(crate) fn named_head(&self) -> Option<HeadKind> {
        match self {
            Self::Decoder(c) => named_head(&c.raw),
            Self::Encoder(c) => named_head(&c.raw),
            Self::Seq2Seq(_) => None,
        }
    }

    /// Names the classes of a class head; other models are left as they are.
    pub(crate) fn set_labels(&mut self, labels: Vec<String>) {
        match self {
            Self::Decoder(c) => c.labels = Some(labels),
            Self::Encoder(c) => c.labels = labels,
            Self::Seq2Seq(_) => {}
        }
    }

    /// The `config.json` to write beside weights; `tied` says whether the head of a language model shares its embedding
    /// there.
    pub fn to_hf_json(&self, tied: bool) -> Map<String, Value> {
        match self {
            Self::Decoder(c) => {
                let mut map = c.to_hf_json();
                map.insert("tie_word_embeddings".into(), tied.into());
                map
            }
            Self::Encoder(c) => c.to_hf_json(),
            Self::Seq2Seq(c) => c.to_hf_json(tied),
        }
    }
}
