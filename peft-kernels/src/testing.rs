//! What tests hold operations against: finite differences, and comparisons that say where they fail.

use std::collections::HashMap;

use candle_core::{DType, Result, Tensor, Var};

use crate::philox::Stream;

/// A tensor of standard normal values times `scale`, a function of `seed` alone.
///
/// # Errors
/// When the tensor cannot be made.
pub fn randn(seed: u64, shape: impl Into<candle_core::Shape>, scale: f32) -> Result<Tensor> {
    let shape = shape.into();
    let data = Stream { seed, step: 0, site: 0 }.normal_vec(shape.elem_count(), scale);
    Tensor::from_vec(data, shape, &candle_core::Device::Cpu)
}

/// The largest `|a − b| / max(1, |b|)` over all elements.
///
/// # Errors
/// When shapes differ.
pub fn max_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    if a.shape() != b.shape() {
        candle_core::bail!("shapes differ: {:?} and {:?}", a.shape(), b.shape());
    }
    let flat = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let mut worst = 0f64;
    for (x, y) in flat(a)?.into_iter().zip(flat(b)?) {
        let d = (x - y).abs() / y.abs().max(1.0);
        // A NaN on one side must not pass as a small difference.
        worst = if d.is_nan() && !(x.is_nan() && y.is_nan()) { f64::INFINITY } else { worst.max(d) };
    }
    Ok(worst)
}

/// Fails when `a` and `b` differ by more than `tolerance` (as [`max_difference`] measures it).
///
/// # Errors
/// Says `what` differs and by how much.
pub fn close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) -> Result<()> {
    let d = max_difference(a, b)?;
    if d > tolerance {
        candle_core::bail!("{what}: differs by {d:.3e}, more than {tolerance:.1e}");
    }
    Ok(())
}

/// Compares the gradients of `f`, by candle's graph and by a recording, with central finite differences along random
/// directions, one input at a time.
///
/// The objective is `Σ f(inputs) ⊙ w` for a fixed random `w`. `f` is evaluated in `f32`, so the step is large and the
/// comparison is made relative to the sizes of both values.
///
/// # Errors
/// Names the input whose gradient is missing or wrong.
pub fn check_gradients(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
    check_gradients_with(inputs, 1e-2, 2e-2, f)
}

/// [`check_gradients`] with a step and a relative tolerance of the caller's.
///
/// # Errors
/// Names the input whose gradient is missing or wrong.
pub fn check_gradients_with(
    inputs: &[Tensor],
    step: f64,
    tolerance: f64,
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    let vars = inputs.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&tracked)?;
    let w = randn(99, y.shape(), 1.0)?.to_device(y.device())?.to_dtype(y.dtype())?;
    let grads = y.mul(&w)?.sum_all()?.backward()?;
    let objective = |args: &[Tensor]| -> Result<f64> {
        f(args)?.to_dtype(DType::F64)?.mul(&w.to_dtype(DType::F64)?)?.sum_all()?.to_scalar::<f64>()
    };
    let (_, record) = crate::record(|| f(&tracked))?;
    let recorded: HashMap<_, _> = record.backward(&w)?.into_iter().collect();
    let plain: Vec<Tensor> = inputs.iter().map(Tensor::detach).collect();
    for (i, var) in vars.iter().enumerate() {
        let Some(grad) = grads.get(var.as_tensor()) else { candle_core::bail!("input {i} got no gradient") };
        let Some(again) = recorded.get(&var.as_tensor().id()) else {
            candle_core::bail!("input {i} got no gradient from the recording")
        };
        let largest = grad.to_dtype(DType::F32)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        close(&format!("recorded gradient of input {i}"), again, grad, 1e-5 * f64::from(largest.max(1.0)))?;
        for direction in 0..3 {
            let d = randn(1000 + direction, plain[i].shape(), 1.0)?.to_device(plain[i].device())?;
            let norm = d.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt().max(1e-12);
            let d = (d / f64::from(norm))?.to_dtype(plain[i].dtype())?;
            let shifted = |h: f64| -> Result<f64> {
                let mut args = plain.clone();
                args[i] = (&plain[i] + (&d * h)?)?;
                objective(&args)
            };
            let numeric = (shifted(step)? - shifted(-step)?) / (2.0 * step);
            let analytic = grad.to_dtype(DType::F64)?.mul(&d.to_dtype(DType::F64)?)?.sum_all()?.to_scalar::<f64>()?;
            let size = numeric.abs().max(analytic.abs()).max(0.1);
            if (numeric - analytic).abs().partial_cmp(&(tolerance * size)).is_none_or(|o| o.is_gt()) {
                candle_core::bail!(
                    "gradient of input {i}, direction {direction}: {analytic:.6} by backward, {numeric:.6} by differences"
                );
            }
        }
    }
    Ok(())
}
