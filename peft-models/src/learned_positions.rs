//! Tables of learned positions, which are added to embeddings.

use candle_core::Tensor;
use peft_core::{Ctx, Error, FrozenEmbedding, Result, kernels};

use crate::loader::Loader;

/// A table of learned positions.
#[derive(Debug)]
pub(crate) struct LearnedPositions {
    table: FrozenEmbedding,
    /// Rows in front of the first position's.
    offset: usize,
}

impl LearnedPositions {
    /// Loads the table at `path`, which has a row of width `dim` for each of `most` positions behind `offset` others.
    pub(crate) fn load(l: &mut Loader<'_>, path: &str, most: usize, offset: usize, dim: usize) -> Result<Self> {
        Ok(Self { table: l.embedding(path, most + offset, dim)?, offset })
    }

    pub(crate) fn table(&self) -> &FrozenEmbedding {
        &self.table
    }

    /// `rows` with the vectors of `positions`, one each, added.
    pub(crate) fn add_to(&self, rows: &Tensor, positions: &[u32], ctx: &Ctx<'_>) -> Result<Tensor> {
        let in_table: Vec<u32> = positions.iter().map(|p| p + self.offset as u32).collect();
        Ok(kernels::add(rows, &self.table.forward(&in_table, ctx)?)?)
    }
}

/// Refuses a sequence of `length` tokens where the model has a table of fewer positions.
pub(crate) fn check_length(length: usize, most: Option<usize>) -> Result<()> {
    match most {
        Some(most) if length > most => Err(Error::msg(format!(
            "a sequence of {length} tokens (virtual ones among them) is longer than the model's {most} positions; cut rows \
             to data.max_length = {most} or less"
        ))),
        _ => Ok(()),
    }
}
