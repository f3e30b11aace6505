//! The MLP of a decoder's block.

use candle_core::Tensor;
use peft_core::kernels::{self, Columns, activation, columns, gated_activation};
use peft_core::{Ctx, FrozenLinear, Result};

use super::linear;
use crate::config::{DecoderConfig, MlpLayout};
use crate::loader::Loader;

/// The MLP of one block.
#[derive(Debug)]
pub(super) struct Mlp {
    inner: Inner,
    down: FrozenLinear,
    act: kernels::Activation,
}

/// The layers in front of `down`.
#[derive(Debug)]
enum Inner {
    Gated([FrozenLinear; 2]),
    /// One layer, and which of its outputs are gate and up.
    FusedGate(FrozenLinear, [Columns; 2]),
    Plain(FrozenLinear),
}

impl Mlp {
    pub(super) fn load(l: &mut Loader<'_>, c: &DecoderConfig, path: &str) -> Result<Self> {
        let (hidden, width, bias) = (c.hidden_size, c.intermediate_size, c.mlp_bias);
        let mut into = |name: &str, out: usize| linear(l, c, &format!("{path}.{name}"), hidden, out, bias);
        let (inner, down) = match c.family.layout.mlp {
            MlpLayout::Gated([gate, up, down]) => (Inner::Gated([into(gate, width)?, into(up, width)?]), down),
            MlpLayout::FusedGate([both, down]) => {
                let parts = [0, width].map(|start| Columns { stride: 2 * width, start, width });
                (Inner::FusedGate(into(both, 2 * width)?, parts), down)
            }
            MlpLayout::Plain([up, down]) => (Inner::Plain(into(up, width)?), down),
        };
        let down = linear(l, c, &format!("{path}.{down}"), width, hidden, bias)?;
        Ok(Self { inner, down, act: c.hidden_act.into() })
    }

    /// The last layer.
    pub(super) fn end(&self) -> &FrozenLinear {
        &self.down
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &FrozenLinear> {
        let inner = match &self.inner {
            Inner::Gated(layers) => layers.as_slice(),
            Inner::FusedGate(layer, _) | Inner::Plain(layer) => std::slice::from_ref(layer),
        };
        inner.iter().chain([&self.down])
    }

    /// `[tokens, hidden]` to the same shape.
    pub(super) fn forward(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let inner = match &self.inner {
            Inner::Gated(layers) => {
                let [gate, up] = FrozenLinear::forward_siblings(layers.each_ref(), x, ctx)?;
                gated_activation(&gate, &up, self.act)?
            }
            Inner::FusedGate(layer, [gate, up]) => {
                let both = layer.forward(x, ctx)?;
                gated_activation(&columns(&both, *gate)?, &columns(&both, *up)?, self.act)?
            }
            Inner::Plain(layer) => activation(&layer.forward(x, ctx)?, self.act)?,
        };
        self.down.forward(&inner, ctx)
    }
}
