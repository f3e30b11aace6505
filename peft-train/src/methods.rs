//! From a method's name or `peft_type` in the catalogue to an adapter on a base model.

mod union;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

use candle_core::Tensor;
use peft_adapters::BottleneckConfig;
use peft_adapters::compose::{ComposeConfig, Kind};
use peft_adapters::linear::LinearAdapterConfig;
use peft_adapters::reft::ReftConfig;
use peft_core::select::Selection;
use peft_core::suggest::did_you_mean;
use peft_core::{
    Adapter, AdapterFolder, BaseModel, Built, Context, Error, ExpectedTensor, Result, Segmented, Unmatched,
};
use peft_ia3::Ia3Config;
use peft_lora::xlora::XLoraConfig;
use peft_lora::{Init, LoraConfig};
use peft_models::ModelFiles;
use peft_prompt::{
    AdaptionConfig, CptConfig, MultitaskConfig, PROMPT_EMBEDDINGS, PTuningConfig, PrefixConfig, PromptConfig,
    PromptStart, Stored,
};
use peft_reparam::ReparamConfig;
use peft_selective::{BitfitConfig, LastLayersConfig, LnConfig, TokensConfig};
use serde_json::{Map, Value};

use crate::adapter_files;
pub use crate::catalogue::{METHODS, MethodInfo};
use crate::data::Batch;
use crate::eva;

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

/// A method's config, read.
enum Config {
    Lora(Box<LoraConfig>),
    Ia3(Box<Ia3Config>),
    Bottleneck(Box<BottleneckConfig>),
    LinearAdapter(Box<LinearAdapterConfig>),
    Reft(Box<ReftConfig>),
    Compose(Box<ComposeConfig>),
    XLora(Box<XLoraConfig>),
    Prefix(PrefixConfig),
    Prompt(PromptConfig),
    Multitask(Box<MultitaskConfig>),
    Cpt(Box<CptConfig>),
    PTuning(PTuningConfig),
    Adaption(Box<AdaptionConfig>),
    Ln(Box<LnConfig>),
    Bitfit(Box<BitfitConfig>),
    LastLayers(Box<LastLayersConfig>),
    Tokens(Box<TokensConfig>),
    Reparam(Box<ReparamConfig>),
    Union(Vec<Config>),
    Full(Map<String, Value>),
}

/// An adapter with what its patterns matched, where it has patterns.
type Made = (Adapter, Option<Selection>);

fn selected(built: Built) -> Made {
    (built.adapter, Some(built.selection))
}

impl Config {
    /// A recipe's `[method]` table.
    fn of_recipe(table: &Map<String, Value>) -> Result<(Self, &'static MethodInfo)> {
        let (config, info) = Self::of_recipe_part(table)?;
        config.fits_peft()?;
        Ok((config, info))
    }

    /// Refuses what PEFT's files of this method have no place for. A union's file is our own, and its parts may be that.
    fn fits_peft(&self) -> Result<()> {
        let beyond = match self {
            Self::Lora(config) if config.use_gating => Some("use_gating"),
            Self::Prefix(config) => config.beyond_peft(),
            _ => None,
        };
        let Some(key) = beyond else { return Ok(()) };
        let message = "is for a part of a union, whose file is our own, since PEFT would read the file of this method without it: \
                       type = \"union\", methods = [{…}] with this one alone does the same";
        Err(Error::config(key, message))
    }

