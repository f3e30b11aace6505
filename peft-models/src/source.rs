//! Where a model's weights come from, and in which type they are kept.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::checkpoint::Checkpoint;
use peft_core::kernels::{Deferred, FrozenWeight, Stream};
use peft_core::{Context, Error, Result};

use crate::gguf::Gguf;

/// Weights by the names that transformers gives them.
pub trait WeightSource: std::fmt::Debug {
    /// Whether there is such a tensor.
    fn contains(&self, name: &str) -> bool;

    /// A weight matrix of `dims` = `(out, in)`.
    ///
    /// # Errors
    /// When it is absent, has another shape, or holds NaN or infinity.
    fn weight(&self, name: &str, dims: (usize, usize)) -> Result<FrozenWeight>;

    /// The weights of experts that lie in one tensor of `dims` = `(experts, out, in)`, as transformers 5 may write them.
    ///
    /// # Errors
    /// As [`WeightSource::weight`]; of sources that have none such.
    fn experts(&self, name: &str, _dims: (usize, usize, usize)) -> Result<Vec<FrozenWeight>> {
        Err(Error::msg(format!("`{name}`: weights of type {} are not read as experts in one tensor", self.describe())))
    }

    /// A vector (norm weight or bias) in the activations' type.
    ///
    /// # Errors
    /// As [`WeightSource::weight`].
    fn vector(&self, name: &str, len: usize) -> Result<Tensor>;

    /// A short description of the storage: `bf16`, `q4_1`.
    fn describe(&self) -> String;
}

/// The types that a model is loaded with.
#[derive(Debug, Clone)]
pub struct Placement {
    /// Where weights and activations live.
    pub device: Device,
    /// Type of activations: `f32` on a CPU.
    pub activations: DType,
    /// Type of weights, or `None` for as they lie in the file.
    pub weights: Option<DType>,
    /// Whether products with `bf16` weights may round the activations ([`FrozenWeight::with_narrow_products`]): for training. Those
    /// of few rows never do, so what a sequence generates would depend on the batch that it is in.
    pub narrow_products: bool,
}

impl Placement {
    /// On a CPU, activations in `f32`, weights as they lie in the file or converted to `weights`.
    #[must_use]
    pub fn cpu(weights: Option<DType>) -> Self {
        Self { device: Device::Cpu, activations: DType::F32, weights, narrow_products: false }
    }

    /// A dense weight.
    fn dense(&self, weight: &Tensor) -> Result<FrozenWeight> {
        let weight = FrozenWeight::dense(weight)?;
        Ok(if self.narrow_products { weight.with_narrow_products() } else { weight })
    }
}

fn shape_error(name: &str, actual: &[usize], expected: Vec<usize>) -> Error {
    Error::Shape { name: name.to_string(), actual: actual.to_vec(), expected }
}

/// A Hugging Face folder's safetensors.
#[derive(Debug, Clone)]
pub struct SafetensorsSource {
    checkpoint: Arc<Checkpoint>,
    placement: Placement,
}

impl SafetensorsSource {
    /// Reads from `checkpoint` with the types of `placement`.
    #[must_use]
    pub fn new(checkpoint: Arc<Checkpoint>, placement: Placement) -> Self {
        Self { checkpoint, placement }
    }

    fn read(&self, name: &str, dims: &[usize], dtype: DType) -> Result<Tensor> {
        let shape = self.checkpoint.shape(name)?;
        if shape != dims {
            return Err(shape_error(name, shape, dims.to_vec()));
        }
        self.checkpoint.tensor_as(name, dtype, &self.placement.device)
    }

    /// The type that a weight is kept in.
    fn weight_dtype(&self, name: &str) -> Result<DType> {
        match self.placement.weights {
            Some(dtype) => Ok(dtype),
            None => Ok(match self.checkpoint.dtype(name)? {
                d @ (DType::F32 | DType::F16 | DType::BF16) => d,
                _ => DType::F32,
            }),
        }
    }
}

impl WeightSource for SafetensorsSource {
    fn contains(&self, name: &str) -> bool {
        self.checkpoint.contains(name)
    }

    fn weight(&self, name: &str, (out, inp): (usize, usize)) -> Result<FrozenWeight> {
        let dtype = self.weight_dtype(name)?;
        self.placement.dense(&self.read(name, &[out, inp], dtype)?).with_context(|| name.to_string())
    }

    fn experts(&self, name: &str, (experts, out, inp): (usize, usize, usize)) -> Result<Vec<FrozenWeight>> {
        let all = self.read(name, &[experts, out, inp], self.weight_dtype(name)?)?;
        // Each a part of the one tensor, without a copy.
        (0..experts).map(|e| self.placement.dense(&all.get(e)?).with_context(|| name.to_string())).collect()
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        self.read(name, &[len], self.placement.activations)
    }

    fn describe(&self) -> String {
        let stored = self.checkpoint.names().next().and_then(|n| self.checkpoint.dtype(n).ok());
        self.placement.weights.or(stored).map_or_else(|| "f32".into(), |d| d.as_str().to_string())
    }
}

