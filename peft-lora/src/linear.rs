//! LoRA on a linear layer, with rsLoRA's scale, a bias on B, and DoRA's magnitude.
//!
//! PiSSA and OLoRA start A and B at a part of the weight and take that part out of the base: `W − s·B₀A₀ + s·BA`. The base
//! is shared here and never changes, so the module keeps A₀ and B₀ and subtracts their product itself.

use candle_core::{DType, Tensor};
use peft_core::kernels::{self, LowRank, ServingForm};
use peft_core::{Ctx, Delta, FrozenLinear, Parameter, PeftModule, Result};

use crate::dora;

/// `y = W x + b + s·(B·A·drop(x) + b_B)`, and DoRA's magnitude over it where it has one.
#[derive(Debug)]
pub struct LoraLinear {
    pub(crate) a: Parameter,
    pub(crate) b: Parameter,
    pub(crate) b_bias: Option<Parameter>,
    pub(crate) magnitude: Option<Parameter>,
    /// A₀ and B₀, where the start is taken out of the base.
    pub(crate) subtracted: Option<(Parameter, Parameter)>,
    pub(crate) scale: f32,
    pub(crate) dropout: f32,
}

impl LoraLinear {
    /// A and B of the whole change to W, untracked: `[A; A₀]` and `[B, −B₀]` where there is a start to subtract.
    fn factors(&self) -> Result<(Tensor, Tensor)> {
        let (a, b) = (self.a.value(), self.b.value());
        Ok(match &self.subtracted {
            None => (a, b),
            Some((a0, b0)) => (Tensor::cat(&[a, a0.value()], 0)?, Tensor::cat(&[b, b0.value().neg()?], 1)?),
        })
    }

    fn delta_weight(&self) -> Result<Tensor> {
        let (a, b) = self.factors()?;
        Ok((b.to_dtype(DType::F32)?.matmul(&a.to_dtype(DType::F32)?)? * f64::from(self.scale))?)
    }

    /// `y` less the start's share. As in PEFT, where it is a part of the base, dropout does not act on it.
    fn subtract(&self, y: Tensor, x: &Tensor) -> Result<Tensor> {
        let Some((a0, b0)) = &self.subtracted else { return Ok(y) };
        let share = kernels::lora_delta(x, &a0.value(), &b0.value(), -self.scale, None)?;
        Ok(kernels::add(&y, &share.to_dtype(y.dtype())?)?)
    }

    /// `m / ‖W + s·BA‖` for each output.
    fn dora_scale(&self, magnitude: &Tensor, base: &FrozenLinear) -> Result<Tensor> {
        let (a, b) = self.factors()?;
        let norm = dora::weight_norm(base.weight(), &a, &b, self.scale)?;
        Ok((magnitude / norm.to_dtype(magnitude.dtype())?)?)
    }
}

impl PeftModule for LoraLinear {
    fn forward(&self, base: &FrozenLinear, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let (a, b) = (self.a.get(ctx), self.b.get(ctx));
        let dropout = ctx.dropout(base.site(), self.dropout);
        let Some(magnitude) = &self.magnitude else {
            let y = kernels::lora_linear(x, base.weight(), base.bias(), &a, &b, self.scale, dropout)?;
            let y = self.subtract(y, x)?;
            return match &self.b_bias {
                Some(bias) => Ok(kernels::add_bias(&y, &(bias.get(ctx) * f64::from(self.scale))?)?),
                None => Ok(y),
            };
        };
        // PEFT: base(x) + (g − 1)·W·drop(x) + g·s·B·A·drop(x), g = m/‖W + sBA‖ with the norm detached. Without
        // dropout that is g ⊙ (W x + sBAx) + b.
        let g = self.dora_scale(&magnitude.get(ctx), base)?;
        let y = match dropout {
            None => {
                let y = kernels::lora_linear(x, base.weight(), None, &a, &b, self.scale, None)?;
                kernels::scale_columns(&self.subtract(y, x)?, &g)?
            }
            Some(d) => {
                let dropped = kernels::dropout(x, d.p, d.stream)?;
                let adapted = kernels::lora_linear(&dropped, base.weight(), None, &a, &b, self.scale, None)?;
                let adapted = self.subtract(adapted, &dropped)?;
                let frozen = self.subtract(kernels::frozen_linear(x, base.weight(), None)?, x)?;
                let again = self.subtract(kernels::frozen_linear(&dropped, base.weight(), None)?, &dropped)?;
                kernels::add(&(frozen - again)?, &kernels::scale_columns(&adapted, &g)?)?
            }
        };
        match base.bias() {
            Some(bias) => Ok(kernels::add_bias(&y, bias)?),
            None => Ok(y),
        }
    }

    fn low_rank(&self, base: &FrozenLinear, ctx: &Ctx<'_>) -> Option<LowRank> {
        if self.magnitude.is_some() || self.b_bias.is_some() || self.subtracted.is_some() {
            return None;
        }
        let dropout = ctx.dropout(base.site(), self.dropout);
        Some(LowRank { a: self.a.get(ctx), b: self.b.get(ctx), scale: self.scale, dropout })
    }

    fn parameters(&self) -> Vec<&Parameter> {
        [&self.a, &self.b].into_iter().chain(&self.b_bias).chain(&self.magnitude).collect()
    }

