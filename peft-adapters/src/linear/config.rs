//! The config of series and parallel adapters, with LLM-Adapters' keys and defaults (`BottleneckConfig` in its fork of PEFT).

use peft_core::config_keys::{completed, peft_defaults};
use peft_core::kernels::Activation;
use peft_core::{AdapterConfig, AdapterFolder, BaseModel, ConfigKeys, Error, Result, TargetSpec, task_keys};
use serde_json::{Map, Value, json};

use crate::config::{PEFT_TYPE as BOTTLENECK, ScalingKind, Start, activation, probability, scaling, start};

/// `peft_type` of these adapters in our files. LLM-Adapters says `BOTTLENECK`, which is AdapterHub's kind here.
pub(crate) const PEFT_TYPE: &str = "LLM_ADAPTER";
/// The key that tells a config of LLM-Adapters' from one of ours of the same `peft_type`.
const SIZE: &str = "bottleneck_size";
/// Whether projections have biases, as some versions' have; not a key of theirs.
const PROJECTION_BIAS: &str = "adapter_bias";
/// A wider bottleneck is a mistake, and would be allocated.
const MAX_SIZE: usize = 1 << 16;

/// The settings of series or parallel adapters.
#[derive(Debug, Clone)]
pub struct LinearAdapterConfig {
    pub(crate) targets: TargetSpec,
    pub(crate) size: usize,
    pub(crate) activation: Activation,
    pub(crate) dropout: f32,
    pub(crate) parallel: bool,
    pub(crate) scaling: ScalingKind,
    pub(crate) start: Start,
    pub(crate) projection_bias: bool,
    raw: Map<String, Value>,
}

fn defaults() -> Map<String, Value> {
    let own = json!({
        SIZE: 256, "non_linearity": "tanh", "adapter_dropout": 0.0, "use_parallel_adapter": false, "scaling": 1.0,
        "bias": "none", "init_weights": "bert", "target_modules": null, "modules_to_save": null, "exclude_modules": null,
        PROJECTION_BIAS: false
    });
    peft_defaults(PEFT_TYPE, own)
}

/// `files` under our `peft_type`, where LLM-Adapters wrote them: its `BOTTLENECK` has a `bottleneck_size`.
///
/// # Errors
/// None in practice; a config without a `peft_type`.
pub fn foreign(files: AdapterFolder) -> Result<AdapterFolder> {
    if files.config().peft_type() != BOTTLENECK || files.config().get(SIZE).is_none() {
        return Ok(files);
    }
    let mut keys = files.config().map().clone();
    keys.insert("peft_type".into(), PEFT_TYPE.into());
    let biased = files.keys().any(|key| key.ends_with(".adapter_down.bias"));
    keys.insert(PROJECTION_BIAS.into(), biased.into());
    Ok(files.with_config(AdapterConfig::new(keys)?))
}

impl LinearAdapterConfig {
    /// Reads the config of an existing adapter. Keys that are not known are ignored.
    ///
    /// # Errors
    /// A value of the wrong type, or one that stands for something that is not here; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(config);
        if keys.text("bias")?.is_some_and(|bias| bias != "none") {
            return Err(Error::config("bias", "only \"none\" is supported; `bitfit` trains the model's biases"));
        }
        let scaling = scaling(keys)?;
        if scaling == ScalingKind::Channel {
            return Err(Error::config("scaling", "is a number or \"learned\" for these adapters"));
        }
        let start = start(keys)?;
        if start == Start::Houlsby {
            return Err(Error::config("init_weights", "is \"bert\" or \"mam_adapter\" for these adapters"));
        }
        Ok(Self {
            targets: TargetSpec::from_config(&keys.only(&defaults()))?,
            size: keys.count(SIZE, MAX_SIZE)?.unwrap_or(256),
            activation: activation(keys, "tanh")?,
            dropout: probability(keys, "adapter_dropout")?,
            parallel: keys.flag("use_parallel_adapter", false)?,
            scaling,
            start,
            projection_bias: keys.flag(PROJECTION_BIAS, false)?,
            raw: config.clone(),
        })
    }

    /// Reads the `[method]` table of a recipe, where an unknown key is an error with the nearest known.
    ///
    /// # Errors
    /// As [`LinearAdapterConfig::from_adapter_config`], or an unknown key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        ConfigKeys(config).refuse_unknown("llm_adapter", &defaults())?;
        Self::from_adapter_config(config)
    }

    /// This config for the task of `base`: a class head is trained and stored whole ([`task_keys`]).
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.extend(task_keys(&self.targets, base)?);
        Self::from_adapter_config(&raw)
    }

    /// The config as it is written.
    pub(crate) fn to_adapter_config(&self, targets: Option<Value>) -> Map<String, Value> {
        let mut out = completed(defaults(), &self.raw);
        out.extend(targets.map(|names| ("target_modules".to_owned(), names)));
        out
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn keys_are_llm_adapters_and_wrong_values_name_them() {
        let read = |keys: Value| LinearAdapterConfig::from_recipe(keys.as_object().unwrap());
        let plain = read(json!({})).unwrap();
        assert_eq!((plain.size, plain.activation, plain.parallel), (256, Activation::Tanh, false));
        assert_eq!(plain.to_adapter_config(None)["peft_type"], PEFT_TYPE);
        for (keys, expect) in [
            (json!({"bottleneck_size": 0}), "bottleneck_size"),
            (json!({"bottleneck_siz": 8}), "did you mean `bottleneck_size`"),
            (json!({"bias": "all"}), "bias"),
            (json!({"scaling": "channel"}), "scaling"),
            (json!({"init_weights": "houlsby"}), "init_weights"),
            (json!({"non_linearity": "thanh"}), "non_linearity"),
            (json!({"adapter_dropout": 1.5}), "adapter_dropout"),
            (json!({"use_parallel_adapter": "yes"}), "use_parallel_adapter"),
        ] {
            let e = read(keys.clone()).unwrap_err().to_string();
            assert!(e.contains(expect), "{keys}: {e}");
        }
    }
}
