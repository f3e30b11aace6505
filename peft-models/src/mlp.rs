//! The MLP of a block, as its [`MlpLayout`] says.

use candle_core::Tensor;
use peft_core::kernels::{self, Columns, activation, columns, gated_activation};
use peft_core::{Ctx, FrozenLinear, Result};

use crate::config::MlpLayout;

/// The MLP of one block.
#[derive(Debug)]
pub(crate) struct Mlp {
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
    /// Loads the layers of `layout` in the order of the forward pass; `linear` loads one of so many inputs and outputs by its
    /// name.
    pub(crate) fn load(
        layout: MlpLayout,
        [hidden, width]: [usize; 2],
        act: kernels::Activation,
        mut linear: impl FnMut(&str, usize, usize) -> Result<FrozenLinear>,
    ) -> Result<Self> {
        let (inner, down) = match layout {
            MlpLayout::Gated([gate, up, down]) => {
                (Inner::Gated([linear(gate, hidden, width)?, linear(up, hidden, width)?]), down)
            }
            MlpLayout::FusedGate([both, down]) => {
                let parts = [0, width].map(|start| Columns { stride: 2 * width, start, width });
                (Inner::FusedGate(linear(both, hidden, 2 * width)?, parts), down)
            }
            MlpLayout::Plain([up, down]) => (Inner::Plain(linear(up, hidden, width)?), down),
        };
        Ok(Self { inner, down: linear(down, width, hidden)?, act })
    }

    /// The last layer.
    pub(crate) fn end(&self) -> &FrozenLinear {
        &self.down
    }

    pub(crate) fn linears(&self) -> impl Iterator<Item = &FrozenLinear> {
        let inner = match &self.inner {
            Inner::Gated(layers) => layers.as_slice(),
            Inner::FusedGate(layer, _) | Inner::Plain(layer) => std::slice::from_ref(layer),
        };
        inner.iter().chain([&self.down])
    }

    /// `[tokens, hidden]` to the same shape.
    pub(crate) fn forward(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
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

impl From<crate::config::Activation> for kernels::Activation {
    fn from(a: crate::config::Activation) -> Self {
        use crate::config::Activation as A;
        match a {
            A::Silu => Self::Silu,
            A::Gelu => Self::Gelu,
            A::GeluTanh => Self::GeluTanh,
            A::Relu => Self::Relu,
            A::ReluSquared => Self::ReluSquared,
            A::QuickGelu => Self::QuickGelu,
        }
    }
}
