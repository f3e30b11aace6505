//! A block: attention and an MLP, each with the norms that its family puts around it, added to the residual stream.

use candle_core::Tensor;
use peft_core::kernels::add;
use peft_core::{BaseLayer, Ctx, FrozenExperts, FrozenLinear, FrozenNorm, Join, ReadRows, Result, SiteId};

use super::attention::{Attended, Attention};
use super::mixture::Mixture;
use super::{DecoderInput, linear, norm};
use crate::config::DecoderConfig;
use crate::kv_cache::LayerCache;
use crate::loader::Loader;
use crate::mlp::Mlp;

/// One block.
#[derive(Debug)]
pub(super) struct Block {
    attention_norms: Norms,
    attention: Attention,
    mlp_norms: Norms,
    feed_forward: FeedForward,
    /// Whether the MLP reads what attention reads, and not what attention made of it.
    parallel: bool,
}

/// The second sublayer.
#[derive(Debug)]
enum FeedForward {
    Mlp(Box<Mlp>),
    Mixture(Box<Mixture>),
}

/// What stands in front of a sublayer and behind it.
#[derive(Debug)]
struct Norms {
    before: Option<FrozenNorm>,
    after: Option<FrozenNorm>,
}

fn apply(norm: Option<&FrozenNorm>, x: Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
    match norm {
        Some(norm) => norm.forward(&x, ctx),
        None => Ok(x),
    }
}

impl Block {
    /// Loads layer `layer`, whose modules are under `path`, in the order of the forward pass.
    pub(super) fn load(l: &mut Loader<'_>, c: &DecoderConfig, layer: usize, path: &str) -> Result<Self> {
        let layout = &c.family.layout;
        let optional = |l: &mut Loader<'_>, name: Option<&str>| {
            name.map(|name| norm(l, c, &format!("{path}.{name}"), c.hidden_size)).transpose()
        };
        let before = optional(l, layout.attention_norms.before)?;
        let attention = Attention::load(l, c, layer, path)?;
        let attention_norms = Norms { before, after: optional(l, layout.attention_norms.after)? };
        let before = optional(l, layout.mlp_norms.before)?;
        let experts = c.experts.as_ref().filter(|experts| experts.is_sparse(layer));
        let feed_forward = match (experts, &layout.experts) {
            (Some(experts), Some(names)) => FeedForward::Mixture(Box::new(Mixture::load(l, c, experts, names, path)?)),
            _ => {
                let widths = [c.hidden_size, c.intermediate_size];
                let mlp = Mlp::load(layout.mlp, widths, c.hidden_act.into(), |name, inp, out| {
                    linear(l, c, &format!("{path}.{name}"), inp, out, c.mlp_bias)
                })?;
                FeedForward::Mlp(Box::new(mlp))
            }
        };
        let mlp_norms = Norms { before, after: optional(l, layout.mlp_norms.after)? };
        Ok(Self { attention_norms, attention, mlp_norms, feed_forward, parallel: c.parallel_residual })
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &FrozenLinear> {
        let (mlp, mixture) = match &self.feed_forward {
            FeedForward::Mlp(mlp) => (Some(mlp.as_ref()), None),
            FeedForward::Mixture(mixture) => (None, Some(mixture)),
        };
        let behind = mlp.into_iter().flat_map(Mlp::linears).chain(mixture.into_iter().flat_map(|m| m.linears()));
        self.attention.linears().chain(behind)
    }

    pub(super) fn experts(&self) -> impl Iterator<Item = &FrozenExperts> {
        let mixture = match &self.feed_forward {
            FeedForward::Mlp(_) => None,
            FeedForward::Mixture(mixture) => Some(mixture.experts()),
        };
        mixture.into_iter().flatten()
    }

    pub(super) fn norms(&self) -> impl Iterator<Item = &FrozenNorm> {
        let around = [&self.attention_norms, &self.mlp_norms].into_iter();
        around.flat_map(|norms| norms.before.iter().chain(&norms.after)).chain(self.attention.norms())
    }

    pub(super) fn layer(&self, site: SiteId) -> Option<BaseLayer<'_>> {
        let linear = self.linears().find(|l| l.site() == site).map(BaseLayer::Linear);
        let norm = || self.norms().find(|n| n.site() == site).map(BaseLayer::Norm);
        let experts = || self.experts().find(|e| e.site() == site).map(BaseLayer::Experts);
        linear.or_else(norm).or_else(experts)
    }

    /// The linear layers at the ends of attention and of the MLP, where each is a sublayer of its own. A mixture ends in no layer.
    pub(super) fn ends(&self) -> Option<(SiteId, SiteId)> {
        match &self.feed_forward {
            FeedForward::Mlp(mlp) if !self.parallel => Some((self.attention.end().site(), mlp.end().site())),
            _ => None,
        }
    }

    /// `[tokens, hidden]` to the same shape; with a `cache`, keys and values are appended to it and read from it.
    pub(super) fn forward(
        &self,
        hidden: &Tensor,
        input: &DecoderInput,
        ctx: &Ctx<'_>,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let ctx = &Ctx { sequences: input.sequences(), ..*ctx };
        let x = apply(self.attention_norms.before.as_ref(), hidden.clone(), ctx)?;
        let attended = self.attention.forward(&x, input, ctx, cache)?;
        self.behind_attention(&attended, hidden, ctx)
    }

    /// Whether an adapter of `ctx` acts on whole sequences here, so that [`Block::forward_rows`] cannot leave rows out.
    pub(super) fn reads_sequences(&self, ctx: &Ctx<'_>) -> bool {
        self.linears().any(|layer| layer.reads_sequences(ctx))
    }

    /// `rows` of what [`Block::forward`] makes without a cache.
    pub(super) fn forward_rows(
        &self,
        hidden: &Tensor,
        rows: &ReadRows,
        input: &DecoderInput,
        ctx: &Ctx<'_>,
    ) -> Result<Tensor> {
        let ctx = &Ctx { sequences: input.sequences(), ..*ctx };
        let x = apply(self.attention_norms.before.as_ref(), hidden.clone(), ctx)?;
        let attended = self.attention.forward(&x, input, ctx, None)?;
        self.behind_attention(&attended.of(rows)?, &rows.of(hidden)?, &rows.ctx(ctx))
    }

    /// From what the heads of attention gave and the block's input to its result.
    fn behind_attention(&self, attended: &Attended, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let attended = self.attention.finish(attended, ctx)?;
        let attended = apply(self.attention_norms.after.as_ref(), attended, ctx)?;
        let join = Join { output: &attended, residual: hidden, norm: None };
        let sum = self.attention.end().join(&join, ctx)?;
        let x = if self.parallel { hidden } else { &sum };
        let norm = match &self.mlp_norms.before {
            None if self.parallel => &self.attention_norms.before,
            own => own,
        };
        let x = apply(norm.as_ref(), x.clone(), ctx)?;
        let made = match &self.feed_forward {
            FeedForward::Mlp(mlp) => mlp.forward(&x, ctx)?,
            FeedForward::Mixture(mixture) => mixture.forward(&x, ctx)?,
        };
        let made = apply(self.mlp_norms.after.as_ref(), made, ctx)?;
        match &self.feed_forward {
            FeedForward::Mlp(mlp) => mlp.end().join(&Join { output: &made, residual: &sum, norm: None }, ctx),
            FeedForward::Mixture(_) => Ok(add(&made, &sum)?),
        }
    }
}
