//! RandLoRA (Albert et al. 2025, arXiv:2502.00987; PEFT `tuners/randlora`): a sum of products of frozen random matrices, of full
//! rank together, whose smaller factors are scaled by trained vectors.

use candle_core::{DType, Device, Tensor};
use peft_core::{ConfigKeys, Error, Parameter, Result, Role};
use serde_json::json;

use super::{Kind, Made, Method, dropout, seed, size};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;
use crate::torch_random::TorchRandom;

pub(crate) const KIND: Kind = Kind {
    name: "randlora",
    peft_type: "RANDLORA",
    label: "RandLoRA",
    keys: || {
        json!({"bias": "none", "fan_in_fan_out": false, "init_weights": true, "layers_pattern": null,
            "layers_to_transform": null, "projection_prng_key": 0, "r": 32, "randlora_alpha": 640,
            "randlora_dropout": 0.0, "save_projection": true, "sparse": false, "very_sparse": false})
    },
    only_default: &["bias"],
    patterns: &[],
    read: |keys| Ok(Box::new(RandLora::read(keys)?)),
};

/// How the random matrices are drawn.
#[derive(Debug, Clone, Copy)]
enum Bases {
    /// Uniform, in bf16 as PEFT has them.
    Dense,
    /// −1, 0 and 1, two thirds of them zeros.
    Sparse,
    /// −1, 0 and 1, all but two in √d of them zeros.
    VerySparse,
}

#[derive(Debug)]
struct RandLora {
    r: usize,
    alpha: f64,
    dropout: f32,
    bases: Bases,
    seed: i64,
    /// Whether the random matrices are in the file.
    stored: bool,
    identity: bool,
}

impl RandLora {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        let bases = match (keys.flag("very_sparse", false)?, keys.flag("sparse", false)?) {
            (true, _) => Bases::VerySparse,
            (false, true) => Bases::Sparse,
            (false, false) => Bases::Dense,
        };
        Ok(Self {
            r: size(keys, "r", 32)?,
            alpha: keys.number("randlora_alpha", 640.0)?,
            dropout: dropout(keys, "randlora_dropout")?,
            bases,
            seed: seed(keys, "projection_prng_key", 0)?,
            stored: keys.flag("save_projection", true)?,
            identity: keys.flag("init_weights", true)?,
        })
    }

    /// `n` elements of which `fan_in` stand before one output, for matrices whose smaller dimension is `smallest`.
    fn draw(&self, random: &mut TorchRandom, n: usize, fan_in: usize, smallest: usize) -> Vec<f32> {
        let zeros = match self.bases {
            Bases::Dense => {
                let bound = 1.0 / (fan_in.max(1) as f32).sqrt();
                return random.uniform_bf16(n, -bound, bound);
            }
            Bases::Sparse => 3.0,
            Bases::VerySparse => (smallest as f64).sqrt(),
        };
        let (low, high) = ((1.0 / (2.0 * zeros)) as f32, (1.0 - 1.0 / (2.0 * zeros)) as f32);
        let sign = |u: f32| f32::from(i8::from(u > high) - i8::from(u < low));
        random.uniform(n, 0.0, 1.0).into_iter().map(sign).collect()
    }

    /// Elements over their standard deviation, in the type in which PEFT has them.
    fn normed(&self, values: Vec<f32>) -> Result<Tensor> {
        let dtype = if matches!(self.bases, Bases::Dense) { DType::BF16 } else { DType::F32 };
        let n = values.len();
        let values = Tensor::from_vec(values, n, &Device::Cpu)?.to_dtype(dtype)?.to_dtype(DType::F64)?;
        let centred = values.broadcast_sub(&values.mean_all()?)?;
        let std = (centred.sqr()?.sum_all()? / n.saturating_sub(1).max(1) as f64)?.sqrt()?.to_dtype(dtype)?;
        let normed = values.to_dtype(DType::F32)?.broadcast_div(&std.to_dtype(DType::F32)?)?;
        Ok(normed.to_dtype(dtype)?.to_dtype(DType::F32)?)
    }
}

