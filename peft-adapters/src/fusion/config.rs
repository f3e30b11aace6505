//! The config of AdapterFusion, with AdapterHub's keys and presets (`AdapterFusionConfig` in
//! `adapters/configuration/adapter_fusion_config.py`, 1.3) and the adapters that are fused.

use std::collections::BTreeSet;

use peft_core::config_keys::{completed, peft_defaults};
use peft_core::suggest::did_you_mean;
use peft_core::{BaseModel, ConfigKeys, Error, Result, TargetSpec, task_keys};
use serde_json::{Map, Value, json};

use crate::bottleneck::Placement;
use crate::config::{BottleneckConfig, PEFT_TYPE as BOTTLENECK, probability, saved};

/// `peft_type` of AdapterFusion; PEFT has no such method, so the name is ours.
pub(crate) const PEFT_TYPE: &str = "ADAPTER_FUSION";
/// The key of a recipe that names a preset.
const PRESET: &str = "preset";
const PRESETS: [&str; 2] = ["dynamic", "static"];
/// The adapters: folders in a recipe, names and configs in a file.
const ADAPTERS: &str = "adapters";

/// The settings of a fusion.
#[derive(Debug, Clone)]
pub struct FusionConfig {
    /// The folders of the adapters, in a recipe.
    folders: Vec<String>,
    /// The adapters' names and configs, in a file.
    pub(super) members: Vec<(String, BottleneckConfig)>,
    pub(super) query: bool,
    pub(super) key: bool,
    pub(super) value: bool,
    pub(super) query_before_norm: bool,
    pub(super) residual_before: bool,
    pub(super) value_before_softmax: bool,
    pub(super) value_initialized: bool,
    pub(super) regularization: bool,
    pub(super) dropout: f32,
    /// Modules that are trained whole, such as a class head.
    pub(super) saved: TargetSpec,
    raw: Map<String, Value>,
}

fn defaults(preset: &str) -> Map<String, Value> {
    let dynamic = preset == "dynamic";
    let own = json!({
        ADAPTERS: null, "key": true, "query": true, "value": dynamic, "query_before_ln": false, "regularization": dynamic,
        "residual_before": false, "temperature": false, "value_before_softmax": true, "value_initialized": dynamic,
        "dropout_prob": 0.0, "modules_to_save": null
    });
    peft_defaults(PEFT_TYPE, own)
}

impl FusionConfig {
    /// Reads the config of an existing fusion, which names every setting and has the adapters' configs.
    ///
    /// # Errors
    /// A value of the wrong type, or one that stands for something that is not here; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        Self::read(completed(defaults("dynamic"), config))
    }

    /// Reads the `[method]` table of a recipe: AdapterHub's keys over those of a `preset` (`dynamic` where none is named), and
    /// the folders of the `adapters`.
    ///
    /// # Errors
    /// An unknown key or preset, fewer than two adapters, or a value of the wrong type; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        let mut own = config.clone();
        let preset = match own.remove(PRESET) {
            None => "dynamic".to_owned(),
            Some(Value::String(name)) if PRESETS.contains(&name.as_str()) => name,
            Some(other) => {
                let near = other.as_str().map(|name| did_you_mean(name, PRESETS)).unwrap_or_default();
                return Err(Error::config(PRESET, format!("{other} is not one of {}{near}", PRESETS.join(", "))));
            }
        };
        let mut known = defaults(&preset);
        let mut settings = completed(known.clone(), &own);
        settings.insert("task_type".into(), own.get("task_type").cloned().unwrap_or(Value::Null));
        known.insert(PRESET.into(), Value::Null);
        ConfigKeys(&own).refuse_unknown("fusion", &known)?;
        let config = Self::read(settings)?;
        if config.folders.len() < 2 {
            let message = "names the folders of two or more bottleneck adapters: adapters = [\"a\", \"b\"]";
            return Err(Error::config(ADAPTERS, message));
        }
        Ok(config)
    }

    fn read(raw: Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(&raw);
        if keys.flag("temperature", false)? {
            let message = "true is not supported: the package lowers it with every pass and does not store it";
            return Err(Error::config("temperature", message));
        }
        let [query, key, value] = [keys.flag("query", true)?, keys.flag("key", true)?, keys.flag("value", true)?];
        if !(query || key || value) {
            return Err(Error::config("query", "this, `key` and `value` are false: nothing would be trained"));
        }
        let (folders, members) = adapters(keys)?;
        Ok(Self {
            folders,
            members,
            query,
            key,
            value,
            query_before_norm: keys.flag("query_before_ln", false)?,
            residual_before: keys.flag("residual_before", false)?,
            value_before_softmax: keys.flag("value_before_softmax", true)?,
            value_initialized: keys.flag("value_initialized", value)?,
            regularization: keys.flag("regularization", value)?,
            dropout: probability(keys, "dropout_prob")?,
            saved: saved(keys)?,
            raw,
        })
    }

    /// The folders of the adapters that a recipe names.
    #[must_use]
    pub fn folders(&self) -> &[String] {
        &self.folders
    }

    /// This config for the task of `base`: a class head is trained and stored whole ([`task_keys`]).
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.extend(task_keys(&self.saved, base)?);
        Self::from_adapter_config(&raw)
    }

    /// This config with these adapters in place of folders.
    ///
    /// # Errors
    /// Adapters that cannot be fused.
    pub(super) fn with_members(&self, members: &[(String, Map<String, Value>)]) -> Result<Self> {
        let mut raw = self.raw.clone();
        let list: Vec<Value> = members.iter().map(|(name, config)| json!({"name": name, "config": config})).collect();
        raw.insert(ADAPTERS.into(), list.into());
        Self::from_adapter_config(&raw)
    }

    /// The config as it is written.
    pub(super) fn to_adapter_config(&self) -> Map<String, Value> {
        self.raw.clone()
    }
}

