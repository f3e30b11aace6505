//! The prediction head beside an adapter of AdapterHub's: `head_config.json` and `model_head.safetensors`.
//!
//! A head of a transformers class is stored under that class's names; one of AdapterHub's own ("flexible") heads under its
//! number in a sequence of layers. Of those, the class heads that have the same layers as a transformers class can be read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};
use peft_core::{
    BaseLayer, BaseModel, ConfigKeys, Error, Result, SafetensorsFile, StoredTensor, only_a_pickle, parameter_name,
    read_json_file,
};
use serde_json::{Map, Value};

use super::names::Family;

pub(super) const CONFIG: &str = "head_config.json";
pub(super) const WEIGHTS: &str = "model_head.safetensors";
const PICKLE: &str = "pytorch_model_head.bin";

/// The head's tensors by our keys, and the modules that they belong to.
#[derive(Default)]
pub(super) struct Head {
    pub(super) tensors: BTreeMap<String, StoredTensor>,
    pub(super) modules: BTreeSet<String>,
}

/// The head in `dir`, empty where there is none. An output layer that is just that of `base` is left out.
pub(super) fn read(dir: &Path, family: &Family, base: Option<&dyn BaseModel>) -> Result<Head> {
    let (config, path) = (dir.join(CONFIG), dir.join(WEIGHTS));
    let Some(keys) = read_json_file(&config)? else {
        let stray = [WEIGHTS, PICKLE].into_iter().find(|file| dir.join(file).exists());
        return stray.map_or(Ok(Head::default()), |file| Err(Error::file(dir, format!("has {file} and no {CONFIG}"))));
    };
    if !path.exists() {
        if dir.join(PICKLE).exists() {
            return Err(only_a_pickle(dir, PICKLE, WEIGHTS));
        }
        return Err(Error::file(dir, format!("has {CONFIG} and no {WEIGHTS}")));
    }
    let layers = flexible(&keys, family).map_err(|e| Error::file(&config, e.to_string()))?;
    let file = Arc::new(SafetensorsFile::open(&path)?);
    let mut head = Head::default();
    for name in file.names() {
        let ours = match &layers {
            None => name.to_owned(),
            Some(layers) => layers
                .iter()
                .find_map(|(theirs, ours)| Some(format!("{ours}{}", name.strip_prefix(theirs)?)))
                .ok_or_else(|| Error::file(&path, format!("holds `{name}`, which {CONFIG} does not tell of")))?,
        };
        let (module, _) = ours.rsplit_once('.').unwrap_or((&ours, ""));
        if base.map_or(Ok(false), |base| is_the_bases(base, module, &file, name))? {
            continue;
        }
        // As PEFT has it: the classifier as a whole.
        let whole = if layers.is_some() { module } else { module.split('.').next().unwrap_or(module) };
        head.modules.insert(whole.to_owned());
        head.tensors
            .insert(parameter_name(module, ours.rsplit('.').next().unwrap_or("")), (file.clone(), name.to_owned()));
    }
    Ok(head)
}

/// Names of the classes of the head in `dir` by their number, where it is one for classes.
///
/// # Errors
/// A config that cannot be read.
pub(super) fn labels(dir: &Path) -> Result<Option<Vec<String>>> {
    let Some(keys) = read_json_file(&dir.join(CONFIG))? else { return Ok(None) };
    let of_class =
        keys.get("model_class").and_then(Value::as_str).is_some_and(|c| c.ends_with("ForSequenceClassification"));
    let flexible = keys.get("config").and_then(Value::as_object);
    let ids = match flexible {
        Some(own) => own.get("label2id"),
        None if of_class => keys.get("label2id"),
        None => None,
    };
    let Some(ids) = ids.and_then(Value::as_object) else { return Ok(None) };
    let mut by_id: Vec<(u64, String)> =
        ids.iter().filter_map(|(name, id)| Some((id.as_u64()?, name.clone()))).collect();
    by_id.sort();
    let complete = by_id.len() == ids.len() && by_id.iter().zip(0..).all(|((id, _), n)| *id == n);
    Ok(complete.then(|| by_id.into_iter().map(|(_, name)| name).collect()))
}

/// The layers of a flexible head: what their keys begin with, and their paths in the transformers class. `None` for a head of
/// such a class.
fn flexible(keys: &Map<String, Value>, family: &Family) -> Result<Option<Vec<(String, &'static str)>>> {
    let Some(Value::Object(own)) = keys.get("config") else { return Ok(None) };
    let settings = ConfigKeys(own);
    let kind = settings.text("head_type")?.unwrap_or("");
    let without = "; take the head's two files out of the folder to use the adapter without it";
    if kind != "classification" {
        return Err(Error::config("head_type", format!("a head for `{kind}` is not supported{without}")));
    }
    let depth = settings.count("layers", 16)?.unwrap_or(2);
    let activation = settings.text("activation_function")?;
    let pooled = settings.flag("use_pooler", false)?;
    let paths = family.class_head;
    // The pooler is a layer of its own in BERT's model, so that one layer behind it and two layers are different heads.
    let wanted: &[&'static str] = match paths {
        [_, last @ ..] if pooled && depth == 1 && family.body == "bert" => last,
        _ if !pooled => paths,
        _ => &[],
    };
    let fits = depth == wanted.len() && (depth == 1 || activation == family.head_activation);
    if !fits {
        let message = format!(
            "a head of {depth} layers with activation {} and use_pooler = {pooled} is none that transformers has for this model{without}",
            activation.unwrap_or("null")
        );
        return Err(Error::config("layers", message));
    }
    let name = keys.get("name").and_then(Value::as_str).unwrap_or("");
    // In front of each linear layer stands dropout, behind each but the last the activation.
    let step = if activation.is_some() { 3 } else { 2 };
    Ok(Some(wanted.iter().enumerate().map(|(i, path)| (format!("heads.{name}.{}", 1 + step * i), *path)).collect()))
}

/// Whether `name` of `file` is the weight of the base's own output layer, which AdapterHub stores with every adapter.
fn is_the_bases(base: &dyn BaseModel, module: &str, file: &SafetensorsFile, name: &str) -> Result<bool> {
    let Some(site) = base.sites().find(module).filter(|site| site.is_output_head) else { return Ok(false) };
    let (BaseLayer::Linear(layer), true) = (base.layer(site.id)?, name.ends_with(".weight")) else { return Ok(false) };
    let own = layer.weight().to_dense(DType::F32)?.to_device(&Device::Cpu)?;
    let theirs = file.tensor_as(name, DType::F32, &Device::Cpu)?;
    Ok(own.dims() == theirs.dims() && own.ne(&theirs)?.max_all()?.to_scalar::<u8>()? == 0)
}
