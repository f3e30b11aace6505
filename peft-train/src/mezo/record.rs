//! A run of MeZO in kilobytes: its start in words, and the learning rate and the derivatives of every step.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use peft_core::{Error, Parameter, Result, SafetensorsFile, write_safetensors};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Mezo, MezoConfig, Taken};
use crate::fnv::Fnv;

/// The learning rates, `[steps]`.
const RATES: &str = "learning_rate";
/// The derivatives, `[steps, samples]`.
const DERIVATIVES: &str = "projected_gradient";
/// The key of what else there is to know, in the file's header.
const START: &str = "mezo";
/// Elements that are looked at together.
const PIECE: usize = 1 << 18;

/// All that makes a run again on its base.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this form.
    pub version: u32,
    /// The base model as the recipe named it.
    pub base_model: String,
    /// The `[method]` table.
    pub method: Map<String, Value>,
    /// The type of weights that was asked for.
    pub dtype: String,
    /// What the head is for, where the model has one of its own; empty in files that knew classification alone.
    #[serde(default)]
    pub head: String,
    /// Names of the outputs of such a head.
    pub labels: Vec<String>,
    /// The run's seed.
    pub seed: u64,
    /// `mezo_eps`.
    pub eps: f64,
    /// `mezo_samples`.
    pub samples: usize,
    /// `momentum`.
    #[serde(default)]
    pub momentum: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// LoRA+'s ratio.
    pub loraplus_lr_ratio: f64,
    /// [`checksum`] of the parameters before the first step.
    pub start: String,
    /// [`checksum`] of the parameters after the last.
    pub end: String,
    /// The steps.
    #[serde(skip)]
    pub taken: Vec<Taken>,
}

impl Record {
    /// The latest version: 1 knew no momentum.
    pub const VERSION: u32 = 2;
    /// Name of the file in an output folder.
    pub const FILE: &str = "mezo.safetensors";

    /// The settings of the run.
    #[must_use]
    pub fn config(&self) -> MezoConfig {
        MezoConfig { eps: self.eps, samples: self.samples, momentum: self.momentum, seed: self.seed }
    }

    /// Writes the record, whole or not at all.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, path: &Path) -> Result<()> {
        let start = serde_json::to_string(self).map_err(|e| Error::msg(e.to_string()))?;
        let tensors = steps_to_tensors(&self.taken, self.samples)?;
        let metadata = BTreeMap::from([(START.to_owned(), start)]);
        write_safetensors(path, tensors.iter().map(|(name, t)| (name.as_str(), t)), &metadata)
    }

    /// Reads a record.
    ///
    /// # Errors
    /// A file that is none, is damaged, or was written by a later version.
    pub fn read(path: &Path) -> Result<Self> {
        let file = SafetensorsFile::open(path)?;
        let foreign =
            || Error::file(path, format!("is no record of a mezo run; training writes one as {}", Self::FILE));
        let text = file.metadata().get(START).ok_or_else(foreign)?;
        let mut record: Self =
            serde_json::from_str(text).map_err(|e| Error::file(path, format!("its header is damaged: {e}")))?;
        let (version, known) = (record.version, Self::VERSION);
        if version == 0 || version > known {
            return Err(Error::file(path, format!("has version {version}; this program reads 1 to {known}")));
        }
        let names: Vec<String> = file.names().map(str::to_string).collect();
        let tensors = names.into_iter().map(|n| file.tensor(&n, &Device::Cpu).map(|t| (n, t)));
        let tensors = tensors.collect::<Result<HashMap<_, _>>>()?;
        record.taken = steps_of_tensors(&tensors, record.samples)
            .map_err(|why| Error::file(path, format!("is damaged: {why}")))?;
        Ok(record)
    }
}

fn steps_to_tensors(taken: &[Taken], samples: usize) -> Result<Vec<(String, Tensor)>> {
    let rates: Vec<f32> = taken.iter().map(|t| t.learning_rate).collect();
    let derivatives: Vec<f32> = taken.iter().flat_map(|t| t.derivatives.iter().copied()).collect();
    Ok(vec![
        (RATES.to_owned(), Tensor::from_vec(rates, taken.len(), &Device::Cpu)?),
        (DERIVATIVES.to_owned(), Tensor::from_vec(derivatives, (taken.len(), samples), &Device::Cpu)?),
    ])
}

fn steps_of_tensors(tensors: &HashMap<String, Tensor>, samples: usize) -> Result<Vec<Taken>, String> {
    if let Some(key) = tensors.keys().find(|k| *k != RATES && *k != DERIVATIVES) {
        return Err(format!("`{key}` is not a tensor that mezo writes"));
    }
    let get = |key: &str| tensors.get(key).filter(|t| t.dtype() == DType::F32).ok_or(format!("`{key}` is missing"));
    let (rates, derivatives) = (get(RATES)?, get(DERIVATIVES)?);
    if samples == 0 || rates.rank() != 1 || derivatives.dims() != [rates.elem_count(), samples] {
        return Err(format!("steps of shape {:?} do not fit {samples} samples", derivatives.dims()));
    }
    let text = |e: candle_core::Error| e.to_string();
    let (rates, derivatives) = (rates.to_vec1::<f32>().map_err(text)?, derivatives.to_vec2::<f32>().map_err(text)?);
    if rates.iter().chain(derivatives.iter().flatten()).any(|x| !x.is_finite()) {
        return Err("it holds NaN or infinity".into());
    }
    let steps = rates.into_iter().zip(derivatives);
    Ok(steps.map(|(learning_rate, derivatives)| Taken { learning_rate, derivatives }).collect())
}

