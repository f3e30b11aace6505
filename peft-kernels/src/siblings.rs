//! Linear layers that read the same input (q, k, v; gate, up), their low-rank adapters made together.
//!
//! Apart, every adapted layer reads the input once for `x·Aᵀ` and once for `dA`, and makes an input gradient of its own
//! that is added to its siblings' in a pass over memory. Together, with the layers' A stacked to `[Σr, in]` and
//! `G = [s₁·dy₁·B₁ …]`: one product for all `x·Aᵀ`, one for all `dA = Gᵀ·x`, and one buffer for
//! `dx = G·A + Σ dyᵢ·Wᵢ`, which every product is added to while it is made.

use std::sync::OnceLock;

use candle_core::{Result, Tensor};

use crate::cpu::{self, Mat};
use crate::diff_op::{Value, is_cpu_f32};
use crate::frozen_gemm::{Addend, LowRankProduct};
use crate::linear::{frozen_linear, with_bias};
use crate::lora::{Dropout, b_gradient, lora_linear};
use crate::tape::{self, MultiOp};
use crate::weight::FrozenWeight;

/// The low-rank change `scale·B(A(dropout(x)))` of a linear layer.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[r, in]`.
    pub a: Tensor,
    /// `[out, r]`.
    pub b: Tensor,
    /// What the product is multiplied with.
    pub scale: f32,
    /// Dropout of the input, for the low-rank part alone.
    pub dropout: Option<Dropout>,
}

/// One of several linear layers that read the same input.
#[derive(Debug, Clone)]
pub struct Branch<'a> {
    /// `[out, in]`.
    pub weight: &'a FrozenWeight,
    /// `[out]`.
    pub bias: Option<&'a Tensor>,
    /// Its adapter, if it has one.
    pub low_rank: Option<LowRank>,
}

