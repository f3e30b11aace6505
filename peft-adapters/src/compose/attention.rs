//! The attention of a fusion (`BertFusion` in `adapters/methods/modeling.py`, 1.3).

use candle_core::Tensor;
use peft_core::kernels;
use peft_core::{Ctx, Parameter, Result, SiteId};

use super::sum;
use crate::bottleneck::Projection;

/// Attention of one head over what several adapters make.
#[derive(Debug)]
pub(super) struct Attention {
    /// For the dropout.
    pub(super) site: SiteId,
    /// `[hidden, hidden]`, as are the others.
    pub(super) query: Option<Projection>,
    pub(super) key: Option<Projection>,
    /// Without a bias.
    pub(super) value: Option<Projection>,
    /// Whether the query is the sublayer's output, where the adapters read more than that.
    pub(super) query_before_norm: bool,
    /// Whether the residual connection is a part of each adapter's result.
    pub(super) residual_before: bool,
    pub(super) value_before_softmax: bool,
    /// Of the scores.
    pub(super) dropout: f32,
}

fn projected(projection: Option<&Projection>, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
    projection.map_or_else(|| Ok(x.clone()), |p| p.forward(x, ctx))
}

impl Attention {
    /// The mean of what was `made`, each weighed by what the query thinks of its key, with the residual connection: all are
    /// `[tokens, hidden]`.
    pub(super) fn forward(
        &self,
        query: &Tensor,
        mut made: Vec<Tensor>,
        residual: &Tensor,
        ctx: &Ctx<'_>,
    ) -> Result<Tensor> {
        if self.residual_before {
            for one in &mut made {
                *one = kernels::add(one, residual)?;
            }
        }
        let output = self.attend(query, &made, ctx)?;
        if self.residual_before { Ok(output) } else { Ok(kernels::add(&output, residual)?) }
    }

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
        let parts = made.iter().enumerate().map(|(i, made)| {
            let value = match &self.value {
                Some(value) if self.value_before_softmax => value.forward(made, ctx)?,
                _ => made.clone(),
            };
            Ok(value.broadcast_mul(&weights.narrow(1, i, 1)?)?)
        });
        let mean = sum(parts)?;
        if self.value_before_softmax { Ok(mean) } else { projected(self.value.as_ref(), &mean, ctx) }
    }

    pub(super) fn parameters(&self) -> Vec<&Parameter> {
        [&self.query, &self.key, &self.value].into_iter().flatten().flat_map(Projection::parameters).collect()
    }
}
