//! The LoRA-adapted linear layer as one graph node of (x, A, B).
//!
//! `y = x·Wᵀ + b + s·drop(x)·Aᵀ·Bᵀ`; with `g = s·dy·B`:
//! `dx = dy·W + drop'(g·A)`, `dA = gᵀ·drop(x)`, `dB = s·dyᵀ·(drop(x)·Aᵀ)`, `dW` never.
//! The dropout mask is recomputed in the backward pass. Source: Hu et al., "LoRA", 2021; PEFT `tuners/lora/layer.py`.

use std::borrow::Cow;
use std::sync::OnceLock;

use candle_core::{DType, Result, Shape, Tensor};

use crate::cpu::{self, Mat, View};
use crate::diff_op::{self, DiffOp};
use crate::dropout;
use crate::frozen_gemm::{Addend, LowRankProduct};
use crate::linear::{matrix, with_bias};
use crate::philox::Stream;
use crate::tape::Keeps;
use crate::weight::FrozenWeight;

/// Dropout of one site in one step: the probability and where its mask comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability that an element is zeroed, in `[0, 1)`.
    pub p: f32,
    /// The mask's stream.
    pub stream: Stream,
}

/// `x·Wᵀ + bias + scale·B(A(dropout(x)))` for `x: [tokens, in]`, `a: [r, in]`, `b: [out, r]`.
///
/// The product with A and B is made in A's type (`f32` in training, as PEFT's autocast of adapters does) and added to
/// the frozen product in x's type.
///
/// # Errors
/// When shapes do not fit.
pub fn lora_linear(
    x: &Tensor,
    weight: &FrozenWeight,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    scale: f32,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    let (r, inp) = a.dims2()?;
    if b.dims() != [weight.out_features(), r] || inp != weight.in_features() {
        candle_core::bail!(
            "lora_linear: A {:?} and B {:?} do not fit a weight [{}, {}]",
            a.shape(),
            b.shape(),
            weight.out_features(),
            weight.in_features()
        );
    }
    let op = LoraLinear {
        base: Some((weight.clone(), bias.map(Tensor::detach))),
        scale,
        dropout: dropout.filter(|d| d.p > 0.0),
        xa: OnceLock::new(),
    };
    diff_op::apply(op, &[x, a, b])
}

/// `scale·B(A(dropout(x)))` alone, without the frozen product.
///
/// # Errors
/// When shapes do not fit.
pub fn lora_delta(x: &Tensor, a: &Tensor, b: &Tensor, scale: f32, dropout: Option<Dropout>) -> Result<Tensor> {
    let dropout = dropout.filter(|d| d.p > 0.0);
    diff_op::apply(LoraLinear { base: None, scale, dropout, xa: OnceLock::new() }, &[x, a, b])
}

/// `dB = scale·dyᵀ·xa` for `xa = drop(x)·Aᵀ: [tokens, r]` and `dy: [tokens, out]`. Its transpose is made first: that reads
/// dy along its rows.
pub(crate) fn b_gradient(xa: Mat<'_>, dy: Mat<'_>, scale: f32) -> Result<Tensor> {
    let (rank, out) = (xa.cols(), dy.cols());
    let transposed = cpu::gemm(xa.t(), dy, scale)?;
    cpu::tensor(cpu::transposed(&transposed, rank, out), (out, rank))
}

struct LoraLinear {
    base: Option<(FrozenWeight, Option<Tensor>)>,
    scale: f32,
    dropout: Option<Dropout>,
    /// `drop(x)·Aᵀ`, `[tokens, r]`: kept from the CPU's forward pass, since it is small and dB needs it.
    xa: OnceLock<Vec<f32>>,
}

