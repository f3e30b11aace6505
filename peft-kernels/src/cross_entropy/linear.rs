//! The head's product and the loss in one, chunk by chunk.

use candle_core::{Result, Tensor};

use super::rows::check_targets;
use super::{Gradient, score, settled};
use crate::weight::FrozenWeight;

/// A frozen output head, `[vocab, hidden]`.
pub trait HeadWeight {
    /// `hidden · Wᵀ`, `[n, vocab]`, untracked; a new tensor, which the loss overwrites.
    ///
    /// # Errors
    /// When shapes do not fit.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor>;

    /// `dlogits · W`, `[n, hidden]`, untracked.
    ///
    /// # Errors
    /// When shapes do not fit.
    fn backward(&self, dlogits: &Tensor) -> Result<Tensor>;

    /// The number of rows of W.
    fn vocab(&self) -> usize;
}

/// A dense head in the type of the hidden states.
impl HeadWeight for Tensor {
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        hidden.matmul(&self.detach().t()?)
    }
    fn backward(&self, dlogits: &Tensor) -> Result<Tensor> {
        dlogits.matmul(&self.detach())
    }
    fn vocab(&self) -> usize {
        self.dims().first().copied().unwrap_or(0)
    }
}

impl HeadWeight for FrozenWeight {
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.matmul_t(hidden)
    }
    fn backward(&self, dlogits: &Tensor) -> Result<Tensor> {
        self.matmul(dlogits)
    }
    fn vocab(&self) -> usize {
        self.out_features()
    }
}

/// What kind of loss [`linear_cross_entropy`] makes, and in what pieces.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossSpec {
    /// Factor of the sum of losses, for instance 1 / (counted tokens of the whole step).
    pub scale: f64,
    /// Gemma's `final_logit_softcapping`.
    pub softcap: Option<f64>,
    /// Rows of logits held at one time; `chunk_rows · vocab` values are the peak.
    pub chunk_rows: usize,
}

/// A loss with what a log wants to know about it.
#[derive(Debug, Clone)]
pub struct HeadLoss {
    /// `scale · Σ nll`, a scalar on the graph of the hidden states (or logits), `f32`.
    pub loss: Tensor,
    /// The unscaled sum of losses.
    pub nll: f64,
    /// Rows whose largest logit is the target's.
    pub hits: usize,
}

/// Cross-entropy of `hidden · Wᵀ` with `targets`, never holding more than `chunk_rows` rows of logits.
///
/// `hidden` is `[n, hidden_size]`, one row for each counted position. If it is tracked, its gradient is made chunk by
/// chunk in the forward pass, while the logits are there, and the backward pass only scales it.
///
/// # Errors
/// When shapes do not fit, a target is outside the vocabulary (named), or `chunk_rows` is 0.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &dyn HeadWeight,
    targets: &[u32],
    spec: &LossSpec,
) -> Result<HeadLoss> {
    let (n, _) = hidden.dims2()?;
    check_targets(targets, n, weight.vocab(), spec.softcap)?;
    if spec.chunk_rows == 0 {
        candle_core::bail!("linear_cross_entropy: chunk_rows must be at least 1");
    }
    let rows = hidden.detach();
    let want = if hidden.track_op() { Gradient::InPlace } else { Gradient::None };
    let (mut nll, mut hits, mut gradients) = (0.0, 0, Vec::new());
    for (i, targets) in targets.chunks(spec.chunk_rows).enumerate() {
        let chunk = rows.narrow(0, i * spec.chunk_rows, targets.len())?.contiguous()?;
        let scored = score(weight.logits(&chunk)?.detach(), targets, spec.scale, spec.softcap, want)?;
        nll += scored.nll.iter().sum::<f64>();
        hits += scored.hits;
        if let Some(dlogits) = scored.grad {
            gradients.push(weight.backward(&dlogits)?.detach());
        }
    }
    let grad = match (want, gradients.len()) {
        (Gradient::None, _) => None,
        (_, 0) => Some(rows.zeros_like()?),
        _ => Some(Tensor::cat(&gradients, 0)?.to_dtype(hidden.dtype())?),
    };
    Ok(HeadLoss { loss: settled(hidden, spec.scale * nll, grad)?, nll, hits })
}
