//! MeZO (Malladi et al. 2023, arXiv:2305.17333): training by forward passes alone.
//!
//! A step moves all parameters by `+ε·z` and by `−ε·z` in place, with a standard normal `z` that is made anew each time from its
//! place in the run and never stored, and takes the loss at both. Their difference over `2ε` is the derivative along `z`, and the
//! update is that much of `z`: `θ ← θ − η·g·z` (simultaneous perturbation, Spall 1992). With several samples a step, the mean of
//! their estimates is taken (n-SPSA). There is no gradient and no tape, and without momentum no state, so that a step takes the
//! memory of an evaluation. Momentum is that of SGD on the estimates, `m ← β·m + g·z`, `θ ← θ − η·m` (the paper's appendix B): a copy
//! of the parameters in `f32`.
//!
//! Parameters are `f32` copies whatever the base is stored in. Moving there and back rounds them; since the same sums are made
//! again from the same numbers, a run is a function of its start and of one number a sample, which [`Record`] keeps.

mod record;

pub use record::{Record, checksum};

use candle_core::Var;
use peft_core::kernels::{Stream, add_normals};
use peft_core::{Context, Error, Result};

use crate::optim::OptParam;

/// Keeps the numbers apart from those of initialisation and dropout, which share the run's seed.
const PURPOSE: u64 = 0x4d65_5a4f << 32;

/// The settings of MeZO.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MezoConfig {
    /// How far parameters are moved, as a factor of `z` (`mezo_eps`).
    pub eps: f64,
    /// Estimates that a step takes the mean of (`mezo_samples`).
    pub samples: usize,
    /// Share of the last update that is kept; 0 is off (`momentum`).
    pub momentum: f64,
    /// The run's seed.
    pub seed: u64,
}

/// What one step was: with the start, all that makes it again.
#[derive(Debug, Clone, PartialEq)]
pub struct Taken {
    /// The scheduled learning rate.
    pub learning_rate: f32,
    /// The derivative along each sample's direction.
    pub derivatives: Vec<f32>,
}

/// What a step measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Mean of the losses.
    pub loss: f64,
    /// Root of the mean of the squared derivatives, an estimate of the gradient's norm.
    pub norm: f64,
}

/// MeZO with the record of its steps.
#[derive(Debug)]
pub struct Mezo {
    config: MezoConfig,
    taken: Vec<Taken>,
    /// Of each parameter, where there is momentum and a step was made.
    momenta: Vec<Var>,
}

