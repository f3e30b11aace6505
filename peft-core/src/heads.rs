//! What the queries of an attention see beside their sequence, with a softmax apart: the place of Llama-Adapter's prompts.

use std::fmt::{self, Debug};
use std::sync::Arc;

use candle_core::Tensor;

use crate::ctx::{Ctx, Route};
use crate::error::{Context, Result};
use crate::layers::FrozenLinear;
use crate::param::Parameter;
use crate::set::SiteModule;

/// Keys and values, `[rows, kv_heads · head_dim]` each, that the frozen layers of an attention make of `[rows, hidden]`; no rotary
/// embedding is applied to them.
pub type FrozenKeysValues<'a> = dyn Fn(&Tensor) -> Result<(Tensor, Tensor)> + 'a;

/// The heads of an attention in one pass.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    /// The queries as attention takes them, `[tokens, heads · head_dim]`.
    pub queries: &'a Tensor,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Makes keys and values of rows.
    pub keys_values: &'a FrozenKeysValues<'a>,
}

impl Debug for Heads<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { queries, heads, kv_heads, head_dim, .. } = self;
        f.debug_struct("Heads")
            .field("queries", queries)
            .field("heads", heads)
            .field("kv_heads", kv_heads)
            .field("head_dim", head_dim)
            .finish_non_exhaustive()
    }
}

/// A trainable module beside the heads of an attention. It stands at the attention's last linear layer.
pub trait AttentionModule: Send + Sync + Debug {
    /// What is added to the attention's output, `[tokens, hidden]`, where `end` is its last linear layer.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn beside(&self, end: &FrozenLinear, heads: &Heads<'_>, ctx: &Ctx<'_>) -> Result<Tensor>;

    /// The trainable parameters, in the order in which they are stored.
    fn parameters(&self) -> Vec<&Parameter>;
}

impl FrozenLinear {
    /// Whether an adapter of `ctx` has a module beside the heads of the attention that ends here.
    #[must_use]
    pub fn reads_heads(&self, ctx: &Ctx<'_>) -> bool {
        ctx.route.any_slot(|slot| self.attention_module(slot, ctx).is_some())
    }

    /// `output`, which this layer made at the end of its attention, with what modules of `ctx` add beside its heads:
    /// `[tokens, hidden]` to the same shape.
    ///
    /// # Errors
    /// When a tensor operation fails; the message names the site.
    pub fn add_beside(&self, output: Tensor, heads: &Heads<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let through = |output: Tensor, queries: &Tensor, slot: usize, ctx: &Ctx<'_>| {
            let Some(module) = self.attention_module(slot, ctx) else { return Ok(output) };
            let beside = module.beside(self, &Heads { queries, ..*heads }, ctx);
            let beside = beside.with_context(|| self.path().to_string())?;
            Ok(peft_kernels::add(&output, &beside)?)
        };
        match ctx.route {
            Route::Base => Ok(output),
            Route::Uniform(slot) => through(output, heads.queries, *slot, ctx),
            Route::Rows(_) if !self.reads_heads(ctx) => Ok(output),
            Route::Rows(runs) => {
                let parts = runs.iter().map(|(run, slot)| {
                    let output = output.narrow(0, run.start, run.len())?;
                    let Some(slot) = *slot else { return Ok(output) };
                    let queries = heads.queries.narrow(0, run.start, run.len())?;
                    through(output, &queries, slot, &Ctx { route: &Route::Uniform(slot), ..*ctx })
                });
                Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
            }
        }
    }

    fn attention_module<'a>(&self, slot: usize, ctx: &Ctx<'a>) -> Option<&'a Arc<dyn AttentionModule>> {
        match ctx.adapters.at(slot, self.site()).and_then(|a| a.module.as_ref()) {
            Some(SiteModule::Attention(module)) => Some(module),
            _ => None,
        }
    }
}
