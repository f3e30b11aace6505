//! A GEMM without packing, for operands that are small or thin enough to be read where they lie: the tiles of attention,
//! and the products of LoRA, one side of which is as narrow as the rank.

use pulp::{Simd, WithSimd};

/// `C = scale·A × B`, or that added to `C`: `A [m, k]` with any strides, `B [k, n]` and `C [m, n]` row-major.
///
/// To be called through `Simd::vectorize` or `Arch::dispatch`.
#[derive(Debug)]
pub(crate) struct Gemm<'a> {
    pub(crate) m: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
    pub(crate) a: &'a [f32],
    pub(crate) a_row: usize,
    pub(crate) a_col: usize,
    pub(crate) b: &'a [f32],
    pub(crate) b_row: usize,
    pub(crate) c: &'a mut [f32],
    pub(crate) c_row: usize,
    pub(crate) scale: f32,
    /// Whether the product is added to `C` or replaces it.
    pub(crate) add: bool,
}

impl WithSimd for Gemm<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { m, k, n, .. } = self;
        if m == 0 || n == 0 {
            return;
        }
        let reach = |rows: usize, row: usize, cols: usize, col: usize| match (rows, cols) {
            (0, _) | (_, 0) => 0,
            _ => (rows - 1) * row + (cols - 1) * col + 1,
        };
        assert!(
            self.a.len() >= reach(m, self.a_row, k, self.a_col)
                && self.b.len() >= reach(k, self.b_row, n, 1)
                && self.c.len() >= reach(m, self.c_row, n, 1)
                && (m == 1 || self.c_row >= n),
            "a matrix reaches past its buffer"
        );
        #[allow(unsafe_code)]
        // SAFETY: the assertion bounds every element of the three matrices.
        unsafe {
            match S::F32_LANES {
                16 => self.rows::<S, 8, 2>(simd),
                8 => self.rows::<S, 4, 2>(simd),
                _ => self.rows::<S, 4, 4>(simd),
            }
        }
    }
}

