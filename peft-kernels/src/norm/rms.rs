//! RMSNorm (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019), as transformers' `LlamaRMSNorm` and
//! `GemmaRMSNorm` calculate it.

use candle_core::{D, Result, Shape, Tensor};

use crate::cpu::{self, View, new_rows};
use crate::diff_op::{DiffOp, apply, is_cpu_f32};
use crate::reduce::{beside, check_vector, column_sum, row_blocks_with_sums, wide};
use crate::simd;
use crate::tape::Keeps;

/// `x / √(mean(x²) + eps) ⊙ (offset + weight)` over the rows of `x` (`[tokens, hidden]`), `weight` `[hidden]`. Where rows are
/// several times as long as the weight, over each such part of a row by itself: the heads of queries and keys.
///
/// `offset` is 1 for Gemma, whose weights are stored as their distance from one, and 0 elsewhere. Calculated in `f32`
/// whatever the type of `x`; the result has the type of `x`. As in transformers, without an offset the normalised value
/// is rounded to that type before it meets the weight. A gradient for `weight` is calculated only if it is tracked.
///
/// # Errors
/// When `weight` is not a vector as long as the rows of `x`, or as a part of which they hold a whole number.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, offset: f32) -> Result<Tensor> {
    match (x.dims(), weight.dims()) {
        ([.., row], [part]) if *part > 0 && row.is_multiple_of(*part) => {}
        _ => check_vector("rms_norm", "the weight", x, weight)?,
    }
    apply(RmsNorm { eps, offset }, &[x, &beside(x, weight)?])
}

struct RmsNorm {
    eps: f64,
    offset: f32,
}

impl RmsNorm {
    /// 1/rms of one row.
    #[inline(always)]
    fn rstd(&self, row: &[f32]) -> f32 {
        1.0 / (simd::sum1(row, |v| v * v) / row.len() as f32 + self.eps as f32).sqrt()
    }

    /// `x` with a row for each part that is normalised by itself.
    fn parts(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        x.reshape(((), weight.elem_count()))
    }

    fn neutral_rstd(&self, x: &Tensor) -> Result<Tensor> {
        (x.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?.recip()
    }

    fn fused_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        grad: &Tensor,
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let (want_x, want_w) = (needs[0], needs[1]);
        let (dx, dw) = cpu::with(x, |x| {
            cpu::with(weight, |w| {
                cpu::with(grad, |dy| {
                    let width = w.data.len();
                    let rows = x.data.len().checked_div(width).unwrap_or(0);
                    let mut dx = vec![0f32; if want_x { x.data.len() } else { 0 }];
                    let (w, offset) = (w.data, self.offset);
                    let sums = if want_w { width } else { 0 };
                    let dw = row_blocks_with_sums(rows, width, &mut dx, sums, |range, dx, dw| {
                        simd::run(
                            #[inline(always)]
                            || {
                                let mut outs = dx.chunks_exact_mut(width);
                                for r in range {
                                    let x = &x.data[r * width..][..width];
                                    let dy = &dy.data[r * width..][..width];
                                    let rstd = self.rstd(x);
                                    if let Some(dx) = outs.next() {
                                        let dot = simd::sum3(x, dy, w, |x, d, w| x * (d * (w + offset)));
                                        let c = dot * rstd * rstd / width as f32;
                                        for (((o, &x), &d), &w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
                                            *o = rstd * (d * (w + offset) - x * c);
                                        }
                                    }
                                    for ((s, &x), &d) in dw.iter_mut().zip(x).zip(dy) {
                                        *s += d * (x * rstd);
                                    }
                                }
                            },
                        );
                    });
                    Ok((dx, dw))
                })
            })
        })?;
        let dx = if want_x { Some(cpu::tensor(dx, x.shape())?) } else { None };
        let dw = if want_w { Some(cpu::tensor(dw, weight.shape())?) } else { None };
        Ok(vec![dx, dw])
    }
}

#[cfg(feature = "cuda")]
impl RmsNorm {
    fn on_card(&self) -> crate::cuda::norm::Kind {
        crate::cuda::norm::Kind { centred: false, eps: self.eps, offset: self.offset }
    }
}

impl DiffOp for RmsNorm {
    const NAME: &'static str = "rms_norm";
    const KEEPS: Keeps = Keeps::Arguments;
    const CHEAP: bool = true;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let (x, w) = (args[0], args[1].data);
        let width = w.len();
        let out = new_rows(x.data.len(), width, width, |first, rows| {
            simd::run(
                #[inline(always)]
                || {
                    for (i, out) in rows.chunks_exact_mut(width).enumerate() {
                        let x = &x.data[(first + i) * width..][..width];
                        let rstd = self.rstd(x);
                        for ((o, &x), &w) in out.iter_mut().zip(x).zip(w) {
                            *o = (x * rstd) * (w + self.offset);
                        }
                    }
                },
            );
        });
        Ok((out, x.shape.clone()))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let (whole, w) = (&args[0], &args[1]);
        let x = &Self::parts(whole, w)?;
        let wx = wide(x)?;
        let y = wx.broadcast_mul(&self.neutral_rstd(&wx)?)?;
        if self.offset == 0.0 {
            return y.to_dtype(x.dtype())?.broadcast_mul(&w.to_dtype(x.dtype())?)?.reshape(whole.shape());
        }
        let w = (w.to_dtype(y.dtype())? + f64::from(self.offset))?;
        y.broadcast_mul(&w)?.to_dtype(x.dtype())?.reshape(whole.shape())
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, args: &[crate::cuda::View<'_>]) -> Result<Option<crate::cuda::Made>> {
        self.on_card().forward(args)
    }

