//! What modules need that act on whole sequences of a packed batch.

use std::ops::Range;

use candle_core::Tensor;
use peft_kernels::SequenceSpan;

use crate::error::{Error, Result};

/// `change(i, rows)` for the rows `[tokens, width]` of each sequence `i`, one after another.
///
/// # Errors
/// When the sequences do not cover the rows of `x`, or a change fails.
pub fn each(
    x: &Tensor,
    sequences: &[SequenceSpan],
    change: impl Fn(usize, Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    check(x, sequences)?;
    let parts = sequences
        .iter()
        .enumerate()
        .map(|(i, span)| change(i, x.narrow(0, span.queries.start, span.queries.len())?))
        .collect::<Result<Vec<_>>>()?;
    match parts.as_slice() {
        [one] => Ok(one.clone()),
        parts => Ok(Tensor::cat(parts, 0)?),
    }
}

/// Refuses sequences that do not cover the rows of `x` in order.
///
/// # Errors
/// When they do not.
pub fn check(x: &Tensor, sequences: &[SequenceSpan]) -> Result<()> {
    let mut end = 0;
    for span in sequences {
        if span.queries.start != end {
            return Err(Error::msg("the sequences of a batch do not follow one another"));
        }
        end = span.queries.end;
    }
    if end != x.dim(0)? {
        return Err(Error::msg(format!("the sequences of a batch cover {end} of {} rows", x.dim(0)?)));
    }
    Ok(())
}

/// The sequences of the rows of `run`, counted from its start.
///
/// # Errors
/// A sequence of which only a part lies in the run.
pub(crate) fn within(sequences: &[SequenceSpan], run: &Range<usize>) -> Result<Vec<SequenceSpan>> {
    let mut found = Vec::new();
    for span in sequences.iter().filter(|s| s.queries.start < run.end && run.start < s.queries.end) {
        if span.queries.start < run.start || run.end < span.queries.end {
            return Err(Error::msg("a sequence goes through several adapters, one of which acts on whole sequences"));
        }
        let queries = span.queries.start - run.start..span.queries.end - run.start;
        found.push(SequenceSpan { queries, ..span.clone() });
    }
    Ok(found)
}
