//! From what the user named to an opened model, adapter or device.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use peft_core::{Adapter, Task, read_keys};
use peft_hub::{Kind, Options};
use peft_models::config::ModelConfig;
use peft_models::source::Placement;
use peft_models::tokenizer::Tokenizer;
use peft_models::{AnyModel, ModelFiles};
use peft_train::data::{ClassHead, DecoderInputs, HfTextTokenizer};
use peft_train::{class_labels, methods};
use serde_json::{Map, Value};

use crate::device::opened;

/// The files of the model that `spec` names, downloaded where it is a hub id.
pub(crate) fn model(spec: &str) -> Result<ModelFiles> {
    Ok(ModelFiles::open(&locate(spec, Kind::Model)?)?)
}

/// Settles the head of a model that has one of its own: what it is for, as the head of the adapter folder, and its classes: `labels`
/// where they are given, or those of the adapter's. Other models are left as they are.
pub(crate) fn settle_classes(files: &mut ModelFiles, labels: &[String], adapter: Option<&Path>) -> Result<()> {
    let of_adapter = match (adapter, files.config().labels().is_some()) {
        (Some(folder), true) => class_labels::read(folder)?.map(|head| (folder, head)),
        _ => None,
    };
    if let Some((folder, head)) = &of_adapter
        && (files.lacks_class_head() || folder.join(class_labels::FILE).is_file())
    {
        let of = || format!("adapter {}", folder.display());
        files.set_head(head.kind).with_context(of)?;
        if labels.is_empty() {
            files.set_labels(head.names.clone()).with_context(of)?;
        }
    }
    if labels.is_empty() { Ok(()) } else { Ok(files.set_labels(labels.to_vec())?) }
}

/// The base model that `spec` names, with the classes of these adapters' heads, read matrix by matrix as it is asked for them.
pub(crate) fn base<'p>(spec: &str, adapters: impl IntoIterator<Item = &'p Path>) -> Result<AnyModel> {
    let mut files = model(spec)?;
    for adapter in adapters {
        settle_classes(&mut files, &[], Some(adapter))?;
    }
    Ok(files.load_deferred(&Placement::cpu(None), 0)?)
}

/// Refuses a folder to write that holds something.
pub(crate) fn refuse_filled(output: &Path) -> Result<()> {
    if output.is_file() || std::fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("{} holds files already: give --output a folder that is new or empty", output.display());
    }
    Ok(())
}

/// The class head as the data road takes it.
pub(crate) fn class_head(files: &ModelFiles) -> Option<ClassHead> {
    match (files.config().task(), files.config().labels()) {
        (Task::Head { kind, reads, .. }, Some(labels)) => Some(ClassHead { labels: labels.to_vec(), reads, kind }),
        _ => None,
    }
}

/// What the decoder of an encoder–decoder reads besides its target.
pub(crate) fn decoder_inputs(files: &ModelFiles) -> Option<DecoderInputs> {
    match files.config() {
        ModelConfig::Seq2Seq(c) => Some(DecoderInputs { start: c.decoder_start_token_id, padding: c.pad_token_id }),
        _ => None,
    }
}

/// The length that rows are cut to: what was asked for, or what the model has positions for behind `virtual_tokens`.
pub(crate) fn max_length(files: &ModelFiles, asked: usize, virtual_tokens: usize) -> usize {
    // A prompt that leaves no room is the adapter's to refuse.
    let room = |most: usize| most.checked_sub(virtual_tokens).filter(|room| *room >= 2).unwrap_or(most);
    files.config().max_length().map_or(asked, |most| room(most).min(asked))
}

/// How many virtual tokens stand in front of each row in a run of this `[method]` table.
pub(crate) fn virtual_tokens(method: &toml::Table) -> Result<usize> {
    Ok(methods::virtual_tokens(&keys_of(method)?).unwrap_or(0))
}

/// How many tasks the adapter of a run of this `[method]` table has, where it depends on them.
pub(crate) fn tasks(method: &toml::Table) -> Result<Option<usize>> {
    Ok(methods::tasks(&keys_of(method)?))
}

/// What a run's adapter is by its `[method]` table, or by the config of the adapter to start from.
fn keys_of(method: &toml::Table) -> Result<Map<String, Value>> {
    Ok(match method.get("init_from").and_then(toml::Value::as_str) {
        Some(from) => start_keys(from)?,
        None => serde_json::to_value(method)?.as_object().cloned().unwrap_or_default(),
    })
}

