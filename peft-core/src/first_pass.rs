//! What the base alone makes of a batch, for adapters whose modules read it in every layer (X-LoRA).

use candle_core::Tensor;

use crate::ctx::{Ctx, Route};
use crate::error::Result;
use crate::segmented::{Segmented, TokenBatch};

/// The last hidden state `[tokens, hidden]` that the base alone makes of `batch`, untracked: [`Ctx::first`] of the pass through the
/// adapters of `ctx`. `None`, and no work, where none of them reads it.
///
/// # Errors
/// When the batch is malformed or a tensor operation fails.
pub fn first_pass<M: Segmented>(model: &M, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<Option<Tensor>> {
    if !ctx.reads_first_pass() {
        return Ok(None);
    }
    let ctx = Ctx::eval(ctx.adapters, &Route::Base);
    let input = model.prepare(batch, &ctx)?;
    let embedded = model.embed(batch, &ctx)?;
    let hidden = (0..model.num_blocks()).try_fold(embedded, |hidden, i| model.block(i, &hidden, &input, &ctx))?;
    Ok(Some(model.last_hidden_state(&hidden, &ctx)?.detach()))
}
