//! Factorisations of weights, in `f64` through nalgebra.
//!
//! A row-major tensor `[q, n]` is nalgebra's column-major matrix `[n, q]`, so vectors are kept as rows here.

use candle_core::{DType, Device, Tensor};
use nalgebra::DMatrix;
use peft_core::kernels::{FrozenWeight, Stream};
use peft_core::{Error, Result};

/// Directions beyond the rank that suffice for a randomised factorisation of a weight: with a few more, its error comes
/// close to the best possible (Halko, Martinsson and Tropp, 2011, section 10).
pub(crate) const OVERSAMPLING: usize = 8;

/// The leading part of `W = Σ sᵢ·uᵢ·vᵢᵀ`, singular values in descending order, on the CPU in `f32`.
#[derive(Debug)]
pub(crate) struct Svd {
    /// Left singular vectors as rows, `[r, out]`.
    pub(crate) u: Tensor,
    /// Singular values.
    pub(crate) s: Vec<f64>,
    /// Right singular vectors as rows, `[r, in]`.
    pub(crate) v: Tensor,
}

/// How often a matrix is turned before its decomposition is given up.
const TURNS: u32 = 4;
/// How far a decomposition may be from its matrix, as a share: far above its rounding, far below that of an `f32`.
const APART: f64 = 1e-10;

/// `U`, singular values in descending order and `Vᵀ`.
///
/// nalgebra's iteration ends with other triplets for a few matrices, mostly nearly diagonal ones (0.35: a third value of 0.66 where
/// it is 0.58), and says nothing. So the product of what it gives is compared with the matrix; where it is another, the matrix
/// is decomposed again behind a random rotation, which U then takes back.
///
/// # Errors
/// When no turn is decomposed.
fn decomposed(m: &DMatrix<f64>) -> Result<(DMatrix<f64>, Vec<f64>, DMatrix<f64>)> {
    let (rows, columns) = m.shape();
    let limit = 100 * rows.min(columns).max(10);
    let close = APART * m.norm();
    for turn in 0..=TURNS {
        let rotation = (turn > 0).then(|| rotation(rows, turn));
        let turned = rotation.as_ref().map_or_else(|| m.clone(), |q| q * m);
        let Some(found) = turned.clone().try_svd(true, true, f64::EPSILON, limit) else { continue };
        let (Some(u), Some(v_t)) = (found.u, found.v_t) else { continue };
        let apart = &u * DMatrix::from_diagonal(&found.singular_values) * &v_t - turned;
        if apart.norm() <= close {
            let u = rotation.map_or_else(|| u.clone(), |q| q.transpose() * &u);
            return Ok((u, found.singular_values.iter().copied().collect(), v_t));
        }
    }
    Err(Error::msg("the singular value decomposition does not converge"))
}

/// A random rotation of `n` dimensions.
fn rotation(n: usize, turn: u32) -> DMatrix<f64> {
    let normals = Stream { seed: 0, step: turn, site: u32::MAX }.normal_vec(n * n, 1.0);
    DMatrix::from_iterator(n, n, normals.into_iter().map(f64::from)).qr().q()
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    let values: Vec<f64> = t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    // nalgebra panics on NaN.
    if values.iter().all(|x| x.is_finite()) { Ok(values) } else { Err(Error::msg("the weight holds NaN or infinity")) }
}

fn rows(data: &[f64], shape: (usize, usize)) -> Result<Tensor> {
    let data = data.iter().take(shape.0 * shape.1).map(|&x| x as f32).collect::<Vec<_>>();
    Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
}

/// An orthonormal basis, as rows, of the span of the rows of `vectors: [q, n]` with `q ≤ n`: the Q of a QR factorisation.
///
/// # Errors
/// When there are more vectors than dimensions, or a value is not finite.
pub(crate) fn orthonormal_rows(vectors: &Tensor) -> Result<Tensor> {
    let (q, n) = vectors.dims2()?;
    if q > n {
        return Err(Error::msg(format!("{q} vectors of {n} elements have no orthonormal basis of as many")));
    }
    let basis = DMatrix::from_vec(n, q, values(vectors)?).qr().q();
    rows(basis.as_slice(), (q, n))
}

