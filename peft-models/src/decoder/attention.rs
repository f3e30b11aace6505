//! Self-attention of a decoder's block: the layers that make queries, keys and values, what is done to them, the layer behind.

use candle_core::Tensor;
use peft_core::kernels::{Columns, attention, columns, rotary};
use peft_core::{Ctx, Error, FrozenLinear, FrozenNorm, Result};

use super::{DecoderInput, linear, norm};
use crate::config::{self, DecoderConfig, QueryKeyNorm};
use crate::kv_cache::LayerCache;
use crate::loader::Loader;

/// The attention of one layer.
#[derive(Debug)]
pub(super) struct Attention {
    layer: usize,
    /// Which of the model's kinds of layers this is.
    kind: usize,
    projections: Projections,
    /// Of queries and of keys.
    norms: Option<[FrozenNorm; 2]>,
    output: FrozenLinear,
}

#[derive(Debug)]
enum Projections {
    Split([FrozenLinear; 3]),
    /// One layer, and which of its outputs are queries, keys and values.
    Fused(FrozenLinear, [Columns; 3]),
}

impl Attention {
    pub(super) fn load(l: &mut Loader<'_>, c: &DecoderConfig, layer: usize, path: &str) -> Result<Self> {
        let layout = &c.family.layout;
        let (hidden, query, key_value) = (c.hidden_size, c.query_size(), c.key_value_size());
        let projections = Projections::load(l, c, path)?;
        let norms = match layout.query_key_norm {
            None => None,
            Some(over) => {
                let [q, k] = match over {
                    QueryKeyNorm::Head => [c.head_dim, c.head_dim],
                    QueryKeyNorm::Token => [query, key_value],
                };
                Some([
                    norm(l, c, &format!("{path}.self_attn.q_norm"), q)?,
                    norm(l, c, &format!("{path}.self_attn.k_norm"), k)?,
                ])
            }
        };
        let output = linear(l, c, &format!("{path}.{}", layout.output), query, hidden, c.output_bias)?;
        Ok(Self { layer, kind: c.kind_of_layer.get(layer).copied().unwrap_or(0), projections, norms, output })
    }

    /// The last layer.
    pub(super) fn end(&self) -> &FrozenLinear {
        &self.output
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &FrozenLinear> {
        let projections = match &self.projections {
            Projections::Split(layers) => layers.as_slice(),
            Projections::Fused(layer, _) => std::slice::from_ref(layer),
        };
        projections.iter().chain([&self.output])
    }

    pub(super) fn norms(&self) -> impl Iterator<Item = &FrozenNorm> {
        self.norms.iter().flatten()
    }

    /// From `[tokens, hidden]` to what the heads give, `[tokens, heads · head_dim]`, which goes into the last layer.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        input: &DecoderInput,
        ctx: &Ctx<'_>,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let kind = input.kinds.get(self.kind).ok_or_else(|| Error::msg("the batch was prepared by another model"))?;
        let [mut q, mut k, v] = self.projections.forward(x, ctx)?;
        if let Some([of_q, of_k]) = &self.norms {
            (q, k) = (of_q.forward(&q, ctx)?, of_k.forward(&k, ctx)?);
        }
        if let Some(plan) = &kind.rotary {
            (q, k) = (rotary(&q, plan)?, rotary(&k, plan)?);
        }
        Ok(match cache {
            None => {
                let (k, v) = input.virtual_rows.extend(self.layer, k, v, ctx)?;
                attention(&q, &k, &v, &kind.attention)?
            }
            Some(cache) => {
                cache.append(&k, &v, &kind.attention.sequences)?;
                attention(&q, cache.keys(), cache.values(), &kind.attention)?
            }
        })
    }
}

impl Projections {
    fn load(l: &mut Loader<'_>, c: &DecoderConfig, path: &str) -> Result<Self> {
        let (hidden, query, key_value, bias) = (c.hidden_size, c.query_size(), c.key_value_size(), c.qkv_bias);
        let total = query + 2 * key_value;
        let fused = |l: &mut Loader<'_>, name: &str| linear(l, c, &format!("{path}.{name}"), hidden, total, bias);
        Ok(match c.family.layout.projections {
            config::Projections::Split([q, k, v]) => {
                let mut one = |name: &str, out: usize| linear(l, c, &format!("{path}.{name}"), hidden, out, bias);
                Self::Split([one(q, query)?, one(k, key_value)?, one(v, key_value)?])
            }
            config::Projections::Fused(name) => {
                let part = |start: usize, width: usize| Columns { stride: total, start, width };
                let parts = [part(0, query), part(query, key_value), part(query + key_value, key_value)];
                Self::Fused(fused(l, name)?, parts)
            }
            config::Projections::FusedByHead(name) => {
                let width = c.head_dim;
                let parts = [0, 1, 2].map(|i| Columns { stride: 3 * width, start: i * width, width });
                Self::Fused(fused(l, name)?, parts)
            }
        })
    }

    /// Queries, keys and values, `[tokens, heads · head_dim]` each.
    fn forward(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<[Tensor; 3]> {
        match self {
            Self::Split(layers) => FrozenLinear::forward_siblings(layers.each_ref(), x, ctx),
            Self::Fused(layer, [q, k, v]) => {
                let all = layer.forward(x, ctx)?;
                Ok([columns(&all, *q)?, columns(&all, *k)?, columns(&all, *v)?])
            }
        }
    }
}