    fn frozen(&self) -> Vec<&Parameter> {
        self.subtracted.iter().flat_map(|(a, b)| [a, b]).collect()
    }

    fn exported(&self) -> Result<Vec<(String, Tensor)>> {
        let (a, b) = self.factors()?;
        let factors = [(self.a.name().to_string(), a), (self.b.name().to_string(), b)];
        let rest = self.b_bias.iter().chain(&self.magnitude).map(|p| (p.name().to_string(), p.value()));
        Ok(factors.into_iter().chain(rest).collect())
    }

    fn delta(&self, base: &FrozenLinear) -> Result<Delta> {
        let delta = self.delta_weight()?;
        let Some(magnitude) = &self.magnitude else {
            let bias = match &self.b_bias {
                Some(bias) => Some((bias.value().to_dtype(DType::F32)? * f64::from(self.scale))?),
                None => None,
            };
            return Ok(Delta::Add { weight: delta, bias });
        };
        let g = self.dora_scale(&magnitude.value().to_dtype(DType::F32)?, base)?;
        let weight = (base.weight().to_dense(DType::F32)? + delta)?.broadcast_mul(&g.unsqueeze(1)?)?;
        Ok(Delta::Replace { weight, bias: None })
    }

    fn lower(&self, base: &FrozenLinear) -> Result<Option<ServingForm>> {
        let scale = f64::from(self.scale);
        let scale_output = match &self.magnitude {
            Some(m) => Some(self.dora_scale(&m.value(), base)?),
            None => None,
        };
        let shift = match &self.b_bias {
            Some(bias) => Some((bias.value() * scale)?),
            None => None,
        };
        let (a, b) = self.factors()?;
        let low_rank = Some((a, (b * scale)?));
        Ok(Some(ServingForm { scale_input: None, low_rank, scale_output, shift }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use peft_core::kernels::testing::{close, randn};
    use peft_core::kernels::{FrozenWeight, Stream};
    use peft_core::{AdapterSet, Role, Route, SiteId, StepRng};

    fn parameter(name: &str, seed: u64, shape: impl Into<candle_core::Shape>) -> Parameter {
        Parameter::new(name, &randn(seed, shape, 0.5).unwrap(), Role::Plain).unwrap()
    }

    /// DoRA as PEFT writes it, in candle's own operations: the norm is a constant, so no difference of the loss shows the
    /// gradients of A and B.
    #[test]
    fn dora_gradients_equal_a_dense_reference() {
        let (out, inp, r, s) = (7, 9, 3, 1.5);
        let w = randn(1, (out, inp), 0.5).unwrap();
        let bias = randn(2, out, 0.5).unwrap();
        let base = FrozenLinear::new(SiteId(4), "layer", FrozenWeight::dense(&w).unwrap(), Some(bias.clone())).unwrap();
        let x = candle_core::Var::from_tensor(&randn(3, (5, inp), 1.0).unwrap()).unwrap();
        let dy = randn(9, (5, out), 1.0).unwrap();
        for subtracts in [false, true] {
            for p in [0.0, 0.4] {
                let initial = || (parameter("a0", 6, (r, inp)), parameter("b0", 7, (out, r)));
                let module = LoraLinear {
                    a: parameter("a", 4, (r, inp)),
                    b: parameter("b", 5, (out, r)),
                    b_bias: None,
                    magnitude: Some(parameter("m", 8, out)),
                    subtracted: subtracts.then(initial),
                    scale: s as f32,
                    dropout: p,
                };
                let set = AdapterSet::empty();
                let rng = StepRng { seed: 11, step: 2, run: 0 };
                let ctx = Ctx::train(&set, &Route::Base, rng);
                let y = module.forward(&base, x.as_tensor(), &ctx).unwrap();
                let grads = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();

                let w = match &module.subtracted {
                    None => w.clone(),
                    Some((a0, b0)) => (&w - (b0.value().matmul(&a0.value()).unwrap() * s).unwrap()).unwrap(),
                };
                let (a, b) = (module.a.var().as_tensor(), module.b.var().as_tensor());
                let m = module.magnitude.as_ref().unwrap().var().as_tensor();
                let dense = (&w + (b.matmul(a).unwrap() * s).unwrap()).unwrap();
                let g = (m / dense.sqr().unwrap().sum(1).unwrap().sqrt().unwrap().detach()).unwrap();
                let dropped = match p {
                    0.0 => x.as_tensor().clone(),
                    p => kernels::dropout(x.as_tensor(), p, Stream { seed: 11, step: 2, site: 4 }).unwrap(),
                };
                let plain = |x: &Tensor| x.matmul(&w.t().unwrap()).unwrap();
                let adapted = dropped.matmul(&dense.t().unwrap()).unwrap().broadcast_mul(&g).unwrap();
                let kept = (plain(x.as_tensor()) - plain(&dropped)).unwrap();
                let reference = (adapted + kept).unwrap().broadcast_add(&bias).unwrap();
                close("y", &y, &reference, 1e-5).unwrap();
                let expected = (&reference * &dy).unwrap().sum_all().unwrap().backward().unwrap();
                for (name, t) in [("x", x.as_tensor()), ("a", a), ("b", b), ("m", m)] {
                    close(name, grads.get(t).unwrap(), expected.get(t).unwrap(), 1e-4).unwrap();
                }
            }
        }
    }
}