/// `x·Wᵢᵀ + biasᵢ + scaleᵢ·Bᵢ(Aᵢ(x))` of every branch, `[tokens, outᵢ]` each, for `x: [tokens, in]`.
///
/// Dropout gives every branch an input of its own; such branches, and those in candle's graph or in another type than
/// `f32`, are run one by one.
///
/// # Errors
/// When shapes do not fit.
pub fn sibling_linears(x: &Tensor, branches: &[Branch<'_>]) -> Result<Vec<Tensor>> {
    let low_ranks = || branches.iter().filter_map(|b| b.low_rank.as_ref());
    let tensors = || std::iter::once(x).chain(low_ranks().flat_map(|l| [&l.a, &l.b]));
    let together = low_ranks().count() > 1
        && low_ranks().all(|l| l.dropout.is_none_or(|d| d.p == 0.0))
        && tensors().all(is_cpu_f32)
        && (tape::is_recording() || !tensors().any(Tensor::track_op));
    if !together {
        return branches
            .iter()
            .map(|b| match &b.low_rank {
                Some(l) => lora_linear(x, b.weight, b.bias, &l.a, &l.b, l.scale, l.dropout),
                None => frozen_linear(x, b.weight, b.bias),
            })
            .collect();
    }
    let op = Siblings::new(x, branches)?;
    tape::run_multi(op, &tensors().map(Tensor::contiguous).collect::<Result<Vec<_>>>()?)
}

/// Arguments are the input and then A and B of every branch that has them.
#[derive(Debug)]
struct Siblings {
    inp: usize,
    branches: Vec<Layer>,
    /// Rows of all A together.
    ranks: usize,
    /// `x·Aᵀ`, `[tokens, Σr]`: kept from the forward pass, since it is small and dB needs it.
    xa: OnceLock<Vec<f32>>,
}

#[derive(Debug)]
struct Layer {
    weight: FrozenWeight,
    bias: Option<Tensor>,
    adapter: Option<Adapter>,
}

/// Where a branch's adapter stands among the others.
#[derive(Debug, Clone, Copy)]
struct Adapter {
    scale: f32,
    rank: usize,
    /// Its first row in the stacked A.
    first: usize,
    /// Its A among the arguments; B follows.
    arg: usize,
}

impl Siblings {
    fn new(x: &Tensor, branches: &[Branch<'_>]) -> Result<Self> {
        let (_, inp) = x.dims2()?;
        let (mut ranks, mut arg) = (0, 1);
        let mut layers = Vec::with_capacity(branches.len());
        for branch in branches {
            let (out, width) = (branch.weight.out_features(), branch.weight.in_features());
            if width != inp {
                candle_core::bail!("sibling_linears: a weight [{out}, {width}] for an input of width {inp}");
            }
            let adapter = match &branch.low_rank {
                None => None,
                Some(low) => {
                    let (rank, a_width) = low.a.dims2()?;
                    if a_width != inp || low.b.dims() != [out, rank] {
                        candle_core::bail!(
                            "sibling_linears: A {:?} and B {:?} do not fit a weight [{out}, {inp}]",
                            low.a.shape(),
                            low.b.shape()
                        );
                    }
                    let adapter = Adapter { scale: low.scale, rank, first: ranks, arg };
                    (ranks, arg) = (ranks + rank, arg + 2);
                    Some(adapter)
                }
            };
            layers.push(Layer { weight: branch.weight.clone(), bias: branch.bias.map(Tensor::detach), adapter });
        }
        Ok(Self { inp, branches: layers, ranks, xa: OnceLock::new() })
    }

    fn adapters(&self) -> impl Iterator<Item = Adapter> {
        self.branches.iter().filter_map(|l| l.adapter)
    }

    /// All A, one below the other: `[Σr, in]`.
    fn stacked(&self, args: &[Tensor]) -> Result<Vec<f32>> {
        let mut stacked = Vec::with_capacity(self.ranks * self.inp);
        for adapter in self.adapters() {
            cpu::with(&args[adapter.arg], |a| {
                stacked.extend_from_slice(a.data);
                Ok(())
            })?;
        }
        Ok(stacked)
    }

    /// `x·Aᵀ` for the stacked A.
    fn shrink(&self, x: &[f32], tokens: usize, args: &[Tensor]) -> Result<Vec<f32>> {
        let a = self.stacked(args)?;
        cpu::gemm(Mat::new(x, tokens, self.inp), Mat::new(&a, self.ranks, self.inp).t(), 1.0)
    }

    /// The columns of one adapter in a `[tokens, Σr]` matrix.
    fn columns<'a>(&self, all: &'a [f32], tokens: usize, adapter: Adapter) -> Mat<'a> {
        Mat::strided(all.get(adapter.first..).unwrap_or_default(), tokens, adapter.rank, self.ranks)
    }

    fn layer(&self, layer: &Layer, x: &[f32], xa: &[f32], tokens: usize, args: &[Tensor]) -> Result<Value> {
        let out = layer.weight.out_features();
        let y = with_bias(layer.bias.as_ref(), |bias| match layer.adapter {
            None => layer.weight.matmul_t_cpu(x, tokens, Addend { low_rank: None, bias }),
            Some(adapter) => cpu::with(&args[adapter.arg + 1], |b| {
                let (x_a, b) = (self.columns(xa, tokens, adapter), Mat::new(b.data, out, adapter.rank));
                let low_rank = Some(LowRankProduct { x: x_a, w: b.t(), scale: adapter.scale });
                layer.weight.matmul_t_cpu(x, tokens, Addend { low_rank, bias })
            }),
        })?;
        Ok(Value::Fused(y, (tokens, out).into()))
    }

    /// `G`, `[tokens, Σr]`: `s·dy·B` of every adapter side by side, zero where no gradient came.
    fn expand(&self, tokens: usize, args: &[Tensor], grads: &[Option<Tensor>]) -> Result<Vec<f32>> {
        let mut g = vec![0f32; tokens * self.ranks];
        for (layer, grad) in self.branches.iter().zip(grads) {
            let (Some(adapter), Some(grad)) = (layer.adapter, grad) else { continue };
            let out = layer.weight.out_features();
            cpu::with(grad, |dy| {
                cpu::with(&args[adapter.arg + 1], |b| {
                    let (dy, b) = (Mat::new(dy.data, tokens, out), Mat::new(b.data, out, adapter.rank));
                    let columns = g.get_mut(adapter.first..).unwrap_or_default();
                    cpu::gemm_into(columns, self.ranks, 0.0, dy, b, adapter.scale, true)
                })
            })?;
        }
        Ok(g)
    }

    fn input_gradient(&self, g: Mat<'_>, args: &[Tensor], grads: &[Option<Tensor>], tokens: usize) -> Result<Vec<f32>> {
        let a = self.stacked(args)?;
        let low_rank = LowRankProduct { x: g, w: Mat::new(&a, self.ranks, self.inp), scale: 1.0 };
        let mut dx: Option<Vec<f32>> = None;
        for (layer, grad) in self.branches.iter().zip(grads) {
            let Some(grad) = grad else { continue };
            dx = Some(cpu::with(grad, |dy| match dx.take() {
                None => layer.weight.matmul_cpu(dy.data, tokens, Addend { low_rank: Some(low_rank), bias: None }),
                Some(mut dx) => layer.weight.add_matmul_cpu(dy.data, tokens, &mut dx).map(|()| dx),
            })?);
        }
        dx.map_or_else(|| low_rank.product(), Ok)
    }
}

