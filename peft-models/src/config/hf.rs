//! `config.json` of transformers: reading v4 and v5 spellings, and writing.
//!
//! v4 has `torch_dtype`, v5 `dtype`; how they differ about rotary embeddings is in `layer_kinds.rs`.

use std::path::Path;

use peft_core::HeadKind;
use serde_json::{Map, Value, json};

use super::experts::experts;
use super::keys::{Keys, activation, dtype, dtype_name, family, read_json, refuse_quantized};
use super::labels::{head, insert_labels, named_head};
use super::layer_kinds::layer_kinds;
use super::{Activation, ConfigError, DecoderConfig, FAMILIES, Family, Switch, WindowRule};

impl DecoderConfig {
    /// Reads a `config.json`, or the one in a model folder.
    ///
    /// # Errors
    /// A file that cannot be read or parsed, an unknown `model_type`, an absent key, and a value that is impossible or
    /// not supported; the message names the file and the key.
    pub fn from_hf_json(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let (raw, path) = read_json(path.as_ref())?;
        Self::from_hf_map(raw, &path)
    }

    /// Reads a parsed `config.json`; `path` is what messages name.
    ///
    /// # Errors
    /// As [`DecoderConfig::from_hf_json`].
    pub fn from_hf_map(raw: Map<String, Value>, path: &Path) -> Result<Self, ConfigError> {
        let keys = Keys { map: &raw, path, prefix: "" };
        let family = family(
            &keys,
            FAMILIES,
            |family| family.model_type,
            |family| family.variant.is_none_or(|is_in| is_in(&raw)),
        )?;
        refuse_quantized(&keys)?;
        refuse_fixed(&keys, family)?;
        let names = &family.keys;
        let hidden_size = keys.required_count(names.hidden_size)?;
        for key in family.as_wide {
            if let Some(width) = keys.count(key)?.filter(|width| *width != hidden_size) {
                return Err(keys.invalid(key, format!("{width} is not supported, only {hidden_size}, the hidden size")));
            }
        }
        let num_attention_heads = keys.required_count(names.num_attention_heads)?;
        if num_attention_heads == 0 {
            return Err(keys.invalid(names.num_attention_heads, "0 heads".into()));
        }
        let head_dim = match count_or(&keys, "head_dim", family.head_dim)?.filter(|_| family.has_head_dim) {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => {
                return Err(keys.invalid(
                    names.hidden_size,
                    format!("{hidden_size} is not a multiple of {} = {num_attention_heads}", names.num_attention_heads),
                ));
            }
        };
        let num_key_value_heads = names
            .num_key_value_heads
            .map_or(Ok(family.num_key_value_heads), |key| count_or(&keys, key, family.num_key_value_heads))?;
        let intermediate_size = match (keys.count(names.intermediate_size)?, family.intermediate_factor) {
            (None, Some(factor)) => hidden_size.saturating_mul(factor),
            (Some(size), _) => size,
            (None, None) => keys.required_count(names.intermediate_size)?,
        };
        let num_hidden_layers = keys.required_count(names.num_hidden_layers)?;
        let (kind, labels) = match named_head(&raw) {
            None => (HeadKind::default(), None),
            Some(HeadKind::QuestionAnswering) => {
                let why = "question answering is supported with encoders, not with decoders";
                return Err(keys.invalid("architectures", why.into()));
            }
            Some(of_tokens @ HeadKind::TokenClassification) if family.token_head.is_none() => {
                let why = format!("transformers has no `{}` of this family", of_tokens.architecture());
                return Err(keys.invalid("architectures", why));
            }
            Some(_) => head(&keys).map(|(kind, labels)| (kind, Some(labels)))?,
        };
        let max_position_embeddings =
            keys.count(names.max_position_embeddings)?.unwrap_or(family.max_position_embeddings);
        let experts = experts(&keys, family, num_hidden_layers, intermediate_size)?;
        let (layer_kinds, kind_of_layer) = layer_kinds(&keys, family, num_hidden_layers, max_position_embeddings)?;
        let query_pre_attn_scalar = match family.query_pre_attn_scalar {
            Some(default) => Some(keys.number("query_pre_attn_scalar")?.unwrap_or(default)),
            None => None,
        };
        let [attn_logit_softcapping, final_logit_softcapping] = match family.softcaps {
            Some([attention, logits]) => [
                number_or(&keys, "attn_logit_softcapping", attention)?,
                number_or(&keys, "final_logit_softcapping", logits)?,
            ],
            None => [None, None],
        };
        let hidden_act = match activation(&keys, names.hidden_act)?.unwrap_or(family.hidden_act) {
            Activation::Gelu if family.gelu_is_tanh => Activation::GeluTanh,
            act => act,
        };
        Self {
            family,
            vocab_size: keys.required_count("vocab_size")?,
            hidden_size,
            intermediate_size,
            experts,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: num_key_value_heads.unwrap_or(num_attention_heads),
            head_dim,
            hidden_act,
            norm_eps: names.norm_eps.map_or(Ok(None), |key| keys.number(key))?.unwrap_or(family.norm_eps),
            layer_kinds,
            kind_of_layer,
            query_pre_attn_scalar,
            max_position_embeddings,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(family.tie_word_embeddings),
            qkv_bias: is_on(&keys, family.qkv_bias)?,
            output_bias: is_on(&keys, family.output_bias)?,
            mlp_bias: is_on(&keys, family.mlp_bias)?,
            parallel_residual: is_on(&keys, family.parallel_residual)?,
            attn_logit_softcapping,
            final_logit_softcapping,
            bos_token_id: if raw.contains_key("bos_token_id") {
                keys.token_ids("bos_token_id")?.first().copied()
            } else {
                family.bos_token_id
            },
            eos_token_ids: if raw.contains_key("eos_token_id") {
                keys.token_ids("eos_token_id")?
            } else {
                family.eos_token_id.into_iter().collect()
            },
            pad_token_id: keys.token_ids("pad_token_id")?.first().copied(),
            kind,
            labels,
            dtype: dtype(&keys)?,
            raw: Map::new(),
        }
        .check(path)
        .map(|config| Self { raw, ..config })
    }

