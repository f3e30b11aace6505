//! Vector building blocks of the CPU kernels: `2^x`, `tanh`, dot products and a small GEMM, for whatever vector
//! instructions the machine has (AVX-512, AVX2, NEON, none), chosen at run time by `pulp`.

use std::f32::consts::{LN_2, LOG2_E};

use pulp::{Simd, WithSimd};

/// Columns of every packed matrix are padded with zeros to a multiple of this (the widest vector, in `f32`).
pub(super) const PAD: usize = 16;

/// `n` rounded up to whole vectors.
pub(super) fn padded(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

/// `2^x`, within 2 ulp for `x ≥ −126`, exactly 0 below, 2^127 above 127, NaN for NaN.
#[inline(always)]
pub(super) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Minimax on [−1/2, 1/2], relative error 1.9e-9.
    const C: [f32; 7] = [1.0, LN_2, 0.240_226_46, 0.055_503_286, 0.009_618_489, 0.001_339_993_1, 0.000_153_458_12];
    // Adding it leaves the nearest integer of x in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let low = simd.splat_f32s(-126.0);
    let underflow = simd.less_than_f32s(x, low);
    // Comparisons and not min and max, which drop a NaN or keep it depending on the machine.
    let x = simd.select_f32s(underflow, low, x);
    let high = simd.splat_f32s(127.0);
    let x = simd.select_f32s(simd.less_than_f32s(high, x), high, x);
    let rounded = simd.add_f32s(x, simd.splat_f32s(ROUND));
    let f = simd.sub_f32s(x, simd.sub_f32s(rounded, simd.splat_f32s(ROUND)));
    let mut p = simd.splat_f32s(C[6]);
    for c in C[..6].iter().rev() {
        p = simd.mul_add_e_f32s(p, f, simd.splat_f32s(*c));
    }
    let exponent = simd.add_u32s(simd.transmute_u32s_f32s(rounded), simd.splat_u32s(127));
    let power = simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(exponent, simd.splat_u32s(23)));
    simd.select_f32s(underflow, simd.splat_f32s(0.0), simd.mul_f32s(p, power))
}

/// `tanh(x)` with an absolute error near 1e-7.
#[inline(always)]
pub(super) fn tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    let e = exp2(simd, simd.mul_f32s(x, simd.splat_f32s(2.0 * LOG2_E)));
    simd.sub_f32s(one, simd.div_f32s(simd.splat_f32s(2.0), simd.add_f32s(e, one)))
}

/// The whole vectors of `x`, whose length is a multiple of [`PAD`].
#[inline(always)]
pub(super) fn vectors<S: Simd>(x: &[f32]) -> &[S::f32s] {
    S::as_simd_f32s(x).0
}

/// The whole vectors of `x`, whose length is a multiple of [`PAD`].
#[inline(always)]
pub(super) fn vectors_mut<S: Simd>(x: &mut [f32]) -> &mut [S::f32s] {
    S::as_mut_simd_f32s(x).0
}

/// `Σ a·b` over the elements of `b`; `a` is padded with zeros to whole vectors.
#[inline(always)]
pub(super) fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let (b, tail) = S::as_simd_f32s(b);
    let a = vectors::<S>(a);
    let mut sum = simd.splat_f32s(0.0);
    for (a, b) in a.iter().zip(b) {
        sum = simd.mul_add_e_f32s(*a, *b, sum);
    }
    if let (false, Some(a)) = (tail.is_empty(), a.get(b.len())) {
        sum = simd.mul_add_e_f32s(*a, simd.partial_load_f32s(tail), sum);
    }
    simd.reduce_sum_f32s(sum)
}

