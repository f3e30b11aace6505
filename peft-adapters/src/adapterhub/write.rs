//! From an adapter's files to a folder that AdapterHub's package loads.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use peft_core::adapter_keys::{KEY_PREFIX, SOFT_PROMPT_KEY_PREFIX};
use peft_core::{
    AdapterConfig, AdapterFolder, Error, Result, UNION, UNION_PARTS, atomic, to_python_json, write_safetensors,
};
use serde_json::{Map, Value, json};

use super::names::{self, Family};
use super::{CONFIG, VERSION, WEIGHTS, head, lora, prefix, setup};
use crate::config::{ADAPTERHUB_KEYS, PEFT_TYPE};
use crate::phm::SHARED;
use crate::reft::{self, ReftConfig};

/// What AdapterHub's files say of the base model and ours may not.
#[derive(Debug, Clone)]
pub struct HubModel {
    /// `model_type` of its config.
    pub model_type: String,
    /// Its name on the hub or its folder.
    pub name: String,
}

/// Writes `adapter` as AdapterHub's package does with `use_safetensors=True`, as one folder that is there whole or not at
/// all. The adapter is called `name` in it. A class head goes into files of its own, with `labels` for its classes.
///
/// # Errors
/// A method or a setting that AdapterHub's package has not, a family whose names are not known, a module that AdapterHub's files have no place
/// for, or a disk that refuses.
pub fn write(out: &Path, adapter: &AdapterFolder, name: &str, labels: &[String], model: &HubModel) -> Result<()> {
    if name.is_empty() || name.contains('.') {
        return Err(Error::config(
            "name",
            format!("`{name}` cannot be an adapter's name: it has to have letters and no dot"),
        ));
    }
    let config = adapter.config();
    if setup::is_composed(config) {
        return setup::write_setup(out, adapter, labels, model);
    }
    let family = names::family(&model.model_type)?;
    let files = Files::of(adapter, family, name)?;
    let task = config.get("task_type").and_then(Value::as_str).unwrap_or("CAUSAL_LM");
    let about = About { hidden_size: files.hidden_size, family, model }.to_json(task);
    atomic::replace_dir(out, |dir| -> Result<()> {
        files.write_adapter(dir, &about, name)?;
        files.write_head(dir, &about, labels).map(drop)
    })
}

/// What each of the configs says of the model.
pub(super) struct About<'a> {
    pub(super) hidden_size: Option<usize>,
    pub(super) family: &'a Family,
    pub(super) model: &'a HubModel,
}

impl About<'_> {
    pub(super) fn to_json(&self, task: &str) -> Value {
        let model = self.model;
        json!({
            "hidden_size": self.hidden_size, "model_class": self.family.model_class(&model.model_type, task),
            "model_name": model.name, "model_type": model.model_type, "version": VERSION
        })
    }
}

/// What the name of a free projection ends with.
const PROJECTION: &str = ".projection.weight";

/// A key without what PEFT puts in front of a path.
pub(super) fn plain(key: &str) -> &str {
    key.strip_prefix(KEY_PREFIX).or_else(|| key.strip_prefix(SOFT_PROMPT_KEY_PREFIX)).unwrap_or(key)
}

/// The configs of the methods that an adapter is of: one, or those of a union.
fn parts(config: &AdapterConfig) -> Result<Vec<&Map<String, Value>>> {
    if config.peft_type() != UNION {
        return Ok(vec![config.map()]);
    }
    let parts = config.get(UNION_PARTS).and_then(Value::as_array);
    let parts: Option<Vec<_>> = parts.and_then(|parts| parts.iter().map(Value::as_object).collect());
    parts.ok_or_else(|| Error::config(UNION_PARTS, "is no list of configs"))
}

/// The tensors by the file that they go to, in AdapterHub's names, with the settings.
#[derive(Default)]
pub(super) struct Files {
    adapter: BTreeMap<String, Tensor>,
    head: BTreeMap<String, Tensor>,
    pub(super) hidden_size: Option<usize>,
    settings: Map<String, Value>,
}

/// What names depend on.
struct Names<'a> {
    family: &'a Family,
    /// What the adapter is called.
    name: &'a str,
    /// The layers with LoRA or (IA)³.
    lora: BTreeSet<String>,
    /// Layers with a prefix, where that is known.
    prefixes: Option<usize>,
}