impl Method for RandLora {
    /// `randlora_A: [r, 1, smallest]` and `randlora_B: [largest, bases, r]` for the smallest and the largest of the widest
    /// input and output, one after the other from torch's generator.
    fn shared(&self, dims: &[(usize, usize)], device: &Device) -> Result<Vec<Parameter>> {
        let widest = |of: fn(&(usize, usize)) -> usize| dims.iter().map(of).max().unwrap_or(0);
        let (out, inp) = (widest(|d| d.0), widest(|d| d.1));
        let (smallest, largest, r) = (out.min(inp), out.max(inp), self.r);
        let bases = smallest.div_ceil(r);
        let mut random = TorchRandom::new(self.seed);
        let a = self.draw(&mut random, r * smallest, smallest, smallest);
        let b = self.normed(match self.bases {
            // Basis after basis, and each then a slice of its own.
            Bases::Dense => {
                let of_basis = (0..bases).map(|_| self.draw(&mut random, largest * r, r, smallest));
                let of_basis = of_basis.collect::<Vec<_>>();
                (0..largest).flat_map(|row| of_basis.iter().flat_map(move |b| &b[row * r..][..r])).copied().collect()
            }
            Bases::Sparse | Bases::VerySparse => self.draw(&mut random, largest * bases * r, r, smallest),
        })?;
        let shaped = [
            ("randlora_A", self.normed(a)?.reshape((r, 1, smallest))?),
            ("randlora_B", b.reshape((largest, bases, r))?),
        ];
        let parameter = |(name, value): (&str, Tensor)| {
            Parameter::new(format!("base_model.{name}"), &value.to_device(device)?, Role::Plain)
        };
        shaped.into_iter().map(parameter).collect()
    }

    fn stores_shared(&self) -> bool {
        self.stored
    }

    fn repeats_shared(&self) -> bool {
        true
    }

    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let ((out, inp), r) = (start.dims(), self.r);
        let [a, b] = start.shared else { return Err(Error::msg("RandLoRA has two random matrices")) };
        let smallest = out.min(inp);
        let bases = smallest.div_ceil(r);
        let formula = Bilinear { a: a.clone(), b: b.clone(), out, inp, scale: self.alpha / r as f64 };
        let (lambda, gamma) = ("randlora_lambda", "randlora_gamma");
        if self.identity {
            start.constant(lambda, 0.0, (r, bases), Role::Plain)?;
            start.constant(gamma, 1.0 / bases.max(smallest) as f64, (bases, smallest), Role::ZeroAtStart)?;
        } else {
            start.normal(lambda, (0.0, 1.0), (r, bases), Role::Plain)?;
            start.constant(gamma, 1.0 / out.max(inp) as f64, (bases, smallest), Role::Plain)?;
        }
        Ok((start.finish(formula, self.dropout), Vec::new()))
    }
}

/// `Σ_b B_b·(λ_b ⊙ A ⊙ γ_b)` with the parts of A and B that the layer needs; transposed where outputs are fewer than inputs.
#[derive(Debug)]
struct Bilinear {
    a: Parameter,
    b: Parameter,
    out: usize,
    inp: usize,
    scale: f64,
}

impl Formula for Bilinear {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [lambda, gamma] = exactly(parameters)?;
        let (bases, smallest) = gamma.dims2()?;
        let r = lambda.dim(0)?;
        let a = self.a.value().narrow(2, 0, smallest)?;
        let scaled = a.broadcast_mul(&(lambda.unsqueeze(2)? * self.scale)?)?.broadcast_mul(&gamma.unsqueeze(0)?)?;
        let b = self.b.value().narrow(0, 0, self.out.max(self.inp))?.narrow(1, 0, bases)?.contiguous()?;
        // PEFT runs through A's rows rank by rank and through B's columns basis by basis.
        let (small, large) = (scaled.reshape((r * bases, smallest))?, b.reshape(((), r * bases))?);
        Ok(match smallest == self.inp {
            true => Change::LowRank { a: small, b: large },
            false => Change::LowRank { a: large.t()?.contiguous()?, b: small.t()?.contiguous()? },
        })
    }
}
