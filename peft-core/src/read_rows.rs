//! The rows of hidden states that alone are read further on.

use candle_core::Tensor;

use crate::ctx::{Ctx, Route};
use crate::error::Result;

/// Rows of the hidden states of a batch, ascending, and which adapters they go through. The last block need not make others
/// than those that the head reads: with a class head that is one of each sequence.
#[derive(Debug, Clone)]
pub struct ReadRows {
    rows: Vec<u32>,
    route: Route,
}

impl ReadRows {
    /// `rows`, ascending, of a batch whose tokens `route` leads.
    #[must_use]
    pub fn new(rows: Vec<u32>, route: &Route) -> Self {
        let route = route.select(&rows.iter().map(|&row| row as usize).collect::<Vec<_>>());
        Self { rows, route }
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
        Self { rows: self.rows.iter().map(|&row| place(row)).collect(), route: self.route.clone() }
    }

    /// The context of these rows, for that of all. They are no whole sequences.
    #[must_use]
    pub fn ctx<'b>(&'b self, ctx: &Ctx<'b>) -> Ctx<'b> {
        Ctx { route: &self.route, sequences: &[], ..*ctx }
    }

    /// Which of these rows lie in `tokens`, as places among these rows.
    #[must_use]
    pub fn within(&self, tokens: &std::ops::Range<usize>) -> std::ops::Range<usize> {
        let at = |token: usize| self.rows.partition_point(|&row| (row as usize) < token);
        at(tokens.start)..at(tokens.end)
    }
}
