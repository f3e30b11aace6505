//! LoRA on a linear layer, with rsLoRA's scale, a bias on B, and DoRA's magnitude.

use candle_core::{DType, Tensor};
use peft_core::kernels::{self, ServingForm};
use peft_core::{Ctx, Delta, FrozenLinear, Parameter, PeftModule, Result};

use crate::dora;

/// `y = W x + b + s·(B·A·drop(x) + b_B)`, and DoRA's magnitude over it where it has one.
#[derive(Debug)]
pub struct LoraLinear {
    pub(crate) a: Parameter,
    pub(crate) b: Parameter,
    pub(crate) b_bias: Option<Parameter>,
    pub(crate) magnitude: Option<Parameter>,
    pub(crate) scale: f32,
    pub(crate) dropout: f32,
}

impl LoraLinear {
    fn delta_weight(&self) -> Result<Tensor> {
        let (a, b) = (self.a.value().to_dtype(DType::F32)?, self.b.value().to_dtype(DType::F32)?);
        Ok((b.matmul(&a)? * f64::from(self.scale))?)
    }

    /// `m / ‖W + s·BA‖` for each output.
    fn dora_scale(&self, magnitude: &Tensor, base: &FrozenLinear) -> Result<Tensor> {
        let norm = dora::weight_norm(base.weight(), &self.a.value(), &self.b.value(), self.scale)?;
        Ok((magnitude / norm.to_dtype(magnitude.dtype())?)?)
    }
}

impl PeftModule for LoraLinear {
    fn forward(&self, base: &FrozenLinear, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let (a, b) = (self.a.get(ctx), self.b.get(ctx));
        let dropout = ctx.dropout(base.site(), self.dropout);
        let Some(magnitude) = &self.magnitude else {
            let y = kernels::lora_linear(x, base.weight(), base.bias(), &a, &b, self.scale, dropout)?;
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
                kernels::scale_columns(&y, &g)?
            }
            Some(d) => {
                let dropped = kernels::dropout(x, d.p, d.stream)?;
                let adapted = kernels::lora_linear(&dropped, base.weight(), None, &a, &b, self.scale, None)?;
                let frozen = kernels::frozen_linear(x, base.weight(), None)?;
                let again = kernels::frozen_linear(&dropped, base.weight(), None)?;
                ((frozen - again)? + kernels::scale_columns(&adapted, &g)?)?
            }
        };
        match base.bias() {
            Some(bias) => Ok(kernels::add_bias(&y, bias)?),
            None => Ok(y),
        }
    }

    fn parameters(&self) -> Vec<&Parameter> {
        [&self.a, &self.b].into_iter().chain(&self.b_bias).chain(&self.magnitude).collect()
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
        let low_rank = Some((self.a.value(), (self.b.value() * scale)?));
        Ok(Some(ServingForm { scale_input: None, low_rank, scale_output, shift }))
    }
}
