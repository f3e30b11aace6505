//! Softmax attention over packed sequences, with memory linear in their lengths.
//!
//! Nothing of size `[heads, queries, keys]` is ever held, forward or backward: the fused CPU kernels keep a tile at a time
//! (FlashAttention-2, Dao 2023, arXiv 2307.08691) and one log-sum-exp per query and head for the backward.

mod backward;
mod bias;
mod cpu;
mod forward;
mod narrow;
mod neutral;
mod plan;
mod simd;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};

use candle_core::{Result, Shape, Storage, Tensor};

pub use plan::{AttentionPlan, SequenceSpan};

use crate::cpu::{View, with};
use crate::diff_op::{DiffOp, apply, is_cpu_f32};
use crate::tape::{Keeps, is_recording};

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
    apply(Attention::new(plan, None), &[q, k, v])
}

/// [`attention`] whose logits get a bias for the distance of query and key: row `zero + (key − query)` of `bias`
/// `[distances, heads]`, with the positions of [`AttentionPlan`]. `bias` has the type of `q`.
///
/// A tracked bias gets its gradient in a recording ([`crate::record`]) only, since candle's graph has no operation of four
/// tensors.
///
/// # Errors
/// As [`attention`]; when the bias lacks a distance that the plan has, when the plan has a soft cap, and for a tracked bias
/// outside a recording.
pub fn biased_attention(
    [q, k, v]: [&Tensor; 3],
    bias: &Tensor,
    zero: usize,
    plan: &Arc<AttentionPlan>,
) -> Result<Tensor> {
    plan.validate(q, k, v)?;
    bias::validate(plan, bias, zero)?;
    if bias.dtype() != q.dtype() {
        candle_core::bail!("attention: q is {:?}, the bias {:?}", q.dtype(), bias.dtype());
    }
    let op = |held| Attention::new(plan, Some(Bias { zero, held }));
    match (bias.track_op(), is_recording()) {
        (false, _) => apply(op(Some(bias.contiguous()?)), &[q, k, v]),
        (true, true) => apply(op(None), &[q, k, v, bias]),
        (true, false) => candle_core::bail!("attention: a bias is trained in a recording only"),
    }
}

struct Attention {
    plan: Arc<AttentionPlan>,
    bias: Option<Bias>,
    /// What the fused forward saves for the fused backward.
    lse: OnceLock<Vec<f32>>,
    /// The same of the CUDA kernel.
    #[cfg(feature = "cuda")]
    lse_on_card: OnceLock<Tensor>,
}

/// A relative bias.
struct Bias {
    zero: usize,
    /// The table, where it is not the fourth argument.
    held: Option<Tensor>,
}

impl Attention {
    fn new(plan: &Arc<AttentionPlan>, bias: Option<Bias>) -> Self {
        Self {
            plan: plan.clone(),
            bias,
            lse: OnceLock::new(),
            #[cfg(feature = "cuda")]
            lse_on_card: OnceLock::new(),
        }
    }

