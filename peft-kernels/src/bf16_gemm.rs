//! Products of activations with a `bf16` weight on processors that multiply `bf16` themselves (AVX512-BF16): the
//! activations are rounded to `bf16`, pairs of products are added in `f32`.
//!
//! Both factors are laid out as the kernel reads them: pairs along the contraction in one 32-bit word, the rows of the
//! activations [`ROWS`] side by side, the columns of the result [`COLS`] side by side. A tile of the result stays in
//! registers while both go by. Blocking as in Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.

use std::cell::Cell;
use std::mem::MaybeUninit;

use candle_core::Result;
use half::bf16;
use rayon::prelude::*;

use crate::cpu::threads;
use crate::narrow::nearest;
use crate::shared::Shared;
use crate::simd;
use crate::thin::Tokens;

/// Rows of a tile. With two vectors of columns it takes 28 of 32 registers.
const ROWS: usize = 14;
/// Columns of a tile.
const COLS: usize = 32;
/// Pairs of the contraction that are laid out at one time: a slab of the weight has 128 KiB.
const PAIRS: usize = 1024;
/// Columns of the weight that are laid out at one time, a multiple of [`COLS`].
const BLOCK: usize = 1024;
/// Pairs of a row that are laid out at a time: what they are written to stays in the first-level cache.
const CHUNK: usize = 16;

/// Two neighbours along the contraction, the first in the low half.
type Pair = u32;
type Tile = [[f32; COLS]; ROWS];
/// Makes the tile of a panel of activations and a slab of the weight.
type Kernel = fn(&[[Pair; ROWS]], &[[Pair; COLS]], &mut Tile);

thread_local! {
    /// The factors as they are laid out, kept from one product to the next.
    static PANELS: Cell<Vec<[Pair; ROWS]>> = const { Cell::new(Vec::new()) };
    static SLABS: Cell<Vec<[Pair; COLS]>> = const { Cell::new(Vec::new()) };
}

/// A row-major weight `[out, in]`, and which of its dimensions is contracted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weight<'a> {
    pub(crate) data: &'a [bf16],
    pub(crate) out: usize,
    pub(crate) inp: usize,
    pub(crate) contracted: Contracted,
}

/// The dimension of the weight that meets the activations.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Contracted {
    /// `X·Wᵀ`.
    In,
    /// `X·W`.
    Out,
}

