//! Products of a few rows with a weight, `Y += scale·X·Wᵀ`: what a step of decoding consists of.
//!
//! Such a product takes as long as reading `W` does. A packing GEMM first copies `W` into its own order, or widens all of
//! it into a buffer; here every row of `W` is read once, where it lies, widened in the first-level cache where it is not
//! `f32`, and meets all rows of `X` there. Activations stay `f32` whatever the storage.

use std::ops::Range;

use candle_core::Result;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::cpu::threads;
use crate::shared::Shared;
use crate::simd::prefetch;
use crate::stored::Stored;

/// Rows of `X` up to which a product is made here. With more, arithmetic and not memory is the bound, and a GEMM is faster.
pub(crate) const MAX_TOKENS: usize = 16;

/// Rows of `W` that go through `X` together.
const GROUP: usize = 4;
/// Columns after which sums are put down, so that the widened part of a group stays in the first-level cache; a multiple
/// of every block's length.
const CHUNK: usize = 1024;
/// Vectors of a row between two requests for memory that will be read later.
const STRIDE: usize = 16;
/// Elements of `W` for which starting another thread pays.
const PART: usize = 32 * 1024;

/// The rows of `X`, of `width` elements each, `stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tokens<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) count: usize,
    pub(crate) width: usize,
    pub(crate) stride: usize,
}

impl<'a> Tokens<'a> {
    /// Rows without gaps.
    pub(crate) fn dense(data: &'a [f32], count: usize, width: usize) -> Self {
        Self { data, count, width, stride: width }
    }
}

/// `Y += scale·X·Wᵀ` for `X: [tokens, k]`, `W: [n, k]` and `Y: [tokens, n]` with rows `stride` elements apart.
///
/// # Errors
/// When a matrix is not as large as that, or there are more than [`MAX_TOKENS`].
pub(crate) fn add_product(
    y: &mut [f32],
    stride: usize,
    x: Tokens<'_>,
    weight: Stored<'_>,
    n: usize,
    scale: f32,
) -> Result<()> {
    let (tokens, k) = (x.count, x.width);
    if tokens == 0 || n == 0 || k == 0 {
        return Ok(());
    }
    let reach = |stride: usize, width: usize| (tokens - 1) * stride + width;
    let fits = tokens <= MAX_TOKENS && stride >= n && y.len() >= reach(stride, n) && x.data.len() >= reach(x.stride, k);
    if !fits || weight.len() < n * k {
        candle_core::bail!(
            "thin product: [{tokens}, {k}] × [{k}, {n}] does not fit (slices of {}, {} and {}, rows {stride} apart)",
            x.data.len(),
            weight.len(),
            y.len()
        );
    }
    let (y, arch) = (Shared::new(y), pulp::Arch::new());
    let run = |rows| arch.dispatch(Part { x, weight, rows, scale, y: &y, stride });
    // Four parts a thread even out what else the machine does.
    let parts = (n * k / PART).min(threads() * 4);
    if parts < 2 || threads() == 1 {
        return run(0..n);
    }
    let rows = n.div_ceil(parts).next_multiple_of(GROUP);
    (0..n.div_ceil(rows)).into_par_iter().with_max_len(1).try_for_each(|i| run(i * rows..n.min((i + 1) * rows)))
}

/// Some rows of `W`, and so some columns of `Y`.
struct Part<'a> {
    x: Tokens<'a>,
    weight: Stored<'a>,
    rows: Range<usize>,
    scale: f32,
    y: &'a Shared<'a>,
    stride: usize,
}

/// The cache lines of the group after the one at work, which are asked for a few at a time: without that, memory would
/// rest while the group at hand goes through the second tile of tokens and those after it.
struct Ahead {
    at: *const u8,
    lines: usize,
    step: usize,
}

impl Ahead {
    /// The lines of `elements` elements from `first` on, asked for in `times` parts.
    fn new(weight: &Stored<'_>, first: usize, elements: usize, times: usize) -> Self {
        let (at, end) = (weight.address(first), weight.address(first + elements));
        let lines = end.addr().saturating_sub(at.addr()).div_ceil(LINE);
        Self { at, lines, step: lines.div_ceil(times.max(1)) }
    }

