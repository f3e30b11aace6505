//! Orthogonal blocks from skew-symmetric ones.

use candle_core::{DType, Tensor};
use peft_core::Result;

/// `(I − Q)·(I + Q)⁻¹` for skew-symmetric `q: [n, width, width]`.
///
/// `I + Q` has the identity as its symmetric part, so elimination meets no zero pivot and needs no exchange of rows.
pub(crate) fn cayley(q: &Tensor) -> Result<Tensor> {
    let (n, width, _) = q.dims3()?;
    let one = Tensor::eye(width, DType::F32, q.device())?.to_dtype(q.dtype())?;
    let identity = one.unsqueeze(0)?.broadcast_as((n, width, width))?;
    // The two factors commute: solve (I + Q)·R = I − Q.
    let mut rows = Tensor::cat(&[(&identity + q)?, (&identity - q)?], 2)?;
    for k in 0..width {
        let column = rows.narrow(2, k, 1)?;
        let pivot = column.narrow(1, k, 1)?;
        let row = rows.narrow(1, k, 1)?.broadcast_div(&pivot)?;
        let unit = one.narrow(1, k, 1)?.unsqueeze(0)?;
        rows = (&rows - column.broadcast_sub(&unit)?.broadcast_mul(&row)?)?;
    }
    Ok(rows.narrow(2, width, width)?.contiguous()?)
}

/// The start of the series of [`cayley`] in Q: `I + 2Q + 2Q² + … + Q^(terms − 1)`, the last power counted once, with the
/// sign that PEFT gives it: for Q where the exact form has −Q.
pub(crate) fn cayley_series(q: &Tensor, terms: usize) -> Result<Tensor> {
    let (n, width, _) = q.dims3()?;
    let one = Tensor::eye(width, DType::F32, q.device())?.to_dtype(q.dtype())?;
    let mut sum = one.unsqueeze(0)?.broadcast_as((n, width, width))?.contiguous()?;
    if terms < 2 {
        return Ok(sum);
    }
    sum = (sum + (q * 2.0)?)?;
    if terms < 3 {
        return Ok(sum);
    }
    let mut power = q.matmul(q)?;
    sum = (sum + (&power * 2.0)?)?;
    for _ in 3..terms.saturating_sub(1) {
        power = power.matmul(q)?;
        sum = (sum + (&power * 2.0)?)?;
    }
    Ok((sum + power.matmul(q)?)?)
}