    /// The table of a recipe for one of several methods.
    fn of_recipe_part(table: &Map<String, Value>) -> Result<(Self, &'static MethodInfo)> {
        let mut keys = table.clone();
        let name = match keys.remove("type") {
            None => "lora".to_string(),
            Some(Value::String(s)) => s,
            Some(v) => return Err(Error::config("method.type", format!("{v} is not a name"))),
        };
        let info = method(&name)?;
        let config = match info.name {
            "full" => Self::Full(keys),
            "union" => Self::Union(union::of_recipe(&keys)?),
            "ia3" => Self::Ia3(Box::new(Ia3Config::from_recipe(&keys)?)),
            "bottleneck" => Self::Bottleneck(Box::new(BottleneckConfig::from_recipe(&keys)?)),
            "llm_adapter" => Self::LinearAdapter(Box::new(LinearAdapterConfig::from_recipe(&keys)?)),
            "reft" => Self::Reft(Box::new(ReftConfig::from_recipe(&keys)?)),
            "fusion" => Self::Compose(Box::new(ComposeConfig::from_recipe(Kind::Fusion, &keys)?)),
            "composition" => Self::Compose(Box::new(ComposeConfig::from_recipe(Kind::Composition, &keys)?)),
            "xlora" => Self::XLora(Box::new(XLoraConfig::from_recipe(&keys)?)),
            "prefix" => Self::Prefix(PrefixConfig::from_recipe(&keys)?),
            "prompt" => Self::Prompt(PromptConfig::from_recipe(&keys)?),
            "multitask_prompt" => Self::Multitask(Box::new(MultitaskConfig::from_recipe(&keys)?)),
            "cpt" => Self::Cpt(Box::new(CptConfig::from_recipe(&keys)?)),
            "p_tuning" => Self::PTuning(PTuningConfig::from_recipe(&keys)?),
            "adaption_prompt" => Self::Adaption(Box::new(AdaptionConfig::from_recipe(&keys)?)),
            "ln" => Self::Ln(Box::new(LnConfig::from_recipe(&keys)?)),
            "bitfit" => Self::Bitfit(Box::new(BitfitConfig::from_recipe(&keys)?)),
            "last_layers" => Self::LastLayers(Box::new(LastLayersConfig::from_recipe(&keys)?)),
            "trainable_tokens" => Self::Tokens(Box::new(TokensConfig::from_recipe(&keys)?)),
            "lora" => Self::Lora(Box::new(LoraConfig::from_recipe(&keys)?)),
            name => Self::Reparam(Box::new(ReparamConfig::from_recipe(name, &keys)?)),
        };
        Ok((config, info))
    }

    /// An `adapter_config.json` of the method `info`.
    fn of_file(info: &MethodInfo, keys: &Map<String, Value>) -> Result<Self> {
        let config = Self::of_file_part(info, keys)?;
        config.fits_peft().map(|()| config)
    }

    /// The config of one of several methods in such a file.
    fn of_file_part(info: &MethodInfo, keys: &Map<String, Value>) -> Result<Self> {
        Ok(match info.name {
            "full" => Self::Full(keys.clone()),
            "union" => Self::Union(union::of_file(keys)?),
            "ia3" => Self::Ia3(Box::new(Ia3Config::from_adapter_config(keys)?)),
            "bottleneck" => Self::Bottleneck(Box::new(BottleneckConfig::from_adapter_config(keys)?)),
            "llm_adapter" => Self::LinearAdapter(Box::new(LinearAdapterConfig::from_adapter_config(keys)?)),
            "reft" => Self::Reft(Box::new(ReftConfig::from_adapter_config(keys)?)),
            "fusion" => Self::Compose(Box::new(ComposeConfig::from_adapter_config(Kind::Fusion, keys)?)),
            "composition" => Self::Compose(Box::new(ComposeConfig::from_adapter_config(Kind::Composition, keys)?)),
            "xlora" => Self::XLora(Box::new(XLoraConfig::from_adapter_config(keys)?)),
            "prefix" => Self::Prefix(PrefixConfig::from_adapter_config(keys)?),
            "prompt" => Self::Prompt(PromptConfig::from_adapter_config(keys)?),
            "multitask_prompt" => Self::Multitask(Box::new(MultitaskConfig::from_adapter_config(keys)?)),
            "cpt" => Self::Cpt(Box::new(CptConfig::from_adapter_config(keys)?)),
            "p_tuning" => Self::PTuning(PTuningConfig::from_adapter_config(keys)?),
            "adaption_prompt" => Self::Adaption(Box::new(AdaptionConfig::from_adapter_config(keys)?)),
            "ln" => Self::Ln(Box::new(LnConfig::from_adapter_config(keys)?)),
            "bitfit" => Self::Bitfit(Box::new(BitfitConfig::from_adapter_config(keys)?)),
            "last_layers" => Self::LastLayers(Box::new(LastLayersConfig::from_adapter_config(keys)?)),
            "trainable_tokens" => Self::Tokens(Box::new(TokensConfig::from_adapter_config(keys)?)),
            "lora" => Self::Lora(Box::new(LoraConfig::from_adapter_config(keys)?)),
            name => Self::Reparam(Box::new(ReparamConfig::from_adapter_config(name, keys)?)),
        })
    }

