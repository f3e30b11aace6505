//! The losses of heads, as transformers makes them (`loss/loss_utils.py`).
//!
//! A loss is a mean over items: the counted tokens, the rows of a data set with numbers or several classes, or its questions. The
//! outputs of the last two are few, so they are fetched whole and the loss is made in `f64`.

use candle_core::{DType, Tensor};
use peft_core::kernels;
use peft_core::{Error, HeadKind, Result};

use crate::data::Batch;

/// What the outputs of a batch are held against.
pub(crate) enum HeadLoss<'a> {
    /// Each row's class or token.
    CrossEntropy,
    /// Numbers for each row, `[rows, outputs]`: the mean square of the differences.
    Squares(&'a [f32]),
    /// Which classes are each row's, `[rows, outputs]` of 0 and 1: the mean binary cross-entropy.
    Binary(&'a [f32]),
    /// The first and the last token of an answer among those of its sequence, at these bounds.
    Span(&'a [usize]),
}

/// Losses of a batch, and how they move with its outputs.
pub(crate) struct Scored {
    /// One an item.
    pub(crate) losses: Vec<f32>,
    /// Rows whose largest output is the target's, of cross-entropies.
    pub(crate) hits: usize,
    /// The derivative of their sum times a factor by the outputs, in their shape and type.
    pub(crate) grad: Option<Tensor>,
}

impl<'a> HeadLoss<'a> {
    /// The loss of a batch.
    pub(crate) fn of(batch: &'a Batch) -> Self {
        match batch.kind {
            HeadKind::Classification | HeadKind::TokenClassification => Self::CrossEntropy,
            HeadKind::Regression => Self::Squares(&batch.values),
            HeadKind::MultiLabel => Self::Binary(&batch.values),
            HeadKind::QuestionAnswering => Self::Span(&batch.bounds),
        }
    }

    pub(crate) fn is_cross_entropy(&self) -> bool {
        matches!(self, Self::CrossEntropy)
    }

    /// How many losses so many rows have.
    pub(crate) fn items(&self, rows: usize) -> usize {
        match self {
            Self::Span(bounds) => bounds.len().saturating_sub(1),
            _ => rows,
        }
    }

    /// Losses of all rows of `logits`, `[rows, outputs]` (of a cross-entropy, of any rows); `scale` is the factor of the gradient, if it is
    /// asked for.
    ///
    /// # Errors
    /// Targets that the head has not, or outputs that do not line up with them.
    pub(crate) fn score(&self, logits: &Tensor, targets: &[u32], scale: f64, want_grad: bool) -> Result<Scored> {
        if self.is_cross_entropy() {
            let scored = kernels::cross_entropy_rows(logits, targets, scale, None, want_grad)?;
            return Ok(Scored { losses: scored.nll, hits: scored.hits, grad: scored.grad });
        }
        let (rows, outputs) = logits.dims2()?;
        let x = host(logits)?;
        let (losses, mut slopes) = match self {
            Self::CrossEntropy => (Vec::new(), Vec::new()),
            Self::Squares(values) => pairs(&x, values, outputs, square)?,
            Self::Binary(values) => pairs(&x, values, outputs, binary)?,
            Self::Span(bounds) => span(&x, targets, bounds, outputs)?,
        };
        let grad = match want_grad {
            false => None,
            true => {
                slopes.iter_mut().for_each(|slope| *slope *= scale);
                let grad = Tensor::from_vec(slopes, (rows, outputs), logits.device())?;
                Some(grad.to_dtype(logits.dtype())?)
            }
        };
        Ok(Scored { losses: losses.iter().map(|&x| x as f32).collect(), hits: 0, grad })
    }
}

/// Outputs as numbers here, in the order of memory.
pub(crate) fn host(logits: &Tensor) -> Result<Vec<f32>> {
    Ok(logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?)
}

type Losses = (Vec<f64>, Vec<f64>);

/// The mean over each row's outputs of `loss`, a function of output and value, and the derivative by each output.
fn pairs(x: &[f32], values: &[f32], outputs: usize, loss: impl Fn(f64, f64) -> (f64, f64)) -> Result<Losses> {
    if x.len() != values.len() || outputs == 0 {
        let message = format!("{} outputs do not line up with {} numbers of the rows", x.len(), values.len());
        return Err(Error::msg(message));
    }
    let n = outputs as f64;
    let (parts, slopes): (Vec<f64>, Vec<f64>) = x
        .iter()
        .zip(values)
        .map(|(&x, &value)| {
            let (part, slope) = loss(f64::from(x), f64::from(value));
            (part / n, slope / n)
        })
        .unzip();
    Ok((parts.chunks(outputs).map(|row| row.iter().sum()).collect(), slopes))
}

fn square(x: f64, value: f64) -> (f64, f64) {
    let apart = x - value;
    (apart * apart, 2.0 * apart)
}

/// `−y·ln σ(x) − (1 − y)·ln(1 − σ(x))`, without overflow.
fn binary(x: f64, y: f64) -> (f64, f64) {
    (x.max(0.0) - x * y + (-x.abs()).exp().ln_1p(), 1.0 / (1.0 + (-x).exp()) - y)
}

/// The mean of the cross-entropies of start and end over each sequence's tokens.
fn span(x: &[f32], targets: &[u32], bounds: &[usize], outputs: usize) -> Result<Losses> {
    let unequal = || Error::msg("the outputs for a start and an end do not line up with the tokens of the sequences");
    if outputs != 2 || x.len() != 2 * targets.len() || bounds.last() != Some(&targets.len()) {
        return Err(unequal());
    }
    let mut slopes = vec![0.0; x.len()];
    let mut losses = Vec::with_capacity(bounds.len());
    for pair in bounds.windows(2) {
        let &[from, to] = pair else { continue };
        let mut loss = 0.0;
        for column in [0, 1] {
            let at = |t: usize| x.get(2 * t + column).map_or(f64::NEG_INFINITY, |&x| f64::from(x));
            let most = (from..to).map(at).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = (from..to).map(|t| (at(t) - most).exp()).sum();
            let is_target = |t: &usize| targets.get(*t).is_some_and(|bits| bits >> column & 1 == 1);
            let target = (from..to).find(is_target).ok_or_else(unequal)?;
            loss += (most + sum.ln() - at(target)) / 2.0;
            for t in from..to {
                if let Some(slope) = slopes.get_mut(2 * t + column) {
                    *slope = ((at(t) - most).exp() / sum - f64::from(u8::from(t == target))) / 2.0;
                }
            }
        }
        losses.push(loss);
    }
    Ok((losses, slopes))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use candle_core::Device;

    use super::*;

    fn logits(x: &[f32], outputs: usize) -> Tensor {
        Tensor::from_slice(x, (x.len() / outputs, outputs), &Device::Cpu).unwrap()
    }

    /// Every derivative against differences of the loss.
    fn check(loss: &HeadLoss<'_>, x: &[f32], outputs: usize, targets: &[u32]) -> Vec<f32> {
        let scored = loss.score(&logits(x, outputs), targets, 0.5, true).unwrap();
        let grad = host(&scored.grad.unwrap()).unwrap();
        for (i, &slope) in grad.iter().enumerate() {
            let sum = |by: f32| {
                let mut moved = x.to_vec();
                moved[i] += by;
                let losses = loss.score(&logits(&moved, outputs), targets, 1.0, false).unwrap().losses;
                losses.iter().map(|&l| f64::from(l)).sum::<f64>()
            };
            let numeric = 0.5 * (sum(1e-2) - sum(-1e-2)) / 2e-2;
            assert!((numeric - f64::from(slope)).abs() < 1e-4, "output {i}: {slope} and {numeric}");
        }
        scored.losses
    }

    fn near(got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-6, "{got} and {want}");
        }
    }

    /// By hand; `binary_cross_entropy_with_logits` and `cross_entropy` of torch 2.9.
    #[test]
    fn losses_are_those_of_torch() {
        let values = [1.0, -1.0, 0.5, 2.0];
        near(&check(&HeadLoss::Squares(&values), &[0.5, 0.0, 0.5, -1.0], 2, &[0, 0]), &[0.625, 4.5]);
        let flags = [1.0, 0.0, 1.0, 0.0];
        let got = check(&HeadLoss::Binary(&flags), &[0.5, -2.0, -1.0, 3.0], 2, &[0, 0]);
        near(&got, &[(0.474_076_984 + 0.126_928_011) / 2.0, (1.313_261_688 + 3.048_587_352) / 2.0]);
        let bounds = [0, 3, 4];
        let x = [0.1, 1.0, 0.7, -0.5, -0.3, 0.2, 4.0, 9.0];
        let got = check(&HeadLoss::Span(&bounds), &x, 2, &[0, 1, 2, 3]);
        // Start: logits 0.1, 0.7, −0.3 and token 1; end: 1, −0.5, 0.2 and token 2. A sequence of one token has no choice.
        let nll = |logits: [f64; 3], at: usize| logits.iter().map(|x| x.exp()).sum::<f64>().ln() - logits[at];
        near(&got, &[(nll([0.1, 0.7, -0.3], 1) + nll([1.0, -0.5, 0.2], 2)) / 2.0, 0.0]);
    }

    #[test]
    fn far_outputs_stay_finite_and_what_does_not_line_up_is_an_error() {
        let far = HeadLoss::Binary(&[1.0, 0.0]).score(&logits(&[1e4, 1e4], 2), &[0], 1.0, true).unwrap();
        near(&far.losses, &[5e3]);
        for (loss, targets) in [
            (HeadLoss::Squares(&[1.0]), vec![0]),
            (HeadLoss::Span(&[0, 1]), vec![1]),
            (HeadLoss::Span(&[0, 2]), vec![3]),
        ] {
            assert!(loss.score(&logits(&[1.0, 2.0], 2), &targets, 1.0, false).is_err());
        }
    }
}
