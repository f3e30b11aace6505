//! Cross-entropy of logits against target ids, with its gradient made in the same pass.
//!
//! The logits of a language model are its largest tensor by far (`[tokens, vocab]`). [`linear_cross_entropy`] never
//! holds more than one chunk of rows of them: each chunk becomes losses and, in place, its gradient, which the head's
//! weight turns into the gradient of the hidden states at once.

mod cpu;
mod linear;
mod rows;

pub use linear::{HeadLoss, HeadWeight, LossSpec, linear_cross_entropy};
#[cfg(feature = "cuda")]
pub(crate) use rows::Scored;
pub use rows::{CeRows, cross_entropy_rows};
pub(crate) use rows::{Gradient, score};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Layout, MetalStorage, Result, Shape, Tensor};

/// Scaled cross-entropy of tracked `logits` (`[n, vocab]`): `scale · Σ −log softmax(cap(logits))[target]`.
///
/// For heads that are trained themselves; a frozen head is cheaper with [`linear_cross_entropy`]. `softcap` is Gemma's
/// `cap · tanh(logits / cap)`.
///
/// # Errors
/// When there is not one target a row, a target is outside the vocabulary (named), or `softcap` is not positive.
pub fn cross_entropy(logits: &Tensor, targets: &[u32], scale: f64, softcap: Option<f64>) -> Result<HeadLoss> {
    let want = if logits.track_op() { Gradient::Copy } else { Gradient::None };
    let scored = score(logits.detach(), targets, scale, softcap, want)?;
    let nll = scored.nll.iter().sum::<f64>();
    Ok(HeadLoss { loss: settled(logits, scale * nll, scored.grad)?, nll, hits: scored.hits })
}

/// A scalar that is already known, as a function of `x` whose gradient is already known. Without `grad`, a constant.
fn settled(x: &Tensor, value: f64, grad: Option<Tensor>) -> Result<Tensor> {
    match grad {
        Some(grad) => x.contiguous()?.apply_op1(Settled { value, dtype: loss_dtype(x), grad }),
        None => Tensor::new(value, x.device())?.to_dtype(loss_dtype(x)),
    }
}

