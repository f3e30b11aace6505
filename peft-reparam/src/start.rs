//! What a method is given to make the parameters of one site.

use std::collections::BTreeSet;

use candle_core::{DType, Device, Shape, Tensor};
use peft_core::kernels::Stream;
use peft_core::{Error, FrozenLinear, Parameter, Result, Role, parameter_name};

use crate::change::{Formula, ReparamLinear};

/// One linear layer that gets a module, and its random numbers: a function of seed, site and parameter.
#[derive(Debug)]
pub(crate) struct Start<'a> {
    pub(crate) layer: &'a FrozenLinear,
    /// Rank by `rank_pattern` or what a method calls so.
    pub(crate) rank: Option<usize>,
    /// Alpha by `alpha_pattern` or what a method calls so.
    pub(crate) alpha: Option<f64>,
    /// Tensors that all sites share, as the method made them.
    pub(crate) shared: &'a [Parameter],
    /// Parameters that all sites share.
    shared_trained: &'a [Parameter],
    pub(crate) device: &'a Device,
    pub(crate) seed: u64,
    /// Names of the tensors in the file that the module is made for.
    stored: &'a BTreeSet<String>,
    parameters: Vec<Parameter>,
}

impl<'a> Start<'a> {
    pub(crate) fn new(
        layer: &'a FrozenLinear,
        (rank, alpha): (Option<usize>, Option<f64>),
        (shared, shared_trained): (&'a [Parameter], &'a [Parameter]),
        device: &'a Device,
        (seed, stored): (u64, &'a BTreeSet<String>),
    ) -> Self {
        Self { layer, rank, alpha, shared, shared_trained, device, seed, stored, parameters: Vec::new() }
    }

    /// `(out, in)` of the layer.
    pub(crate) fn dims(&self) -> (usize, usize) {
        (self.layer.weight().out_features(), self.layer.weight().in_features())
    }

    /// Whether the module is made for a file that holds `suffix` behind the layer's path.
    pub(crate) fn is_stored(&self, suffix: &str) -> bool {
        self.stored.contains(&parameter_name(self.layer.path(), suffix))
    }

    /// 32 random bits.
    pub(crate) fn random_word(&self) -> u32 {
        self.stream().word(0)
    }

    fn stream(&self) -> Stream {
        Stream { seed: self.seed, step: self.parameters.len() as u32, site: self.layer.site().0 }
    }

    fn push(&mut self, suffix: &str, value: Tensor, role: Role) -> Result<()> {
        let name = parameter_name(self.layer.path(), suffix);
        self.parameters.push(Parameter::new(name, &value.to_device(self.device)?, role)?);
        Ok(())
    }

    /// A parameter of one value, stored as `suffix` behind the layer's path.
    pub(crate) fn constant(&mut self, suffix: &str, value: f64, shape: impl Into<Shape>, role: Role) -> Result<()> {
        let value = (Tensor::ones(shape, DType::F32, &Device::Cpu)? * value)?;
        self.push(suffix, value, role)
    }

    /// A parameter that starts uniform in `±bound`.
    pub(crate) fn uniform(&mut self, suffix: &str, bound: f64, shape: impl Into<Shape>, role: Role) -> Result<()> {
        let shape = shape.into();
        let values = self.stream().uniform_vec(shape.elem_count(), -bound as f32, bound as f32);
        self.push(suffix, Tensor::from_vec(values, shape, &Device::Cpu)?, role)
    }

    /// A parameter `[rows, fan_in]` that starts as torch's `kaiming_uniform_(a = √5)` has it: uniform in `±1/√fan_in`.
    pub(crate) fn kaiming(&mut self, suffix: &str, shape: (usize, usize), role: Role) -> Result<()> {
        self.uniform(suffix, 1.0 / (shape.1.max(1) as f64).sqrt(), shape, role)
    }

    /// A parameter that starts normal around `mean`.
    pub(crate) fn normal(
        &mut self,
        suffix: &str,
        (mean, std): (f64, f64),
        shape: impl Into<Shape>,
        role: Role,
    ) -> Result<()> {
        let shape = shape.into();
        let values = self.stream().normal_vec(shape.elem_count(), std as f32);
        let value = (Tensor::from_vec(values, shape, &Device::Cpu)? + mean)?;
        self.push(suffix, value, role)
    }

    /// A parameter that starts at `value`.
    pub(crate) fn given(&mut self, suffix: &str, value: Tensor, role: Role) -> Result<()> {
        self.push(suffix, value, role)
    }

    /// An error about a key that does not fit this layer.
    pub(crate) fn misfit(&self, key: &str, message: impl std::fmt::Display) -> Error {
        Error::config(key, format!("does not fit `{}`: {message}", self.layer.path()))
    }

    /// The module of the parameters made so far, which `formula` takes in this order, and then those that all sites share.
    pub(crate) fn finish(self, formula: impl Formula + 'static, dropout: f32) -> ReparamLinear {
        let shared = self.shared_trained.to_vec();
        ReparamLinear { parameters: self.parameters, shared, formula: Box::new(formula), dropout }
    }
}
