//! What weighs the experts (`peft/tuners/xlora/classifier.py`, and `get_maybe_topk_scalings` in `layer.py`).

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::{self, Activation, Stream};
use peft_core::{Ctx, ExpectedTensor, Parameter, Result, Role, SiteId};

/// What PEFT calls the classifier's layers.
pub(super) const NAME: &str = "base_model.internal_xlora_classifier.layers";
/// The site of the last linear layer's random numbers; those of the ones before lie below.
const LAST_SITE: u32 = u32::MAX;

/// How weights are made of what the classifier gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Weighing {
    /// A softmax over all experts, with the temperature.
    pub(super) softmax: Option<f64>,
    /// How many experts keep their weight.
    pub(super) top_k: Option<usize>,
    /// A softmax over the experts with a weight.
    pub(super) softmax_of_top: bool,
}

/// The shape of a classifier.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Width of the hidden states.
    pub(super) hidden: usize,
    /// Linear layers.
    pub(super) depth: usize,
    /// Width between them.
    pub(super) width: usize,
    /// Of what is between them.
    pub(super) dropout: f32,
    pub(super) experts: usize,
    /// Layers with weights of their own, where they have such.
    pub(super) layers: Option<usize>,
}

/// Linear layers with ReLU and dropout between them, from hidden states to numbers for the experts.
#[derive(Debug)]
pub(super) struct Classifier {
    /// Weight and bias of each layer.
    layers: Vec<[Parameter; 2]>,
    experts: usize,
    /// Whether the last one has rows for each layer of the model.
    layerwise: bool,
    dropout: f32,
    weighing: Weighing,
}

impl Shape {
    /// What stands in front of a tensor's kind in the name of linear layer `i`: PEFT counts activations and dropout among the layers.
    fn name(&self, i: usize) -> String {
        format!("{NAME}.{}", i * if self.dropout > 0.0 { 3 } else { 2 })
    }

    /// The weights of all linear layers but the last, whose sizes are the config's alone.
    pub(super) fn inner(&self) -> Vec<ExpectedTensor> {
        let inner = (0..self.depth.saturating_sub(1)).map(|i| {
            let inp = if i == 0 { self.hidden } else { self.width };
            ExpectedTensor::required(format!("{}.weight", self.name(i)), [self.width, inp])
        });
        inner.collect()
    }
}

impl Classifier {
    /// One that starts as torch's linear layers do, from the numbers of `seed`.
    pub(super) fn new(shape: Shape, weighing: Weighing, seed: u64, device: &Device) -> Result<Self> {
        let layer = |i: usize| {
            let inp = if i == 0 { shape.hidden } else { shape.width };
            let out = if i + 1 == shape.depth { shape.experts * shape.layers.unwrap_or(1) } else { shape.width };
            let bound = 1.0 / (inp as f32).sqrt();
            let start =
                |step: u32, n: usize| Stream { seed, step, site: LAST_SITE - i as u32 }.uniform_vec(n, -bound, bound);
            let weight = Tensor::from_vec(start(0, out * inp), (out, inp), &Device::Cpu)?.to_device(device)?;
            let bias = Tensor::from_vec(start(1, out), out, &Device::Cpu)?.to_device(device)?;
            Ok([
                Parameter::new(format!("{}.weight", shape.name(i)), &weight, Role::Plain)?,
                Parameter::new(format!("{}.bias", shape.name(i)), &bias, Role::NoDecay)?,
            ])
        };
        Ok(Self {
            layers: (0..shape.depth).map(layer).collect::<Result<_>>()?,
            experts: shape.experts,
            layerwise: shape.layers.is_some(),
            dropout: shape.dropout,
            weighing,
        })
    }

    pub(super) fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.layers.iter().flatten()
    }

    /// Weights `[tokens, experts]` of the experts at a layer, for the hidden states `[tokens, hidden]` of the first pass.
    pub(super) fn weights(&self, first: &Tensor, layer: usize, ctx: &Ctx<'_>) -> Result<Tensor> {
        let mut x = first.to_dtype(DType::F32)?;
        for (i, [weight, bias]) in self.layers.iter().enumerate() {
            let (mut weight, mut bias) = (weight.get(ctx), bias.get(ctx));
            let is_last = i + 1 == self.layers.len();
            if is_last && self.layerwise {
                weight = weight.narrow(0, layer * self.experts, self.experts)?;
                bias = bias.narrow(0, layer * self.experts, self.experts)?;
            }
            x = kernels::add_bias(&kernels::trainable_linear(&x, &weight)?, &bias)?;
            if !is_last {
                x = kernels::activation(&x, Activation::Relu)?;
                if let Some(dropout) = ctx.dropout(SiteId(LAST_SITE - i as u32), self.dropout) {
                    x = kernels::dropout(&x, dropout.p, dropout.stream)?;
                }
            }
        }
        self.weighing.of(x)
    }
}

impl Weighing {
    fn of(self, mut weights: Tensor) -> Result<Tensor> {
        if let Some(temperature) = self.softmax {
            weights = softmax(&(weights / temperature)?, None)?;
        }
        if let Some(k) = self.top_k {
            weights = (&weights * largest(&weights, k)?)?;
        }
        if self.softmax_of_top {
            let there = weights.detach().ne(0.0)?.to_dtype(DType::F32)?;
            weights = softmax(&weights, Some(&there))?;
        }
        Ok(weights)
    }
}

/// The softmax of each row, over the elements where `of` is 1; elsewhere, and in a row without any, it is 0.
fn softmax(x: &Tensor, of: Option<&Tensor>) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.detach().max_keepdim(1)?)?.exp()?;
    let Some(of) = of else { return Ok(e.broadcast_div(&e.sum_keepdim(1)?)?) };
    let e = (e * of)?;
    let none = of.sum_keepdim(1)?.eq(0.0)?.to_dtype(DType::F32)?;
    Ok(e.broadcast_div(&(e.sum_keepdim(1)? + none)?)?)
}

/// 1 where one of the `k` largest of each row is, the first of equal ones.
fn largest(x: &Tensor, k: usize) -> Result<Tensor> {
    let row = |row: Vec<f32>| {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row.get(b).zip(row.get(a)).map_or(std::cmp::Ordering::Equal, |(b, a)| b.total_cmp(a)));
        let mut is_there = vec![0f32; row.len()];
        for i in order.into_iter().take(k) {
            if let Some(place) = is_there.get_mut(i) {
                *place = 1.0;
            }
        }
        is_there
    };
    let rows: Vec<f32> = x.detach().to_vec2::<f32>()?.into_iter().flat_map(row).collect();
    Ok(Tensor::from_vec(rows, x.dims2()?, &Device::Cpu)?.to_device(x.device())?)
}
