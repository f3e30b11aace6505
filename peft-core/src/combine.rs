//! What combining adapters has in common for all methods: the modules that the result targets, tensors that are stored
//! whole, and what is said of the result.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Tensor};
use serde_json::{Map, Value};

use crate::adapter_keys::KEY_PREFIX;
use crate::build::parameter_name;
use crate::error::{Error, Result};
use crate::segmented::{BaseLayer, BaseModel};

/// An adapter that was made of others, as its files will hold it.
#[derive(Debug)]
pub struct Combined {
    /// The `adapter_config.json`.
    pub config: Map<String, Value>,
    /// The tensors, by their keys.
    pub tensors: Vec<(String, Tensor)>,
    /// What came of each site, in the order of their paths.
    pub sites: Vec<CombinedSite>,
    /// What the user should know and need not act on, in words.
    pub notes: Vec<String>,
}

/// One site of a [`Combined`].
#[derive(Debug, Clone)]
pub struct CombinedSite {
    /// The module's path.
    pub path: String,
    /// Rank of its change.
    pub rank: usize,
    /// Frobenius norm of the change that was asked for.
    pub norm: f64,
    /// Frobenius norm of what the result lacks of it.
    pub error: f64,
}

impl CombinedSite {
    /// What is lacking, as a share of what was asked for.
    #[must_use]
    pub fn relative_error(&self) -> f64 {
        share(self.error, self.norm)
    }
}

impl Combined {
    /// What is lacking over all sites together, as a share of what was asked for.
    #[must_use]
    pub fn relative_error(&self) -> f64 {
        let sum = |of: fn(&CombinedSite) -> f64| self.sites.iter().map(|s| of(s) * of(s)).sum::<f64>().sqrt();
        share(sum(|s| s.error), sum(|s| s.norm))
    }

    /// Elements of all tensors.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.tensors.iter().map(|(_, t)| t.elem_count()).sum()
    }
}

/// `W ← W + B·A` at one linear layer.
#[derive(Debug, Clone)]
pub struct LoraFactors {
    /// The module's path.
    pub path: String,
    /// `[r, in]`.
    pub a: Tensor,
    /// `[out, r]`, with the scale in it.
    pub b: Tensor,
}

impl Combined {
    /// The factors of every site, for the files of a program that knows nothing else of an adapter.
    ///
    /// # Errors
    /// A tensor that is no factor of a linear layer, with the way out; `program` is what messages call the files.
    pub fn plain_factors(&self, program: &str) -> Result<Vec<LoraFactors>> {
        let mut tensors: BTreeMap<&str, &Tensor> = self.tensors.iter().map(|(k, t)| (k.as_str(), t)).collect();
        let mut factors = Vec::new();
        for site in &self.sites {
            let mut take = |suffix| tensors.remove(parameter_name(&site.path, suffix).as_str());
            if let (Some(a), Some(b)) = (take("lora_A.weight"), take("lora_B.weight")) {
                factors.push(LoraFactors { path: site.path.clone(), a: a.clone(), b: b.clone() });
            }
        }
        match tensors.keys().next() {
            None => Ok(factors),
            Some(key) => Err(Error::msg(format!(
                "{program} has no place for `{key}`: it holds factors of linear layers alone; make a plain LoRA first (convert --to \
                 lora), or merge the adapter"
            ))),
        }
    }
}

fn share(error: f64, norm: f64) -> f64 {
    if error == 0.0 { 0.0 } else { error / norm }
}

/// Keys that filter what `target_modules` matches.
const FILTERS: [&str; 3] = ["exclude_modules", "layers_to_transform", "layers_pattern"];

/// The keys that select the sites of a combined adapter: `target_modules` and its filters, such that exactly `sites` are
/// matched, the union of what the `configs` match. Where the configs do not say it together, the sites' whole names do.
#[must_use]
pub fn union_of_targets(configs: &[&Map<String, Value>], sites: &[&str]) -> Map<String, Value> {
    let value = |config: &Map<String, Value>, key: &str| normal(config.get(key));
    let first = configs.first().copied();
    let same = |key: &str| first.is_none_or(|f| configs.iter().all(|c| value(c, key) == value(f, key)));
    let mut keys = Map::new();
    let targets = FILTERS.iter().all(|key| same(key)).then(|| union(configs, sites)).flatten();
    for key in FILTERS {
        let kept = first.and_then(|f| f.get(key)).filter(|_| targets.is_some());
        keys.insert(key.to_owned(), kept.cloned().unwrap_or(Value::Null));
    }
    let names = || sites.iter().map(|s| Value::from(*s)).collect::<Vec<_>>().into();
    keys.insert("target_modules".to_owned(), targets.unwrap_or_else(names));
    keys
}

