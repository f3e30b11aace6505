//! Sums over rows (gradients of weights and biases) that do not depend on the number of threads, and the helpers that
//! neutral forms share.

use std::ops::Range;

use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;

use crate::cpu::{PARALLEL_ELEMENTS, threads};

/// Rows whose contributions are added one after another; the blocks' sums are then added in the order of the blocks.
const BLOCK_ROWS: usize = 32;

/// Calls `f(rows, out, sums)` on blocks of rows, in parallel where it pays: `out` is the block's part of `out` (rows of
/// `width`; empty if `out` is), `sums` its own zeroed accumulators. Returns the blocks' accumulators added up.
pub(crate) fn row_blocks_with_sums(
    rows: usize,
    width: usize,
    out: &mut [f32],
    sums: usize,
    f: impl Fn(Range<usize>, &mut [f32], &mut [f32]) + Sync + Send,
) -> Vec<f32> {
    let mut total = vec![0f32; sums];
    if rows == 0 || width == 0 {
        return total;
    }
    let blocks = rows.div_ceil(BLOCK_ROWS);
    let mut partial = vec![0f32; sums * blocks];
    let mut work = Vec::with_capacity(blocks);
    let (mut out, mut rest) = (out, partial.as_mut_slice());
    for b in 0..blocks {
        let range = b * BLOCK_ROWS..rows.min((b + 1) * BLOCK_ROWS);
        let (mine, others) = std::mem::take(&mut out).split_at_mut_checked(range.len() * width).unwrap_or_default();
        let (acc, accs) = std::mem::take(&mut rest).split_at_mut(sums);
        (out, rest) = (others, accs);
        work.push((range, mine, acc));
    }
    if threads() == 1 || rows * width < PARALLEL_ELEMENTS {
        work.into_iter().for_each(|(range, out, acc)| f(range, out, acc));
    } else {
        work.into_par_iter().for_each(|(range, out, acc)| f(range, out, acc));
    }
    for block in partial.chunks_exact(sums.max(1)) {
        total.iter_mut().zip(block).for_each(|(t, p)| *t += p);
    }
    total
}

/// The type that neutral forms calculate in: `f64` stays (the tests' reference), all else is `f32`.
pub(crate) fn wide(t: &Tensor) -> Result<Tensor> {
    t.to_dtype(if t.dtype() == DType::F64 { DType::F64 } else { DType::F32 })
}

/// The sum of all rows of `t`, a vector of its last dimension.
pub(crate) fn column_sum(t: &Tensor) -> Result<Tensor> {
    let width = t.dim(D::Minus1)?;
    t.reshape(((), width))?.sum(0)
}

/// Fails unless `v` is a vector as long as the rows of `x`.
pub(crate) fn check_vector(op: &str, what: &str, x: &Tensor, v: &Tensor) -> Result<()> {
    let Some(&width) = x.dims().last() else { candle_core::bail!("{op}: the input is a scalar and has no rows") };
    if v.dims() != [width] {
        candle_core::bail!("{op}: {what} has shape {:?}, but the rows of {:?} need [{width}]", v.dims(), x.dims());
    }
    Ok(())
}

/// `v` in the type that the fused kernel takes beside `x`; unchanged where the neutral form runs.
pub(crate) fn beside(x: &Tensor, v: &Tensor) -> Result<Tensor> {
    if crate::diff_op::is_cpu_f32(x) { v.to_dtype(DType::F32) } else { Ok(v.clone()) }
}
