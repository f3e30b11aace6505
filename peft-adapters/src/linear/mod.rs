//! Series and parallel adapters around linear layers, as LLM-Adapters has them (Hu et al. 2023, arXiv:2304.01933; the formulas and
//! keys are those of `tuners/bottleneck.py` in its fork of PEFT). A series adapter of a layer that leaves the residual stream
//! stands in front of it, one of a layer that leads back to the stream behind it.

mod build;
mod config;

use candle_core::Tensor;
use peft_core::kernels::{self, Activation, ServingForm};
use peft_core::{Ctx, Delta, FrozenLinear, Parameter, PeftModule, Result};

use crate::bottleneck::{Projection, Scaling};

pub use config::{LinearAdapterConfig, foreign};

/// Where an adapter stands to its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// `W(x + A(x)) + b`.
    Input,
    /// `y + A(y)` for `y = Wx + b`.
    Output,
    /// `Wx + b + A(x)`.
    Parallel,
}

/// `A(x) = s · up(act(down(dropout(x))))` beside, in front of or behind a linear layer.
#[derive(Debug)]
pub(crate) struct LinearAdapter {
    side: Side,
    down: Projection,
    activation: Activation,
    up: Projection,
    scaling: Scaling,
    dropout: f32,
}

impl LinearAdapter {
    /// `A(x)`, `[tokens, width]`, in the parameters' type.
    fn network(&self, base: &FrozenLinear, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let dropped = match ctx.dropout(base.site(), self.dropout) {
            Some(dropout) => kernels::dropout(x, dropout.p, dropout.stream)?,
            None => x.clone(),
        };
        let inner = kernels::activation(&self.down.forward(&dropped, ctx)?, self.activation)?;
        self.scaling.of(self.up.forward(&inner, ctx)?, ctx)
    }
}

impl PeftModule for LinearAdapter {
    fn forward(&self, base: &FrozenLinear, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let dtype = self.down.dtype();
        let read = x.to_dtype(dtype)?;
        if self.side == Side::Input {
            let sum = kernels::add(&read, &self.network(base, &read, ctx)?)?;
            return base.base(&sum.to_dtype(x.dtype())?);
        }
        let plain = base.base(x)?;
        let y = plain.to_dtype(dtype)?;
        let made = self.network(base, if self.side == Side::Output { &y } else { &read }, ctx)?;
        Ok(kernels::add(&y, &made)?.to_dtype(plain.dtype())?)
    }

    fn parameters(&self) -> Vec<&Parameter> {
        let projections = self.down.parameters().into_iter().chain(self.up.parameters());
        projections.chain(self.scaling.parameter()).collect()
    }

    fn delta(&self, _: &FrozenLinear) -> Result<Delta> {
        let why = "an adapter with a nonlinearity cannot be merged into a weight; serve it beside the base";
        Ok(Delta::Unmergeable(why.into()))
    }

    fn lower(&self, _: &FrozenLinear) -> Result<Option<ServingForm>> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::DType;
    use peft_core::kernels::FrozenWeight;
    use peft_core::kernels::testing::{close, randn};
    use peft_core::{AdapterSet, Mode, Role, Route, SiteId, StepRng};

    use super::*;
    use crate::bottleneck::Weight;

    fn parameter(seed: u64, shape: &[usize]) -> Parameter {
        Parameter::new(format!("p{seed}"), &randn(seed, shape, 0.7).unwrap(), Role::Plain).unwrap()
    }

    fn adapter(side: Side, width: usize, out: usize, dropout: f32) -> LinearAdapter {
        let projection = |seed, shape: &[usize], bias: bool| Projection {
            weight: Weight::Dense(parameter(seed, shape)),
            bias: bias.then(|| parameter(seed + 1, &shape[..1])),
        };
        LinearAdapter {
            side,
            down: projection(1, &[3, width], side == Side::Output),
            activation: Activation::Tanh,
            up: projection(3, &[out, 3], side == Side::Output),
            scaling: Scaling::Learned(parameter(9, &[1])),
            dropout,
        }
    }

    fn network(a: &LinearAdapter, x: &Tensor) -> Tensor {
        let linear = |p: &Projection, x: &Tensor| {
            let all = p.parameters();
            let y = x.matmul(&all[0].value().t().unwrap()).unwrap();
            all.get(1).map_or(y.clone(), |b| y.broadcast_add(&b.value()).unwrap())
        };
        let up = linear(&a.up, &linear(&a.down, x).tanh().unwrap());
        up.broadcast_mul(&a.scaling.parameter().unwrap().value()).unwrap()
    }

    #[test]
    fn each_side_is_llm_adapters() {
        let (weight, bias) = (randn(20, (4, 6), 1.0).unwrap(), randn(21, 4, 1.0).unwrap());
        let base =
            FrozenLinear::new(SiteId(0), "up_proj", FrozenWeight::dense(&weight).unwrap(), Some(bias.clone())).unwrap();
        let (set, x) = (AdapterSet::empty(), randn(22, (5, 6), 1.0).unwrap());
        let ctx = Ctx::eval(&set, &Route::Base);
        let plain = |x: &Tensor| x.matmul(&weight.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
        for (side, width, out) in [(Side::Input, 6, 6), (Side::Output, 4, 4), (Side::Parallel, 6, 4)] {
            let a = adapter(side, width, out, 0.4);
            let want = match side {
                Side::Input => plain(&(&x + network(&a, &x)).unwrap()),
                Side::Output => (plain(&x) + network(&a, &plain(&x))).unwrap(),
                Side::Parallel => (plain(&x) + network(&a, &x)).unwrap(),
            };
            close(&format!("{side:?}"), &a.forward(&base, &x, &ctx).unwrap(), &want, 1e-5).unwrap();
            let half = a.forward(&base, &x.to_dtype(DType::BF16).unwrap(), &ctx).unwrap();
            assert_eq!(half.dtype(), DType::BF16);
            assert!(a.lower(&base).unwrap().is_none());
            assert!(matches!(a.delta(&base).unwrap(), Delta::Unmergeable(_)));
            let train = Ctx { mode: Mode::Train { track: false }, rng: StepRng { seed: 1, step: 0, run: 0 }, ..ctx };
            let dropped = a.forward(&base, &x, &train).unwrap();
            assert!(close("dropout", &dropped, &want, 1e-3).is_err());
        }
    }
}
