//! Products of a frozen weight with activations on a CPU, each made the fastest way that this processor has.

use std::cell::Cell;

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use super::{FrozenWeight, WeightStorage};
use crate::cpu::{self, Mat};
use crate::frozen_gemm::{self, Addend, Contracted, Factor, Format, InBf16, InF32};
use crate::stored::Stored;
use crate::thin::{self, Tokens};

/// Elements of a widened panel. A panel stays in the last-level cache while a GEMM reads it; most matrices of a small model
/// are one, so that their products are not cut into parts that add to each other.
const PANEL_ELEMENTS: usize = 1024 * 1024;

thread_local! {
    /// The widened panel, kept from one product to the next.
    static PANEL: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

impl FrozenWeight {
    /// `x·Wᵀ + addend`, `[tokens, out]`.
    pub(crate) fn matmul_t_cpu(&self, x: &[f32], tokens: usize, addend: Addend<'_>) -> Result<Vec<f32>> {
        let new = |x: Tokens<'_>, w: Factor, format: &dyn Format| frozen_gemm::new_product(x, w, format, addend);
        if let Some(y) = self.product(Contracted::In, x, tokens, new)? {
            return Ok(y);
        }
        let mut y = match addend.low_rank {
            // It comes first, so that the large product is added to it while it is made.
            Some(low_rank) => {
                let mut y = low_rank.product()?;
                self.add_matmul_t_cpu(x, tokens, &mut y)?;
                y
            }
            None => self.plain_matmul_t(x, tokens)?,
        };
        addend.add_bias(&mut y);
        Ok(y)
    }

    fn plain_matmul_t(&self, x: &[f32], tokens: usize) -> Result<Vec<f32>> {
        let (n, k) = (self.out_features, self.in_features);
        if let Some(w) = self.as_f32() {
            return cpu::with(w, |w| cpu::gemm(Mat::new(x, tokens, k), Mat::new(w.data, n, k).t(), 1.0));
        }
        if n == 0 || k == 0 || tokens <= thin::MAX_TOKENS {
            let mut y = vec![0f32; tokens * n];
            self.add_matmul_t_cpu(x, tokens, &mut y)?;
            return Ok(y);
        }
        let (mut y, x) = (Vec::with_capacity(tokens * n), Mat::new(x, tokens, k));
        self.for_panels(|first, panel| {
            let columns = y.spare_capacity_mut().get_mut(first..).unwrap_or_default();
            cpu::gemm_write(columns, n, x, Mat::new(panel, panel.len() / k, k).t())
        })?;
        #[allow(unsafe_code)]
        // SAFETY: the panels cover all rows of the matrix, so all columns of y were written.
        unsafe {
            y.set_len(tokens * n);
        }
        Ok(y)
    }

    /// `y += x·Wᵀ`.
    fn add_matmul_t_cpu(&self, x: &[f32], tokens: usize, y: &mut [f32]) -> Result<()> {
        let (n, k) = (self.out_features, self.in_features);
        if tokens <= thin::MAX_TOKENS {
            let x = Tokens::dense(x, tokens, k);
            return self.with_stored(|w| thin::add_product(y, n, x, w, n, 1.0));
        }
        let add = |x: Tokens<'_>, w: Factor, format: &dyn Format| frozen_gemm::add_product(y, x, w, format);
        if self.product(Contracted::In, x, tokens, add)?.is_some() {
            return Ok(());
        }
        let x = Mat::new(x, tokens, k);
        self.for_panels(|first, panel| {
            let rows = panel.len().checked_div(k).unwrap_or(0);
            cpu::gemm_into(&mut y[first..], n, 1.0, x, Mat::new(panel, rows, k).t(), 1.0, true)
        })
    }

    /// `dy·W + addend`, `[tokens, in]`.
    pub(crate) fn matmul_cpu(&self, dy: &[f32], tokens: usize, addend: Addend<'_>) -> Result<Vec<f32>> {
        let (n, k) = (self.out_features, self.in_features);
        let new = |dy: Tokens<'_>, w: Factor, format: &dyn Format| frozen_gemm::new_product(dy, w, format, addend);
        if let Some(dx) = self.product(Contracted::Out, dy, tokens, new)? {
            return Ok(dx);
        }
        let mut dx = match (addend.low_rank, self.as_f32()) {
            (None, Some(w)) => cpu::with(w, |w| cpu::gemm(Mat::new(dy, tokens, n), Mat::new(w.data, n, k), 1.0))?,
            (low_rank, _) => {
                let mut dx = low_rank.map_or_else(|| Ok(vec![0f32; tokens * k]), |l| l.product())?;
                self.add_matmul_cpu(dy, tokens, &mut dx)?;
                dx
            }
        };
        addend.add_bias(&mut dx);
        Ok(dx)
    }

    /// `dx += dy·W`.
    pub(crate) fn add_matmul_cpu(&self, dy: &[f32], tokens: usize, dx: &mut [f32]) -> Result<()> {
        let (n, k) = (self.out_features, self.in_features);
        let add = |dy: Tokens<'_>, w: Factor, format: &dyn Format| frozen_gemm::add_product(dx, dy, w, format);
        if self.product(Contracted::Out, dy, tokens, add)?.is_some() {
            return Ok(());
        }
        self.for_panels(|first, panel| {
            let rows = panel.len().checked_div(k).unwrap_or(0);
            let dy = Mat::strided(dy.get(first..).unwrap_or_default(), tokens, rows, n);
            cpu::gemm_into(dx, k, 1.0, dy, Mat::new(panel, rows, k), 1.0, true)
        })
    }

    /// What `f` makes of activations and this weight where the processor has a kernel for products of so many tokens. For a few,
    /// reading the weight is the bound.
    fn product<R>(
        &self,
        contracted: Contracted,
        x: &[f32],
        tokens: usize,
        f: impl FnOnce(Tokens<'_>, Factor, &dyn Format) -> Result<R>,
    ) -> Result<Option<R>> {
        if tokens <= thin::MAX_TOKENS || !InF32::available() {
            return Ok(None);
        }
        let factor = Factor { out: self.out_features, inp: self.in_features, contracted };
        let x = Tokens::dense(x, tokens, factor.depth());
        self.with_stored(|stored| {
            if let (true, Stored::Bf16(data)) = (self.narrow_products, stored)
                && let Some(format) = InBf16::new(data)
            {
                return f(x, factor, &format).map(Some);
            }
            if matches!(stored, Stored::F32(_)) && stored.len() <= PANEL_ELEMENTS {
                // The gemm crate is a little faster at a small matrix that needs no widening, and much slower at a large one.
                return Ok(None);
            }
            InF32::new(stored).map(|format| f(x, factor, &format)).transpose()
        })
    }

    /// The matrix where it is `f32` as it lies.
    fn as_f32(&self) -> Option<&Tensor> {
        match &self.storage {
            WeightStorage::Dense(w) if w.dtype() == DType::F32 => Some(w),
            _ => None,
        }
    }

    /// Calls `f(first_row, rows)` on the matrix in `f32`, panel by panel in order: all of it at once where it is `f32`
    /// already, else widened into one buffer that is reused.
    pub(super) fn for_panels(&self, mut f: impl FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
        if self.out_features == 0 || self.in_features == 0 {
            return Ok(());
        }
        if let WeightStorage::Deferred(_) = self.storage {
            return self.resident()?.for_panels(f);
        }
        if let Some(w) = self.as_f32() {
            return cpu::with(w, |w| f(0, w.data));
        }
        // Panels of one size: a small rest would make an inefficient product.
        let most = (PANEL_ELEMENTS / self.in_features).clamp(1, self.out_features);
        let rows = self.out_features.div_ceil(self.out_features.div_ceil(most));
        let mut buffer = PANEL.take();
        if buffer.len() < rows * self.in_features {
            buffer.resize(rows * self.in_features, 0.0);
        }
        let mut panels = (0..self.out_features).step_by(rows);
        let result = panels.try_for_each(|first| {
            let rows = rows.min(self.out_features - first);
            let panel = &mut buffer[..rows * self.in_features];
            let part = rows.div_ceil(cpu::threads() * 2).max(1);
            panel
                .par_chunks_mut(part * self.in_features)
                .enumerate()
                .try_for_each(|(i, rows)| self.widen(first + i * part, rows))?;
            f(first, panel)
        });
        PANEL.set(buffer);
        result
    }
}
