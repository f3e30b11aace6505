//! Products in `f32` with a weight of any storage: its elements are widened as they are laid out.

use super::turn::{GROUP, turn};
use super::{COLS, Contracted, Factor, Format, Kernel, ROWS, Word};
use crate::simd::{self, prefetch};
use crate::stored::Stored;
use crate::thin::Tokens;

/// Elements of a row that are laid out at a time, a cache line of `bf16`: what they are written to stays in the first-level
/// cache.
const CHUNK: usize = 32;
/// The longest block of any storage.
const LONGEST: usize = 256;
/// Elements of a cache line of the widest storage.
const LINE: usize = 16;
/// Elements between those that are read and those that memory is asked for: no processor follows as many rows by itself.
const AHEAD: usize = 256;
/// The same in rows where they are read one after the other.
const ROWS_AHEAD: usize = 16;

/// A weight for a kernel whose words are one element in `f32`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InF32<'a> {
    data: Stored<'a>,
    kernel: Kernel,
}

impl<'a> InF32<'a> {
    /// Whether this processor has a kernel.
    pub(crate) fn available() -> bool {
        hardware().next().is_some()
    }

    /// `None` where this processor has no kernel, or the storage is not widened here.
    pub(crate) fn new(data: Stored<'a>) -> Option<Self> {
        hardware().next().and_then(|kernel| Self::with_kernel(data, kernel))
    }

    pub(super) fn with_kernel(data: Stored<'a>, kernel: Kernel) -> Option<Self> {
        data.widens_inline().then_some(Self { data, kernel })
    }

    /// Elements that are laid out at a time: whole blocks.
    fn chunk(&self) -> usize {
        self.data.block().max(CHUNK)
    }

    /// Asks memory for elements from `start` on.
    #[inline(always)]
    fn ask_for(&self, start: usize, len: usize) {
        for i in (start..start + len).step_by(LINE) {
            prefetch(self.data.address(i));
        }
    }
}

impl Format for InF32<'_> {
    fn len(&self) -> usize {
        self.data.len()
    }

    fn depth(&self) -> usize {
        1
    }

    fn grain(&self) -> usize {
        self.data.block()
    }

    fn group(&self, contracted: Contracted) -> usize {
        match contracted {
            Contracted::In => 1,
            Contracted::Out => self.data.block().div_ceil(COLS),
        }
    }

    fn in_place<'x>(&self, x: &'x [f32]) -> Option<&'x [Word]> {
        Some(bits(x))
    }

    fn lay_out_rows(&self, x: &Tokens<'_>, first: usize, start: usize, panel: &mut [[Word; ROWS]]) {
        simd::run(
            #[inline(always)]
            || {
                let nothing = [0; CHUNK];
                for (i, words) in panel.chunks_mut(CHUNK).enumerate() {
                    for r in (0..ROWS).step_by(GROUP) {
                        let row = |j: usize| match first + r + j {
                            row if row < x.count => bits(&x.data[row * x.stride..][..x.width][start + i * CHUNK..]),
                            _ => &nothing,
                        };
                        turn(&std::array::from_fn(row), words, r);
                    }
                }
            },
        );
    }

    fn lay_out_columns(&self, w: &Factor, first: usize, start: usize, words: usize, slabs: &mut [[Word; COLS]]) {
        simd::run(
            #[inline(always)]
            || match w.contracted {
                Contracted::In => self.rows_as_columns(w, first, start, words, slabs),
                Contracted::Out => self.columns(w, first, start, words, slabs),
            },
        );
    }

    fn kernel(&self) -> Kernel {
        self.kernel
    }
}

impl InF32<'_> {
    /// Rows of the matrix become columns.
    #[inline(always)]
    fn rows_as_columns(&self, w: &Factor, first: usize, start: usize, words: usize, slabs: &mut [[Word; COLS]]) {
        let chunk = self.chunk();
        let mut wide = [[0f32; LONGEST]; GROUP];
        for (s, slab) in slabs.chunks_mut(words).enumerate() {
            for (i, words) in slab.chunks_mut(chunk).enumerate() {
                for j in (0..COLS).step_by(GROUP) {
                    for (r, wide) in wide.iter_mut().enumerate() {
                        let (row, wide) = (first + s * COLS + j + r, &mut wide[..words.len()]);
                        if row < w.out {
                            let at = row * w.inp + start + i * chunk;
                            self.ask_for(at + AHEAD, wide.len());
                            self.data.widen_inline(at, wide);
                        } else {
                            wide.fill(0.0);
                        }
                    }
                    turn(&wide.each_ref().map(|wide| bits(wide)), words, j);
                }
            }
        }
    }

    /// Columns of the matrix stay columns.
    #[inline(always)]
    fn columns(&self, w: &Factor, first: usize, start: usize, words: usize, slabs: &mut [[Word; COLS]]) {
        let mut wide = [0f32; LONGEST];
        let columns = (slabs.len() / words.max(1) * COLS).min(w.inp - first);
        for row in 0..words {
            let at = (start + row) * w.inp + first;
            for c in (0..columns).step_by(LONGEST) {
                let wide = &mut wide[..LONGEST.min(columns - c)];
                self.ask_for(at + ROWS_AHEAD * w.inp + c, wide.len());
                self.data.widen_inline(at + c, wide);
                for (slab, wide) in slabs.chunks_mut(words).skip(c / COLS).zip(wide.chunks(COLS)) {
                    let mut bits = [0; COLS];
                    bits.iter_mut().zip(wide).for_each(|(bits, x)| *bits = x.to_bits());
                    slab[row] = bits;
                }
            }
        }
    }
}

