//! Keys and values of the tokens that a model has already seen.

use candle_core::{DType, Device, Tensor};
use peft_core::Result;
use peft_core::kernels::SequenceSpan;

/// The cache of one layer: rows of keys and values `[capacity, kv_heads · head_dim]`, each sequence in a region of its
/// own, so that a step appends without moving what is there.
#[derive(Debug, Clone)]
pub struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

impl LayerCache {
    /// Room for `capacity` rows of `width`.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new(capacity: usize, width: usize, dtype: DType, device: &Device) -> Result<Self> {
        let make = || Tensor::zeros((capacity, width), dtype, device);
        Ok(Self { keys: make()?, values: make()? })
    }

    /// Writes the new rows of each sequence (`span.queries` of `k` and `v`) to the end of its `span.keys`.
    ///
    /// # Errors
    /// When a region is too small.
    pub fn append(&mut self, k: &Tensor, v: &Tensor, sequences: &[SequenceSpan]) -> Result<()> {
        for span in sequences {
            let (n, end) = (span.queries.len(), span.keys.end);
            let start = end.saturating_sub(n);
            self.write(start, &k.narrow(0, span.queries.start, n)?, &v.narrow(0, span.queries.start, n)?)?;
        }
        Ok(())
    }

    /// Writes keys and values to the rows from `start` on.
    ///
    /// # Errors
    /// When there are not so many.
    pub fn write(&mut self, start: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        for (cache, new) in [(&self.keys, k), (&self.values, v)] {
            cache.slice_set(&new.to_dtype(cache.dtype())?.contiguous()?, 0, start)?;
        }
        Ok(())
    }

    /// All rows of keys.
    #[must_use]
    pub fn keys(&self) -> &Tensor {
        &self.keys
    }

    /// All rows of values.
    #[must_use]
    pub fn values(&self) -> &Tensor {
        &self.values
    }
}