/// Beginning of the names of momenta in a checkpoint, before the parameter's number.
const MOMENTUM: &str = "momentum.";

impl Mezo {
    /// The steps so far and the momentum, as a checkpoint holds them.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state = steps_to_tensors(&self.taken, self.config.samples)?;
        for (i, momentum) in self.momenta.iter().enumerate() {
            state.push((format!("{MOMENTUM}{i}"), momentum.as_detached_tensor().to_device(&Device::Cpu)?));
        }
        Ok(state)
    }

    /// Takes back what [`Mezo::state`] gave.
    ///
    /// # Errors
    /// Tensors that are missing, misshapen or not of MeZO; the message names them.
    pub fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let (momenta, steps): (HashMap<_, _>, HashMap<_, _>) =
            state.iter().map(|(k, t)| (k.clone(), t.clone())).partition(|(key, _)| key.starts_with(MOMENTUM));
        let taken = steps_of_tensors(&steps, self.config.samples).map_err(Error::msg)?;
        let mut found = Vec::with_capacity(momenta.len());
        for i in 0..momenta.len() {
            let key = format!("{MOMENTUM}{i}");
            let Some(momentum) = momenta.get(&key).filter(|t| t.dtype() == DType::F32) else {
                return Err(Error::msg(format!("`{key}` is missing")));
            };
            peft_core::check_finite(&key, momentum)?;
            found.push(Var::from_tensor(momentum)?);
        }
        if found.is_empty() != (self.config.momentum == 0.0 || taken.is_empty()) {
            return Err(Error::msg(format!("`{MOMENTUM}0` does not fit train.momentum = {}", self.config.momentum)));
        }
        self.set_taken(taken)?;
        self.momenta = found;
        Ok(())
    }
}

/// Tells parameters from others by their names, shapes and bits ([`Fnv`]).
///
/// # Errors
/// When a value cannot be copied from its device.
pub fn checksum(parameters: &[&Parameter]) -> Result<String> {
    let mut hash = Fnv::default();
    for parameter in parameters {
        hash.text(parameter.name());
        let value = parameter.value().to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        value.dims().iter().for_each(|&d| hash.word(d as u64));
        // In pieces: a copy of a table would be a good part of a small model.
        let flat = value.flatten_all()?;
        for first in (0..flat.elem_count()).step_by(PIECE) {
            let piece = flat.narrow(0, first, PIECE.min(flat.elem_count() - first))?;
            piece.to_vec1::<f32>()?.iter().for_each(|x| hash.word(u64::from(x.to_bits())));
        }
    }
    Ok(hash.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn record() -> Record {
        let taken = |i: usize| Taken { learning_rate: 1e-3 / (i + 1) as f32, derivatives: vec![i as f32, 0.1] };
        Record {
            version: Record::VERSION,
            base_model: "base".into(),
            method: serde_json::json!({"r": 2}).as_object().unwrap().clone(),
            dtype: "auto".into(),
            head: String::new(),
            labels: vec!["no".into()],
            seed: u64::MAX,
            eps: 1e-3,
            samples: 2,
            momentum: 0.5,
            weight_decay: 0.1,
            loraplus_lr_ratio: 1.0,
            start: "0".into(),
            end: "1".into(),
            taken: (0..3).map(taken).collect(),
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_a_damaged_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(Record::FILE);
        record().write(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record());
        assert!(std::fs::metadata(&path).unwrap().len() < 1000);

        Record { taken: Vec::new(), ..record() }.write(&path).unwrap();
        assert!(Record::read(&path).unwrap().taken.is_empty());
        for (broken, says) in [
            (Record { version: 3, ..record() }, "version 3"),
            (Record { taken: vec![Taken { learning_rate: f32::NAN, derivatives: vec![0.0; 2] }], ..record() }, "NaN"),
        ] {
            broken.write(&path).unwrap();
            let e = Record::read(&path).unwrap_err().to_string();
            assert!(e.contains(says) && e.contains(Record::FILE), "{e}");
        }
        let other = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        write_safetensors(&path, [("x", &other)], &BTreeMap::new()).unwrap();
        assert!(Record::read(&path).unwrap_err().to_string().contains("no record of a mezo run"));
        let start = serde_json::to_string(&record()).unwrap();
        write_safetensors(&path, [(RATES, &other)], &BTreeMap::from([(START.to_owned(), start)])).unwrap();
        assert!(Record::read(&path).unwrap_err().to_string().contains(DERIVATIVES));
    }
}
