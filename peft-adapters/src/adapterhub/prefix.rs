//! Prefixes in AdapterHub's files (`PrefixTuningConfig` in `adapter_config.py`, `methods/prefix_tuning.py`). One tensor stands for the
//! keys and values of all layers, under the model's name and again under that of each layer; the package does not count the prefix among
//! the positions. Where a network makes the prefix, what it makes is read, as PEFT stores it.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels;
use peft_core::{ConfigKeys, Error, Result, SafetensorsFile};
use serde_json::{Map, Value, json};

use super::names::{Family, PrefixPlace};
use crate::config::activation;

/// `peft_type` of prefixes.
pub(super) const PREFIX: &str = "PREFIX_TUNING";
/// Our name of the prefix, which is PEFT's.
pub(super) const EMBEDDINGS: &str = "prompt_embeddings";
/// What our names of gates begin with.
const GATES: &str = "prefix_gates.";

fn known() -> Map<String, Value> {
    let keys = json!({
        "bottleneck_size": 512, "cross_prefix": true, "dropout": 0.0, "encoder_prefix": true, "flat": false, "init_weights_seed": null,
        "leave_out": [], "non_linearity": "tanh", "prefix_length": 30, "shared_gating": true, "use_gating": false
    });
    keys.as_object().cloned().unwrap_or_default()
}

fn place(family: &Family) -> Result<&PrefixPlace> {
    family.prefix.as_ref().ok_or_else(|| {
        let message = "prefixes of an encoder–decoder stand in all its attentions in AdapterHub's package, and in the decoder's own here";
        Error::config("architecture", message)
    })
}

/// Our settings for AdapterHub's.
pub(super) fn ours(own: &Map<String, Value>) -> Result<Map<String, Value>> {
    let keys = ConfigKeys(own);
    keys.refuse_unknown("prefix_tuning of AdapterHub's", &known())?;
    if keys.number("dropout", 0.0)? != 0.0 {
        return Err(Error::config(
            "dropout",
            "on a prefix is not supported; 0 reads the adapter for all but further training",
        ));
    }
    if keys.get("leave_out").and_then(Value::as_array).is_some_and(|blocks| !blocks.is_empty()) {
        return Err(Error::config("leave_out", "of a prefix is not supported: here every layer has one"));
    }
    let settings = json!({
        "peft_type": PREFIX, "num_virtual_tokens": keys.count("prefix_length", 1 << 24)?.unwrap_or(30), "inference_mode": true,
        "use_gating": keys.flag("use_gating", false)?, "shared_gating": keys.flag("shared_gating", true)?, "moves_positions": false
    });
    Ok(settings.as_object().cloned().unwrap_or_default())
}

/// What a file holds of a prefix.
#[derive(Default)]
pub(super) struct Found {
    /// AdapterHub's names of each tensor, which is there several times, by what they end with.
    tensors: BTreeMap<String, Vec<String>>,
    /// Layers that the names tell of.
    layers: usize,
}

impl Found {
    /// Takes `key` where it is a part of the prefix of the adapter `name`; for a gate, gives our name for it.
    pub(super) fn take(&mut self, family: &Family, key: &str, stored: &str, name: &str) -> Result<Taken> {
        let of_gate = key.split_once(&format!(".prefix_tuning.prefix_gates.{name}."));
        let of_prefix = key.split_once(&format!(".prefix_tunings.{name}."));
        let Some((module, tensor)) = of_gate.or(of_prefix) else { return Ok(Taken::No) };
        let place = place(family)?;
        let layer = place.layer(family.whole(module).trim_end_matches(".prefix_tuning.pool"));
        self.layers = self.layers.max(layer.map_or(0, |layer| layer + 1));
        if of_gate.is_some() {
            return Ok(layer.map_or(Taken::No, |layer| Taken::Gate(format!("{GATES}{layer}.{tensor}"))));
        }
        match tensor.strip_prefix(place.location).and_then(|rest| rest.strip_prefix('.')) {
            Some(tensor) => self.tensors.entry(tensor.to_owned()).or_default().push(stored.to_owned()),
            None => return Ok(Taken::No),
        }
        Ok(Taken::Prefix)
    }

    /// How many layers the names tell of.
    pub(super) fn layers(&self) -> Option<usize> {
        Some(self.layers).filter(|layers| *layers > 0)
    }

