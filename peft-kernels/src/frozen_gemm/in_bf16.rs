//! Products in `bf16` with a `bf16` weight, on processors that multiply `bf16` themselves (AVX512-BF16): the activations are
//! rounded to `bf16`, pairs of products are added in `f32`.

use half::bf16;

use super::turn::{GROUP, turn};
use super::{COLS, Contracted, Factor, Format, Kernel, Panel, ROWS, Word};
use crate::narrow::nearest;
use crate::simd;
use crate::thin::Tokens;

/// Pairs of a row that are laid out at a time: what they are written to stays in the first-level cache.
const CHUNK: usize = 16;

/// A weight for a kernel whose words are two neighbours along the contraction in `bf16`, the first in the low half.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InBf16<'a> {
    data: &'a [bf16],
    kernel: Kernel,
}

impl<'a> InBf16<'a> {
    /// `None` where this processor does not multiply `bf16`.
    pub(crate) fn new(data: &'a [bf16]) -> Option<Self> {
        hardware().map(|kernel| Self::with_kernel(data, kernel))
    }

    pub(super) fn with_kernel(data: &'a [bf16], kernel: Kernel) -> Self {
        Self { data, kernel }
    }
}

impl Format for InBf16<'_> {
    fn len(&self) -> usize {
        self.data.len()
    }

    fn depth(&self) -> usize {
        2
    }

    fn grain(&self) -> usize {
        1
    }

    fn group(&self, _: Contracted) -> usize {
        1
    }

    fn in_place<'x>(&self, _: &'x [f32]) -> Option<&'x [Word]> {
        None
    }

    fn lay_out_rows(&self, x: &Tokens<'_>, first: usize, start: usize, panel: &mut [[Word; ROWS]]) {
        simd::run(
            #[inline(always)]
            || lay_out_rows(x, first, start, panel),
        );
    }

    fn lay_out_columns(&self, w: &Factor, first: usize, start: usize, words: usize, slabs: &mut [[Word; COLS]]) {
        simd::run(
            #[inline(always)]
            || {
                for (i, slab) in slabs.chunks_mut(words).enumerate() {
                    match w.contracted {
                        Contracted::In => self.rows_as_columns(w, first + i * COLS, start, slab),
                        Contracted::Out => self.columns(w, first + i * COLS, start, slab),
                    }
                }
            },
        );
    }

    fn kernel(&self) -> Kernel {
        self.kernel
    }
}

impl InBf16<'_> {
    /// Row `i` of the matrix, none beyond it.
    #[inline(always)]
    fn row(&self, w: &Factor, i: usize) -> &[bf16] {
        if i < w.out { &self.data[i * w.inp..(i + 1) * w.inp] } else { &[] }
    }

    /// Rows of the matrix become columns.
    #[inline(always)]
    fn rows_as_columns(&self, w: &Factor, first: usize, start: usize, slab: &mut [[Word; COLS]]) {
        let mut pairs = [[0; CHUNK]; GROUP];
        for (i, words) in slab.chunks_mut(CHUNK).enumerate() {
            for j in (0..COLS).step_by(GROUP) {
                for (r, pairs) in pairs.iter_mut().enumerate() {
                    let row = self.row(w, first + j + r).get(2 * (start + CHUNK * i)..).unwrap_or_default();
                    if let Some(row) = row.first_chunk::<{ 2 * CHUNK }>() {
                        for (pair, two) in pairs.iter_mut().zip(row.as_chunks::<2>().0) {
                            *pair = join(two[0], two[1]);
                        }
                    } else {
                        let at = |i: usize| row.get(i).copied().unwrap_or(bf16::ZERO);
                        for (p, pair) in pairs.iter_mut().enumerate() {
                            *pair = join(at(2 * p), at(2 * p + 1));
                        }
                    }
                }
                turn(&pairs.each_ref().map(|pairs| pairs.as_slice()), words, j);
            }
        }
    }

    /// Columns of the matrix stay columns.
    #[inline(always)]
    fn columns(&self, w: &Factor, first: usize, start: usize, slab: &mut [[Word; COLS]]) {
        let columns = COLS.min(w.inp - first);
        for (p, word) in slab.iter_mut().enumerate() {
            let row = 2 * (start + p);
            let low = &self.row(w, row)[first..][..columns];
            if columns < COLS {
                *word = [0; COLS];
            }
            if row + 1 < w.out {
                let high = &self.row(w, row + 1)[first..][..columns];
                for ((to, low), high) in word.iter_mut().zip(low).zip(high) {
                    *to = join(*low, *high);
                }
            } else {
                for (to, low) in word.iter_mut().zip(low) {
                    *to = join(*low, bf16::ZERO);
                }
            }
        }
    }
}

#[inline(always)]
fn join(low: bf16, high: bf16) -> Word {
    u32::from(high.to_bits()) << 16 | u32::from(low.to_bits())
}

#[inline(always)]
fn lay_out_rows(x: &Tokens<'_>, first: usize, start: usize, panel: &mut [[Word; ROWS]]) {
    let mut pairs = [[0; CHUNK]; GROUP];
    for (i, words) in panel.chunks_mut(CHUNK).enumerate() {
        for r in (0..ROWS).step_by(GROUP) {
            for (j, pairs) in pairs.iter_mut().enumerate() {
                let row = first + r + j;
                let row = if row < x.count { &x.data[row * x.stride..][..x.width] } else { &[] };
                let row = row.get(2 * (start + CHUNK * i)..).unwrap_or_default();
                if let Some(row) = row.first_chunk::<{ 2 * CHUNK }>() {
                    for (pair, two) in pairs.iter_mut().zip(row.as_chunks::<2>().0) {
                        *pair = join(nearest(two[0]), nearest(two[1]));
                    }
                } else {
                    let at = |i: usize| row.get(i).map_or(bf16::ZERO, |&x| nearest(x));
                    for (p, pair) in pairs.iter_mut().enumerate() {
                        *pair = join(at(2 * p), at(2 * p + 1));
                    }
                }
            }
            turn(&pairs.each_ref().map(|pairs| pairs.as_slice()), words, r);
        }
    }
}

/// The kernel of this processor.
#[cfg(target_arch = "x86_64")]
pub(super) fn hardware() -> Option<Kernel> {
    let found = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
    found.then_some(|a, b, tile| {
        #[allow(unsafe_code)]
        // SAFETY: the features that it enables were found on this processor just above.
        unsafe {
            // `in_place` gives no other panels.
            if let Panel::LaidOut(a) = a {
                avx512::multiply(a, b, tile);
            }
        }
    })
}

/// Other processors widen the weight instead.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn hardware() -> Option<Kernel> {
    None
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };

    use super::super::{COLS, ROWS, Tile, Word};

    #[allow(unsafe_code)]
    #[inline(always)]
    fn pairs(x: __m512i) -> __m512bh {
        // SAFETY: both are 512 bits.
        unsafe { std::mem::transmute(x) }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn multiply(a: &[[Word; ROWS]], b: &[[Word; COLS]], tile: &mut Tile) {
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
