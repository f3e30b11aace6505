//! What experts made, weighted and added back to the tokens that it is of.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor};

use super::ExpertPlan;
use crate::cpu::{self, View, new_rows};
use crate::diff_op::{self, DiffOp, is_cpu_f32};
use crate::tape::Keeps;

/// For each token the sum over its experts of `weights: [pairs]` times the rows of `y: [pairs, width]`: `[tokens, width]`.
///
/// # Errors
/// When rows or weights are not those of the plan.
pub fn combine_experts(y: &Tensor, weights: &Tensor, plan: &Arc<ExpertPlan>) -> Result<Tensor> {
    plan.check_pairs(y.dims2()?.0, Combine::NAME)?;
    plan.check_pairs(weights.dims1()?, Combine::NAME)?;
    diff_op::apply(Combine { plan: plan.clone() }, &[y, &weights.to_dtype(y.dtype())?])
}

struct Combine {
    plan: Arc<ExpertPlan>,
}

impl Combine {
    fn gradients(&self, args: &[Tensor], grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let (pairs, width) = args[0].dims2()?;
        let tokens = self.plan.tokens_of_pairs();
        cpu::with(grad, |grad| {
            let of_pair = |pair: usize| &grad.data[tokens[pair] as usize * width..][..width];
            let dy = needs[0].then(|| {
                cpu::with(&args[1], |w| {
                    let dy = new_rows(pairs * width, width, width, |first, rows| {
                        for (i, row) in rows.chunks_exact_mut(width.max(1)).enumerate() {
                            let pair = first + i;
                            row.iter_mut().zip(of_pair(pair)).for_each(|(d, g)| *d = w.data[pair] * g);
                        }
                    });
                    cpu::tensor(dy, (pairs, width))
                })
            });
            let dw = needs[1].then(|| {
                cpu::with(&args[0], |y| {
                    let dot = |(pair, row): (usize, &[f32])| row.iter().zip(of_pair(pair)).map(|(a, b)| a * b).sum();
                    let dw: Vec<f32> = y.data.chunks_exact(width.max(1)).enumerate().map(dot).collect();
                    cpu::tensor(dw, pairs)
                })
            });
            Ok(vec![dy.transpose()?, dw.transpose()?])
        })
    }
}

impl DiffOp for Combine {
    const NAME: &'static str = "combine_experts";
    const KEEPS: Keeps = Keeps::Arguments;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let (y, w) = (args[0], args[1].data);
        let (_, width) = y.rows()?;
        let (tokens, top_k) = (self.plan.tokens(), self.plan.top_k());
        let out = new_rows(tokens * width, width, width * top_k, |first, rows| {
            let places = self.plan.places().chunks_exact(top_k).skip(first);
            for (out, places) in rows.chunks_exact_mut(width.max(1)).zip(places) {
                out.fill(0.0);
                for &place in places {
                    let (weight, row) = (w[place as usize], &y.data[place as usize * width..][..width]);
                    out.iter_mut().zip(row).for_each(|(sum, y)| *sum += weight * y);
                }
            }
        });
        Ok((out, Shape::from((tokens, width))))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let (y, w) = (&args[0], &args[1]);
        let (_, width) = y.dims2()?;
        if self.plan.pairs() == 0 {
            return Tensor::zeros((0, width), y.dtype(), y.device());
        }
        let places = ExpertPlan::index(self.plan.places(), y.device())?;
        let weighted = y.broadcast_mul(&w.unsqueeze(1)?)?.index_select(&places, 0)?;
        weighted.reshape((self.plan.tokens(), self.plan.top_k(), width))?.sum(1)
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        if is_cpu_f32(&args[0]) && is_cpu_f32(&args[1]) && is_cpu_f32(grad) {
            return self.gradients(args, grad, needs);
        }
        if self.plan.pairs() == 0 {
            return args.iter().zip(needs).map(|(a, n)| n.then(|| a.zeros_like()).transpose()).collect();
        }
        let of_pairs = grad.index_select(&ExpertPlan::index(self.plan.tokens_of_pairs(), grad.device())?, 0)?;
        let dy = needs[0].then(|| of_pairs.broadcast_mul(&args[1].unsqueeze(1)?)).transpose()?;
        let dw = needs[1].then(|| (&of_pairs * &args[0])?.sum(1)).transpose()?;
        Ok(vec![dy, dw])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::test_support::Check;
    use crate::testing::randn;

    #[test]
    fn forms_agree_forward_and_backward() {
        for (tokens, experts, top_k, width) in [(1, 1, 1, 1), (5, 4, 2, 7), (7, 5, 5, 3), (40, 8, 3, 33)] {
            let plan = Arc::new(ExpertPlan::new(&randn(3, (tokens, experts), 1.0).unwrap(), top_k).unwrap());
            let args = [randn(1, (plan.pairs(), width), 1.0).unwrap(), randn(2, plan.pairs(), 1.0).unwrap()];
            Check::new("combine_experts").sums_in_half().run(&args, |a| combine_experts(&a[0], &a[1], &plan)).unwrap();
        }
        let plan = Arc::new(ExpertPlan::new(&randn(3, (2, 3), 1.0).unwrap(), 2).unwrap());
        assert!(combine_experts(&randn(1, (3, 2), 1.0).unwrap(), &randn(1, 4, 1.0).unwrap(), &plan).is_err());
    }
}
