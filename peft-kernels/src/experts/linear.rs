//! One linear layer for each expert, each over the rows of its own pairs.
//!
//! With `g = s·dy·B_e` for the rows of expert `e`: `dx = dy·W_e + g·A_e`, `dA_e = gᵀ·x`, `dB_e = s·dyᵀ·(x·A_eᵀ)`, `dW` never.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, Shape, Tensor};

use super::ExpertPlan;
use crate::cpu::{self, Mat, View};
use crate::diff_op::{self, DiffOp, is_cpu_f32};
use crate::frozen_gemm::{Addend, LowRankProduct};
use crate::linear::matrix;
use crate::lora::b_gradient;
use crate::tape::Keeps;
use crate::weight::FrozenWeight;

/// The frozen weights `[out, in]` of all experts.
type Weights = Arc<[FrozenWeight]>;

/// `x·W_eᵀ` for the rows of each expert `e` of `x: [pairs, in]`: `[pairs, out]`, with a gradient for `x` alone.
///
/// # Errors
/// When rows or weights are not those of the plan.
pub fn expert_linear(x: &Tensor, weights: &Weights, plan: &Arc<ExpertPlan>) -> Result<Tensor> {
    let experts = Experts::new(x, weights, plan)?;
    diff_op::apply(Frozen(experts), &[x])
}

/// `x·W_eᵀ + scale·x·A_eᵀ·B_eᵀ` for the rows of each expert `e` of `x: [pairs, in]`: `[pairs, out]`.
///
/// A and B are packed as PEFT packs them (`ParamWrapper.get_delta_weight` in `tuners/lora/layer.py`): `a: [experts · r, in]` with the
/// rows of an expert one after another, `b: [out, r · experts]` with the experts of a direction one after another.
///
/// # Errors
/// When rows, weights or factors are not those of the plan.
pub fn expert_lora_linear(
    x: &Tensor,
    weights: &Weights,
    plan: &Arc<ExpertPlan>,
    a: &Tensor,
    b: &Tensor,
    scale: f32,
) -> Result<Tensor> {
    let experts = Experts::new(x, weights, plan)?;
    let (rows, inp) = a.dims2()?;
    if !rows.is_multiple_of(plan.experts()) || inp != experts.inp || b.dims() != [experts.out, rows] {
        candle_core::bail!(
            "expert_lora_linear: A {:?} and B {:?} do not fit {} weights [{}, {}]",
            a.shape(),
            b.shape(),
            plan.experts(),
            experts.out,
            experts.inp
        );
    }
    diff_op::apply(Lora { rank: rows / plan.experts(), experts, scale }, &[x, a, b])
}

struct Experts {
    weights: Weights,
    plan: Arc<ExpertPlan>,
    inp: usize,
    out: usize,
}

impl Experts {
    fn new(x: &Tensor, weights: &Weights, plan: &Arc<ExpertPlan>) -> Result<Self> {
        let [inp, out] = weights.first().map_or([0, 0], |w| [w.in_features(), w.out_features()]);
        let alike = weights.iter().all(|w| [w.in_features(), w.out_features()] == [inp, out]);
        if weights.len() != plan.experts() || !alike {
            candle_core::bail!("{} weights for {} experts, or of several shapes", weights.len(), plan.experts());
        }
        plan.check_pairs(x.dims2()?.0, "expert_linear")?;
        Ok(Self { weights: weights.clone(), plan: plan.clone(), inp, out })
    }

    /// The experts that have rows, their weights, and which rows.
    fn segments(&self) -> impl Iterator<Item = (usize, &FrozenWeight, Range<usize>)> {
        let segments = self.plan.segments().iter();
        segments.filter_map(|(expert, rows)| Some((*expert, self.weights.get(*expert)?, rows.clone())))
    }

    /// What `f` makes of each expert, one below the other.
    fn stacked(
        &self,
        width: usize,
        mut f: impl FnMut(usize, &FrozenWeight, Range<usize>) -> Result<Vec<f32>>,
    ) -> Result<Vec<f32>> {
        let mut all = Vec::with_capacity(self.plan.pairs() * width);
        for (expert, weight, rows) in self.segments() {
            all.extend_from_slice(&f(expert, weight, rows)?);
        }
        Ok(all)
    }

