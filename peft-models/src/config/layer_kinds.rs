//! Sliding windows and rotary embeddings in a `config.json`, layer by layer.
//!
//! transformers v4 has `rope_theta` and `rope_scaling`, v5 has `rope_parameters` (`modeling_rope_utils.py`,
//! `RotaryEmbeddingConfigMixin`, for which one wins), and of models with two tables one object for each type of layer.

use peft_core::suggest::did_you_mean;
use serde_json::Map;

use super::keys::Keys;
use super::{ConfigError, Family, LayerKind, MOST_LAYERS, RopeConfig, RopeRule, WindowRule};
use crate::rope::{LongRope, RopeScaling, Yarn};

const ROPE_TYPES: &[&str] = &["default", "linear", "dynamic", "yarn", "llama3", "longrope"];

/// The names of the types of layers in `layer_types` and, where there are two tables, in `rope_parameters`.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// The kinds of layers, and which of them each of the `layers` is.
pub(super) fn layer_kinds(
    keys: &Keys<'_>,
    family: &Family,
    layers: usize,
    max_position_embeddings: usize,
) -> Result<(Vec<LayerKind>, Vec<usize>), ConfigError> {
    let layers = layers.min(MOST_LAYERS);
    let windows = windows(keys, family, layers)?;
    let (rope, local) = match &family.rope {
        Some(rule) => ropes(keys, family, rule, max_position_embeddings)?,
        None => (None, None),
    };
    let rotated = rotated(keys, family, layers)?;
    let (mut kinds, mut of_layer) = (Vec::<LayerKind>::new(), Vec::with_capacity(layers));
    for (window, rotated) in windows.into_iter().zip(rotated) {
        let table = if window.is_some() && local.is_some() { &local } else { &rope };
        let kind = LayerKind { window, rope: table.clone().filter(|_| rotated) };
        let known = kinds.iter().position(|known| *known == kind).unwrap_or_else(|| {
            kinds.push(kind);
            kinds.len() - 1
        });
        of_layer.push(known);
    }
    Ok((kinds, of_layer))
}

/// The window of each layer.
fn windows(keys: &Keys<'_>, family: &Family, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    const KEY: &str = "sliding_window";
    let window = |default: Option<usize>| -> Result<Option<usize>, ConfigError> {
        if keys.map.contains_key(KEY) { keys.count(KEY) } else { Ok(default) }
    };
    let slides: Vec<bool>;
    let size = match family.window {
        WindowRule::Never => return Ok(vec![None; layers]),
        WindowRule::Everywhere { default } => return Ok(vec![window(default)?; layers]),
        WindowRule::Switched { default } => {
            let on = keys.flag("use_sliding_window")?.unwrap_or(false);
            return Ok(vec![if on { window(Some(default))? } else { None }; layers]);
        }
        WindowRule::Upper => {
            let size = if keys.flag("use_sliding_window")?.unwrap_or(false) { window(Some(4096))? } else { None };
            let first = keys.count("max_window_layers")?.unwrap_or(28);
            slides = layer_types(keys, layers)?
                .unwrap_or_else(|| (0..layers).map(|i| size.is_some() && i >= first).collect());
            size
        }
        WindowRule::Periodic { key, period } => {
            let period = match key {
                Some(key) => keys.count(key)?.unwrap_or(period),
                None => period,
            };
            if period == 0 {
                return Err(keys.invalid(key.unwrap_or(KEY), "0 is not a period of layers".into()));
            }
            slides = layer_types(keys, layers)?
                .unwrap_or_else(|| (0..layers).map(|i| !(i + 1).is_multiple_of(period)).collect());
            window(Some(4096))?
        }
    };
    if slides.contains(&true) && size.is_none() {
        return Err(keys.invalid(KEY, format!("is not set, and there are layers of type {SLIDING}")));
    }
    Ok(slides.into_iter().map(|slides| size.filter(|_| slides)).collect())
}

/// Which layers have a window, where `layer_types` says so.
fn layer_types(keys: &Keys<'_>, layers: usize) -> Result<Option<Vec<bool>>, ConfigError> {
    const KEY: &str = "layer_types";
    let Some(value) = keys.value(KEY) else { return Ok(None) };
    let list = value.as_array().ok_or_else(|| keys.wrong(KEY, value, "a list with the type of each layer"))?;
    if list.len() != layers {
        return Err(keys.invalid(KEY, format!("has {} entries for {layers} layers", list.len())));
    }
    let slides = list.iter().map(|item| match item.as_str() {
        Some(FULL) => Ok(false),
        Some(SLIDING) => Ok(true),
        _ => Err(keys.wrong(KEY, item, "full_attention or sliding_attention")),
    });
    slides.collect::<Result<_, _>>().map(Some)
}

/// Which layers have rotary embeddings.
fn rotated(keys: &Keys<'_>, family: &Family, layers: usize) -> Result<Vec<bool>, ConfigError> {
    let Some(rule) = &family.rope else { return Ok(vec![false; layers]) };
    let Some((list_key, period_key, period)) = rule.skipped else { return Ok(vec![true; layers]) };
    if keys.value(list_key).is_some() {
        let list = keys.numbers(list_key)?;
        if list.len() != layers {
            return Err(keys.invalid(list_key, format!("has {} entries for {layers} layers", list.len())));
        }
        return Ok(list.into_iter().map(|rotates| rotates != 0.0).collect());
    }
    let period = keys.count(period_key)?.unwrap_or(period);
    if period == 0 {
        return Err(keys.invalid(period_key, "0 is not a period of layers".into()));
    }
    Ok((0..layers).map(|i| !(i + 1).is_multiple_of(period)).collect())
}