impl Mezo {
    /// MeZO before its first step.
    ///
    /// # Errors
    /// A step that is not positive and finite, or no samples.
    pub fn new(config: MezoConfig) -> Result<Self> {
        if !(config.eps > 0.0 && config.eps.is_finite() && config.eps as f32 > 0.0) {
            return Err(Error::config("train.mezo_eps", format!("is {}; it must be a number above 0", config.eps)));
        }
        if config.samples == 0 {
            return Err(Error::config("train.mezo_samples", "is 0; a step takes one estimate or more"));
        }
        if !(0.0..1.0).contains(&config.momentum) {
            return Err(Error::config(
                "train.momentum",
                format!("is {}; it is a number from 0, below 1", config.momentum),
            ));
        }
        Ok(Self { config, taken: Vec::new(), momenta: Vec::new() })
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> MezoConfig {
        self.config
    }

    /// The steps so far.
    #[must_use]
    pub fn taken(&self) -> &[Taken] {
        &self.taken
    }

    /// Takes over the steps of an earlier part of the run.
    ///
    /// # Errors
    /// Steps of another number of samples.
    pub(crate) fn set_taken(&mut self, taken: Vec<Taken>) -> Result<()> {
        if taken.iter().any(|t| t.derivatives.len() != self.config.samples) {
            return Err(Error::config("train.mezo_samples", format!("is {} and was not before", self.config.samples)));
        }
        self.taken = taken;
        Ok(())
    }

    /// One step on `parameters`, whose loss is `loss`. A loss that is not finite is in the estimate, and nothing is updated then.
    ///
    /// # Errors
    /// Those of `loss`; a parameter that is not `f32`.
    pub fn step(
        &mut self,
        parameters: &[OptParam],
        learning_rate: f64,
        mut loss: impl FnMut() -> Result<f64>,
    ) -> Result<Estimate> {
        let eps = self.config.eps as f32;
        let (mut sum, mut squares) = (0.0, 0.0);
        let mut derivatives = Vec::with_capacity(self.config.samples);
        for sample in 0..self.config.samples {
            self.shift(parameters, sample, eps)?;
            let up = loss();
            self.shift(parameters, sample, -2.0 * eps)?;
            let both = up.and_then(|up| Ok((up, loss()?)));
            let (up, down) = match both {
                Ok((up, down)) if up.is_finite() && down.is_finite() => (up, down),
                other => {
                    self.shift(parameters, sample, eps)?;
                    let (up, down) = other?;
                    return Ok(Estimate { loss: 0.5 * (up + down), norm: 0.0 });
                }
            };
            let derivative = ((up - down) / (2.0 * f64::from(eps))) as f32;
            sum += 0.5 * (up + down);
            squares += f64::from(derivative).powi(2);
            derivatives.push(derivative);
            self.after_sample(parameters, sample)?;
        }
        let samples = self.config.samples as f64;
        let estimate = Estimate { loss: sum / samples, norm: (squares / samples).sqrt() };
        if estimate.norm.is_finite() {
            self.update(parameters, Taken { learning_rate: learning_rate as f32, derivatives })?;
        }
        Ok(estimate)
    }

    /// Makes a step again, bit for bit, without the model.
    ///
    /// # Errors
    /// A step of another number of samples; a parameter that is not `f32`.
    pub fn replay(&mut self, parameters: &[OptParam], taken: &Taken) -> Result<()> {
        if taken.derivatives.len() != self.config.samples {
            return Err(Error::msg("a recorded step has another number of samples than the run"));
        }
        let eps = self.config.eps as f32;
        for sample in 0..self.config.samples {
            self.shift(parameters, sample, eps)?;
            self.shift(parameters, sample, -2.0 * eps)?;
            self.after_sample(parameters, sample)?;
        }
        self.update(parameters, taken.clone())
    }

    /// The last sample goes back to the middle with its update, in one pass, unless weights decay from there.
    fn after_sample(&self, parameters: &[OptParam], sample: usize) -> Result<()> {
        for (i, p) in parameters.iter().enumerate() {
            if !self.goes_back_with_update(p, sample) {
                self.add(p, i, sample, 1.0, self.config.eps as f32)?;
            }
        }
        Ok(())
    }

    fn goes_back_with_update(&self, parameter: &OptParam, sample: usize) -> bool {
        sample + 1 == self.config.samples && parameter.weight_decay == 0.0 && self.config.momentum == 0.0
    }

    fn update(&mut self, parameters: &[OptParam], taken: Taken) -> Result<()> {
        if self.config.momentum > 0.0 {
            self.update_with_momentum(parameters, &taken)?;
            self.taken.push(taken);
            return Ok(());
        }
        for (i, p) in parameters.iter().enumerate() {
            let rate = f64::from(taken.learning_rate) * p.lr_scale;
            for (sample, derivative) in taken.derivatives.iter().enumerate().rev() {
                let back = if self.goes_back_with_update(p, sample) { f64::from(self.config.eps as f32) } else { 0.0 };
                let last = sample + 1 == self.config.samples;
                let keep = if last { 1.0 - rate * p.weight_decay } else { 1.0 };
                let scale = back - rate * f64::from(*derivative) / self.config.samples as f64;
                self.add(p, i, sample, keep as f32, scale as f32)?;
            }
        }
        self.taken.push(taken);
        Ok(())
    }

    fn update_with_momentum(&mut self, parameters: &[OptParam], taken: &Taken) -> Result<()> {
        if self.momenta.is_empty() {
            let zeros = parameters.iter().map(|p| Ok(Var::from_tensor(&p.var.zeros_like()?)?));
            self.momenta = zeros.collect::<Result<_>>()?;
        }
        if self.momenta.len() != parameters.len() {
            return Err(Error::msg("mezo: the momentum is that of other parameters"));
        }
        for (i, (p, momentum)) in parameters.iter().zip(&self.momenta).enumerate() {
            if momentum.shape() != p.var.shape() {
                return Err(Error::msg(format!("mezo: the momentum of {} has another shape", p.name)));
            }
            for (sample, derivative) in taken.derivatives.iter().enumerate() {
                let keep = if sample == 0 { self.config.momentum } else { 1.0 };
                let scale = f64::from(*derivative) / self.config.samples as f64;
                let stream = self.stream(i, sample)?;
                add_normals(momentum, keep as f32, scale as f32, stream).with_context(|| p.name.clone())?;
            }
            let rate = f64::from(taken.learning_rate) * p.lr_scale;
            let kept = p.var.as_detached_tensor().affine(1.0 - rate * p.weight_decay, 0.0)?;
            p.var.set(&(kept - momentum.as_detached_tensor().affine(rate, 0.0)?)?)?;
        }
        Ok(())
    }

    /// Moves all parameters by `scale · z` of a sample of the coming step.
    fn shift(&self, parameters: &[OptParam], sample: usize, scale: f32) -> Result<()> {
        parameters.iter().enumerate().try_for_each(|(i, p)| self.add(p, i, sample, 1.0, scale))
    }

    fn add(&self, parameter: &OptParam, index: usize, sample: usize, keep: f32, scale: f32) -> Result<()> {
        let stream = self.stream(index, sample)?;
        add_normals(&parameter.var, keep, scale, stream).with_context(|| parameter.name.clone())
    }

    /// Where the numbers of a sample of the coming step come from, for a parameter.
    fn stream(&self, index: usize, sample: usize) -> Result<Stream> {
        let draw = self.taken.len() * self.config.samples + sample;
        let (Ok(step), Ok(site)) = (u32::try_from(draw), u32::try_from(index)) else {
            return Err(Error::msg("mezo: a run has at most 2^32 samples"));
        };
        Ok(Stream { seed: self.config.seed ^ PURPOSE, step, site })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::{Device, Tensor, Var};

    use super::*;

    fn parameters(decay: f64) -> Vec<OptParam> {
        let var = |n: usize, start: f32| {
            let values: Vec<f32> = (0..n).map(|i| start + 0.1 * i as f32).collect();
            Var::from_tensor(&Tensor::from_vec(values, n, &Device::Cpu).unwrap()).unwrap()
        };
        let mut all = vec![OptParam::new("a", var(5, 1.0)), OptParam::new("b", var(130, -2.0))];
        all[1].weight_decay = decay;
        all[0].lr_scale = 2.0;
        all
    }

    fn values(parameters: &[OptParam]) -> Vec<f32> {
        parameters.iter().flat_map(|p| p.var.to_vec1::<f32>().unwrap()).collect()
    }

    /// `½ Σ c·θ²`, with its own sum in `f64`.
    fn quadratic(parameters: &[OptParam]) -> f64 {
        let weighed = values(parameters).into_iter().enumerate();
        weighed.map(|(i, x)| 0.5 * (1.0 + i as f64 / 50.0) * f64::from(x).powi(2)).sum()
    }

    fn mezo(samples: usize) -> Mezo {
        with_momentum(samples, 0.0)
    }

    fn with_momentum(samples: usize, momentum: f64) -> Mezo {
        Mezo::new(MezoConfig { eps: 1e-3, samples, momentum, seed: 11 }).unwrap()
    }

    /// The numbers of a sample, as the generator gives them to a tensor of zeros.
    fn z(step: u32, sizes: &[usize]) -> Vec<f32> {
        let of = |(site, n): (usize, &usize)| {
            let x = Var::zeros(*n, candle_core::DType::F32, &Device::Cpu).unwrap();
            add_normals(&x, 1.0, 1.0, Stream { seed: 11 ^ PURPOSE, step, site: site as u32 }).unwrap();
            x.to_vec1::<f32>().unwrap()
        };
        sizes.iter().enumerate().flat_map(of).collect()
    }

    /// By the book, in `f64`: `θ·(1 − η·λ) − η/n · Σ g·z`, with the derivative of the quadratic along `z` known.
    #[test]
    fn a_step_is_that_of_the_paper() {
        for (samples, decay) in [(1, 0.0), (1, 0.5), (3, 0.0), (2, 0.25)] {
            let parameters = parameters(decay);
            let start = values(&parameters);
            let mut mezo = mezo(samples);
            let estimate = mezo.step(&parameters, 1e-3, || Ok(quadratic(&parameters))).unwrap();
            let zs: Vec<Vec<f32>> = (0..samples as u32).map(|s| z(s, &[5, 130])).collect();
            let mut squares = 0.0;
            for (i, got) in values(&parameters).into_iter().enumerate() {
                let (scale, decay) = if i < 5 { (2.0, 0.0) } else { (1.0, decay) };
                let mut want = f64::from(start[i]) * (1.0 - 1e-3 * scale * decay);
                for z in &zs {
                    let along: f64 = start
                        .iter()
                        .zip(z)
                        .enumerate()
                        .map(|(k, (x, z))| (1.0 + k as f64 / 50.0) * f64::from(x * z))
                        .sum();
                    want -= 1e-3 * scale * along * f64::from(z[i]) / samples as f64;
                    squares += along * along / samples as f64 / start.len() as f64;
                }
                assert!(
                    (f64::from(got) - want).abs() < 2e-4 * want.abs().max(1.0),
                    "{samples} {decay} {i}: {got} {want}"
                );
            }
            assert!((estimate.norm - squares.sqrt()).abs() < 1e-2 * estimate.norm, "{estimate:?} {}", squares.sqrt());
        }
    }

    /// Three steps by the book, in `f64`: `m ← β·m + (1/n) Σ g·z`, `θ ← θ·(1 − η·λ) − η·m`.
    #[test]
    fn momentum_is_that_of_sgd_on_the_estimates() {
        for (samples, decay) in [(1, 0.0), (2, 0.5)] {
            let parameters = parameters(decay);
            let mut want: Vec<f64> = values(&parameters).into_iter().map(f64::from).collect();
            let mut momentum = vec![0.0; want.len()];
            let mut mezo = with_momentum(samples, 0.8);
            for step in 0..3 {
                mezo.step(&parameters, 1e-3, || Ok(quadratic(&parameters))).unwrap();
                momentum.iter_mut().for_each(|m| *m *= 0.8);
                for sample in 0..samples {
                    let z = z((step * samples + sample) as u32, &[5, 130]);
                    let g = f64::from(mezo.taken()[step].derivatives[sample]);
                    momentum.iter_mut().zip(z).for_each(|(m, z)| *m += g * f64::from(z) / samples as f64);
                }
                for (i, (x, m)) in want.iter_mut().zip(&momentum).enumerate() {
                    let (scale, decay) = if i < 5 { (2.0, 0.0) } else { (1.0, decay) };
                    *x = *x * (1.0 - 1e-3 * scale * decay) - 1e-3 * scale * m;
                }
            }
            for (got, want) in values(&parameters).into_iter().zip(&want) {
                assert!((f64::from(got) - want).abs() < 1e-5 * want.abs().max(1.0), "{samples}: {got} {want}");
            }
            // What a checkpoint holds is the momentum too; one without it is refused.
            let state: std::collections::HashMap<_, _> = mezo.state().unwrap().into_iter().collect();
            let mut other = with_momentum(samples, 0.8);
            other.load_state(&state).unwrap();
            assert!(mezo_without(&state, samples).contains("momentum.0"));
            let again = crate::mezo::tests::parameters(decay);
            again.iter().zip(&parameters).for_each(|(a, p)| a.var.set(&p.var.copy().unwrap()).unwrap());
            for (mezo, parameters) in [(&mut mezo, &parameters), (&mut other, &again)] {
                mezo.step(parameters, 1e-3, || Ok(quadratic(parameters))).unwrap();
            }
            assert_eq!(values(&parameters), values(&again));
        }
    }

    fn mezo_without(state: &std::collections::HashMap<String, Tensor>, samples: usize) -> String {
        let state = state.iter().filter(|(key, _)| *key != "momentum.0").map(|(k, t)| (k.clone(), t.clone())).collect();
        with_momentum(samples, 0.8).load_state(&state).unwrap_err().to_string()
    }

    #[test]
    fn it_goes_down_and_a_record_makes_it_again_bit_for_bit() {
        for (samples, decay, momentum) in [(1, 0.0, 0.0), (3, 0.1, 0.0), (1, 0.1, 0.5), (2, 0.0, 0.9)] {
            let (trained, again) = (parameters(decay), parameters(decay));
            let mut mezo = with_momentum(samples, momentum);
            let before = quadratic(&trained);
            for step in 0..200 {
                mezo.step(&trained, 2e-3 / f64::from(1 + step), || Ok(quadratic(&trained))).unwrap();
            }
            assert!(quadratic(&trained) < before);
            let mut other = super::Mezo::new(mezo.config()).unwrap();
            for taken in mezo.taken() {
                other.replay(&again, taken).unwrap();
            }
            let bits = |p: &[OptParam]| values(p).into_iter().map(f32::to_bits).collect::<Vec<_>>();
            assert_eq!(bits(&trained), bits(&again));
            assert_eq!(other.taken(), mezo.taken());
        }
    }

    #[test]
    fn a_loss_that_fails_or_is_not_finite_leaves_parameters_where_they_were() {
        let parameters = parameters(0.0);
        let start = values(&parameters);
        let mut mezo = mezo(2);
        let back = || values(&parameters).iter().zip(&start).all(|(a, b)| (a - b).abs() < 4e-6);
        assert!(mezo.step(&parameters, 0.1, || Ok(f64::NAN)).unwrap().loss.is_nan());
        assert!(back() && mezo.taken().is_empty());
        assert!(mezo.step(&parameters, 0.1, || Err(Error::msg("no"))).is_err());
        assert!(back() && mezo.taken().is_empty());
        for (eps, samples) in [(0.0, 1), (f64::NAN, 1), (-1.0, 1), (1e-300, 1), (1e-3, 0)] {
            let config = MezoConfig { eps, samples, momentum: 0.0, seed: 0 };
            assert!(Mezo::new(config).unwrap_err().to_string().contains("train.mezo_"));
        }
        for momentum in [1.0, -0.1, f64::NAN] {
            let config = MezoConfig { eps: 1e-3, samples: 1, momentum, seed: 0 };
            assert!(Mezo::new(config).unwrap_err().to_string().contains("train.momentum"));
        }
    }
}
