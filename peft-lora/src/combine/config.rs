//! The config of a combined adapter.

use std::collections::BTreeMap;

use candle_core::Tensor;
use peft_core::adapter_keys::KEY_PREFIX;
use peft_core::combine::{CombinedSite, agreed, union_of_targets};
use peft_core::{BaseModel, Error, Result, parameter_name};
use serde_json::{Map, Value, json};

use super::source::{Place, Source};
use crate::config::LoraConfig;

/// What was made.
pub(super) struct Made<'a> {
    pub(super) places: &'a BTreeMap<String, Place>,
    pub(super) sites: &'a [CombinedSite],
    /// Whether B has biases.
    pub(super) has_bias: bool,
    /// Whether there are magnitudes.
    pub(super) has_gain: bool,
    pub(super) whole: &'a BTreeMap<String, Tensor>,
}

/// The config as PEFT writes it. The scale is 1 at every site: alpha is the rank, there and in the patterns.
pub(super) fn config(
    sources: &[Source<'_>],
    made: &Made<'_>,
    base: Option<&dyn BaseModel>,
) -> Result<Map<String, Value>> {
    let named: Vec<(&str, &Map<String, Value>)> = sources.iter().map(|s| (s.name.as_str(), &s.config)).collect();
    let mut keys = Map::new();
    for key in ["task_type", "trainable_token_indices"] {
        keys.extend(agreed(key, &named)?.map(|value| (key.to_owned(), value.clone())));
    }
    // An adapter of another method has no such key, and trains no biases.
    let bias = |config: &Map<String, Value>| config.get("bias").cloned().unwrap_or_else(|| "none".into());
    let biases: Vec<Map<String, Value>> =
        named.iter().map(|(_, c)| Map::from_iter([("bias".to_owned(), bias(c))])).collect();
    let biases: Vec<_> = named.iter().zip(&biases).map(|((name, _), b)| (*name, b)).collect();
    keys.extend(agreed("bias", &biases)?.map(|value| ("bias".to_owned(), value.clone())));
    for key in ["base_model_name_or_path", "revision", "auto_mapping", "lora_dropout"] {
        keys.extend(
            named.iter().find_map(|(_, c)| Some((key.to_owned(), c.get(key).filter(|v| !v.is_null())?.clone()))),
        );
    }
    let flag = |key: &str| named.iter().any(|(_, c)| c.get(key) == Some(&Value::Bool(true)));
    let conv1d =
        base.is_some_and(|b| made.places.keys().any(|p| b.sites().find(p).is_some_and(|s| s.stored.fan_in_fan_out)));
    keys.insert("fan_in_fan_out".into(), (flag("fan_in_fan_out") || conv1d).into());
    keys.insert("ensure_weight_tying".into(), flag("ensure_weight_tying").into());
    keys.insert("lora_bias".into(), made.has_bias.into());
    keys.insert("use_dora".into(), made.has_gain.into());

    let mut saved: Vec<&str> = Vec::new();
    for name in
        named.iter().filter_map(|(_, c)| c.get("modules_to_save")?.as_array()).flatten().filter_map(Value::as_str)
    {
        if !saved.contains(&name) {
            saved.push(name);
        }
    }
    for path in made.places.keys() {
        if made.whole.contains_key(&parameter_name(path, "weight")) {
            let message = "is adapted in one of the adapters and stored whole (modules_to_save) in another";
            return Err(Error::site(path, message));
        }
    }
    keys.insert("modules_to_save".into(), if saved.is_empty() { Value::Null } else { json!(saved) });

    let r = made.sites.iter().map(|s| s.rank).max().unwrap_or(1);
    let others = || made.sites.iter().filter(|s| s.rank != r).map(|s| (s.path.clone(), Value::from(s.rank)));
    keys.insert("r".into(), r.into());
    keys.insert("lora_alpha".into(), r.into());
    keys.insert("rank_pattern".into(), others().collect::<Map<_, _>>().into());
    keys.insert("alpha_pattern".into(), others().collect::<Map<_, _>>().into());

    let configs: Vec<&Map<String, Value>> = named.iter().map(|(_, c)| *c).collect();
    let sites: Vec<&str> = made.places.keys().map(String::as_str).collect();
    keys.extend(union_of_targets(&configs, &sites));
    keys.insert("peft_type".into(), "LORA".into());
    Ok(LoraConfig::from_adapter_config(&keys)?.to_adapter_config(None))
}

/// The key in the file of a tensor that is stored whole: the bias of an adapted layer is inside PEFT's wrapper.
pub(super) fn stored_key(key: String, places: &BTreeMap<String, Place>) -> String {
    let path = key.strip_prefix(KEY_PREFIX).and_then(|k| k.strip_suffix(".bias"));
    match path.filter(|path| places.contains_key(*path)) {
        Some(path) => parameter_name(path, "base_layer.bias"),
        None => key,
    }
}

/// What is worth a look.
pub(super) fn notes(sources: &[Source<'_>]) -> Vec<String> {
    let bases =
        sources.iter().filter_map(|s| Some((s.name.as_str(), s.config.get("base_model_name_or_path")?.as_str()?)));
    let bases: Vec<(&str, &str)> = bases.collect();
    match bases.iter().find(|(_, b)| bases.first().is_some_and(|(_, first)| first != b)) {
        Some((other, b)) => {
            let (one, a) = bases.first().copied().unwrap_or_default();
            vec![format!("{one} names the base `{a}` and {other} names `{b}`; they have to be the same model")]
        }
        None => Vec::new(),
    }
}
