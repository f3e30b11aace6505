//! One micro-batch, forward and backward, segment by segment.
//!
//! Each block is recorded by itself ([`kernels::record`]). The forward pass keeps a block's record or only its input; the
//! backward pass goes through the blocks from the top, runs those again that were not kept (without the operations at their
//! end that no gradient is made of: [`Record::unread`]), takes the gradients out and drops the record. So at most the kept records and
//! one more are alive, and nothing below the lowest adapted segment is differentiated at all. Records may be held in `bf16` ([`Keep`]).
//!
//! What a row asks of the model, the next tokens, a class, numbers or an answer, is in the batch alone: the hidden states that reach
//! the head, what each should predict, and which loss that makes ([`HeadLoss`]).

use candle_core::{DType, Tensor, TensorId, Var};
use peft_core::kernels::{self, Record, Unread};
use peft_core::{ByTask, Ctx, Error, PromptTarget, ReadRows, Result, Segmented, TokenBatch, first_pass};

use crate::data::Batch;
use crate::grads::Grads;
use crate::head_loss::{HeadLoss, host};
use crate::head_pass::Head;
use crate::keep::Keep;
use crate::scores::likeliest;

/// What a pass over a batch measured.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Measured {
    /// Sum of the losses: of the negative log-likelihoods of the counted tokens (of the rows, with a class head), in nats, or of what
    /// another head has in their place.
    pub nll: f64,
    /// Counted tokens, rows or questions.
    pub counted: usize,
    /// Counted tokens whose most likely prediction was right.
    pub hits: usize,
}

impl std::ops::AddAssign for Measured {
    fn add_assign(&mut self, other: Self) {
        self.nll += other.nll;
        self.counted += other.counted;
        self.hits += other.hits;
    }
}

fn tokens(batch: &Batch) -> TokenBatch<'_> {
    TokenBatch { ids: &batch.input_ids, positions: &batch.position_ids, bounds: &batch.bounds, types: &batch.types }
}

/// What adapters want to know of a batch besides its tokens.
struct About {
    /// The route of its sequences by their tasks, where an adapter depends on them.
    by_task: Option<ByTask>,
    /// What the base alone makes of it, where an adapter reads that.
    first: Option<Tensor>,
}

impl About {
    fn of<M: Segmented>(model: &M, batch: &Batch, below: Option<&Below>, ctx: &Ctx<'_>) -> Result<Self> {
        let first = match below {
            Some(below) => below.first.clone(),
            None => first_pass(model, tokens(batch), ctx)?,
        };
        Ok(Self { by_task: ByTask::of(&batch.bounds, &batch.tasks, ctx)?, first })
    }

    fn ctx<'b>(&'b self, ctx: &Ctx<'b>) -> Ctx<'b> {
        let ctx = Ctx { first: self.first.as_ref(), ..*ctx };
        self.by_task.as_ref().map_or(ctx, |by_task| by_task.ctx(&ctx))
    }
}

/// Loss of a batch without gradients.
///
/// # Errors
/// When a tensor operation fails or a label is outside the vocabulary.
pub fn evaluate<M: Segmented>(model: &M, batch: &Batch, ctx: &Ctx<'_>) -> Result<Measured> {
    evaluate_above(model, batch, None, ctx)
}

/// As [`evaluate`], from the hidden states that no parameter reaches.
pub(crate) fn evaluate_above<M: Segmented>(
    model: &M,
    batch: &Batch,
    below: Option<&Below>,
    ctx: &Ctx<'_>,
) -> Result<Measured> {
    with_head(model, batch, below, ctx, |head, ctx| head.loss(model, &head.normed(model, ctx)?, &[], None, ctx))
}

/// Loss of a batch without gradients, and the likeliest class of each row.
///
/// # Errors
/// When a tensor operation fails or a label is outside the head.
pub fn predict<M: Segmented>(model: &M, batch: &Batch, ctx: &Ctx<'_>) -> Result<(Measured, Vec<u32>)> {
    let found = outputs_above(model, batch, None, ctx)?;
    let counted = batch.targets().ids.len();
    let width = found.outputs.len().checked_div(counted).unwrap_or(0).max(1);
    Ok((found.measured(), found.outputs.chunks(width).map(likeliest).collect()))
}

