//! From an adapter's files to a folder that AdapterHub's package loads.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use peft_core::{AdapterFolder, Error, Result, atomic, to_python_json, write_safetensors};
use serde_json::{Map, Value, json};

use super::names::{self, Family};
use super::{CONFIG, VERSION, WEIGHTS, head, setup};
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
/// Another method than bottleneck adapters, a family whose names are not known, a module that AdapterHub's files have no place
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
    if ![PEFT_TYPE, reft::PEFT_TYPE].contains(&config.peft_type()) {
        let other = config.peft_type();
        let message =
            format!("is {other}; bottleneck adapters, what is made of them, and ReFT can be written as AdapterHub's");
        return Err(Error::config("peft_type", message));
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
    key.strip_prefix("base_model.model.").unwrap_or(key)
}

/// The tensors by the file that they go to, in AdapterHub's names, with the settings.
#[derive(Default)]
pub(super) struct Files {
    adapter: BTreeMap<String, Tensor>,
    head: BTreeMap<String, Tensor>,
    pub(super) hidden_size: Option<usize>,
    settings: Map<String, Value>,
}

impl Files {
    /// The files of `adapter`, which is called `name` in them.
    pub(super) fn of(adapter: &AdapterFolder, family: &Family, name: &str) -> Result<Self> {
        let config = adapter.config();
        let mut files = Self { settings: settings(config.map()), ..Self::default() };
        for key in adapter.keys() {
            files.add(adapter, family, key, name)?;
        }
        if config.peft_type() == reft::PEFT_TYPE {
            let reft = ReftConfig::from_adapter_config(config.map())?;
            files.subtract_projections(&reft)?;
            // The package has both interventions, whether or not positions have them.
            if let ([there], false) = (reft.units().as_slice(), config.get("tied_weights") == Some(&Value::Bool(true)))
            {
                let unit = |number: usize| format!(".units.{number}.");
                let copies: Vec<_> = files
                    .adapter
                    .iter()
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

    fn add(&mut self, adapter: &AdapterFolder, family: &Family, key: &str, name: &str) -> Result<()> {
        let (value, ours) = (adapter.tensor(key, &Device::Cpu)?, plain(key));
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
            let has_norm = adapter.config().get("ln_before") == Some(&Value::Bool(true));
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

/// The settings that AdapterHub knows. It takes a scaling for a constant only where it is a float.
fn settings(config: &Map<String, Value>) -> Map<String, Value> {
    let float = |key: &str, value: &Value| match value.as_f64() {
        Some(x) if key == "scaling" => x.into(),
        _ => value.clone(),
    };
    let is_reft = config.get("peft_type").and_then(Value::as_str) == Some(reft::PEFT_TYPE);
    let known: &[&str] = if is_reft { &reft::ADAPTERHUB_KEYS } else { &ADAPTERHUB_KEYS };
    let mut out: Map<String, Value> =
        known.iter().filter_map(|key| Some(((*key).to_owned(), float(key, config.get(*key)?)))).collect();
    if is_reft {
        out.insert("architecture".into(), "reft".into());
    }
    out
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
