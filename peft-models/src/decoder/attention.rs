//! Self-attention of a decoder's block: the layers that make queries, keys and values, what is done to them, the layer behind.

use candle_core::Tensor;
use peft_core::kernels::{Columns, attention, columns, rotary};
use peft_core::{Ctx, Error, FrozenLinear, FrozenNorm, Heads, ReadRows, Result};

use super::{DecoderInput, linear, norm};
use crate::config::{self, DecoderConfig, QueryKeyNorm};
use crate::kv_cache::LayerCache;
use crate::loader::Loader;

/// What the heads of an attention give.
#[derive(Debug)]
pub(super) struct Attended {
    /// `[tokens, heads · head_dim]`, which goes into the last layer.
    pub(super) heads: Tensor,
    /// The queries `[tokens, heads · head_dim]`, where an adapter reads them.
    queries: Option<Tensor>,
}

impl Attended {
    /// Those of `rows` alone.
    pub(super) fn of(self, rows: &ReadRows) -> Result<Self> {
        Ok(Self { heads: rows.of(&self.heads)?, queries: self.queries.map(|q| rows.of(&q)).transpose()? })
    }
}

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
    /// Heads of queries, those of keys and values, and the elements of one.
    shape: [usize; 3],
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
        let kind = c.kind_of_layer.get(layer).copied().unwrap_or(0);
        let shape = [c.num_attention_heads, c.num_key_value_heads, c.head_dim];
        Ok(Self { layer, kind, projections, norms, output, shape })
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

    /// From `[tokens, hidden]` to what the heads give.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        input: &DecoderInput,
        ctx: &Ctx<'_>,
        cache: Option<&mut LayerCache>,
    ) -> Result<Attended> {
        let kind = input.kinds.get(self.kind).ok_or_else(|| Error::msg("the batch was prepared by another model"))?;
        let [mut q, mut k, v] = self.projections.forward(x, ctx)?;
        if let Some([of_q, of_k]) = &self.norms {
            (q, k) = (of_q.forward(&q, ctx)?, of_k.forward(&k, ctx)?);
        }
        if let Some(plan) = &kind.rotary {
            (q, k) = (rotary(&q, plan)?, rotary(&k, plan)?);
        }
        let queries = self.output.reads_heads(ctx).then(|| q.clone());
        let heads = match cache {
            None => {
                let (k, v) = input.virtual_rows.extend(self.layer, x, (k, v), ctx)?;
                attention(&q, &k, &v, &kind.attention)?
            }
            Some(cache) => {
                input.virtual_rows.write_gated(self.layer, x, cache, ctx)?;
                cache.append(&k, &v, &kind.attention.sequences)?;
                attention(&q, cache.keys(), cache.values(), &kind.attention)?
            }
        };
        Ok(Attended { heads, queries })
    }

    /// The last layer, on what the heads gave: `[tokens, hidden]`.
    pub(super) fn finish(&self, attended: &Attended, ctx: &Ctx<'_>) -> Result<Tensor> {
        let output = self.output.forward(&attended.heads, ctx)?;
        let Some(queries) = &attended.queries else { return Ok(output) };
        let keys_values = |rows: &Tensor| self.projections.base_keys_values(rows);
        let [heads, kv_heads, head_dim] = self.shape;
        let heads = Heads { queries, heads, kv_heads, head_dim, keys_values: &keys_values };
        self.output.add_beside(output, &heads, ctx)
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
            config::Projections::FusedByGroup(name) => {
                let (dim, heads) = (c.head_dim, c.num_attention_heads / c.num_key_value_heads.max(1));
                let part = |start: usize, width: usize| Columns { stride: (heads + 2) * dim, start, width };
                let parts = [part(0, heads * dim), part(heads * dim, dim), part((heads + 1) * dim, dim)];
                Self::Fused(fused(l, name)?, parts)
            }
        })
    }

    /// Keys and values that the frozen layers alone make of rows.
    fn base_keys_values(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Split([_, k, v]) => Ok((k.base(x)?, v.base(x)?)),
            Self::Fused(layer, [_, k, v]) => {
                let all = layer.base(x)?;
                Ok((columns(&all, *k)?, columns(&all, *v)?))
            }
        }
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
