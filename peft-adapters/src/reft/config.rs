//! The config of ReFT, with AdapterHub's keys and presets (`ReftConfig` in `adapters/configuration/adapter_config.py`, 1.3).

use peft_core::config_keys::{completed, peft_defaults};
use peft_core::kernels::Activation;
use peft_core::suggest::did_you_mean;
use peft_core::{BaseModel, ConfigKeys, Error, Result, TargetSpec, task_keys};
use serde_json::{Map, Value, json};

use crate::config::{activation, blocks, probability, saved};

/// `peft_type` of ReFT; PEFT has no such method, so the name is ours.
pub(crate) const PEFT_TYPE: &str = "REFT";
/// The key of a recipe that names a preset.
const PRESET: &str = "preset";
const PRESETS: [&str; 3] = ["loreft", "noreft", "direft"];
/// More positions or a higher rank are a mistake.
const MAX_COUNT: usize = 1 << 16;

/// The keys of AdapterHub's `ReftConfig`. `subtract_projection` is none that its files have: a DiReFT that the package saved is a
/// NoReFT to the package itself.
pub(crate) const ADAPTERHUB_KEYS: [&str; 11] = [
    "dropout",
    "dtype",
    "init_weights_seed",
    "layers",
    "non_linearity",
    "orthogonality",
    "output_reft",
    "prefix_positions",
    "r",
    "suffix_positions",
    "tied_weights",
];

/// The settings of ReFT's interventions.
#[derive(Debug, Clone)]
pub struct ReftConfig {
    /// The blocks with interventions; `None` for all.
    pub(crate) layers: Option<Vec<usize>>,
    /// How many of the first and of the last tokens.
    pub(crate) positions: [usize; 2],
    pub(crate) r: usize,
    pub(crate) orthogonal: bool,
    pub(crate) tied: bool,
    pub(crate) subtract: bool,
    pub(crate) dropout: f32,
    pub(crate) activation: Option<Activation>,
    /// Modules that are trained whole, such as a class head.
    pub(crate) saved: TargetSpec,
    raw: Map<String, Value>,
}

fn defaults(preset: &str) -> Map<String, Value> {
    peft_defaults(
        PEFT_TYPE,
        json!({
            "layers": "all", "prefix_positions": 3, "suffix_positions": 0, "r": 1, "orthogonality": preset == "loreft",
            "tied_weights": false, "subtract_projection": preset != "direft", "dropout": 0.05, "non_linearity": null,
            "dtype": null, "init_weights_seed": null, "output_reft": true, "modules_to_save": null
        }),
    )
}

impl ReftConfig {
    /// Reads the config of an existing adapter, which names every setting. Keys that are not known are ignored.
    ///
    /// # Errors
    /// A value of the wrong type, or one that stands for something that is not here; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        Self::read(completed(defaults("loreft"), config))
    }

    /// Reads the `[method]` table of a recipe: AdapterHub's keys over those of a `preset` (`loreft` where none is named).
    ///
    /// # Errors
    /// An unknown key or preset, or a value of the wrong type; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        let mut own = config.clone();
        let preset = match own.remove(PRESET) {
            None => "loreft".to_owned(),
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
        ConfigKeys(&own).refuse_unknown("reft", &known)?;
        Self::read(settings)
    }

    fn read(raw: Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(&raw);
        for (key, advice) in
            [("dtype", "interventions are f32"), ("init_weights_seed", "the run's seed is `train.seed`")]
        {
            if let Some(value) = keys.get(key) {
                return Err(Error::config(key, format!("{value} is not supported: {advice}; leave it out")));
            }
        }
        if !keys.flag("output_reft", true)? {
            return Err(Error::config("output_reft", "is false: nothing would be trained"));
        }
        let number = |key: &str, default: u64| match keys.get(key).map_or(Some(default), Value::as_u64) {
            Some(n) if n <= MAX_COUNT as u64 => Ok(n as usize),
            _ => Err(Error::config(key, format!("is not a whole number from 0 to {MAX_COUNT}"))),
        };
        let positions = [number("prefix_positions", 3)?, number("suffix_positions", 0)?];
        if positions == [0, 0] {
            return Err(Error::config("prefix_positions", "and suffix_positions are 0: nothing would be trained"));
        }
        Ok(Self {
            layers: layers(keys)?,
            positions,
            r: keys.count("r", MAX_COUNT)?.unwrap_or(1),
            orthogonal: keys.flag("orthogonality", true)?,
            tied: keys.flag("tied_weights", false)?,
            subtract: keys.flag("subtract_projection", true)?,
            dropout: probability(keys, "dropout")?,
            activation: keys.text("non_linearity")?.map(|_| activation(keys, "")).transpose()?,
            saved: saved(keys)?,
            raw,
        })
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

    /// Which intervention the first (0) and the last (1) tokens have, of those that there are.
    pub(crate) fn units(&self) -> Vec<usize> {
        match (self.tied, self.positions) {
            (true, _) | (_, [_, 0]) => vec![0],
            (_, [0, _]) => vec![1],
            _ => vec![0, 1],
        }
    }

    /// The config as it is written: every setting by its name.
    pub(crate) fn to_adapter_config(&self) -> Map<String, Value> {
        self.raw.clone()
    }
}