    /// A fresh adapter.
    fn create(&self, base: &dyn BaseModel, seed: u64) -> Result<Made> {
        let strict = Unmatched::Error;
        Ok(match self {
            Self::Full(keys) => (peft_selective::full::build(keys, base)?, None),
            Self::Union(parts) => union::create(parts, base, seed)?,
            Self::Lora(config) if config.init == Init::Eva => {
                let message = "eva looks at the training data, and there is none here";
                return Err(Error::config("init_lora_weights", message));
            }
            Self::Lora(config) => selected(config.for_base(base)?.build(base, seed, strict)?),
            Self::Ia3(config) => selected(config.for_base(base)?.build(base, seed, strict)?),
            Self::Ln(config) => selected(config.for_base(base)?.build(base, strict)?),
            Self::Bitfit(config) => selected(config.for_base(base)?.build(base, strict)?),
            Self::LastLayers(config) => selected(config.for_base(base)?.build(base, strict)?),
            Self::Tokens(config) => selected(config.for_base(base)?.build(base, seed, strict)?),
            Self::Reparam(config) => selected(config.for_base(base)?.build(base, seed, strict, &BTreeSet::new())?),
            Self::Bottleneck(config) => selected(config.for_base(base)?.build(base, seed, strict)?),
            Self::LinearAdapter(config) => selected(config.for_base(base)?.build(base, seed, strict)?),
            Self::Reft(config) => selected(config.for_base(base)?.build(base, seed, strict)?),
            Self::Compose(config) => selected(composed(config, base, seed)?),
            Self::XLora(config) => {
                let experts = config.folders().iter().map(|folder| expert(folder, base)).collect::<Result<Vec<_>>>()?;
                selected(config.for_base(base)?.build(base, &experts, seed, strict)?)
            }
            Self::Prefix(config) => selected(config.for_base(base)?.build(base, seed, Stored::Trained, strict)?),
            Self::Prompt(config) => {
                let text = start_tokens(&config.start, config.tokenizer.as_deref())?;
                selected(config.for_base(base)?.build(base, seed, &text)?)
            }
            Self::Multitask(config) => {
                let text = start_tokens(&config.start, config.tokenizer.as_deref())?;
                selected(config.for_base(base)?.build(base, seed, &text)?)
            }
            Self::Cpt(config) => selected(config.for_base(base)?.build(base)?),
            Self::PTuning(config) => selected(config.for_base(base)?.build(base, seed, Stored::Trained, strict)?),
            Self::Adaption(config) => selected(config.for_base(base)?.build(base, seed)?),
        })
    }

    /// What is wrong with a training run of so many steps.
    fn check_training(&self, adapter: &Adapter, steps: u64) -> Result<()> {
        match self {
            Self::Reparam(config) => config.check_training(steps, &adapter.parameters()),
            Self::XLora(config) => config.check_training(),
            Self::Union(parts) => parts.iter().try_for_each(|part| part.check_training(adapter, steps)),
            _ => Ok(()),
        }
    }

    /// An adapter for the values in `files`.
    fn open(&self, base: &dyn BaseModel, files: &AdapterFolder) -> Result<Made> {
        // The config says how many virtual tokens there are: the file has to agree before anything of that size is made.
        let stored = |expected: Result<ExpectedTensor>| match files.contains(PROMPT_EMBEDDINGS) {
            true => files.check_one(&expected?).map(|()| Stored::Flat),
            false => Ok(Stored::Trained),
        };
        let report = Unmatched::Report;
        Ok(match self {
            Self::Full(keys) => (peft_selective::full::build(keys, base)?, None),
            Self::Union(parts) => union::open(parts, base, files)?,
            Self::Lora(config) => selected(config.build(base, 0, report)?),
            Self::Ia3(config) => selected(config.build(base, 0, report)?),
            Self::Ln(config) => selected(config.build(base, report)?),
            Self::Bitfit(config) => selected(config.build(base, report)?),
            Self::LastLayers(config) => selected(config.build(base, report)?),
            Self::Tokens(config) => selected(config.build(base, 0, report)?),
            Self::Reparam(config) => {
                let names = files.keys().map(str::to_owned).collect();
                selected(config.build(base, 0, report, &names)?)
            }
            Self::Bottleneck(config) => selected(config.build(base, 0, report)?),
            Self::LinearAdapter(config) => selected(config.build(base, 0, report)?),
            Self::Reft(config) => selected(config.build(base, 0, report)?),
            Self::Compose(config) => selected(config.build(base, 0, report)?),
            Self::XLora(config) => {
                config.stored(base)?.iter().try_for_each(|tensor| files.check_one(tensor))?;
                let expert = |keys| Ok(LoraConfig::from_adapter_config(keys)?.build(base, 0, report)?.adapter);
                let experts = config.expert_configs()?.into_iter().map(expert).collect::<Result<Vec<_>>>()?;
                selected(config.build(base, &experts, 0, report)?)
            }
            Self::Prefix(config) => selected(config.build(base, 0, stored(config.stored(base))?, report)?),
            Self::PTuning(config) => selected(config.build(base, 0, stored(config.stored(base))?, report)?),
            Self::Prompt(config) => {
                files.check_one(&config.stored(base)?)?;
                selected(config.open(base)?)
            }
            Self::Cpt(config) => {
                files.check_one(&config.stored(base)?)?;
                let values = files.tensor(PROMPT_EMBEDDINGS, base.device())?;
                peft_core::check_finite(PROMPT_EMBEDDINGS, &values)?;
                selected(config.open(base, &values)?)
            }
            Self::Adaption(config) => {
                config.stored(base)?.iter().try_for_each(|tensor| files.check_one(tensor))?;
                selected(config.build(base, 0)?)
            }
            Self::Multitask(config) => {
                config.stored(base)?.iter().try_for_each(|tensor| files.check_one(tensor))?;
                selected(config.open(base)?)
            }
        })
    }
}

