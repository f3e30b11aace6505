//! The part of an adapter's config that says which modules it touches.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::select_defaults::{default_model_types, default_target_modules};
use crate::suggest::did_you_mean;

/// `target_modules` or `exclude_modules`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Full names, or ends of names after a dot.
    Names(Vec<String>),
    /// A Python regular expression that matches the whole name.
    Regex(String),
    /// Every linear layer but the output head (PEFT's `"all-linear"`; not for `exclude_modules`).
    AllLinear,
}

impl TargetModules {
    /// The JSON that PEFT writes for it.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Names(names) => Value::from(names.clone()),
            Self::Regex(pattern) => Value::from(pattern.clone()),
            Self::AllLinear => Value::from("all-linear"),
        }
    }
}

/// What [`crate::select::select`] needs to know; the fields have the names and meanings of PEFT's config keys.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TargetSpec {
    /// Modules to adapt; `None` is PEFT's `null`: the default of the model family.
    pub target_modules: Option<TargetModules>,
    /// Weights to adapt, by the end of their names as parameters: `mlp.experts.gate_up_proj`.
    pub target_parameters: Vec<String>,
    /// Modules to leave alone.
    pub exclude_modules: Option<TargetModules>,
    /// Only these layers (for targets given by the end of their name). `Some([])` filters nothing.
    pub layers_to_transform: Option<Vec<i64>>,
    /// Names (regular expressions) of the list that holds the layers; empty: any.
    pub layers_pattern: Vec<String>,
    /// Rank by module; the first entry that matches wins.
    pub rank_pattern: Vec<(String, usize)>,
    /// `lora_alpha` by module; the first entry that matches wins.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Modules that are trained and saved whole, by the end of their name.
    pub modules_to_save: Vec<String>,
    /// `task_type` (`CAUSAL_LM`, `SEQ_CLS`, …).
    pub task_type: Option<String>,
}

impl TargetSpec {
    /// Reads the keys it knows from an adapter config; keys that are absent or null keep their defaults.
    ///
    /// # Errors
    /// A key with a value of the wrong type, named.
    pub fn from_config(config: &Map<String, Value>) -> Result<Self> {
        let get = |key: &str| config.get(key).filter(|value| !value.is_null());
        let modules = |key: &'static str| -> Result<Option<TargetModules>> {
            Ok(match get(key) {
                None => None,
                Some(Value::String(text)) if key == "target_modules" && text.to_lowercase() == "all-linear" => {
                    Some(TargetModules::AllLinear)
                }
                Some(Value::String(text)) => Some(TargetModules::Regex(text.clone())),
                Some(other) => Some(TargetModules::Names(strings(key, other)?)),
            })
        };
        // PEFT takes an empty list or string of exclusions for none.
        let exclude_modules = modules("exclude_modules")?.filter(|exclude| match exclude {
            TargetModules::Names(names) => !names.is_empty(),
            TargetModules::Regex(pattern) => !pattern.is_empty(),
            TargetModules::AllLinear => true,
        });
        let integer = |value: &Value| {
            value.as_i64().ok_or_else(|| Error::config("layers_to_transform", format!("{value} is not a layer number")))
        };
        Ok(Self {
            target_modules: modules("target_modules")?,
            target_parameters: get("target_parameters")
                .map_or(Ok(Vec::new()), |value| strings("target_parameters", value))?,
            exclude_modules,
            layers_to_transform: match get("layers_to_transform") {
                None => None,
                Some(Value::Array(list)) => Some(list.iter().map(integer).collect::<Result<_>>()?),
                Some(one) => Some(vec![integer(one)?]),
            },
            layers_pattern: match get("layers_pattern") {
                None => Vec::new(),
                Some(Value::String(text)) if text.is_empty() => Vec::new(),
                Some(Value::String(text)) => vec![text.clone()],
                Some(other) => strings("layers_pattern", other)?,
            },
            rank_pattern: patterns("rank_pattern", get("rank_pattern"), |value| {
                value.as_u64().filter(|rank| *rank > 0).and_then(|rank| usize::try_from(rank).ok())
            })?,
            alpha_pattern: patterns("alpha_pattern", get("alpha_pattern"), |value| {
                value.as_f64().filter(|a| a.is_finite())
            })?,
            modules_to_save: get("modules_to_save")
                .map_or(Ok(Vec::new()), |value| strings("modules_to_save", value))?,
            task_type: match get("task_type") {
                None => None,
                Some(Value::String(text)) => Some(text.clone()),
                Some(other) => {
                    return Err(Error::config("task_type", format!("{other} is not a text")));
                }
            },
        })
    }

    /// Replaces `target_modules: null` by PEFT's default for `peft_type` (`LORA`, …) on `model_type` (of
    /// config.json); returns whether it did.
    ///
    /// # Errors
    /// PEFT has no default for this model family.
    pub fn fill_default_targets(&mut self, peft_type: &str, model_type: &str) -> Result<bool> {
        if self.target_modules.is_some() {
            return Ok(false);
        }
        match default_target_modules(peft_type, model_type) {
            Some(found) => {
                self.target_modules = Some(found);
                Ok(true)
            }
            None => Err(Error::config(
                "target_modules",
                format!(
                    "is not given and there is no default for {peft_type} on model type `{model_type}`; name the modules to \
                     adapt, or use \"all-linear\"{}",
                    did_you_mean(model_type, default_model_types(peft_type))
                ),
            )),
        }
    }

    /// Combinations that PEFT refuses.
    pub(crate) fn validate(&self) -> Result<()> {
        let by_string = matches!(self.target_modules, Some(TargetModules::Regex(_) | TargetModules::AllLinear));
        if by_string && self.layers_to_transform.is_some() {
            return Err(Error::config(
                "layers_to_transform",
                "cannot be used when `target_modules` is a pattern or \"all-linear\"; give a list of names, or put the layer \
                 numbers into the pattern",
            ));
        }
        if by_string && !self.layers_pattern.is_empty() {
            return Err(Error::config(
                "layers_pattern",
                "cannot be used when `target_modules` is a pattern or \"all-linear\"",
            ));
        }
        if !self.layers_pattern.is_empty() && self.layers_to_transform.is_none() {
            return Err(Error::config("layers_pattern", "needs `layers_to_transform` beside it"));
        }
        Ok(())
    }
}