/// A list as the set that PEFT takes it for; an empty one is none.
fn normal(value: Option<&Value>) -> Option<Value> {
    match value {
        None | Some(Value::Null) => None,
        Some(Value::Array(items)) => {
            let set: BTreeSet<String> = items.iter().map(Value::to_string).collect();
            (!set.is_empty()).then(|| set.into_iter().collect::<Vec<_>>().into())
        }
        Some(other) => Some(other.clone()),
    }
}

fn union(configs: &[&Map<String, Value>], sites: &[&str]) -> Option<Value> {
    let targets: Vec<&Value> = configs.iter().map(|c| c.get("target_modules")).collect::<Option<_>>()?;
    let texts = |value: &Value| -> Option<Vec<String>> {
        value.as_array()?.iter().map(|name| name.as_str().map(str::to_owned)).collect()
    };
    if let Some(lists) = targets.iter().map(|t| texts(t)).collect::<Option<Vec<_>>>() {
        let names: BTreeSet<String> = lists.into_iter().flatten().collect();
        let hit = |site: &str| {
            names.iter().any(|n| site.strip_suffix(n.as_str()).is_some_and(|r| r.is_empty() || r.ends_with('.')))
        };
        return sites.iter().all(|site| hit(site)).then(|| names.iter().cloned().collect::<Vec<_>>().into());
    }
    let patterns: Vec<&str> = targets.iter().map(|t| t.as_str()).collect::<Option<_>>()?;
    // "all-linear" depends on the model.
    if patterns.iter().any(|p| p.eq_ignore_ascii_case("all-linear")) {
        return None;
    }
    let distinct: BTreeSet<&str> = patterns.into_iter().collect();
    Some(match distinct.iter().next() {
        Some(only) if distinct.len() == 1 => (*only).into(),
        // As PEFT joins them.
        _ => distinct.iter().map(|p| format!("({p})")).collect::<Vec<_>>().join("|").into(),
    })
}

/// The value of a key in which all configs have to agree; `None` where none has it.
///
/// # Errors
/// Two values; the message names the adapters.
pub fn agreed<'a>(key: &str, configs: &[(&str, &'a Map<String, Value>)]) -> Result<Option<&'a Value>> {
    let given = |config: &'a Map<String, Value>| config.get(key).filter(|v| !v.is_null());
    let mut found: Option<(&str, &Value)> = None;
    for (name, config) in configs {
        let Some(value) = given(config) else { continue };
        match found {
            Some((other, first)) if normal(Some(first)) != normal(Some(value)) => {
                let message = format!("is {first} in {other} and {value} in {name}; such adapters cannot be combined");
                return Err(Error::config(key, message));
            }
            Some(_) => {}
            None => found = Some((name, value)),
        }
    }
    Ok(found.map(|(_, value)| value))
}

/// The tensors that one of the adapters stores whole, in place of the base's: `modules_to_save`, trained biases, rows of
/// tokens.
#[derive(Debug)]
pub struct WholeTensors<'a> {
    /// What messages call the adapter.
    pub name: &'a str,
    /// Its weight.
    pub weight: f64,
    /// By their keys in the file.
    pub tensors: &'a BTreeMap<String, Tensor>,
}

