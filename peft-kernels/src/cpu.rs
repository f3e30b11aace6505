//! Slices, GEMM and row-parallel loops: what the CPU kernels are written with.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

use crate::stored::Stored;
use crate::thin;

/// A contiguous `f32` argument of a CPU kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    /// The elements in row-major order.
    pub(crate) data: &'a [f32],
    /// The argument's shape.
    pub(crate) shape: &'a Shape,
}

impl<'a> View<'a> {
    pub(crate) fn new(storage: &'a CpuStorage, layout: &'a Layout) -> Result<Self> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a CPU kernel got a non-contiguous argument of shape {:?}", layout.shape())
        };
        let data = storage.as_slice::<f32>()?;
        match data.get(start..end) {
            Some(data) => Ok(Self { data, shape: layout.shape() }),
            None => candle_core::bail!("a layout reaches {end} elements into a storage of {}", data.len()),
        }
    }

    /// The length of the last dimension, and how many rows of it there are.
    pub(crate) fn rows(&self) -> Result<(usize, usize)> {
        rows(self.shape)
    }
}

/// `(number of rows, row length)` of a shape seen as a matrix: all dimensions but the last are rows.
pub(crate) fn rows(shape: &Shape) -> Result<(usize, usize)> {
    match shape.dims() {
        [] => candle_core::bail!("a scalar has no rows"),
        [.., last] => Ok((shape.elem_count().checked_div(*last).unwrap_or(0), *last)),
    }
}

/// Runs `f` on the elements of a contiguous CPU `f32` tensor.
pub(crate) fn with<R>(t: &Tensor, f: impl FnOnce(View<'_>) -> Result<R>) -> Result<R> {
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        Storage::Cpu(s) => f(View::new(s, layout)?),
        _ => candle_core::bail!("a CPU kernel got a tensor on {:?}", t.device().location()),
    }
}

/// A CPU tensor that takes over `data`.
pub(crate) fn tensor(data: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &candle_core::Device::Cpu)
}

/// The transpose of a row-major `[rows, cols]`.
pub(crate) fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for j in 0..cols {
        out.extend(x.get(j..).unwrap_or_default().iter().step_by(cols).take(rows));
    }
    out
}

/// Elements of a buffer that stay in the first-level cache while they are written.
const CACHED_ELEMENTS: usize = 8 * 1024;

/// Elements below which a loop stays on one thread.
pub(crate) const PARALLEL_ELEMENTS: usize = 16 * 1024;

/// Calls `f(first_row, rows)` on disjoint blocks of whole rows of `out`, in parallel where it pays.
/// `width` is the row length; `cost` the elements read or written a row, for the decision.
pub(crate) fn for_row_blocks<T: Send>(
    out: &mut [T],
    width: usize,
    cost: usize,
    f: impl Fn(usize, &mut [T]) + Sync + Send,
) {
    if width == 0 || out.is_empty() {
        return;
    }
    let n = out.len() / width;
    let threads = threads();
    if threads == 1 || n * cost < PARALLEL_ELEMENTS {
        f(0, out);
        return;
    }
    // Four blocks a thread even out what the scheduler or uneven rows take.
    let block = n.div_ceil(threads * 4).max(1);
    out.par_chunks_mut(block * width).enumerate().for_each(|(i, rows)| f(i * block, rows));
}

/// A new buffer of `len` elements that `f(first_row, rows)` fills, as in [`for_row_blocks`]. Each block is small enough to
/// be zeroed and filled while it is in the first-level cache, so that the buffer goes to memory once.
pub(crate) fn new_rows<T: Copy + Default + Send>(
    len: usize,
    width: usize,
    cost: usize,
    f: impl Fn(usize, &mut [T]) + Sync + Send,
) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    if width == 0 || !len.is_multiple_of(width) {
        out.resize(len, T::default());
        return out;
    }
    let room = out.spare_capacity_mut().get_mut(..len).unwrap_or_default();
    let step = (CACHED_ELEMENTS / width).next_multiple_of(8).max(8);
    for_row_blocks(room, width, cost, |first, block: &mut [MaybeUninit<T>]| {
        for (i, rows) in block.chunks_mut(step * width).enumerate() {
            rows.fill(MaybeUninit::new(T::default()));
            #[allow(unsafe_code)]
            // SAFETY: all elements were initialised just above, and MaybeUninit<T> has the layout of T.
            let rows = unsafe { &mut *(std::ptr::from_mut(rows) as *mut [T]) };
            f(first + i * step, rows);
        }
    });
    #[allow(unsafe_code)]
    // SAFETY: the blocks cover the `len` elements, each of which was initialised, and the capacity holds them.
    unsafe {
        out.set_len(len);
    }
    out
}

/// Threads that the kernels use: rayon's pool, whose size `RAYON_NUM_THREADS` sets.
#[must_use]
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Runs `f` on a thread of the pool that the kernels use. From any other thread, every parallel loop costs two switches
/// between threads. For programs: work that others have put into the same pool may run on the thread while it waits.
pub fn on_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    // candle walks a graph by recursion, and one of a whole model is deep. A pool that there is already stays as it is.
    let _ = rayon::ThreadPoolBuilder::new().stack_size(64 << 20).build_global();
    rayon::scope(|_| f())
}

/// A read-only matrix in a slice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix whose rows lie `stride` elements apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        Self { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// A dense row-major matrix.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// The transpose, without a copy.
    pub(crate) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// How many rows there are.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// An element; zero beyond the matrix.
    #[inline(always)]
    pub(crate) fn at(&self, row: usize, col: usize) -> f32 {
        if row >= self.rows || col >= self.cols {
            return 0.0;
        }
        self.data.get(row * self.row_stride + col * self.col_stride).copied().unwrap_or(0.0)
    }

    /// How many columns there are.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    fn reach(&self) -> usize {
        if self.rows == 0 || self.cols == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride + 1
    }
}

