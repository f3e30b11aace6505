//! Softmax attention over packed sequences, with memory linear in their lengths.
//!
//! Nothing of size `[heads, queries, keys]` is ever held, forward or backward: the fused CPU kernels keep a tile at a time
//! (FlashAttention-2, Dao 2023, arXiv 2307.08691) and one log-sum-exp per query and head for the backward.

mod backward;
mod cpu;
mod forward;
mod narrow;
mod neutral;
mod plan;
mod simd;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};

use candle_core::{Result, Shape, Tensor};

pub use plan::{AttentionPlan, SequenceSpan};

use crate::cpu::View;
use crate::diff_op::{DiffOp, apply, is_cpu_f32};
use crate::tape::Keeps;

/// `softmax(scale · q·kᵀ) · v` within each sequence of `plan`, heads side by side.
///
/// `q` is `[q_tokens, heads·head_dim]`, `k` and `v` are `[k_tokens, kv_heads·head_dim]`, the result is like `q`. Queries
/// that no sequence has, and queries that see no key, give zeros; keys that no query sees get a zero gradient. Gradients
/// are computed for exactly those of `q`, `k`, `v` that are tracked.
///
/// # Errors
/// When the plan does not fit the tensors: heads and widths, ranges outside the tokens, sequences that share queries or
/// own keys, a window of 0, a soft cap that is not positive.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, plan: &Arc<AttentionPlan>) -> Result<Tensor> {
    plan.validate(q, k, v)?;
    apply(Attention { plan: plan.clone(), lse: OnceLock::new() }, &[q, k, v])
}

struct Attention {
    plan: Arc<AttentionPlan>,
    /// What the fused forward saves for the fused backward.
    lse: OnceLock<Vec<f32>>,
}

impl DiffOp for Attention {
    const NAME: &'static str = "attention";
    const KEEPS: Keeps = Keeps::All;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let [q, k, v] = args else { candle_core::bail!("attention: {} arguments", args.len()) };
        let problem = cpu::Problem::new(&self.plan, q.data, k.data, v.data)?;
        let (out, lse) = forward::forward(&problem);
        // A second forward of the same node gives the same values.
        let _ = self.lse.set(lse);
        Ok((out, q.shape.clone()))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let [q, k, v] = args else { candle_core::bail!("attention: {} arguments", args.len()) };
        neutral::forward(&self.plan, q, k, v)
    }

    fn backward(&self, args: &[Tensor], res: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let ([q, k, v], [needs_q, needs_k, needs_v]) = (args, needs) else {
            candle_core::bail!("attention: {} arguments", args.len())
        };
        let Some(lse) = self.lse.get().filter(|_| is_cpu_f32(grad)) else {
            return neutral::backward(&self.plan, args, res, grad, needs);
        };
        use crate::cpu::with;
        let grads = with(q, |q| {
            with(k, |k| {
                with(v, |v| {
                    with(res, |out| {
                        with(grad, |grad| {
                            let problem = cpu::Problem::new(&self.plan, q.data, k.data, v.data)?;
                            let up = backward::Upstream { out: out.data, grad: grad.data, lse };
                            Ok(backward::backward(&problem, up, [*needs_q, *needs_k, *needs_v]))
                        })
                    })
                })
            })
        })?;
        grads
            .into_iter()
            .zip(args)
            .map(|(g, x)| g.map(|g| crate::cpu::tensor(g, x.shape().clone())).transpose())
            .collect()
    }
}