    #[cfg(feature = "cuda")]
    fn cuda_backward(
        &self,
        args: &[Tensor],
        _: &Tensor,
        grad: &Tensor,
        needs: &[bool],
    ) -> Result<Option<Vec<Option<Tensor>>>> {
        self.on_card().backward(args, grad, needs)
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let (x, w) = (&args[0], &args[1]);
        if is_cpu_f32(x) && is_cpu_f32(w) && is_cpu_f32(grad) {
            return self.fused_backward(x, w, grad, needs);
        }
        let (wx, dy) = (wide(&Self::parts(x, w)?)?, wide(&Self::parts(grad, w)?)?);
        let rstd = self.neutral_rstd(&wx)?;
        let normed = wx.broadcast_mul(&rstd)?;
        let dx = if needs[0] {
            let g = dy.broadcast_mul(&(w.to_dtype(dy.dtype())? + f64::from(self.offset))?)?;
            let mean = (&g * &normed)?.mean_keepdim(D::Minus1)?;
            let dx = (g - normed.broadcast_mul(&mean)?)?.broadcast_mul(&rstd)?;
            Some(dx.to_dtype(x.dtype())?.reshape(x.shape())?)
        } else {
            None
        };
        let dw = if needs[1] { Some(column_sum(&(dy * normed)?)?.to_dtype(w.dtype())?) } else { None };
        Ok(vec![dx, dw])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::test_support::{Check, SHAPES, backward};
    use crate::testing::{close, randn};
    use candle_core::Var;

    #[test]
    fn forms_agree_forward_and_backward() {
        for (i, (rows, width)) in SHAPES.into_iter().enumerate() {
            for offset in [0.0, 1.0] {
                let x = randn(i as u64, (rows, width), 1.5).unwrap();
                let w = randn(50 + i as u64, width, 0.7).unwrap();
                Check::new("rms_norm").run(&[x, w], |a| rms_norm(&a[0], &a[1], 1e-5, offset)).unwrap();
            }
        }
    }

    #[test]
    fn follows_the_definition() {
        let x = randn(1, (5, 33), 2.0).unwrap();
        let w = randn(2, 33, 1.0).unwrap();
        let mut want = Vec::new();
        for row in x.to_vec2::<f32>().unwrap() {
            let ms = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 33.0;
            let w = w.to_vec1::<f32>().unwrap();
            want.extend(row.iter().zip(w).map(|(v, w)| f64::from(*v) / (ms + 0.1).sqrt() * (1.0 + f64::from(w))));
        }
        let want = Tensor::from_vec(want, (5, 33), x.device()).unwrap();
        let got = rms_norm(&x, &w, 0.1, 1.0).unwrap();
        close("rms_norm", &got.to_dtype(candle_core::DType::F64).unwrap(), &want, 1e-6).unwrap();
    }

    #[test]
    fn heads_are_normalised_one_by_one() {
        let (x, w) = (randn(1, (5, 3 * 7), 1.5).unwrap(), randn(2, 7, 0.7).unwrap());
        for offset in [0.0, 1.0] {
            Check::new("rms_norm of heads")
                .run(&[x.clone(), w.clone()], |a| rms_norm(&a[0], &a[1], 1e-5, offset))
                .unwrap();
            let apart = rms_norm(&x.reshape((15, 7)).unwrap(), &w, 1e-5, offset).unwrap();
            let together = rms_norm(&x, &w, 1e-5, offset).unwrap();
            close("heads", &together, &apart.reshape((5, 21)).unwrap(), 0.0).unwrap();
        }
    }

    #[test]
    fn frozen_weight_gets_no_gradient() {
        let x = Var::from_tensor(&randn(1, (3, 8), 1.0).unwrap()).unwrap();
        let w = randn(2, 8, 1.0).unwrap();
        let grads = backward(&rms_norm(x.as_tensor(), &w, 1e-6, 0.0).unwrap()).unwrap();
        assert!(grads.get(x.as_tensor()).is_some());
        assert!(grads.get(&w).is_none());
        // The other way round: only the weight is trained.
        let (x, w) = (x.as_tensor().detach(), Var::from_tensor(&w).unwrap());
        let grads = backward(&rms_norm(&x, w.as_tensor(), 1e-6, 0.0).unwrap()).unwrap();
        assert!(grads.get(&x).is_none());
        assert!(grads.get(w.as_tensor()).is_some());
    }

    #[test]
    fn shapes_that_do_not_fit() {
        let x = randn(1, (3, 8), 1.0).unwrap();
        let e = rms_norm(&x, &randn(2, 7, 1.0).unwrap(), 1e-6, 0.0).unwrap_err().to_string();
        assert!(e.contains("[7]") && e.contains("[8]"), "{e}");
        assert!(rms_norm(&randn(1, (), 1.0).unwrap(), &x, 1e-6, 0.0).is_err());
        assert!(rms_norm(&x, &Tensor::zeros(0, candle_core::DType::F32, x.device()).unwrap(), 1e-6, 0.0).is_err());
        let empty = Tensor::zeros((0, 8), candle_core::DType::F32, x.device()).unwrap();
        assert_eq!(rms_norm(&empty, &randn(2, 8, 1.0).unwrap(), 1e-6, 0.0).unwrap().dims(), [0, 8]);
    }
}