    /// The same in tensor operations.
    fn cat(
        &self,
        like: &Tensor,
        width: usize,
        f: impl Fn(usize, &FrozenWeight, Range<usize>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let parts =
            self.segments().map(|(expert, weight, rows)| f(expert, weight, rows)).collect::<Result<Vec<_>>>()?;
        if parts.is_empty() {
            return Tensor::zeros((0, width), like.dtype(), like.device());
        }
        Tensor::cat(&parts, 0)
    }
}

/// Some rows of a matrix with rows of `width`.
fn rows_of<'a>(data: &'a [f32], rows: &Range<usize>, width: usize) -> &'a [f32] {
    data.get(rows.start * width..rows.end * width).unwrap_or_default()
}

fn narrow(t: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
    t.narrow(0, rows.start, rows.len())?.contiguous()
}

struct Frozen(Experts);

impl DiffOp for Frozen {
    const NAME: &'static str = "expert_linear";
    const KEEPS: Keeps = Keeps::Nothing;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let Experts { inp, out, .. } = self.0;
        let pairs = matrix(args[0].shape, inp, Self::NAME)?;
        let y = self.0.stacked(out, |_, weight, rows| {
            weight.matmul_t_cpu(rows_of(args[0].data, &rows, inp), rows.len(), Addend::default())
        })?;
        Ok((y, Shape::from((pairs, out))))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        self.0.cat(&args[0], self.0.out, |_, weight, rows| weight.matmul_t(&narrow(&args[0], &rows)?))
    }

    fn backward(&self, _: &[Tensor], _: &Tensor, grad: &Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(self.0.cat(grad, self.0.inp, |_, weight, rows| weight.matmul(&narrow(grad, &rows)?))?)])
    }
}

struct Lora {
    experts: Experts,
    rank: usize,
    scale: f32,
}

impl Lora {
    /// `A_e`, `[r, in]`.
    fn a<'a>(&self, a: &'a [f32], expert: usize) -> Mat<'a> {
        let (r, inp) = (self.rank, self.experts.inp);
        Mat::new(rows_of(a, &(expert * r..(expert + 1) * r), inp), r, inp)
    }

    /// `B_e`, `[out, r]`, one row after another.
    fn b(&self, b: &[f32], expert: usize) -> Vec<f32> {
        let of_row =
            |row: &[f32]| row.chunks_exact(self.experts.plan.experts()).map(|direction| direction[expert]).collect();
        let row = self.rank * self.experts.plan.experts();
        b.chunks_exact(row.max(1)).flat_map(|row| -> Vec<f32> { of_row(row) }).collect()
    }

    /// A and B of one expert in tensor operations.
    fn factors(&self, args: &[Tensor], expert: usize) -> Result<(Tensor, Tensor)> {
        let a = args[1].narrow(0, expert * self.rank, self.rank)?.contiguous()?;
        let b = args[2].reshape((self.experts.out, self.rank, self.experts.plan.experts()))?;
        Ok((a, b.narrow(2, expert, 1)?.squeeze(2)?.contiguous()?))
    }

    fn backward_cpu(&self, args: &[Tensor], grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Experts { inp, out, .. } = self.experts;
        let (r, count, scale) = (self.rank, self.experts.plan.experts(), self.scale);
        // An expert without a token has a gradient of zero.
        let mut da = vec![0f32; if needs[1] { count * r * inp } else { 0 }];
        let mut db = vec![0f32; if needs[2] { out * r * count } else { 0 }];
        let dx = cpu::with(&args[0], |x| {
            cpu::with(&args[1], |a| {
                cpu::with(&args[2], |b| {
                    cpu::with(grad, |grad| {
                        self.experts.stacked(inp, |expert, weight, rows| {
                            let n = rows.len();
                            let dy = rows_of(grad.data, &rows, out);
                            let x = Mat::new(rows_of(x.data, &rows, inp), n, inp);
                            let (a, b) = (self.a(a.data, expert), self.b(b.data, expert));
                            let g = cpu::gemm(Mat::new(dy, n, out), Mat::new(&b, out, r), scale)?;
                            let g = Mat::new(&g, n, r);
                            if needs[1] {
                                let own = &mut da[expert * r * inp..(expert + 1) * r * inp];
                                own.copy_from_slice(&cpu::gemm(g.t(), x, 1.0)?);
                            }
                            if needs[2] {
                                let xa = cpu::gemm(x, a.t(), 1.0)?;
                                let own = b_gradient(Mat::new(&xa, n, r), Mat::new(dy, n, out), scale)?;
                                cpu::with(&own, |own| {
                                    let places = db.iter_mut().skip(expert).step_by(count);
                                    places.zip(own.data).for_each(|(place, value)| *place = *value);
                                    Ok(())
                                })?;
                            }
                            if !needs[0] {
                                return Ok(Vec::new());
                            }
                            let low_rank = Some(LowRankProduct { x: g, w: a, scale: 1.0 });
                            weight.matmul_cpu(dy, n, Addend { low_rank, bias: None })
                        })
                    })
                })
            })
        })?;
        let tensor =
            |needed: bool, data: Vec<f32>, shape: (usize, usize)| needed.then(|| cpu::tensor(data, shape)).transpose();
        Ok(vec![
            tensor(needs[0], dx, (self.experts.plan.pairs(), inp))?,
            tensor(needs[1], da, (count * r, inp))?,
            tensor(needs[2], db, (out, r * count))?,
        ])
    }
}

