//! One kernel for a batch that mixes adapters and methods.
//!
//! Each run of tokens has its own `y = g ⊙ (W(l ⊙ x) + B(Ax)) + b + β`; the product with `W` is made once for all.

use std::ops::Range;

use candle_core::{DType, Result, Tensor};

use crate::cpu::{self, Mat};
use crate::diff_op::is_cpu_f32;
use crate::frozen_gemm::Addend;
use crate::linear::with_bias;
use crate::weight::FrozenWeight;

/// What an adapter is at one linear site when it serves: LoRA, rsLoRA, DoRA, VeRA, IA³ and the like all fit. Absent
/// parts are the identity. Tensors are untracked.
#[derive(Debug, Clone, Default)]
pub struct ServingForm {
    /// `l: [in]`, applied to the input of the frozen product.
    pub scale_input: Option<Tensor>,
    /// `(A: [r, in], B: [out, r])` with the scale folded into B.
    pub low_rank: Option<(Tensor, Tensor)>,
    /// `g: [out]`, applied to the sum of both products, before any bias.
    pub scale_output: Option<Tensor>,
    /// `β: [out]`, added to the base's bias.
    pub shift: Option<Tensor>,
}

/// A run of tokens and the form it goes through.
#[derive(Debug, Clone)]
pub struct RoutedSpan<'a> {
    /// Which rows of the input.
    pub tokens: Range<usize>,
    /// Their adapter.
    pub form: &'a ServingForm,
}

