//! The builder that hands out merged weights.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use peft_core::{Adapter, BaseModel, Error, Result, SiteModule};
use peft_models::merge::Merged;

use crate::base::Base;

/// Builds a model from `base` with `adapters` merged into it, one after another. `build` gets a builder that gives tensors of
/// `dtype` on `device`; the sums are made on the CPU in `f32` and rounded once.
///
/// # Errors
/// An adapter that no weight can hold (virtual tokens, bottlenecks, ReFT, …), what `build` fails with, and an adapter for a layer
/// that the model never asked for, which would be silently without effect.
pub fn inject<M>(
    base: &Arc<Base>,
    adapters: Vec<Arc<Adapter>>,
    dtype: DType,
    device: &Device,
    build: impl FnOnce(VarBuilder<'_>) -> candle_core::Result<M>,
) -> Result<(M, Injected)> {
    check(base, &adapters)?;
    let handed = Handed::default();
    let model = {
        let touched = touched(base, &adapters);
        let backend = Backend { base, adapters: &adapters, touched, handed: &handed };
        build(VarBuilder::from_backend(Box::new(backend), dtype, device.clone()))?
    };
    let injected = Injected { base: Arc::clone(base), adapters, tensors: handed.take(), shared: BTreeSet::new() };
    injected.check_asked_for(&injected.adapters)?;
    Ok((model, injected))
}

/// The tensors that a model was built from, and what is merged into them.
#[derive(Debug)]
pub struct Injected {
    pub(crate) base: Arc<Base>,
    pub(crate) adapters: Vec<Arc<Adapter>>,
    /// What was handed out under each name of the checkpoint.
    pub(crate) tensors: BTreeMap<String, Vec<Var>>,
    /// Those which the model was seen to compute with.
    pub(crate) shared: BTreeSet<String>,
}

impl Injected {
    /// The adapters that are merged, in order.
    #[must_use]
    pub fn adapters(&self) -> &[Arc<Adapter>] {
        &self.adapters
    }

    /// Refuses adapters for layers that the model was not built from.
    pub(crate) fn check_asked_for(&self, adapters: &[Arc<Adapter>]) -> Result<()> {
        match touched(&self.base, adapters).iter().find(|name| !self.tensors.contains_key(*name)) {
            None => Ok(()),
            Some(name) => Err(Error::msg(format!(
                "the adapter changes `{name}`, which the model never asked its VarBuilder for, so it would have no effect; the model \
                 leaves that layer out or reads it under another name"
            ))),
        }
    }
}

/// Refuses what cannot be merged into this checkpoint.
pub(crate) fn check(base: &Base, adapters: &[Arc<Adapter>]) -> Result<()> {
    Merged::new(base, adapters.to_vec())?;
    let Some(path) = base.tied_embedding() else { return Ok(()) };
    let table = base.sites().find(path).map(|site| site.id);
    for adapter in adapters {
        if let Some(SiteModule::Embedding(module)) = table.and_then(|id| adapter.at(id)?.module.as_ref())
            && !module.changes_tied_head()
        {
            return Err(Error::msg(format!(
                "the adapter changes `{path}` but not the output head, which in this model is the same tensor; use a checkpoint \
                 with a head of its own (`tie_word_embeddings` false), or an adapter with `ensure_weight_tying`"
            )));
        }
    }
    Ok(())
}

/// Names of the tensors that adapters change, in the checkpoint.
pub(crate) fn touched(base: &Base, adapters: &[Arc<Adapter>]) -> BTreeSet<String> {
    let sites = adapters.iter().flat_map(|adapter| adapter.touched().map(|(id, _)| id));
    let stored = sites.filter_map(|id| base.sites().get(id)).map(|site| site.stored_name());
    let names = stored.flat_map(|stored| [format!("{stored}.weight"), format!("{stored}.bias")]);
    names.filter(|name| base.checkpoint().contains(name)).collect()
}

/// A tensor of the checkpoint with the adapters in it, on the CPU.
pub(crate) fn merged(base: &Base, adapters: &[Arc<Adapter>], name: &str, dtype: DType) -> Result<Tensor> {
    Merged::new(base, adapters.to_vec())?.tensor_as(name, dtype)
}

/// What was given to the model so far.
#[derive(Debug, Default)]
struct Handed(Mutex<BTreeMap<String, Vec<Var>>>);

impl Handed {
    fn take(self) -> BTreeMap<String, Vec<Var>> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tensor that was handed out before, or the one that `make` makes.
    fn get(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
        make: impl FnOnce() -> candle_core::Result<Var>,
    ) -> candle_core::Result<Tensor> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all
            .get(name)
            .and_then(|vars| vars.iter().find(|var| var.dtype() == dtype && var.device().same_device(device)));
        if let Some(var) = known {
            return Ok(var.as_detached_tensor());
        }
        let var = make()?;
        let tensor = var.as_detached_tensor();
        all.entry(name.to_owned()).or_default().push(var);
        Ok(tensor)
    }
}

struct Backend<'a> {
    base: &'a Base,
    adapters: &'a [Arc<Adapter>],
    touched: BTreeSet<String>,
    handed: &'a Handed,
}

impl SimpleBackend for Backend<'_> {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.base.checkpoint().expect_shape(name, shape.dims()).map_err(candle_core::Error::wrap)?;
        self.get_unchecked(name, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.handed.get(name, dtype, device, || {
            let tensor = if self.touched.contains(name) {
                merged(self.base, self.adapters, name, dtype)
            } else {
                self.base.tensor(name, dtype)
            };
            Var::from_tensor(&tensor.map_err(candle_core::Error::wrap)?.to_device(device)?)
        })
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.base.checkpoint().contains(name)
    }
}
