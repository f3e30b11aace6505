//! Losses of given logits.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, D, DType, InplaceOp1, Layout, Result, Tensor};

use super::cpu::{Logits, Row, losses};
use crate::cpu;
use crate::diff_op::is_cpu_f32;
use crate::reduce::wide;

/// Losses of some rows of logits.
#[derive(Debug, Clone)]
pub struct CeRows {
    /// −log of the target's probability, a row.
    pub nll: Vec<f32>,
    /// `scale · d Σnll / d logits`, in the shape and type of the logits, if it was asked for.
    pub grad: Option<Tensor>,
    /// Rows whose largest logit is the target's.
    pub hits: usize,
}

/// Cross-entropy of each row of `logits` (`[n, vocab]`) with its target, on any device. Nothing is tracked.
///
/// `softcap` is Gemma's `cap · tanh(logits / cap)`, applied first.
///
/// # Errors
/// When there is not one target a row, a target is outside the vocabulary (named), or `softcap` is not positive.
pub fn cross_entropy_rows(
    logits: &Tensor,
    targets: &[u32],
    scale: f64,
    softcap: Option<f64>,
    want_grad: bool,
) -> Result<CeRows> {
    let want = if want_grad { Gradient::Copy } else { Gradient::None };
    let scored = score(logits.detach(), targets, scale, softcap, want)?;
    Ok(CeRows { nll: scored.nll.iter().map(|v| *v as f32).collect(), grad: scored.grad, hits: scored.hits })
}

/// What becomes of the gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gradient {
    /// It is not made.
    None,
    /// It is a new tensor.
    Copy,
    /// It may overwrite the logits, which nothing else holds.
    InPlace,
}

pub(crate) struct Scored {
    pub(crate) nll: Vec<f64>,
    pub(crate) grad: Option<Tensor>,
    pub(crate) hits: usize,
}

/// Checks targets before anything is computed from them; `first` is the row that the first one belongs to.
pub(super) fn check_targets(targets: &[u32], rows: usize, vocab: usize, softcap: Option<f64>) -> Result<()> {
    if targets.len() != rows {
        candle_core::bail!("cross_entropy: {} targets for {rows} rows", targets.len());
    }
    if let Some((row, t)) = targets.iter().enumerate().find(|(_, t)| **t as usize >= vocab) {
        candle_core::bail!("cross_entropy: target {t} of row {row} is outside the vocabulary of {vocab}");
    }
    if let Some(cap) = softcap.filter(|c| !(*c > 0.0 && c.is_finite())) {
        candle_core::bail!("cross_entropy: the softcap must be positive and finite, not {cap}");
    }
    Ok(())
}

/// Scores untracked logits.
pub(crate) fn score(
    logits: Tensor,
    targets: &[u32],
    scale: f64,
    softcap: Option<f64>,
    want: Gradient,
) -> Result<Scored> {
    let (n, vocab) = logits.dims2()?;
    check_targets(targets, n, vocab, softcap)?;
    if n == 0 {
        let grad = (want != Gradient::None).then_some(logits);
        return Ok(Scored { nll: Vec::new(), grad, hits: 0 });
    }
    #[cfg(feature = "cuda")]
    if let Some(scored) = crate::cuda::cross_entropy::score(&logits.contiguous()?, targets, scale, softcap, want)? {
        return Ok(scored);
    }
    if !is_cpu_f32(&logits) {
        return neutral(&logits, targets, scale, softcap, want != Gradient::None);
    }
    let logits = logits.contiguous()?;
    let cap = softcap.map(|c| c as f32);
    let (rows, grad) = match want {
        Gradient::None => (cpu::with(&logits, |x| Ok(losses(Logits::Read(x.data), vocab, targets, scale, cap)))?, None),
        Gradient::Copy => {
            let mut copy = cpu::with(&logits, |x| Ok(x.data.to_vec()))?;
            let rows = losses(Logits::Replace(&mut copy), vocab, targets, scale, cap);
            (rows, Some(cpu::tensor(copy, (n, vocab))?))
        }
        Gradient::InPlace => {
            let op = Replace { vocab, targets, scale, cap, rows: Mutex::default() };
            logits.inplace_op1(&op)?;
            (op.rows.into_inner().unwrap_or_else(PoisonError::into_inner), Some(logits))
        }
    };
    let hits = rows.iter().filter(|r| r.hit).count();
    Ok(Scored { nll: rows.iter().map(|r| r.nll).collect(), grad, hits })
}

/// The kernel on a tensor's own storage.
struct Replace<'a> {
    vocab: usize,
    targets: &'a [u32],
    scale: f64,
    cap: Option<f32>,
    rows: Mutex<Vec<Row>>,
}

impl InplaceOp1 for Replace<'_> {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("cross_entropy: logits must be contiguous f32")
        };
        let Some(data) = data.get_mut(start..end) else {
            candle_core::bail!("cross_entropy: the logits' layout reaches past their storage")
        };
        let rows = losses(Logits::Replace(data), self.vocab, self.targets, self.scale, self.cap);
        *self.rows.lock().unwrap_or_else(PoisonError::into_inner) = rows;
        Ok(())
    }
}

fn neutral(logits: &Tensor, targets: &[u32], scale: f64, softcap: Option<f64>, want_grad: bool) -> Result<Scored> {
    let n = targets.len();
    let (x, dtype) = (wide(logits)?, logits.dtype());
    let (z, slope) = match softcap {
        Some(cap) => {
            let t = (&x / cap)?.tanh()?;
            ((&t * cap)?, Some((1.0 - t.sqr()?)?))
        }
        None => (x, None),
    };
    let ids = Tensor::new(targets, logits.device())?;
    let column = ids.reshape((n, 1))?;
    let argmax = z.argmax(D::Minus1)?;
    let hits = argmax.eq(&ids)?.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()? as usize;
    let max = z.max_keepdim(D::Minus1)?;
    let e = z.broadcast_sub(&max)?.exp()?;
    let sum = e.sum_keepdim(D::Minus1)?;
    let nll = ((sum.log()? + max)? - z.gather(&column, 1)?)?;
    let nll = nll.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let grad = if want_grad {
        let p = (e.broadcast_div(&sum)? * scale)?;
        let minus = (column.to_dtype(p.dtype())?.zeros_like()? - scale)?;
        let grad = p.scatter_add(&column, &minus, 1)?;
        let grad = match slope {
            Some(slope) => (grad * slope)?,
            None => grad,
        };
        Some(grad.to_dtype(dtype)?)
    } else {
        None
    };
    Ok(Scored { nll, grad, hits })
}