fn strings(key: &str, value: &Value) -> Result<Vec<String>> {
    let list = value.as_array().ok_or_else(|| Error::config(key, format!("{value} is not a list of names")))?;
    list.iter()
        .map(|item| item.as_str().map(str::to_owned).ok_or_else(|| Error::config(key, format!("{item} is not a name"))))
        .collect()
}

fn patterns<V>(key: &str, value: Option<&Value>, read: impl Fn(&Value) -> Option<V>) -> Result<Vec<(String, V)>> {
    let Some(value) = value else {
        return Ok(Vec::new());
    };
    let map =
        value.as_object().ok_or_else(|| Error::config(key, format!("{value} is not a table of pattern to number")))?;
    map.iter()
        .map(|(pattern, value)| {
            let number = read(value).ok_or_else(|| {
                Error::config(key, format!("`{pattern}` has the value {value}, which is not a usable number"))
            })?;
            Ok((pattern.clone(), number))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn read(json: &str) -> Result<TargetSpec> {
        TargetSpec::from_config(serde_json::from_str::<Value>(json).unwrap().as_object().unwrap())
    }

    #[test]
    fn reads_every_shape_of_the_keys() {
        let spec = read(
            r#"{"target_modules": "All-Linear", "exclude_modules": ["a"], "layers_to_transform": 3, "layers_pattern": "h",
                "rank_pattern": {"z": 4, "a": 8}, "alpha_pattern": {"q": 1.5}, "modules_to_save": null, "r": 8,
                "task_type": "CAUSAL_LM"}"#,
        )
        .unwrap();
        assert_eq!(spec.target_modules, Some(TargetModules::AllLinear));
        assert_eq!(spec.layers_to_transform, Some(vec![3]));
        assert_eq!(spec.layers_pattern, ["h"]);
        assert_eq!(spec.rank_pattern, [("z".to_owned(), 4), ("a".to_owned(), 8)], "order of the file is kept");
        assert_eq!(spec.alpha_pattern, [("q".to_owned(), 1.5)]);
        let empty = read(r#"{"exclude_modules": [], "target_modules": null}"#).unwrap();
        assert_eq!(empty, TargetSpec::default());
    }

    #[test]
    fn wrong_types_are_named() {
        for (json, key) in [
            (r#"{"target_modules": 3}"#, "target_modules"),
            (r#"{"target_modules": ["a", 1]}"#, "target_modules"),
            (r#"{"target_parameters": "experts"}"#, "target_parameters"),
            (r#"{"layers_to_transform": "1"}"#, "layers_to_transform"),
            (r#"{"layers_to_transform": [1.5]}"#, "layers_to_transform"),
            (r#"{"rank_pattern": {"a": 0}}"#, "rank_pattern"),
            (r#"{"rank_pattern": {"a": -1}}"#, "rank_pattern"),
            (r#"{"rank_pattern": ["a"]}"#, "rank_pattern"),
            (r#"{"alpha_pattern": {"a": "x"}}"#, "alpha_pattern"),
            (r#"{"modules_to_save": "head"}"#, "modules_to_save"),
            (r#"{"task_type": 1}"#, "task_type"),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{key}`: ")), "{json}: {error}");
        }
    }

    #[test]
    fn default_targets() {
        let mut spec = TargetSpec::default();
        assert!(spec.fill_default_targets("LORA", "llama").unwrap());
        assert!(!spec.fill_default_targets("LORA", "nope").unwrap());
        let error = TargetSpec::default().fill_default_targets("LORA", "lama").unwrap_err().to_string();
        assert!(error.contains("`lama`") && error.contains("`llama`"), "{error}");
    }
}
