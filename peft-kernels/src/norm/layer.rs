//! LayerNorm (Ba, Kiros & Hinton, "Layer Normalization", 2016).

use candle_core::{D, Result, Shape, Tensor};

use crate::cpu::{self, View, new_rows};
use crate::diff_op::{DiffOp, apply, is_cpu_f32};
use crate::reduce::{beside, check_vector, column_sum, row_blocks_with_sums, wide};
use crate::simd;
use crate::tape::Keeps;

/// `(x − mean) / √(var + eps) ⊙ weight + bias` over the last dimension of `x` (`[tokens, hidden]`); `weight` and `bias`
/// are `[hidden]`.
///
/// Calculated in `f32` whatever the type of `x`, rounded once to it. Gradients for `weight` and `bias` are calculated
/// only where they are tracked.
///
/// # Errors
/// When `weight` or `bias` is not a vector as long as the rows of `x`.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    check_vector("layer_norm", "the weight", x, weight)?;
    let weight = beside(x, weight)?;
    let Some(bias) = bias else { return apply(LayerNorm { eps }, &[x, &weight]) };
    check_vector("layer_norm", "the bias", x, bias)?;
    apply(LayerNorm { eps }, &[x, &weight, &beside(x, bias)?])
}

struct LayerNorm {
    eps: f64,
}

impl LayerNorm {
    /// Mean and 1/√(variance + eps) of one row.
    #[inline(always)]
    fn moments(&self, row: &[f32]) -> (f32, f32) {
        let n = row.len() as f32;
        let mean = simd::sum1(row, |v| v) / n;
        let var = simd::sum1(row, |v| (v - mean) * (v - mean)) / n;
        (mean, 1.0 / (var + self.eps as f32).sqrt())
    }

