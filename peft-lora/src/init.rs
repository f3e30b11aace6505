//! How A and B start.

use candle_core::{Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::suggest::did_you_mean;
use peft_core::{Error, FrozenLinear, Result};
use serde_json::Value;

/// The values of `init_lora_weights`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Init {
    /// A Kaiming-uniform with a = √5, B zero: the adapter starts as the identity.
    Default,
    /// A and B both random, so that the adapter starts as something else than the identity.
    Random,
    /// A normal with variance 1/r², B zero.
    Gaussian,
}

const NAMES: &[&str] = &["true", "false", "gaussian"];

/// A and B of one site.
#[derive(Debug, Clone)]
pub struct Start {
    /// `[r, in]`.
    pub a: Tensor,
    /// `[out, r]`.
    pub b: Tensor,
}

impl Init {
    /// Reads `init_lora_weights`; absent means the default.
    ///
    /// # Errors
    /// An unknown name, with the nearest known.
    pub fn parse(value: Option<&Value>) -> Result<Self> {
        match value {
            None | Some(Value::Bool(true)) => Ok(Self::Default),
            Some(Value::Bool(false)) => Ok(Self::Random),
            Some(Value::String(s)) => match s.to_lowercase().as_str() {
                "gaussian" => Ok(Self::Gaussian),
                other => {
                    let near = did_you_mean(other, NAMES.iter().copied());
                    Err(Error::config("init_lora_weights", format!("`{other}` is not a known initialisation{near}")))
                }
            },
            Some(v) => Err(Error::config("init_lora_weights", format!("{v} is neither true, false nor a name"))),
        }
    }

    /// Whether B starts at zero, so that A's first gradient is exactly zero.
    #[must_use]
    pub fn starts_at_zero(self) -> bool {
        self != Self::Random
    }

    /// A and B for a layer, from a stream of its own.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn start(self, layer: &FrozenLinear, r: usize, stream: Stream, device: &Device) -> Result<Start> {
        let (out, inp) = (layer.weight().out_features(), layer.weight().in_features());
        let tensor = |data, shape: (usize, usize)| Tensor::from_vec(data, shape, device);
        // Kaiming-uniform with a = √5 is uniform in ±1/√fan_in.
        let uniform = |rows: usize, cols: usize, stream: Stream| {
            let bound = 1.0 / (cols as f32).sqrt();
            tensor(stream.uniform_vec(rows * cols, -bound, bound), (rows, cols))
        };
        let a = match self {
            Self::Gaussian => tensor(stream.normal_vec(r * inp, 1.0 / r as f32), (r, inp))?,
            Self::Default | Self::Random => uniform(r, inp, stream)?,
        };
        let b = match self {
            Self::Random => uniform(out, r, Stream { step: stream.step + 1, ..stream })?,
            _ => Tensor::zeros((out, r), candle_core::DType::F32, device)?,
        };
        Ok(Start { a, b })
    }
}
