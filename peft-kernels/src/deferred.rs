//! A weight that stays in its file.

use std::fmt;
use std::sync::Arc;

use candle_core::{Device, Result};

use crate::weight::FrozenWeight;

/// How a weight that is not in memory is read from its file.
type Read = dyn Fn() -> Result<FrozenWeight> + Send + Sync;

/// What is known of a weight that is read anew for every use, and forgotten afterwards. For work that touches each weight once,
/// as merging does: a model then takes no more memory than its largest matrix.
#[derive(Clone)]
pub struct Deferred {
    read: Arc<Read>,
    device: Device,
}

impl Deferred {
    /// A weight that `read` gets from its file onto `device`.
    pub fn new(device: Device, read: impl Fn() -> Result<FrozenWeight> + Send + Sync + 'static) -> Self {
        Self { read: Arc::new(read), device }
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// The weight `[out, in]`.
    pub(crate) fn read(&self, out: usize, inp: usize) -> Result<FrozenWeight> {
        let weight = (self.read)()?;
        if (weight.out_features(), weight.in_features()) != (out, inp) {
            candle_core::bail!(
                "a weight [{out}, {inp}] was [{}, {}] when it was read",
                weight.out_features(),
                weight.in_features()
            );
        }
        Ok(weight)
    }
}

impl fmt::Debug for Deferred {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deferred").field("device", &self.device).finish_non_exhaustive()
    }
}
