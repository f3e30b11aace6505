//! Black-Box Prompt Learning (Diao et al. 2022, arXiv:2201.08531): a prompt of words, found from losses alone.
//!
//! Each place of the prompt has a distribution over candidate n-grams ([`ngrams`]). A step draws prompts, takes the loss of each on
//! the step's rows, and moves the probabilities along the variance-reduced policy gradient, `1/(I−1) · Σ (Lₖ − L̄)·∇ log P(Tₖ)`,
//! then back onto the simplex. What reads the prompts ([`Judge`]) may be a model here or one behind an API; the result is a text.

mod endpoint;
mod endpoint_judge;
mod local_judge;
mod run;
mod vocabulary;

pub use endpoint::{Api, Endpoint, EndpointError, EndpointOptions};
pub use endpoint_judge::EndpointJudge;
pub use local_judge::LocalJudge;
pub use run::{BdplPlan, BdplTrainer, Judge, PROMPT_FILE, Readings};
pub use vocabulary::{VocabularyConfig, ngrams};

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::{Error, Result};

/// Keeps the draws apart from those of other purposes, which share the run's seed.
const PURPOSE: u64 = 0x4244_504c << 32;
/// The key of the probabilities in a checkpoint.
const PROBABILITIES: &str = "probabilities";
/// What a prompt ends with, before the row's own text.
const END: &str = "\n";
/// The most probabilities.
const MAX_ELEMENTS: usize = 1 << 24;

/// The settings of Black-Box Prompt Learning.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BdplConfig {
    /// Places of the prompt (`bdpl_length`).
    pub length: usize,
    /// Prompts that a step draws: the paper's `I` (`bdpl_samples`).
    pub samples: usize,
    /// Largest norm of the gradient; 0 is off (`max_grad_norm`).
    pub max_grad_norm: f64,
    /// The run's seed.
    pub seed: u64,
}

/// The distributions of a prompt's places.
#[derive(Debug, Clone)]
pub struct Bdpl {
    config: BdplConfig,
    candidates: Vec<String>,
    /// `[length, candidates]`, each row adding up to 1.
    probabilities: Vec<f32>,
}

impl Bdpl {
    /// Every candidate as likely as another, in every place.
    ///
    /// # Errors
    /// No place, fewer than two draws or candidates; the message names the key.
    pub fn new(config: BdplConfig, candidates: Vec<String>) -> Result<Self> {
        let out = |key: &str, message: String| Err(Error::config(format!("train.{key}"), message));
        if config.length == 0 {
            return out("bdpl_length", "is 0; a prompt has one place or more".into());
        }
        if config.samples < 2 {
            return out(
                "bdpl_samples",
                format!("is {}; the losses of two prompts or more are compared", config.samples),
            );
        }
        if candidates.len() < 2 {
            let message =
                format!("leaves {} candidates in the training texts, and it takes two or more", candidates.len());
            return out("bdpl_vocabulary", message);
        }
        if config.length.saturating_mul(candidates.len()) > MAX_ELEMENTS {
            let message = format!("times bdpl_vocabulary is more than {MAX_ELEMENTS} probabilities");
            return out("bdpl_length", message);
        }
        let probabilities = vec![1.0 / candidates.len() as f32; config.length * candidates.len()];
        Ok(Self { config, candidates, probabilities })
    }