impl LoraLinear {
    fn dropped<'a>(&self, x: &'a [f32]) -> Result<Cow<'a, [f32]>> {
        let Some(d) = self.dropout else { return Ok(x.into()) };
        let mut x = x.to_vec();
        dropout::apply_in_place(&mut x, d.p, d.stream)?;
        Ok(x.into())
    }

    fn dropped_tensor(&self, x: &Tensor) -> Result<Tensor> {
        match self.dropout {
            Some(d) => dropout::dropout(x, d.p, d.stream),
            None => Ok(x.clone()),
        }
    }

    /// `drop(x)·Aᵀ`, `[tokens, r]`.
    fn shrunk(&self, x: &[f32], tokens: usize, a: Mat<'_>) -> Result<Vec<f32>> {
        cpu::gemm(Mat::new(&self.dropped(x)?, tokens, a.cols()), a.t(), 1.0)
    }

    fn backward_cpu(&self, args: &[Tensor], grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let (tokens, inp) = args[0].dims2()?;
        let (out, r) = args[2].dims2()?;
        cpu::with(&args[0], |x| {
            cpu::with(&args[1], |a| {
                cpu::with(&args[2], |b| {
                    cpu::with(grad, |dy| {
                        let dy = Mat::new(dy.data, tokens, out);
                        let (a, b) = (Mat::new(a.data, r, inp), Mat::new(b.data, out, r));
                        let db = if needs[2] {
                            let xa = match self.xa.get() {
                                Some(xa) => Cow::from(xa),
                                None => self.shrunk(x.data, tokens, a)?.into(),
                            };
                            Some(b_gradient(Mat::new(&xa, tokens, r), dy, self.scale)?)
                        } else {
                            None
                        };
                        let g = cpu::gemm(dy, b, self.scale)?;
                        let g = Mat::new(&g, tokens, r);
                        let da = if needs[1] {
                            let dropped = self.dropped(x.data)?;
                            Some(cpu::gemm(g.t(), Mat::new(&dropped, tokens, inp), 1.0)?)
                        } else {
                            None
                        };
                        let dx = if needs[0] { Some(self.input_gradient(grad, g, a, tokens)?) } else { None };
                        Ok(vec![
                            dx.map(|d| cpu::tensor(d, (tokens, inp))).transpose()?,
                            da.map(|d| cpu::tensor(d, (r, inp))).transpose()?,
                            db,
                        ])
                    })
                })
            })
        })
    }

    fn input_gradient(&self, grad: &Tensor, g: Mat<'_>, a: Mat<'_>, tokens: usize) -> Result<Vec<f32>> {
        let low_rank = LowRankProduct { x: g, w: a, scale: 1.0 };
        match (&self.base, self.dropout) {
            (Some((w, _)), None) => {
                let addend = Addend { low_rank: Some(low_rank), bias: None };
                cpu::with(grad, |dy| w.matmul_cpu(dy.data, tokens, addend))
            }
            (base, dropout) => {
                let mut dx = low_rank.product()?;
                if let Some(d) = dropout {
                    dropout::apply_in_place(&mut dx, d.p, d.stream)?;
                }
                if let Some((w, _)) = base {
                    cpu::with(grad, |dy| w.add_matmul_cpu(dy.data, tokens, &mut dx))?;
                }
                Ok(dx)
            }
        }
    }
}

