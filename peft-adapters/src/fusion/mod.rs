//! AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247): attention over what several frozen bottleneck adapters make at a place,
//! with the formulas, keys and starts of AdapterHub's package (`BertFusion` in `adapters/methods/modeling.py`, 1.3).
//!
//! At every place all adapters read the same `x`, and each makes `uᵢ`. With `q = Q x`, `kᵢ = K uᵢ` and `vᵢ = V uᵢ` the place's
//! result is `Σ softmax(q·kᵢ) vᵢ` on the residual connection of the last adapter, whose placement is the place's. `V` starts as
//! the identity and is held near it (`regularization`).
//!
//! A recipe names the folders of the adapters. What is saved holds them too, frozen, so that it opens without those folders.

mod build;
mod config;
mod regularizer;

use candle_core::Tensor;
use peft_core::kernels;
use peft_core::{Ctx, Join, Parameter, Result, SiteId, SublayerModule};

use crate::bottleneck::{Bottleneck, Projection};

pub use config::FusionConfig;

/// The attention over several adapters at one place.
#[derive(Debug)]
pub(crate) struct Fusion {
    site: SiteId,
    /// Frozen; the last says where they stand.
    members: Vec<Bottleneck>,
    query: Option<Projection>,
    key: Option<Projection>,
    /// Without a bias.
    value: Option<Projection>,
    /// Whether the query is the sublayer's output, where the adapters read more than that.
    query_before_norm: bool,
    /// Whether the residual connection is a part of each adapter's result.
    residual_before: bool,
    value_before_softmax: bool,
    /// Of the scores.
    dropout: f32,
}

fn projected(projection: Option<&Projection>, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
    projection.map_or_else(|| Ok(x.clone()), |p| p.forward(x, ctx))
}

impl Fusion {
    /// The mean of `values`, each weighed by what the query thinks of its key: all `[tokens, hidden]`.
    fn attend(&self, query: &Tensor, made: &[Tensor], ctx: &Ctx<'_>) -> Result<Tensor> {
        let query = projected(self.query.as_ref(), query, ctx)?;
        let scores = made.iter().map(|made| {
            let key = projected(self.key.as_ref(), made, ctx)?;
            Ok(query.mul(&key)?.sum_keepdim(1)?)
        });
        let scores = Tensor::cat(&scores.collect::<Result<Vec<_>>>()?, 1)?;
        let scores = match ctx.dropout(self.site, self.dropout) {
            Some(dropout) => kernels::dropout(&scores, dropout.p, dropout.stream)?,
            None => scores,
        };
        let weights = scores.broadcast_sub(&scores.detach().max_keepdim(1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(1)?)?;
        let mut sum: Option<Tensor> = None;
        for (i, made) in made.iter().enumerate() {
            let value = match &self.value {
                Some(value) if self.value_before_softmax => value.forward(made, ctx)?,
                _ => made.clone(),
            };
            let part = value.broadcast_mul(&weights.narrow(1, i, 1)?)?;
            sum = Some(match sum {
                Some(sum) => kernels::add(&sum, &part)?,
                None => part,
            });
        }
        let sum = sum.unwrap_or(query);
        if self.value_before_softmax { Ok(sum) } else { projected(self.value.as_ref(), &sum, ctx) }
    }

    fn last(&self) -> Result<&Bottleneck> {
        self.members.last().ok_or_else(|| peft_core::Error::msg("a fusion of no adapters"))
    }
}

impl SublayerModule for Fusion {
    fn join(&self, sublayer: &Join<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let (last, frozen) = (self.last()?, ctx.untracked());
        let [read, residual] = last.reads(sublayer, ctx)?;
        let query = if self.query_before_norm { sublayer.output.to_dtype(read.dtype())? } else { read.clone() };
        let mut made = Vec::with_capacity(self.members.len());
        for member in &self.members {
            let one = member.scaled(&read, sublayer.sequences, &frozen)?;
            made.push(if self.residual_before { kernels::add(&one, &residual)? } else { one });
        }
        let mut output = self.attend(&query, &made, ctx)?;
        if !self.residual_before {
            output = kernels::add(&output, &residual)?;
        }
        last.behind(&output, sublayer, ctx)
    }

    fn reads_sequences(&self, ctx: &Ctx<'_>) -> bool {
        self.members.iter().any(|member| member.drops_sequences(ctx))
    }

