//! FourierFT (Gao et al. 2024, arXiv:2405.03003; PEFT `tuners/fourierft`): a few frequencies of the weight's change, at
//! random places that a seed gives.

use std::f64::consts::TAU;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};
use peft_core::{ConfigKeys, Result, Role, kernels};
use serde_json::json;

use super::{Kind, Made, Method, seed, size};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;
use crate::torch_random::TorchRandom;

pub(crate) const KIND: Kind = Kind {
    name: "fourierft",
    peft_type: "FOURIERFT",
    label: "FourierFT",
    keys: || {
        json!({"bias": "none", "exclude_modules": null, "fan_in_fan_out": false, "init_weights": false,
            "layers_pattern": null, "layers_to_transform": null, "n_frequency": 1000, "n_frequency_pattern": {},
            "random_loc_seed": 777, "scaling": 150.0})
    },
    only_default: &["bias"],
    patterns: &[("n_frequency_pattern", Some("rank_pattern"))],
    read: |keys| Ok(Box::new(FourierFt::read(keys)?)),
};

#[derive(Debug)]
struct FourierFt {
    frequencies: usize,
    scaling: f64,
    seed: i64,
    zeros: bool,
    /// Layers of one shape have the same places.
    waves: Mutex<Vec<Arc<Waves>>>,
}

impl FourierFt {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        Ok(Self {
            frequencies: size(keys, "n_frequency", 1000)?,
            scaling: keys.number("scaling", 150.0)?,
            seed: seed(keys, "random_loc_seed", 777)?,
            zeros: keys.flag("init_weights", false)?,
            waves: Mutex::default(),
        })
    }

    fn waves(&self, (out, inp): (usize, usize), n: usize, device: &Device) -> Result<Arc<Waves>> {
        let mut made = self.waves.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = made.iter().find(|w| w.shape == (out, inp, n)) {
            return Ok(found.clone());
        }
        let waves = Arc::new(Waves::new((out, inp, n), self.seed, device)?);
        made.push(waves.clone());
        Ok(waves)
    }
}

impl Method for FourierFt {
    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let ((out, inp), n) = (start.dims(), start.rank.unwrap_or(self.frequencies));
        if n > out.saturating_mul(inp) {
            return Err(start.misfit("n_frequency", format!("{n} is more than its {out} · {inp} elements")));
        }
        let waves = self.waves((out, inp), n, start.device)?;
        match self.zeros {
            true => start.constant("fourierft_spectrum", 0.0, n, Role::Plain)?,
            false => start.normal("fourierft_spectrum", (0.0, 1.0), n, Role::Plain)?,
        }
        Ok((start.finish(Spectrum { waves, scaling: self.scaling }, 0.0), Vec::new()))
    }
}

/// The cosines and sines at the chosen frequencies. With frequency `(j, k)` a spectrum's coefficient adds
/// `cos 2π(jp/out + kq/in)` at row p and column q, and that is `cos·cos − sin·sin` of the two angles.
#[derive(Debug)]
struct Waves {
    /// `(out, in, frequencies)`.
    shape: (usize, usize, usize),
    /// `[out, 2·frequencies]`: cosines, then negated sines.
    of_rows: Tensor,
    /// `[in, 2·frequencies]`: cosines, then sines.
    of_columns: Tensor,
}

impl Waves {
    fn new(shape: (usize, usize, usize), seed: i64, device: &Device) -> Result<Self> {
        let (out, inp, n) = shape;
        let places = TorchRandom::new(seed).permutation((out * inp) as u64, n);
        let places: Vec<usize> = places.into_iter().map(|place| place as usize).collect();
        let of = |period: usize, sign: f64, frequency: &dyn Fn(usize) -> usize| -> Result<Tensor> {
            let angle = |i: usize| TAU * i as f64 / period as f64;
            let cos: Vec<f32> = (0..period).map(|i| angle(i).cos() as f32).collect();
            let sin: Vec<f32> = (0..period).map(|i| (sign * angle(i).sin()) as f32).collect();
            let mut values = Vec::with_capacity(period * 2 * n);
            for position in 0..period {
                for table in [&cos, &sin] {
                    values.extend(places.iter().map(|place| table[frequency(*place) * position % period]));
                }
            }
            Ok(Tensor::from_vec(values, (period, 2 * n), &Device::Cpu)?.to_device(device)?)
        };
        Ok(Self { shape, of_rows: of(out, -1.0, &|p| p / inp)?, of_columns: of(inp, 1.0, &|p| p % inp)? })
    }
}

/// `s·Re(ifft2(spectrum))`.
#[derive(Debug)]
struct Spectrum {
    waves: Arc<Waves>,
    scaling: f64,
}

impl Formula for Spectrum {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [spectrum] = exactly(parameters)?;
        let (out, inp, n) = self.waves.shape;
        let twice = (Tensor::cat(&[spectrum, spectrum], 0)? * (self.scaling / (out as f64 * inp as f64)))?;
        let columns = kernels::scale_columns(&self.waves.of_columns, &twice)?;
        // Of many frequencies the whole change is less work.
        if 2 * n * (out + inp) < out * inp {
            return Ok(Change::LowRank { a: columns.t()?.contiguous()?, b: self.waves.of_rows.clone() });
        }
        Ok(Change::Dense(kernels::trainable_linear(&self.waves.of_rows, &columns)?))
    }
}