/// Calls `$f(at)` where `at(k, r)` is the number at `k` along the contraction in row `r` of a panel, for as long a contraction as
/// a slab's and without a check at each. A macro, so that each way to read is compiled into the kernel.
#[cfg(target_arch = "x86_64")]
macro_rules! read {
    ($panel:expr, $slab:expr, |$at:ident| $f:expr) => {
        match $panel {
            Panel::LaidOut(words) => {
                assert!(words.len() >= $slab.len(), "a panel shorter than the slab");
                #[allow(unsafe_code)]
                // SAFETY: inside of the panel, as was just asserted.
                let $at =
                    |k: usize, r: usize| f32::from_bits(unsafe { *words.as_flattened().get_unchecked(k * ROWS + r) });
                $f
            }
            Panel::InPlace(words, stride) => {
                let reach = (ROWS - 1).checked_mul(stride).and_then(|rows| rows.checked_add($slab.len()));
                assert!(reach.is_some_and(|reach| words.len() >= reach), "rows shorter than the slab");
                #[allow(unsafe_code)]
                // SAFETY: inside of the rows, as was just asserted.
                let $at = |k: usize, r: usize| f32::from_bits(unsafe { *words.get_unchecked(r * stride + k) });
                $f
            }
        }
    };
}
/// Numbers as words.
fn bits(x: &[f32]) -> &[Word] {
    #[allow(unsafe_code)]
    // SAFETY: both have the same size and alignment, and every bit pattern is a word.
    unsafe {
        std::slice::from_raw_parts(x.as_ptr().cast(), x.len())
    }
}

/// The kernels of this processor, the fastest first.
#[cfg(target_arch = "x86_64")]
pub(super) fn hardware() -> impl Iterator<Item = Kernel> {
    let avx512: Kernel = |a, b, tile| {
        #[allow(unsafe_code)]
        // SAFETY: the feature that it enables was found on this processor.
        unsafe {
            avx512::multiply(a, b, tile);
        }
    };
    let avx2: Kernel = |a, b, tile| {
        #[allow(unsafe_code)]
        // SAFETY: as above.
        unsafe {
            avx2::multiply(a, b, tile);
        }
    };
    let found = [
        is_x86_feature_detected!("avx512f").then_some(avx512),
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(avx2),
    ];
    found.into_iter().flatten()
}

/// Other processors use the `gemm` crate.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn hardware() -> impl Iterator<Item = Kernel> {
    std::iter::empty()
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::super::{COLS, Panel, ROWS, Tile, Word};

    #[target_feature(enable = "avx512f")]
    pub(super) fn multiply(a: Panel<'_>, b: &[[Word; COLS]], tile: &mut Tile) {
        read!(a, b, |at| sums(b, tile, at));
    }

    #[target_feature(enable = "avx512f")]
    fn sums(b: &[[Word; COLS]], tile: &mut Tile, at: impl Fn(usize, usize) -> f32) {
        let mut sums: [[__m512; 2]; ROWS] = [[_mm512_setzero_ps(); 2]; ROWS];
        for (k, b) in b.iter().enumerate() {
            #[allow(unsafe_code)]
            // SAFETY: a slab's row is two vectors.
            let b = unsafe { [_mm512_loadu_ps(b.as_ptr().cast()), _mm512_loadu_ps(b.as_ptr().add(16).cast())] };
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_set1_ps(at(k, r));
                sums[0] = _mm512_fmadd_ps(a, b[0], sums[0]);
                sums[1] = _mm512_fmadd_ps(a, b[1], sums[1]);
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

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };

    use super::super::{COLS, Panel, ROWS, Tile, Word};

    /// The tile in parts that fit into 16 registers: 5, 5 and 4 rows of two vectors.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn multiply(a: Panel<'_>, b: &[[Word; COLS]], tile: &mut Tile) {
        read!(a, b, |at| {
            for column in (0..COLS).step_by(16) {
                part::<0, 5>(b, column, tile, &at);
                part::<5, 5>(b, column, tile, &at);
                part::<10, 4>(b, column, tile, &at);
            }
        });
    }

    /// Makes `N` rows from `FIRST` on and 16 columns from `column` on.
    #[target_feature(enable = "avx2,fma")]
    fn part<const FIRST: usize, const N: usize>(
        b: &[[Word; COLS]],
        column: usize,
        tile: &mut Tile,
        at: &impl Fn(usize, usize) -> f32,
    ) {
        let mut sums: [[__m256; 2]; N] = [[_mm256_setzero_ps(); 2]; N];
        for (k, b) in b.iter().enumerate() {
            let b: &[Word; 16] = b[column..].first_chunk().unwrap_or(&[0; 16]);
            #[allow(unsafe_code)]
            // SAFETY: 16 words are two vectors.
            let b = unsafe { [_mm256_loadu_ps(b.as_ptr().cast()), _mm256_loadu_ps(b.as_ptr().add(8).cast())] };
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = _mm256_set1_ps(at(k, FIRST + r));
                sums[0] = _mm256_fmadd_ps(a, b[0], sums[0]);
                sums[1] = _mm256_fmadd_ps(a, b[1], sums[1]);
            }
        }
        for (tile, sums) in tile[FIRST..].iter_mut().zip(sums) {
            for (part, sum) in tile[column..].as_chunks_mut::<8>().0.iter_mut().zip(sums) {
                #[allow(unsafe_code)]
                // SAFETY: each part of a tile's row is one vector.
                unsafe {
                    _mm256_storeu_ps(part.as_mut_ptr(), sum);
                }
            }
        }
    }
}
