//! The global gradient norm and clipping by it, as `torch.nn.utils.clip_grad_norm_`.

use candle_core::{CpuStorage, DType, Storage, Tensor};
use rayon::prelude::*;

use super::{OptimError, Result};

/// Elements a partial sum covers; fixed, so that the norm does not depend on the number of threads.
const CHUNK: usize = 1 << 14;

/// The norm of a step's gradients and what clipping did with it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradNorm {
    /// L2 norm over all gradients before clipping; NaN or infinite if any gradient is.
    pub norm: f64,
    /// Factor that the gradients were multiplied with, 1 where nothing was clipped.
    pub coef: f64,
}

impl GradNorm {
    /// Whether every gradient was finite.
    pub fn is_finite(&self) -> bool {
        self.norm.is_finite()
    }
}

/// L2 norm over all gradients as if they were one vector, summed in f64 on the CPU. A gradient that is `None` counts
/// as zero.
///
/// # Errors
/// candle failed to read a gradient.
pub fn grad_norm(grads: &[Option<Tensor>]) -> Result<f64> {
    let mut total = 0.0;
    let mut on_device = Vec::new();
    for g in grads.iter().flatten() {
        if g.elem_count() == 0 {
            continue;
        }
        if g.device().is_cpu() {
            total += sum_of_squares(g)?;
        } else {
            on_device.push(g.detach().to_dtype(DType::F32)?.sqr()?.sum_all()?);
        }
    }
    if !on_device.is_empty() {
        // One transfer for all of them.
        total += Tensor::stack(&on_device, 0)?.to_vec1::<f32>()?.into_iter().map(f64::from).sum::<f64>();
    }
    Ok(total.sqrt())
}

/// Scales all gradients by `min(1, max_norm / (norm + 1e-6))` and returns the norm before that. `max_norm = 0` turns
/// clipping off; the norm is still measured. A norm that is not finite is returned as such and nothing is scaled, so
/// that the caller can name the batch and keep its last good state.
///
/// # Errors
/// `max_norm` is negative or NaN, or candle failed.
pub fn clip_grad_norm(grads: &mut [Option<Tensor>], max_norm: f64) -> Result<GradNorm> {
    if max_norm.is_nan() || max_norm < 0.0 {
        let why = "must be 0 (off) or positive";
        return Err(OptimError::Hyper { name: "max_grad_norm", value: max_norm, why });
    }
    let norm = grad_norm(grads)?;
    let mut coef = 1.0;
    if max_norm > 0.0 && norm.is_finite() {
        coef = (max_norm / (norm + 1e-6)).min(1.0);
    }
    if coef < 1.0 {
        for g in grads.iter_mut().flatten() {
            *g = (g.detach() * coef)?;
        }
    }
    Ok(GradNorm { norm, coef })
}

fn sum_of_squares(g: &Tensor) -> Result<f64> {
    let g = g.detach().to_dtype(DType::F32)?.contiguous()?;
    let (storage, layout) = g.storage_and_layout();
    let values = match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(v)), Some((a, b))) => v.get(a..b),
        _ => None,
    };
    let Some(values) = values else {
        return Err(candle_core::Error::msg("gradient norm: expected a contiguous f32 gradient").into());
    };
    if values.len() <= CHUNK {
        return Ok(chunk_sum(values));
    }
    let partial: Vec<f64> = values.par_chunks(CHUNK).map(chunk_sum).collect();
    Ok(partial.into_iter().sum())
}

/// Eight running sums, so that the additions do not wait for each other.
fn chunk_sum(values: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    let mut chunks = values.chunks_exact(8);
    for c in &mut chunks {
        for (lane, &x) in lanes.iter_mut().zip(c) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    let tail: f64 = chunks.remainder().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    lanes.iter().sum::<f64>() + tail
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use candle_core::Device;

    fn t(v: &[f32]) -> Option<Tensor> {
        Some(Tensor::new(v, &Device::Cpu).unwrap())
    }

    #[test]
    fn torch_values() {
        // torch.nn.utils.clip_grad_norm_ on [3, 4], [12]: norm 13, coefficient 1/(13 + 1e-6).
        let mut g = vec![t(&[3.0, 4.0]), None, t(&[12.0])];
        let n = clip_grad_norm(&mut g, 1.0).unwrap();
        assert_eq!(n.norm, 13.0);
        assert!((n.coef - 1.0 / 13.000001).abs() < 1e-15);
        let v = g[0].as_ref().unwrap().to_vec1::<f32>().unwrap();
        assert!((v[1] - 4.0 / 13.000001).abs() < 1e-7);
        assert!(g[1].is_none());
    }

    #[test]
    fn zero_turns_clipping_off_and_small_norms_stay() {
        for max in [0.0, 14.0, f64::INFINITY] {
            let mut g = vec![t(&[3.0, 4.0]), t(&[12.0])];
            let n = clip_grad_norm(&mut g, max).unwrap();
            assert_eq!((n.norm, n.coef), (13.0, 1.0));
            assert_eq!(g[1].as_ref().unwrap().to_vec1::<f32>().unwrap(), [12.0]);
        }
        assert!(clip_grad_norm(&mut [t(&[1.0])], -1.0).is_err());
        assert!(clip_grad_norm(&mut [t(&[1.0])], f64::NAN).is_err());
    }

    #[test]
    fn non_finite_is_reported_and_nothing_scaled() {
        for (bad, nan) in [(f32::NAN, true), (f32::INFINITY, false)] {
            let mut g = vec![t(&[bad, 1.0]), t(&[5.0])];
            let n = clip_grad_norm(&mut g, 1.0).unwrap();
            assert!(!n.is_finite());
            assert_eq!(n.norm.is_nan(), nan);
            assert_eq!(g[1].as_ref().unwrap().to_vec1::<f32>().unwrap(), [5.0]);
        }
        // Squares beyond f32 are no overflow.
        assert!((grad_norm(&[t(&[1e30, 1e30])]).unwrap() / (2f64.sqrt() * 1e30) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn large_odd_and_strided_gradients() {
        let n = 3 * CHUNK + 5;
        let v: Vec<f32> = (0..n).map(|i| ((i % 17) as f32 - 8.0) * 0.1).collect();
        let want: f64 = v.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let got = grad_norm(&[t(&v)]).unwrap();
        assert!((got / want - 1.0).abs() < 1e-12);
        let m = Tensor::arange(0f32, 12.0, &Device::Cpu).unwrap().reshape((3, 4)).unwrap();
        let part = m.t().unwrap().narrow(0, 1, 2).unwrap();
        let want = [1f64, 2.0, 5.0, 6.0, 9.0, 10.0].iter().map(|x| x * x).sum::<f64>().sqrt();
        assert_eq!(grad_norm(&[Some(part)]).unwrap(), want);
        assert_eq!(grad_norm(&[]).unwrap(), 0.0);
        assert_eq!(grad_norm(&[Some(Tensor::zeros(0, DType::F32, &Device::Cpu).unwrap())]).unwrap(), 0.0);
    }
}
