//! VeRA (Kopiczko et al. 2023, arXiv:2310.11454; PEFT `tuners/vera`): one frozen random pair A, B for all layers, and two
//! trained vectors a layer.

use candle_core::{Device, Tensor};
use peft_core::{ConfigKeys, Error, Parameter, Result, Role};
use serde_json::json;

use super::{Kind, Made, Method, dropout, seed, size};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;
use crate::torch_random::TorchRandom;

pub(crate) const KIND: Kind = Kind {
    name: "vera",
    peft_type: "VERA",
    label: "VeRA",
    keys: || {
        json!({"bias": "none", "d_initial": 0.1, "fan_in_fan_out": false, "init_weights": true,
            "layers_pattern": null, "layers_to_transform": null, "projection_prng_key": 0, "r": 256,
            "save_projection": true, "vera_dropout": 0.0})
    },
    only_default: &["bias"],
    patterns: &[],
    read: |keys| Ok(Box::new(Vera::read(keys)?)),
};

#[derive(Debug)]
struct Vera {
    r: usize,
    d_initial: f64,
    dropout: f32,
    seed: i64,
    /// Whether the projections are in the file.
    stored: bool,
    identity: bool,
}

impl Vera {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        Ok(Self {
            r: size(keys, "r", 256)?,
            d_initial: keys.number("d_initial", 0.1)?,
            dropout: dropout(keys, "vera_dropout")?,
            seed: seed(keys, "projection_prng_key", 0)?,
            stored: keys.flag("save_projection", true)?,
            identity: keys.flag("init_weights", true)?,
        })
    }
}

impl Method for Vera {
    /// `vera_A: [r, widest in]` and `vera_B: [widest out, r]`, one after the other from torch's generator.
    fn shared(&self, dims: &[(usize, usize)], device: &Device) -> Result<Vec<Parameter>> {
        let widest = |of: fn(&(usize, usize)) -> usize| dims.iter().map(of).max().unwrap_or(0);
        let shapes = [("vera_A", self.r, widest(|d| d.1)), ("vera_B", widest(|d| d.0), self.r)];
        let mut random = TorchRandom::new(self.seed);
        let tensors = shapes.into_iter().map(|(name, rows, fan_in)| {
            let bound = (6.0 / fan_in.max(1) as f64).sqrt() as f32;
            let values = random.uniform(rows * fan_in, -bound, bound);
            Parameter::new(
                format!("base_model.{name}"),
                &Tensor::from_vec(values, (rows, fan_in), device)?,
                Role::Plain,
            )
        });
        tensors.collect()
    }

    fn stores_shared(&self) -> bool {
        self.stored
    }

    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let (out, inp) = start.dims();
        let [a, b] = start.shared else { return Err(Error::msg("VeRA has two projections")) };
        let formula = Projected { a: a.clone(), b: b.clone(), out, inp };
        if self.identity {
            start.constant("vera_lambda_b", 0.0, out, Role::NoDecay)?;
            start.constant("vera_lambda_d", self.d_initial, self.r, Role::ZeroAtStart)?;
        } else {
            start.constant("vera_lambda_b", 1.0, out, Role::NoDecay)?;
            start.normal("vera_lambda_d", (0.0, 1.0), self.r, Role::NoDecay)?;
        }
        Ok((start.finish(formula, self.dropout), Vec::new()))
    }
}

/// `(λ_b ⊙ B)·(λ_d ⊙ A)` with the parts of A and B that the layer needs.
#[derive(Debug)]
struct Projected {
    a: Parameter,
    b: Parameter,
    out: usize,
    inp: usize,
}

impl Formula for Projected {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [lambda_b, lambda_d] = exactly(parameters)?;
        let a = self.a.value().narrow(1, 0, self.inp)?.contiguous()?;
        let b = self.b.value().narrow(0, 0, self.out)?.contiguous()?;
        Ok(Change::LowRank {
            a: a.broadcast_mul(&lambda_d.unsqueeze(1)?)?,
            b: b.broadcast_mul(&lambda_b.unsqueeze(1)?)?,
        })
    }
}