impl Files {
    /// The files of `adapter`, which is called `name` in them.
    pub(super) fn of(adapter: &AdapterFolder, family: &Family, name: &str) -> Result<Self> {
        let parts = parts(adapter.config())?;
        let layers = lora::layers(adapter.keys().map(plain));
        let own = parts.iter().map(|part| settings(part, &layers, family)).collect::<Result<Vec<_>>>()?;
        let of_prefix = parts.iter().find(|part| peft_type(part) == prefix::PREFIX);
        if of_prefix.is_some() {
            prefix::check_written(adapter.dir(), adapter.contains(prefix::EMBEDDINGS))?;
        }
        let prefixes = of_prefix.and_then(|part| part.get("num_layers")?.as_u64()).map(|layers| layers as usize);
        let names = Names { family, name, lora: layers, prefixes };
        let mut files = Self { settings: union_of(own), ..Self::default() };
        for key in adapter.keys() {
            files.add(adapter, &names, key)?;
        }
        if let Some(part) = parts.iter().find(|part| peft_type(part) == reft::PEFT_TYPE) {
            let reft = ReftConfig::from_adapter_config(part)?;
            files.subtract_projections(&reft)?;
            // The package has both interventions, whether or not positions have them.
            if let ([there], false) = (reft.units().as_slice(), part.get("tied_weights") == Some(&Value::Bool(true))) {
                let unit = |number: usize| format!(".units.{number}.");
                let of_units = files.adapter.iter().filter(|(key, _)| key.contains(&unit(*there)));
                let copies: Vec<_> = of_units
                    .map(|(key, value)| (key.replace(&unit(*there), &unit(1 - there)), value.clone()))
                    .collect();
                files.adapter.extend(copies);
            }
        }
        Ok(files)
    }

    pub(super) fn write_adapter(&self, dir: &Path, about: &Value, name: &str) -> Result<()> {
        write_weights(&dir.join(WEIGHTS), &self.adapter)?;
        write_json(&dir.join(CONFIG), about, json!({"config": self.settings, "name": name}))
    }

    /// Writes the head, and says whether there is one.
    pub(super) fn write_head(&self, dir: &Path, about: &Value, labels: &[String]) -> Result<bool> {
        if self.head.is_empty() {
            return Ok(false);
        }
        write_weights(&dir.join(head::WEIGHTS), &self.head)?;
        let ids: Map<String, Value> = labels.iter().enumerate().map(|(i, label)| (label.clone(), i.into())).collect();
        let own = json!({"config": null, "label2id": ids, "name": null, "num_labels": labels.len()});
        write_json(&dir.join(head::CONFIG), about, own)?;
        Ok(true)
    }

    fn add(&mut self, adapter: &AdapterFolder, names: &Names<'_>, key: &str) -> Result<()> {
        let Names { family, name, lora, prefixes } = names;
        let (value, ours) = (adapter.tensor(key, &Device::Cpu)?, plain(key));
        let of_prefix = prefix::their_keys(family, key, name, *prefixes)?;
        if !of_prefix.is_empty() {
            // The prefix itself has one dimension there, and a gate reads the residual stream.
            let is_gate = key != prefix::EMBEDDINGS;
            if is_gate && value.rank() == 2 {
                self.hidden_size = Some(value.dim(1)?);
            }
            let value = if is_gate { value } else { value.flatten_all()? };
            self.adapter.extend(of_prefix.into_iter().map(|key| (key, value.clone())));
            return Ok(());
        }
        if let Some(theirs) = lora::their_key(lora, ours, name) {
            lora::check_written(adapter, key)?;
            let layer = ours.strip_suffix(".lora_A.weight").and_then(|layer| family.lora_layer(layer));
            if layer.is_some_and(|(kind, _)| ["q", "k", "v"].contains(&kind)) {
                self.hidden_size = value.dims().last().copied();
            }
            self.adapter.insert(theirs, value);
            return Ok(());
        }
        if ours.starts_with(SHARED) && family.body.is_empty() {
            let message = "AdapterHub's package neither stores nor reads what the adapters of such a model share";
            return Err(Error::config("shared_phm_rule", message));
        }
        if let Some(theirs) = family.their_key(ours, name) {
            if [".adapter_up.bias", ".adapter_up.b"].iter().any(|end| ours.ends_with(end)) {
                self.hidden_size = value.dims().first().copied();
            }
            if ours.ends_with(".learned_source.weight") {
                self.hidden_size = value.dims().last().copied();
            }
            let value = if ours.ends_with(".parametrizations.weight.original") { whole_signs(&value)? } else { value };
            // The norm in front has two names, as a module of its own and as the first of those that lead down.
            let (layer, _) = key.split_once(".adapter_down.0.").unwrap_or((key, ""));
            let has_norm = adapter
                .keys()
                .any(|key| key.strip_prefix(layer).is_some_and(|rest| rest.starts_with(".adapter_down.1.")));
            if has_norm && theirs.contains(".adapter_down.0.") {
                self.adapter.insert(theirs.replace(".adapter_down.0.", ".adapter_norm_before."), value.clone());
            }
            self.adapter.insert(theirs, value);
            return Ok(());
        }
        if !family.body.is_empty() && ours.starts_with(&format!("{}.", family.body)) {
            let message =
                format!("`{ours}` is trained beside the adapter, and AdapterHub's files have no place for it");
            return Err(Error::config("modules_to_save", message));
        }
        self.head.insert(ours.to_owned(), value);
        Ok(())
    }