/// The config of an adapter to start from; nothing, where it is of a program that writes none.
fn start_keys(from: &str) -> Result<Map<String, Value>> {
    let folder = adapter(from)?;
    Ok(if folder.join("adapter_config.json").is_file() { read_keys(&folder)? } else { Map::new() })
}

/// An adapter for the task that was asked for.
pub(crate) fn for_task(adapter: Adapter, task: Option<usize>) -> Result<Adapter> {
    Ok(match task {
        Some(task) => adapter.for_task(task).context("--task-id")?,
        None => adapter,
    })
}

/// The folder of the adapter that `spec` names.
pub(crate) fn adapter(spec: &str) -> Result<PathBuf> {
    locate(spec, Kind::Adapter)
}

fn locate(spec: &str, kind: Kind) -> Result<PathBuf> {
    let mut options = Options::from_env();
    options.progress = Some(crate::sample::download_progress());
    Ok(peft_hub::resolve(spec, kind, &options)?.path().to_path_buf())
}

/// Where and in which types to hold a model.
pub(crate) fn placement(device: &str, dtype: &str) -> Result<Placement> {
    let weights = parse_dtype(dtype)?;
    let device = parse_device(device)?;
    if device.is_cpu() {
        // A CPU computes in f32 whatever the storage, and widening is exact: a copy in f32 would only take memory.
        return Ok(Placement::cpu(weights.filter(|&d| d != DType::F32)));
    }
    let activations = weights.unwrap_or(if device.supports_bf16() { DType::BF16 } else { DType::F16 });
    Ok(Placement { device, activations, weights: Some(activations), narrow_products: false })
}

/// A type's name; `None` for `auto`.
pub(crate) fn parse_dtype(name: &str) -> Result<Option<DType>> {
    Ok(match name {
        "auto" => None,
        "f32" | "float32" => Some(DType::F32),
        "bf16" | "bfloat16" => Some(DType::BF16),
        "f16" | "float16" => Some(DType::F16),
        other => bail!("`{other}` is not a type of weights; use auto, f32, bf16 or f16"),
    })
}

fn parse_device(name: &str) -> Result<Device> {
    let (kind, index) = name.split_once(':').unwrap_or((name, "0"));
    let index: usize = index.parse().with_context(|| format!("`{name}`: `{index}` is not a device number"))?;
    match kind {
        "cpu" => Ok(Device::Cpu),
        "auto" if cfg!(feature = "cuda") => Ok(or_cpu("cuda:0", opened(|| Device::new_cuda(0)))),
        "auto" if cfg!(feature = "metal") => Ok(or_cpu("metal", opened(|| Device::new_metal(0)))),
        "auto" => Ok(Device::Cpu),
        "cuda" if !cfg!(feature = "cuda") => {
            bail!(
                "this binary was built without CUDA; build it with --features cuda (docs/gpu.md), or use --device cpu"
            )
        }
        "metal" if !cfg!(feature = "metal") => {
            bail!("this binary was built without Metal; build it with --features metal, or use --device cpu")
        }
        "cuda" => opened(move || Device::new_cuda(index))
            .with_context(|| format!("cannot use {name}; `peft-cli doctor` shows what is there")),
        "metal" => opened(move || Device::new_metal(index)).with_context(|| format!("cannot use {name}")),
        other => bail!("`{other}` is not a device; use auto, cpu, cuda:0 or metal"),
    }
}

/// The device of `auto`: who built for a card wants to know that it is not used.
fn or_cpu(name: &str, device: Result<Device>) -> Device {
    device.unwrap_or_else(|e| {
        eprintln!("{name} cannot be used ({e}); going on with the CPU, which --device cpu asks for without this line");
        Device::Cpu
    })
}

/// The tokenizer as the data road takes it.
pub(crate) fn text_tokenizer(tokenizer: &Tokenizer) -> Result<HfTextTokenizer> {
    HfTextTokenizer::new(
        tokenizer.inner().clone(),
        tokenizer.bos_token(),
        tokenizer.eos_token(),
        tokenizer.chat_template().map(str::to_string),
    )
    .map_err(|e| anyhow::anyhow!("tokenizer: {e}"))
}

/// The name that a report gives to a path.
pub(crate) fn title(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}