    #[inline(always)]
    fn ask(&mut self) {
        let lines = self.step.min(self.lines);
        self.lines -= lines;
        for _ in 0..lines {
            prefetch(self.at);
            self.at = self.at.wrapping_add(LINE);
        }
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// Sums of a group: `[token][row]`.
type Sums = [[f32; GROUP]; MAX_TOKENS];

impl WithSimd for Part<'_> {
    type Output = Result<()>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Result<()> {
        let Tokens { data: x, count: tokens, width: k, stride: apart } = self.x;
        let mut buffer = [0f32; GROUP * CHUNK];
        let requests = tokens.div_ceil(most_tokens::<S>()) * k.div_ceil(S::F32_LANES * STRIDE);
        for first in self.rows.clone().step_by(GROUP) {
            let rows = GROUP.min(self.rows.end - first);
            let next = first + rows..self.rows.end.min(first + rows + GROUP);
            let mut ahead = Ahead::new(&self.weight, next.start * k, next.len() * k, requests);
            // Where fewer rows are left, the last one stands in for the missing.
            let row = |r: usize| (first + r.min(rows - 1)) * k;
            let mut sums = Sums::default();
            for start in (0..k).step_by(CHUNK) {
                let len = CHUNK.min(k - start);
                let w: [&[f32]; GROUP] = if let Stored::F32(w) = self.weight {
                    std::array::from_fn(|r| &w[row(r) + start..][..len])
                } else {
                    for (r, wide) in buffer.chunks_exact_mut(len).enumerate().take(rows) {
                        self.weight.widen(row(r) + start, wide)?;
                    }
                    std::array::from_fn(|r| &buffer[r.min(rows - 1) * len..][..len])
                };
                let x = |t: usize| &x[t * apart + start..][..len];
                add_tiles(simd, w, x, &mut sums[..tokens], &mut ahead);
            }
            for (t, sums) in sums.iter().enumerate().take(tokens) {
                #[allow(unsafe_code)]
                // SAFETY: every part has rows of its own, and they are the columns of Y that it writes.
                let y = unsafe { self.y.slice(t * self.stride + first, rows) };
                y.iter_mut().zip(sums).for_each(|(y, sum)| *y += self.scale * sum);
            }
        }
        Ok(())
    }
}

/// Tokens of a tile. It needs a register for each sum and token and one for the weight: AVX2 has 16 of them, of which three
/// tokens would leave none for the compiler; the others have 32.
#[inline(always)]
fn most_tokens<S: Simd>() -> usize {
    if S::F32_LANES == 8 { 2 } else { 4 }
}

/// Adds the products of a group's rows with all tokens, in tiles whose sums stay in registers.
#[inline(always)]
fn add_tiles<'a, S: Simd>(
    simd: S,
    w: [&[f32]; GROUP],
    x: impl Fn(usize) -> &'a [f32],
    sums: &mut [[f32; GROUP]],
    ahead: &mut Ahead,
) {
    let (tokens, mut first) = (sums.len(), 0);
    let tiles = tokens.div_ceil(most_tokens::<S>());
    for i in 0..tiles {
        let end = tokens * (i + 1) / tiles;
        let sums = &mut sums[first..end];
        match end - first {
            1 => tile::<S, 1>(simd, w, std::array::from_fn(|t| x(first + t)), sums, ahead),
            2 => tile::<S, 2>(simd, w, std::array::from_fn(|t| x(first + t)), sums, ahead),
            3 => tile::<S, 3>(simd, w, std::array::from_fn(|t| x(first + t)), sums, ahead),
            _ => tile::<S, 4>(simd, w, std::array::from_fn(|t| x(first + t)), sums, ahead),
        }
        first = end;
    }
}

