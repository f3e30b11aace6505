//! Several IA³ adapters made into one.
//!
//! A factor `l` changes a weight by `(l − 1) ⊙ W`, so the sum of changes has the factor `1 + Σ wᵢ (lᵢ − 1)`, and an adapter
//! without a site has the factor 1 there. PEFT's `add_weighted_adapter` (`peft/tuners/ia3/model.py`, 0.21) takes `Σ wᵢ lᵢ`,
//! which is the same where the weights sum to 1 and every adapter has the site.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use peft_core::adapter_keys::KEY_PREFIX;
use peft_core::combine::{Combined, CombinedSite, WholeTensors, agreed, combine_whole, union_of_targets};
use peft_core::{AdapterFolder, BaseModel, Error, Result, check_finite, parameter_name};
use serde_json::{Map, Value, json};

use crate::config::Ia3Config;
use crate::targets::FEEDFORWARD;

/// An IA³ folder with what messages call it and its weight.
pub type Part<'a> = (&'a str, f64, &'a AdapterFolder);

/// Combines IA³ adapters: the exact sum of their changes, or with `peft_compatible` PEFT's sum of the factors.
///
/// # Errors
/// A site that is scaled at its input in one adapter and at its output in another, tensors stored whole that differ, NaN; the
/// message names the site and the adapters.
pub fn combine(parts: &[Part<'_>], peft_compatible: bool, base: Option<&dyn BaseModel>) -> Result<Combined> {
    let mut factors: BTreeMap<String, (&str, Tensor)> = BTreeMap::new();
    let mut whole = vec![BTreeMap::new(); parts.len()];
    for ((name, weight, files), whole) in parts.iter().zip(&mut whole) {
        Ia3Config::from_adapter_config(files.config().map())?;
        let mut found = false;
        for key in files.keys() {
            let tensor = files.tensor(key, &Device::Cpu)?;
            check_finite(&format!("{name}: {key}"), &tensor)?;
            let Some(path) = key.strip_prefix(KEY_PREFIX).and_then(|k| k.strip_suffix(".ia3_l")) else {
                whole.insert(key.to_owned(), tensor);
                continue;
            };
            found = true;
            if !matches!(tensor.dims(), [_, 1] | [1, _]) {
                let message = format!("`{key}` is {:?}, and the factors of IA³ are [out, 1] or [1, in]", tensor.dims());
                return Err(Error::file(files.weights().path(), message));
            }
            let l = tensor.to_dtype(DType::F64)?;
            let start = if peft_compatible { l.zeros_like()? } else { l.ones_like()? };
            let (first, sum) = factors.entry(path.to_owned()).or_insert((name, start));
            if sum.dims() != l.dims() {
                let message = format!(
                    "{first} has factors {:?} and {name} {:?}: one scales inputs and the other outputs (feedforward_modules), or \
                     they are adapters of different models",
                    sum.dims(),
                    l.dims()
                );
                return Err(Error::site(path, message));
            }
            let term = if peft_compatible { l } else { (l - 1.0)? };
            *sum = (&*sum + (term * *weight)?)?;
        }
        if !found {
            return Err(Error::file(files.weights().path(), "holds no factors of IA³"));
        }
    }
    let named: Vec<WholeTensors<'_>> = parts
        .iter()
        .zip(&whole)
        .map(|((name, weight, _), tensors)| WholeTensors { name, weight: *weight, tensors })
        .collect();
    let config = config(parts, &factors)?;
    let mut tensors = Vec::new();
    let mut sites = Vec::new();
    for (path, (_, l)) in factors {
        let norm = (&l - 1.0)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt();
        sites.push(CombinedSite { path: path.clone(), rank: 0, norm, error: 0.0 });
        let key = parameter_name(&path, "ia3_l");
        let l = l.to_dtype(DType::F32)?;
        check_finite(&key, &l)?;
        tensors.push((key, l));
    }
    tensors.extend(combine_whole(&named, base)?);
    Ok(Combined { config, tensors, sites, notes: Vec::new() })
}

fn config(parts: &[Part<'_>], factors: &BTreeMap<String, (&str, Tensor)>) -> Result<Map<String, Value>> {
    let named: Vec<(&str, &Map<String, Value>)> = parts.iter().map(|(n, _, f)| (*n, f.config().map())).collect();
    agreed("task_type", &named)?;
    let configs: Vec<&Map<String, Value>> = named.iter().map(|(_, c)| *c).collect();
    let mut config = configs.first().map(|c| (*c).clone()).unwrap_or_default();
    let mut saved: BTreeSet<&str> = BTreeSet::new();
    saved.extend(
        configs.iter().filter_map(|c| c.get("modules_to_save")?.as_array()).flatten().filter_map(Value::as_str),
    );
    if !saved.is_empty() {
        config.insert("modules_to_save".into(), json!(saved));
    }
    let same = |key: &str| configs.iter().all(|c| c.get(key) == config.get(key));
    if same("target_modules") && same("exclude_modules") && same(FEEDFORWARD) {
        return Ok(config);
    }
    // What is scaled at its input is told by the end of its name alone, so the sites' whole names say both.
    let sites: Vec<&str> = factors.keys().map(String::as_str).collect();
    let at_input: Vec<&str> =
        factors.iter().filter(|(_, (_, l))| l.dims().first() == Some(&1)).map(|(path, _)| path.as_str()).collect();
    config.extend(union_of_targets(&[&Map::new()], &sites).into_iter().filter(|(key, _)| !key.starts_with("layers_")));
    config.insert(FEEDFORWARD.into(), json!(at_input));
    Ok(config)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use peft_core::{AdapterConfig, write_adapter};

    const V: &str = "model.layers.0.self_attn.v_proj";
    const DOWN: &str = "model.layers.0.mlp.down_proj";

    fn folder(config: Value, factors: &[(&str, &[f32], bool)]) -> (tempfile::TempDir, AdapterFolder) {
        let dir = tempfile::tempdir().unwrap();
        let tensors: Vec<(String, Tensor)> = factors
            .iter()
            .map(|(path, l, input)| {
                let shape = if *input { (1, l.len()) } else { (l.len(), 1) };
                (parameter_name(path, "ia3_l"), Tensor::from_slice(l, shape, &Device::Cpu).unwrap())
            })
            .collect();
        let mut map = config.as_object().unwrap().clone();
        map.insert("peft_type".into(), "IA3".into());
        write_adapter(dir.path(), &AdapterConfig::new(map).unwrap(), tensors.iter().map(|(k, t)| (k.as_str(), t)))
            .unwrap();
        let files = AdapterFolder::open(dir.path()).unwrap();
        (dir, files)
    }

    fn values(combined: &Combined, path: &str) -> Vec<f32> {
        let key = parameter_name(path, "ia3_l");
        combined.tensors.iter().find(|(k, _)| *k == key).unwrap().1.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn changes_are_added_and_an_absent_site_changes_nothing() {
        let (_a, a) = folder(
            json!({"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
            &[(V, &[2.0, 0.5], false), (DOWN, &[3.0, 1.0, 0.0], true)],
        );
        let (_b, b) =
            folder(json!({"target_modules": ["v_proj"], "feedforward_modules": []}), &[(V, &[1.5, 1.0], false)]);
        let exact = combine(&[("A", 0.5, &a), ("B", -2.0, &b)], false, None).unwrap();
        assert_eq!(values(&exact, V), [0.5, 0.75]);
        assert_eq!(values(&exact, DOWN), [2.0, 1.0, 0.5]);
        assert_eq!(exact.config["target_modules"], json!([DOWN, V]));
        assert_eq!(exact.config["feedforward_modules"], json!([DOWN]));
        let theirs = combine(&[("A", 0.5, &a), ("B", -2.0, &b)], true, None).unwrap();
        assert_eq!(values(&theirs, V), [-2.0, -1.75]);
        assert_eq!(values(&theirs, DOWN), [1.5, 0.5, 0.0]);
    }

    #[test]
    fn sides_that_differ_are_refused() {
        let (_a, a) = folder(json!({"target_modules": ["down_proj"]}), &[(DOWN, &[3.0, 1.0], true)]);
        let (_b, b) = folder(json!({"target_modules": ["down_proj"]}), &[(DOWN, &[3.0, 1.0], false)]);
        let error = combine(&[("A", 0.5, &a), ("B", 0.5, &b)], false, None).unwrap_err().to_string();
        assert!(error.contains(DOWN) && error.contains("feedforward_modules"), "{error}");
        let (_c, c) = folder(json!({}), &[(V, &[f32::NAN], false)]);
        let error = combine(&[("C", 1.0, &c)], false, None).unwrap_err().to_string();
        assert!(error.contains("C: ") && error.contains("ia3_l"), "{error}");
    }
}