/// `[tokens, in]` to `[tokens, out]`, each of the disjoint `spans` through its own form, all other rows through the
/// base alone. Untracked.
///
/// # Errors
/// When a span reaches past the input or a form does not fit the weight.
pub fn routed_linear(
    x: &Tensor,
    weight: &FrozenWeight,
    bias: Option<&Tensor>,
    spans: &[RoutedSpan<'_>],
) -> Result<Tensor> {
    let (tokens, inp) = x.dims2()?;
    let out = weight.out_features();
    for span in spans {
        if span.tokens.end > tokens {
            candle_core::bail!("routed_linear: a run of tokens {:?} in a batch of {tokens}", span.tokens);
        }
        check_form(span.form, inp, out)?;
    }
    if !is_cpu_f32(x) {
        return routed_neutral(x, weight, bias, spans);
    }
    let x = x.detach().contiguous()?;
    let scaled = scale_inputs(&x, spans)?;
    let y = cpu::with(&x, |x| {
        let mut y = weight.matmul_t_cpu(scaled.as_deref().unwrap_or(x.data), tokens, Addend::default())?;
        for span in spans {
            let (start, n) = (span.tokens.start, span.tokens.len());
            let rows = &mut y[start * out..(start + n) * out];
            if let Some((a, b)) = &span.form.low_rank {
                add_low_rank(rows, &x.data[start * inp..(start + n) * inp], n, a, b)?;
            }
            if let Some(g) = &span.form.scale_output {
                on_columns(rows, g, |y, g| *y *= g)?;
            }
            if let Some(shift) = &span.form.shift {
                on_columns(rows, shift, |y, s| *y += s)?;
            }
        }
        with_bias(bias, |bias| {
            Addend { low_rank: None, bias }.add_bias(&mut y);
            Ok(y)
        })
    })?;
    cpu::tensor(y, (tokens, out))
}

fn check_form(form: &ServingForm, inp: usize, out: usize) -> Result<()> {
    let fits = |t: &Option<Tensor>, n: usize| t.as_ref().is_none_or(|t| t.dims() == [n]);
    let low_rank = form
        .low_rank
        .as_ref()
        .is_none_or(|(a, b)| matches!((a.dims(), b.dims()), ([r, i], [o, s]) if r == s && *i == inp && *o == out));
    if low_rank && fits(&form.scale_input, inp) && fits(&form.scale_output, out) && fits(&form.shift, out) {
        return Ok(());
    }
    candle_core::bail!("routed_linear: an adapter's tensors do not fit a weight [{out}, {inp}]")
}

fn scale_inputs(x: &Tensor, spans: &[RoutedSpan<'_>]) -> Result<Option<Vec<f32>>> {
    if spans.iter().all(|s| s.form.scale_input.is_none()) {
        return Ok(None);
    }
    let inp = x.dim(1)?;
    let mut scaled = cpu::with(x, |x| Ok(x.data.to_vec()))?;
    for span in spans {
        if let Some(l) = &span.form.scale_input {
            on_columns(&mut scaled[span.tokens.start * inp..span.tokens.end * inp], l, |x, l| *x *= l)?;
        }
    }
    Ok(Some(scaled))
}

fn on_columns(rows: &mut [f32], vector: &Tensor, f: impl Fn(&mut f32, f32) + Sync + Send) -> Result<()> {
    let vector = vector.to_dtype(DType::F32)?.contiguous()?;
    cpu::with(&vector, |v| {
        let width = v.data.len();
        cpu::for_row_blocks(rows, width, width, |_, rows| {
            for row in rows.chunks_mut(width) {
                row.iter_mut().zip(v.data).for_each(|(x, v)| f(x, *v));
            }
        });
        Ok(())
    })
}

fn add_low_rank(y: &mut [f32], x: &[f32], tokens: usize, a: &Tensor, b: &Tensor) -> Result<()> {
    let (a, b) = (a.to_dtype(DType::F32)?.contiguous()?, b.to_dtype(DType::F32)?.contiguous()?);
    let ((r, inp), out) = (a.dims2()?, b.dim(0)?);
    cpu::with(&a, |a| {
        cpu::with(&b, |b| {
            let xa = cpu::gemm(Mat::new(x, tokens, inp), Mat::new(a.data, r, inp).t(), 1.0)?;
            cpu::gemm_into(y, out, 1.0, Mat::new(&xa, tokens, r), Mat::new(b.data, out, r).t(), 1.0, true)
        })
    })
}

fn routed_neutral(
    x: &Tensor,
    weight: &FrozenWeight,
    bias: Option<&Tensor>,
    spans: &[RoutedSpan<'_>],
) -> Result<Tensor> {
    let (x, dtype) = (x.detach(), x.dtype());
    let mut spans: Vec<&RoutedSpan<'_>> = spans.iter().filter(|s| !s.tokens.is_empty()).collect();
    spans.sort_by_key(|s| s.tokens.start);
    let plain = ServingForm::default();
    let mut runs: Vec<(Range<usize>, &ServingForm)> = Vec::new();
    let mut next = 0;
    for span in spans {
        if span.tokens.start > next {
            runs.push((next..span.tokens.start, &plain));
        }
        next = span.tokens.end;
        runs.push((span.tokens.clone(), span.form));
    }
    if next < x.dim(0)? {
        runs.push((next..x.dim(0)?, &plain));
    }
    let mut parts = Vec::with_capacity(runs.len());
    for (run, form) in runs {
        let x = x.narrow(0, run.start, run.len())?;
        let scaled = match &form.scale_input {
            Some(l) => x.broadcast_mul(&l.to_dtype(dtype)?)?,
            None => x.clone(),
        };
        let mut y = weight.matmul_t(&scaled)?;
        if let Some((a, b)) = &form.low_rank {
            let delta = x.to_dtype(a.dtype())?.matmul(&a.t()?)?.matmul(&b.t()?)?;
            y = (y + delta.to_dtype(dtype)?)?;
        }
        if let Some(g) = &form.scale_output {
            y = y.broadcast_mul(&g.to_dtype(dtype)?)?;
        }
        for b in form.shift.iter().chain(bias) {
            y = y.broadcast_add(&b.to_dtype(dtype)?)?;
        }
        parts.push(y);
    }
    Tensor::cat(&parts, 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::{close, randn};

    #[test]
    fn runs_equal_separate_passes() {
        let (inp, out, tokens) = (20, 12, 9);
        let w = FrozenWeight::dense(&randn(1, (out, inp), 0.3).unwrap()).unwrap();
        let bias = randn(2, out, 1.0).unwrap();
        let x = randn(3, (tokens, inp), 1.0).unwrap();
        let lora = ServingForm {
            low_rank: Some((randn(4, (3, inp), 0.3).unwrap(), randn(5, (out, 3), 0.3).unwrap())),
            scale_output: Some(randn(6, out, 1.0).unwrap()),
            ..ServingForm::default()
        };
        let ia3 = ServingForm {
            scale_input: Some(randn(7, inp, 1.0).unwrap()),
            shift: Some(randn(8, out, 1.0).unwrap()),
            ..ServingForm::default()
        };
        let spans = [RoutedSpan { tokens: 1..4, form: &lora }, RoutedSpan { tokens: 4..7, form: &ia3 }];
        let mixed = routed_linear(&x, &w, Some(&bias), &spans).unwrap();
        close("neutral", &mixed, &routed_neutral(&x, &w, Some(&bias), &spans).unwrap(), 1e-5).unwrap();

        let base = |x: &Tensor| w.matmul_t(x).unwrap();
        let (a, b) = lora.low_rank.as_ref().unwrap();
        let x1 = x.narrow(0, 1, 3).unwrap();
        let y1 = (base(&x1) + x1.matmul(&a.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap()).unwrap();
        let y1 = y1.broadcast_mul(lora.scale_output.as_ref().unwrap()).unwrap().broadcast_add(&bias).unwrap();
        close("lora rows", &mixed.narrow(0, 1, 3).unwrap(), &y1, 1e-5).unwrap();
        let x2 = x.narrow(0, 4, 3).unwrap().broadcast_mul(ia3.scale_input.as_ref().unwrap()).unwrap();
        let y2 = base(&x2).broadcast_add(&bias).unwrap().broadcast_add(ia3.shift.as_ref().unwrap()).unwrap();
        close("ia3 rows", &mixed.narrow(0, 4, 3).unwrap(), &y2, 1e-5).unwrap();
        let y3 = base(&x.narrow(0, 7, 2).unwrap()).broadcast_add(&bias).unwrap();
        close("base rows", &mixed.narrow(0, 7, 2).unwrap(), &y3, 1e-5).unwrap();
    }
}