    /// The normalised rows and 1/√(variance + eps).
    fn neutral_parts(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let rstd = (centred.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?.recip()?;
        Ok((centred.broadcast_mul(&rstd)?, rstd))
    }

    fn fused_backward(&self, x: &Tensor, w: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let want_x = needs[0];
        let want_w = needs[1];
        let want_b = needs.get(2) == Some(&true);
        let (width, dx, sums) = cpu::with(x, |x| {
            cpu::with(w, |w| {
                cpu::with(grad, |dy| {
                    let (rows, width) = x.rows()?;
                    let w = w.data;
                    let mut dx = vec![0f32; if want_x { x.data.len() } else { 0 }];
                    let w_len = if want_w { width } else { 0 };
                    let b_len = if want_b { width } else { 0 };
                    let sums = row_blocks_with_sums(rows, width, &mut dx, w_len + b_len, |range, dx, sums| {
                        simd::run(
                            #[inline(always)]
                            || {
                                let (dw, db) = sums.split_at_mut(w_len);
                                let mut outs = dx.chunks_exact_mut(width);
                                for r in range {
                                    let x = &x.data[r * width..][..width];
                                    let dy = &dy.data[r * width..][..width];
                                    let (mean, rstd) = self.moments(x);
                                    if let Some(dx) = outs.next() {
                                        let n = width as f32;
                                        let g = simd::sum2(dy, w, |d, w| d * w) / n;
                                        let c = simd::sum3(x, dy, w, |x, d, w| (x - mean) * (d * w)) * rstd * rstd / n;
                                        for (((o, &x), &d), &w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
                                            *o = rstd * (d * w - g - (x - mean) * c);
                                        }
                                    }
                                    for ((s, &x), &d) in dw.iter_mut().zip(x).zip(dy) {
                                        *s += d * ((x - mean) * rstd);
                                    }
                                    for (s, &d) in db.iter_mut().zip(dy) {
                                        *s += d;
                                    }
                                }
                            },
                        );
                    });
                    Ok((width, dx, sums))
                })
            })
        })?;
        let dx = if want_x { Some(cpu::tensor(dx, x.shape())?) } else { None };
        let (dw, db) = sums.split_at(if want_w { width } else { 0 });
        let vector = |wanted: bool, v: &[f32]| wanted.then(|| cpu::tensor(v.to_vec(), width)).transpose();
        let mut grads = vec![dx, vector(want_w, dw)?];
        if needs.len() == 3 {
            grads.push(vector(want_b, db)?);
        }
        Ok(grads)
    }
}

#[cfg(feature = "cuda")]
impl LayerNorm {
    fn on_card(&self) -> crate::cuda::norm::Kind {
        crate::cuda::norm::Kind { centred: true, eps: self.eps, offset: 0.0 }
    }
}

impl DiffOp for LayerNorm {
    const NAME: &'static str = "layer_norm";
    const KEEPS: Keeps = Keeps::Arguments;
    const CHEAP: bool = true;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let (x, w) = (args[0], args[1].data);
        let bias = args.get(2).map(|b| b.data);
        let (_, width) = x.rows()?;
        let out = new_rows(x.data.len(), width, width, |first, rows| {
            simd::run(
                #[inline(always)]
                || {
                    for (i, out) in rows.chunks_exact_mut(width).enumerate() {
                        let x = &x.data[(first + i) * width..][..width];
                        let (mean, rstd) = self.moments(x);
                        for ((o, &x), &w) in out.iter_mut().zip(x).zip(w) {
                            *o = ((x - mean) * rstd) * w;
                        }
                        if let Some(b) = bias {
                            out.iter_mut().zip(b).for_each(|(o, &b)| *o += b);
                        }
                    }
                },
            );
        });
        Ok((out, x.shape.clone()))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let x = wide(&args[0])?;
        let y = self.neutral_parts(&x)?.0.broadcast_mul(&args[1].to_dtype(x.dtype())?)?;
        let y = match args.get(2) {
            Some(b) => y.broadcast_add(&b.to_dtype(x.dtype())?)?,
            None => y,
        };
        y.to_dtype(args[0].dtype())
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
        let dy = wide(grad)?;
        let (normed, rstd) = self.neutral_parts(&wide(x)?)?;
        let dx = if needs[0] {
            let g = dy.broadcast_mul(&w.to_dtype(dy.dtype())?)?;
            let along = normed.broadcast_mul(&(&g * &normed)?.mean_keepdim(D::Minus1)?)?;
            let dx = (g.broadcast_sub(&g.mean_keepdim(D::Minus1)?)? - along)?.broadcast_mul(&rstd)?;
            Some(dx.to_dtype(x.dtype())?)
        } else {
            None
        };
        let dw = if needs[1] { Some(column_sum(&(&dy * normed)?)?.to_dtype(w.dtype())?) } else { None };
        let mut grads = vec![dx, dw];
        if let Some(b) = args.get(2) {
            grads.push(if needs[2] { Some(column_sum(&dy)?.to_dtype(b.dtype())?) } else { None });
        }
        Ok(grads)
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
            let x = (randn(i as u64, (rows, width), 1.5).unwrap() + 0.5).unwrap();
            let w = randn(50 + i as u64, width, 0.7).unwrap();
            let b = randn(90 + i as u64, width, 0.7).unwrap();
            // At width 1 the variance is zero and 1/√eps multiplies all rounding.
            let eps = if width == 1 { 0.5 } else { 1e-5 };
            let three = [x.clone(), w.clone(), b];
            Check::new("layer_norm").run(&three, |a| layer_norm(&a[0], &a[1], Some(&a[2]), eps)).unwrap();
            Check::new("layer_norm").run(&[x, w], |a| layer_norm(&a[0], &a[1], None, eps)).unwrap();
        }
    }

    #[test]
    fn follows_the_definition() {
        let x = (randn(1, (4, 17), 2.0).unwrap() + 30.0).unwrap();
        let (w, b) = (randn(2, 17, 1.0).unwrap(), randn(3, 17, 1.0).unwrap());
        let (wv, bv) = (w.to_vec1::<f32>().unwrap(), b.to_vec1::<f32>().unwrap());
        let mut want = Vec::new();
        for row in x.to_vec2::<f32>().unwrap() {
            let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / 17.0;
            let var = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / 17.0;
            want.extend(row.iter().zip(wv.iter().zip(&bv)).map(|(v, (w, b))| {
                ((f64::from(*v) - mean) / (var + 1e-5).sqrt() * f64::from(*w) + f64::from(*b)) as f32
            }));
        }
        let want = Tensor::from_vec(want, (4, 17), x.device()).unwrap();
        close("layer_norm", &layer_norm(&x, &w, Some(&b), 1e-5).unwrap(), &want, 3e-6).unwrap();
    }

    #[test]
    fn only_tracked_arguments_get_gradients() {
        let x = randn(1, (3, 8), 1.0).unwrap();
        let w = randn(2, 8, 1.0).unwrap();
        let b = Var::from_tensor(&randn(3, 8, 1.0).unwrap()).unwrap();
        let grads = backward(&layer_norm(&x, &w, Some(b.as_tensor()), 1e-5).unwrap()).unwrap();
        assert!(grads.get(&x).is_none() && grads.get(&w).is_none());
        assert!(grads.get(b.as_tensor()).is_some());
    }

    #[test]
    fn shapes_that_do_not_fit() {
        let x = randn(1, (3, 8), 1.0).unwrap();
        let w = randn(2, 8, 1.0).unwrap();
        let e = layer_norm(&x, &w, Some(&randn(2, 9, 1.0).unwrap()), 1e-6).unwrap_err().to_string();
        assert!(e.contains("the bias") && e.contains("[9]"), "{e}");
    }
}