impl MultiOp for Siblings {
    const NAME: &'static str = "sibling_linears";

    fn forward(&self, args: &[Tensor]) -> Result<Vec<Value>> {
        let tokens = args[0].dim(0)?;
        cpu::with(&args[0], |x| {
            let xa = self.shrink(x.data, tokens, args)?;
            let layers = self.branches.iter().map(|l| self.layer(l, x.data, &xa, tokens, args));
            let results = layers.collect::<Result<Vec<_>>>()?;
            let _ = self.xa.set(xa);
            Ok(results)
        })
    }

    fn backward(&self, args: &[Tensor], grads: &[Option<Tensor>], needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let tokens = args[0].dim(0)?;
        let mut found: Vec<Option<Tensor>> = vec![None; args.len()];
        let g = self.expand(tokens, args, grads)?;
        let g = Mat::new(&g, tokens, self.ranks);
        cpu::with(&args[0], |x| {
            if self.adapters().any(|l| needs[l.arg]) {
                let da = cpu::gemm(g.t(), Mat::new(x.data, tokens, self.inp), 1.0)?;
                for l in self.adapters().filter(|l| needs[l.arg]) {
                    let rows = &da[l.first * self.inp..][..l.rank * self.inp];
                    found[l.arg] = Some(cpu::tensor(rows.to_vec(), (l.rank, self.inp))?);
                }
            }
            if self.adapters().any(|l| needs[l.arg + 1]) {
                let made;
                let xa = match self.xa.get() {
                    Some(xa) => xa,
                    None => {
                        made = self.shrink(x.data, tokens, args)?;
                        &made
                    }
                };
                for (layer, grad) in self.branches.iter().zip(grads) {
                    let (Some(l), Some(grad)) = (layer.adapter, grad) else { continue };
                    let out = layer.weight.out_features();
                    let columns = self.columns(xa, tokens, l);
                    let db = cpu::with(grad, |dy| b_gradient(columns, Mat::new(dy.data, tokens, out), l.scale))?;
                    found[l.arg + 1] = Some(db);
                }
            }
            if needs[0] {
                found[0] = Some(cpu::tensor(self.input_gradient(g, args, grads, tokens)?, (tokens, self.inp))?);
            }
            Ok(found)
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::philox::Stream;
    use crate::tape::record;
    use crate::testing::{close, randn};
    use candle_core::Var;

    struct Case {
        x: Tensor,
        weights: Vec<FrozenWeight>,
        biases: Vec<Option<Tensor>>,
        low_ranks: Vec<Option<LowRank>>,
    }

    fn var(t: &Tensor) -> Tensor {
        Var::from_tensor(t).unwrap().into_inner()
    }

    /// Three branches of other widths and ranks, one without an adapter if `plain`.
    fn case(tokens: usize, inp: usize, plain: bool, dropout: Option<Dropout>) -> Case {
        let outs = [5, 3, 7];
        let weights = outs
            .iter()
            .enumerate()
            .map(|(i, out)| FrozenWeight::dense(&randn(10 + i as u64, (*out, inp), 0.4).unwrap()).unwrap());
        let low_ranks = outs.iter().enumerate().map(|(i, out)| {
            (!(plain && i == 1)).then(|| LowRank {
                a: var(&randn(20 + i as u64, (i + 1, inp), 0.5).unwrap()),
                b: var(&randn(30 + i as u64, (*out, i + 1), 0.5).unwrap()),
                scale: 0.5 + i as f32,
                dropout,
            })
        });
        Case {
            x: var(&randn(1, (tokens, inp), 1.0).unwrap()),
            weights: weights.collect(),
            biases: vec![Some(randn(2, 5, 0.3).unwrap()), None, None],
            low_ranks: low_ranks.collect(),
        }
    }

    impl Case {
        fn branches(&self) -> Vec<Branch<'_>> {
            let parts = self.weights.iter().zip(&self.biases).zip(&self.low_ranks);
            parts.map(|((weight, b), l)| Branch { weight, bias: b.as_ref(), low_rank: l.clone() }).collect()
        }

        fn one_by_one(&self) -> Vec<Tensor> {
            let all = self.branches();
            all.iter().flat_map(|b| sibling_linears(&self.x, std::slice::from_ref(b)).unwrap()).collect()
        }

        /// Results and gradients of a sum in which every result but those in `skip` has its own weight.
        fn both_ways(&self, f: impl Fn(&Self) -> Vec<Tensor>, skip: usize) -> (Vec<Tensor>, Vec<Option<Tensor>>) {
            let mut results = Vec::new();
            let (out, record) = record(|| -> Result<Tensor> {
                results = f(self);
                let parts = results.iter().enumerate().filter(|(i, _)| *i != skip);
                let sums = parts.map(|(i, y)| y.affine(1.0 + i as f64, 0.0)?.sqr()?.sum_all());
                sums.reduce(|a, b| a? + b?).unwrap()
            })
            .unwrap();
            let grads = record.backward(&out.ones_like().unwrap()).unwrap();
            let of = |t: &Tensor| grads.iter().find(|(id, _)| *id == t.id()).map(|(_, g)| g.clone());
            let parameters = self.low_ranks.iter().flatten().flat_map(|l| [of(&l.a), of(&l.b)]);
            (results, std::iter::once(of(&self.x)).chain(parameters).collect())
        }
    }

    #[test]
    fn together_is_one_by_one() {
        for (tokens, inp) in [(1, 1), (9, 6), (70, 33)] {
            for (plain, skip) in [(false, 9), (true, 9), (false, 0), (true, 2)] {
                let case = case(tokens, inp, plain, None);
                let (want, want_grads) = case.both_ways(Case::one_by_one, skip);
                let (got, got_grads) = case.both_ways(|c| sibling_linears(&c.x, &c.branches()).unwrap(), skip);
                for (got, want) in got.iter().zip(&want) {
                    close("result", got, want, 1e-5).unwrap();
                }
                assert_eq!(got_grads.len(), want_grads.len());
                for (i, (got, want)) in got_grads.iter().zip(&want_grads).enumerate() {
                    match (got, want) {
                        // Sums over all tokens, added in another order.
                        (Some(got), Some(want)) => close(&format!("gradient {i}"), got, want, 5e-4).unwrap(),
                        // A result that nothing reads gives its adapter no gradient, or one of zeros.
                        (Some(got), None) => close("zeros", got, &got.zeros_like().unwrap(), 0.0).unwrap(),
                        (got, want) => assert_eq!(got.is_some(), want.is_some(), "gradient {i}"),
                    }
                }
            }
        }
    }

    #[test]
    fn untracked_and_in_candles_graph() {
        let mut case = case(4, 6, false, None);
        let want = case.one_by_one();
        let graph = sibling_linears(&case.x, &case.branches()).unwrap();
        assert!(graph.iter().all(|y| y.track_op() && !y.is_variable()));
        case.x = case.x.detach();
        for low in case.low_ranks.iter_mut().flatten() {
            (low.a, low.b) = (low.a.detach(), low.b.detach());
        }
        let untracked = sibling_linears(&case.x, &case.branches()).unwrap();
        assert!(untracked.iter().all(|y| !y.track_op()));
        for ((u, g), w) in untracked.iter().zip(&graph).zip(&want) {
            close("untracked", u, w, 1e-5).unwrap();
            close("graph", g, w, 1e-5).unwrap();
        }
    }

    #[test]
    fn dropout_acts_on_every_branch_apart() {
        let dropout = Some(Dropout { p: 0.5, stream: Stream { seed: 1, step: 2, site: 3 } });
        let case = case(8, 6, false, dropout);
        let (want, _) = case.both_ways(Case::one_by_one, 9);
        let (got, _) = case.both_ways(|c| sibling_linears(&c.x, &c.branches()).unwrap(), 9);
        for (got, want) in got.iter().zip(&want) {
            close("dropped", got, want, 0.0).unwrap();
        }
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let mut case = case(2, 6, false, None);
        if let Some(low) = &mut case.low_ranks[2] {
            low.b = randn(1, (6, 3), 1.0).unwrap();
        }
        case.x = case.x.detach();
        let branches: Vec<Branch<'_>> = case
            .branches()
            .into_iter()
            .map(|mut b| {
                if let Some(l) = &mut b.low_rank {
                    (l.a, l.b) = (l.a.detach(), l.b.detach());
                }
                b
            })
            .collect();
        let message = sibling_linears(&case.x, &branches).unwrap_err().to_string();
        assert!(message.contains("B [6, 3]"), "{message}");
    }
}
