//! Blocks of an encoder–decoder: sublayers with a norm in front of each or behind its sum with the residual stream.

use std::sync::Arc;

use candle_core::Tensor;
use peft_core::kernels::AttentionPlan;
use peft_core::{Ctx, FrozenLinear, FrozenNorm, Join, NormKind, Result, SiteId, SublayerKind};

use super::attention::{Attention, Earlier, RelativeBias, SelfInput};
use crate::config::{Seq2SeqConfig, SublayerNames};
use crate::loader::Loader;
use crate::mlp::Mlp;

/// A block of the encoder or, with attention to the encoder, of the decoder.
#[derive(Debug)]
pub(super) struct Block {
    attention: Sublayer<Attention>,
    cross: Option<Sublayer<Attention>>,
    mlp: Sublayer<Mlp>,
    post_norm: bool,
}

/// What a block computes, and its norm.
#[derive(Debug)]
struct Sublayer<T> {
    norm: FrozenNorm,
    layers: T,
}

/// What a block of the decoder sees of the encoder.
#[derive(Debug, Clone, Copy)]
pub(super) enum Encoded<'a> {
    /// Its result `[source tokens, hidden]`, and the context of these rows.
    Hidden(&'a Tensor, &'a Ctx<'a>),
    /// This block's keys and values of it.
    KeysValues(&'a [Tensor; 2]),
}

/// A norm of the family.
pub(super) fn norm(l: &mut Loader<'_>, c: &Seq2SeqConfig, path: &str) -> Result<FrozenNorm> {
    let kind = if c.family.layout.layer_norms { NormKind::Layer } else { NormKind::Rms { offset: 0.0 } };
    l.norm(path, c.hidden_size, kind, c.norm_eps)
}

impl Block {
    /// Loads the block whose modules are under `path`, in the order of the forward pass. The first of a stack gives the
    /// stack's table of biases too, where the family has one.
    pub(super) fn load(
        l: &mut Loader<'_>,
        c: &Seq2SeqConfig,
        path: &str,
        in_decoder: bool,
        is_first: bool,
    ) -> Result<(Self, Option<RelativeBias>)> {
        let layout = &c.family.layout;
        let norm_of = |l: &mut Loader<'_>, names: SublayerNames| norm(l, c, &format!("{path}.{}", names.norm));
        let attention_of = |l: &mut Loader<'_>, names: SublayerNames, with_bias: bool| {
            Attention::load(l, c, &format!("{path}.{}", names.layers), with_bias)
        };
        let attention_norm = norm_of(l, layout.own)?;
        let (layers, bias) = attention_of(l, layout.own, is_first)?;
        let attention = Sublayer { norm: attention_norm, layers };
        let cross = if in_decoder {
            let norm = norm_of(l, layout.cross)?;
            Some(Sublayer { norm, layers: attention_of(l, layout.cross, false)?.0 })
        } else {
            None
        };
        let [of_encoder, of_decoder] = layout.mlp;
        let names = if in_decoder { of_decoder } else { of_encoder };
        let mlp_norm = norm_of(l, names)?;
        let mlp_path = if names.layers.is_empty() { path.to_owned() } else { format!("{path}.{}", names.layers) };
        let mlp = Mlp::load(c.mlp, [c.hidden_size, c.intermediate_size], c.hidden_act.into(), |name, inp, out| {
            l.linear(&format!("{mlp_path}.{name}"), inp, out, layout.biases)
        })?;
        let mlp = Sublayer { norm: mlp_norm, layers: mlp };
        Ok((Self { attention, cross, mlp, post_norm: layout.post_norm }, bias))
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &FrozenLinear> {
        let attentions = std::iter::once(&self.attention).chain(&self.cross).flat_map(|a| a.layers.linears());
        attentions.chain(self.mlp.layers.linears())
    }

    pub(super) fn norms(&self) -> impl Iterator<Item = &FrozenNorm> {
        [&self.attention.norm, &self.mlp.norm].into_iter().chain(self.cross.as_ref().map(|cross| &cross.norm))
    }

    /// The linear layers at the ends of its sublayers.
    pub(super) fn ends(&self) -> impl Iterator<Item = (SublayerKind, SiteId)> {
        let cross = self.cross.iter().map(|cross| (SublayerKind::CrossAttention, cross.layers.o.site()));
        std::iter::once((SublayerKind::Attention, self.attention.layers.o.site()))
            .chain(cross)
            .chain([(SublayerKind::FeedForward, self.mlp.layers.end().site())])
    }

    /// Keys and values that this block of the decoder has of the encoder's result `[source tokens, hidden]`; `None` in the
    /// encoder.
    pub(super) fn keys_values(&self, encoded: &Tensor, ctx: &Ctx<'_>) -> Result<Option<[Tensor; 2]>> {
        self.cross.as_ref().map(|cross| cross.layers.keys_values(encoded, ctx)).transpose()
    }

    /// `[tokens, hidden]` to the same shape. A block of the decoder gets what it sees of the encoder, and who sees what.
    pub(super) fn forward(
        &self,
        hidden: &Tensor,
        (input, bias): (&SelfInput, Option<&RelativeBias>),
        encoder: Option<(Encoded<'_>, &Arc<AttentionPlan>)>,
        ctx: &Ctx<'_>,
        earlier: Earlier<'_>,
    ) -> Result<Tensor> {
        let ctx = &Ctx { sequences: input.sequences(), ..*ctx };
        let Sublayer { norm, layers } = &self.attention;
        let attended = layers.to_itself(&self.before(norm, hidden, ctx)?, input, bias, ctx, earlier)?;
        let mut hidden = self.joined(&layers.o, &attended, hidden, norm, ctx)?;
        if let (Some(Sublayer { norm, layers }), Some((encoded, plan))) = (&self.cross, encoder) {
            let made;
            let keys_values = match encoded {
                Encoded::KeysValues(keys_values) => keys_values,
                Encoded::Hidden(source, of_source) => {
                    made = layers.keys_values(source, of_source)?;
                    &made
                }
            };
            let attended = layers.to_encoder(&self.before(norm, &hidden, ctx)?, keys_values, plan, ctx)?;
            hidden = self.joined(&layers.o, &attended, &hidden, norm, ctx)?;
        }
        let Sublayer { norm, layers } = &self.mlp;
        let made = layers.forward(&self.before(norm, &hidden, ctx)?, ctx)?;
        self.joined(layers.end(), &made, &hidden, norm, ctx)
    }

    /// What a sublayer with this norm reads.
    fn before(&self, norm: &FrozenNorm, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        if self.post_norm { Ok(hidden.clone()) } else { norm.forward(hidden, ctx) }
    }

    /// The residual stream behind a sublayer whose last layer is `end`.
    fn joined(
        &self,
        end: &FrozenLinear,
        output: &Tensor,
        residual: &Tensor,
        norm: &FrozenNorm,
        ctx: &Ctx<'_>,
    ) -> Result<Tensor> {
        end.join(&Join { output, residual, norm: self.post_norm.then_some(norm) }, ctx)
    }
}
