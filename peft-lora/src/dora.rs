//! DoRA's weight norm without the dense sum.
//!
//! `‖W + s·BA‖²` by rows is `‖W‖² + 2s·⟨W, BA⟩ + s²·‖BA‖²`, and with `W·Aᵀ: [out, r]` and the Gram matrix
//! `A·Aᵀ: [r, r]` both further terms are row sums over r instead of over the input. No `[out, in]` matrix is made.

use candle_core::{DType, Tensor};
use peft_core::Result;
use peft_core::kernels::FrozenWeight;

/// `‖W + s·BA‖₂` for each output, `[out]` in `f32`, untracked: PEFT lets no gradient through the norm.
///
/// # Errors
/// When shapes do not fit.
pub fn weight_norm(weight: &FrozenWeight, a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
    let s = f64::from(scale);
    let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
    let squares = weight.row_square_norms()?;
    // A·Wᵀ: the frozen product with A as its input.
    let wa = weight.matmul_t(&a)?.t()?.contiguous()?;
    let cross = (wa * &b)?.sum(1)?;
    let gram = a.matmul(&a.t()?)?;
    let own = (b.matmul(&gram)? * &b)?.sum(1)?;
    let total = ((squares + (cross * (2.0 * s))?)? + (own * (s * s))?)?;
    // Cancellation may leave a tiny negative where W + s·BA vanishes.
    Ok(total.clamp(0f32, f32::MAX)?.sqrt()?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use peft_core::kernels::testing::{close, randn};

    #[test]
    fn equals_the_dense_norm() {
        for (out, inp, r) in [(1, 1, 1), (7, 13, 3), (40, 24, 8)] {
            let w = randn(1, (out, inp), 0.5).unwrap();
            let (a, b) = (randn(2, (r, inp), 0.5).unwrap(), randn(3, (out, r), 0.5).unwrap());
            let dense = (&w + (b.matmul(&a).unwrap() * 1.7).unwrap()).unwrap();
            let dense = dense.sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
            let norm = weight_norm(&FrozenWeight::dense(&w).unwrap(), &a, &b, 1.7).unwrap();
            close("norm", &norm, &dense, 1e-4).unwrap();
        }
    }
}