/// The tokens of the text that a prompt starts from; none where it starts from something else.
fn start_tokens(start: &PromptStart, tokenizer: Option<&str>) -> Result<Vec<u32>> {
    let PromptStart::Text(text) = start else { return Ok(Vec::new()) };
    let key = "tokenizer_name_or_path";
    let Some(path) = tokenizer else {
        return Err(Error::config(key, "is not given, and the prompt starts from a text"));
    };
    let tokenizer = ModelFiles::open(Path::new(path)).and_then(|files| files.tokenizer()).with_context(|| key)?;
    tokenizer.encode(text, true).map_err(|e| Error::config("prompt_tuning_init_text", e.to_string()))
}

/// The adapter of a recipe that is made of others, read from their folders.
fn composed(config: &ComposeConfig, base: &dyn BaseModel, seed: u64) -> Result<Built> {
    let open = |folder: &str| adapter_files::open(Path::new(folder), Some(base));
    let folders = config.folders().map(open).collect::<Result<Vec<_>>>()?;
    config.for_base(base)?.build_from(base, &folders, seed, Unmatched::Error)
}

/// An expert of X-LoRA, which is a LoRA adapter for the same base.
fn expert(folder: &str, base: &dyn BaseModel) -> Result<Adapter> {
    let adapter = open(Path::new(folder), base)?.adapter;
    match adapter.peft_type() {
        "LORA" => Ok(adapter),
        other => Err(Error::file(folder, format!("is of type {other}, and experts of X-LoRA are LoRA adapters"))),
    }
}

/// Puts adapters in folders together without training: a table like that of the method `composition`, whose parts are all
/// folders.
///
/// # Errors
/// An unknown key, a folder that cannot be read, or adapters that cannot be put together.
pub fn compose(table: &Map<String, Value>, base: &dyn BaseModel) -> Result<Adapter> {
    Ok(composed(&ComposeConfig::of_folders(Kind::Composition, table)?, base, 0)?.adapter)
}

/// Makes a fresh adapter from a recipe's `[method]` table.
///
/// # Errors
/// An unknown method or key, a pattern that matches nothing, or a start that needs training data ([`create_on`]).
pub fn create(table: &Map<String, Value>, base: &dyn BaseModel, seed: u64) -> Result<Prepared> {
    let (config, info) = Config::of_recipe(table)?;
    let (adapter, selection) = config.create(base, seed)?;
    Ok(Prepared { adapter, selection, method: info.name, notes: Vec::new() })
}

/// How many virtual tokens an adapter of this `[method]` table or `adapter_config.json` puts in front of each row, where that says it.
/// What is wrong with it is found when the adapter is made.
#[must_use]
pub fn virtual_tokens(keys: &Map<String, Value>) -> Option<usize> {
    if let Some(ids) = keys.get("cpt_token_ids").and_then(Value::as_array) {
        return Some(ids.len());
    }
    let given = keys.get("num_virtual_tokens").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
    given.or_else(|| union::tables(keys).ok()?.iter().find_map(virtual_tokens))
}

/// How many tasks an adapter of this `[method]` table or `adapter_config.json` has, where its method does another thing for each:
/// rows then name theirs.
#[must_use]
pub fn tasks(keys: &Map<String, Value>) -> Option<usize> {
    let text = |key: &str| keys.get(key).and_then(Value::as_str);
    let key = match (text("type"), text("peft_type")) {
        (Some("poly"), _) | (None, Some("POLY")) => "n_tasks",
        (Some("multitask_prompt"), _) | (None, Some("MULTITASK_PROMPT_TUNING")) => "num_tasks",
        _ => return None,
    };
    let given = keys.get(key).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
    Some(given.unwrap_or(1))
}

