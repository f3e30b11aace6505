//! X-LoRA (Buehler & Buehler 2024, arXiv:2402.07148): LoRA adapters as experts, weighed token by token, with the formulas, keys and
//! starts of PEFT (`peft/tuners/xlora`, 0.21.2).
//!
//! A first pass through the base alone gives the last hidden state `h` of each token ([`peft_core::first_pass`]). A classifier that all
//! layers share makes a weight of it for each expert, `s = softmax(C(h) / T)`, and a layer becomes
//! `y = W x + b + w · Σᵢ scaleᵢ · Bᵢ(Aᵢ(dropoutᵢ(sᵢ ⊙ x)))`. The classifier is trained; the experts stay, unless they are to be trained too.

mod build;
mod classifier;
mod config;
mod files;

use std::sync::Arc;

use candle_core::Tensor;
use peft_core::kernels::{self, ServingForm};
use peft_core::{Ctx, Delta, Error, FrozenLinear, Parameter, PeftModule, Result, SiteId};

use classifier::Classifier;

pub use config::XLoraConfig;
pub use files::{with_experts, write};

/// `peft_type` of an X-LoRA adapter.
pub const PEFT_TYPE: &str = "XLORA";

/// Added to the site of each expert's dropout, so that experts of one layer draw their own.
const SITES_APART: u32 = 1 << 20;

/// One expert at one layer.
#[derive(Debug)]
struct Expert {
    /// Which of all experts.
    number: usize,
    /// `[r, in]`.
    a: Parameter,
    /// `[out, r]`.
    b: Parameter,
    /// Its own scale times that of all.
    scale: f32,
    dropout: f32,
}

impl Expert {
    /// What it adds to the layer's output, `[tokens, out]`, for its weight of each token, `[tokens, 1]`. Since a weight is one number a
    /// token, and dropout acts on elements, it is multiplied where the tokens are narrowest.
    fn forward(&self, x: &Tensor, weight: &Tensor, base: &FrozenLinear, ctx: &Ctx<'_>) -> Result<Tensor> {
        let site = SiteId(base.site().0.wrapping_add(SITES_APART.wrapping_mul(self.number as u32 + 1)));
        let narrow = match ctx.dropout(site, self.dropout) {
            Some(dropout) => {
                kernels::trainable_linear(&kernels::dropout(x, dropout.p, dropout.stream)?, &self.a.get(ctx))?
            }
            None => kernels::trainable_linear(x, &self.a.get(ctx))?,
        };
        let weighed = narrow.broadcast_mul(&(weight * f64::from(self.scale))?)?;
        Ok(kernels::trainable_linear(&weighed, &self.b.get(ctx))?)
    }
}

/// Experts around a frozen linear layer.
#[derive(Debug)]
pub(crate) struct XLoraLinear {
    experts: Vec<Expert>,
    classifier: Arc<Classifier>,
    /// Which of the layers with experts it is.
    layer: usize,
    /// Whether the experts are trained.
    trains_experts: bool,
}

impl PeftModule for XLoraLinear {
    fn forward(&self, base: &FrozenLinear, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let first = ctx.first.ok_or_else(|| {
            Error::site(base.path(), "X-LoRA reads a first pass through the base alone, and none was made")
        })?;
        let weights = self.classifier.weights(first, self.layer, ctx)?;
        let of_experts = if self.trains_experts { *ctx } else { ctx.untracked() };
        let mut y = base.base(x)?;
        for expert in &self.experts {
            let x = x.to_dtype(expert.a.dtype())?;
            let share = expert.forward(&x, &weights.narrow(1, expert.number, 1)?, base, &of_experts)?;
            y = kernels::add(&y, &share.to_dtype(y.dtype())?)?;
        }
        Ok(y)
    }

    fn parameters(&self) -> Vec<&Parameter> {
        let trained = self.experts.iter().filter(|_| self.trains_experts);
        trained.flat_map(|expert| [&expert.a, &expert.b]).collect()
    }

    fn delta(&self, _: &FrozenLinear) -> Result<Delta> {
        Ok(Delta::Unmergeable(
            "X-LoRA weighs its experts anew for every token, which no weight can hold; `peft-cli combine` makes one LoRA of its experts \
             with weights that stay"
                .into(),
        ))
    }

    /// None: what it adds depends on more than the layer's input.
    fn lower(&self, _: &FrozenLinear) -> Result<Option<ServingForm>> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