/// The first `r` singular triplets of `w: [out, in]`, by a full decomposition: about `12·k³` operations on one core for
/// `k = min(out, in)`.
///
/// # Errors
/// When a value is not finite or the iteration does not converge.
pub(crate) fn svd(w: &Tensor, r: usize) -> Result<Svd> {
    let (out, inp) = w.dims2()?;
    let (right, s, left) = decomposed(&DMatrix::from_vec(inp, out, values(w)?))?;
    let r = r.min(s.len());
    Ok(Svd {
        u: rows(left.transpose().as_slice(), (r, out))?,
        s: s.iter().take(r).copied().collect(),
        v: rows(right.as_slice(), (r, inp))?,
    })
}

/// All singular triplets of `B·A` for `b: [out, r]` and `a: [r, in]`, without the product: `B = Q_B R_B` and `Aᵀ = Q_A R_A`,
/// and `R_B R_Aᵀ`, of at most r rows and columns, is decomposed. There are `min(r, out, in)` of them.
///
/// # Errors
/// When a value is not finite or the iteration does not converge.
pub(crate) fn product_svd(a: &Tensor, b: &Tensor) -> Result<Svd> {
    let ((r, inp), out) = (a.dims2()?, b.dim(0)?);
    let right = DMatrix::from_vec(inp, r, values(a)?).qr();
    let left = DMatrix::from_vec(out, r, values(&b.t()?.contiguous()?)?).qr();
    let core = left.r() * right.r().transpose();
    let (u, s, v_t) = decomposed(&core)?;
    let (u, v, k) = (left.q() * u, right.q() * v_t.transpose(), s.len());
    Ok(Svd { u: rows(u.as_slice(), (k, out))?, s, v: rows(v.as_slice(), (k, inp))? })
}

/// `‖B·A‖` (Frobenius) for `b: [out, r]` and `a: [r, in]`: from the product or, where r is smaller than the matrix, from Gram
/// matrices, `‖BA‖² = ⟨BᵀB, AAᵀ⟩`. Whatever the shapes, neither is larger than A or B.
///
/// # Errors
/// When shapes do not fit.
pub(crate) fn product_norm(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.to_dtype(DType::F64)?, b.to_dtype(DType::F64)?);
    let ((r, inp), out) = (a.dims2()?, b.dim(0)?);
    let squares = if r.saturating_mul(r) < out.saturating_mul(inp) {
        (b.t()?.contiguous()?.matmul(&b)? * a.matmul(&a.t()?.contiguous()?)?)?
    } else {
        b.matmul(&a)?.sqr()?
    };
    Ok(squares.sum_all()?.to_scalar::<f64>()?.max(0.0).sqrt())
}