/// Loss of a batch without gradients and the outputs of its head, from the hidden states that no parameter reaches. Logits are held whole,
/// so this is not for a head over a vocabulary.
///
/// # Errors
/// When a tensor operation fails or a label is outside the head.
pub(crate) fn outputs_above<M: Segmented>(
    model: &M,
    batch: &Batch,
    below: Option<&Below>,
    ctx: &Ctx<'_>,
) -> Result<Outputs> {
    with_head(model, batch, below, ctx, |head, ctx| {
        let logits = model.logits(&head.normed(model, ctx)?, &head.read.ctx(ctx))?;
        let scored = head.loss.score(&logits, head.targets, 1.0, false)?;
        Ok(Outputs { losses: scored.losses, hits: scored.hits, outputs: host(&logits)? })
    })
}

/// What a head made of a batch.
#[derive(Debug)]
pub(crate) struct Outputs {
    /// One an item of the loss.
    pub(crate) losses: Vec<f32>,
    /// Rows whose largest output is that of their class.
    pub(crate) hits: usize,
    /// Of the rows that count, `[counted, outputs]`.
    pub(crate) outputs: Vec<f32>,
}

impl Outputs {
    pub(crate) fn measured(&self) -> Measured {
        let nll = self.losses.iter().map(|&x| f64::from(x)).sum();
        Measured { nll, counted: self.losses.len(), hits: self.hits }
    }
}

/// Negative log-likelihood of each counted token, in the order of [`Batch::targets`].
///
/// # Errors
/// When a tensor operation fails or a label is outside the vocabulary.
pub fn token_losses<M: Segmented>(model: &M, batch: &Batch, ctx: &Ctx<'_>) -> Result<Vec<f32>> {
    token_losses_above(model, batch, None, ctx)
}

/// As [`token_losses`], from the hidden states that no parameter reaches.
pub(crate) fn token_losses_above<M: Segmented>(
    model: &M,
    batch: &Batch,
    below: Option<&Below>,
    ctx: &Ctx<'_>,
) -> Result<Vec<f32>> {
    with_head(model, batch, below, ctx, |head, ctx| head.losses(model, &head.normed(model, ctx)?, ctx))
}

/// The negative log-likelihood of each counted token and the likeliest one in its place, in the order of [`Batch::targets`].
pub(crate) fn token_scores<M: Segmented>(model: &M, batch: &Batch, ctx: &Ctx<'_>) -> Result<(Vec<f32>, Vec<u32>)> {
    with_head(model, batch, None, ctx, |head, ctx| {
        let (mut losses, mut likeliest) = (Vec::new(), Vec::new());
        head.each_chunk(model, &head.normed(model, ctx)?, ctx, |logits, ids| {
            losses.extend(kernels::cross_entropy_rows(logits, ids, 1.0, None, false)?.nll);
            likeliest.extend(logits.argmax(1)?.to_vec1::<u32>()?);
            Ok(())
        })?;
        Ok((losses, likeliest))
    })
}

/// The hidden states `[tokens, hidden]` after the last block, without a graph.
pub(crate) fn last_hidden<M: Segmented>(model: &M, batch: &Batch, ctx: &Ctx<'_>) -> Result<Tensor> {
    hidden_before(model, batch, model.num_blocks(), &About::of(model, batch, None, ctx)?.ctx(ctx))
}

/// The hidden states `[tokens, hidden]` that go into a block, without a graph, for the context that is [`About`] the batch.
fn hidden_before<M: Segmented>(model: &M, batch: &Batch, block: usize, ctx: &Ctx<'_>) -> Result<Tensor> {
    let ctx = ctx.untracked();
    let input = model.prepare(tokens(batch), &ctx)?;
    let embedded = model.embed(tokens(batch), &ctx)?;
    (0..block).try_fold(embedded, |hidden, i| model.block(i, &hidden, &input, &ctx))
}

/// What a loss makes of the negative log-likelihoods of a micro-batch's counted tokens.
#[derive(Clone, Copy)]
pub enum LossOf<'a> {
    /// Their sum times a factor.
    Sum(f64),
    /// Their sum times a factor, and the likelihoods of tokens of the adapter's prompt, each times its own.
    WithPrompt(f64, &'a [PromptTarget]),
    /// Any function of them: here its derivative by each, given all of them in the order of [`Batch::targets`].
    Weighed(&'a dyn Fn(&[f32]) -> Vec<f64>),
}

impl std::fmt::Debug for LossOf<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sum(scale) => f.debug_tuple("Sum").field(scale).finish(),
            Self::WithPrompt(scale, targets) => f.debug_tuple("WithPrompt").field(scale).field(targets).finish(),
            Self::Weighed(_) => f.debug_tuple("Weighed").finish_non_exhaustive(),
        }
    }
}

