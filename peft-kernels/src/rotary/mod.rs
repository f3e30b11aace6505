//! Rotary position embedding (RoFormer, Su et al. 2021, arXiv 2104.09864).

mod cpu;
mod neutral;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use candle_core::{DType, Result, Shape, Tensor};

use crate::cpu::View;
use crate::diff_op::{DiffOp, apply};
use crate::tape::Keeps;

/// Which elements of a head turn together. `rot` is the number of elements that turn at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotaryLayout {
    /// Pairs `(i, i + rot/2)`, as `rotate_half` in transformers (Llama, Qwen, Gemma in HF files).
    Half,
    /// Pairs `(2i, 2i + 1)` (GPT-J, and Llama weights as GGUF files order them).
    Interleaved,
}

/// The angles of a batch: the rows of the cosine and sine tables at its positions.
///
/// Made once a batch and shared by the queries and keys of every layer.
#[derive(Debug)]
pub struct RotaryPlan {
    layout: RotaryLayout,
    head_dim: usize,
    /// `[tokens, rot/2]`, `f32`, on the device of the tables.
    cos: Tensor,
    sin: Tensor,
}

impl RotaryPlan {
    /// Takes the rows of `cos` and `sin` (`[max_positions, rot/2]`, any float type) at the tokens' `positions`.
    ///
    /// `rot ≤ head_dim` elements of each head turn, the rest passes through (partial rotary, GPT-NeoX and Phi). Tables
    /// that carry a scale (YaRN's attention factor) are right too: the backward is the transpose of the forward.
    ///
    /// # Errors
    /// When the tables differ in shape or are wider than a head, or a position is outside them.
    pub fn new(
        cos: &Tensor,
        sin: &Tensor,
        positions: &[u32],
        head_dim: usize,
        layout: RotaryLayout,
    ) -> Result<Arc<Self>> {
        let (max, half) = match cos.dims() {
            [max, half] if sin.dims() == cos.dims() => (*max, *half),
            dims => candle_core::bail!(
                "rotary: cos is {dims:?} and sin {:?}; both are [max_positions, rotary_dim/2]",
                sin.dims()
            ),
        };
        if half == 0 || half.checked_mul(2).is_none_or(|rot| rot > head_dim) {
            candle_core::bail!("rotary: tables for {half} pairs do not fit a head of {head_dim} elements");
        }
        if let Some((i, p)) = positions.iter().enumerate().find(|(_, p)| **p as usize >= max) {
            candle_core::bail!(
                "rotary: token {i} stands at position {p}, but the tables end at {max}; shorten the sequence or build \
                 longer tables (max_position_embeddings)"
            );
        }
        let ids = Tensor::from_slice(positions, positions.len(), cos.device())?;
        let rows = |t: &Tensor| t.detach().to_dtype(DType::F32)?.contiguous()?.index_select(&ids, 0);
        Ok(Arc::new(Self { layout, head_dim, cos: rows(cos)?, sin: rows(sin)? }))
    }

    /// Tokens of the batch.
    pub fn tokens(&self) -> usize {
        self.cos.dims().first().copied().unwrap_or(0)
    }

    /// Pairs of a head that turn.
    fn half(&self) -> usize {
        self.cos.dims().get(1).copied().unwrap_or(0)
    }
}

/// Turns each head of `x` (`[tokens, heads·head_dim]`, any number of heads) by its token's angles.
///
/// A pair `(a, b)` becomes `(a·cos − b·sin, b·cos + a·sin)`; the gradient is turned back.
///
/// # Errors
/// When `x` does not have the plan's tokens or its width is no multiple of the plan's head_dim.
pub fn rotary(x: &Tensor, plan: &Arc<RotaryPlan>) -> Result<Tensor> {
    match x.dims() {
        [tokens, width] if *tokens == plan.tokens() && width.is_multiple_of(plan.head_dim) => {}
        dims => candle_core::bail!(
            "rotary: x has shape {dims:?}, not [{} tokens, heads × head_dim {}]",
            plan.tokens(),
            plan.head_dim
        ),
    }
    apply(Rotary { plan: plan.clone(), turn: Turn::Forward }, &[x])
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Forward,
    Back,
}

struct Rotary {
    plan: Arc<RotaryPlan>,
    turn: Turn,
}

impl Rotary {
    fn fused(&self, x: View<'_>) -> Result<(Vec<f32>, Shape)> {
        let out = crate::cpu::with(&self.plan.cos, |cos| {
            crate::cpu::with(&self.plan.sin, |sin| {
                let heads = cpu::Heads { layout: self.plan.layout, dim: self.plan.head_dim, half: self.plan.half() };
                Ok(cpu::turn(x.data, x.rows()?.1, cos.data, sin.data, heads, self.turn == Turn::Back))
            })
        })?;
        Ok((out, x.shape.clone()))
    }
}

impl DiffOp for Rotary {
    const NAME: &'static str = "rotary";
    const KEEPS: Keeps = Keeps::Nothing;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let [x] = args else { candle_core::bail!("rotary: {} arguments", args.len()) };
        self.fused(*x)
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let [x] = args else { candle_core::bail!("rotary: {} arguments", args.len()) };
        neutral::turn(x, &self.plan, self.turn)
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, args: &[crate::cuda::View<'_>]) -> Result<Option<crate::cuda::Made>> {
        let ([x], plan) = (args, &self.plan) else { return Ok(None) };
        let (tokens, dim, half) = (plan.tokens(), plan.head_dim, plan.half());
        let interleaved = plan.layout == RotaryLayout::Interleaved;
        let heads = peft_cuda::rows::Heads { tokens, heads: x.len() / tokens.max(1) / dim, dim, half, interleaved };
        crate::cuda::rotary::turn(heads, &plan.cos, &plan.sin, x, self.turn == Turn::Back)
    }

    fn backward(&self, _: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        if needs != [true] {
            return Ok(vec![None]);
        }
        let back = Rotary { plan: self.plan.clone(), turn: Turn::Back };
        Ok(vec![Some(apply(back, &[grad])?)])
    }
}
