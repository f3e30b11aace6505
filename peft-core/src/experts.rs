//! The frozen weights of the experts of a mixture, at one site.

use std::sync::Arc;

use candle_core::Tensor;
use peft_kernels::{ExpertPlan, FrozenWeight, expert_linear};

use crate::ctx::{Ctx, Route};
use crate::error::{Context, Error, Result};
use crate::set::SiteModule;
use crate::site::SiteId;

/// A frozen linear layer for each expert: what transformers holds as one parameter `[experts, out, in]`.
#[derive(Debug, Clone)]
pub struct FrozenExperts {
    site: SiteId,
    path: Arc<str>,
    weights: Arc<[FrozenWeight]>,
}

impl FrozenExperts {
    /// Experts at `site` with `weights` `[out, in]`, one each.
    ///
    /// # Errors
    /// When there are none, or their shapes differ.
    pub fn new(site: SiteId, path: impl Into<Arc<str>>, weights: Vec<FrozenWeight>) -> Result<Self> {
        let path = path.into();
        let shape = |w: &FrozenWeight| [w.out_features(), w.in_features()];
        let Some(first) = weights.first().map(shape) else { return Err(Error::site(&*path, "has no experts")) };
        if let Some(other) = weights.iter().map(shape).find(|other| *other != first) {
            return Err(Error::Shape { name: path.to_string(), actual: other.to_vec(), expected: first.to_vec() });
        }
        Ok(Self { site, path, weights: weights.into() })
    }

    /// The site's id.
    #[must_use]
    pub fn site(&self) -> SiteId {
        self.site
    }

    /// The parameter's path.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The weights `[out, in]`, one for each expert.
    #[must_use]
    pub fn weights(&self) -> &Arc<[FrozenWeight]> {
        &self.weights
    }

    /// Inputs and outputs of each expert.
    #[must_use]
    pub fn dims(&self) -> (usize, usize) {
        self.weights.first().map_or((0, 0), |w| (w.in_features(), w.out_features()))
    }

    /// The frozen weights alone: `x: [pairs, in]` to `[pairs, out]`, both sorted by expert.
    ///
    /// # Errors
    /// When `x` does not fit.
    pub fn base(&self, x: &Tensor, plan: &Arc<ExpertPlan>) -> Result<Tensor> {
        expert_linear(x, &self.weights, plan).with_context(|| self.path.to_string())
    }

    /// The weights with whatever adapter all tokens of `ctx` have here. Pairs of several adapters would be mixed among those of an
    /// expert: whoever runs a mixture gives each run of a [`Route::Rows`] a plan of its own, where one of them touches its experts.
    ///
    /// # Errors
    /// When a tensor operation fails, or tokens go through several adapters of which one acts here; the message names the site.
    pub fn forward(&self, x: &Tensor, plan: &Arc<ExpertPlan>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let slot = match ctx.route {
            Route::Uniform(slot) => *slot,
            Route::Rows(_) if !self.is_plain(ctx) => {
                return Err(Error::site(&*self.path, "tokens of several adapters in one plan of experts"));
            }
            Route::Base | Route::Rows(_) => return self.base(x, plan),
        };
        match ctx.adapters.at(slot, self.site).and_then(|adapter| adapter.module.as_ref()) {
            None => self.base(x, plan),
            Some(SiteModule::Experts(module)) => {
                module.forward(self, x, plan, ctx).with_context(|| self.path.to_string())
            }
            Some(other) => Err(Error::site(&*self.path, format!("{} on experts", other.kind()))),
        }
    }

    /// Whether no adapter of `ctx` touches the experts.
    #[must_use]
    pub fn is_plain(&self, ctx: &Ctx<'_>) -> bool {
        !ctx.route.any_slot(|slot| ctx.adapters.at(slot, self.site).is_some())
    }
}