/// The first `r` singular triplets of a weight by subspace iteration from a random start of `r + oversampling`
/// directions: `iterations` times there and back through W, which is read as it is stored and never widened.
///
/// # Errors
/// When a product fails.
pub(crate) fn randomised_svd(
    weight: &FrozenWeight,
    r: usize,
    oversampling: usize,
    iterations: usize,
    stream: Stream,
) -> Result<Svd> {
    let (out, inp) = (weight.out_features(), weight.in_features());
    let q = (r + oversampling).min(out).min(inp);
    let device = weight.device();
    let start = Tensor::from_vec(stream.normal_vec(q * inp, 1.0), (q, inp), &device)?;
    let mut left = orthonormal_rows(&weight.matmul_t(&start)?)?;
    for _ in 0..iterations {
        let right = orthonormal_rows(&weight.matmul(&left.to_device(&device)?)?)?;
        left = orthonormal_rows(&weight.matmul_t(&right.to_device(&device)?)?)?;
    }
    // W ≈ Q·(QᵀW), and the small factor is decomposed.
    let core = svd(&weight.matmul(&left.to_device(&device)?)?, r)?;
    Ok(Svd { u: core.u.matmul(&left)?, ..core })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use peft_core::kernels::testing::{close, randn};

    fn product(d: &Svd) -> Tensor {
        let s: Vec<f32> = d.s.iter().map(|&s| s as f32).collect();
        let n = s.len();
        let scaled = d.v.broadcast_mul(&Tensor::from_vec(s, (n, 1), &Device::Cpu).unwrap()).unwrap();
        d.u.t().unwrap().matmul(&scaled).unwrap()
    }

    fn assert_orthonormal(rows: &Tensor) {
        let gram = rows.matmul(&rows.t().unwrap()).unwrap();
        close("gram", &gram, &Tensor::eye(rows.dim(0).unwrap(), DType::F32, &Device::Cpu).unwrap(), 1e-5).unwrap();
    }

    #[test]
    fn full_rank_gives_the_matrix_back() {
        for (out, inp) in [(1, 1), (1, 5), (7, 3), (20, 33), (48, 32)] {
            let w = randn(1, (out, inp), 0.7).unwrap();
            let d = svd(&w, out.min(inp)).unwrap();
            close("W", &product(&d), &w, 1e-5).unwrap();
            assert_orthonormal(&d.u);
            assert_orthonormal(&d.v);
            assert!(d.s.is_sorted_by(|a, b| a >= b));
        }
        let zero = Tensor::zeros((6, 4), DType::F32, &Device::Cpu).unwrap();
        assert!(svd(&zero, 2).unwrap().s.iter().all(|&s| s == 0.0));
    }

    #[test]
    fn a_product_is_decomposed_without_being_made() {
        // also more columns than a side has, and columns that depend on each other
        for (out, inp, r) in [(1, 1, 1), (7, 3, 2), (5, 9, 5), (4, 6, 11), (40, 24, 8)] {
            let (a, b) = (randn(1, (r, inp), 0.7).unwrap(), randn(2, (out, r), 0.7).unwrap());
            let d = product_svd(&a, &b).unwrap();
            assert_eq!(d.s.len(), r.min(out).min(inp));
            let dense = b.matmul(&a).unwrap();
            close("BA", &product(&d), &dense, 1e-5).unwrap();
            let norm = dense.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            assert!((product_norm(&a, &b).unwrap() - f64::from(norm)).abs() < 1e-5 * f64::from(norm));
            assert_orthonormal(&d.u);
            assert_orthonormal(&d.v);
            for (x, y) in d.s.iter().zip(svd(&dense, r).unwrap().s) {
                assert!((x - y).abs() < 1e-5 * y.max(1.0), "{x} {y}");
            }
        }
        let (a, b) = (randn(1, (3, 8), 0.7).unwrap(), randn(2, (6, 3), 0.7).unwrap());
        let twice = |t: &Tensor, dim| Tensor::cat(&[t, t], dim).unwrap();
        let s = product_svd(&twice(&a, 0), &twice(&b, 1)).unwrap().s;
        assert!(s[2] > 0.1 && s[3] < 1e-12 * s[0], "{s:?}");
    }

    #[test]
    fn randomised_finds_the_same_triplets() {
        // Singular values that fall by a half each, as trained weights have a few large ones.
        let (out, inp) = (40, 64);
        let full = svd(&randn(2, (out, inp), 1.0).unwrap(), out).unwrap();
        let falling = Svd { s: (0..out).map(|i| 0.5f64.powi(i as i32)).collect(), ..full };
        let w = product(&falling);
        let exact = svd(&w, 4).unwrap();
        let stream = Stream { seed: 3, step: 0, site: 1 };
        let found = randomised_svd(&FrozenWeight::dense(&w).unwrap(), 4, OVERSAMPLING, 4, stream).unwrap();
        for (a, b) in exact.s.iter().zip(&found.s) {
            assert!((a - b).abs() < 1e-5 * a, "{a} {b}");
        }
        close("W₄", &product(&found), &product(&exact), 1e-5).unwrap();
        // A rank as large as the matrix leaves no room for oversampling.
        let all = randomised_svd(&FrozenWeight::dense(&w).unwrap(), out, OVERSAMPLING, 1, stream).unwrap();
        close("W", &product(&all), &w, 1e-4).unwrap();
    }

    #[test]
    fn hostile_matrices_are_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            let w = Tensor::new(&[[bad, 1.0], [2.0, 3.0]], &Device::Cpu).unwrap();
            assert!(svd(&w, 1).is_err() && orthonormal_rows(&w).is_err() && product_svd(&w, &w).is_err());
        }
        let extreme = Tensor::new(&[[f32::MAX, f32::MIN_POSITIVE], [f32::MAX, -f32::MAX]], &Device::Cpu).unwrap();
        assert!(svd(&extreme, 2).is_ok());
        assert!(orthonormal_rows(&randn(1, (3, 2), 1.0).unwrap()).is_err());
    }
}
