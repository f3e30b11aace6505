//! The methods of the family, one a file.

use std::fmt::Debug;

use candle_core::Device;
use peft_core::{ConfigKeys, Error, Parameter, Result, TrainingHook};
use serde_json::Value;

use crate::change::ReparamLinear;
use crate::start::Start;

mod adalora;
mod boft;
mod c3a;
mod cayley;
mod delora;
mod fourierft;
mod gralora;
mod hra;
mod loha;
mod lokr;
mod miss;
mod oft;
mod poly;
mod randlora;
mod road;
mod shira;
mod vblora;
mod vera;

/// What a method makes at a site: the module, and tensors that are stored beside it and not trained.
pub(crate) type Made = (ReparamLinear, Vec<Parameter>);

/// A method with its settings.
pub(crate) trait Method: Send + Sync + Debug {
    /// Tensors that all sites share and that are not trained, for sites of these `(out, in)`.
    fn shared(&self, _dims: &[(usize, usize)], _device: &Device) -> Result<Vec<Parameter>> {
        Ok(Vec::new())
    }

    /// Whether those tensors are in the file, and not made again from the config.
    fn stores_shared(&self) -> bool {
        true
    }

    /// Whether files repeat them at every layer, as PEFT's do where a layer holds a reference.
    fn repeats_shared(&self) -> bool {
        false
    }

    /// Parameters that all sites share.
    fn shared_trained(&self, _seed: u64, _device: &Device) -> Result<Vec<Parameter>> {
        Ok(Vec::new())
    }

    /// Refuses a run of so many steps over these parameters where training does not do here what the settings ask for.
    fn check_training(&self, _steps: u64, _parameters: &[&Parameter]) -> Result<()> {
        Ok(())
    }

    /// What the method does in training beside its formula, for layers with these parameters.
    fn training_hook(&self, _layers: &[&[Parameter]]) -> Result<Option<Box<dyn TrainingHook>>> {
        Ok(None)
    }

    /// How many tasks there are, where the module of a site does another thing for each.
    fn tasks(&self) -> Option<usize> {
        None
    }

    /// The module of one site.
    fn module(&self, start: Start<'_>) -> Result<Made>;
}

/// A method as the catalogue knows it.
#[derive(Debug)]
pub(crate) struct Kind {
    /// In recipes.
    pub(crate) name: &'static str,
    pub(crate) peft_type: &'static str,
    /// In messages.
    pub(crate) label: &'static str,
    /// Keys of PEFT's config beyond those of all methods, with PEFT's defaults.
    pub(crate) keys: fn() -> Value,
    /// Keys of which only PEFT's default is built here.
    pub(crate) only_default: &'static [&'static str],
    /// Keys by module that selections know under another name, or not at all.
    pub(crate) patterns: &'static [(&'static str, Option<&'static str>)],
    pub(crate) read: fn(ConfigKeys<'_>) -> Result<Box<dyn Method>>,
}

pub(crate) const KINDS: &[Kind] = &[
    vera::KIND,
    loha::KIND,
    lokr::KIND,
    adalora::KIND,
    hra::KIND,
    oft::KIND,
    boft::KIND,
    miss::KIND,
    c3a::KIND,
    road::KIND,
    delora::KIND,
    fourierft::KIND,
    shira::KIND,
    randlora::KIND,
    vblora::KIND,
    gralora::KIND,
    poly::KIND,
];

/// The largest size that a config may ask for.
const MOST: usize = 1 << 20;

/// A rank or another size.
fn size(keys: ConfigKeys<'_>, key: &str, default: usize) -> Result<usize> {
    Ok(keys.count(key, MOST)?.unwrap_or(default))
}

/// A size that may be 0.
fn size_or_zero(keys: ConfigKeys<'_>, key: &str, default: usize) -> Result<usize> {
    match keys.get(key).and_then(Value::as_u64) {
        Some(0) => Ok(0),
        _ => size(keys, key, default),
    }
}

/// A seed of torch's generator.
fn seed(keys: ConfigKeys<'_>, key: &str, default: i64) -> Result<i64> {
    match keys.get(key) {
        None => Ok(default),
        Some(v) => v.as_i64().ok_or_else(|| Error::config(key, format!("{v} is not a whole number"))),
    }
}

/// A probability of dropout.
fn dropout(keys: ConfigKeys<'_>, key: &str) -> Result<f32> {
    let p = keys.number(key, 0.0)?;
    match (0.0..1.0).contains(&p) {
        true => Ok(p as f32),
        false => Err(Error::config(key, format!("{p} is outside [0, 1)"))),
    }
}
