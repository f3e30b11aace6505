//! The small networks that make virtual tokens in training.

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::{self, Stream};
use peft_core::{Ctx, Parameter, Result, Role};

/// Random starts, one stream of numbers after another. Their keys are not those of any site.
#[derive(Debug)]
pub(crate) struct Starts<'a> {
    seed: u64,
    next: u32,
    device: &'a Device,
}

impl<'a> Starts<'a> {
    pub(crate) fn new(seed: u64, device: &'a Device) -> Self {
        Self { seed, next: u32::MAX, device }
    }

    pub(crate) fn stream(&mut self) -> Stream {
        self.next -= 1;
        Stream { seed: self.seed, step: 0, site: self.next }
    }

    /// `[rows, cols]` from a standard normal, as torch starts an embedding; zeros with `zero`.
    pub(crate) fn table(&mut self, name: &str, rows: usize, cols: usize, zero: bool, role: Role) -> Result<Parameter> {
        let stream = self.stream();
        let value = match zero {
            true => Tensor::zeros((rows, cols), DType::F32, self.device)?,
            false => Tensor::from_vec(stream.normal_vec(rows * cols, 1.0), (rows, cols), self.device)?,
        };
        Parameter::new(name, &value, role)
    }

    /// Uniform in `±bound`.
    pub(crate) fn uniform(&mut self, name: String, shape: &[usize], bound: f32, role: Role) -> Result<Parameter> {
        let values = self.stream().uniform_vec(shape.iter().product(), -bound, bound);
        Parameter::new(name, &Tensor::from_vec(values, shape, self.device)?, role)
    }
}

/// The bound within which torch starts a linear layer or an LSTM of this width: Kaiming-uniform with a = √5.
pub(crate) fn torch_bound(width: usize) -> f32 {
    1.0 / (width as f32).sqrt()
}

/// A trained linear layer.
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Parameter,
    bias: Parameter,
}

impl Linear {
    /// `{name}.weight` `[out, in]` and `{name}.bias`, uniform in `±bound`.
    pub(crate) fn new(
        name: &str,
        (inp, out): (usize, usize),
        bound: f32,
        role: Role,
        starts: &mut Starts<'_>,
    ) -> Result<Self> {
        let bias_role = if role == Role::ZeroAtStart { role } else { Role::NoDecay };
        Ok(Self {
            weight: starts.uniform(format!("{name}.weight"), &[out, inp], bound, role)?,
            bias: starts.uniform(format!("{name}.bias"), &[out], bound, bias_role)?,
        })
    }

    /// `[rows, in]` to `[rows, out]`.
    pub(crate) fn forward(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        Ok(kernels::add_bias(&kernels::trainable_linear(x, &self.weight.get(ctx))?, &self.bias.get(ctx))?)
    }

    pub(crate) fn parameters(&self) -> [&Parameter; 2] {
        [&self.weight, &self.bias]
    }
}