    /// The prefix `[virtual tokens, layers · 2 · width]`: keys, then values, layer by layer.
    pub(super) fn embeddings(&self, file: &SafetensorsFile, own: &Map<String, Value>) -> Result<Tensor> {
        let keys = ConfigKeys(own);
        let count = keys.count("prefix_length", 1 << 24)?.unwrap_or(30);
        if keys.flag("flat", false)? {
            let flat = self.one(file, "control_trans")?.flatten_all()?;
            let width = flat.elem_count() / count;
            if width * count != flat.elem_count() {
                let message = format!("is {count}, and the prefix in the file has {} elements", flat.elem_count());
                return Err(Error::config("prefix_length", message));
            }
            return Ok(flat.reshape((count, width))?);
        }
        let act = activation(keys, "tanh")?;
        let words = self.one(file, "wte.weight")?;
        if words.dim(0)? != count {
            let message = format!("is {count}, and the prefix in the file has {}", words.dim(0)?);
            return Err(Error::config("prefix_length", message));
        }
        let inner = self.linear(file, &words, "control_trans.0")?;
        self.linear(file, &kernels::activation(&inner, act)?, "control_trans.2")
    }

    fn linear(&self, file: &SafetensorsFile, x: &Tensor, layer: &str) -> Result<Tensor> {
        let weight = self.one(file, &format!("{layer}.weight"))?;
        Ok(x.matmul(&weight.t()?)?.broadcast_add(&self.one(file, &format!("{layer}.bias"))?)?)
    }

    /// A tensor, of which the file has the same several times.
    fn one(&self, file: &SafetensorsFile, tensor: &str) -> Result<Tensor> {
        let names = self.tensors.get(tensor).map_or(&[][..], Vec::as_slice);
        let Some((first, others)) = names.split_first() else {
            return Err(Error::file(file.path(), format!("has no `{tensor}` of the prefix")));
        };
        let value = file.tensor_as(first, DType::F32, &Device::Cpu)?;
        for other in others {
            let copy = file.tensor_as(other, DType::F32, &Device::Cpu)?;
            if copy.dims() != value.dims() || copy.ne(&value)?.max_all()?.to_scalar::<u8>()? != 0 {
                let message =
                    format!("holds `{first}` and `{other}`, which stand for one tensor, with different values");
                return Err(Error::file(file.path(), message));
            }
        }
        Ok(value)
    }
}

/// What became of a key.
pub(super) enum Taken {
    /// It is of no prefix.
    No,
    Prefix,
    /// A gate, by our name.
    Gate(String),
}

/// AdapterHub's settings for ours.
pub(super) fn theirs(config: &Map<String, Value>, family: &Family) -> Result<Map<String, Value>> {
    place(family)?;
    let keys = ConfigKeys(config);
    if keys.flag("moves_positions", true)? {
        let message = "is true, as in PEFT: the positions of a sequence begin after the prefix, and in AdapterHub's package at 0; \
                       train a union with a prefix with moves_positions = false";
        return Err(Error::config("moves_positions", message));
    }
    let mut own = known();
    let length = config.get("num_virtual_tokens").cloned().unwrap_or(Value::Null);
    own.extend(
        [("architecture", "prefix_tuning".into()), ("flat", true.into()), ("prefix_length", length)]
            .map(|(key, value): (&str, Value)| (key.to_owned(), value)),
    );
    for (key, usual) in [("use_gating", false), ("shared_gating", true)] {
        own.insert(key.to_owned(), keys.flag(key, usual)?.into());
    }
    Ok(own)
}

/// AdapterHub's names in the adapter `name` for one of our keys of a prefix with so many layers, where that is known; none for another
/// key.
pub(super) fn their_keys(family: &Family, key: &str, name: &str, layers: Option<usize>) -> Result<Vec<String>> {
    if let Some((layer, tensor)) = key.strip_prefix(GATES).and_then(|rest| rest.split_once('.')) {
        let attention = place(family)?.attention(layer);
        return Ok(vec![format!("{attention}.prefix_tuning.prefix_gates.{name}.{tensor}")]);
    }
    if key != EMBEDDINGS {
        return Ok(Vec::new());
    }
    let place = place(family)?;
    let end = format!("prefix_tunings.{name}.{}.control_trans", place.location);
    let of_layer = |layer: usize| format!("{}.prefix_tuning.pool.{end}", place.attention(&layer.to_string()));
    let whole = format!("{}.prefix_tuning.{end}", family.body);
    Ok(std::iter::once(whole).chain((0..layers.unwrap_or(0)).map(of_layer)).collect())
}

/// Whether a folder for writing has the prefix itself, and not the network that makes it.
pub(super) fn check_written(path: &Path, has_embeddings: bool) -> Result<()> {
    if has_embeddings {
        return Ok(());
    }
    let message = "holds the network that makes the prefix, as checkpoints do: convert the adapter that training writes at its end";
    Err(Error::file(path, message))
}
