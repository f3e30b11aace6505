//! The files of X-LoRA, which are PEFT's: the classifier in the folder itself, and each expert, a LoRA adapter, in a folder `0`, `1`, … of
//! it. In memory an expert's tensors are called `expert_0.lora_A.weight` behind their layer's path, and its config is one of a list.

use std::path::Path;

use candle_core::Tensor;
use peft_core::{AdapterConfig, AdapterFolder, Context, Error, Result, write_adapter};
use serde_json::Value;

use super::classifier::NAME;
use super::config::EXPERTS;
use super::{PEFT_TYPE, XLoraConfig};

/// What a part of an expert is called behind its layer's path.
pub(super) fn expert_part(number: usize, part: &str) -> String {
    format!("expert_{number}.{part}")
}

/// The opened folder of an X-LoRA adapter with its experts.
///
/// # Errors
/// A folder of an expert that is missing or is no LoRA adapter, or a classifier without the tensors that PEFT loses.
pub fn with_experts(files: AdapterFolder) -> Result<AdapterFolder> {
    let dir = files.dir().to_owned();
    let count = XLoraConfig::from_adapter_config(files.config().map())?.folders().len();
    let first = format!("{NAME}.0.weight");
    if !files.contains(&first) {
        let message = format!(
            "has no `{first}`: PEFT up to 0.21 leaves out of X-LoRA's files every tensor whose name has an expert's number between dots, and \
             what it wrote cannot be read, by itself neither; save the tensors of model.state_dict() with \
             `internal_xlora_classifier` in their names in its place, and the experts' own folders as 0, 1, …"
        );
        return Err(Error::file(files.weights().path(), message));
    }
    let (mut parts, mut configs) = (Vec::with_capacity(count + 1), Vec::with_capacity(count));
    for number in 0..count {
        let folder = dir.join(number.to_string());
        if !folder.is_dir() {
            let message = format!("has no folder `{number}`: its experts, {count} LoRA adapters, lie in it as 0, 1, …");
            return Err(Error::file(&dir, message));
        }
        let expert = AdapterFolder::open(&folder)?;
        if expert.config().peft_type() != "LORA" {
            let message =
                format!("is of type {}, and experts of X-LoRA are LoRA adapters", expert.config().peft_type());
            return Err(Error::file(&folder, message));
        }
        configs.push(Value::Object(expert.config().map().clone()));
        // PEFT saves the base's head, too, where an expert acts on it.
        let named = |key: &str| (!key.ends_with(".base_layer.weight")).then(|| in_memory(key, number));
        parts.push(expert.part(expert.config().clone(), named));
    }
    let mut config = files.config().clone();
    config.set(EXPERTS, configs);
    // The folder's own weights are those to name in messages.
    parts.insert(0, files);
    AdapterFolder::joined(dir, config, parts)
}

/// An expert's tensor as it is called in memory.
fn in_memory(key: &str, number: usize) -> String {
    match key.rfind(".lora_") {
        Some(at) => format!("{}.{}", &key[..at], expert_part(number, &key[at + 1..])),
        None => format!("{key} of expert {number}"),
    }
}

/// Writes the two files of the classifier, and those of each expert in a folder of its own.
///
/// # Errors
/// As [`write_adapter`].
pub fn write<'a>(
    dir: &Path,
    config: &AdapterConfig,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> Result<()> {
    let mut own: Vec<(&str, &Tensor)> = tensors.into_iter().collect();
    let mut map = config.map().clone();
    let experts = match map.shift_remove(EXPERTS) {
        Some(Value::Array(experts)) => experts,
        _ => return Err(Error::msg(format!("an adapter of type {PEFT_TYPE} without its experts"))),
    };
    for (number, expert) in experts.into_iter().enumerate() {
        let Value::Object(expert) = expert else { continue };
        let infix = format!(".{}", expert_part(number, ""));
        let (of_expert, rest): (Vec<_>, Vec<_>) = own.into_iter().partition(|(key, _)| key.contains(&infix));
        own = rest;
        let of_expert: Vec<(String, &Tensor)> =
            of_expert.into_iter().map(|(key, tensor)| (key.replacen(&infix, ".", 1), tensor)).collect();
        let folder = dir.join(number.to_string());
        write_adapter(
            &folder,
            &AdapterConfig::new(expert)?,
            of_expert.iter().map(|(key, tensor)| (key.as_str(), *tensor)),
        )
        .with_context(|| format!("expert {number}"))?;
    }
    write_adapter(dir, &AdapterConfig::new(map)?, own)
}
