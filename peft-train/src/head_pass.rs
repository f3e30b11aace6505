//! The head's part of a pass: from the hidden states that reach it to losses and gradients, over chunks of rows.

use candle_core::Tensor;
use peft_core::kernels::{self, LossSpec};
use peft_core::{Ctx, Error, ReadRows, Result, Segmented};

use crate::driver::{LossOf, Measured, leaf};
use crate::grads::Grads;
use crate::head_loss::HeadLoss;

/// Rows of logits that are held at a time: enough for the head's weight to be laid out for many of them. Twice as many made
/// a step no faster, and its peak 5 % larger.
pub const LOGIT_ROWS: usize = 128;

/// The hidden states that reach the head, and what they predict.
pub(crate) struct Head<'a> {
    pub(crate) rows: Tensor,
    pub(crate) read: &'a ReadRows,
    pub(crate) targets: &'a [u32],
    /// How many of them, in front, are the batch's own: those that are measured.
    pub(crate) own: usize,
    pub(crate) loss: HeadLoss<'a>,
}

impl Head<'_> {
    /// Rows whose logits are held at a time, with the first of them. Other losses than the cross-entropy have few outputs, and look at all
    /// rows of a sequence.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = (usize, &[u32])> {
        let rows = if self.loss.is_cross_entropy() { LOGIT_ROWS } else { self.targets.len().max(1) };
        self.targets.chunks(rows).enumerate().map(move |(i, ids)| (i * rows, ids))
    }

    /// The rows behind the final norm.
    pub(crate) fn normed<M: Segmented>(&self, model: &M, ctx: &Ctx<'_>) -> Result<Tensor> {
        model.final_norm(&self.rows, &self.read.ctx(ctx))
    }

    /// Gradient of the rows (where it is needed) and of the parameters of norm and head.
    pub(crate) fn backward<M: Segmented>(
        &self,
        model: &M,
        ctx: &Ctx<'_>,
        loss: LossOf<'_>,
        needs_rows: bool,
        grads: &mut Grads,
    ) -> Result<(Measured, Option<Tensor>)> {
        let rows = leaf(&self.rows, needs_rows)?;
        let normed = model.final_norm(&rows, &self.read.ctx(ctx))?;
        let plain = if self.loss.is_cross_entropy() { model.plain_head(&self.read.ctx(ctx)) } else { None };
        if let (LossOf::Sum(scale), Some((weight, softcap))) = (loss, plain) {
            let spec = LossSpec { scale, softcap: softcap.map(f64::from), chunk_rows: LOGIT_ROWS };
            let head = kernels::linear_cross_entropy(&normed, weight, self.targets, &spec)?;
            let measured = Measured { nll: head.nll, counted: self.targets.len(), hits: head.hits };
            let d_rows = if head.loss.track_op() { grads.drain(head.loss.backward()?, Some(rows.id()))? } else { None };
            return Ok((measured, d_rows));
        }
        let inner = leaf(&normed.detach(), normed.track_op())?;
        let mut d_normed = Vec::new();
        let weights = match loss {
            LossOf::Sum(scale) => vec![scale; self.targets.len()],
            LossOf::WithPrompt(scale, targets) => {
                let of_prompt = targets.iter().map(|target| target.weight * scale);
                std::iter::repeat_n(scale, self.own).chain(of_prompt).collect()
            }
            LossOf::Weighed(_) if !self.loss.is_cross_entropy() => {
                return Err(Error::msg("only likelihoods are weighed"));
            }
            LossOf::Weighed(weigh) => {
                let weights = weigh(&self.losses(model, &normed.detach(), &ctx.untracked())?);
                if weights.len() != self.targets.len() {
                    return Err(Error::msg("a loss has another number of derivatives than tokens"));
                }
                weights
            }
        };
        let measured = self.loss(model, &inner, &weights, Some((grads, &mut d_normed)), ctx)?;
        if !normed.track_op() {
            return Ok((measured, None));
        }
        let d_normed = Tensor::cat(&d_normed, 0)?;
        let d_rows = grads.drain(kernels::seed(&normed, &d_normed)?.backward()?, Some(rows.id()))?;
        Ok((measured, d_rows))
    }

    /// The negative log-likelihood of each row's target, over chunks of rows.
    pub(crate) fn losses<M: Segmented>(&self, model: &M, normed: &Tensor, ctx: &Ctx<'_>) -> Result<Vec<f32>> {
        let mut losses = Vec::with_capacity(self.targets.len());
        self.each_chunk(model, normed, ctx, |logits, ids| {
            losses.extend(self.loss.score(logits, ids, 1.0, false)?.losses);
            Ok(())
        })?;
        Ok(losses)
    }

    /// Hands `f` the logits and the targets of one chunk of rows after another.
    pub(crate) fn each_chunk<M: Segmented>(
        &self,
        model: &M,
        normed: &Tensor,
        ctx: &Ctx<'_>,
        mut f: impl FnMut(&Tensor, &[u32]) -> Result<()>,
    ) -> Result<()> {
        for (start, ids) in self.chunks() {
            let rows = self.read.part(start..start + ids.len())?;
            f(&model.logits(&normed.narrow(0, start, ids.len())?, &rows.ctx(ctx))?, ids)?;
        }
        Ok(())
    }

    /// The loss over chunks of rows, so that full logits are never held; with `backward`, each chunk's gradients are
    /// taken at once and its graph dropped. `weights` are the derivatives of the loss by each row's negative log-likelihood; none
    /// are needed without `backward`.
    pub(crate) fn loss<M: Segmented>(
        &self,
        model: &M,
        normed: &Tensor,
        weights: &[f64],
        mut backward: Option<(&mut Grads, &mut Vec<Tensor>)>,
        ctx: &Ctx<'_>,
    ) -> Result<Measured> {
        let mut measured = Measured { counted: self.loss.items(self.own), ..Measured::default() };
        for (start, ids) in self.chunks() {
            let rows = self.read.part(start..start + ids.len())?;
            let ctx = rows.ctx(ctx);
            let chunk = normed.detach().narrow(0, start, ids.len())?.contiguous()?;
            let chunk = leaf(&chunk, backward.is_some() && normed.track_op())?;
            let logits = model.logits(&chunk, &if backward.is_some() { ctx } else { ctx.untracked() })?;
            // One factor for all rows goes into the kernel.
            let weights = weights.get(start..start + ids.len()).unwrap_or_default();
            let shared = weights.first().copied().filter(|first| weights.iter().all(|w| w == first));
            let scale = shared.unwrap_or(1.0);
            let scored = self.loss.score(&logits.detach(), ids, scale, backward.is_some())?;
            let own = self.own.saturating_sub(start);
            measured.nll += scored.losses.iter().take(own).map(|&x| f64::from(x)).sum::<f64>();
            measured.hits += scored.hits;
            if let (Some((grads, d_normed)), Some(d_logits)) = (&mut backward, scored.grad)
                && logits.track_op()
            {
                let d_logits = match shared {
                    Some(_) => d_logits,
                    None => {
                        let weights = Tensor::new(weights, d_logits.device())?.to_dtype(d_logits.dtype())?;
                        d_logits.broadcast_mul(&weights.unsqueeze(1)?)?
                    }
                };
                let store = kernels::seed(&logits, &d_logits)?.backward()?;
                d_normed.extend(grads.drain(store, Some(chunk.id()))?);
            }
        }
        Ok(measured)
    }
}
