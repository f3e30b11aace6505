//! From a folder of AdapterHub's to the config and the names that we have for the adapter.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};
use peft_core::adapter_keys::{KEY_PREFIX, SOFT_PROMPT_KEY_PREFIX};
use peft_core::config_keys::peft_defaults;
use peft_core::{
    AdapterConfig, AdapterFolder, BaseModel, Context, Error, Result, SafetensorsFile, StoredTensor, UNION, UNION_PARTS,
    only_a_pickle, parameter_name, read_keys,
};
use serde_json::{Map, Value, json};

use super::names::{self, Family};
use super::prefix::{self, PREFIX, Taken};
use super::{CONFIG, PICKLE, WEIGHTS, head, lora, setup};
use crate::config::BottleneckConfig;
use crate::reft::{self, ReftConfig};

/// What older versions called the modules (`legacy_weights_mapping` in `adapters/loading.py`).
const OLD_MODULES: [&str; 4] = [
    "attention_text_task_adapters",
    "attention_text_lang_adapters",
    "layer_text_task_adapters",
    "layer_text_lang_adapters",
];

/// The key that says which method it is, and the one that stands for the name of a preset in a recipe.
const ARCHITECTURE: &str = "architecture";
const PRESET: &str = "preset";

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
    let (is_union, mut parts) = parts(&keys).with_context(in_config)?;

    let path = dir.join(WEIGHTS);
    if !path.exists() {
        if dir.join(PICKLE).exists() {
            return Err(only_a_pickle(dir, PICKLE, WEIGHTS));
        }
        return Err(Error::file(dir, format!("has {CONFIG} and no {WEIGHTS}")));
    }
    let file = Arc::new(SafetensorsFile::open(&path)?);
    let name = text("name");
    // Of interventions that no position has, which the package makes and stores all the same, nothing is kept.
    let units = parts.iter().find(|part| part.is(reft::PEFT_TYPE));
    let units = units.map(|part| ReftConfig::from_adapter_config(&part.ours)).transpose()?.map(|config| config.units());
    let [has_lora, scales, has_prefix] = [lora::LORA, lora::IA3, PREFIX].map(|t| parts.iter().any(|part| part.is(t)));
    let (mut layers, mut of_prefix) = (BTreeSet::new(), prefix::Found::default());
    let mut tensors: BTreeMap<String, StoredTensor> = BTreeMap::new();
    for stored in file.names() {
        let now = OLD_MODULES.iter().fold(stored.to_owned(), |key, old| key.replace(old, "adapters"));
        let taken =
            if has_prefix { of_prefix.take(family, &now, stored, name).with_context(in_config)? } else { Taken::No };
        let ours = match taken {
            Taken::Prefix => continue,
            Taken::Gate(ours) => {
                tensors.insert(ours, (file.clone(), stored.to_owned()));
                continue;
            }
            Taken::No => {
                let of_layer = (has_lora || scales).then(|| lora::our_tensor(family, &now, name, scales)).flatten();
                of_layer.map(|(layer, tensor)| {
                    let key = format!("{layer}.{tensor}");
                    layers.insert(layer);
                    key
                })
            }
        };
        let ours = ours.or_else(|| family.our_key(&now, name)).ok_or_else(|| {
            let message = match now.contains(".c_attn.loras.") {
                true => format!("holds `{stored}`, a LoRA of several matrices in one, which is not read here"),
                false => format!("holds `{stored}`, which is no tensor of the adapter `{name}`"),
            };
            Error::file(&path, message)
        })?;
        if units.as_ref().is_some_and(|units| {
            ours.contains(".units.") && !units.iter().any(|unit| ours.contains(&format!(".units.{unit}.")))
        }) {
            continue;
        }
        if ours.ends_with(".parametrizations.weight.original") {
            check_signs(&file, stored)?;
        }
        // The same norm is there under two names.
        let ours = ours.replace(".adapter_norm_before.", ".adapter_down.0.");
        let (layer, tensor) = split(&ours);
        let before = tensors.insert(parameter_name(layer, tensor), (file.clone(), stored.to_owned()));
        let is_norm = |name: &str| name.contains(".adapter_norm_before.");
        if let Some((_, other)) = before.filter(|(_, other)| is_norm(other) == is_norm(stored)) {
            let message = format!("holds the same tensor twice, as `{other}` and as `{stored}`; remove one of them");
            return Err(Error::file(&path, message));
        }
    }
    let mut made = BTreeMap::new();
    for part in &mut parts {
        if part.is(lora::LORA) || part.is(lora::IA3) {
            part.ours.insert("target_modules".into(), layers.iter().cloned().collect::<Vec<_>>().into());
        }
        if part.is(PREFIX) {
            let embeddings = of_prefix.embeddings(&file, &part.theirs).with_context(in_config)?;
            made.insert(prefix::EMBEDDINGS.to_owned(), embeddings);
            if let Some(layers) = of_prefix.layers() {
                part.ours.insert("num_layers".into(), layers.into());
            }
        }
    }

    let head = head::read(dir, family, base)?;
    // Beside virtual tokens, PEFT calls the modules that are saved whole otherwise: so they go with another part where there is one.
    let with_head = parts.iter().position(|part| !part.is(PREFIX)).unwrap_or(0);
    let renamed = |key: String| match parts.get(with_head).is_some_and(|part| part.is(PREFIX)) {
        true => key.replacen(KEY_PREFIX, SOFT_PROMPT_KEY_PREFIX, 1),
        false => key,
    };
    tensors.extend(head.tensors.into_iter().map(|(key, tensor)| (renamed(key), tensor)));
    if let Some(part) = parts.get_mut(with_head).filter(|_| !head.modules.is_empty()) {
        part.ours.insert("modules_to_save".into(), head.modules.into_iter().collect::<Vec<_>>().into());
    }
    let config = AdapterConfig::new(joined(parts, is_union))?;
    let folders = vec![
        AdapterFolder::foreign(dir, config.clone(), file.clone(), tensors),
        AdapterFolder::converted(dir, config.clone(), file, made),
    ];
    Ok((AdapterFolder::joined(dir, config, folders)?, family, name.to_owned()))
}

