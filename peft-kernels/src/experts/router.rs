//! The weights of the experts: a softmax over a router's logits.

use std::sync::Arc;

use candle_core::{DType, Result, Shape, Tensor};

use super::ExpertPlan;
use crate::cpu::View;
use crate::diff_op::{self, DiffOp};
use crate::tape::Keeps;

/// The weight of each pair of `plan`, `[pairs]`: the softmax of `logits: [tokens, experts]` over all experts, with `normalise` over
/// those that the token goes to (their probabilities divided by their sum). The gradient goes to the logits; which experts were
/// chosen is a constant.
///
/// Source: `MixtralTopKRouter` and `Qwen3MoeTopKRouter` of transformers.
///
/// # Errors
/// When the logits are not those of the plan.
pub fn expert_weights(logits: &Tensor, plan: &Arc<ExpertPlan>, normalise: bool) -> Result<Tensor> {
    if logits.dims() != [plan.tokens(), plan.experts()] {
        candle_core::bail!("expert_weights: logits {:?} of another plan", logits.shape());
    }
    diff_op::apply(Weights { plan: plan.clone(), normalise }, &[logits])
}

struct Weights {
    plan: Arc<ExpertPlan>,
    normalise: bool,
}

impl Weights {
    /// Calls `f` with each token's logits, its experts and their pairs.
    fn each<'a>(&'a self, logits: &'a [f32], mut f: impl FnMut(usize, &'a [f32], &'a [u32], &'a [u32])) {
        let (experts, top_k) = (self.plan.experts(), self.plan.top_k());
        let choices = self.plan.chosen().chunks_exact(top_k).zip(self.plan.places().chunks_exact(top_k));
        for (token, (row, (chosen, places))) in logits.chunks_exact(experts).zip(choices).enumerate() {
            f(token, row, chosen, places);
        }
    }

    /// The softmax of `row`, `[experts]`, over what counts.
    fn softmax(&self, row: &[f32], chosen: &[u32], out: &mut [f32]) {
        out.fill(0.0);
        let largest = chosen.iter().map(|&e| row[e as usize]).fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0f32;
        let mut add = |expert: usize| {
            out[expert] = (row[expert] - largest).exp();
            sum += out[expert];
        };
        if self.normalise {
            chosen.iter().for_each(|&e| add(e as usize));
        } else {
            (0..row.len()).for_each(&mut add);
        }
        out.iter_mut().for_each(|p| *p /= sum);
    }

    /// The type that the softmax is made in.
    fn wide(logits: &Tensor) -> DType {
        if logits.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
    }

    /// [`Self::softmax`] of all tokens in tensor operations, and the chosen experts, `[tokens, top_k]`.
    fn softmax_neutral(&self, logits: &Tensor) -> Result<(Tensor, Tensor)> {
        let wide = logits.to_dtype(Self::wide(logits))?;
        let chosen = ExpertPlan::index(self.plan.chosen(), logits.device())?;
        let chosen = chosen.reshape((self.plan.tokens(), self.plan.top_k()))?;
        let exps = wide.broadcast_sub(&wide.max_keepdim(1)?)?.exp()?;
        let counted = if self.normalise {
            let ones = Tensor::ones((self.plan.tokens(), self.plan.top_k()), exps.dtype(), exps.device())?;
            (&exps * exps.zeros_like()?.scatter_add(&chosen, &ones, 1)?)?
        } else {
            exps
        };
        let p = counted.broadcast_div(&counted.sum_keepdim(1)?)?;
        Ok((p, chosen))
    }
}

impl DiffOp for Weights {
    const NAME: &'static str = "expert_weights";
    const KEEPS: Keeps = Keeps::Arguments;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let mut out = vec![0f32; self.plan.pairs()];
        let mut p = vec![0f32; self.plan.experts()];
        self.each(args[0].data, |_, row, chosen, places| {
            self.softmax(row, chosen, &mut p);
            for (&expert, &place) in chosen.iter().zip(places) {
                out[place as usize] = p[expert as usize];
            }
        });
        let pairs = out.len();
        Ok((out, Shape::from(pairs)))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let logits = &args[0];
        if self.plan.pairs() == 0 {
            return Tensor::zeros(0, logits.dtype(), logits.device());
        }
        let (p, chosen) = self.softmax_neutral(logits)?;
        // In the order of tokens; `places` says where each goes.
        let of_tokens = p.gather(&chosen, 1)?.flatten_all()?;
        let places = ExpertPlan::index(self.plan.places(), logits.device())?;
        of_tokens.zeros_like()?.scatter_add(&places, &of_tokens, 0)?.to_dtype(logits.dtype())
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        // ∂p_i/∂l_j = p_i (δ_ij − p_j), where p is over the experts that count.
        let logits = &args[0];
        if self.plan.pairs() == 0 {
            return Ok(vec![Some(logits.zeros_like()?)]);
        }
        let (p, chosen) = self.softmax_neutral(logits)?;
        let places = ExpertPlan::index(self.plan.places(), logits.device())?;
        let of_tokens = grad.to_dtype(p.dtype())?.index_select(&places, 0)?.reshape(chosen.shape())?;
        let g = p.zeros_like()?.scatter_add(&chosen, &of_tokens, 1)?;
        let mean = (&p * &g)?.sum_keepdim(1)?;
        Ok(vec![Some((p * g.broadcast_sub(&mean)?)?.to_dtype(logits.dtype())?)])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::test_support::Check;
    use crate::testing::{close, randn};

    #[test]
    fn forms_agree_forward_and_backward() {
        for (tokens, experts, top_k) in [(1, 1, 1), (5, 4, 2), (7, 5, 5), (33, 8, 3)] {
            let logits = randn(3, (tokens, experts), 1.5).unwrap();
            let plan = Arc::new(ExpertPlan::new(&logits, top_k).unwrap());
            for normalise in [false, true] {
                let check = Check::new("expert_weights").reads_a_part();
                check.run(std::slice::from_ref(&logits), |a| expert_weights(&a[0], &plan, normalise)).unwrap();
            }
        }
    }

    #[test]
    fn weights_are_the_probabilities_of_the_chosen() {
        let logits =
            Tensor::new(&[[1f32, 3.0, 2.0, -700.0], [0.0, 0.0, 90.0, 1.0]], &candle_core::Device::Cpu).unwrap();
        let plan = Arc::new(ExpertPlan::new(&logits, 2).unwrap());
        let p = |row: [f64; 4]| {
            let sum: f64 = row.iter().map(|l| l.exp()).sum();
            row.map(|l| (l.exp() / sum) as f32)
        };
        let (a, b) = (p([1.0, 3.0, 2.0, -700.0]), p([0.0, 0.0, 90.0, 1.0]));
        // Sorted by expert: 1 of the first, 2 of both, 3 of the second.
        let want = Tensor::new(&[a[1], a[2], b[2], b[3]], logits.device()).unwrap();
        close("all", &expert_weights(&logits, &plan, false).unwrap(), &want, 1e-6).unwrap();
        let (sa, sb) = (a[1] + a[2], b[2] + b[3]);
        let want = Tensor::new(&[a[1] / sa, a[2] / sa, b[2] / sb, b[3] / sb], logits.device()).unwrap();
        close("chosen", &expert_weights(&logits, &plan, true).unwrap(), &want, 1e-6).unwrap();
        assert!(expert_weights(&randn(1, (2, 5), 1.0).unwrap(), &plan, true).is_err());
    }
}
