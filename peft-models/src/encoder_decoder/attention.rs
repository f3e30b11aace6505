//! Attention of an encoder–decoder: of a stack to itself, with biases for distances, and of the decoder to the encoder.

use std::sync::Arc;

use candle_core::Tensor;
use peft_core::kernels::{AttentionPlan, SequenceSpan, attention, biased_attention};
use peft_core::{Ctx, Error, FrozenEmbedding, FrozenLinear, Result, Route};

use crate::config::{Seq2SeqConfig, Seq2SeqPositions};
use crate::kv_cache::LayerCache;
use crate::loader::Loader;
use crate::virtual_rows::VirtualRows;

/// The layers of one attention.
#[derive(Debug)]
pub(super) struct Attention {
    q: FrozenLinear,
    k: FrozenLinear,
    v: FrozenLinear,
    pub(super) o: FrozenLinear,
}

/// What the self-attention of all blocks of a stack shares of one batch.
#[derive(Debug, Clone)]
pub(super) struct SelfInput {
    pub(super) plan: Arc<AttentionPlan>,
    /// The buckets of all distances, the smallest first, and which of them is for distance 0; none where positions are learned.
    buckets: Arc<[u32]>,
    zero: usize,
}

impl SelfInput {
    /// For the sequences of `plan`; an encoder looks at both sides of a token.
    pub(super) fn new(plan: AttentionPlan, positions: &Seq2SeqPositions) -> Self {
        let Seq2SeqPositions::Relative(positions) = positions else {
            return Self { plan: Arc::new(plan), buckets: Arc::default(), zero: 0 };
        };
        let both_sides = !plan.causal;
        let longest = plan.sequences.iter().map(|s| s.prefix.len() + s.keys.len()).max().unwrap_or(0).max(1) as isize;
        let last = if both_sides { longest - 1 } else { 0 };
        let buckets = (1 - longest..=last).map(|distance| positions.bucket(distance, both_sides) as u32).collect();
        Self { plan: Arc::new(plan), buckets, zero: longest as usize - 1 }
    }

    /// Where the rows of each sequence lie.
    pub(super) fn sequences(&self) -> &[SequenceSpan] {
        &self.plan.sequences
    }
}

/// What stands before the tokens of a pass in self-attention.
#[derive(Debug)]
pub(super) enum Earlier<'a> {
    Nothing,
    /// Prefixes of adapters, and which layer this is.
    Prefixes(&'a VirtualRows, usize),
    /// Keys and values of earlier tokens, to which those of these are appended; prefixes that are another thing for each sequence are
    /// written to it too.
    Cache(&'a mut LayerCache, &'a VirtualRows, usize),
}

/// The biases of a stack's distances: a table that its first block holds and all its blocks read.
#[derive(Debug)]
pub(super) struct RelativeBias(FrozenEmbedding);

impl RelativeBias {
    /// The biases of `input`'s distances, `[distances, heads]`. They are of no token, so that they cannot differ between the
    /// adapters of a batch.
    fn of(&self, input: &SelfInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        let Route::Rows(_) = ctx.route else { return self.0.forward(&input.buckets, ctx) };
        if ctx.route.any_slot(|slot| ctx.adapters.at(slot, self.0.site()).is_some()) {
            return Err(Error::site(self.0.path(), "is changed by an adapter, which then serves whole batches only"));
        }
        self.0.base(&input.buckets)
    }

    pub(super) fn table(&self) -> &FrozenEmbedding {
        &self.0
    }
}

impl Attention {
    /// Loads the layers under `path`; the first self-attention of a stack has the table of biases too, where there is one.
    pub(super) fn load(
        l: &mut Loader<'_>,
        c: &Seq2SeqConfig,
        path: &str,
        with_bias: bool,
    ) -> Result<(Self, Option<RelativeBias>)> {
        let (hidden, size) = (c.hidden_size, c.attention_size());
        let [q, k, v, o] = c.family.layout.attention;
        let mut linear = |name: &str, inp, out| l.linear(&format!("{path}.{name}"), inp, out, c.family.layout.biases);
        let (q, k, v) = (linear(q, hidden, size)?, linear(k, hidden, size)?, linear(v, hidden, size)?);
        let bias = match c.positions {
            Seq2SeqPositions::Relative(positions) if with_bias => {
                let path = format!("{path}.relative_attention_bias");
                Some(RelativeBias(l.embedding(&path, positions.buckets, c.num_attention_heads)?))
            }
            _ => None,
        };
        let o = l.linear(&format!("{path}.{o}"), size, hidden, c.family.layout.biases)?;
        Ok((Self { q, k, v, o }, bias))
    }

    pub(super) fn linears(&self) -> [&FrozenLinear; 4] {
        [&self.q, &self.k, &self.v, &self.o]
    }

    /// Attention of `x: [tokens, hidden]` to itself and what is earlier, to the same shape.
    pub(super) fn to_itself(
        &self,
        x: &Tensor,
        input: &SelfInput,
        bias: Option<&RelativeBias>,
        ctx: &Ctx<'_>,
        earlier: Earlier<'_>,
    ) -> Result<Tensor> {
        let [q, k, v] = FrozenLinear::forward_siblings([&self.q, &self.k, &self.v], x, ctx)?;
        let (k, v) = match earlier {
            Earlier::Nothing => (k, v),
            Earlier::Prefixes(rows, layer) => rows.extend(layer, x, (k, v), ctx)?,
            Earlier::Cache(cache, rows, layer) => {
                rows.write_gated(layer, x, cache, ctx)?;
                cache.append(&k, &v, &input.plan.sequences)?;
                (cache.keys().clone(), cache.values().clone())
            }
        };
        let attended = match bias {
            Some(bias) => biased_attention([&q, &k, &v], &bias.of(input, ctx)?, input.zero, &input.plan)?,
            None => attention(&q, &k, &v, &input.plan)?,
        };
        self.o.forward(&attended, ctx)
    }

    /// Keys and values of the encoder's result `[source tokens, hidden]`.
    pub(super) fn keys_values(&self, source: &Tensor, ctx: &Ctx<'_>) -> Result<[Tensor; 2]> {
        FrozenLinear::forward_siblings([&self.k, &self.v], source, ctx)
    }

    /// Attention of `x: [target tokens, hidden]` to the encoder, whose keys and values are given, to the same shape.
    pub(super) fn to_encoder(
        &self,
        x: &Tensor,
        [k, v]: &[Tensor; 2],
        plan: &Arc<AttentionPlan>,
        ctx: &Ctx<'_>,
    ) -> Result<Tensor> {
        let q = self.q.forward(x, ctx)?;
        self.o.forward(&attention(&q, k, v, plan)?, ctx)
    }
}