/// Folders, or names and configs.
type Adapters = (Vec<String>, Vec<(String, BottleneckConfig)>);

fn adapters(keys: ConfigKeys<'_>) -> Result<Adapters> {
    let wrong = |what: &str| Error::config(ADAPTERS, format!("{what}; it is a list of folders"));
    let list = match keys.get(ADAPTERS) {
        None => return Ok(Adapters::default()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(&format!("{other} is no list"))),
    };
    let (mut folders, mut members, mut names) = (Vec::new(), Vec::new(), BTreeSet::new());
    for one in list {
        match (one, one.get("name").and_then(Value::as_str), one.get("config").and_then(Value::as_object)) {
            (Value::String(folder), ..) => folders.push(folder.clone()),
            (_, Some(name), Some(config)) => {
                if !names.insert(name.to_owned()) || name.is_empty() || name.contains('.') {
                    return Err(wrong(&format!("`{name}` is there twice, or is no name")));
                }
                members.push((name.to_owned(), member(name, config)?));
            }
            _ => return Err(wrong(&format!("{one} is no folder"))),
        }
    }
    if !folders.is_empty() && !members.is_empty() {
        return Err(wrong("mixes folders and configs"));
    }
    Ok((folders, members))
}

fn member(name: &str, config: &Map<String, Value>) -> Result<BottleneckConfig> {
    let of = |message: String| Error::config(ADAPTERS, format!("{name}: {message}"));
    match config.get("peft_type").and_then(Value::as_str) {
        Some(BOTTLENECK) => {}
        other => {
            let other = other.unwrap_or("of no type");
            return Err(of(format!("is {other}, and only bottleneck adapters can be fused")));
        }
    }
    let config = BottleneckConfig::from_adapter_config(config).map_err(|e| of(e.to_string()))?;
    if config.placement == Placement::Parallel {
        return Err(of("is a parallel adapter; those in sequence with a sublayer can be fused".into()));
    }
    if config.phm.is_some() {
        return Err(of("is a Compacter, whose adapters share parameters; dense ones can be fused".into()));
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn wrong_values_name_the_key() {
        let recipe = |keys: Value| FusionConfig::from_recipe(keys.as_object().unwrap());
        let two = recipe(json!({"adapters": ["a", "b"]})).unwrap();
        assert_eq!((two.folders().len(), two.value, two.regularization), (2, true, true));
        let still = recipe(json!({"adapters": ["a", "b"], "preset": "static"})).unwrap();
        assert_eq!((still.value, still.regularization), (false, false));
        let two = |more: Value| {
            let mut keys = json!({"adapters": ["a", "b"]});
            keys.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            keys
        };
        for (keys, expect) in [
            (json!({}), "adapters"),
            (json!({"adapters": ["a"]}), "two or more"),
            (json!({"adapters": "a"}), "adapters"),
            (json!({"adapters": ["a", 3]}), "adapters"),
            (two(json!({"preset": "dynamc"})), "did you mean `dynamic`"),
            (two(json!({"temperature": true})), "temperature"),
            (two(json!({"dropout_prob": 1.0})), "dropout_prob"),
            (two(json!({"query": false, "key": false, "value": false})), "nothing would be trained"),
            (two(json!({"querry": false})), "did you mean `query`"),
        ] {
            let e = recipe(keys.clone()).unwrap_err().to_string();
            assert!(e.contains(expect), "{keys}: {e}");
        }
        for (config, expect) in [
            (json!({"peft_type": "LORA"}), "only bottleneck adapters"),
            (json!({"peft_type": "BOTTLENECK", "is_parallel": true}), "parallel"),
            (json!({"peft_type": "BOTTLENECK", "phm_layer": true}), "Compacter"),
            (json!({"peft_type": "BOTTLENECK", "dropout": 7}), "dropout"),
        ] {
            let keys = json!({"adapters": [{"name": "one", "config": config}]});
            let e = FusionConfig::from_adapter_config(keys.as_object().unwrap()).unwrap_err().to_string();
            assert!(e.contains(expect) && e.contains("one"), "{e}");
        }
    }
}
