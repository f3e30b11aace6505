//! The catalogue: from a method's name or `peft_type` to an adapter on a base model.

use std::path::Path;

use peft_core::select::Selection;
use peft_core::suggest::did_you_mean;
use peft_core::{Adapter, AdapterFolder, BaseModel, Error, ExpectedTensor, Result, Segmented, Unmatched};
use peft_lora::{Init, LoraConfig};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::data::Batch;
use crate::eva;

/// One method of the catalogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MethodInfo {
    /// The name in recipes.
    pub name: &'static str,
    /// `peft_type` in `adapter_config.json`.
    pub peft_type: &'static str,
    /// Whether it can be trained.
    pub trainable: bool,
    /// Whether it can be merged into the base.
    pub mergeable: bool,
    /// Whether it serves in a batch that mixes adapters.
    pub servable: bool,
    /// Keys of `[method]` that make a variant of it.
    pub variants: &'static str,
    /// Where it comes from.
    pub paper: &'static str,
}

/// Every method there is.
pub const METHODS: &[MethodInfo] = &[
    MethodInfo {
        name: "lora",
        peft_type: "LORA",
        trainable: true,
        mergeable: true,
        servable: true,
        variants: "use_rslora, use_dora, lora_bias, bias, modules_to_save, trainable_token_indices, init_lora_weights",
        paper: "Hu et al. 2021, arXiv:2106.09685; DoRA: Liu et al. 2024, arXiv:2402.09353",
    },
    MethodInfo {
        name: "full",
        peft_type: "FULL",
        trainable: true,
        mergeable: true,
        servable: false,
        variants: "",
        paper: "every parameter; the baseline, and pretraining from a config",
    },
];

/// An adapter ready to train or run.
#[derive(Debug)]
pub struct Prepared {
    /// The adapter.
    pub adapter: Adapter,
    /// What its patterns matched, where it has patterns.
    pub selection: Option<Selection>,
    /// Its method's name.
    pub method: &'static str,
    /// What was found out while it was made, in words.
    pub notes: Vec<String>,
}

fn method(name: &str) -> Result<&'static MethodInfo> {
    METHODS.iter().find(|m| m.name == name).ok_or_else(|| {
        let near = did_you_mean(name, METHODS.iter().map(|m| m.name));
        let known: Vec<_> = METHODS.iter().map(|m| m.name).collect();
        Error::config("method.type", format!("`{name}` is not a method{near}; known: {}", known.join(", ")))
    })
}

/// A recipe's `[method]` table, read.
enum Config {
    Lora(Box<LoraConfig>),
    Full(Map<String, Value>),
}

impl Config {
    fn parse(table: &Map<String, Value>) -> Result<(Self, &'static MethodInfo)> {
        let mut keys = table.clone();
        let name = match keys.remove("type") {
            None => "lora".to_string(),
            Some(Value::String(s)) => s,
            Some(v) => return Err(Error::config("method.type", format!("{v} is not a name"))),
        };
        let info = method(&name)?;
        let config = match info.name {
            "full" => Self::Full(keys),
            _ => Self::Lora(Box::new(LoraConfig::from_recipe(&keys)?)),
        };
        Ok((config, info))
    }
}

/// Makes a fresh adapter from a recipe's `[method]` table.
///
/// # Errors
/// An unknown method or key, a pattern that matches nothing, or a start that needs training data ([`create_on`]).
pub fn create(table: &Map<String, Value>, base: &dyn BaseModel, seed: u64) -> Result<Prepared> {
    let (config, info) = Config::parse(table)?;
    let (adapter, selection) = match config {
        Config::Full(keys) => (peft_selective::full::build(&keys, base)?, None),
        Config::Lora(config) if config.init == Init::Eva => {
            return Err(Error::config("init_lora_weights", "eva looks at the training data, and there is none here"));
        }
        Config::Lora(config) => {
            let built = config.for_base(base)?.build(base, seed, Unmatched::Error)?;
            (built.adapter, Some(built.selection))
        }
    };
    Ok(Prepared { adapter, selection, method: info.name, notes: Vec::new() })
}