impl DiffOp for LoraLinear {
    const NAME: &'static str = "lora_linear";
    const KEEPS: Keeps = Keeps::Arguments;
    const REMEMBERS: bool = true;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let ((r, inp), (out, rank)) = (args[1].shape.dims2()?, args[2].shape.dims2()?);
        if r != rank {
            candle_core::bail!("lora_linear: A has rank {r} and B has rank {rank}");
        }
        let tokens = matrix(args[0].shape, inp, Self::NAME)?;
        let xa = self.shrunk(args[0].data, tokens, Mat::new(args[1].data, r, inp))?;
        let (x, w) = (Mat::new(&xa, tokens, r), Mat::new(args[2].data, out, r).t());
        let low_rank = LowRankProduct { x, w, scale: self.scale };
        let y = match &self.base {
            None => low_rank.product()?,
            Some((weight, bias)) => with_bias(bias.as_ref(), |bias| {
                weight.matmul_t_cpu(args[0].data, tokens, Addend { low_rank: Some(low_rank), bias })
            })?,
        };
        let _ = self.xa.set(xa);
        Ok((y, Shape::from((tokens, out))))
    }

    fn remember(&self, args: &[Tensor]) -> Result<()> {
        if !args.iter().all(diff_op::is_cpu_f32) {
            return Ok(());
        }
        let ((tokens, _), (r, inp)) = (args[0].dims2()?, args[1].dims2()?);
        let xa =
            cpu::with(&args[0], |x| cpu::with(&args[1], |a| self.shrunk(x.data, tokens, Mat::new(a.data, r, inp))))?;
        let _ = self.xa.set(xa);
        Ok(())
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let (x, a, b) = (&args[0], &args[1], &args[2]);
        let dropped = self.dropped_tensor(x)?.to_dtype(a.dtype())?;
        let delta = (dropped.matmul(&a.t()?)?.matmul(&b.t()?)? * f64::from(self.scale))?.to_dtype(x.dtype())?;
        let Some((weight, bias)) = &self.base else { return Ok(delta) };
        let y = (weight.matmul_t(x)? + delta)?;
        match bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?),
            None => Ok(y),
        }
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        if args.iter().all(diff_op::is_cpu_f32) {
            return self.backward_cpu(args, grad, needs);
        }
        let (x, a, b) = (&args[0], &args[1], &args[2]);
        let dy = grad.to_dtype(a.dtype())?;
        let dropped = self.dropped_tensor(x)?.to_dtype(a.dtype())?;
        let g = (dy.matmul(b)? * f64::from(self.scale))?;
        let dx = if needs[0] {
            let through = self.dropped_tensor(&g.matmul(a)?)?.to_dtype(DType::F32)?;
            let dx = match &self.base {
                Some((w, _)) => (w.matmul(grad)?.to_dtype(DType::F32)? + through)?,
                None => through,
            };
            Some(dx.to_dtype(x.dtype())?)
        } else {
            None
        };
        let da = needs[1].then(|| g.t()?.matmul(&dropped)).transpose()?;
        let db = needs[2].then(|| dy.t()?.matmul(&dropped.matmul(&a.t()?)?)? * f64::from(self.scale)).transpose()?;
        Ok(vec![dx, da, db])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::{check_gradients, close, randn};

    fn parts(tokens: usize, inp: usize, out: usize, r: usize) -> (Tensor, FrozenWeight, Tensor, Tensor, Tensor) {
        let w = FrozenWeight::dense(&randn(1, (out, inp), 0.3).unwrap()).unwrap();
        let bias = randn(5, out, 0.3).unwrap();
        (
            randn(2, (tokens, inp), 1.0).unwrap(),
            w,
            bias,
            randn(3, (r, inp), 0.3).unwrap(),
            randn(4, (out, r), 0.3).unwrap(),
        )
    }

    #[test]
    fn forward_and_gradients_with_and_without_dropout() {
        for (tokens, inp, out, r) in [(1, 1, 1, 1), (5, 7, 3, 2), (33, 20, 48, 4)] {
            let (x, w, bias, a, b) = parts(tokens, inp, out, r);
            for dropout in [None, Some(Dropout { p: 0.4, stream: Stream { seed: 1, step: 2, site: 3 } })] {
                let dropped = match dropout {
                    Some(d) => dropout::dropout(&x, d.p, d.stream).unwrap(),
                    None => x.clone(),
                };
                let delta = dropped.matmul(&a.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap();
                let base = w.matmul_t(&x).unwrap().broadcast_add(&bias).unwrap();
                let reference = (base + (delta.clone() * 1.5).unwrap()).unwrap();
                let y = lora_linear(&x, &w, Some(&bias), &a, &b, 1.5, dropout).unwrap();
                close("lora", &y, &reference, 1e-5).unwrap();
                let alone = lora_delta(&x, &a, &b, 1.5, dropout).unwrap();
                close("delta", &alone, &(delta * 1.5).unwrap(), 1e-5).unwrap();
                let args = [x.clone(), a.clone(), b.clone()];
                check_gradients(&args, |t| lora_linear(&t[0], &w, Some(&bias), &t[1], &t[2], 1.5, dropout)).unwrap();
                check_gradients(&args, |t| lora_delta(&t[0], &t[1], &t[2], 1.5, dropout)).unwrap();
            }
        }
    }

    #[test]
    fn fused_and_neutral_backward_agree() {
        let (x, w, bias, a, b) = parts(9, 12, 10, 3);
        let dropout = Some(Dropout { p: 0.3, stream: Stream { seed: 1, step: 2, site: 3 } });
        let op = LoraLinear { base: Some((w, Some(bias))), scale: 0.7, dropout, xa: OnceLock::new() };
        let args = [x, a, b];
        let dy = randn(9, (9, 10), 1.0).unwrap();
        let fused = op.backward_cpu(&args, &dy, &[true; 3]).unwrap();
        let half: Vec<Tensor> =
            std::iter::once(args[0].to_dtype(DType::F16).unwrap()).chain(args[1..].iter().cloned()).collect();
        let neutral = op.backward(&half, &dy, &dy.to_dtype(DType::F16).unwrap(), &[true; 3]).unwrap();
        for (i, (f, n)) in fused.iter().zip(&neutral).enumerate() {
            close(&format!("gradient {i}"), n.as_ref().unwrap(), f.as_ref().unwrap(), 2e-2).unwrap();
        }
        let none = op.backward(&args, &dy, &dy, &[false, true, false]).unwrap();
        assert!(none[0].is_none() && none[1].is_some() && none[2].is_none());
    }
}