impl From<f64> for LossOf<'_> {
    fn from(scale: f64) -> Self {
        Self::Sum(scale)
    }
}

/// Runs a micro-batch forward and backward, adding the gradients of its loss to `grads`: of `scale · Σ nll` where `loss` is a
/// number. `lowest` is the lowest segment with a parameter (0 the embedding, `1..` the blocks).
///
/// # Errors
/// When a tensor operation fails or a label is outside the vocabulary.
pub fn forward_backward<'a, M: Segmented>(
    model: &M,
    batch: &Batch,
    ctx: &Ctx<'_>,
    lowest: usize,
    keep: impl Into<Keep>,
    loss: impl Into<LossOf<'a>>,
    grads: &mut Grads,
) -> Result<Measured> {
    let (keep, loss) = (keep.into(), loss.into());
    let about = About::of(model, batch, None, ctx)?;
    let ctx = &about.ctx(ctx);
    let (blocks, untracked) = (model.num_blocks(), ctx.untracked());
    let of_prompt = match loss {
        LossOf::WithPrompt(_, targets) => targets,
        LossOf::Sum(_) | LossOf::Weighed(_) => &[],
    };
    let (read, targets) = read(batch, of_prompt, ctx)?;
    let input = model.prepare(tokens(batch), ctx)?;
    let run = |i: usize, hidden: &Tensor, ctx: &Ctx<'_>| run_block(model, i, hidden, &read, &input, ctx);
    let (mut hidden, embedding) = if lowest == 0 {
        let (hidden, record) = kernels::record(|| model.embed(tokens(batch), ctx))?;
        (hidden, Some(record).filter(Record::is_tracked))
    } else {
        (model.embed(tokens(batch), &untracked)?, None)
    };

    // What the backward pass needs of each block from the lowest adapted one up.
    let first = lowest.saturating_sub(1).min(blocks);
    let tracked = |block: usize| block > first || lowest == 0;
    let mut saved: Vec<Saved> = Vec::with_capacity(blocks - first);
    for i in 0..blocks {
        if i < first {
            hidden = run(i, &hidden, &untracked)?;
            continue;
        }
        let narrow = keep.narrowed(&hidden)?;
        if let Some(narrow) = &narrow {
            hidden = kernels::convert(narrow, hidden.dtype())?;
        }
        let x = leaf(&hidden, tracked(i))?;
        if keep.checkpointing.keeps(i, blocks) {
            let (out, record) = keep.record(|x| run(i, x, ctx), &x)?;
            saved.push(Saved::Record(record, x.id()));
            hidden = out;
        } else {
            let (out, record) = kernels::record(|| run(i, &x, ctx))?;
            saved.push(Saved::Input { held: narrow.unwrap_or(x.detach()), dtype: x.dtype(), unread: record.unread() });
            hidden = out;
        }
    }

    let needs_below = first < blocks || lowest == 0;
    let own = targets.len() - of_prompt.len();
    let head = Head { rows: hidden.detach(), read: &read, targets: &targets, own, loss: HeadLoss::of(batch) };
    drop(hidden);
    let (measured, d_rows) = head.backward(model, ctx, loss, needs_below, grads)?;
    let Some(mut gradient) = d_rows else { return Ok(measured) };
    drop(head);

    for (i, saved) in (first..blocks).zip(saved).rev().collect::<Vec<_>>() {
        let (record, below) = match saved {
            Saved::Record(record, input) => (record, input),
            Saved::Input { held, dtype, unread } => {
                let x = leaf(&kernels::convert(&held, dtype)?, tracked(i))?;
                (keep.record_again(unread, |x| run(i, x, ctx), &x)?, x.id())
            }
        };
        if !record.is_tracked() {
            // No parameter in this block and none below: nothing further to find.
            break;
        }
        match grads.collect(record.backward(&gradient)?, Some(below))? {
            Some(g) => gradient = g,
            None if i == first && lowest > 0 => return Ok(measured),
            None => {
                return Err(Error::msg(format!("the gradient stops in block {i}: an operation there has no backward")));
            }
        }
    }
    if let Some(record) = embedding {
        grads.collect(record.backward(&gradient)?, None)?;
    }
    Ok(measured)
}