/// Tensors stored whole, combined. One that is the same in all adapters is kept as it is; of others the differences from the
/// base are added, `W + Σ wᵢ (Wᵢ − W)`, where an adapter without the tensor differs by nothing.
///
/// # Errors
/// Tensors that differ where there is no `base`, or that the base has nothing for; the message names both adapters.
pub fn combine_whole(parts: &[WholeTensors<'_>], base: Option<&dyn BaseModel>) -> Result<BTreeMap<String, Tensor>> {
    let keys: BTreeSet<&String> = parts.iter().flat_map(|p| p.tensors.keys()).collect();
    let mut out = BTreeMap::new();
    for key in keys {
        let holders: Vec<(&WholeTensors<'_>, &Tensor)> =
            parts.iter().filter_map(|p| Some((p, p.tensors.get(key)?))).collect();
        let Some((first, tensor)) = holders.first() else { continue };
        let mut differs = None;
        for (part, other) in &holders {
            if other.dims() != tensor.dims() {
                let (a, b) = (first.name, part.name);
                let message = format!(
                    "is {:?} in {a} and {:?} in {b}; they are adapters of different models",
                    tensor.dims(),
                    other.dims()
                );
                return Err(Error::site(key, message));
            }
            if !equal(tensor, other)? {
                differs = differs.or(Some(part.name));
            }
        }
        // PEFT stores the table of an adapted embedding beside the adapter, as it is in the base.
        if key.ends_with(".base_layer.weight") {
            if let Some(other) = differs {
                let message = format!(
                    "is a copy of the base's table and differs between {} and {other}; they are adapters of different bases",
                    first.name
                );
                return Err(Error::site(key, message));
            }
            out.insert(key.clone(), (*tensor).clone());
            continue;
        }
        let lacks = parts.iter().find(|p| !p.tensors.contains_key(key)).map(|p| p.name);
        let value = match (differs, lacks) {
            (None, None) => (*tensor).clone(),
            _ => {
                let why = match (differs, lacks) {
                    (Some(other), _) => format!("is stored whole and differs between {} and {other}", first.name),
                    (None, lacks) => {
                        format!("is stored whole in {} and not in {}", first.name, lacks.unwrap_or_default())
                    }
                };
                let way_out = if key.contains(".token_adapter.") {
                    "; combine adapters that train the same rows to the same values, or merge them one after another"
                } else {
                    "; give --model, from which the differences are taken, or adapters that share it"
                };
                let refused = || Error::site(key, format!("{why}{way_out}"));
                let from = base_value(key, base.ok_or_else(refused)?)?.ok_or_else(refused)?;
                sum_of_differences(key, &from, &holders)?
            }
        };
        out.insert(key.clone(), value);
    }
    Ok(out)
}

fn equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(a.dtype() == b.dtype() && a.ne(b)?.max_all()?.to_scalar::<u8>()? == 0)
}

fn sum_of_differences(key: &str, from: &Tensor, holders: &[(&WholeTensors<'_>, &Tensor)]) -> Result<Tensor> {
    let from = from.to_dtype(DType::F64)?;
    let mut sum = from.clone();
    for (part, tensor) in holders {
        if tensor.dims() != from.dims() {
            return Err(Error::Shape {
                name: format!("{}: {key}", part.name),
                actual: tensor.dims().to_vec(),
                expected: from.dims().to_vec(),
            });
        }
        sum = (sum + ((tensor.to_device(from.device())?.to_dtype(DType::F64)? - &from)? * part.weight)?)?;
    }
    Ok(sum.to_dtype(DType::F32)?)
}

/// What the base has in place of a tensor that is stored whole, laid out as in files; `None` where it has nothing.
fn base_value(key: &str, base: &dyn BaseModel) -> Result<Option<Tensor>> {
    let Some(path) = key.strip_prefix(KEY_PREFIX) else { return Ok(None) };
    let (path, bias) = match (path.strip_suffix(".weight"), path.strip_suffix(".bias")) {
        (Some(path), _) => (path, false),
        (None, Some(path)) => (path.strip_suffix(".base_layer").unwrap_or(path), true),
        (None, None) => return Ok(None),
    };
    let Some(site) = base.sites().find(path) else { return Ok(None) };
    Ok(match (base.layer(site.id)?, bias) {
        (BaseLayer::Linear(layer), false) if layer.is_fan_in_fan_out() => {
            Some(layer.weight().to_dense(DType::F32)?.t()?.contiguous()?)
        }
        (BaseLayer::Linear(layer), false) => Some(layer.weight().to_dense(DType::F32)?),
        (BaseLayer::Linear(layer), true) => layer.bias().cloned(),
        (BaseLayer::Embedding(table), false) => Some(table.weight().to_dense(DType::F32)?),
        (BaseLayer::Embedding(_), true) => None,
        (BaseLayer::Norm(norm), false) => Some(norm.weight().clone()),
        (BaseLayer::Norm(norm), true) => norm.bias().cloned(),
        (BaseLayer::Experts(_), _) => None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::Device;
    use serde_json::json;

    const Q: &str = "model.layers.0.self_attn.q_proj";
    const V: &str = "model.layers.0.self_attn.v_proj";

    #[test]
    fn targets_of_several_configs() {
        let names = json!([Q, V]);
        for (a, b, targets, layers) in [
            (
                json!({"target_modules": ["v_proj", "q_proj"]}),
                json!({"target_modules": ["q_proj"]}),
                json!(["q_proj", "v_proj"]),
                Value::Null,
            ),
            (
                json!({"target_modules": ".*q_proj"}),
                json!({"target_modules": ".*v_proj"}),
                json!("(.*q_proj)|(.*v_proj)"),
                Value::Null,
            ),
            (json!({"target_modules": ".*_proj"}), json!({"target_modules": ".*_proj"}), json!(".*_proj"), Value::Null),
            // a list and a pattern, different layers, what depends on the model: the whole names
            (json!({"target_modules": ["q_proj"]}), json!({"target_modules": ".*v_proj"}), names.clone(), Value::Null),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": [0]}),
                json!({"target_modules": ["v_proj"]}),
                names.clone(),
                Value::Null,
            ),
            (
                json!({"target_modules": "all-linear"}),
                json!({"target_modules": "all-linear"}),
                names.clone(),
                Value::Null,
            ),
            (json!({}), json!({"target_modules": ["v_proj"]}), names.clone(), Value::Null),
            // a list that does not say what the file holds
            (json!({"target_modules": ["k_proj"]}), json!({"target_modules": ["v_proj"]}), names, Value::Null),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}),
                json!({"target_modules": ["v_proj"], "layers_to_transform": [1, 0]}),
                json!(["q_proj", "v_proj"]),
                json!([0, 1]),
            ),
        ] {
            let keys = union_of_targets(&[a.as_object().unwrap(), b.as_object().unwrap()], &[Q, V]);
            assert_eq!(keys["target_modules"], targets, "{a} {b}");
            assert_eq!(keys["layers_to_transform"], layers, "{a} {b}");
        }
    }

    #[test]
    fn whole_tensors_are_equal_or_refused() {
        let tensor = |x: f32| Tensor::new(&[x, 2.0], &Device::Cpu).unwrap();
        let of = |pairs: &[(&str, f32)]| {
            pairs.iter().map(|(k, x)| ((*k).to_owned(), tensor(*x))).collect::<BTreeMap<_, _>>()
        };
        let (a, b, c) = (of(&[("head.weight", 1.0)]), of(&[("head.weight", 3.0)]), of(&[]));
        let part = |name, tensors| WholeTensors { name, weight: 0.5, tensors };
        let kept = combine_whole(&[part("A", &a), part("B", &a)], None).unwrap();
        assert_eq!(kept["head.weight"].to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        for (other, says) in [(&b, "differs between A and B"), (&c, "in A and not in B")] {
            let error = combine_whole(&[part("A", &a), part("B", other)], None).unwrap_err().to_string();
            assert!(error.contains("head.weight") && error.contains(says) && error.contains("--model"), "{error}");
        }
        let tables = [of(&[("e.base_layer.weight", 1.0)]), of(&[("e.base_layer.weight", 1.5)])];
        let error = combine_whole(&[part("A", &tables[0]), part("B", &tables[1])], None).unwrap_err().to_string();
        assert!(error.contains("different bases"), "{error}");
        assert_eq!(combine_whole(&[part("A", &tables[0]), part("C", &c)], None).unwrap().len(), 1);
    }

    #[test]
    fn configs_agree_or_say_who_does_not() {
        let (a, b) = (json!({"bias": "none", "x": null}), json!({"bias": "all", "x": [2, 1]}));
        let (a, b) = (a.as_object().unwrap(), b.as_object().unwrap());
        let error = agreed("bias", &[("A", a), ("B", b)]).unwrap_err().to_string();
        assert!(error.starts_with("`bias`: ") && error.contains("in A") && error.contains("in B"), "{error}");
        assert_eq!(agreed("x", &[("A", a), ("B", b)]).unwrap(), Some(&json!([2, 1])));
        assert_eq!(agreed("y", &[("A", a), ("B", b)]).unwrap(), None);
    }

    #[test]
    fn errors_are_shares_of_what_was_asked_for() {
        let site = |norm, error| CombinedSite { path: String::new(), rank: 1, norm, error };
        let combined = |sites| Combined { config: Map::new(), tensors: Vec::new(), sites, notes: Vec::new() };
        assert_eq!(combined(vec![site(3.0, 0.6), site(4.0, 0.8)]).relative_error(), 0.2);
        assert_eq!(combined(vec![site(0.0, 0.0)]).relative_error(), 0.0);
    }
}