/// A GGUF file: blocks as they lie on disk, or widened where a type is asked for.
#[derive(Debug, Clone)]
pub struct GgufSource {
    gguf: Arc<Gguf>,
    placement: Placement,
}

impl GgufSource {
    /// Reads from `gguf` with the types of `placement`.
    #[must_use]
    pub fn new(gguf: Arc<Gguf>, placement: Placement) -> Self {
        Self { gguf, placement }
    }

    fn check(&self, name: &str, dims: &[usize]) -> Result<()> {
        match self.gguf.hf_tensor(name) {
            None => Err(Error::file(self.gguf.path(), format!("has no tensor for `{name}`"))),
            Some(t) if t.shape != dims => Err(shape_error(name, &t.shape, dims.to_vec())),
            Some(_) => Ok(()),
        }
    }
}

impl WeightSource for GgufSource {
    fn contains(&self, name: &str) -> bool {
        self.gguf.hf_tensor(name).is_some()
    }

    fn weight(&self, name: &str, (out, inp): (usize, usize)) -> Result<FrozenWeight> {
        self.check(name, &[out, inp])?;
        let message = |e: crate::gguf::GgufError| Error::msg(e.to_string());
        match self.placement.weights {
            Some(dtype) => {
                let dense = self.gguf.dense_as(name, dtype, &self.placement.device).map_err(message)?;
                self.placement.dense(&dense).with_context(|| name.to_string())
            }
            None => {
                let blocks = self.gguf.quantized(name, &self.placement.device).map_err(message)?;
                FrozenWeight::gguf(blocks).with_context(|| name.to_string())
            }
        }
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        self.check(name, &[len])?;
        let dense = self.gguf.dense_as(name, self.placement.activations, &self.placement.device);
        dense.map_err(|e| Error::msg(e.to_string()))
    }

    fn describe(&self) -> String {
        match self.placement.weights {
            Some(d) => d.as_str().to_string(),
            None => self
                .gguf
                .hf_tensor("model.layers.0.mlp.up_proj.weight")
                .and_then(|t| t.block_type())
                .map_or_else(|| "gguf".into(), |d| format!("{d:?}").to_lowercase()),
        }
    }
}

/// Another source whose matrices stay where they are until they are used ([`Deferred`]); vectors are read at once.
#[derive(Debug)]
pub struct DeferredSource<S> {
    /// Where matrices are read from, again for every use.
    pub source: S,
    /// Where they are read to.
    pub device: Device,
}

impl<S: WeightSource + Clone + Send + Sync + 'static> WeightSource for DeferredSource<S> {
    fn contains(&self, name: &str) -> bool {
        self.source.contains(name)
    }

    fn weight(&self, name: &str, dims: (usize, usize)) -> Result<FrozenWeight> {
        let (source, key) = (self.source.clone(), name.to_string());
        let read = move || source.weight(&key, dims).map_err(candle_core::Error::wrap);
        Ok(FrozenWeight::deferred(dims.0, dims.1, Deferred::new(self.device.clone(), read)))
    }

    fn experts(&self, name: &str, (experts, out, inp): (usize, usize, usize)) -> Result<Vec<FrozenWeight>> {
        let expert = |e: usize| {
            let (source, key) = (self.source.clone(), name.to_string());
            let read = move || {
                let all = source.experts(&key, (experts, out, inp)).map_err(candle_core::Error::wrap)?;
                all.into_iter().nth(e).ok_or_else(|| candle_core::Error::Msg(format!("`{key}` has no expert {e}")))
            };
            FrozenWeight::deferred(out, inp, Deferred::new(self.device.clone(), read))
        };
        Ok((0..experts).map(expert).collect())
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        self.source.vector(name, len)
    }

    fn describe(&self) -> String {
        self.source.describe()
    }
}

/// Random weights, to train a model from nothing: normal with the family's usual standard deviation, norms one, biases
/// zero. A function of the seed and the tensor's name.
#[derive(Debug)]
pub struct RandomSource {
    /// The run's seed.
    pub seed: u64,
    /// Standard deviation (`initializer_range`).
    pub std: f32,
    /// Whether the output head has a weight of its own.
    pub untied_head: bool,
    /// The types to make.
    pub placement: Placement,
}

impl WeightSource for RandomSource {
    fn contains(&self, name: &str) -> bool {
        match name {
            "lm_head.weight" => self.untied_head,
            // BART's, which is not a parameter.
            "final_logits_bias" => false,
            _ => true,
        }
    }

    fn weight(&self, name: &str, (out, inp): (usize, usize)) -> Result<FrozenWeight> {
        // FNV-1a: any fixed hash of the name will do.
        let site = name.bytes().fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
        let values = Stream { seed: self.seed, step: 0, site }.normal_vec(out * inp, self.std);
        let weight = Tensor::from_vec(values, (out, inp), &self.placement.device)?;
        self.placement.dense(&weight.to_dtype(self.placement.weights.unwrap_or(DType::F32))?)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        let value = if name.ends_with(".bias") { 0f32 } else { 1f32 };
        let t = Tensor::full(value, len, &self.placement.device)?;
        Ok(t.to_dtype(self.placement.activations)?)
    }

    fn describe(&self) -> String {
        "random".into()
    }
}
