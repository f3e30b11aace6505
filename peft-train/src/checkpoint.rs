//! Checkpoints: all that a bit-exact resume needs, in a folder that is complete or absent.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use peft_core::{
    Adapter, AdapterConfig, Context, Error, ExpectedTensor, Labels, Result, SafetensorsFile, atomic, write_safetensors,
};
use serde::{Deserialize, Serialize};

use crate::adapter_files;
use crate::data::SamplerState;
use crate::early_stop::EarlyStopState;
use crate::update_rule::UpdateRule;

const STATE: &str = "trainer_state.json";
const OPTIMIZER: &str = "optimizer.safetensors";
/// What the method's part in training remembers.
const HOOK: &str = "training_hook.safetensors";

/// Where a run stands after an optimiser step.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TrainerState {
    /// Optimiser steps done.
    pub step: u64,
    /// Micro-batches done: the key of the next one's dropout masks.
    pub micro_batches: u32,
    /// The next batch.
    pub sampler: SamplerState,
    /// Best evaluation and patience.
    pub early_stop: EarlyStopState,
    /// Passes over the data so far.
    pub epochs: f64,
    /// Input tokens so far.
    pub tokens: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// Loss of the last step.
    pub last_loss: Option<f64>,
    /// What must not change between the parts of a run, in short.
    pub fingerprint: String,
}

/// The folder of checkpoints in an output folder.
#[must_use]
pub fn folder(output: &Path) -> PathBuf {
    output.join("checkpoints")
}

/// Writes `checkpoints/step-N`, then removes the oldest beyond `keep` (0 keeps all).
///
/// # Errors
/// When the disk refuses; older checkpoints are untouched then.
pub fn save(output: &Path, state: &TrainerState, adapter: &Adapter, rule: &UpdateRule, keep: usize) -> Result<PathBuf> {
    save_with(output, state, &rule.state()?, keep, |folder| {
        write_files(folder, adapter.config.clone(), &adapter.tensors(), &adapter.labels)?;
        match adapter.training_hook() {
            Some(hook) => write_state(&folder.join(HOOK), &hook.state()?),
            None => Ok(()),
        }
    })
}

/// As [`save`], of a run whose rule has the state `rule` and whose result `write` writes.
pub(crate) fn save_with(
    output: &Path,
    state: &TrainerState,
    rule: &[(String, Tensor)],
    keep: usize,
    write: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let dir = folder(output);
    std::fs::create_dir_all(&dir).map_err(|e| Error::write(&dir, e))?;
    let target = dir.join(format!("step-{}", state.step));
    atomic::replace_dir(&target, |tmp| -> Result<()> {
        write(tmp)?;
        write_state(&tmp.join(OPTIMIZER), rule)?;
        let text = serde_json::to_string_pretty(state).map_err(|e| Error::msg(e.to_string()))?;
        atomic::write_file(tmp.join(STATE), text.as_bytes())
    })?;
    if keep > 0 {
        let steps = list(output)?;
        for (_, old) in steps.iter().take(steps.len().saturating_sub(keep)) {
            std::fs::remove_dir_all(old).map_err(|e| Error::write(old, e))?;
        }
    }
    Ok(target)
}

/// Writes the adapter as PEFT does, in the form that loads on the original base ([`Adapter::exported`]).
///
/// # Errors
/// When the disk refuses.
pub fn write_adapter_files(dir: &Path, adapter: &Adapter) -> Result<()> {
    let (config, tensors) = adapter.exported()?;
    write_files(dir, config, &tensors, &adapter.labels)
}

fn write_files(
    dir: &Path,
    config: serde_json::Map<String, serde_json::Value>,
    tensors: &[(String, Tensor)],
    labels: &Labels,
) -> Result<()> {
    adapter_files::write_into(dir, &AdapterConfig::new(config)?, labels, tensors.iter().map(|(n, t)| (n.as_str(), t)))
}

/// The complete checkpoints of an output folder with their steps, oldest first.
///
/// # Errors
/// When the folder cannot be read.
pub fn list(output: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let dir = folder(output);
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&dir).map_err(|e| Error::io(&dir, e))? {
        let path = entry.map_err(|e| Error::io(&dir, e))?.path();
        let step = path
            .file_name()
            .and_then(|n| n.to_str())
            .and_then(|n| n.strip_prefix("step-"))
            .and_then(|n| n.parse().ok());
        if let Some(step) = step
            && path.join(STATE).is_file()
        {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Reads a checkpoint into `adapter` and `rule` and gives the state.
///
/// # Errors
/// A damaged checkpoint, or one of another run (recipe, data or model changed).
pub fn load(dir: &Path, adapter: &Adapter, rule: &mut UpdateRule, fingerprint: &str) -> Result<TrainerState> {
    let state = read_trainer_state(dir, fingerprint)?;
    let files = adapter_files::open(dir, None)?;
    let expected: Vec<_> =
        adapter.tensors().iter().map(|(k, t)| ExpectedTensor::required(k.clone(), t.dims().to_vec())).collect();
    let tensors = files.load(&expected, &Device::Cpu)?;
    for parameter in adapter.parameters().into_iter().chain(adapter.frozen()).chain(adapter.fixed()) {
        if let Some(value) = tensors.get(parameter.name()) {
            parameter.set(value)?;
        }
    }
    adapter.check().with_context(|| dir.display().to_string())?;
    read_rule_state(dir, |tensors| rule.load_state(tensors))?;
    if let Some(hook) = adapter.training_hook() {
        let file = dir.join(HOOK);
        hook.load_state(&read_state(&file)?).map_err(|e| Error::file(&file, e.to_string()))?;
    }
    Ok(state)
}

/// Where the run of a checkpoint stands.
pub(crate) fn read_trainer_state(dir: &Path, fingerprint: &str) -> Result<TrainerState> {
    let file = dir.join(STATE);
    let text = std::fs::read_to_string(&file).map_err(|e| Error::io(&file, e))?;
    let state: TrainerState = serde_json::from_str(&text).map_err(|e| Error::file(&file, e.to_string()))?;
    if state.fingerprint != fingerprint {
        return Err(Error::file(
            dir,
            "is a checkpoint of another run: model, method, data or training settings changed since; start without --resume, \
             or in another output folder",
        ));
    }
    Ok(state)
}

/// Gives the state of a checkpoint's rule to `load`.
pub(crate) fn read_rule_state(dir: &Path, load: impl FnOnce(&HashMap<String, Tensor>) -> Result<()>) -> Result<()> {
    let file = dir.join(OPTIMIZER);
    load(&read_state(&file)?).map_err(|e| Error::file(&file, e.to_string()))
}

fn write_state(file: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    write_safetensors(file, tensors.iter().map(|(n, t)| (n.as_str(), t)), &BTreeMap::new())
}

fn read_state(file: &Path) -> Result<HashMap<String, Tensor>> {
    let file = SafetensorsFile::open(file)?;
    let names: Vec<String> = file.names().map(str::to_string).collect();
    names.into_iter().map(|n| file.tensor(&n, &Device::Cpu).map(|t| (n, t))).collect()
}