#[inline(always)]
fn tile<S: Simd, const T: usize>(
    simd: S,
    w: [&[f32]; GROUP],
    x: [&[f32]; T],
    sums: &mut [[f32; GROUP]],
    ahead: &mut Ahead,
) {
    let whole = w[0].len() / S::F32_LANES;
    let vectors = |row: &'_ [f32]| -> *const S::f32s { S::as_simd_f32s(row).0[..whole].as_ptr() };
    let (wv, xv) = (w.map(vectors), x.map(vectors));
    let mut acc = [[simd.splat_f32s(0.0); T]; GROUP];
    for start in (0..whole).step_by(STRIDE) {
        ahead.ask();
        for i in start..whole.min(start + STRIDE) {
            #[allow(unsafe_code)]
            // SAFETY: every row was cut to `whole` vectors, and i is below that.
            let (wi, xi) = unsafe { (wv.map(|w| w.add(i)), xv.map(|x| *x.add(i))) };
            for (acc, w) in acc.iter_mut().zip(wi) {
                #[allow(unsafe_code)]
                // SAFETY: as above.
                let w = unsafe { *w };
                for (acc, x) in acc.iter_mut().zip(xi) {
                    *acc = simd.mul_add_e_f32s(w, x, *acc);
                }
            }
        }
    }
    let tail = |row: &'_ [f32]| simd.partial_load_f32s(&row[whole * S::F32_LANES..]);
    if whole * S::F32_LANES < w[0].len() {
        let xt = x.map(tail);
        for (acc, w) in acc.iter_mut().zip(w) {
            let w = tail(w);
            for (acc, x) in acc.iter_mut().zip(xt) {
                *acc = simd.mul_add_e_f32s(w, x, *acc);
            }
        }
    }
    for (t, sums) in sums.iter_mut().enumerate().take(T) {
        for (sum, acc) in sums.iter_mut().zip(&acc) {
            *sum += simd.reduce_sum_f32s(acc[t]);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::quantized::{GgmlDType, QTensor};
    use half::{bf16, f16};

    use super::*;
    use crate::Stream;

    fn values(site: u32, n: usize) -> Vec<f32> {
        Stream { seed: 7, step: 0, site }.normal_vec(n, 1.0)
    }

    /// Holds the product, added to ones, to the definition in `f64`.
    fn check(weight: Stored<'_>, n: usize, k: usize, tokens: usize) {
        let (apart, stride) = (k + tokens % 3, n + 3);
        let x = values(2, tokens * apart);
        let mut wide = vec![0f32; n * k];
        weight.widen(0, &mut wide).unwrap();
        let mut y = vec![1f32; tokens * stride];
        let rows = Tokens { data: &x, count: tokens, width: k, stride: apart };
        add_product(&mut y, stride, rows, weight, n, 0.5).unwrap();
        for (i, y) in y.iter().enumerate() {
            let (t, j) = (i / stride, i % stride);
            let products = |j: usize| x[t * apart..][..k].iter().zip(&wide[j * k..][..k]);
            let sum = if j < n { products(j).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum() } else { 0.0 };
            let want = 1.0 + 0.5 * sum;
            let room = 1e-6 * (k as f64).sqrt() * (1.0 + want.abs());
            assert!((f64::from(*y) - want).abs() <= room, "token {t}, row {j} of [{n}, {k}]: {y}, not {want}");
        }
    }

    #[test]
    fn every_number_of_tokens_and_odd_shapes() {
        for tokens in 1..=MAX_TOKENS {
            for (n, k) in [(1, 1), (3, 7), (5, 31), (4, 32), (9, 100), (33, 1025), (2, 2100), (203, 577)] {
                check(Stored::F32(&values(1, n * k)), n, k, tokens);
            }
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
        #[test]
        fn any_shape(n in 1usize..70, k in 1usize..1300, tokens in 1usize..=MAX_TOKENS) {
            check(Stored::F32(&values(1, n * k)), n, k, tokens);
        }
    }

    #[test]
    fn every_storage() {
        for (n, k) in [(1, 256), (7, 512), (131, 1280)] {
            let w = values(1, n * k);
            let (halves, brains): (Vec<f16>, Vec<bf16>) =
                w.iter().map(|w| (f16::from_f32(*w), bf16::from_f32(*w))).unzip();
            let dense = crate::cpu::tensor(w, (n, k)).unwrap();
            for tokens in [1, 2, 3, 4, 5, 8, 13, 16] {
                check(Stored::F16(&halves), n, k, tokens);
                check(Stored::Bf16(&brains), n, k, tokens);
                for dtype in [GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::Q3K, GgmlDType::Q4K, GgmlDType::Q6K] {
                    let q = QTensor::quantize(&dense, dtype).unwrap();
                    check(Stored::Blocks(&q.data().unwrap(), dtype), n, k, tokens);
                }
            }
        }
    }

    /// What a row gives does not depend on which rows are beside it: a batch is its sequences.
    #[test]
    fn a_row_is_the_same_bits_alone_and_in_a_batch() {
        let (n, k) = (37, 1100);
        let (w, x) = (values(1, n * k), values(2, MAX_TOKENS * k));
        let product = |x: &[f32], tokens: usize| {
            let mut y = vec![0f32; tokens * n];
            add_product(&mut y, n, Tokens::dense(x, tokens, k), Stored::F32(&w), n, 1.0).unwrap();
            y
        };
        for tokens in 1..=MAX_TOKENS {
            let together = product(&x[..tokens * k], tokens);
            for t in 0..tokens {
                assert_eq!(together[t * n..][..n], product(&x[t * k..][..k], 1), "row {t} of {tokens}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let (x, w) = (vec![1f32; 64], vec![1f32; 64]);
        let run = |y: usize, stride, tokens, n, k| {
            add_product(&mut vec![0f32; y], stride, Tokens::dense(&x, tokens, k), Stored::F32(&w), n, 1.0)
        };
        assert!(run(16, 4, 4, 4, 16).is_ok());
        assert!(run(15, 4, 4, 4, 16).is_err());
        assert!(run(16, 3, 4, 4, 16).is_err());
        assert!(run(16, 4, 4, 4, 17).is_err());
        assert!(run(80, 4, 17, 4, 1).is_err());
        assert!(run(0, 0, 0, 4, 16).is_ok());
    }
}