    /// Runs `f` on the bias as CUDA kernels take it, for what follows q, k and v among the arguments.
    #[cfg(feature = "cuda")]
    fn with_bias_on_card<R>(
        &self,
        rest: &[crate::cuda::View<'_>],
        f: impl FnOnce(crate::cuda::attention::Bias<'_>) -> Result<Option<R>>,
    ) -> Result<Option<R>> {
        match (&self.bias, rest) {
            (None, _) => f(None),
            (Some(Bias { zero, held: Some(held) }), _) => {
                crate::cuda::with(&[held], |bias| f(bias.first().map(|bias| (bias, *zero))))
            }
            (Some(Bias { zero, held: None }), [bias, ..]) => f(Some((bias, *zero))),
            (Some(_), []) => Ok(None),
        }
    }

    /// Runs `f` on the problem that fused kernels solve.
    fn with_problem<R>(
        &self,
        [q, k, v]: [&[f32]; 3],
        bias: Option<&[f32]>,
        f: impl FnOnce(&cpu::Problem<'_>) -> R,
    ) -> Result<R> {
        let table = |bias: &[f32], zero| bias::Table::new(bias, self.plan.heads, zero);
        let table = match (&self.bias, bias) {
            (None, _) => None,
            (Some(Bias { zero, held: Some(held) }), _) => Some(with(held, |bias| Ok(table(bias.data, *zero)))?),
            (Some(Bias { zero, held: None }), Some(bias)) => Some(table(bias, *zero)),
            (Some(_), None) => candle_core::bail!("attention: the bias is missing"),
        };
        let problem = cpu::Problem { bias: table.as_ref(), ..cpu::Problem::new(&self.plan, q, k, v)? };
        Ok(f(&problem))
    }

    /// The bias as the neutral form takes it, for what follows q, k and v among the arguments.
    fn neutral_bias<'a>(&'a self, rest: &'a [Tensor]) -> neutral::Bias<'a> {
        let bias = self.bias.as_ref()?;
        Some((bias.held.as_ref().or(rest.first())?, bias.zero))
    }
}

fn missing<T>(args: &[T]) -> candle_core::Error {
    candle_core::Error::Msg(format!("attention: {} arguments", args.len()))
}

impl DiffOp for Attention {
    const NAME: &'static str = "attention";
    const KEEPS: Keeps = Keeps::All;
    const REMEMBERS: bool = true;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let [q, k, v, rest @ ..] = args else { return Err(missing(args)) };
        let bias = rest.first().map(|bias| bias.data);
        let (out, lse) = self.with_problem([q.data, k.data, v.data], bias, forward::forward)?;
        // A second forward of the same node gives the same values.
        let _ = self.lse.set(lse);
        Ok((out, q.shape.clone()))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let [q, k, v, rest @ ..] = args else { return Err(missing(args)) };
        neutral::forward(&self.plan, q, k, v, self.neutral_bias(rest))
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, args: &[crate::cuda::View<'_>]) -> Result<Option<crate::cuda::Made>> {
        let [q, k, v, rest @ ..] = args else { return Ok(None) };
        let made = self.with_bias_on_card(rest, |bias| crate::cuda::attention::forward(&self.plan, [q, k, v], bias))?;
        Ok(made.map(|(out, lse)| {
            let _ = self.lse_on_card.set(lse.tensor());
            out
        }))
    }

    #[cfg(feature = "cuda")]
    fn cuda_backward(
        &self,
        args: &[Tensor],
        res: &Tensor,
        grad: &Tensor,
        needs: &[bool],
    ) -> Result<Option<Vec<Option<Tensor>>>> {
        let Some(lse) = self.lse_on_card.get() else { return Ok(None) };
        crate::cuda::with(&[res, grad, lse].into_iter().chain(args).collect::<Vec<_>>(), |views| {
            let [out, grad, lse, q, k, v, rest @ ..] = views else { return Ok(None) };
            self.with_bias_on_card(rest, |bias| {
                crate::cuda::attention::backward(&self.plan, [q, k, v], bias, [out, grad, lse], needs)
            })
        })
    }

    fn backward(&self, args: &[Tensor], res: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let [q, k, v, rest @ ..] = args else { return Err(missing(args)) };
        let needs = [0, 1, 2, 3].map(|i| needs.get(i).copied().unwrap_or(false));
        let mut grads = match self.lse.get().filter(|_| is_cpu_f32(grad)) {
            None => neutral::backward(&self.plan, [q, k, v], self.neutral_bias(rest), res, grad, needs)?.to_vec(),
            Some(lse) => {
                let found = with_all([q, k, v, res, grad, rest.first().unwrap_or(q)], |[q, k, v, out, grad, bias]| {
                    let bias = rest.first().map(|_| bias);
                    let up = backward::Upstream { out, grad, lse };
                    self.with_problem([q, k, v], bias, |problem| backward::backward(problem, up, needs))
                })?;
                let tensor = |(g, x): (Option<Vec<f32>>, &Tensor)| {
                    g.map(|g| crate::cpu::tensor(g, x.shape().clone())).transpose()
                };
                found.into_iter().zip(args).map(tensor).collect::<Result<Vec<_>>>()?
            }
        };
        grads.truncate(args.len());
        Ok(grads)
    }
}

/// Lends the elements of several tensors.
fn with_all<const N: usize, R>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> Result<R>) -> Result<R> {
    let storages = tensors.map(Tensor::storage_and_layout);
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&storages) {
        *slice = match &**storage {
            Storage::Cpu(storage) => View::new(storage, layout)?.data,
            _ => candle_core::bail!("attention: a CPU kernel got a tensor of another device"),
        };
    }
    f(slices)
}
