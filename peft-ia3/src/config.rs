//! IA³'s config, with PEFT's keys, defaults and meanings (`peft/tuners/ia3/config.py`, 0.21).

use peft_core::config_keys::{completed, peft_defaults};
use peft_core::{BaseModel, ConfigKeys, Result, TargetModules, TargetSpec, task_keys};
use serde_json::{Map, Value, json};

use crate::targets::{FEEDFORWARD, Feedforward, PAPER, paper};

/// `peft_type` of IA³.
pub(crate) const PEFT_TYPE: &str = "IA3";

/// The settings of an IA³ adapter.
#[derive(Debug, Clone)]
pub struct Ia3Config {
    /// Which modules.
    pub(crate) targets: TargetSpec,
    /// Which of them are scaled at their input; `None` is the default of the model family.
    feedforward: Option<Feedforward>,
    /// Whether to take the paper's places.
    paper: bool,
    /// Start from ones; otherwise from a standard normal, as PEFT does.
    pub(crate) init_ia3_weights: bool,
    /// The config as read, from which it is written back with PEFT's defaults filled in.
    raw: Map<String, Value>,
}

fn defaults() -> Map<String, Value> {
    let own = json!({
        "exclude_modules": null, FEEDFORWARD: null, "fan_in_fan_out": false, "init_ia3_weights": true,
        "modules_to_save": null, "target_modules": null
    });
    peft_defaults(PEFT_TYPE, own)
}

impl Ia3Config {
    /// Reads the config of an existing adapter. Keys that PEFT may add later are ignored, as PEFT does.
    ///
    /// # Errors
    /// A value of the wrong type; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(config);
        // How a weight is stored is a matter of the base, not of the adapter; PEFT corrects it too.
        keys.flag("fan_in_fan_out", false)?;
        Ok(Self {
            // IA³ has no layer filter: PEFT drops such keys.
            targets: TargetSpec::from_config(&keys.only(&defaults()))?,
            feedforward: keys.get(FEEDFORWARD).map(Feedforward::parse).transpose()?,
            paper: false,
            init_ia3_weights: keys.flag("init_ia3_weights", true)?,
            raw: config.clone(),
        })
    }

    /// Reads the `[method]` table of a recipe: PEFT's keys, where an unknown one is an error with the nearest known, and
    /// `target_modules = "paper"`.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        ConfigKeys(config).refuse_unknown("ia3", &defaults())?;
        let mut parsed = Self::from_adapter_config(config)?;
        parsed.paper = config.get("target_modules").and_then(Value::as_str) == Some(PAPER);
        Ok(parsed)
    }

    /// This config as PEFT completes it for the task of `base` ([`task_keys`]).
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.extend(task_keys(&self.targets, base)?);
        Ok(Self { paper: self.paper, ..Self::from_adapter_config(&raw)? })
    }

    /// Whether the config itself says which targets are scaled at their input.
    pub(crate) fn names_feedforward(&self) -> bool {
        self.feedforward.is_some()
    }

    /// Targets and feed-forward modules on a model family, the family's defaults filled in. With `strict` the latter have
    /// to be among the former, as PEFT's config demands; files where they are not can be had from PEFT all the same, which
    /// writes its default beside any targets and then does not load it.
    pub(crate) fn resolve(&self, model_type: &str, strict: bool) -> Result<(TargetSpec, Feedforward)> {
        let mut spec = self.targets.clone();
        let mut feedforward = self.feedforward.clone();
        if self.paper {
            let (targets, inner) = paper(model_type)?;
            spec.target_modules = Some(targets);
            feedforward = feedforward.or(Some(inner));
        }
        spec.fill_default_targets(PEFT_TYPE, model_type)?;
        match feedforward {
            None => Ok((spec, Feedforward::default_for(model_type)?)),
            Some(given) => {
                if let Some(targets) = spec.target_modules.as_ref().filter(|_| strict) {
                    given.check_among(targets)?;
                }
                Ok((spec, given))
            }
        }
    }

    /// The config as PEFT writes it, with these targets and feed-forward modules.
    pub(crate) fn to_adapter_config(&self, targets: &TargetModules, feedforward: &Feedforward) -> Map<String, Value> {
        let mut out = completed(defaults(), &self.raw);
        out.insert("target_modules".into(), targets.to_json());
        out.insert(FEEDFORWARD.into(), feedforward.to_json());
        out
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(config: Value) -> Result<Ia3Config> {
        Ia3Config::from_recipe(config.as_object().unwrap())
    }

    #[test]
    fn families_have_defaults_and_the_paper_has_its_own() {
        let resolve = |config: Value, model_type: &str| {
            let (spec, feedforward) = read(config).unwrap().resolve(model_type, true).unwrap();
            (spec.target_modules.unwrap().to_json(), feedforward.to_json())
        };
        let down = json!(["down_proj"]);
        assert_eq!(resolve(json!({}), "llama"), (json!(["k_proj", "v_proj", "down_proj"]), down.clone()));
        assert_eq!(resolve(json!({}), "qwen2"), (json!(["q_proj", "v_proj", "down_proj"]), down.clone()));
        let paper = json!({"target_modules": "paper"});
        assert_eq!(resolve(paper, "qwen2"), (json!(["k_proj", "v_proj", "down_proj"]), down));
    }

    #[test]
    fn wrong_values_name_the_key() {
        for (config, expect) in [
            (json!({"feedforward_module": ["down_proj"]}), "feedforward_modules"),
            (json!({"feedforward_modules": 3}), "feedforward_modules"),
            (json!({"init_ia3_weights": "ones"}), "init_ia3_weights"),
            (json!({"layers_to_transform": [1]}), "layers_to_transform"),
            (json!({"target_modules": 1}), "target_modules"),
        ] {
            let e = read(config.clone()).unwrap_err().to_string();
            assert!(e.contains(expect), "{config}: {e}");
        }
        let outside = read(json!({"target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]})).unwrap();
        assert!(outside.resolve("llama", true).unwrap_err().to_string().contains("not among"));
        assert!(outside.resolve("llama", false).is_ok());
        let unknown =
            read(json!({"target_modules": ["k_proj"]})).unwrap().resolve("lama", true).unwrap_err().to_string();
        assert!(unknown.contains("feedforward_modules") && unknown.contains("`llama`"), "{unknown}");
    }
}