/// Losses are `f32`, except under tests' `f64`.
fn loss_dtype(x: &Tensor) -> DType {
    if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

struct Settled {
    value: f64,
    dtype: DType,
    grad: Tensor,
}

impl Settled {
    fn scalar<S: BackendStorage>(&self, s: &S) -> Result<(S, Shape)>
    where
        S::Device: BackendDevice<Storage = S>,
    {
        let shape = Shape::from(());
        let zero = s.device().zeros_impl(&shape, self.dtype)?;
        Ok((zero.affine(&Layout::contiguous(&shape), 1.0, self.value)?, shape))
    }
}

impl CustomOp1 for Settled {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }
    fn cpu_fwd(&self, s: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.scalar(s)
    }
    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.scalar(s)
    }
    fn metal_fwd(&self, s: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.scalar(s)
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        let upstream = upstream.detach();
        if upstream.device().is_cpu() && upstream.to_dtype(DType::F64)?.to_scalar::<f64>()? == 1.0 {
            return Ok(Some(self.grad.clone()));
        }
        self.grad.broadcast_mul(&upstream.to_dtype(self.grad.dtype())?).map(Some)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::philox::Stream;
    use crate::test_support::on_threads;
    use crate::testing::{check_gradients_with, close, randn};
    use candle_core::{Device, Var};

    const SHAPES: [(usize, usize); 9] =
        [(1, 1), (3, 2), (1, 7), (65, 7), (3, 16), (65, 33), (257, 33), (3, 1024), (5, 4099)];

    fn targets(n: usize, vocab: usize) -> Vec<u32> {
        let s = Stream { seed: 5, step: 0, site: 0 };
        (0..n as u64).map(|i| s.word(i) % vocab as u32).collect()
    }

    /// Per-row losses and `scale·(softmax − onehot)·cap'`, by the book in `f64`; hits with the first largest as argmax.
    fn reference(x: &Tensor, targets: &[u32], scale: f64, cap: Option<f64>) -> (Vec<f64>, Vec<Vec<f64>>, usize) {
        let (mut nll, mut grad, mut hits) = (vec![], vec![], 0);
        for (row, &t) in x.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap().iter().zip(targets) {
            let z: Vec<f64> = row.iter().map(|x| cap.map_or(*x, |c| c * (x / c).tanh())).collect();
            let m = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = z.iter().map(|z| (z - m).exp()).sum();
            nll.push(m + sum.ln() - z[t as usize]);
            hits += usize::from(z.iter().position(|z| *z == m) == Some(t as usize));
            grad.push(
                z.iter()
                    .enumerate()
                    .map(|(i, z)| {
                        let slope = cap.map_or(1.0, |c| 1.0 - (z / c).powi(2));
                        scale * slope * ((z - m).exp() / sum - f64::from(u8::from(i == t as usize)))
                    })
                    .collect(),
            );
        }
        (nll, grad, hits)
    }

    #[test]
    fn rows_follow_the_definition() {
        for (n, vocab) in SHAPES {
            for cap in [None, Some(3.0)] {
                let x = (randn(1, (n, vocab), 4.0).unwrap() + 20.0).unwrap();
                let x = if cap.is_some() { (x - 20.0).unwrap() } else { x };
                let t = targets(n, vocab);
                let (nll, grad, hits) = reference(&x, &t, 0.5, cap);
                let grad: Vec<f64> = grad.concat();
                let grad = Tensor::from_vec(grad, (n, vocab), &Device::Cpu).unwrap();
                for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::F64, 1e-6)] {
                    let x = x.to_dtype(dtype).unwrap();
                    let got = cross_entropy_rows(&x, &t, 0.5, cap, true).unwrap();
                    for (g, w) in got.nll.iter().zip(&nll) {
                        assert!((f64::from(*g) - w).abs() < tolerance * w.max(1.0), "{dtype:?} {n}×{vocab}: {g} {w}");
                    }
                    close("gradient", &got.grad.unwrap(), &grad, tolerance).unwrap();
                    assert_eq!(got.hits, hits);
                    let without = cross_entropy_rows(&x, &t, 0.5, cap, false).unwrap();
                    assert_eq!((without.nll, without.hits, without.grad.is_none()), (got.nll, hits, true));
                }
                for dtype in [DType::BF16, DType::F16] {
                    let x = x.to_dtype(dtype).unwrap();
                    let got = cross_entropy_rows(&x, &t, 0.5, cap, true).unwrap();
                    let (nll, grad, _) = reference(&x, &t, 0.5, cap);
                    assert!(got.nll.iter().zip(nll).all(|(g, w)| (f64::from(*g) - w).abs() < 1e-5 * w.max(1.0)));
                    let got = got.grad.unwrap();
                    assert_eq!(got.dtype(), dtype);
                    let grad = Tensor::from_vec(grad.concat(), (n, vocab), &Device::Cpu).unwrap();
                    close("gradient", &got, &grad, 4e-3).unwrap();
                }
            }
        }
    }

    #[test]
    fn ties_and_masked_logits() {
        let inf = f32::NEG_INFINITY;
        let mut wide = vec![inf; 3000];
        wide[2999] = -200.0;
        wide[100] = -200.0;
        let x = Tensor::from_vec(wide, (1, 3000), &Device::Cpu).unwrap();
        let at = |t: u32| cross_entropy_rows(&x, &[t], 1.0, None, true).unwrap();
        // Two equal logits, all others impossible; the first of equals is the argmax.
        assert!((at(100).nll[0] - std::f32::consts::LN_2).abs() < 1e-6);
        assert_eq!((at(100).hits, at(2999).hits), (1, 0));
        assert_eq!(at(5).nll[0], f32::INFINITY);
        let g = at(100).grad.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!((g[100], g[2999], g[0]), (-0.5, 0.5, 0.0));
    }

    #[test]
    fn nan_and_impossible_rows_show() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut v = vec![0f32; 2 * 2050];
            v[2050 + 1500] = bad;
            let x = Tensor::from_vec(v, (2, 2050), &Device::Cpu).unwrap();
            let got = cross_entropy_rows(&x, &[1, 1], 1.0, None, true).unwrap();
            assert!(got.nll[0].is_finite() && got.nll[1].is_nan(), "{bad}: {:?}", got.nll[1]);
            let g = got.grad.unwrap().to_vec2::<f32>().unwrap();
            assert!(g[0].iter().all(|v| v.is_finite()) && g[1].iter().all(|v| v.is_nan()));
        }
        let x = Tensor::full(f32::NEG_INFINITY, (1, 40), &Device::Cpu).unwrap();
        let got = cross_entropy_rows(&x, &[1], 1.0, None, true).unwrap();
        assert!(got.nll[0].is_nan() && got.grad.unwrap().to_vec2::<f32>().unwrap()[0][0].is_nan());
    }

    #[test]
    fn tracked_logits_get_their_gradient_times_upstream() {
        let t = targets(7, 33);
        let x = randn(1, (7, 33), 2.0).unwrap();
        for cap in [None, Some(5.0)] {
            let f = |a: &[Tensor]| cross_entropy(&a[0], &t, 0.25, cap)?.loss * 3.0;
            check_gradients_with(&[x.to_dtype(DType::F64).unwrap()], 1e-4, 1e-5, f).unwrap();
            check_gradients_with(std::slice::from_ref(&x), 1e-2, 2e-2, f).unwrap();
        }
        let before = x.to_vec2::<f32>().unwrap();
        let constant = cross_entropy(&x, &t, 0.25, None).unwrap();
        assert!(!constant.loss.track_op());
        assert_eq!(x.to_vec2::<f32>().unwrap(), before, "logits of the caller are left alone");
    }

    #[test]
    fn linear_is_the_same_in_any_chunks() {
        for (n, hidden, vocab) in [(1, 1, 2), (7, 5, 33), (65, 16, 1100), (257, 7, 40)] {
            let h = randn(1, (n, hidden), 1.0).unwrap();
            let w = randn(2, (vocab, hidden), 1.0).unwrap();
            let t = targets(n, vocab);
            for softcap in [None, Some(4.0)] {
                let run = |chunk_rows: usize, dtype: DType| {
                    let h = Var::from_tensor(&h.to_dtype(dtype).unwrap()).unwrap();
                    let spec = LossSpec { scale: 1.0 / n as f64, softcap, chunk_rows };
                    let w = w.to_dtype(dtype).unwrap();
                    let got = linear_cross_entropy(h.as_tensor(), &w, &t, &spec).unwrap();
                    let grads = got.loss.backward().unwrap();
                    assert!(grads.get(&w).is_none());
                    (got.loss.detach(), grads.get(h.as_tensor()).unwrap().clone(), got.hits)
                };
                let whole = run(n, DType::F64);
                for chunk in [1, 3, 64, 100_000] {
                    let got = run(chunk, DType::F32);
                    close("loss", &got.0, &whole.0, 3e-6).unwrap();
                    close("gradient", &got.1, &whole.1, 3e-6).unwrap();
                    assert_eq!(got.2, whole.2);
                }
                let logits = h.matmul(&w.t().unwrap()).unwrap();
                let nll: f64 = reference(&logits, &t, 1.0, softcap).0.iter().sum();
                let loss = whole.0.to_scalar::<f64>().unwrap();
                assert!((loss - nll / n as f64).abs() < 1e-5 * loss.max(1.0));
                let spec = LossSpec { scale: 1.0, softcap, chunk_rows: 3 };
                let args = [h.to_dtype(DType::F64).unwrap()];
                let wide = w.to_dtype(DType::F64).unwrap();
                check_gradients_with(&args, 1e-4, 1e-5, |a| Ok(linear_cross_entropy(&a[0], &wide, &t, &spec)?.loss))
                    .unwrap();
            }
        }
    }

    #[test]
    fn linear_over_a_frozen_weight_and_untracked() {
        let (h, w) = (randn(1, (9, 6), 1.0).unwrap(), randn(2, (40, 6), 1.0).unwrap());
        let t = targets(9, 40);
        let spec = LossSpec { scale: 1.0, softcap: None, chunk_rows: 4 };
        let frozen = crate::FrozenWeight::dense(&w).unwrap();
        let var = Var::from_tensor(&h).unwrap();
        let a = linear_cross_entropy(var.as_tensor(), &frozen, &t, &spec).unwrap();
        let b = linear_cross_entropy(var.as_tensor(), &w, &t, &spec).unwrap();
        close("loss", &a.loss, &b.loss, 1e-5).unwrap();
        let da = a.loss.backward().unwrap().get(var.as_tensor()).unwrap().clone();
        close("gradient", &da, b.loss.backward().unwrap().get(var.as_tensor()).unwrap(), 1e-5).unwrap();
        let plain = linear_cross_entropy(&h, &frozen, &t, &spec).unwrap();
        assert!(!plain.loss.track_op());
        assert_eq!((plain.nll, plain.hits), (a.nll, a.hits));
        let half = var.as_tensor().to_dtype(DType::BF16).unwrap();
        let half_w = w.to_dtype(DType::BF16).unwrap();
        let c = linear_cross_entropy(&half, &half_w, &t, &spec).unwrap();
        assert_eq!(c.loss.dtype(), DType::F32);
        close("bf16 loss", &c.loss, &a.loss, 2e-2).unwrap();
        close("bf16 gradient", c.loss.backward().unwrap().get(var.as_tensor()).unwrap(), &da, 5e-2).unwrap();
    }

    #[test]
    fn no_rows() {
        let h = Var::zeros((0, 6), DType::F32, &Device::Cpu).unwrap();
        let w = randn(2, (40, 6), 1.0).unwrap();
        let spec = LossSpec { scale: 1.0, softcap: None, chunk_rows: 4 };
        let got = linear_cross_entropy(h.as_tensor(), &w, &[], &spec).unwrap();
        assert_eq!((got.loss.to_scalar::<f32>().unwrap(), got.hits), (0.0, 0));
        assert_eq!(got.loss.backward().unwrap().get(h.as_tensor()).unwrap().dims(), [0, 6]);
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let x = randn(1, (33, 5001), 3.0).unwrap();
        let t = targets(33, 5001);
        let run = |threads| {
            on_threads(threads, || {
                let r = cross_entropy_rows(&x, &t, 0.1, None, true).unwrap();
                (r.nll, r.grad.unwrap().to_vec2::<f32>().unwrap())
            })
        };
        assert_eq!(run(1), run(2));
    }

    #[test]
    fn bad_input_is_named() {
        let x = randn(1, (3, 8), 1.0).unwrap();
        let say = |r: Result<CeRows>| r.unwrap_err().to_string();
        let e = say(cross_entropy_rows(&x, &[0, 8, 1], 1.0, None, true));
        assert!(e.contains("target 8") && e.contains("row 1") && e.contains("vocabulary of 8"), "{e}");
        assert!(say(cross_entropy_rows(&x, &[0], 1.0, None, true)).contains("1 targets for 3 rows"));
        assert!(say(cross_entropy_rows(&x, &[0; 3], 1.0, Some(0.0), true)).contains("softcap"));
        let spec = LossSpec { scale: 1.0, softcap: None, chunk_rows: 0 };
        assert!(linear_cross_entropy(&x, &x, &[0; 3], &spec).unwrap_err().to_string().contains("chunk_rows"));
        let spec = LossSpec { chunk_rows: 2, ..spec };
        let e = linear_cross_entropy(&x, &x, &[0, 1, 3], &spec).unwrap_err().to_string();
        assert!(e.contains("target 3") && e.contains("row 2"), "{e}");
    }
}