/// One config for the methods of a file. What PEFT's files of a method have no place for is a union of one.
fn joined(mut parts: Vec<Part>, is_union: bool) -> Map<String, Value> {
    let beyond_peft = |part: &Part| part.is(PREFIX) || (part.is(lora::LORA) && part.ours.contains_key("use_gating"));
    if !is_union && !parts.iter().any(beyond_peft) {
        return parts.pop().map(|part| part.ours).unwrap_or_default();
    }
    let mut whole = peft_defaults(UNION, json!({}));
    for key in TASK_KEYS {
        if let Some(value) = parts.first().and_then(|part| part.ours.get(key)) {
            whole.insert(key.into(), value.clone());
        }
    }
    whole.insert(UNION_PARTS.into(), parts.into_iter().map(|part| Value::Object(part.ours)).collect());
    whole
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

/// Keys of a config that say what it was made for.
const TASK_KEYS: [&str; 2] = ["task_type", "base_model_name_or_path"];

/// One of the methods of a file.
struct Part {
    /// Our config.
    ours: Map<String, Value>,
    /// AdapterHub's.
    theirs: Map<String, Value>,
}

impl Part {
    fn is(&self, peft_type: &str) -> bool {
        self.ours.get("peft_type").and_then(Value::as_str) == Some(peft_type)
    }
}

/// The methods that AdapterHub's `adapter_config.json` tells of, and whether they are a union.
fn parts(keys: &Map<String, Value>) -> Result<(bool, Vec<Part>)> {
    let own = match keys.get("config") {
        Some(Value::Object(own)) => own.clone(),
        Some(Value::String(preset)) => [(PRESET.to_owned(), preset.clone().into())].into_iter().collect(),
        _ => return Err(Error::config("config", "is neither a table nor the name of a preset")),
    };
    if own.get(ARCHITECTURE).and_then(Value::as_str) != Some("union") {
        return Ok((false, vec![part(own, keys)?]));
    }
    let configs: Option<Vec<_>> =
        own.get("configs").and_then(Value::as_array).and_then(|list| list.iter().map(Value::as_object).collect());
    let Some(configs) = configs.filter(|configs| !configs.is_empty()) else {
        return Err(Error::config("configs", "is no list of the configs that a union is of"));
    };
    let in_part = |(i, own): (usize, &Map<String, Value>)| {
        part(own.clone(), keys).map_err(|e| Error::config("configs", format!("of number {}: {e}", i + 1)))
    };
    Ok((true, configs.into_iter().enumerate().map(in_part).collect::<Result<_>>()?))
}

/// Our config for one of AdapterHub's methods.
fn part(mut own: Map<String, Value>, keys: &Map<String, Value>) -> Result<Part> {
    let theirs = own.clone();
    let is_preset = own.contains_key(PRESET);
    let is_reft = own.get(PRESET).and_then(Value::as_str).is_some_and(|preset| preset.ends_with("reft"));
    let architecture = match own.remove(ARCHITECTURE) {
        Some(Value::String(name)) => name,
        None | Some(Value::Null) if is_reft => "reft".to_owned(),
        None | Some(Value::Null) => "bottleneck".to_owned(),
        Some(other) => other.to_string(),
    };
    let class = keys.get("model_class").and_then(Value::as_str).unwrap_or("");
    let task = if class.ends_with("ForSequenceClassification") {
        "SEQ_CLS"
    } else if class.ends_with("ForConditionalGeneration") {
        "SEQ_2_SEQ_LM"
    } else {
        "CAUSAL_LM"
    };
    let base = keys.get("model_name").and_then(Value::as_str).filter(|name| !name.is_empty());
    let of_task = TASK_KEYS.into_iter().map(str::to_owned).zip([task.into(), base.map_or(Value::Null, Into::into)]);
    let ours = match architecture.as_str() {
        "lora" => {
            if had_one_scale(keys) {
                own.insert("alpha".into(), own.get("r").cloned().unwrap_or(8.into()));
            }
            let mut ours = lora::ours(&own)?;
            ours.extend(of_task);
            ours
        }
        "prefix_tuning" => {
            let mut ours = prefix::ours(&own)?;
            ours.extend(of_task);
            ours
        }
        "bottleneck" | "reft" => {
            if !keys.contains_key("version") {
                rename_old_activation(&mut own);
            }
            forget_what_says_nothing(&mut own, keys.get("type").and_then(Value::as_str) == Some("text_task"));
            own.extend(of_task);
            if architecture == "reft" {
                ReftConfig::from_recipe(&own)?.to_adapter_config()
            } else {
                if !is_preset {
                    // A table is a `BnConfig`, with this default; a recipe without a preset is a `seq_bn`.
                    own.entry("original_ln_before").or_insert(false.into());
                }
                BottleneckConfig::from_recipe(&own)?.to_adapter_config()
            }
        }
        other => {
            let message = format!(
                "\"{other}\" is a method whose AdapterHub files are not read here; those of bottleneck adapters, ReFT, LoRA, (IA)³, \
                 prefixes and unions of these are"
            );
            return Err(Error::config(ARCHITECTURE, message));
        }
    };
    Ok(Part { ours, theirs })
}

/// Whether a LoRA that stands alone is of a version that took its scale for 1 (`_fix_backward_compat` in `adapters/loading.py`).
fn had_one_scale(keys: &Map<String, Value>) -> bool {
    let alone = |config: &Value| config.get(ARCHITECTURE).and_then(Value::as_str) == Some("lora");
    let version = keys.get("version").and_then(Value::as_str).and_then(|version| version.strip_prefix("adapters."));
    let mut numbers = version.unwrap_or("9").split('.').map(|number| number.parse::<u64>().unwrap_or(0));
    keys.get("config").is_some_and(alone) && (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) < (1, 1)
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
