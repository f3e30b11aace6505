//! From a folder of AdapterHub's to the config and the names that we have for the adapter.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};
use peft_core::{
    AdapterConfig, AdapterFolder, BaseModel, Context, Error, Result, SafetensorsFile, StoredTensor, only_a_pickle,
    parameter_name, read_keys,
};
use serde_json::{Map, Value};

use super::names::{self, Family};
use super::{CONFIG, PICKLE, WEIGHTS, head, setup};
use crate::config::BottleneckConfig;
use crate::reft::{self, ReftConfig};

/// What older versions called the modules (`legacy_weights_mapping` in `adapters/loading.py`).
const OLD_MODULES: [&str; 4] = [
    "attention_text_task_adapters",
    "attention_text_lang_adapters",
    "layer_text_task_adapters",
    "layer_text_lang_adapters",
];

/// Opens an AdapterHub folder under our names. With a `base`, an output layer stored beside the adapter that is just the
/// base's is left out.
///
/// # Errors
/// Weights in a pickle alone (the message has the command that converts them), an adapter of a method or for a family that is
/// not read, a setting that is not supported, or a tensor that belongs to nothing.
pub fn open(dir: &Path, base: Option<&dyn BaseModel>) -> Result<AdapterFolder> {
    if setup::is_setup(dir) {
        return setup::open(dir, base);
    }
    Ok(open_named(dir, base)?.0)
}

/// One adapter, with the family that its names are of and what it is called in them.
pub(super) fn open_named(dir: &Path, base: Option<&dyn BaseModel>) -> Result<(AdapterFolder, &'static Family, String)> {
    let keys = read_keys(dir)?;
    let in_config = || dir.join(CONFIG).display().to_string();
    let text = |key: &str| keys.get(key).and_then(Value::as_str).unwrap_or("");
    let family = names::family(text("model_type")).with_context(in_config)?;
    let mut config = settings(&keys).with_context(in_config)?;

    let path = dir.join(WEIGHTS);
    if !path.exists() {
        if dir.join(PICKLE).exists() {
            return Err(only_a_pickle(dir, PICKLE, WEIGHTS));
        }
        return Err(Error::file(dir, format!("has {CONFIG} and no {WEIGHTS}")));
    }
    let file = Arc::new(SafetensorsFile::open(&path)?);
    // Of interventions that no position has, which the package makes and stores all the same, nothing is kept.
    let is_reft = config.get("peft_type").and_then(Value::as_str) == Some(reft::PEFT_TYPE);
    let units = is_reft.then(|| ReftConfig::from_adapter_config(&config)).transpose()?.map(|config| config.units());
    let mut tensors: BTreeMap<String, StoredTensor> = BTreeMap::new();
    for name in file.names() {
        let now = OLD_MODULES.iter().fold(name.to_owned(), |key, old| key.replace(old, "adapters"));
        let ours = family.our_key(&now, text("name")).ok_or_else(|| {
            let message = format!("holds `{name}`, which is no tensor of the adapter `{}`", text("name"));
            Error::file(&path, message)
        })?;
        if units.as_ref().is_some_and(|units| !units.iter().any(|unit| ours.contains(&format!(".units.{unit}.")))) {
            continue;
        }
        if ours.ends_with(".parametrizations.weight.original") {
            check_signs(&file, name)?;
        }
        // The same norm is there under two names.
        let ours = ours.replace(".adapter_norm_before.", ".adapter_down.0.");
        let (layer, tensor) = split(&ours);
        let before = tensors.insert(parameter_name(layer, tensor), (file.clone(), name.to_owned()));
        let is_norm = |name: &str| name.contains(".adapter_norm_before.");
        if let Some((_, other)) = before.filter(|(_, other)| is_norm(other) == is_norm(name)) {
            let message = format!("holds the same tensor twice, as `{other}` and as `{name}`; remove one of them");
            return Err(Error::file(&path, message));
        }
    }

    let head = head::read(dir, family, base)?;
    tensors.extend(head.tensors);
    if !head.modules.is_empty() {
        config.insert("modules_to_save".into(), head.modules.into_iter().collect::<Vec<_>>().into());
    }
    Ok((AdapterFolder::foreign(dir, AdapterConfig::new(config)?, file, tensors), family, text("name").to_owned()))
}