/// `dst = keep·dst + scale·(lhs × rhs)`, `dst` row-major with rows `stride` apart; `parallel` spreads it over the pool.
///
/// # Errors
/// When dimensions do not fit or a matrix reaches past its slice.
pub(crate) fn gemm_into(
    dst: &mut [f32],
    stride: usize,
    keep: f32,
    lhs: Mat<'_>,
    rhs: Mat<'_>,
    scale: f32,
    parallel: bool,
) -> Result<()> {
    check_product(dst.len(), stride, lhs, rhs)?;
    if keep == 1.0
        && let Some((x, w)) = thin_factors(lhs, rhs)
    {
        return thin::add_product(dst, stride, x, w, rhs.cols, scale);
    }
    #[allow(unsafe_code)]
    // SAFETY: the check keeps every element that is touched inside the three slices; dst is exclusively borrowed, so it
    // overlaps neither source.
    unsafe {
        packed_gemm(dst.as_mut_ptr(), stride, keep, lhs, rhs, scale, parallel);
    }
    Ok(())
}

/// `lhs × rhs` over the thread pool into rows of `dst`, `stride` apart, all of whose elements in those columns are
/// initialised by it.
///
/// # Errors
/// As [`gemm_into`].
pub(crate) fn gemm_write(dst: &mut [MaybeUninit<f32>], stride: usize, lhs: Mat<'_>, rhs: Mat<'_>) -> Result<()> {
    check_product(dst.len(), stride, lhs, rhs)?;
    #[allow(unsafe_code)]
    // SAFETY: as in `gemm_into`; a product that keeps nothing does not read dst.
    unsafe {
        packed_gemm(dst.as_mut_ptr().cast(), stride, 0.0, lhs, rhs, 1.0, true);
    }
    Ok(())
}

fn check_product(dst: usize, stride: usize, lhs: Mat<'_>, rhs: Mat<'_>) -> Result<()> {
    let (m, n) = (lhs.rows, rhs.cols);
    if m > 0 && n > 0 && (stride < n || dst < (m - 1) * stride + n) {
        candle_core::bail!("gemm: [{m}, {n}] does not fit into {dst} elements in rows of {stride}");
    }
    check_factors(lhs, rhs)
}

/// `lhs × rhs` into a new row-major buffer, over the thread pool.
pub(crate) fn gemm(lhs: Mat<'_>, rhs: Mat<'_>, scale: f32) -> Result<Vec<f32>> {
    let (m, k, n) = (lhs.rows, lhs.cols, rhs.cols);
    check_factors(lhs, rhs)?;
    if m == 0 || n == 0 || k == 0 {
        return Ok(vec![0f32; m * n]);
    }
    if let Some((x, w)) = thin_factors(lhs, rhs) {
        let mut out = vec![0f32; m * n];
        thin::add_product(&mut out, n, x, w, n, scale)?;
        return Ok(out);
    }
    let mut out = Vec::with_capacity(m * n);
    #[allow(unsafe_code)]
    // SAFETY: the buffer has room for m rows of n elements, all of which a product that keeps nothing writes and none of
    // which it reads; the factors were checked.
    unsafe {
        packed_gemm(out.as_mut_ptr(), n, 0.0, lhs, rhs, scale, true);
        out.set_len(m * n);
    }
    Ok(out)
}

/// `X` and `W` where the product is `X·Wᵀ` of few rows and `W` has no gaps.
fn thin_factors<'a>(lhs: Mat<'a>, rhs: Mat<'a>) -> Option<(thin::Tokens<'a>, Stored<'a>)> {
    let suits =
        lhs.rows <= thin::MAX_TOKENS && lhs.col_stride == 1 && rhs.row_stride == 1 && rhs.col_stride == rhs.rows;
    let x = thin::Tokens { data: lhs.data, count: lhs.rows, width: lhs.cols, stride: lhs.row_stride };
    suits.then_some((x, Stored::F32(rhs.data)))
}

pub(crate) fn check_factors(lhs: Mat<'_>, rhs: Mat<'_>) -> Result<()> {
    if rhs.rows != lhs.cols || lhs.data.len() < lhs.reach() || rhs.data.len() < rhs.reach() {
        candle_core::bail!(
            "gemm: [{}, {}] × [{}, {}] does not fit (slices of {} and {})",
            lhs.rows,
            lhs.cols,
            rhs.rows,
            rhs.cols,
            lhs.data.len(),
            rhs.data.len()
        );
    }
    Ok(())
}

/// The product by the `gemm` crate. Where `keep` is 0, `dst` is not read.
///
/// # Safety
/// Both factors lie inside their slices; `dst` is valid for as many rows and columns, `stride` apart, and overlaps
/// neither.
#[allow(unsafe_code)]
unsafe fn packed_gemm(dst: *mut f32, stride: usize, keep: f32, lhs: Mat<'_>, rhs: Mat<'_>, scale: f32, parallel: bool) {
    let parallelism =
        if parallel && threads() > 1 { gemm::Parallelism::Rayon(threads()) } else { gemm::Parallelism::None };
    // SAFETY: as the caller promises.
    unsafe {
        gemm::gemm(
            lhs.rows,
            rhs.cols,
            lhs.cols,
            dst,
            1,
            stride as isize,
            keep != 0.0,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            keep,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