#[allow(unsafe_code)]
impl Gemm<'_> {
    /// # Safety
    /// All matrices lie inside their slices.
    #[inline(always)]
    unsafe fn rows<S: Simd, const MR: usize, const NV: usize>(self, simd: S) {
        let (a, b, c) = (self.a.as_ptr(), self.b.as_ptr(), self.c.as_mut_ptr());
        let (mut i, m) = (0, self.m);
        // SAFETY: row i and the rows that each step takes are below m.
        unsafe {
            while i < m {
                let (a, c) = (a.add(i * self.a_row), c.add(i * self.c_row));
                let left = m - i;
                i += if left >= MR {
                    self.row_block::<S, MR, NV>(simd, a, b, c);
                    MR
                } else if left >= 4 && MR > 4 {
                    self.row_block::<S, 4, NV>(simd, a, b, c);
                    4
                } else if left >= 2 {
                    self.row_block::<S, 2, NV>(simd, a, b, c);
                    2
                } else {
                    self.row_block::<S, 1, NV>(simd, a, b, c);
                    1
                };
            }
        }
    }

    /// # Safety
    /// `MR` rows of `A` and `C` follow the given pointers.
    #[inline(always)]
    unsafe fn row_block<S: Simd, const MR: usize, const NV: usize>(
        &self,
        simd: S,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
    ) {
        let (mut j, n, lanes) = (0, self.n, S::F32_LANES);
        // SAFETY: columns j.. and the ones that each step takes are below n.
        unsafe {
            while j + NV * lanes <= n {
                self.block::<S, MR, NV>(simd, a, b.add(j), c.add(j));
                j += NV * lanes;
            }
            while j + lanes <= n {
                self.block::<S, MR, 1>(simd, a, b.add(j), c.add(j));
                j += lanes;
            }
            if j < n {
                self.ragged_block::<S, MR>(simd, a, b.add(j), c.add(j), n - j);
            }
        }
    }

    /// # Safety
    /// `MR` rows of `A`, `NV` vectors of columns of `B`, and that block of `C` follow the given pointers.
    #[inline(always)]
    unsafe fn block<S: Simd, const MR: usize, const NV: usize>(
        &self,
        simd: S,
        mut a: *const f32,
        mut b: *const f32,
        c: *mut f32,
    ) {
        let zero = simd.splat_f32s(0.0);
        let mut sums = [[zero; NV]; MR];
        // SAFETY: as the caller promises; pointers step with wrapping_add, so the one past the end is no violation.
        unsafe {
            for _ in 0..self.k {
                let mut row = [zero; NV];
                for (j, x) in row.iter_mut().enumerate() {
                    *x = b.add(j * S::F32_LANES).cast::<S::f32s>().read_unaligned();
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = simd.splat_f32s(*a.add(i * self.a_row));
                    for (sum, y) in sums.iter_mut().zip(row) {
                        *sum = simd.mul_add_e_f32s(x, y, *sum);
                    }
                }
                a = a.wrapping_add(self.a_col);
                b = b.wrapping_add(self.b_row);
            }
            let scale = simd.splat_f32s(self.scale);
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let c = c.add(i * self.c_row + j * S::F32_LANES).cast::<S::f32s>();
                    let sum = match self.add {
                        true => simd.mul_add_e_f32s(scale, *sum, c.read_unaligned()),
                        false => simd.mul_f32s(scale, *sum),
                    };
                    c.write_unaligned(sum);
                }
            }
        }
    }

    /// The last columns, which are fewer than a vector.
    ///
    /// # Safety
    /// `MR` rows of `A`, `left` columns of `B`, and that block of `C` follow the given pointers.
    #[inline(always)]
    unsafe fn ragged_block<S: Simd, const MR: usize>(
        &self,
        simd: S,
        mut a: *const f32,
        mut b: *const f32,
        c: *mut f32,
        left: usize,
    ) {
        let mask = simd.mask_between_m32s(0, left as u32);
        let mut sums = [simd.splat_f32s(0.0); MR];
        // SAFETY: as the caller promises; lanes beyond `left` are neither read nor written.
        unsafe {
            for _ in 0..self.k {
                let row = simd.mask_load_ptr_f32s(mask, b);
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = simd.mul_add_e_f32s(simd.splat_f32s(*a.add(i * self.a_row)), row, *sum);
                }
                a = a.wrapping_add(self.a_col);
                b = b.wrapping_add(self.b_row);
            }
            let scale = simd.splat_f32s(self.scale);
            for (i, sum) in sums.iter().enumerate() {
                let c = c.add(i * self.c_row);
                let sum = match self.add {
                    true => simd.mul_add_e_f32s(scale, *sum, simd.mask_load_ptr_f32s(mask, c)),
                    false => simd.mul_f32s(scale, *sum),
                };
                simd.mask_store_ptr_f32s(mask, c, sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `op` on every instruction set of this machine.
    fn everywhere<Op: WithSimd + Clone>(op: Op, mut check: impl FnMut(Op::Output)) {
        check(pulp::Arch::new().dispatch(op.clone()));
        check(pulp::Arch::Scalar.dispatch(op.clone()));
        #[cfg(target_arch = "x86_64")]
        if let Some(v3) = pulp::x86::V3::try_new() {
            check(pulp::Arch::V3(v3).dispatch(op));
        }
    }

    #[derive(Clone)]
    struct Product {
        m: usize,
        k: usize,
        n: usize,
        transposed: bool,
        add: bool,
    }

    impl WithSimd for Product {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self { m, k, n, transposed, add } = self;
            let value = |i: usize| ((i * 37 + 11) % 17) as f32 - 8.0;
            let (a_row, a_col) = if transposed { (1, m + 2) } else { (k + 3, 1) };
            let a: Vec<f32> = (0..m * k + 3 * m + 2 * k).map(value).collect();
            let (b_row, c_row) = (n + 5, n + 1);
            let b: Vec<f32> = (0..k * b_row).map(value).collect();
            let before: Vec<f32> = (0..m * c_row).map(value).collect();
            let mut c = before.clone();
            simd.vectorize(Gemm { m, k, n, a: &a, a_row, a_col, b: &b, b_row, c: &mut c, c_row, scale: 2.0, add });
            for i in 0..m {
                for j in 0..c_row {
                    let old = before[i * c_row + j];
                    let sum: f32 = (0..k).map(|p| a[i * a_row + p * a_col] * b[p * b_row + j.min(n - 1)]).sum();
                    let want = if j >= n { old } else { 2.0 * sum + if add { old } else { 0.0 } };
                    assert_eq!(c[i * c_row + j], want, "({i}, {j}) of {m} × {k} × {n}");
                }
            }
        }
    }

    #[test]
    fn gemm_is_exact_on_small_integers() {
        for m in [1, 2, 3, 7, 8, 13, 64] {
            for k in [0, 1, 5, 64] {
                for n in [1, 7, 16, 19, 32, 48, 80, 95] {
                    for bits in 0..4 {
                        everywhere(Product { m, k, n, transposed: bits & 1 == 1, add: bits & 2 == 2 }, |()| ());
                    }
                }
            }
        }
    }
}