/// `C (+)= A × B`, `A [m, k]` with any strides, `B [k, n]` and `C [m, n]` row-major, `n` a multiple of [`PAD`].
///
/// No packing: it is for operands that already lie in L1 or L2, and meant to be called through `Simd::vectorize`.
#[derive(Debug)]
pub(super) struct Gemm<'a> {
    pub(super) m: usize,
    pub(super) k: usize,
    pub(super) n: usize,
    pub(super) a: &'a [f32],
    pub(super) a_row: usize,
    pub(super) a_col: usize,
    pub(super) b: &'a [f32],
    pub(super) b_row: usize,
    pub(super) c: &'a mut [f32],
    pub(super) c_row: usize,
    /// Whether the product is added to `C` or replaces it.
    pub(super) add: bool,
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
            n.is_multiple_of(PAD)
                && self.a.len() >= reach(m, self.a_row, k, self.a_col)
                && self.b.len() >= reach(k, self.b_row, n, 1)
                && self.c.len() >= reach(m, self.c_row, n, 1)
                && (m == 1 || self.c_row >= n),
            "attention: a tile reaches past its buffer"
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
        let mut j = 0;
        // SAFETY: columns j.. and the ones that each step takes are below n.
        unsafe {
            while j + NV * S::F32_LANES <= self.n {
                self.block::<S, MR, NV>(simd, a, b.add(j), c.add(j));
                j += NV * S::F32_LANES;
            }
            while j < self.n {
                self.block::<S, MR, 1>(simd, a, b.add(j), c.add(j));
                j += S::F32_LANES;
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
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let c = c.add(i * self.c_row + j * S::F32_LANES).cast::<S::f32s>();
                    let sum = if self.add { simd.add_f32s(c.read_unaligned(), *sum) } else { *sum };
                    c.write_unaligned(sum);
                }
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
    struct Map<'a>(&'a [f32], bool);

    impl WithSimd for Map<'_> {
        type Output = Vec<f32>;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let mut out = vec![0f32; self.0.len()];
            for (y, x) in vectors_mut::<S>(&mut out).iter_mut().zip(vectors::<S>(self.0)) {
                *y = if self.1 { tanh(simd, *x) } else { exp2(simd, *x) };
            }
            out
        }
    }

    #[test]
    fn exp2_is_within_two_ulp() {
        let x: Vec<f32> = (0..16 * 40_000).map(|i| -126.0 + i as f32 * (253.0 / 640_000.0)).collect();
        everywhere(Map(&x, false), |y| {
            for (x, y) in x.iter().zip(y) {
                let want = f64::from(*x).exp2();
                let error = (f64::from(y) - want).abs() / want;
                assert!(error <= 2.0 * f64::from(f32::EPSILON), "2^{x}: {y}, off by {error:e}");
            }
        });
    }

    #[test]
    fn exp2_at_the_edges() {
        let mut x = [0f32; 16];
        x[..7].copy_from_slice(&[f32::NEG_INFINITY, -1e30, -126.5, f32::NAN, 0.0, 1.0, -1.0]);
        everywhere(Map(&x, false), |y| {
            assert_eq!(&y[..3], &[0.0; 3]);
            assert!(y[3].is_nan(), "a NaN must not vanish");
            assert_eq!(&y[4..7], &[1.0, 2.0, 0.5]);
        });
    }

    #[test]
    fn tanh_matches_f64() {
        let x: Vec<f32> = (0..16 * 4_000).map(|i| -20.0 + i as f32 * (40.0 / 64_000.0)).collect();
        everywhere(Map(&x, true), |y| {
            for (x, y) in x.iter().zip(y) {
                let want = f64::from(*x).tanh();
                assert!((f64::from(y) - want).abs() < 3e-7, "tanh({x}): {y}, not {want}");
            }
        });
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
            simd.vectorize(Gemm { m, k, n, a: &a, a_row, a_col, b: &b, b_row, c: &mut c, c_row, add });
            for i in 0..m {
                for j in 0..c_row {
                    let old = before[i * c_row + j];
                    let sum: f32 = (0..k).map(|p| a[i * a_row + p * a_col] * b[p * b_row + j.min(n - 1)]).sum();
                    let want = if j >= n { old } else { sum + if add { old } else { 0.0 } };
                    assert_eq!(c[i * c_row + j], want, "({i}, {j}) of {m} × {k} × {n}");
                }
            }
        }
    }

    #[test]
    fn gemm_is_exact_on_small_integers() {
        for m in [1, 2, 3, 7, 8, 13, 64] {
            for k in [0, 1, 5, 64] {
                for n in [16, 32, 48, 80] {
                    for bits in 0..4 {
                        everywhere(Product { m, k, n, transposed: bits & 1 == 1, add: bits & 2 == 2 }, |()| ());
                    }
                }
            }
        }
    }
}