/// Refuses an orthogonal parametrisation whose signs are none. PyTorch cuts them to whole numbers, so that a run with weight
/// decay makes its projection zero.
fn check_signs(file: &SafetensorsFile, name: &str) -> Result<()> {
    let original = file.tensor_as(name, DType::F32, &Device::Cpu)?;
    let rows = if original.rank() == 2 { original.to_vec2::<f32>()? } else { Vec::new() };
    if rows.iter().enumerate().any(|(i, row)| row.get(i).is_some_and(|sign| sign.abs() != 1.0)) {
        let message = format!(
            "`{name}` has other numbers than 1 and -1 on its diagonal, which weight decay has moved: to PyTorch the projection is \
             zero; train it again with weight decay 0"
        );
        return Err(Error::file(file.path(), message));
    }
    Ok(())
}

/// `a.b` and `c` for `a.b.c`.
fn split(key: &str) -> (&str, &str) {
    key.rsplit_once('.').unwrap_or((key, ""))
}

/// Our config for what AdapterHub's `adapter_config.json` says.
fn settings(keys: &Map<String, Value>) -> Result<Map<String, Value>> {
    let mut own = match keys.get("config") {
        Some(Value::Object(own)) => {
            let mut own = own.clone();
            // A table is a `BnConfig`, with this default; a recipe without a preset is a `seq_bn`.
            own.entry("original_ln_before").or_insert(false.into());
            own
        }
        Some(Value::String(preset)) => [("preset".to_owned(), preset.clone().into())].into_iter().collect(),
        _ => return Err(Error::config("config", "is neither a table nor the name of a preset")),
    };
    let mut is_reft = own.get("preset").and_then(Value::as_str).is_some_and(|preset| preset.ends_with("reft"));
    match own.remove("architecture") {
        None | Some(Value::Null) => {}
        Some(Value::String(name)) if name == "bottleneck" => {}
        Some(Value::String(name)) if name == "reft" => is_reft = true,
        Some(other) => {
            let message = format!(
                "{other} is a method whose AdapterHub files are not read here; those of bottleneck adapters and of ReFT are"
            );
            return Err(Error::config("architecture", message));
        }
    }
    if !keys.contains_key("version") {
        rename_old_activation(&mut own);
    }
    let is_task = keys.get("type").and_then(Value::as_str) == Some("text_task");
    forget_what_says_nothing(&mut own, is_task);
    let class = keys.get("model_class").and_then(Value::as_str).unwrap_or("");
    let task = if class.ends_with("ForSequenceClassification") {
        "SEQ_CLS"
    } else if class.ends_with("ForConditionalGeneration") {
        "SEQ_2_SEQ_LM"
    } else {
        "CAUSAL_LM"
    };
    own.insert("task_type".into(), task.into());
    let base = keys.get("model_name").and_then(Value::as_str).filter(|name| !name.is_empty());
    own.insert("base_model_name_or_path".into(), base.map_or(Value::Null, Into::into));
    if is_reft {
        own.remove("original_ln_before");
        return Ok(ReftConfig::from_recipe(&own)?.to_adapter_config());
    }
    Ok(BottleneckConfig::from_recipe(&own)?.to_adapter_config())
}

/// Takes out what does not change what is stored: the seed of a start that is over, settings of the first versions' fusion, and
/// an invertible adapter that first versions named beside an adapter of a task and did not store (`_fix_legacy_config` in
/// `adapters/loading.py`).
fn forget_what_says_nothing(own: &mut Map<String, Value>, is_task: bool) {
    for key in ["init_weights_seed", "attention_type", "new_attention_norm"] {
        own.remove(key);
    }
    let block = own.remove("invertible_adapter").and_then(|block| block.get("block_type").cloned());
    if is_task {
        own.remove("inv_adapter");
    } else if let Some(block) = block {
        own.insert("inv_adapter".into(), block);
    }
}

/// Before files had a version, `gelu` was the approximation (`ACTIVATION_RENAME` in `adapters/utils.py`).
fn rename_old_activation(own: &mut Map<String, Value>) {
    if let Some(Value::String(name)) = own.get_mut("non_linearity") {
        *name = match name.as_str() {
            "gelu" => "gelu_new".to_owned(),
            "gelu_orig" => "gelu".to_owned(),
            _ => return,
        };
    }
}
