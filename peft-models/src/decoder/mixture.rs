//! A mixture of experts in the place of a block's MLP: a router, the MLPs of all experts, and in some families one that all
//! tokens go through.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_core::kernels::{self, Columns, ExpertPlan, add, columns, combine_experts, expert_weights, gated_activation};
use peft_core::{Ctx, FrozenExperts, FrozenLinear, Result, Route};

use super::linear;
use crate::config::{DecoderConfig, ExpertsConfig, ExpertsLayout};
use crate::loader::Loader;
use crate::mlp::Mlp;

/// The mixture of one block.
#[derive(Debug)]
pub(super) struct Mixture {
    router: FrozenLinear,
    gate_up: FrozenExperts,
    down: FrozenExperts,
    shared: Option<Shared>,
    /// Which columns of `gate_up` are the gate's, and which are not.
    parts: [Columns; 2],
    top_k: usize,
    /// Whether the weights of a token's experts are made to add up to one.
    normalise: bool,
    act: kernels::Activation,
}

/// An MLP that all tokens go through, weighted by the sigmoid of a layer of its own.
#[derive(Debug)]
struct Shared {
    mlp: Mlp,
    gate: FrozenLinear,
}

impl Mixture {
    /// Loads the mixture of the block at `path`, in the order of the forward pass.
    pub(super) fn load(
        l: &mut Loader<'_>,
        c: &DecoderConfig,
        experts: &ExpertsConfig,
        layout: &ExpertsLayout,
        path: &str,
    ) -> Result<Self> {
        let (hidden, width, count) = (c.hidden_size, experts.intermediate_size, experts.num_experts);
        let (at, stored) = (format!("{path}.{}", layout.path), format!("{path}.{}", layout.stored));
        let shared = match experts.shared_intermediate_size {
            None => None,
            Some(width) => {
                let mlp = Mlp::load(layout.shared, [hidden, width], c.hidden_act.into(), |name, inp, out| {
                    linear(l, c, &format!("{at}.shared_expert.{name}"), inp, out, false)
                })?;
                Some(Shared { mlp, gate: linear(l, c, &format!("{at}.shared_expert_gate"), hidden, 1, false)? })
            }
        };
        let router = l.router(&format!("{at}.gate"), &format!("{stored}.gate"), hidden, count)?;
        let stored = format!("{stored}.experts");
        let gate_up = format!("{at}.experts.gate_up_proj");
        let gate_up = l.experts(&gate_up, &stored, layout.gate_up, [count, hidden, 2 * width])?;
        let down = l.experts(&format!("{at}.experts.down_proj"), &stored, layout.down, [count, width, hidden])?;
        Ok(Self {
            router,
            gate_up,
            down,
            shared,
            parts: [0, width].map(|start| Columns { stride: 2 * width, start, width }),
            top_k: experts.num_experts_per_tok,
            normalise: experts.norm_topk_prob,
            act: c.hidden_act.into(),
        })
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &FrozenLinear> {
        let shared = self.shared.iter().flat_map(|shared| shared.mlp.linears().chain([&shared.gate]));
        shared.chain([&self.router])
    }

    pub(super) fn experts(&self) -> [&FrozenExperts; 2] {
        [&self.gate_up, &self.down]
    }

    /// `[tokens, hidden]` to the same shape.
    pub(super) fn forward(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let shared = self.shared.as_ref().map(|shared| shared.forward(x, ctx)).transpose()?;
        let logits = self.router.forward(x, ctx)?;
        let mixed = match ctx.route {
            // Runs of tokens through adapters of the experts have experts apart.
            Route::Rows(runs) if self.experts().iter().any(|experts| !experts.is_plain(ctx)) => {
                let parts = runs.iter().map(|(run, slot)| {
                    let route = slot.map_or(Route::Base, Route::Uniform);
                    let of_run = |t: &Tensor| t.narrow(0, run.start, run.len());
                    self.mix(&of_run(x)?, &of_run(&logits)?, &Ctx { route: &route, ..*ctx })
                });
                Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?
            }
            _ => self.mix(x, &logits, ctx)?,
        };
        match shared {
            Some(shared) => Ok(add(&mixed, &shared)?),
            None => Ok(mixed),
        }
    }

    /// What the experts that `logits` choose make of `x`.
    fn mix(&self, x: &Tensor, logits: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let plan = Arc::new(ExpertPlan::new(logits, self.top_k)?);
        let weights = expert_weights(logits, &plan, self.normalise)?;
        let both = self.gate_up.forward(&plan.gather(x)?, &plan, ctx)?;
        let [gate, up] = self.parts;
        let inner = gated_activation(&columns(&both, gate)?, &columns(&both, up)?, self.act)?;
        Ok(combine_experts(&self.down.forward(&inner, &plan, ctx)?, &weights, &plan)?)
    }
}

impl Shared {
    fn forward(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let made = self.mlp.forward(x, ctx)?;
        let gate = self.gate.forward(x, ctx)?.flatten_all()?;
        let weights = (gate.neg()?.exp()? + 1.0)?.recip()?;
        // One expert for all: a weight for each row.
        let everyone = Tensor::zeros((made.dim(0)?, 1), DType::F32, &candle_core::Device::Cpu)?;
        Ok(combine_experts(&made, &weights, &Arc::new(ExpertPlan::new(&everyone, 1)?))?)
    }
}
