//! `config.json` of transformers: reading v4 and v5 spellings, and writing.
//!
//! v4 has `rope_theta`, `rope_scaling` and `torch_dtype`; v5 has `rope_parameters` and `dtype`
//! (transformers `modeling_rope_utils.py`, `RotaryEmbeddingConfigMixin`, for which one wins).

use std::path::Path;

use peft_core::suggest::did_you_mean;
use serde_json::{Map, Value, json};

use super::keys::{Keys, activation, dtype, dtype_name, family, read_json, refuse_quantized};
use super::labels::{class_labels, insert_labels, reads_classes};
use super::{ConfigError, DecoderConfig, FAMILIES, Family, RopeConfig};
use crate::rope::{LongRope, RopeScaling, Yarn};

const ROPE_TYPES: &[&str] = &["default", "linear", "dynamic", "yarn", "llama3", "longrope"];

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
        let family = family(&keys, FAMILIES, |family| family.model_type)?;
        refuse_quantized(&keys)?;
        let hidden_size = keys.required_count("hidden_size")?;
        let num_attention_heads = keys.required_count("num_attention_heads")?;
        if num_attention_heads == 0 {
            return Err(keys.invalid("num_attention_heads", "0 heads".into()));
        }
        let head_dim = match keys.count("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => {
                return Err(keys.invalid(
                    "hidden_size",
                    format!("{hidden_size} is not a multiple of num_attention_heads = {num_attention_heads}"),
                ));
            }
        };
        let max_position_embeddings = keys.count("max_position_embeddings")?.unwrap_or(family.max_position_embeddings);
        Self {
            family,
            vocab_size: keys.required_count("vocab_size")?,
            hidden_size,
            intermediate_size: keys.required_count("intermediate_size")?,
            num_hidden_layers: keys.required_count("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: keys.count("num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim,
            hidden_act: activation(&keys, "hidden_act")?.unwrap_or(family.hidden_act),
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(family.rms_norm_eps),
            rope: rope(&keys, family, max_position_embeddings)?,
            max_position_embeddings,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(family.tie_word_embeddings),
            attention_bias: keys.flag("attention_bias")?.unwrap_or(family.attention_bias),
            mlp_bias: keys.flag("mlp_bias")?.unwrap_or(false),
            sliding_window: if family.sliding_window { keys.count("sliding_window")? } else { None },
            attn_logit_softcapping: if family.softcaps { keys.number("attn_logit_softcapping")? } else { None },
            final_logit_softcapping: if family.softcaps { keys.number("final_logit_softcapping")? } else { None },
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
            labels: reads_classes(&keys).then(|| class_labels(&keys)).transpose()?,
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
            insert_labels(&mut map, labels);
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
        set("rms_norm_eps", json!(self.rms_norm_eps));
        set("max_position_embeddings", json!(self.max_position_embeddings));
        set("rope_theta", json!(self.rope.theta));
        set("rope_scaling", self.rope.scaling.to_hf_json().map_or(Value::Null, Value::Object));
        set("tie_word_embeddings", json!(self.tie_word_embeddings));
        set("attention_bias", json!(self.attention_bias));
        set("mlp_bias", json!(self.mlp_bias));
        set("attention_dropout", json!(0.0));
        set("initializer_range", json!(0.02));
        set("use_cache", json!(true));
        set("bos_token_id", json!(self.bos_token_id));
        set("eos_token_id", eos);
        set("pad_token_id", json!(self.pad_token_id));
        if self.family.partial_rotary {
            set("partial_rotary_factor", json!(self.rope.partial_rotary_factor));
        }
        if self.family.sliding_window {
            set("sliding_window", json!(self.sliding_window));
        }
        if self.family.softcaps {
            set("attn_logit_softcapping", json!(self.attn_logit_softcapping));
            set("final_logit_softcapping", json!(self.final_logit_softcapping));
        }
        map
    }
}

fn rope(keys: &Keys<'_>, family: &Family, max_position_embeddings: usize) -> Result<RopeConfig, ConfigError> {
    // As in transformers, a non-empty `rope_scaling` wins over `rope_parameters`.
    let empty = Map::new();
    let mut parameters = Keys { map: &empty, path: keys.path, prefix: "" };
    for (key, prefix) in [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")] {
        let Some(value) = keys.value(key) else { continue };
        let map = value.as_object().ok_or_else(|| keys.wrong(key, value, "an object or null"))?;
        if !map.is_empty() && parameters.map.is_empty() {
            parameters = Keys { map, path: keys.path, prefix };
        }
    }
    let theta = match parameters.number("rope_theta")? {
        Some(theta) => theta,
        None => keys.number("rope_theta")?.unwrap_or(family.rope_theta),
    };
    let partial_rotary_factor = match parameters.number("partial_rotary_factor")? {
        Some(factor) => Some(factor),
        None => keys.number("partial_rotary_factor")?,
    }
    .unwrap_or(1.0);
    if !family.partial_rotary && partial_rotary_factor != 1.0 {
        return Err(keys.invalid("partial_rotary_factor", format!("{} models rotate whole heads", family.model_type)));
    }
    // `original_max_position_embeddings` stands beside the other keys in some files, and then has priority.
    let original = match keys.count("original_max_position_embeddings")? {
        Some(original) => original,
        None => parameters.count("original_max_position_embeddings")?.unwrap_or(max_position_embeddings),
    };
    let type_key = if parameters.value("rope_type").is_some() { "rope_type" } else { "type" };
    let scaling = match parameters.text(type_key)?.unwrap_or("default") {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: parameters.required_number("factor")? },
        "dynamic" => RopeScaling::Dynamic { factor: parameters.required_number("factor")?, max_position_embeddings },
        "yarn" => RopeScaling::Yarn(Yarn {
            factor: parameters.number("factor")?.unwrap_or(max_position_embeddings as f64 / original.max(1) as f64),
            original_max_position_embeddings: original,
            attention_factor: parameters.number("attention_factor")?,
            beta_fast: parameters.number("beta_fast")?.filter(|beta| *beta != 0.0).unwrap_or(32.0),
            beta_slow: parameters.number("beta_slow")?.filter(|beta| *beta != 0.0).unwrap_or(1.0),
            mscale: parameters.number("mscale")?,
            mscale_all_dim: parameters.number("mscale_all_dim")?,
            truncate: parameters.flag("truncate")?.unwrap_or(true),
        }),
        "llama3" => RopeScaling::Llama3 {
            factor: parameters.required_number("factor")?,
            low_freq_factor: parameters.required_number("low_freq_factor")?,
            high_freq_factor: parameters.required_number("high_freq_factor")?,
            original_max_position_embeddings: original,
        },
        "longrope" | "su" => RopeScaling::LongRope(LongRope {
            short_factor: parameters.numbers("short_factor")?,
            long_factor: parameters.numbers("long_factor")?,
            factor: parameters.number("factor")?.unwrap_or(max_position_embeddings as f64 / original.max(1) as f64),
            attention_factor: parameters.number("attention_factor")?,
            original_max_position_embeddings: original,
        }),
        other => {
            return Err(parameters.invalid(
                type_key,
                format!(
                    "`{other}` is not supported (known: {}){}",
                    ROPE_TYPES.join(", "),
                    did_you_mean(other, ROPE_TYPES)
                ),
            ));
        }
    };
    Ok(RopeConfig { theta, scaling, partial_rotary_factor })
}
