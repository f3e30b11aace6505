//! Products of activations with a frozen weight, whatever its storage, on processors for which there is a kernel.
//!
//! The weight is laid out as the kernel reads it: along the contraction word by word, [`COLS`] columns of the result side by
//! side. So are [`ROWS`] rows of the activations, where they cannot be read in place. A tile of the result stays in registers
//! while both go by. A weight is widened on its way into that order, so that it passes through memory once and as small as it is
//! stored. Blocking as in Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.

mod addend;
mod in_bf16;
mod in_f32;
#[cfg(test)]
mod tests;
mod turn;

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::Result;
use rayon::prelude::*;

use self::addend::LaidOut;
pub(crate) use self::addend::{Addend, LowRankProduct};
pub(crate) use self::in_bf16::InBf16;
pub(crate) use self::in_f32::InF32;
use crate::cpu::threads;
use crate::shared::Shared;
use crate::simd;
use crate::thin::Tokens;

/// Rows of a tile. With two vectors of columns it takes 28 of 32 registers.
const ROWS: usize = 14;
/// Columns of a tile.
const COLS: usize = 32;
/// Words of the contraction that are laid out at one time: a slab of the weight has 128 KiB.
const WORDS: usize = 1024;

/// What the kernel reads of a row or column at one time: one or more neighbours along the contraction.
type Word = u32;
type Tile = [[f32; COLS]; ROWS];
/// A slab's word of every column, in cache lines of its own.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Columns(#[expect(dead_code, reason = "read by `words`")] [Word; COLS]);
/// Makes the tile of a panel of activations and a slab of the weight.
type Kernel = fn(Panel<'_>, &[[Word; COLS]], &mut Tile);

/// The words of [`ROWS`] rows of activations.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Panel<'a> {
    /// Side by side.
    LaidOut(&'a [[Word; ROWS]]),
    /// One row after the other, as far apart as this.
    InPlace(&'a [Word], usize),
}

thread_local! {
    /// The factors as they are laid out, kept from one product to the next.
    static PANELS: Cell<Vec<[Word; ROWS]>> = const { Cell::new(Vec::new()) };
    static SLABS: Cell<Vec<Columns>> = const { Cell::new(Vec::new()) };
    static ADDEND_PANELS: Cell<Vec<[Word; ROWS]>> = const { Cell::new(Vec::new()) };
}

impl Columns {
    fn words(columns: &mut [Self]) -> &mut [[Word; COLS]] {
        #[allow(unsafe_code)]
        // SAFETY: the array fills the struct, whose alignment is the larger.
        unsafe {
            &mut *(std::ptr::from_mut(columns) as *mut [[Word; COLS]])
        }
    }
}

/// A row-major weight `[out, in]` as a factor: its dimensions, and which of them is contracted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Factor {
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

impl Factor {
    /// Length of the contraction, and columns of the result.
    fn sizes(&self) -> (usize, usize) {
        match self.contracted {
            Contracted::In => (self.inp, self.out),
            Contracted::Out => (self.out, self.inp),
        }
    }

    /// Length of the contraction.
    pub(crate) fn depth(&self) -> usize {
        self.sizes().0
    }
}

/// A weight's elements, and the words in which a kernel takes both factors.
pub(crate) trait Format: Sync {
    /// How many elements of the weight there are.
    fn len(&self) -> usize;

    /// Elements of the contraction in a word.
    fn depth(&self) -> usize;

    /// Words of the contraction that the weight's storage keeps together.
    fn grain(&self) -> usize;

    /// Slabs of columns that the weight's storage keeps together where `contracted` is contracted.
    fn group(&self, contracted: Contracted) -> usize;

    /// Activations as words where they are such as they lie.
    fn in_place<'x>(&self, x: &'x [f32]) -> Option<&'x [Word]>;

    /// Lays out rows of `x` from `first` on, and words from `start` on, as many as `panel` holds; zeros beyond the matrix.
    fn lay_out_rows(&self, x: &Tokens<'_>, first: usize, start: usize, panel: &mut [[Word; ROWS]]);

    /// Lays out columns from `first` on, and `words` of each from `start` on, in as many slabs as there is room for; zeros
    /// beyond the matrix.
    fn lay_out_columns(&self, w: &Factor, first: usize, start: usize, words: usize, slabs: &mut [[Word; COLS]]);

    /// The product of what was laid out.
    fn kernel(&self) -> Kernel;
}

/// `Y += X·Wᵀ` or `Y += X·W`, `Y` with rows as long as there are columns.
///
/// # Errors
/// When dimensions do not fit.
pub(crate) fn add_product(y: &mut [f32], x: Tokens<'_>, w: Factor, format: &dyn Format) -> Result<()> {
    check(y.len(), x, w, format)?;
    #[allow(unsafe_code)]
    // SAFETY: MaybeUninit<f32> has the layout of f32, and only values are written.
    let y = unsafe { &mut *(std::ptr::from_mut(y) as *mut [MaybeUninit<f32>]) };
    product(&Target { to: Shared::new(y), keep: true }, x, w, format, None);
    Ok(())
}

/// `X·Wᵀ + addend` or `X·W + addend`.
///
/// # Errors
/// As [`add_product`], or when the addend does not fit.
pub(crate) fn new_product(x: Tokens<'_>, w: Factor, format: &dyn Format, addend: Addend<'_>) -> Result<Vec<f32>> {
    let (depth, columns) = w.sizes();
    addend.check(x.count, columns)?;
    match in_f32::hardware().next() {
        _ if addend.is_empty() => new_product_with(x, w, format, None),
        Some(kernel) if depth > 0 => new_product_with(x, w, format, Some((addend, kernel))),
        _ => {
            let mut y = addend.alone(x.count, columns)?;
            add_product(&mut y, x, w, format)?;
            Ok(y)
        }
    }
}

/// The same with a kernel for the addend, which fits.
fn new_product_with(
    x: Tokens<'_>,
    w: Factor,
    format: &dyn Format,
    addend: Option<(Addend<'_>, Kernel)>,
) -> Result<Vec<f32>> {
    let (depth, columns) = w.sizes();
    let len = x.count * columns;
    check(len, x, w, format)?;
    if depth == 0 {
        return Ok(vec![0.0; len]);
    }
    let mut y: Vec<f32> = Vec::with_capacity(len);
    let room = y.spare_capacity_mut().get_mut(..len).unwrap_or_default();
    let mut buffer = ADDEND_PANELS.take();
    let laid_out = addend.map(|(addend, kernel)| LaidOut::new(addend, x.count, kernel, &mut buffer));
    product(&Target { to: Shared::new(room), keep: false }, x, w, format, laid_out.as_ref());
    ADDEND_PANELS.set(buffer);
    #[allow(unsafe_code)]
    // SAFETY: the capacity holds `len` elements, and a product whose contraction is not empty writes them all.
    unsafe {
        y.set_len(len);
    }
    Ok(y)
}

/// That the factors fit each other and a result of `len` elements.
fn check(len: usize, x: Tokens<'_>, w: Factor, format: &dyn Format) -> Result<()> {
    let (depth, columns) = w.sizes();
    let reach = x.count.checked_sub(1).map_or(0, |rows| rows * x.stride + x.width);
    let enough = x.data.len() >= reach && format.len() >= w.out * w.inp;
    if x.width != depth || !enough || len != x.count * columns {
        candle_core::bail!(
            "product with a frozen weight: [{}, {}] × [{depth}, {columns}] does not fit (slices of {}, {} and {len})",
            x.count,
            x.width,
            x.data.len(),
            format.len()
        )
    }
    Ok(())
}

/// Where a result goes.
struct Target<'a> {
    to: Shared<'a, MaybeUninit<f32>>,
    /// Whether it is added to what is there.
    keep: bool,
}

/// The result has `x.count` rows as long as the weight has columns; the factors fit each other, and the addend the result.
fn product(y: &Target<'_>, x: Tokens<'_>, w: Factor, format: &dyn Format, addend: Option<&LaidOut<'_>>) {
    let (depth, columns) = w.sizes();
    let all_words = depth.div_ceil(format.depth());
    // Parts of about one length.
    let words = all_words.div_ceil(all_words.div_ceil(WORDS).max(1)).next_multiple_of(format.grain());
    let mut buffer = PANELS.take();
    for start in (0..all_words).step_by(words.max(1)) {
        let words = words.min(all_words - start);
        let panels = Panels::new(&x, start, words, format, &mut buffer);
        // The last part brings the addend.
        let addend = addend.filter(|_| start + words == all_words);
        let more = addend.map_or(0, LaidOut::words);
        slabs(columns.div_ceil(COLS), words + more, format.group(w.contracted), |range, slabs| {
            let (slabs, beside) = slabs.split_at_mut(range.len() * words);
            format.lay_out_columns(&w, range.start * COLS, start, words, slabs);
            if let Some(addend) = addend {
                addend.lay_out_columns(range.start * COLS, beside);
            }
            let kernel = format.kernel();
            simd::run(
                #[inline(always)]
                || {
                    let mut tile = [[0f32; COLS]; ROWS];
                    for panel in 0..x.count.div_ceil(ROWS) {
                        for (i, (slab, b)) in range.clone().zip(slabs.chunks(words)).enumerate() {
                            kernel(panels.get(panel), b, &mut tile);
                            if let Some(addend) = addend {
                                addend.add(panel, &beside[i * more..(i + 1) * more], &mut tile);
                            }
                            #[allow(unsafe_code)]
                            // SAFETY: each tile is made once, and first written unless the caller's result is kept.
                            unsafe {
                                y.put(&tile, (panel * ROWS, x.count), (slab * COLS, columns), y.keep || start > 0);
                            }
                        }
                    }
                },
            );
        });
    }
    PANELS.set(buffer);
}

/// The activations of a part of the contraction: whole panels in place where the kernel can read them so, the others laid out.
struct Panels<'a> {
    in_place: &'a [Word],
    stride: usize,
    laid_out: &'a [[Word; ROWS]],
    words: usize,
    /// The first panel that is laid out.
    first: usize,
}

impl<'a> Panels<'a> {
    /// Bytes between lines that lie in the same set of a first-level cache: it would not hold a panel of rows so far apart.
    const ALIAS: usize = 4096;

    fn new(x: &Tokens<'a>, start: usize, words: usize, format: &dyn Format, buffer: &'a mut Vec<[Word; ROWS]>) -> Self {
        let in_place = match format.in_place(x.data) {
            Some(x_words) if !(x.stride * size_of::<Word>()).is_multiple_of(Self::ALIAS) => x_words.get(start..),
            _ => None,
        };
        let first = in_place.map_or(0, |_| x.count / ROWS);
        let laid_out = room(buffer, (x.count.div_ceil(ROWS) - first) * words, [0; ROWS]);
        let panels = laid_out.par_chunks_mut(words).enumerate();
        panels.for_each(|(i, panel)| format.lay_out_rows(x, (first + i) * ROWS, start, panel));
        Self { in_place: in_place.unwrap_or_default(), stride: x.stride, laid_out, words, first }
    }

    #[inline(always)]
    fn get(&self, i: usize) -> Panel<'_> {
        match i.checked_sub(self.first) {
            Some(i) => Panel::LaidOut(&self.laid_out[i * self.words..(i + 1) * self.words]),
            None => Panel::InPlace(&self.in_place[i * ROWS * self.stride..], self.stride),
        }
    }
}