fn layers(keys: ConfigKeys<'_>) -> Result<Option<Vec<usize>>> {
    let wrong =
        |v: &Value| Error::config("layers", format!("{v} is neither \"all\" nor a list of blocks, counted from 0"));
    match keys.get("layers") {
        None => Ok(None),
        Some(Value::String(all)) if all == "all" => Ok(None),
        Some(list) => blocks(list).filter(|blocks| !blocks.is_empty()).map(Some).ok_or_else(|| wrong(list)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn recipe(keys: Value) -> Result<ReftConfig> {
        ReftConfig::from_recipe(keys.as_object().unwrap())
    }

    #[test]
    fn presets_are_those_of_adapterhub() {
        for (preset, orthogonal, subtract) in
            [("loreft", true, true), ("noreft", false, true), ("direft", false, false)]
        {
            let config = recipe(json!({"preset": preset, "task_type": "CAUSAL_LM"})).unwrap();
            assert_eq!(
                (config.orthogonal, config.subtract, config.r, config.positions),
                (orthogonal, subtract, 1, [3, 0])
            );
            let again = ReftConfig::from_adapter_config(&config.to_adapter_config()).unwrap();
            assert_eq!(again.to_adapter_config(), config.to_adapter_config());
            assert_eq!((again.orthogonal, again.subtract), (orthogonal, subtract));
        }
        let units = |keys: Value| recipe(keys).unwrap().units();
        assert_eq!(units(json!({})), [0]);
        assert_eq!(units(json!({"prefix_positions": 0, "suffix_positions": 2})), [1]);
        assert_eq!(units(json!({"suffix_positions": 2})), [0, 1]);
        assert_eq!(units(json!({"suffix_positions": 2, "tied_weights": true})), [0]);
    }

    #[test]
    fn wrong_values_name_the_key() {
        for (keys, expect) in [
            (json!({"preset": "lorft"}), "did you mean `loreft`"),
            (json!({"prefix_position": 3}), "prefix_positions"),
            (json!({"prefix_positions": 0}), "nothing would be trained"),
            (json!({"suffix_positions": -1}), "suffix_positions"),
            (json!({"layers": "some"}), "layers"),
            (json!({"layers": []}), "layers"),
            (json!({"r": 0}), "`r`"),
            (json!({"dropout": 1}), "dropout"),
            (json!({"dtype": "bfloat16"}), "dtype"),
            (json!({"output_reft": false}), "output_reft"),
            (json!({"non_linearity": "rleu"}), "non_linearity"),
        ] {
            let e = recipe(keys.clone()).unwrap_err().to_string();
            assert!(e.contains(expect), "{keys}: {e}");
        }
    }
}
