//! The rows of hidden states that alone are read further on.

use std::ops::Range;

use candle_core::Tensor;

use crate::ctx::{Ctx, Route};
use crate::error::Result;

/// Rows of the hidden states of a batch, ascending, and which adapters they go through. The last block need not make others
/// than those that the head reads: with a class head that is one of each sequence.
#[derive(Debug, Clone)]
pub struct ReadRows {
    rows: Vec<u32>,
    route: Route,
    /// Of a first pass, where there was one.
    first: Option<Tensor>,
}

impl ReadRows {
    /// `rows`, ascending, of a batch whose tokens are those of `ctx`.
    ///
    /// # Errors
    /// When a row has no first pass, and there was one.
    pub fn new(rows: Vec<u32>, ctx: &Ctx<'_>) -> Result<Self> {
        let route = ctx.route.select(&rows.iter().map(|&row| row as usize).collect::<Vec<_>>());
        let first = ctx.first.map(|first| peft_kernels::select_rows(first, &rows)).transpose()?;
        Ok(Self { rows, route, first })
    }

    /// These rows `[rows, width]` of `hidden` `[tokens, width]`.
    ///
    /// # Errors
    /// When a row is outside `hidden`.
    pub fn of(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(peft_kernels::select_rows(hidden, &self.rows)?)
    }

    /// The same rows where they lie at `place(row)` in hidden states that hold more than the batch's tokens; they stay in order.
    #[must_use]
    pub fn at(&self, place: impl Fn(u32) -> u32) -> Self {
        Self { rows: self.rows.iter().map(|&row| place(row)).collect(), ..self.clone() }
    }

    /// A stretch of these rows, counted among them.
    ///
    /// # Errors
    /// When it reaches past them.
    pub fn part(&self, part: Range<usize>) -> Result<Self> {
        let first = self.first.as_ref().map(|first| first.narrow(0, part.start, part.len())).transpose()?;
        let route = self.route.select(&part.clone().collect::<Vec<_>>());
        Ok(Self { rows: self.rows.get(part).unwrap_or_default().to_vec(), route, first })
    }

    /// The context of these rows, for that of all. They are no whole sequences.
    #[must_use]
    pub fn ctx<'b>(&'b self, ctx: &Ctx<'b>) -> Ctx<'b> {
        Ctx { route: &self.route, sequences: &[], first: self.first.as_ref(), ..*ctx }
    }

    /// Which of these rows lie in `tokens`, as places among these rows.
    #[must_use]
    pub fn within(&self, tokens: &Range<usize>) -> Range<usize> {
        let at = |token: usize| self.rows.partition_point(|&row| (row as usize) < token);
        at(tokens.start)..at(tokens.end)
    }
}