/// A block between its forward and its backward pass.
enum Saved {
    /// What was kept of the forward pass, and which tensor went into it.
    Record(Record, TensorId),
    /// What the block runs on again, the type that it runs in, and what of it need not run.
    Input { held: Tensor, dtype: DType, unread: Unread },
}

/// `hidden` as the input of a block: a variable where its gradient is wanted.
pub(crate) fn leaf(hidden: &Tensor, tracked: bool) -> Result<Tensor> {
    Ok(match (tracked, hidden.is_variable()) {
        (true, true) => hidden.clone(),
        (true, false) => Var::from_tensor(hidden)?.into_inner(),
        (false, _) => hidden.detach(),
    })
}

/// Block `i` on `hidden`; of the last, only the rows that are read.
fn run_block<M: Segmented>(
    model: &M,
    i: usize,
    hidden: &Tensor,
    read: &ReadRows,
    input: &M::Input,
    ctx: &Ctx<'_>,
) -> Result<Tensor> {
    if i + 1 == model.num_blocks() {
        return model.last_block(hidden, read, input, ctx);
    }
    model.block(i, hidden, input, ctx)
}

/// The rows that predict a counted token, and the tokens: the batch's own, then those of a prompt, whose rows lie behind.
fn read(batch: &Batch, of_prompt: &[PromptTarget], ctx: &Ctx<'_>) -> Result<(ReadRows, Vec<u32>)> {
    let mut targets = batch.targets();
    if targets.ids.is_empty() {
        return Err(Error::msg("a batch has no counted token"));
    }
    targets.positions.extend(of_prompt.iter().map(|target| (batch.tokens() + target.place) as u32));
    targets.ids.extend(of_prompt.iter().map(|target| target.id));
    Ok((ReadRows::new(targets.positions, ctx)?, targets.ids))
}

/// What `f` makes of the hidden states that reach the head in a pass without a graph.
fn with_head<M: Segmented, R>(
    model: &M,
    batch: &Batch,
    below: Option<&Below>,
    ctx: &Ctx<'_>,
    f: impl FnOnce(&Head<'_>, &Ctx<'_>) -> Result<R>,
) -> Result<R> {
    let about = About::of(model, batch, below, ctx)?;
    let ctx = &about.ctx(ctx);
    let (read, targets) = read(batch, &[], ctx)?;
    let rows = read_hidden(model, batch, &read, below, ctx)?;
    f(&Head { rows, read: &read, targets: &targets, own: targets.len(), loss: HeadLoss::of(batch) }, ctx)
}

/// What a pass without a graph gives of the rows that are read, `[rows, hidden]`.
fn read_hidden<M: Segmented>(
    model: &M,
    batch: &Batch,
    read: &ReadRows,
    below: Option<&Below>,
    ctx: &Ctx<'_>,
) -> Result<Tensor> {
    let ctx = ctx.untracked();
    let input = model.prepare(tokens(batch), &ctx)?;
    let (lowest, hidden) = match below.and_then(|below| below.hidden.clone()) {
        Some((block, hidden)) => (block, hidden),
        None => (0, model.embed(tokens(batch), &ctx)?),
    };
    let run = |hidden: Tensor, i| run_block(model, i, &hidden, read, &input, &ctx);
    (lowest..model.num_blocks()).try_fold(hidden, run)
}

/// What stays the same between passes over one batch.
#[derive(Debug)]
pub(crate) struct Below {
    /// The lowest block that may change, and what goes into it, `[tokens, hidden]`; nothing where no block is below.
    hidden: Option<(usize, Tensor)>,
    /// What the base alone makes of the batch, where an adapter reads that.
    first: Option<Tensor>,
}

impl Below {
    /// The blocks below `lowest`, the lowest segment with a parameter, and a first pass, run once.
    pub(crate) fn run<M: Segmented>(model: &M, batch: &Batch, lowest: usize, ctx: &Ctx<'_>) -> Result<Self> {
        let about = About::of(model, batch, None, ctx)?;
        // The last block is always run again: it makes only what is read.
        let block = lowest.saturating_sub(1).min(model.num_blocks().saturating_sub(1));
        let hidden = match block {
            0 => None,
            block => Some((block, hidden_before(model, batch, block, &about.ctx(ctx))?)),
        };
        Ok(Self { hidden, first: about.first })
    }

    #[cfg(test)]
    pub(crate) fn runs(&self) -> bool {
        self.hidden.is_some()
    }
}