/// Calls `f(range, room)` for ranges of slabs that cover all `count` of them, with room to lay these out: each thread lays
/// out what it multiplies, so that this is in its cache then. Slabs of a group stay together.
fn slabs(count: usize, words: usize, group: usize, f: impl Fn(Range<usize>, &mut [[Word; COLS]]) + Sync) {
    /// Slabs of a job at most: half of a second-level cache of 1 MiB.
    const MOST: usize = 4;
    /// Jobs for a thread that even out what else its core has to do.
    const JOBS: usize = 8;
    let step = (count / (threads() * JOBS)).clamp(1, MOST).next_multiple_of(group);
    let job = |i: usize| {
        let range = i * step..count.min((i + 1) * step);
        let mut buffer = SLABS.take();
        f(range.clone(), Columns::words(room(&mut buffer, range.len() * words, Columns([0; COLS]))));
        SLABS.set(buffer);
    };
    let jobs = count.div_ceil(step);
    if threads() == 1 || jobs < 2 {
        (0..jobs).for_each(job);
    } else {
        (0..jobs).into_par_iter().with_max_len(1).for_each(job);
    }
}

/// The first `len` elements of a buffer that grows to hold them.
fn room<T: Copy>(buffer: &mut Vec<T>, len: usize, fill: T) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, fill);
    }
    &mut buffer[..len]
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
            if add {
                for (to, &sum) in to.iter_mut().zip(tile) {
                    // SAFETY: it is initialised, as the caller promises.
                    to.write(unsafe { to.assume_init() } + sum);
                }
            } else {
                to.iter_mut().zip(tile).for_each(|(to, &sum)| *to = MaybeUninit::new(sum));
            }
        }
    }
}
