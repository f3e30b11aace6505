//! Blocks of an encoder–decoder: sublayers with a norm in front, each added to the residual stream.

use std::sync::Arc;

use candle_core::Tensor;
use peft_core::kernels::AttentionPlan;
use peft_core::{Ctx, FrozenLinear, FrozenNorm, Join, NormKind, Result, SiteId, SublayerKind};

use super::attention::{Attention, Earlier, RelativeBias, SelfInput};
use crate::config::Seq2SeqConfig;
use crate::loader::Loader;
use crate::mlp::Mlp;

/// A block of the encoder or, with attention to the encoder, of the decoder.
#[derive(Debug)]
pub(super) struct Block {
    attention: Sublayer<Attention>,
    cross: Option<Sublayer<Attention>>,
    mlp: Sublayer<Mlp>,
}

/// What a block computes, and the norm in front of it.
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
    l.norm(path, c.hidden_size, NormKind::Rms { offset: 0.0 }, c.norm_eps)
}

impl Block {
    /// Loads the block whose modules are under `path`, in the order of the forward pass. The first of a stack gives the
    /// stack's table of biases too.
    pub(super) fn load(
        l: &mut Loader<'_>,
        c: &Seq2SeqConfig,
        path: &str,
        in_decoder: bool,
        is_first: bool,
    ) -> Result<(Self, Option<RelativeBias>)> {
        let own_norm = |l: &mut Loader<'_>, sublayer: usize| norm(l, c, &format!("{path}.layer.{sublayer}.layer_norm"));
        let attention_norm = own_norm(l, 0)?;
        let (layers, bias) = Attention::load(l, c, &format!("{path}.layer.0.SelfAttention"), is_first)?;
        let attention = Sublayer { norm: attention_norm, layers };
        let cross = if in_decoder {
            let norm = own_norm(l, 1)?;
            let (layers, _) = Attention::load(l, c, &format!("{path}.layer.1.EncDecAttention"), false)?;
            Some(Sublayer { norm, layers })
        } else {
            None
        };
        let last = 1 + usize::from(in_decoder);
        let mlp_norm = own_norm(l, last)?;
        let mlp = Mlp::load(c.mlp, [c.hidden_size, c.intermediate_size], c.hidden_act.into(), |name, inp, out| {
            l.linear(&format!("{path}.layer.{last}.DenseReluDense.{name}"), inp, out, false)
        })?;
        Ok((Self { attention, cross, mlp: Sublayer { norm: mlp_norm, layers: mlp } }, bias))
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
        (input, bias): (&SelfInput, &RelativeBias),
        encoder: Option<(Encoded<'_>, &Arc<AttentionPlan>)>,
        ctx: &Ctx<'_>,
        earlier: Earlier<'_>,
    ) -> Result<Tensor> {
        let ctx = &Ctx { sequences: input.sequences(), ..*ctx };
        let Sublayer { norm, layers } = &self.attention;
        let attended = layers.to_itself(&norm.forward(hidden, ctx)?, input, bias, ctx, earlier)?;
        let mut hidden = joined(&layers.o, &attended, hidden, ctx)?;
        if let (Some(Sublayer { norm, layers }), Some((encoded, plan))) = (&self.cross, encoder) {
            let made;
            let keys_values = match encoded {
                Encoded::KeysValues(keys_values) => keys_values,
                Encoded::Hidden(source, of_source) => {
                    made = layers.keys_values(source, of_source)?;
                    &made
                }
            };
            let attended = layers.to_encoder(&norm.forward(&hidden, ctx)?, keys_values, plan, ctx)?;
            hidden = joined(&layers.o, &attended, &hidden, ctx)?;
        }
        let Sublayer { norm, layers } = &self.mlp;
        let made = layers.forward(&norm.forward(&hidden, ctx)?, ctx)?;
        joined(layers.end(), &made, &hidden, ctx)
    }
}

/// The residual stream behind a sublayer whose last layer is `end`.
fn joined(end: &FrozenLinear, output: &Tensor, residual: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
    end.join(&Join { output, residual, norm: None }, ctx)
}
