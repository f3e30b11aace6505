//! Several adapter folders made into one, and a folder of any method that changes weights made into a LoRA.

use std::path::Path;

use peft_core::combine::Combined;
use peft_core::{Adapter, AdapterConfig, AdapterFolder, BaseModel, Context, Error, Labels, Result};
use peft_lora::combine::{CombineOptions, CombineType, RankRule, Source};
use peft_lora::foreign::Layout;

use crate::{adapter_files, class_labels, methods};

const LORA: &str = "LORA";
const IA3: &str = "IA3";

/// An adapter folder to combine.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// What messages call it.
    pub name: &'a str,
    /// What its change is multiplied with; below zero it is taken away.
    pub weight: f64,
    /// Its folder.
    pub folder: &'a Path,
    /// The task to take it for, where it has several.
    pub task: Option<usize>,
}

/// Combines adapters: LoRAs, or adapters of any method that changes weights where the `base` is given, into a LoRA; IA³
/// adapters into an IA³.
///
/// # Errors
/// What cannot be combined, by adapter and site; see [`peft_lora::combine::combine`] and [`peft_ia3::combine::combine`].
pub fn combine(inputs: &[Input<'_>], options: &CombineOptions, base: Option<&dyn BaseModel>) -> Result<Combined> {
    let opened = inputs.iter().map(|input| Opened::new(input, base, options)).collect::<Result<Vec<_>>>()?;
    let is_ia3 = |o: &Opened<'_>| o.files.config().peft_type() == IA3;
    if !opened.is_empty() && opened.iter().all(is_ia3) && options.kind == CombineType::Linear {
        let parts: Vec<_> = opened.iter().map(|o| (o.input.name, o.input.weight, &o.files)).collect();
        return peft_ia3::combine::combine(&parts, options.peft_compatible, base);
    }
    let sources = opened.iter().map(|o| o.source(base)).collect::<Result<Vec<_>>>()?;
    peft_lora::combine::combine(&sources, options, base)
}

/// The combination that adapters in these folders have where none is asked for: PEFT's `svd`, or the only one of IA³'s.
///
/// # Errors
/// A folder that cannot be read.
pub fn default_type<'p>(folders: impl IntoIterator<Item = &'p Path>) -> Result<CombineType> {
    for folder in folders {
        if Layout::of(folder)?.is_some() || adapter_files::open(folder, None)?.config().peft_type() != IA3 {
            return Ok(CombineType::Svd);
        }
    }
    Ok(CombineType::Linear)
}

/// The adapter as a plain LoRA whose ranks `rule` says. All but a plain LoRA needs its `base`.
///
/// # Errors
/// An adapter that is no change of the weights of linear layers and embeddings, by its site.
pub fn to_lora(input: Input<'_>, rule: RankRule, base: Option<&dyn BaseModel>) -> Result<Combined> {
    let options = CombineOptions { rank: Some(rule), plain: true, ..CombineOptions::new(CombineType::Svd) };
    let opened = Opened::new(&input, base, &options)?;
    peft_lora::combine::combine(&[opened.source(base)?], &options, base)
}

/// The adapter as a LoRA of its own ranks and of scale 1, for the files of other programs.
///
/// # Errors
/// An adapter that is no product of factors, by its site.
pub fn unscaled(input: Input<'_>, base: Option<&dyn BaseModel>) -> Result<Combined> {
    let options = CombineOptions::new(CombineType::Cat);
    let opened = Opened::new(&input, base, &options)?;
    peft_lora::combine::combine(&[opened.source(base)?], &options, base)
}

/// Writes a combined adapter with the names of its classes, as a folder that is there whole or not at all.
///
/// # Errors
/// When the disk refuses.
pub fn write(out: &Path, combined: &Combined, labels: &Labels) -> Result<()> {
    let config = AdapterConfig::new(combined.config.clone())?;
    adapter_files::write(out, &config, labels, combined.tensors.iter().map(|(key, t)| (key.as_str(), t)))
}

/// The outputs of all adapters that have a head.
///
/// # Errors
/// Names or kinds that differ, or a folder that cannot be read.
pub fn labels(inputs: &[Input<'_>]) -> Result<Labels> {
    let mut found: Option<(&str, Labels)> = None;
    for input in inputs {
        let Some(labels) = class_labels::read(input.folder)? else { continue };
        match &found {
            Some((other, first)) if *first != labels => {
                let message = format!(
                    "{other} has the classes {} ({}) and {} has {} ({})",
                    first.names.join(", "),
                    first.kind,
                    input.name,
                    labels.names.join(", "),
                    labels.kind
                );
                return Err(Error::file(input.folder, message));
            }
            Some(_) => {}
            None => found = Some((input.name, labels)),
        }
    }
    Ok(found.map(|(_, labels)| labels).unwrap_or_default())
}

/// An input that has been read.
struct Opened<'a> {
    input: &'a Input<'a>,
    files: AdapterFolder,
    /// On the base, where the files alone do not say what is changed.
    adapter: Option<Adapter>,
}

impl<'a> Opened<'a> {
    fn new(input: &'a Input<'a>, base: Option<&dyn BaseModel>, options: &CombineOptions) -> Result<Self> {
        let files = adapter_files::open(input.folder, base)?;
        let (config, name) = (files.config(), input.name);
        if !input.weight.is_finite() {
            return Err(Error::msg(format!("{name}: the weight {} is not a finite number", input.weight)));
        }
        let init = config.get("init_lora_weights").and_then(|v| v.as_str()).unwrap_or("");
        // These start from the base, and their files hold what training made of that.
        let from_base = init.starts_with("pissa") || init == "olora";
        let of_files = config.peft_type() == LORA && !from_base || config.peft_type() == IA3 && base.is_none();
        if of_files {
            let is_ia3 = config.peft_type() == IA3;
            if is_ia3 && options.kind != CombineType::Linear {
                let message = format!(
                    "{name} is an IA3, whose change of a weight depends on the base: give --model to make a LoRA of it; IA3 with \
                     IA3 is combined by --type linear"
                );
                return Err(Error::msg(message));
            }
            if input.task.is_some() {
                return Err(Error::config("task_id", format!("is given, and {name} is the same for every task")));
            }
            return Ok(Self { input, files, adapter: None });
        }
        let Some(base) = base else {
            let what = if from_base {
                format!("a LoRA that starts from the base ({init})")
            } else {
                config.peft_type().to_owned()
            };
            return Err(Error::msg(format!(
                "{name} is {what}, whose change of the weights cannot be had from its files alone; give --model"
            )));
        };
        let adapter = methods::open(input.folder, base).with_context(|| name.to_owned())?.adapter;
        let adapter = match input.task {
            Some(task) => adapter.for_task(task).with_context(|| name.to_owned())?,
            None => adapter,
        };
        Ok(Self { input, files, adapter: Some(adapter) })
    }

    fn source(&'a self, base: Option<&'a dyn BaseModel>) -> Result<Source<'a>> {
        let Input { name, weight, .. } = *self.input;
        match (&self.adapter, base) {
            (Some(adapter), Some(base)) => Source::of_adapter(name, weight, adapter, base),
            _ if self.files.config().peft_type() == LORA => Source::of_folder(name, weight, &self.files, base),
            _ => Err(Error::msg(format!(
                "{name} is {}, and not all of the adapters are; give --model to make a LoRA of them",
                self.files.config().peft_type()
            ))),
        }
    }
}
