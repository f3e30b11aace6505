//! AdapterHub's files of adapters that are put together, both ways: the folder of an "adapter setup" (`save_adapter_setup`), which
//! has `adapter_setup.json` and a folder for each adapter and for the fusion; or the folder of a fusion (`save_adapter_fusion`), with
//! the folders of its adapters beside it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use peft_core::{
    AdapterConfig, AdapterFolder, BaseModel, Context, Error, Result, SafetensorsFile, atomic, only_a_pickle,
    read_json_file,
};
use serde_json::{Map, Value, json};

use super::names::{self, Family};
use super::write::{About, write_json, write_weights};
use super::{HubModel, VERSION, head, read, write};
use crate::compose::{FUSION_KEYS, Kind, PEFT_TYPES, SETUP, Setup, fusion_settings};
use crate::config::PEFT_TYPE as BOTTLENECK;

const SETUP_CONFIG: &str = "adapter_setup.json";
const FUSION_CONFIG: &str = "adapter_fusion_config.json";
const FUSION_WEIGHTS: &str = "model_adapter_fusion.safetensors";
const FUSION_PICKLE: &str = "pytorch_model_adapter_fusion.bin";
/// What stands in AdapterHub's names before that of the fusion.
const FUSION_LAYER: &str = ".adapter_fusion_layer.";

/// Whether `dir` holds adapters that are put together.
#[must_use]
pub fn is_setup(dir: &Path) -> bool {
    [SETUP_CONFIG, FUSION_CONFIG].iter().any(|file| dir.join(file).is_file())
}

/// Whether a config is one of such adapters.
pub(super) fn is_composed(config: &AdapterConfig) -> bool {
    PEFT_TYPES.contains(&config.peft_type())
}

/// Where things lie in a folder of adapters that are put together.
struct Places {
    setup: Setup,
    /// What the adapters' folders are in.
    adapters: PathBuf,
    fusion: Option<(PathBuf, Map<String, Value>)>,
    /// Where a class head may be, the first that has one.
    heads: Vec<PathBuf>,
}

impl Places {
    fn find(dir: &Path) -> Result<Self> {
        let (in_setup, file) = (dir.join(SETUP_CONFIG), dir.join(FUSION_CONFIG));
        let (setup, adapters) = match read_json_file(&in_setup)? {
            Some(keys) => {
                let setup = keys.get("adapter_setup").unwrap_or(&Value::Null);
                let setup = Setup::from_json(setup).with_context(|| in_setup.display().to_string())?;
                (setup, dir.to_owned())
            }
            None => {
                let keys = fusion_config(dir)?;
                let setup = fused(&keys).with_context(|| file.display().to_string())?;
                let beside = std::path::absolute(dir).map_err(|e| Error::io(dir, e))?;
                (setup, beside.parent().unwrap_or(dir).to_owned())
            }
        };
        // They come from a file and become paths.
        if let Some(name) = setup.names().into_iter().find(|name| !is_folder_name(name)) {
            return Err(Error::file(dir, format!("names an adapter `{name}`, which cannot be the name of a folder")));
        }
        let fusion = match setup.fusion_name() {
            None => None,
            Some(_) if adapters.as_path() != dir => Some(dir.to_owned()),
            Some(name) => Some(dir.join(name)),
        };
        let fusion = fusion.map(|dir| Ok::<_, Error>((dir.clone(), fusion_config(&dir)?))).transpose()?;
        let mut heads = vec![dir.to_owned()];
        heads.extend(fusion.iter().map(|(dir, _)| dir.clone()));
        heads.extend(setup.names().iter().rev().map(|name| adapters.join(name)));
        Ok(Self { setup, adapters, fusion, heads })
    }

    fn head(&self) -> Option<&Path> {
        self.heads.iter().find(|dir| dir.join(head::CONFIG).is_file()).map(PathBuf::as_path)
    }
}

fn is_folder_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\'])
}

fn fusion_config(dir: &Path) -> Result<Map<String, Value>> {
    let missing = || Error::file(dir, format!("has no {FUSION_CONFIG}, which the fusion of its adapters would have"));
    read_json_file(&dir.join(FUSION_CONFIG))?.ok_or_else(missing)
}

/// The setup of a fusion by its own config.
fn fused(keys: &Map<String, Value>) -> Result<Setup> {
    let names = keys.get("adapter_names").or_else(|| keys.get("name"));
    let names: Option<Vec<&str>> = match names {
        Some(Value::String(names)) => Some(names.split(',').collect()),
        Some(Value::Array(list)) => list.iter().map(Value::as_str).collect(),
        _ => None,
    };
    let Some(names) = names else {
        return Err(Error::config("adapter_names", "is missing: it has the names of the adapters"));
    };
    let children: Vec<Value> = names.iter().map(|name| json!({"type": "single", "children": [name]})).collect();
    Setup::from_json(&json!({"type": "Fuse", "children": children}))
}

/// Names of the classes of the head beside such adapters.
pub(super) fn labels(dir: &Path) -> Result<Option<Vec<String>>> {
    Places::find(dir)?.head().map_or(Ok(None), head::labels)
}

