//! Relative position biases: what is added to the logit of a query and a key for the distance between them (T5, Raffel et
//! al. 2019, arXiv:1910.10683). A table over distances takes memory linear in the lengths; a matrix of biases is never made.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::plan::{AttentionPlan, Sight};

/// Checks that a bias `[distances, heads]` fits the plan and holds every distance that its sequences have.
pub(super) fn validate(plan: &AttentionPlan, bias: &Tensor, zero: usize) -> Result<()> {
    let distances = match bias.dims() {
        [distances, heads] if *heads == plan.heads => *distances,
        dims => candle_core::bail!("attention: the bias has shape {dims:?}, not [distances, {} heads]", plan.heads),
    };
    if plan.softcap.is_some() {
        candle_core::bail!("attention: a soft cap and a relative bias exclude each other");
    }
    for span in &plan.sequences {
        for sight in [Sight::prefix(plan, span), Sight::own(plan, span)] {
            for query in 0..span.queries.len() {
                let keys = sight.keys_of(query);
                let rows = first_row(zero, sight.position(query), &keys);
                let fits = rows >= 0 && rows.saturating_add_unsigned(keys.len()) <= distances as isize;
                if !keys.is_empty() && !fits {
                    candle_core::bail!(
                        "attention: a bias of {distances} distances, {zero} of them before 0, is too short for {} queries \
                         and {} keys",
                        span.queries.len(),
                        span.prefix.len() + span.keys.len()
                    );
                }
            }
        }
    }
    Ok(())
}

/// The row of the table for a query at `position` and the first of `keys`.
fn first_row(zero: usize, position: isize, keys: &Range<usize>) -> isize {
    (zero as isize).wrapping_add(keys.start as isize).wrapping_sub(position)
}

/// A table of biases as the fused kernels read it: heads first, in base 2.
#[derive(Debug)]
pub(super) struct Table {
    values: Vec<f32>,
    distances: usize,
    zero: usize,
}

impl Table {
    /// From `[distances, heads]`, in which row `zero` is for a query and a key at the same position.
    pub(super) fn new(bias: &[f32], heads: usize, zero: usize) -> Self {
        let distances = bias.len() / heads.max(1);
        let value = |i: usize| bias[i % distances * heads + i / distances] * std::f32::consts::LOG2_E;
        Self { values: (0..bias.len()).map(value).collect(), distances, zero }
    }

    /// How many distances it holds.
    pub(super) fn distances(&self) -> usize {
        self.distances
    }

    /// Which distances a query at `position` has to `keys`.
    #[inline]
    pub(super) fn rows(&self, position: isize, keys: &Range<usize>) -> Range<usize> {
        let first = first_row(self.zero, position, keys) as usize;
        first..first + keys.len()
    }

    /// What `head` adds to the logits of a query at `position` and `keys`.
    #[inline]
    pub(super) fn of(&self, head: usize, position: isize, keys: &Range<usize>) -> &[f32] {
        &self.values[head * self.distances..][self.rows(position, keys)]
    }
}