/// Refuses a training run of so many steps whose method asks for something that training does not do here. Opening, merging
/// and serving are not concerned.
///
/// # Errors
/// What is asked for, by its key, with the way out.
pub fn check_training(adapter: &Adapter, steps: u64) -> Result<()> {
    let Some(info) = METHODS.iter().find(|m| m.peft_type == adapter.peft_type()) else { return Ok(()) };
    if adapter.trainable_elements() == 0 {
        let message = "holds adapters that stay as they are, and nothing to train: method.type composition puts a new one to such";
        return Err(Error::config("adapters", message));
    }
    Config::of_file(info, &adapter.config)?.check_training(adapter, steps)
}

/// Whether a `[method]` table starts from the training data, so that only [`create_on`] makes it.
///
/// # Errors
/// An unknown method or key.
pub fn looks_at_data(table: &Map<String, Value>) -> Result<bool> {
    // A prefix that starts from a text is made by who has the text's tokens ([`crate::start_prefix`]).
    let mut table = table.clone();
    table.remove("init_text");
    Ok(matches!(Config::of_recipe(&table)?.0, Config::Lora(config) if config.init == Init::Eva))
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
    match Config::of_recipe(table)? {
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
    let files = adapter_files::open(folder, Some(base))?;
    let peft_type = files.config().peft_type();
    let Some(info) = METHODS.iter().find(|m| m.peft_type == peft_type) else {
        let known: Vec<_> = METHODS.iter().map(|m| m.peft_type).collect();
        let message = format!(
            "adapter_config.json says peft_type {peft_type}, which is not supported; known: {}",
            known.join(", ")
        );
        return Err(Error::file(folder, message));
    };
    let config = Config::of_file(info, files.config().map())?;
    let (adapter, selection) = config.open(base, &files)?;
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
    read(&adapter, &files, base)?;
    Ok(Prepared { adapter, selection, method: info.name, notes: Vec::new() })
}

/// Gives `adapter` the values in `files`.
fn read(adapter: &Adapter, files: &AdapterFolder, base: &dyn BaseModel) -> Result<()> {
    let constants: HashSet<String> = {
        let trained: HashSet<&str> =
            adapter.parameters().into_iter().chain(adapter.fixed()).map(|p| p.name()).collect();
        adapter.tensors().into_iter().map(|(k, _)| k).filter(|k| !trained.contains(k.as_str())).collect()
    };
    let state: BTreeMap<String, Tensor> = adapter.tensors().into_iter().collect();
    let mut expected: Vec<ExpectedTensor> = state
        .iter()
        .map(|(key, t)| match constants.contains(key) {
            // PEFT decides from the targets whether to save a base table, and only our checkpoints hold PiSSA's start;
            // either is fine, since both can be had from the base.
            true => ExpectedTensor::optional(key.clone(), t.dims().to_vec()),
            false => ExpectedTensor::required(key.clone(), t.dims().to_vec()),
        })
        .collect();
    let copies: Vec<(&str, &str)> = adapter.export_copies().filter(|(_, of)| state.contains_key(*of)).collect();
    expected.extend(
        copies.iter().filter_map(|(key, of)| Some(ExpectedTensor::optional(*key, state.get(*of)?.dims().to_vec()))),
    );
    files.check(&expected)?;
    let mut tensors = BTreeMap::new();
    for key in state.keys().filter(|key| files.contains(key)) {
        let value = files.tensor(key, base.device())?;
        peft_core::check_finite(key, &value)?;
        tensors.insert(key.as_str(), value);
    }
    for (key, of) in copies.into_iter().filter(|(key, _)| files.contains(key)) {
        let copy = files.tensor(key, base.device())?;
        if let Some(original) = tensors.get(of)
            && (copy.dtype() != original.dtype() || !equal(&copy, original)?)
        {
            let message = format!("holds `{key}` and `{of}`, which stand for one tensor, with different values");
            return Err(Error::file(files.weights().path(), message));
        }
    }
    for parameter in adapter.parameters().into_iter().chain(adapter.frozen()).chain(adapter.fixed()) {
        if let Some(value) = tensors.get(parameter.name()) {
            parameter.set(value)?;
        }
    }
    adapter.check().with_context(|| files.weights().path().display().to_string())
}

fn equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(a.ne(b)?.max_all()?.to_scalar::<u8>()? == 0)
}