impl DiffOp for Lora {
    const NAME: &'static str = "expert_lora_linear";
    const KEEPS: Keeps = Keeps::Arguments;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let Experts { inp, out, .. } = self.experts;
        let pairs = matrix(args[0].shape, inp, Self::NAME)?;
        let y = self.experts.stacked(out, |expert, weight, rows| {
            let (x, n) = (rows_of(args[0].data, &rows, inp), rows.len());
            let b = self.b(args[2].data, expert);
            let xa = cpu::gemm(Mat::new(x, n, inp), self.a(args[1].data, expert).t(), 1.0)?;
            let (x_a, w) = (Mat::new(&xa, n, self.rank), Mat::new(&b, out, self.rank).t());
            let low_rank = Some(LowRankProduct { x: x_a, w, scale: self.scale });
            weight.matmul_t_cpu(x, n, Addend { low_rank, bias: None })
        })?;
        Ok((y, Shape::from((pairs, out))))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let dtype = args[1].dtype();
        self.experts.cat(&args[0], self.experts.out, |expert, weight, rows| {
            let (a, b) = self.factors(args, expert)?;
            let x = narrow(&args[0], &rows)?;
            let delta = x.to_dtype(dtype)?.matmul(&a.t()?)?.matmul(&b.t()?)?;
            weight.matmul_t(&x)? + (delta * f64::from(self.scale))?.to_dtype(x.dtype())?
        })
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        if args.iter().all(is_cpu_f32) && is_cpu_f32(grad) {
            return self.backward_cpu(args, grad, needs);
        }
        let (dtype, scale) = (args[1].dtype(), f64::from(self.scale));
        let dx = |expert: usize, weight: &FrozenWeight, rows: Range<usize>| {
            let ((a, b), dy) = (self.factors(args, expert)?, narrow(grad, &rows)?);
            let through = (dy.to_dtype(dtype)?.matmul(&b)?.matmul(&a)? * scale)?;
            weight.matmul(&dy)? + through.to_dtype(dy.dtype())?
        };
        let dx = needs[0].then(|| self.experts.cat(grad, self.experts.inp, dx)).transpose()?;
        let (mut da, mut db) = (Vec::new(), Vec::new());
        let mut segments = self.experts.segments().peekable();
        for expert in 0..self.experts.plan.experts() {
            let (a, b) = self.factors(args, expert)?;
            let Some((_, _, rows)) = segments.next_if(|(of, ..)| *of == expert) else {
                da.push(a.zeros_like()?);
                db.push(b.zeros_like()?);
                continue;
            };
            let (x, dy) = (narrow(&args[0], &rows)?.to_dtype(dtype)?, narrow(grad, &rows)?.to_dtype(dtype)?);
            da.push((dy.matmul(&b)? * scale)?.t()?.matmul(&x)?);
            db.push((dy.t()?.matmul(&x.matmul(&a.t()?)?)? * scale)?);
        }
        let db = needs[2].then(|| Tensor::stack(&db, 2)?.reshape(args[2].shape())).transpose()?;
        Ok(vec![dx, needs[1].then(|| Tensor::cat(&da, 0)).transpose()?, db])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::test_support::Check;
    use crate::testing::{close, randn};