impl Weight<'_> {
    /// Length of the contraction, and columns of the result.
    fn sizes(&self) -> (usize, usize) {
        match self.contracted {
            Contracted::In => (self.inp, self.out),
            Contracted::Out => (self.out, self.inp),
        }
    }

    /// Lays out columns from `first` on, and pairs from `start` on, as many as `slab` holds; zeros beyond the matrix.
    #[inline(always)]
    fn lay_out(&self, first: usize, start: usize, slab: &mut [[Pair; COLS]]) {
        let bits = |row: usize| self.data.get(row * self.inp..(row + 1) * self.inp).unwrap_or_default();
        match self.contracted {
            Contracted::In => {
                for (i, pairs) in slab.chunks_mut(CHUNK).enumerate() {
                    for j in 0..COLS {
                        let row = if first + j < self.out { bits(first + j) } else { &[] };
                        let row = row.get(2 * (start + CHUNK * i)..).unwrap_or_default();
                        if let Some(row) = row.get(..2 * pairs.len()) {
                            for (pair, two) in pairs.iter_mut().zip(row.as_chunks::<2>().0) {
                                pair[j] = join(two[0], two[1]);
                            }
                        } else {
                            let at = |i: usize| row.get(i).copied().unwrap_or(bf16::ZERO);
                            for (p, pair) in pairs.iter_mut().enumerate() {
                                pair[j] = join(at(2 * p), at(2 * p + 1));
                            }
                        }
                    }
                }
            }
            Contracted::Out => {
                let columns = COLS.min(self.inp - first);
                for (p, pair) in slab.iter_mut().enumerate() {
                    let row = 2 * (start + p);
                    let low = &bits(row)[first..][..columns];
                    if columns < COLS {
                        *pair = [0; COLS];
                    }
                    if row + 1 < self.out {
                        let high = &bits(row + 1)[first..][..columns];
                        for ((to, low), high) in pair.iter_mut().zip(low).zip(high) {
                            *to = join(*low, *high);
                        }
                    } else {
                        for (to, low) in pair.iter_mut().zip(low) {
                            *to = join(*low, bf16::ZERO);
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn join(low: bf16, high: bf16) -> Pair {
    u32::from(high.to_bits()) << 16 | u32::from(low.to_bits())
}

/// Lays out rows of `x` from `first` on, and pairs from `start` on, as many as `panel` holds; zeros beyond the matrix.
#[inline(always)]
fn lay_out_rows(x: &Tokens<'_>, first: usize, start: usize, panel: &mut [[Pair; ROWS]]) {
    for r in 0..ROWS {
        let row = if first + r < x.count { &x.data[(first + r) * x.stride..][..x.width] } else { &[] };
        let row = row.get(2 * start..).unwrap_or_default();
        for (i, pairs) in panel.chunks_mut(CHUNK).enumerate() {
            let row = row.get(2 * CHUNK * i..).unwrap_or_default();
            let mut bits = [0u16; 2 * CHUNK];
            if let Some(row) = row.first_chunk::<{ 2 * CHUNK }>() {
                bits = row.map(|x| nearest(x).to_bits());
            } else {
                bits.iter_mut().zip(row).for_each(|(bits, &x)| *bits = nearest(x).to_bits());
            }
            for (pair, two) in pairs.iter_mut().zip(bits.as_chunks::<2>().0) {
                pair[r] = u32::from(two[1]) << 16 | u32::from(two[0]);
            }
        }
    }
}

/// Whether this processor multiplies `bf16`.
pub(crate) fn available() -> bool {
    hardware().is_some()
}

/// `Y += X·Wᵀ` or `Y += X·W`, `Y` with rows as long as there are columns.
///
/// # Errors
/// When dimensions do not fit, or the processor does not multiply `bf16`.
pub(crate) fn add_product(y: &mut [f32], x: Tokens<'_>, w: Weight<'_>) -> Result<()> {
    let kernel = fitting(y.len(), x, w)?;
    #[allow(unsafe_code)]
    // SAFETY: MaybeUninit<f32> has the layout of f32, and only values are written.
    let y = unsafe { &mut *(std::ptr::from_mut(y) as *mut [MaybeUninit<f32>]) };
    product(&Target { to: Shared::new(y), keep: true }, x, w, kernel);
    Ok(())
}

/// `X·Wᵀ` or `X·W`.
///
/// # Errors
/// As [`add_product`].
pub(crate) fn new_product(x: Tokens<'_>, w: Weight<'_>) -> Result<Vec<f32>> {
    let (depth, columns) = w.sizes();
    let len = x.count * columns;
    let kernel = fitting(len, x, w)?;
    if depth == 0 {
        return Ok(vec![0.0; len]);
    }
    let mut y: Vec<f32> = Vec::with_capacity(len);
    let room = y.spare_capacity_mut().get_mut(..len).unwrap_or_default();
    product(&Target { to: Shared::new(room), keep: false }, x, w, kernel);
    #[allow(unsafe_code)]
    // SAFETY: the capacity holds `len` elements, and a product whose contraction is not empty writes them all.
    unsafe {
        y.set_len(len);
    }
    Ok(y)
}

/// The kernel for factors that fit each other and a result of `len` elements.
fn fitting(len: usize, x: Tokens<'_>, w: Weight<'_>) -> Result<Kernel> {
    let (depth, columns) = w.sizes();
    let reach = x.count.checked_sub(1).map_or(0, |rows| rows * x.stride + x.width);
    let enough = x.data.len() >= reach && w.data.len() >= w.out * w.inp;
    if x.width != depth || !enough || len != x.count * columns {
        candle_core::bail!(
            "bf16 product: [{}, {}] × [{depth}, {columns}] does not fit (slices of {}, {} and {len})",
            x.count,
            x.width,
            x.data.len(),
            w.data.len()
        )
    }
    hardware().ok_or_else(|| candle_core::Error::Msg("this processor does not multiply bf16".into()))
}

/// Where a result goes.
struct Target<'a> {
    to: Shared<'a, MaybeUninit<f32>>,
    /// Whether it is added to what is there.
    keep: bool,
}

/// The result has `x.count` rows as long as the weight has columns; the factors fit each other.
fn product(y: &Target<'_>, x: Tokens<'_>, w: Weight<'_>, kernel: Kernel) {
    let (depth, columns) = w.sizes();
    let (mut panels, mut slabs) = (PANELS.take(), SLABS.take());
    let (all_pairs, panel_count) = (depth.div_ceil(2), x.count.div_ceil(ROWS));
    // Parts of one length.
    let pairs = all_pairs.div_ceil(all_pairs.div_ceil(PAIRS).max(1));
    for start in (0..all_pairs).step_by(pairs.max(1)) {
        let pairs = pairs.min(all_pairs - start);
        lay_out(&mut panels, panel_count, pairs, |i, panel| lay_out_rows(&x, i * ROWS, start, panel));
        for first in (0..columns).step_by(BLOCK) {
            let slab_count = BLOCK.min(columns - first).div_ceil(COLS);
            lay_out(&mut slabs, slab_count, pairs, |i, slab| w.lay_out(first + i * COLS, start, slab));
            let block = Block { panels: &panels, slabs: &slabs, pairs, panel_count, slab_count };
            block.multiply(kernel, |panel, slab, tile| {
                #[allow(unsafe_code)]
                // SAFETY: each tile is made once, and first written unless the caller's result is kept.
                unsafe {
                    y.put(tile, (panel * ROWS, x.count), (first + slab * COLS, columns), y.keep || start > 0);
                }
            });
        }
    }
    PANELS.set(panels);
    SLABS.set(slabs);
}

/// Makes `count` parts of `pairs` words each, in parallel. `f` writes all of its part.
fn lay_out<T: Copy + Default + Send>(to: &mut Vec<T>, count: usize, pairs: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if to.len() < count * pairs {
        to.resize(count * pairs, T::default());
    }
    to[..count * pairs].par_chunks_mut(pairs).enumerate().for_each(|(i, part)| {
        simd::run(
            #[inline(always)]
            || f(i, part),
        );
    });
}

impl Target<'_> {
    /// Writes or adds a tile at `(first, end)` rows and columns, as much of it as lies below the ends.
    ///
    /// # Safety
    /// No other thread touches this tile; where `add`, it is initialised.
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn put(&self, tile: &Tile, rows: (usize, usize), columns: (usize, usize), add: bool) {
        let width = COLS.min(columns.1 - columns.0);
        for (r, tile) in tile.iter().enumerate().take(rows.1 - rows.0) {
            // SAFETY: as the caller promises.
            let to = unsafe { self.to.slice((rows.0 + r) * columns.1 + columns.0, width) };
            for (to, &sum) in to.iter_mut().zip(tile) {
                // SAFETY: read only where it is initialised, as the caller promises.
                let before = if add { unsafe { to.assume_init() } } else { 0.0 };
                to.write(before + sum);
            }
        }
    }
}

/// Factors laid out for the kernel.
struct Block<'a> {
    panels: &'a [[Pair; ROWS]],
    slabs: &'a [[Pair; COLS]],
    pairs: usize,
    panel_count: usize,
    slab_count: usize,
}

impl Block<'_> {
    /// Panels and slabs of a job for one thread: they stay in the second-level cache.
    const JOB: usize = 8;

    /// Calls `put(panel, slab, tile)` with the tile of every panel and slab.
    fn multiply(&self, kernel: Kernel, put: impl Fn(usize, usize, &Tile) + Sync) {
        let (down, across) = (self.panel_count.div_ceil(Self::JOB), self.slab_count.div_ceil(Self::JOB));
        let job = |i: usize| {
            simd::run(
                #[inline(always)]
                || {
                    let (first_panel, first_slab) = (i / across * Self::JOB, i % across * Self::JOB);
                    let mut tile = [[0f32; COLS]; ROWS];
                    for panel in first_panel..self.panel_count.min(first_panel + Self::JOB) {
                        for slab in first_slab..self.slab_count.min(first_slab + Self::JOB) {
                            let part = |i: usize| i * self.pairs..(i + 1) * self.pairs;
                            kernel(&self.panels[part(panel)], &self.slabs[part(slab)], &mut tile);
                            put(panel, slab, &tile);
                        }
                    }
                },
            );
        };
        let jobs = down * across;
        if threads() == 1 || jobs < 2 {
            (0..jobs).for_each(job);
        } else {
            (0..jobs).into_par_iter().with_max_len(1).for_each(job);
        }
    }
}

/// The kernel of this processor.
#[cfg(target_arch = "x86_64")]
fn hardware() -> Option<Kernel> {
    let found = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
    found.then_some(|a, b, tile| {
        #[allow(unsafe_code)]
        // SAFETY: the features that it enables were found on this processor just above.
        unsafe {
            avx512::multiply(a, b, tile);
        }
    })
}

/// Other processors widen the weight instead.
#[cfg(not(target_arch = "x86_64"))]
fn hardware() -> Option<Kernel> {
    None
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };

    use super::{COLS, Pair, ROWS, Tile};

    #[allow(unsafe_code)]
    #[inline(always)]
    fn pairs(x: __m512i) -> __m512bh {
        // SAFETY: both are 512 bits.
        unsafe { std::mem::transmute(x) }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn multiply(a: &[[Pair; ROWS]], b: &[[Pair; COLS]], tile: &mut Tile) {
        let mut sums: [[__m512; 2]; ROWS] = [[_mm512_setzero_ps(); 2]; ROWS];
        for (a, b) in a.iter().zip(b) {
            #[allow(unsafe_code)]
            // SAFETY: a slab's row is two vectors.
            let b = unsafe { [_mm512_loadu_si512(b.as_ptr().cast()), _mm512_loadu_si512(b.as_ptr().add(16).cast())] };
            for (sums, &a) in sums.iter_mut().zip(a) {
                let a = pairs(_mm512_set1_epi32(a.cast_signed()));
                sums[0] = _mm512_dpbf16_ps(sums[0], a, pairs(b[0]));
                sums[1] = _mm512_dpbf16_ps(sums[1], a, pairs(b[1]));
            }
        }
        for (tile, sums) in tile.iter_mut().zip(sums) {
            for (part, sum) in tile.as_chunks_mut::<16>().0.iter_mut().zip(sums) {
                #[allow(unsafe_code)]
                // SAFETY: each part of a tile's row is one vector.
                unsafe {
                    _mm512_storeu_ps(part.as_mut_ptr(), sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::philox::Stream;

    /// What the processor's instruction does.
    fn emulated(a: &[[Pair; ROWS]], b: &[[Pair; COLS]], tile: &mut Tile) {
        let halves = |pair: Pair| [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)];
        *tile = [[0.0; COLS]; ROWS];
        for (a, b) in a.iter().zip(b) {
            for (sums, &a) in tile.iter_mut().zip(a) {
                for (sum, &b) in sums.iter_mut().zip(b) {
                    let (a, b) = (halves(a), halves(b));
                    *sum += a[0] * b[0] + a[1] * b[1];
                }
            }
        }
    }

    fn values(site: u32, n: usize) -> Vec<f32> {
        Stream { seed: 3, step: 0, site }.normal_vec(n, 1.0)
    }

    /// Holds both products, made anew and added, to the definition in `f64`.
    fn check(kernel: Kernel, tokens: usize, width: usize, columns: usize) {
        for contracted in [Contracted::In, Contracted::Out] {
            let (out, inp) = if contracted == Contracted::In { (columns, width) } else { (width, columns) };
            let data: Vec<bf16> = values(1, out * inp).into_iter().map(bf16::from_f32).collect();
            let x = values(2, tokens * width);
            let w = Weight { data: &data, out, inp, contracted };
            for keep in [false, true] {
                let mut y = vec![MaybeUninit::new(if keep { 1f32 } else { f32::NAN }); tokens * columns];
                product(&Target { to: Shared::new(&mut y), keep }, Tokens::dense(&x, tokens, width), w, kernel);
                for (i, y) in y.iter().enumerate() {
                    #[allow(unsafe_code)]
                    // SAFETY: made of values.
                    let y = unsafe { y.assume_init() };
                    let (t, j) = (i / columns, i % columns);
                    let weight = |c: usize| data[if contracted == Contracted::In { j * inp + c } else { c * inp + j }];
                    let products = (0..width).map(|c| bf16::from_f32(x[t * width + c]).to_f64() * weight(c).to_f64());
                    let want = products.sum::<f64>() + f64::from(u8::from(keep));
                    let room = 1e-5 * (width as f64).sqrt();
                    let what =
                        format!("[{tokens}, {width}] × [{width}, {columns}], {contracted:?}, row {t}, column {j}");
                    assert!((f64::from(y) - want).abs() <= room, "{what}: {y}, not {want}");
                }
            }
        }
    }

    fn kernels() -> impl Iterator<Item = Kernel> {
        [Some(emulated as Kernel), hardware()].into_iter().flatten()
    }

    #[test]
    fn products_are_those_of_rounded_activations() {
        for kernel in kernels() {
            for (tokens, width, columns) in [
                (1, 1, 1),
                (3, 2, 33),
                (14, 32, 32),
                (15, 7, 31),
                (29, 65, 64),
                (17, 2 * PAIRS, 40),
                (17, 2 * PAIRS + 1, 40),
                (2, 5000, 3),
                (5, 3, BLOCK + 33),
                (200, 70, 600),
            ] {
                check(kernel, tokens, width, columns);
            }
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]
        #[test]
        fn any_shape(tokens in 1usize..60, width in 1usize..300, columns in 1usize..90) {
            for kernel in kernels() {
                check(kernel, tokens, width, columns);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_nothing_is_zero() {
        let (data, x) = (vec![bf16::ONE; 64], vec![1f32; 64]);
        let run = |tokens, width, out, inp| {
            new_product(Tokens::dense(&x, tokens, width), Weight { data: &data, out, inp, contracted: Contracted::In })
        };
        assert!(run(16, 5, 4, 5).is_err());
        assert!(run(4, 16, 5, 16).is_err());
        assert!(run(4, 16, 4, 8).is_err());
        if available() {
            assert_eq!(run(4, 16, 4, 16).unwrap(), vec![16.0; 16]);
            assert_eq!(run(4, 0, 4, 0).unwrap(), vec![0.0; 16]);
            assert!(run(0, 16, 4, 16).unwrap().is_empty());
            assert!(run(4, 16, 0, 16).unwrap().is_empty());
        }
    }
}