/// Opens a folder of adapters that are put together under our names.
pub(super) fn open(dir: &Path, base: Option<&dyn BaseModel>) -> Result<AdapterFolder> {
    let places = Places::find(dir)?;
    let mut config = Map::new();
    let (mut list, mut parts, mut family) = (Vec::new(), Vec::new(), None);
    for name in places.setup.names() {
        let folder = places.adapters.join(name);
        if !folder.is_dir() {
            let message = format!(
                "is put together of adapters of which `{name}` is missing: its folder would be {}",
                folder.display()
            );
            return Err(Error::file(dir, message));
        }
        let (part, of_model, saved_as) = read::open_named(&folder, None)?;
        if part.config().peft_type() != BOTTLENECK {
            let message =
                format!("is {}, and only bottleneck adapters can be put together here", part.config().peft_type());
            return Err(Error::file(&folder, message));
        }
        family = family.or(Some(of_model));
        let mut own = part.config().map().clone();
        for key in ["task_type", "base_model_name_or_path"] {
            config.insert(key.into(), own.get(key).cloned().unwrap_or(Value::Null));
        }
        own.insert("modules_to_save".into(), Value::Null);
        list.push(json!({"name": name, "config": own, "trained": false}));
        let is_adapters = |key: &str| of_model.their_key(write::plain(key), &saved_as).is_some();
        let renamed = |key: &str| {
            let tensor = bottleneck_tensor(write::plain(key), of_model)?;
            is_adapters(key)
                .then(|| key.strip_suffix(tensor).map(|layer| format!("{layer}adapters.{name}.{tensor}")))?
        };
        parts.push(part.part(part.config().clone(), renamed));
    }
    let Some(family) = family else { return Err(Error::file(dir, "holds no adapter")) };
    let kind = if let Some((folder, keys)) = &places.fusion {
        config.extend(settings(keys).with_context(|| folder.join(FUSION_CONFIG).display().to_string())?);
        parts.push(fusion_tensors(folder, keys, family)?);
        Kind::Fusion
    } else {
        Kind::Composition
    };
    config.insert("peft_type".into(), kind.peft_type().into());
    config.insert(SETUP.into(), places.setup.to_json());
    config.insert("adapters".into(), list.into());
    if let Some(folder) = places.head() {
        let head = head::read(folder, family, base)?;
        if !head.modules.is_empty() {
            config.insert("modules_to_save".into(), head.modules.into_iter().collect::<Vec<_>>().into());
            let file = head.tensors.values().next().map(|(file, _)| file.clone());
            let file = file.ok_or_else(|| Error::file(folder, "has a head without tensors"))?;
            parts.push(AdapterFolder::foreign(folder, placeholder()?, file, head.tensors));
        }
    }
    AdapterFolder::joined(dir, AdapterConfig::new(config)?, parts)
}

/// A config for tensors that are a part of something.
fn placeholder() -> Result<AdapterConfig> {
    AdapterConfig::new(Map::from_iter([("peft_type".to_owned(), PEFT_TYPES[0].into())]))
}

/// The name of a bottleneck's tensor, behind the layer's.
fn bottleneck_tensor<'a>(key: &'a str, family: &Family) -> Option<&'a str> {
    let theirs = family.their_key(key, "x")?;
    let (_, tensor) = theirs.split_once(".adapters.x.")?;
    key.ends_with(tensor).then(|| &key[key.len() - tensor.len()..])
}

/// Our settings of a fusion.
fn settings(keys: &Map<String, Value>) -> Result<Map<String, Value>> {
    match keys.get("config") {
        Some(Value::String(preset)) if ["dynamic", "static"].contains(&preset.as_str()) => Ok(fusion_settings(preset)),
        Some(Value::Object(own)) => {
            if let Some(key) = own.keys().find(|key| !FUSION_KEYS.contains(&key.as_str())) {
                return Err(Error::config(key, "is not a setting of a fusion that is known here"));
            }
            Ok(own.clone())
        }
        _ => Err(Error::config("config", "is neither a table nor one of dynamic, static")),
    }
}

fn fusion_tensors(dir: &Path, keys: &Map<String, Value>, family: &Family) -> Result<AdapterFolder> {
    let path = dir.join(FUSION_WEIGHTS);
    if !path.exists() {
        if dir.join(FUSION_PICKLE).exists() {
            return Err(only_a_pickle(dir, FUSION_PICKLE, FUSION_WEIGHTS));
        }
        return Err(Error::file(dir, format!("has {FUSION_CONFIG} and no {FUSION_WEIGHTS}")));
    }
    let file = Arc::new(SafetensorsFile::open(&path)?);
    let name = keys.get("name").and_then(Value::as_str).unwrap_or("");
    let ours = |theirs: &str| {
        let (module, tensor) = theirs.split_once(&format!("{FUSION_LAYER}{name}."))?;
        family.our_key(&format!("{module}.adapters.x.fusion.{tensor}"), "x")
    };
    let mut tensors = std::collections::BTreeMap::new();
    for theirs in file.names() {
        let key = ours(theirs).ok_or_else(|| {
            Error::file(&path, format!("holds `{theirs}`, which is no tensor of the fusion `{name}`"))
        })?;
        let (layer, tensor) = key.split_once(".fusion.").unwrap_or((&key, ""));
        let key = peft_core::parameter_name(layer, &format!("fusion.{tensor}"));
        tensors.insert(key, (file.clone(), theirs.to_owned()));
    }
    Ok(AdapterFolder::foreign(dir, placeholder()?, file, tensors))
}

