//! Adapter folders of every kind that is read, under PEFT's names.

use std::path::Path;

use candle_core::Tensor;
use peft_adapters::{adapterhub, linear};
use peft_core::{AdapterConfig, AdapterFolder, BaseModel, Labels, Result, atomic, write_adapter};
use peft_lora::foreign::Layout;
use peft_lora::xlora;

use crate::class_labels;

/// Opens an adapter folder of PEFT's, ours, AdapterHub's, LLM-Adapters',
/// mlx-lm's, torchtune's or kohya's, and PEFT's on experts of before transformers 5. Formats that store a copy of the model's head beside the adapter
/// are rid of it where it is that of `base`.
///
/// # Errors
/// What makes the folder unreadable, by the file and the key.
pub fn open(folder: &Path, base: Option<&dyn BaseModel>) -> Result<AdapterFolder> {
    if let Some(layout) = Layout::of(folder)? {
        return layout.open(folder, base);
    }
    if adapterhub::is_adapterhub(folder)? {
        return adapterhub::open(folder, base);
    }
    let files = linear::foreign(AdapterFolder::open(folder)?)?;
    if files.config().peft_type() == xlora::PEFT_TYPE { xlora::with_experts(files) } else { Ok(files) }
}

/// Writes PEFT's two files with the names of an adapter's classes, if it has any, as a folder that is there whole or not at all.
///
/// # Errors
/// When the disk refuses.
pub fn write<'a>(
    out: &Path,
    config: &AdapterConfig,
    labels: &Labels,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> Result<()> {
    atomic::replace_dir(out, |dir| write_into(dir, config, labels, tensors))
}

/// The same into a folder that is there.
pub(crate) fn write_into<'a>(
    dir: &Path,
    config: &AdapterConfig,
    labels: &Labels,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> Result<()> {
    if !labels.is_empty() {
        class_labels::write(dir, labels)?;
    }
    if config.peft_type() == xlora::PEFT_TYPE {
        return xlora::write(dir, config, tensors);
    }
    write_adapter(dir, config, tensors)
}