/// Whether a `[method]` table starts from the training data, so that only [`create_on`] makes it.
///
/// # Errors
/// An unknown method or key.
pub fn looks_at_data(table: &Map<String, Value>) -> Result<bool> {
    Ok(matches!(Config::parse(table)?.0, Config::Lora(config) if config.init == Init::Eva))
}

/// Like [`create`], with the training data at hand for starts that look at it. `next_batch` gives it without end.
///
/// # Errors
/// Those of [`create`] and [`eva::start`].
pub fn create_on<M: Segmented>(
    table: &Map<String, Value>,
    model: &M,
    seed: u64,
    next_batch: impl FnMut() -> Batch,
) -> Result<Prepared> {
    match Config::parse(table)? {
        (Config::Lora(config), info) if config.init == Init::Eva => {
            let eva::Found { built, batches, inputs, settled } =
                eva::start(config.for_base(model)?, model, seed, next_batch)?;
            let note =
                format!("eva: principal components of {inputs} inputs from {batches} batches, {settled} settled");
            let (adapter, selection) = (built.adapter, Some(built.selection));
            Ok(Prepared { adapter, selection, method: info.name, notes: vec![note] })
        }
        _ => create(table, model, seed),
    }
}

/// Opens an adapter folder on `base`, strictly: every tensor of the file is used and none is missing.
///
/// # Errors
/// A wrong config, a missing, unexpected or misshapen tensor, NaN or infinity; the message names them.
pub fn open(folder: &Path, base: &dyn BaseModel) -> Result<Prepared> {
    let files = AdapterFolder::open(folder)?;
    let peft_type = files.config().peft_type();
    let Some(info) = METHODS.iter().find(|m| m.peft_type == peft_type) else {
        let known: Vec<_> = METHODS.iter().map(|m| m.peft_type).collect();
        let message = format!(
            "adapter_config.json says peft_type {peft_type}, which is not supported; known: {}",
            known.join(", ")
        );
        return Err(Error::file(folder, message));
    };
    let (adapter, selection) = match info.name {
        "full" => (peft_selective::full::build(files.config().map(), base)?, None),
        _ => {
            let built = LoraConfig::from_adapter_config(files.config().map())?.build(base, 0, Unmatched::Report)?;
            (built.adapter, Some(built.selection))
        }
    };
    for path in base.fresh_layers() {
        let site = base.sites().find(path);
        if site.and_then(|s| adapter.at(s.id)).is_none_or(|a| a.module.is_none()) {
            let message = format!(
                "does not hold `{path}`, which the base has no weights for: train with modules_to_save = [\"{path}\"], or \
                 use the base that this adapter was trained on"
            );
            return Err(Error::file(folder, message));
        }
    }
    let constants: std::collections::HashSet<String> = {
        let trained: std::collections::HashSet<&str> = adapter.parameters().iter().map(|p| p.name()).collect();
        adapter.tensors().into_iter().map(|(k, _)| k).filter(|k| !trained.contains(k.as_str())).collect()
    };
    let expected: Vec<ExpectedTensor> = adapter
        .tensors()
        .iter()
        .map(|(key, t)| match constants.contains(key) {
            // PEFT decides from the targets whether to save a base table, and only our checkpoints hold PiSSA's start;
            // either is fine, since both can be had from the base.
            true => ExpectedTensor::optional(key.clone(), t.dims().to_vec()),
            false => ExpectedTensor::required(key.clone(), t.dims().to_vec()),
        })
        .collect();
    let tensors = files.load(&expected, base.device())?;
    for (key, value) in &tensors {
        peft_core::check_finite(key, value)?;
    }
    for parameter in adapter.parameters().into_iter().chain(adapter.frozen()) {
        if let Some(value) = tensors.get(parameter.name()) {
            parameter.set(value)?;
        }
    }
    Ok(Prepared { adapter, selection, method: info.name, notes: Vec::new() })
}