    /// The candidates.
    #[must_use]
    pub fn candidates(&self) -> &[String] {
        &self.candidates
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> BdplConfig {
        self.config
    }

    fn places(&self) -> impl Iterator<Item = &[f32]> {
        self.probabilities.chunks_exact(self.candidates.len())
    }

    /// The candidate of each place in each prompt that step `step` draws.
    ///
    /// # Errors
    /// After 2³² steps.
    pub fn draw(&self, step: u64) -> Result<Vec<Vec<usize>>> {
        let step = u32::try_from(step).map_err(|_| Error::msg("bdpl: a run has at most 2^32 steps"))?;
        let one = |sample: usize| {
            let stream = Stream { seed: self.config.seed ^ PURPOSE, step, site: sample as u32 };
            self.places().enumerate().map(|(place, p)| drawn(p, stream.uniform(place as u64))).collect()
        };
        Ok((0..self.config.samples).map(one).collect())
    }

    /// The likeliest candidate of each place.
    #[must_use]
    pub fn likeliest(&self) -> Vec<usize> {
        let best = |p: &[f32]| {
            let first = p.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1));
            first.map_or(0, |(i, _)| i)
        };
        self.places().map(best).collect()
    }

    /// The prompt of these candidates: what is put before a row's text.
    #[must_use]
    pub fn text(&self, chosen: &[usize]) -> String {
        let words: Vec<&str> = chosen.iter().filter_map(|&c| self.candidates.get(c)).map(String::as_str).collect();
        words.join(" ") + END
    }

    /// Mean entropy of the places, in nats: how undecided the prompt is.
    #[must_use]
    pub fn entropy(&self) -> f64 {
        let of = |p: f32| if p > 0.0 { -f64::from(p) * f64::from(p).ln() } else { 0.0 };
        self.probabilities.iter().map(|&p| of(p)).sum::<f64>() / self.config.length as f64
    }

    /// Moves the probabilities by what the drawn prompts and their losses tell; gives the norm of the gradient before clipping. Where
    /// a loss is not finite, nothing is moved and the norm is not a number.
    ///
    /// # Errors
    /// Other numbers of prompts, losses or places than were drawn.
    pub fn update(&mut self, drawn: &[Vec<usize>], losses: &[f64], learning_rate: f64) -> Result<f64> {
        let (samples, width) = (self.config.samples, self.candidates.len());
        let fits = |prompt: &Vec<usize>| prompt.len() == self.config.length && prompt.iter().all(|&c| c < width);
        if drawn.len() != samples || losses.len() != samples || !drawn.iter().all(fits) {
            return Err(Error::msg("bdpl: other prompts than were drawn"));
        }
        if losses.iter().any(|loss| !loss.is_finite()) {
            return Ok(f64::NAN);
        }
        let mean = losses.iter().sum::<f64>() / samples as f64;
        let mut gradient = vec![0.0f64; self.probabilities.len()];
        for (prompt, loss) in drawn.iter().zip(losses) {
            let weight = (loss - mean) / (samples - 1) as f64;
            let places = gradient.chunks_exact_mut(width).zip(self.places());
            for ((gradient, p), &chosen) in places.zip(prompt) {
                // The chosen one's probability is 1 less all others', so that these have the derivative of its logarithm with the
                // other sign.
                let slope = weight / f64::from(p.get(chosen).copied().unwrap_or(1.0)).max(f64::from(f32::MIN_POSITIVE));
                gradient.iter_mut().enumerate().for_each(|(c, g)| *g += if c == chosen { slope } else { -slope });
            }
        }
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        if !norm.is_finite() {
            return Ok(f64::NAN);
        }
        let most = self.config.max_grad_norm;
        let clip = if most > 0.0 && norm > most { most / norm } else { 1.0 };
        for (p, gradient) in self.probabilities.chunks_exact_mut(width).zip(gradient.chunks_exact(width)) {
            let moved: Vec<f64> =
                p.iter().zip(gradient).map(|(p, g)| f64::from(*p) - learning_rate * clip * g).collect();
            p.iter_mut().zip(onto_simplex(&moved)).for_each(|(p, to)| *p = to as f32);
        }
        Ok(norm)
    }

    /// All that a checkpoint has to hold.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let shape = (self.config.length, self.candidates.len());
        Ok(vec![(PROBABILITIES.to_owned(), Tensor::from_slice(&self.probabilities, shape, &Device::Cpu)?)])
    }

    /// Takes back what [`Bdpl::state`] gave.
    ///
    /// # Errors
    /// Probabilities that are missing, misshapen, or none; the message names them.
    pub fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let (length, width) = (self.config.length, self.candidates.len());
        let found = state.get(PROBABILITIES).filter(|t| t.dtype() == DType::F32 && t.dims() == [length, width]);
        let found =
            found.ok_or_else(|| Error::msg(format!("`{PROBABILITIES}` of shape [{length}, {width}] is missing")))?;
        let rows = found.to_vec2::<f32>()?;
        let adds_up = |row: &Vec<f32>| row.iter().all(|p| *p >= 0.0) && (row.iter().sum::<f32>() - 1.0).abs() < 1e-3;
        if !rows.iter().all(adds_up) {
            return Err(Error::msg(format!("`{PROBABILITIES}` do not add up to 1")));
        }
        self.probabilities = rows.into_iter().flatten().collect();
        Ok(())
    }
}

/// The first candidate at which the probabilities before and its own are more than `uniform` of all.
fn drawn(probabilities: &[f32], uniform: f32) -> usize {
    let total: f64 = probabilities.iter().map(|p| f64::from(*p)).sum();
    let (mut sum, mut last) = (0.0, 0);
    for (i, p) in probabilities.iter().enumerate().filter(|(_, p)| **p > 0.0) {
        sum += f64::from(*p);
        last = i;
        if sum > f64::from(uniform) * total {
            break;
        }
    }
    last
}

/// The nearest point whose coordinates are not negative and add up to 1 (Duchi et al. 2008, algorithm 1).
fn onto_simplex(point: &[f64]) -> Vec<f64> {
    let mut sorted = point.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let (mut sum, mut shift) = (0.0, 0.0);
    for (i, x) in sorted.iter().enumerate() {
        sum += x;
        let candidate = (sum - 1.0) / (i + 1) as f64;
        if x - candidate > 0.0 {
            shift = candidate;
        }
    }
    point.iter().map(|x| (x - shift).max(0.0)).collect()
}

#[cfg(test)]
mod tests;