    /// The `config.json` to write beside this model's weights; transformers v4 and v5 load it.
    ///
    /// A configuration that was read from a `config.json` keeps all of its keys; `vocab_size`, `tie_word_embeddings` and
    /// the dtype are brought up to date, since merging may change them. One that was read from a GGUF file is written
    /// in full.
    pub fn to_hf_json(&self) -> Map<String, Value> {
        let mut map = if self.raw.is_empty() { self.full_json() } else { self.raw.clone() };
        map.insert("vocab_size".into(), json!(self.vocab_size));
        if map.contains_key("tie_word_embeddings") || self.tie_word_embeddings != self.family.tie_word_embeddings {
            map.insert("tie_word_embeddings".into(), json!(self.tie_word_embeddings));
        }
        if let Some(labels) = &self.labels {
            insert_labels(&mut map, self.kind, labels);
        }
        if let Some(name) = self.dtype.and_then(dtype_name) {
            let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            map.insert(key.into(), json!(name));
        }
        map
    }

    fn full_json(&self) -> Map<String, Value> {
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [id] => json!(id),
            ids => json!(ids),
        };
        let mut map = Map::new();
        let mut set = |key: &str, value: Value| map.insert(key.to_owned(), value);
        set("architectures", json!([self.family.architecture]));
        set("model_type", json!(self.family.model_type));
        set("vocab_size", json!(self.vocab_size));
        set("hidden_size", json!(self.hidden_size));
        set("intermediate_size", json!(self.intermediate_size));
        set("num_hidden_layers", json!(self.num_hidden_layers));
        set("num_attention_heads", json!(self.num_attention_heads));
        set("num_key_value_heads", json!(self.num_key_value_heads));
        set("head_dim", json!(self.head_dim));
        set("hidden_act", json!(self.hidden_act.name()));
        set("rms_norm_eps", json!(self.norm_eps));
        set("max_position_embeddings", json!(self.max_position_embeddings));
        if let Some(rope) = self.rope() {
            set("rope_theta", json!(rope.theta));
            set("rope_scaling", rope.scaling.to_hf_json().map_or(Value::Null, Value::Object));
        }
        set("tie_word_embeddings", json!(self.tie_word_embeddings));
        for (bias, value) in [(self.family.qkv_bias, self.qkv_bias), (self.family.mlp_bias, self.mlp_bias)] {
            if let Switch::Key(key, _) = bias {
                set(key, json!(value));
            }
        }
        set("attention_dropout", json!(0.0));
        set("initializer_range", json!(0.02));
        set("use_cache", json!(true));
        set("bos_token_id", json!(self.bos_token_id));
        set("eos_token_id", eos);
        set("pad_token_id", json!(self.pad_token_id));
        if self.family.window == WindowRule::Upper {
            set("use_sliding_window", json!(false));
        }
        map
    }
}

/// A count, the family's default where the key is absent, and nothing where it is null.
fn count_or(keys: &Keys<'_>, key: &str, default: Option<usize>) -> Result<Option<usize>, ConfigError> {
    if keys.map.contains_key(key) { keys.count(key) } else { Ok(default) }
}

/// A number, the family's default where the key is absent, and nothing where it is null.
fn number_or(keys: &Keys<'_>, key: &str, default: Option<f64>) -> Result<Option<f64>, ConfigError> {
    if keys.map.contains_key(key) { keys.number(key) } else { Ok(default) }
}

fn is_on(keys: &Keys<'_>, switch: Switch) -> Result<bool, ConfigError> {
    match switch {
        Switch::Never => Ok(false),
        Switch::Always => Ok(true),
        Switch::Key(key, default) => Ok(keys.flag(key)?.unwrap_or(default)),
    }
}

/// Refuses features of the family that are not implemented, by their keys.
fn refuse_fixed(keys: &Keys<'_>, family: &Family) -> Result<(), ConfigError> {
    for (key, only) in family.fixed {
        if keys.flag(key)?.is_some_and(|value| value != *only) {
            let reason = format!("{} is not supported for {} models, only {only}", !only, family.model_type);
            return Err(keys.invalid(key, reason));
        }
    }
    Ok(())
}