    fn weights(experts: usize, out: usize, inp: usize) -> Weights {
        let weight = |e| FrozenWeight::dense(&randn(10 + e as u64, (out, inp), 0.4).unwrap()).unwrap();
        (0..experts).map(weight).collect()
    }

    fn plan(tokens: usize, experts: usize, top_k: usize) -> Arc<ExpertPlan> {
        Arc::new(ExpertPlan::new(&randn(3, (tokens, experts), 1.0).unwrap(), top_k).unwrap())
    }

    const CASES: [[usize; 6]; 4] = [[1, 1, 1, 1, 1, 1], [5, 4, 2, 7, 3, 2], [3, 6, 1, 5, 4, 3], [40, 4, 3, 20, 33, 4]];

    #[test]
    fn forms_agree_forward_and_backward() {
        for [tokens, experts, top_k, inp, out, r] in CASES {
            let (plan, weights) = (plan(tokens, experts, top_k), weights(experts, out, inp));
            let x = randn(1, (plan.pairs(), inp), 1.0).unwrap();
            let check = || Check::new("experts").sums_in_half().reads_a_part();
            check().run(std::slice::from_ref(&x), |a| expert_linear(&a[0], &weights, &plan)).unwrap();
            let args = [x, randn(2, (experts * r, inp), 0.4).unwrap(), randn(4, (out, r * experts), 0.4).unwrap()];
            check().run(&args, |a| expert_lora_linear(&a[0], &weights, &plan, &a[1], &a[2], 1.5)).unwrap();
        }
    }

    /// `ΔW[e] = einsum("o r e, e r i -> e o i")`.
    #[test]
    fn factors_are_packed_as_in_peft() {
        let [tokens, experts, top_k, inp, out, r] = CASES[1];
        let (plan, weights) = (plan(tokens, experts, top_k), weights(experts, out, inp));
        let x = randn(1, (plan.pairs(), inp), 1.0).unwrap();
        let (a, b) = (randn(2, (experts * r, inp), 1.0).unwrap(), randn(4, (out, r * experts), 1.0).unwrap());
        let y = expert_lora_linear(&x, &weights, &plan, &a, &b, 0.5).unwrap();
        let (a, b) = (a.to_vec2::<f32>().unwrap(), b.to_vec2::<f32>().unwrap());
        for (expert, rows) in plan.segments() {
            let mut dense = weights[*expert].to_dense(candle_core::DType::F32).unwrap().to_vec2::<f32>().unwrap();
            for (o, row) in dense.iter_mut().enumerate() {
                for (i, w) in row.iter_mut().enumerate() {
                    *w += 0.5 * (0..r).map(|j| b[o][j * experts + expert] * a[expert * r + j][i]).sum::<f32>();
                }
            }
            let dense = Tensor::new(dense, x.device()).unwrap();
            let want = narrow(&x, rows).unwrap().matmul(&dense.t().unwrap()).unwrap();
            close("rows", &narrow(&y, rows).unwrap(), &want, 1e-5).unwrap();
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (plan, right) = (plan(5, 4, 2), weights(4, 3, 7));
        let x = randn(1, (10, 7), 1.0).unwrap();
        assert!(expert_linear(&x.narrow(0, 0, 9).unwrap(), &right, &plan).is_err());
        assert!(expert_linear(&x, &weights(3, 3, 7), &plan).is_err());
        assert!(expert_linear(&x, &weights(4, 3, 6), &plan).is_err());
        for (a, b) in [((7, 7), (3, 7)), ((8, 6), (3, 8)), ((8, 7), (3, 4))] {
            let (a, b) = (randn(1, a, 1.0).unwrap(), randn(1, b, 1.0).unwrap());
            let message = expert_lora_linear(&x, &right, &plan, &a, &b, 1.0).unwrap_err().to_string();
            assert!(message.contains("4 weights [3, 7]"), "{message}");
        }
    }
}
