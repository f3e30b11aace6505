//! Where a sublayer (attention, feed-forward network) joins the residual stream: the place of bottleneck adapters.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::Tensor;

use crate::ctx::{Ctx, Route};
use crate::error::{Context, Error, Result};
use crate::layers::{FrozenLinear, FrozenNorm};
use crate::param::Parameter;
use crate::set::SiteModule;
use crate::site::SiteId;

/// What kind of sublayer it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SublayerKind {
    /// Attention with its output projection.
    Attention,
    /// Attention of a decoder to what an encoder made, with its output projection.
    CrossAttention,
    /// The feed-forward network.
    FeedForward,
}

/// A sublayer of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SublayerSite {
    /// The block, from 0.
    pub block: usize,
    /// Which of its sublayers.
    pub kind: SublayerKind,
    /// The linear layer at its end, where the adapter's module stands.
    pub end: SiteId,
    /// Length of the residual stream.
    pub hidden_size: usize,
}

/// The sublayers of a model whose blocks are attention and a feed-forward network, for the linear layers at the ends of both,
/// block by block.
pub fn sublayer_sites(ends: impl Iterator<Item = (SiteId, SiteId)>, hidden_size: usize) -> Vec<SublayerSite> {
    let of_block = |(block, (attention, feed_forward))| {
        [(SublayerKind::Attention, attention), (SublayerKind::FeedForward, feed_forward)]
            .map(|(kind, end)| SublayerSite { block, kind, end, hidden_size })
    };
    ends.enumerate().flat_map(of_block).collect()
}

/// A sublayer's result on its way into the residual stream.
#[derive(Debug, Clone, Copy)]
pub struct Join<'a> {
    /// What the sublayer's last linear layer made, `[tokens, hidden]`.
    pub output: &'a Tensor,
    /// The residual stream that the sublayer read, `[tokens, hidden]`.
    pub residual: &'a Tensor,
    /// In a post-norm model, the norm of their sum.
    pub norm: Option<&'a FrozenNorm>,
}

impl Join<'_> {
    /// The stream `[tokens, hidden]` behind the sublayer without an adapter: the sum, and its norm where there is one.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn plain(&self, ctx: &Ctx<'_>) -> Result<Tensor> {
        self.of(self.output, ctx)
    }

    /// Like [`Join::plain`] for another output of the sublayer.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn of(&self, output: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let sum = peft_kernels::add(self.residual, output)?;
        match self.norm {
            Some(norm) => norm.forward(&sum, ctx),
            None => Ok(sum),
        }
    }
}

/// A trainable module at the end of a sublayer.
pub trait SublayerModule: Send + Sync + Debug {
    /// The residual stream `[tokens, hidden]` behind the sublayer, in place of [`Join::plain`].
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn join(&self, sublayer: &Join<'_>, ctx: &Ctx<'_>) -> Result<Tensor>;

    /// Whether the module has to know which rows are a sequence and what place they have in it ([`Ctx::sequences`]), so that it is
    /// given all rows of a sequence together.
    fn reads_sequences(&self, _ctx: &Ctx<'_>) -> bool {
        false
    }

    /// The trainable parameters, in the order in which they are stored.
    fn parameters(&self) -> Vec<&Parameter>;
}

impl FrozenLinear {
    /// Joins what this layer made at the end of its sublayer to the residual stream, with whatever adapter `ctx` has here.
    ///
    /// # Errors
    /// When a tensor operation fails; the message names the site.
    pub fn join(&self, sublayer: &Join<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let module = |slot: usize| self.sublayer_module(slot, ctx);
        let through = |sublayer: &Join<'_>, slot: Option<usize>, ctx: &Ctx<'_>| match slot.and_then(module) {
            Some(module) => module.join(sublayer, ctx).with_context(|| self.path().to_string()),
            None => sublayer.plain(ctx),
        };
        match ctx.route {
            Route::Base => sublayer.plain(ctx),
            Route::Uniform(slot) => through(sublayer, Some(*slot), ctx),
            Route::Rows(_) if !ctx.route.any_slot(|slot| module(slot).is_some()) => sublayer.plain(ctx),
            Route::Rows(runs) => {
                let parts = runs.iter().map(|(run, slot)| {
                    let (output, residual) = (
                        sublayer.output.narrow(0, run.start, run.len())?,
                        sublayer.residual.narrow(0, run.start, run.len())?,
                    );
                    let route = slot.map_or(Route::Base, Route::Uniform);
                    let sequences = self.sequences_of(run, *slot, ctx)?;
                    let ctx = Ctx { route: &route, sequences: &sequences, ..*ctx };
                    let part = Join { output: &output, residual: &residual, ..*sublayer };
                    through(&part, *slot, &ctx)
                });
                let parts = parts.collect::<Result<Vec<_>>>()?;
                Tensor::cat(&parts, 0).map_err(Error::from)
            }
        }
    }

    fn sublayer_module<'a>(&self, slot: usize, ctx: &Ctx<'a>) -> Option<&'a Arc<dyn SublayerModule>> {
        match ctx.adapters.at(slot, self.site()).and_then(|a| a.module.as_ref()) {
            Some(SiteModule::Sublayer(module)) => Some(module),
            _ => None,
        }
    }
}