/// The table of the layers that see everything, and the one of those with a window, where it is another.
type Ropes = (Option<RopeConfig>, Option<RopeConfig>);

fn ropes(
    keys: &Keys<'_>,
    family: &Family,
    rule: &RopeRule,
    max_position_embeddings: usize,
) -> Result<Ropes, ConfigError> {
    let empty = Map::new();
    let object = |key: &'static str, prefix: &'static str| -> Result<Keys<'_>, ConfigError> {
        let map = match keys.value(key) {
            None => &empty,
            Some(value) => value.as_object().ok_or_else(|| keys.wrong(key, value, "an object or null"))?,
        };
        Ok(Keys { map, path: keys.path, prefix })
    };
    let old = object("rope_scaling", "rope_scaling.")?;
    let new = object("rope_parameters", "rope_parameters.")?;
    let reader = Reader { keys, family, rule, max_position_embeddings };
    let Some((local_key, local_theta)) = rule.local else {
        // As in transformers, a non-empty `rope_scaling` wins over `rope_parameters`.
        let parameters = if old.map.is_empty() { &new } else { &old };
        return Ok((Some(reader.read(parameters, rule.theta_key, rule.theta)?), None));
    };
    let nested = |key: &str, prefix: &'static str| -> Result<Keys<'_>, ConfigError> {
        let map = match new.value(key) {
            None => &empty,
            Some(value) => value.as_object().ok_or_else(|| new.wrong(key, value, "an object or null"))?,
        };
        Ok(Keys { map, path: keys.path, prefix })
    };
    if !new.map.is_empty() && !new.map.contains_key(FULL) && !new.map.contains_key(SLIDING) {
        return Err(keys.invalid("rope_parameters", format!("has to be one object for {FULL} and one for {SLIDING}")));
    }
    let full = nested(FULL, "rope_parameters.full_attention.")?;
    let sliding = nested(SLIDING, "rope_parameters.sliding_attention.")?;
    // The old key's entries are put over those of the layers that see everything.
    let mut merged = full.map.clone();
    merged.extend(old.map.iter().map(|(key, value)| (key.clone(), value.clone())));
    let full =
        Keys { map: &merged, path: keys.path, prefix: if old.map.is_empty() { full.prefix } else { old.prefix } };
    let rope = reader.read(&full, rule.theta_key, rule.theta)?;
    let local = reader.read(&sliding, local_key, local_theta)?;
    Ok((Some(rope), Some(local)))
}

/// What the parameters of a table are read with.
struct Reader<'a> {
    keys: &'a Keys<'a>,
    family: &'a Family,
    rule: &'a RopeRule,
    max_position_embeddings: usize,
}

impl Reader<'_> {
    fn read(&self, parameters: &Keys<'_>, theta_key: &str, theta: f64) -> Result<RopeConfig, ConfigError> {
        let theta = match parameters.number("rope_theta")? {
            Some(theta) => theta,
            None => self.keys.number(theta_key)?.unwrap_or(theta),
        };
        let scaling = self.scaling(parameters)?;
        Ok(RopeConfig { theta, scaling, partial_rotary_factor: self.partial_rotary_factor(parameters)? })
    }

    fn partial_rotary_factor(&self, parameters: &Keys<'_>) -> Result<f64, ConfigError> {
        let key = self.rule.partial.map_or("partial_rotary_factor", |(key, _)| key);
        let factor = match parameters.number("partial_rotary_factor")? {
            Some(factor) => Some(factor),
            None => self.keys.number(key)?,
        };
        match self.rule.partial {
            Some((_, default)) => Ok(factor.unwrap_or(default)),
            None if factor.is_none_or(|factor| factor == 1.0) => Ok(1.0),
            None => Err(self.keys.invalid(key, format!("{} models rotate whole heads", self.family.model_type))),
        }
    }

    fn scaling(&self, parameters: &Keys<'_>) -> Result<RopeScaling, ConfigError> {
        let max_position_embeddings = self.max_position_embeddings;
        // `original_max_position_embeddings` stands beside the other keys in some files, and then has priority.
        let beside = match self.keys.count("original_max_position_embeddings")? {
            Some(original) => Some(original),
            None => self.rule.original,
        };
        let original = match beside {
            Some(original) => original,
            None => parameters.count("original_max_position_embeddings")?.unwrap_or(max_position_embeddings),
        };
        let growth = max_position_embeddings as f64 / original.max(1) as f64;
        let type_key = if parameters.value("rope_type").is_some() { "rope_type" } else { "type" };
        let name = match parameters.text(type_key)?.unwrap_or("default") {
            "yarn" | "su" if self.rule.yarn_is_longrope => "longrope",
            "su" => "longrope",
            name => name,
        };
        Ok(match name {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: parameters.required_number("factor")? },
            "dynamic" => {
                RopeScaling::Dynamic { factor: parameters.required_number("factor")?, max_position_embeddings }
            }
            "yarn" => RopeScaling::Yarn(Yarn {
                factor: parameters.number("factor")?.unwrap_or(growth),
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
            "longrope" => RopeScaling::LongRope(LongRope {
                short_factor: parameters.numbers("short_factor")?,
                long_factor: parameters.numbers("long_factor")?,
                factor: parameters.number("factor")?.unwrap_or(growth),
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
        })
    }
}