    /// Makes a DiReFT, which the package forgets when it saves or loads one, the NoReFT that it equals: `Wh = (W + P)h − Ph`.
    fn subtract_projections(&mut self, config: &ReftConfig) -> Result<()> {
        if config.subtract {
            return Ok(());
        }
        if config.orthogonal || config.activation.is_some() {
            let message = "false is lost where AdapterHub's package loads a file, and with orthogonality or a non_linearity there is \
                           no equal adapter with true";
            return Err(Error::config("subtract_projection", message));
        }
        let projections: Vec<_> = self.adapter.keys().filter(|key| key.ends_with(PROJECTION)).cloned().collect();
        for key in projections {
            let source = key.replace(PROJECTION, ".learned_source.weight");
            if let (Some(p), Some(w)) = (self.adapter.get(&key), self.adapter.get(&source)) {
                let sum = (w + p)?;
                self.adapter.insert(source, sum);
            }
        }
        Ok(())
    }
}

/// The parametrisation of orthonormal rows with its signs as they were: PyTorch cuts them to whole numbers.
fn whole_signs(original: &Tensor) -> Result<Tensor> {
    let mut rows = original.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    for (i, row) in rows.iter_mut().enumerate() {
        row.iter_mut().skip(i).take(1).for_each(|sign| *sign = sign.signum());
    }
    Ok(Tensor::new(rows, &Device::Cpu)?)
}

fn peft_type(config: &Map<String, Value>) -> &str {
    config.get("peft_type").and_then(Value::as_str).unwrap_or("")
}

/// AdapterHub's config of several methods.
fn union_of(mut own: Vec<Map<String, Value>>) -> Map<String, Value> {
    match (own.pop(), own.is_empty()) {
        (Some(one), true) => one,
        (last, _) => {
            let configs: Vec<Value> = own.into_iter().chain(last).map(Value::Object).collect();
            Map::from_iter([("architecture".to_owned(), "union".into()), ("configs".to_owned(), configs.into())])
        }
    }
}

/// The settings that AdapterHub knows of one method; LoRA and (IA)³ are on `layers`. It takes a scaling for a constant only where
/// it is a float.
fn settings(config: &Map<String, Value>, layers: &BTreeSet<String>, family: &Family) -> Result<Map<String, Value>> {
    match peft_type(config) {
        PEFT_TYPE | reft::PEFT_TYPE => {}
        lora::LORA | lora::IA3 => return lora::theirs(config, layers, family),
        prefix::PREFIX => return prefix::theirs(config, family),
        other => {
            let message = format!(
                "is {other}; bottleneck adapters, what is made of them, ReFT, LoRA, (IA)³, prefixes and unions of these can be written as \
                 AdapterHub's"
            );
            return Err(Error::config("peft_type", message));
        }
    }
    let float = |key: &str, value: &Value| match value.as_f64() {
        Some(x) if key == "scaling" => x.into(),
        _ => value.clone(),
    };
    let is_reft = peft_type(config) == reft::PEFT_TYPE;
    let known: &[&str] = if is_reft { &reft::ADAPTERHUB_KEYS } else { &ADAPTERHUB_KEYS };
    let mut out: Map<String, Value> =
        known.iter().filter_map(|key| Some(((*key).to_owned(), float(key, config.get(*key)?)))).collect();
    if is_reft {
        out.insert("architecture".into(), "reft".into());
    }
    Ok(out)
}

pub(super) fn write_weights(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(path, tensors.iter().map(|(key, t)| (key.as_str(), t)), &metadata)
}

pub(super) fn write_json(path: &Path, about: &Value, own: Value) -> Result<()> {
    let keys: Map<String, Value> =
        [about.clone(), own].into_iter().filter_map(|v| v.as_object().cloned()).flatten().collect();
    atomic::write_file(path, to_python_json(&keys, &[]).map_err(|e| Error::msg(e.to_string()))?.as_bytes())
}
