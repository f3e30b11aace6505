//! Products of which one dimension is thin, as LoRA's are: they are bound by memory, so nothing is packed and the large
//! operands are read once, where they lie.

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use crate::cpu::{self, Mat};
use crate::tile::Gemm;

/// The thin dimension up to which this beats a GEMM that packs; see `benches/ops.rs`.
const THIN: usize = 64;
/// Rows of a work item, in tiles of eight.
const ROWS: usize = 64;
/// Columns of a work item: a panel of as many of a thousand rows stays in the second-level cache.
const COLUMNS: usize = 64;
/// Multiplications below which one thread does it.
const PARALLEL_WORK: usize = 128 * 1024;

/// Whether a product is made here.
pub(crate) fn suits(lhs: Mat<'_>, rhs: Mat<'_>) -> bool {
    let (m, k, n) = (lhs.rows(), lhs.cols(), rhs.cols());
    // A right-hand side that must be turned around first has to be the thin one.
    let thin = if rhs.beyond(0).2 == 1 { m.min(k).min(n) } else { k.min(n) };
    m > 1 && thin <= THIN
}

/// `scale·(lhs × rhs)` as a new row-major buffer.
pub(crate) fn product(lhs: Mat<'_>, rhs: Mat<'_>, scale: f32) -> Vec<f32> {
    let (m, k, n) = (lhs.rows(), lhs.cols(), rhs.cols());
    if m <= THIN {
        let mut out = vec![0f32; m * n];
        gemm(&mut out, n, false, lhs, rhs, scale, true);
        return out;
    }
    let rhs = RowMajor::of(rhs);
    let part = Part { lhs, rhs: &rhs, scale, add: false, arch: pulp::Arch::new() };
    cpu::new_rows(m * n, n, k * n, |first, rows| part.run(rows, n, first..first + rows.len() / n, 0..n))
}

/// `dst = scale·(lhs × rhs)`, or that added to `dst`, whose rows lie `stride` apart. The caller has checked that all
/// matrices lie inside their slices. What is summed in what order does not depend on the number of threads.
pub(crate) fn gemm(dst: &mut [f32], stride: usize, add: bool, lhs: Mat<'_>, rhs: Mat<'_>, scale: f32, parallel: bool) {
    let (m, k, n) = (lhs.rows(), lhs.cols(), rhs.cols());
    let rhs = RowMajor::of(rhs);
    let part = Part { lhs, rhs: &rhs, scale, add, arch: pulp::Arch::new() };
    if !parallel || m * k * n < PARALLEL_WORK {
        part.run(dst, stride, 0..m, 0..n);
    } else if m > THIN || n <= COLUMNS {
        let end = (m - 1) * stride + n;
        dst[..end].par_chunks_mut(ROWS * stride).enumerate().for_each(|(i, c)| {
            part.run(c, stride, i * ROWS..(i * ROWS + ROWS).min(m), 0..n);
        });
    } else {
        // Few rows of many columns: each item makes its columns apart, since a slice of them is not contiguous.
        let starts: Vec<usize> = (0..n).step_by(COLUMNS).collect();
        let panels: Vec<Vec<f32>> = starts
            .par_iter()
            .map(|&start| {
                let width = COLUMNS.min(n - start);
                let mut panel = vec![0f32; m * width];
                if add {
                    for (to, from) in panel.chunks_exact_mut(width).zip(dst[start..].chunks(stride)) {
                        to.copy_from_slice(&from[..width]);
                    }
                }
                part.run(&mut panel, width, 0..m, start..start + width);
                panel
            })
            .collect();
        for (start, panel) in starts.into_iter().zip(panels) {
            let width = COLUMNS.min(n - start);
            for (to, from) in dst[start..].chunks_mut(stride).zip(panel.chunks_exact(width)) {
                to[..width].copy_from_slice(from);
            }
        }
    }
}

/// A product of which rows and columns are made piece by piece.
struct Part<'a> {
    lhs: Mat<'a>,
    rhs: &'a RowMajor<'a>,
    scale: f32,
    add: bool,
    arch: pulp::Arch,
}

impl Part<'_> {
    fn run(&self, c: &mut [f32], c_row: usize, rows: Range<usize>, columns: Range<usize>) {
        let (a, a_row, a_col) = self.lhs.beyond(rows.start);
        self.arch.dispatch(Gemm {
            m: rows.len(),
            k: self.lhs.cols(),
            n: columns.len(),
            a,
            a_row,
            a_col,
            b: self.rhs.data.get(columns.start..).unwrap_or_default(),
            b_row: self.rhs.stride,
            c,
            c_row,
            scale: self.scale,
            add: self.add,
        });
    }
}

/// A right-hand side whose rows are contiguous, copied where it was not.
struct RowMajor<'a> {
    data: Cow<'a, [f32]>,
    stride: usize,
}

impl<'a> RowMajor<'a> {
    fn of(m: Mat<'a>) -> Self {
        let (data, row, col) = m.beyond(0);
        if col == 1 {
            return Self { data: data.into(), stride: row };
        }
        let (rows, cols) = (m.rows(), m.cols());
        let mut copy = Vec::with_capacity(rows * cols);
        for i in 0..rows {
            copy.extend((0..cols).map(|j| data.get(i * row + j * col).copied().unwrap_or(0.0)));
        }
        Self { data: copy.into(), stride: cols }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(lhs: &[f32], rhs: &[f32], (m, k, n): (usize, usize, usize)) -> Vec<f32> {
        let at =
            |i: usize, j: usize| (0..k).map(|p| f64::from(lhs[i * k + p]) * f64::from(rhs[p * n + j])).sum::<f64>();
        (0..m * n).map(|x| at(x / n, x % n) as f32).collect()
    }

    fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..rows * cols).map(|i| x[(i % rows) * cols + i / rows]).collect()
    }

    /// All three ways of sharing the work, both orders of both operands, replaced and added.
    #[test]
    fn equals_the_definition() {
        for shape in [(3, 5, 4), (70, 33, 5), (300, 130, 16), (5, 200, 301), (16, 300, 130), (333, 8, 97), (64, 40, 64)]
        {
            let (m, k, n) = shape;
            let stream = |site| crate::Stream { seed: 7, step: 0, site };
            let (a, b) = (stream(1).normal_vec(m * k, 1.0), stream(2).normal_vec(k * n, 1.0));
            let want = reference(&a, &b, shape);
            let (at, bt) = (transposed(&a, m, k), transposed(&b, k, n));
            for lhs in [Mat::new(&a, m, k), Mat::new(&at, k, m).t()] {
                for rhs in [Mat::new(&b, k, n), Mat::new(&bt, n, k).t()] {
                    for (got, want) in product(lhs, rhs, 0.5).iter().zip(&want) {
                        assert!((got - 0.5 * want).abs() < 1e-4, "{got} in a product {shape:?}");
                    }
                    for (add, parallel) in [(false, true), (true, true), (true, false)] {
                        let stride = n + 3;
                        let mut dst = vec![1f32; m * stride];
                        gemm(&mut dst, stride, add, lhs, rhs, 0.5, parallel);
                        for i in 0..m {
                            for j in 0..stride {
                                let sum = 0.5 * want.get(i * n + j).copied().unwrap_or(0.0) + f32::from(u8::from(add));
                                let want = if j < n { sum } else { 1.0 };
                                let got = dst[i * stride + j];
                                assert!((got - want).abs() < 1e-4, "({i}, {j}) of {shape:?}: {got}, not {want}");
                            }
                        }
                    }
                }
            }
        }
    }
}
