//! Checkpoints of the body alone.

use candle_core::Tensor;
use peft_core::Result;
use peft_core::kernels::FrozenWeight;

use crate::source::WeightSource;

/// A source whose names may lack the body's in front, as in the first files of GPT-2: `wte.weight`.
#[derive(Debug)]
pub(super) struct BodySource<'a> {
    inner: &'a dyn WeightSource,
    body: &'static str,
}

impl<'a> BodySource<'a> {
    pub(super) fn new(inner: &'a dyn WeightSource, body: &'static str) -> Self {
        Self { inner, body }
    }

    /// The name that the source has for `name`.
    fn stored<'n>(&self, name: &'n str) -> &'n str {
        let alone = name.strip_prefix(self.body).and_then(|rest| rest.strip_prefix('.'));
        alone.filter(|alone| !self.inner.contains(name) && self.inner.contains(alone)).unwrap_or(name)
    }
}

impl WeightSource for BodySource<'_> {
    fn contains(&self, name: &str) -> bool {
        self.inner.contains(self.stored(name))
    }

    fn weight(&self, name: &str, dims: (usize, usize)) -> Result<FrozenWeight> {
        self.inner.weight(self.stored(name), dims)
    }

    fn experts(&self, name: &str, dims: (usize, usize, usize)) -> Result<Vec<FrozenWeight>> {
        self.inner.experts(self.stored(name), dims)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        self.inner.vector(self.stored(name), len)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}
