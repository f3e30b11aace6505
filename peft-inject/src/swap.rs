//! Other adapters in a model that is already built.

use std::sync::Arc;

use candle_core::{DType, Tensor, Var};
use peft_core::{Adapter, Error, Result};

use crate::inject::{Injected, check, merged, touched};

impl Injected {
    /// Finds out which tensors the model computes with in place, so that writing to them changes what it says: candle's layers keep
    /// what the builder gave them, but a model may have made copies (heads stacked into one matrix, another type).
    ///
    /// `forward` runs the model on any small input and returns what depends on all of its layers, the same every time (a cache of keys and
    /// values has to be new). It is called once a tensor and twice more. The tensors are as they were afterwards.
    ///
    /// Returns the names of those that cannot be swapped.
    ///
    /// # Errors
    /// When `forward` fails or says something else the second time.
    pub fn probe(&mut self, mut forward: impl FnMut() -> candle_core::Result<Tensor>) -> Result<Vec<String>> {
        let mut says = || -> candle_core::Result<Vec<u32>> {
            let out = forward()?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            Ok(out.into_iter().map(f32::to_bits).collect())
        };
        let before = says()?;
        if says()? != before {
            return Err(Error::msg(
                "the probe's forward pass gives something else the second time; let it begin with an empty cache, and without dropout",
            ));
        }
        let mut copied = Vec::new();
        for (name, vars) in &self.tensors {
            let mut shares = true;
            for var in vars {
                let stored = var.as_tensor().copy()?;
                // Neither a multiple of the tensor, which a norm behind it would take back, nor a constant added, nor zero where it was.
                let other = stored.affine(-0.5, 0.25)?;
                var.set(&other)?;
                let after = says();
                var.set(&stored)?;
                shares &= after? != before;
            }
            if shares {
                self.shared.insert(name.clone());
            } else {
                self.shared.remove(name);
                copied.push(name.clone());
            }
        }
        Ok(copied)
    }

    /// Puts `adapters` (none: the base alone) in the place of those that are merged, in the model's own memory. It holds one more copy of
    /// one tensor at a time. Nobody may run the model meanwhile; if it is shared between threads, keep both behind one lock.
    ///
    /// # Errors
    /// As [`crate::inject`]; an adapter, new or old, for a tensor that [`Injected::probe`] has not seen to be shared; a sum with NaN
    /// or infinity. The model is then what it was before.
    pub fn swap(&mut self, adapters: Vec<Arc<Adapter>>) -> Result<()> {
        check(&self.base, &adapters)?;
        self.check_asked_for(&adapters)?;
        let mut names = touched(&self.base, &adapters);
        names.extend(touched(&self.base, &self.adapters));
        if let Some(name) = names.iter().find(|name| !self.shared.contains(*name)) {
            let why = if self.shared.is_empty() {
                "no probe has found out yet whether the model computes with its tensors in place; call `probe` first"
                    .to_owned()
            } else {
                format!(
                    "the model does not compute with `{name}` in place, but with a copy; build it again with the other adapter"
                )
            };
            return Err(Error::msg(format!("cannot swap: {why}")));
        }
        for (done, name) in names.iter().enumerate() {
            if let Err(e) = self.write(name, &adapters) {
                for name in names.iter().take(done + 1) {
                    self.write(name, &self.adapters)?;
                }
                return Err(e);
            }
        }
        self.adapters = adapters;
        Ok(())
    }

    /// Writes a tensor with `adapters` in it to wherever it was handed out.
    fn write(&self, name: &str, adapters: &[Arc<Adapter>]) -> Result<()> {
        for var in self.tensors.get(name).map(Vec::as_slice).unwrap_or_default() {
            let tensor = merged(&self.base, adapters, name, var.dtype())?;
            set(var, &tensor)?;
        }
        Ok(())
    }
}

fn set(var: &Var, tensor: &Tensor) -> Result<()> {
    Ok(var.set(&tensor.to_device(var.device())?)?)
}
