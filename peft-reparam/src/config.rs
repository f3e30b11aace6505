//! The config of a method of this family: PEFT's keys for it, read strictly.

use peft_core::config_keys::{completed, peft_defaults};
use peft_core::select_spec::TargetSpec;
use peft_core::{BaseModel, ConfigKeys, Error, Parameter, Result, task_keys};
use serde_json::{Map, Value, json};

use crate::methods::{KINDS, Kind, Method};

/// The settings of an adapter of one of this family's methods.
#[derive(Debug)]
pub struct ReparamConfig {
    pub(crate) kind: &'static Kind,
    pub(crate) method: Box<dyn Method>,
    pub(crate) targets: TargetSpec,
    /// The config as read, from which it is written back with PEFT's defaults filled in.
    raw: Map<String, Value>,
}

impl ReparamConfig {
    /// Reads the config of an existing adapter of the method called `name`. Keys that PEFT may add later are ignored, as
    /// PEFT does; keys that change the maths in ways that are not built here are refused.
    ///
    /// # Errors
    /// A value of the wrong type or out of range; the message names the key.
    pub fn from_adapter_config(name: &str, config: &Map<String, Value>) -> Result<Self> {
        let kind = KINDS.iter().find(|k| k.name == name);
        let kind = kind.ok_or_else(|| Error::config("type", format!("`{name}` is not a method of this family")))?;
        let known = kind.defaults();
        for key in kind.only_default {
            let given = config.get(*key).filter(|v| !v.is_null() && known.get(*key) != Some(v));
            // 0 and 0.0 are one number.
            if let Some(value) = given.filter(|v| v.as_f64().is_none() || v.as_f64() != known[*key].as_f64()) {
                let message = format!("{value} is not supported for {name}; leave it at {}", known[*key]);
                return Err(Error::config(*key, message));
            }
        }
        // What PEFT knows under the names of a method's own stands where all selections look for it.
        let mut selection = ConfigKeys(config).only(&known);
        for (own, common) in kind.patterns {
            let value = selection.remove(*own);
            if let Some(common) = common {
                selection.extend(value.map(|v| ((*common).to_owned(), v)));
            }
        }
        let targets = TargetSpec::from_config(&selection)?;
        let method = (kind.read)(ConfigKeys(config))?;
        Ok(Self { kind, method, targets, raw: config.clone() })
    }

    /// Reads the `[method]` table of a recipe: PEFT's keys, where an unknown one is an error with the nearest known.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type or out of range; the message names the key.
    pub fn from_recipe(name: &str, config: &Map<String, Value>) -> Result<Self> {
        if let Some(kind) = KINDS.iter().find(|k| k.name == name) {
            ConfigKeys(config).refuse_unknown(name, &kind.defaults())?;
        }
        Self::from_adapter_config(name, config)
    }

    /// This config as PEFT completes it for the task of `base` ([`task_keys`]).
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.extend(task_keys(&self.targets, base)?);
        Self::from_adapter_config(self.kind.name, &raw)
    }

    /// Refuses a training run of so many steps over `parameters` where training does not do here what this config asks for. Opening, merging and
    /// serving are not concerned.
    ///
    /// # Errors
    /// What is asked for, by its key, with the way out.
    pub fn check_training(&self, steps: u64, parameters: &[&Parameter]) -> Result<()> {
        self.method.check_training(steps, parameters)
    }

    /// The config as PEFT writes it.
    pub(crate) fn to_adapter_config(&self, base: &dyn BaseModel, targets: Option<Value>) -> Map<String, Value> {
        let mut out = completed(self.kind.defaults(), &self.raw);
        out.extend(targets.map(|targets| ("target_modules".to_owned(), targets)));
        if self.targets.task_type.is_none() {
            out.insert("task_type".into(), base.task().peft_name().into());
        }
        out
    }
}

impl Kind {
    /// All keys of the config, with PEFT's defaults.
    pub(crate) fn defaults(&self) -> Map<String, Value> {
        let own = (self.keys)();
        let mut all = peft_defaults(self.peft_type, json!({"modules_to_save": null, "target_modules": null}));
        all.extend(own.as_object().cloned().unwrap_or_default());
        all
    }
}
