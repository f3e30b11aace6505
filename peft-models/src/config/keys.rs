//! Typed access to the keys of a `config.json`.

use std::path::{Path, PathBuf};

use candle_core::DType;
use peft_core::suggest::did_you_mean;
use serde_json::{Map, Value};

use super::{ACTIVATIONS, Activation, ConfigError, ENCODER_FAMILIES, FAMILIES, SEQ2SEQ_FAMILIES};

/// A `config.json` is a few kilobytes; anything larger than this is not one.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Reads a `config.json`, or the one in a model folder, as a JSON object; gives the file's path too.
pub(super) fn read_json(path: &Path) -> Result<(Map<String, Value>, PathBuf), ConfigError> {
    let path = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
    let io = |source| ConfigError::Io { path: path.clone(), source };
    let length = std::fs::metadata(&path).map_err(io)?.len();
    if length > MAX_CONFIG_BYTES {
        return Err(ConfigError::Json { path, reason: format!("{length} bytes are too many for a configuration") });
    }
    let bytes = std::fs::read(&path).map_err(io)?;
    let map = serde_json::from_slice(&bytes)
        .map_err(|error| ConfigError::Json { path: path.clone(), reason: error.to_string() })?;
    Ok((map, path))
}

/// Typed access to the keys of one JSON object; `null` counts as absent.
pub(super) struct Keys<'a> {
    pub(super) map: &'a Map<String, Value>,
    pub(super) path: &'a Path,
    pub(super) prefix: &'static str,
}

impl Keys<'_> {
    /// `model_type`, without which nothing else has a meaning.
    pub(super) fn model_type(&self) -> Result<&str, ConfigError> {
        self.text("model_type")?
            .ok_or_else(|| ConfigError::Missing { path: self.path.into(), key: "model_type".into() })
    }

    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub(super) fn invalid(&self, key: &str, reason: String) -> ConfigError {
        ConfigError::Invalid { path: PathBuf::from(self.path), key: self.name(key), reason }
    }

    pub(super) fn wrong(&self, key: &str, value: &Value, wanted: &str) -> ConfigError {
        let mut shown = value.to_string();
        if let Some((cut, _)) = shown.char_indices().nth(60) {
            shown.truncate(cut);
            shown.push('…');
        }
        self.invalid(key, format!("{shown} is not {wanted}"))
    }

    pub(super) fn count(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.value(key)
            .map(|value| {
                value
                    .as_u64()
                    .and_then(|number| usize::try_from(number).ok())
                    .ok_or_else(|| self.wrong(key, value, "a whole number ≥ 0"))
            })
            .transpose()
    }

    pub(super) fn required_count(&self, key: &str) -> Result<usize, ConfigError> {
        self.count(key)?.ok_or_else(|| ConfigError::Missing { path: PathBuf::from(self.path), key: self.name(key) })
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.value(key)
            .map(|value| {
                value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| self.wrong(key, value, "a number"))
            })
            .transpose()
    }

    pub(super) fn required_number(&self, key: &str) -> Result<f64, ConfigError> {
        self.number(key)?.ok_or_else(|| ConfigError::Missing { path: PathBuf::from(self.path), key: self.name(key) })
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Vec<f64>, ConfigError> {
        let missing = || ConfigError::Missing { path: PathBuf::from(self.path), key: self.name(key) };
        let value = self.value(key).ok_or_else(missing)?;
        value
            .as_array()
            .and_then(|items| items.iter().map(Value::as_f64).collect())
            .ok_or_else(|| self.wrong(key, value, "a list of numbers"))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.value(key).map(|value| value.as_bool().ok_or_else(|| self.wrong(key, value, "true or false"))).transpose()
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, ConfigError> {
        self.value(key).map(|value| value.as_str().ok_or_else(|| self.wrong(key, value, "a string"))).transpose()
    }

    /// One id or a list of ids. −1, which older files write for "none", is dropped.
    pub(super) fn token_ids(&self, key: &str) -> Result<Vec<u32>, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(Vec::new()) };
        let items = value.as_array().map_or_else(|| std::slice::from_ref(value), Vec::as_slice);
        let mut ids = Vec::with_capacity(items.len());
        for item in items {
            match item.as_i64() {
                Some(-1) => {}
                Some(id) => ids.push(u32::try_from(id).map_err(|_| self.wrong(key, item, "a token id"))?),
                None => return Err(self.wrong(key, item, "a token id")),
            }
        }
        Ok(ids)
    }
}