/// Writes adapters that are put together as AdapterHub's `save_adapter_setup` does.
pub(super) fn write_setup(out: &Path, adapter: &AdapterFolder, labels: &[String], model: &HubModel) -> Result<()> {
    let family = names::family(&model.model_type)?;
    let setup = Setup::from_json(adapter.config().get(SETUP).unwrap_or(&Value::Null))?;
    let keys = |part: &Value| Some((part.get("name")?.as_str()?.to_owned(), part.get("config")?.as_object()?.clone()));
    let list = adapter.config().get("adapters").and_then(Value::as_array).cloned().unwrap_or_default();
    let Some(list) = list.iter().map(keys).collect::<Option<Vec<_>>>() else {
        return Err(Error::config("adapters", "does not have the names and configs of the parts"));
    };
    let mut parts = Vec::new();
    for (name, mut config) in list {
        if !is_folder_name(&name) {
            return Err(Error::config("adapters", format!("`{name}` cannot be the name of a folder")));
        }
        config.insert("task_type".into(), adapter.config().get("task_type").cloned().unwrap_or(Value::Null));
        let infix = format!(".adapters.{name}.");
        let part =
            adapter.part(AdapterConfig::new(config)?, |key| key.contains(&infix).then(|| key.replacen(&infix, ".", 1)));
        parts.push((name.clone(), write::Files::of(&part, family, &name)?));
    }
    let is_head = |key: &str| !key.contains(".adapters.") && !is_of_fusion(key);
    let of_part = Map::from_iter([("peft_type".to_owned(), BOTTLENECK.into())]);
    let head = adapter.part(AdapterConfig::new(of_part)?, |key| is_head(key).then(|| key.to_owned()));
    let head = write::Files::of(&head, family, "head")?;
    let about = About { hidden_size: parts.iter().find_map(|(_, files)| files.hidden_size), family, model };
    let task = adapter.config().get("task_type").and_then(Value::as_str).unwrap_or("CAUSAL_LM").to_owned();
    let about = about.to_json(&task);
    let fusion = match setup.fusion_name() {
        None => None,
        Some(name) => Some((fused_tensors(adapter, family, &name)?, name)),
    };
    atomic::replace_dir(out, |dir| -> Result<()> {
        for (name, files) in &parts {
            let dir = dir.join(name);
            std::fs::create_dir(&dir).map_err(|e| Error::write(&dir, e))?;
            files.write_adapter(&dir, &about, name)?;
        }
        if let Some((tensors, name)) = &fusion {
            let dir = dir.join(name);
            std::fs::create_dir(&dir).map_err(|e| Error::write(&dir, e))?;
            write_weights(&dir.join(FUSION_WEIGHTS), tensors)?;
            let given = |key: &str| adapter.config().map().get(key).cloned().unwrap_or(Value::Null);
            let own: Map<String, Value> = FUSION_KEYS.iter().map(|key| ((*key).to_owned(), given(key))).collect();
            let members: Vec<&str> = name.split(',').collect();
            write_json(
                &dir.join(FUSION_CONFIG),
                &about,
                json!({"adapter_names": members, "config": own, "name": name}),
            )?;
        }
        let has_head = head.write_head(dir, &about, labels)?;
        let head_setup = if has_head { Value::Bool(true) } else { Value::Null };
        let own = json!({"adapter_setup": setup.to_json(), "head_setup": head_setup, "version": VERSION});
        write_json(&dir.join(SETUP_CONFIG), &own, json!({}))
    })
}

/// Whether one of our keys is of the fusion and not of a part, which may be called so.
fn is_of_fusion(key: &str) -> bool {
    key.contains(".fusion.") && !key.contains(".adapters.")
}

fn fused_tensors(
    adapter: &AdapterFolder,
    family: &Family,
    name: &str,
) -> Result<std::collections::BTreeMap<String, candle_core::Tensor>> {
    let mut tensors = std::collections::BTreeMap::new();
    for key in adapter.keys().filter(|key| is_of_fusion(key)) {
        let theirs = family
            .their_key(write::plain(key), "x")
            .map(|theirs| theirs.replacen(".adapters.x.fusion.", &format!("{FUSION_LAYER}{name}."), 1));
        let theirs =
            theirs.ok_or_else(|| Error::config("fusion", format!("`{key}` has no place in AdapterHub's files")))?;
        tensors.insert(theirs, adapter.tensor(key, &candle_core::Device::Cpu)?);
    }
    Ok(tensors)
}
