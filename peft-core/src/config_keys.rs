//! The keys of a method's config, as a recipe's `[method]` table and an `adapter_config.json` give them.

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::suggest::did_you_mean;

/// A method's config, read key by key. As in PEFT, `null` is the same as an absent key.
#[derive(Debug, Clone, Copy)]
pub struct ConfigKeys<'a>(pub &'a Map<String, Value>);

impl<'a> ConfigKeys<'a> {
    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// `true` or `false`.
    ///
    /// # Errors
    /// When it is neither; the message names the key, as all of these do.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(Error::config(key, format!("{other} is neither true nor false"))),
        }
    }

    /// A finite number.
    ///
    /// # Errors
    /// When it is none.
    pub fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => match v.as_f64() {
                Some(x) if x.is_finite() => Ok(x),
                _ => Err(Error::config(key, format!("{v} is not a number"))),
            },
        }
    }

    /// A whole number from 1 to `most`.
    ///
    /// # Errors
    /// When it is none.
    pub fn count(&self, key: &str, most: usize) -> Result<Option<usize>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        match v.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=most).contains(&n) => Ok(Some(n)),
            _ => Err(Error::config(key, format!("{v} is not a whole number from 1 to {most}"))),
        }
    }

    /// A text.
    ///
    /// # Errors
    /// When it is none.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(Error::config(key, format!("{other} is not a text"))),
        }
    }

    /// The keys that are in `known`, for a file: a later program's keys are ignored, as PEFT does.
    #[must_use]
    pub fn only(&self, known: &Map<String, Value>) -> Map<String, Value> {
        let kept = self.0.iter().filter(|(key, _)| known.contains_key(*key));
        kept.map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// Refuses keys that are not in `known`, for what a user wrote.
    ///
    /// # Errors
    /// An unknown key, with the nearest known.
    pub fn refuse_unknown(&self, method: &str, known: &Map<String, Value>) -> Result<()> {
        match self.0.keys().find(|key| !known.contains_key(*key)) {
            None => Ok(()),
            Some(key) => {
                let near = did_you_mean(key, known.keys());
                Err(Error::config(key, format!("is not a key of method {method}{near}")))
            }
        }
    }
}

/// The keys of every PEFT config, with PEFT's defaults, and those of `own` (`peft/config.py`, peft 0.21.2).
#[must_use]
pub fn peft_defaults(peft_type: &str, own: Value) -> Map<String, Value> {
    let shared = json!({
        "auto_mapping": null, "base_model_name_or_path": null, "inference_mode": true, "peft_type": peft_type,
        "peft_version": "0.21.2", "revision": null, "task_type": null
    });
    [shared, own].into_iter().filter_map(|value| value.as_object().cloned()).flatten().collect()
}

/// `config` as PEFT writes it: every key of `defaults`, `config`'s own values over them.
#[must_use]
pub fn completed(defaults: Map<String, Value>, config: &Map<String, Value>) -> Map<String, Value> {
    let peft_type = defaults.get("peft_type").cloned();
    let mut out = defaults;
    out.extend(config.iter().map(|(k, v)| (k.clone(), v.clone())));
    out.extend(peft_type.map(|name| ("peft_type".to_owned(), name)));
    out.insert("inference_mode".into(), true.into());
    if out.get("task_type").is_none_or(Value::is_null) {
        out.insert("task_type".into(), "CAUSAL_LM".into());
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn wrong_values_name_the_key() {
        let value = json!({"a": 0, "b": "x", "c": null, "d": 1.5, "e": true});
        let keys = ConfigKeys(value.as_object().unwrap());
        assert_eq!(keys.count("c", 9).unwrap(), None);
        assert_eq!(keys.number("d", 0.0).unwrap(), 1.5);
        assert!(keys.flag("e", false).unwrap() && keys.flag("c", true).unwrap());
        for error in [
            keys.count("a", 9).unwrap_err(),
            keys.count("d", 9).unwrap_err(),
            keys.flag("a", true).unwrap_err(),
            keys.number("b", 0.0).unwrap_err(),
            keys.text("a").unwrap_err(),
            keys.refuse_unknown("toy", json!({"a": 1, "b": 1, "c": 1, "dd": 1}).as_object().unwrap()).unwrap_err(),
        ] {
            assert!(matches!(&error, Error::Config { key, .. } if "abd".contains(key.as_str())), "{error}");
        }
    }

    #[test]
    fn the_method_says_its_type_and_the_user_the_rest() {
        let defaults = peft_defaults("IA3", json!({"target_modules": null}));
        let given = json!({"peft_type": "LORA", "inference_mode": false, "target_modules": ["a"], "mine": 1});
        let written = completed(defaults, given.as_object().unwrap());
        assert_eq!((&written["peft_type"], &written["inference_mode"]), (&json!("IA3"), &json!(true)));
        assert_eq!((&written["target_modules"], &written["mine"]), (&json!(["a"]), &json!(1)));
        assert_eq!(written["task_type"], json!("CAUSAL_LM"));
    }
}