/// The family of `families` that `model_type` names, the first of these that `takes` the file.
pub(super) fn family<F>(
    keys: &Keys<'_>,
    families: &'static [F],
    model_type_of: impl Fn(&F) -> &'static str,
    takes: impl Fn(&F) -> bool,
) -> Result<&'static F, ConfigError> {
    let model_type = keys.model_type()?;
    families.iter().find(|family| model_type_of(family) == model_type && takes(family)).ok_or_else(|| {
        let decoders = FAMILIES.iter().map(|family| family.model_type);
        let encoders = ENCODER_FAMILIES.iter().map(|family| family.model_type);
        let both = SEQ2SEQ_FAMILIES.iter().map(|family| family.model_type);
        let mut known: Vec<&str> = decoders.chain(encoders).chain(both).collect();
        known.dedup();
        keys.invalid(
            "model_type",
            format!(
                "`{model_type}` is not supported (known: {}){}",
                known.join(", "),
                did_you_mean(model_type, &known)
            ),
        )
    })
}

/// Refuses weights in a foreign format, which the loader cannot read.
pub(super) fn refuse_quantized(keys: &Keys<'_>) -> Result<(), ConfigError> {
    let Some(quantization) = keys.value("quantization_config") else { return Ok(()) };
    let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
    Err(keys.invalid(
        "quantization_config",
        format!("weights stored by `{method}` cannot be read; use the unquantised model or a .gguf file"),
    ))
}

/// The activation that `key` names.
pub(super) fn activation(keys: &Keys<'_>, key: &str) -> Result<Option<Activation>, ConfigError> {
    keys.text(key)?.map(|name| named_activation(keys, key, name)).transpose()
}

/// The activation called `name`, which is the value of `key` or a part of it.
pub(super) fn named_activation(keys: &Keys<'_>, key: &str, name: &str) -> Result<Activation, ConfigError> {
    Activation::from_name(name).ok_or_else(|| {
        let known: Vec<&str> = ACTIVATIONS.iter().map(|(known, _)| *known).collect();
        keys.invalid(
            key,
            format!("`{name}` is not supported (known: {}){}", known.join(", "), did_you_mean(name, &known)),
        )
    })
}

/// The type that the weights are stored in: `dtype`, or `torch_dtype` of older files.
pub(super) fn dtype(keys: &Keys<'_>) -> Result<Option<DType>, ConfigError> {
    let key = if keys.value("dtype").is_some() { "dtype" } else { "torch_dtype" };
    let Some(name) = keys.text(key)? else { return Ok(None) };
    match name.strip_prefix("torch.").unwrap_or(name) {
        "float32" | "float" => Ok(Some(DType::F32)),
        "bfloat16" => Ok(Some(DType::BF16)),
        "float16" | "half" => Ok(Some(DType::F16)),
        "float64" | "double" => Ok(Some(DType::F64)),
        // What transformers calls "as stored".
        "auto" => Ok(None),
        _ => Err(keys.invalid(key, format!("`{name}` is not one of float32, bfloat16, float16"))),
    }
}

/// The name of a floating-point type in a `config.json`.
pub(super) fn dtype_name(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("float32"),
        DType::BF16 => Some("bfloat16"),
        DType::F16 => Some("float16"),
        DType::F64 => Some("float64"),
        _ => None,
    }
}