    fn parameters(&self) -> Vec<&Parameter> {
        [&self.query, &self.key, &self.value].into_iter().flatten().flat_map(Projection::parameters).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;
    use peft_core::kernels::testing::{close, randn};
    use peft_core::{AdapterSet, Role, Route};

    use super::*;
    use crate::bottleneck::testing::bottleneck;
    use crate::bottleneck::{Placement, Residual, Scaling, Weight};

    const HIDDEN: usize = 6;

    fn linear(seed: u64, bias: bool) -> Projection {
        let parameter = |seed: u64, shape: &[usize]| {
            Parameter::new(format!("p{seed}"), &randn(seed, shape, 0.6).unwrap(), Role::Plain).unwrap()
        };
        Projection {
            weight: Weight::Dense(parameter(seed, &[HIDDEN, HIDDEN])),
            bias: bias.then(|| parameter(seed + 1, &[HIDDEN])),
        }
    }

    fn apply(p: Option<&Projection>, x: &[f32]) -> Vec<f32> {
        let Some(p) = p else { return x.to_vec() };
        let all = p.parameters();
        let weight = all[0].value().to_vec2::<f32>().unwrap();
        let bias = all.get(1).map_or(vec![0.0; HIDDEN], |b| b.value().to_vec1().unwrap());
        weight.iter().zip(bias).map(|(row, b)| b + row.iter().zip(x).map(|(a, b)| a * b).sum::<f32>()).collect()
    }

    /// Element by element, over what the adapters make.
    fn reference(fusion: &Fusion, query: &[f32], made: &[Vec<f32>], residual: &[f32]) -> Vec<f32> {
        let add = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<f32>>();
        let made: Vec<Vec<f32>> =
            made.iter().map(|u| if fusion.residual_before { add(u, residual) } else { u.clone() }).collect();
        let query = apply(fusion.query.as_ref(), query);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let scores: Vec<f32> = made.iter().map(|u| dot(&query, &apply(fusion.key.as_ref(), u)).exp()).collect();
        let total: f32 = scores.iter().sum();
        let mut out = vec![0.0; HIDDEN];
        for (u, score) in made.iter().zip(&scores) {
            let value = if fusion.value_before_softmax { apply(fusion.value.as_ref(), u) } else { u.clone() };
            out = add(&out, &value.iter().map(|v| v * score / total).collect::<Vec<f32>>());
        }
        let out = if fusion.value_before_softmax { out } else { apply(fusion.value.as_ref(), &out) };
        if fusion.residual_before { out } else { add(&out, residual) }
    }

    #[test]
    fn a_fusion_is_adapterhubs() {
        let (h, stream) = (randn(7, (4, HIDDEN), 1.0).unwrap(), randn(8, (4, HIDDEN), 1.0).unwrap());
        let set = AdapterSet::empty();
        let ctx = Ctx::eval(&set, &Route::Base);
        let placement = Placement::Sequential { on_stream: true, residual: Residual::Output };
        for flags in 0..32 {
            let flag = |bit: usize| flags >> bit & 1 == 1;
            let members: Vec<Bottleneck> =
                (0..3).map(|i| bottleneck(100 * i, placement, Scaling::Fixed(0.7), [false, false], false)).collect();
            let read = (&h + &stream).unwrap();
            let made: Vec<Vec<Vec<f32>>> =
                members.iter().map(|m| m.scaled(&read, &[], &ctx).unwrap().to_vec2().unwrap()).collect();
            let fusion = Fusion {
                site: SiteId(0),
                members,
                query: flag(0).then(|| linear(50, true)),
                key: Some(linear(60, true)),
                value: flag(1).then(|| linear(70, false)),
                query_before_norm: flag(2),
                residual_before: flag(3),
                value_before_softmax: flag(4),
                dropout: 0.0,
            };
            let rows = |t: &Tensor| t.to_vec2::<f32>().unwrap();
            let queries = if fusion.query_before_norm { rows(&h) } else { rows(&read) };
            let want: Vec<f32> = (0..4)
                .flat_map(|t| {
                    let made: Vec<Vec<f32>> = made.iter().map(|m| m[t].clone()).collect();
                    let out = reference(&fusion, &queries[t], &made, &rows(&h)[t]);
                    out.into_iter().zip(rows(&stream)[t].clone()).map(|(a, b)| a + b).collect::<Vec<f32>>()
                })
                .collect();
            let want = Tensor::from_vec(want, (4, HIDDEN), &Device::Cpu).unwrap();
            let join = Join { output: &h, residual: &stream, norm: None, sequences: &[] };
            close(&format!("flags {flags:b}"), &fusion.join(&join, &ctx).unwrap(), &want, 2e-5).unwrap();
        }
    }
}
