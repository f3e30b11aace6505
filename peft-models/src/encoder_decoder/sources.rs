//! The two halves of a batch.

use std::ops::Range;

use peft_core::kernels::SequenceSpan;
use peft_core::{Ctx, Error, Result, TokenBatch, VirtualSpans};

use crate::prompted::Rows;

/// A span of attention without a prefix.
pub(super) fn span(queries: Range<usize>, keys: Range<usize>) -> SequenceSpan {
    SequenceSpan { queries, keys, prefix: 0..0 }
}

/// The targets and sources of a batch, the latter counted from the first of them, and what virtual tokens belong to them.
pub(super) fn halves(batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<(Rows, Rows, VirtualSpans)> {
    let mut targets: Rows = batch.sequences()?.collect();
    if !targets.len().is_multiple_of(2) {
        return Err(Error::msg(format!("{} sequences are not as many targets as sources", targets.len())));
    }
    let mut sources = targets.split_off(targets.len() / 2);
    let first = targets.last().map_or(0, |t| t.end);
    sources.iter_mut().for_each(|s| *s = s.start - first..s.end - first);
    let bounds = batch.bounds.get(..=targets.len()).unwrap_or_default();
    let virtual_tokens = VirtualSpans::of(bounds, ctx)?;
    Ok((targets, sources, virtual_tokens))
}
