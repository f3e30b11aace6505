//! Black-Box Tuning (Sun et al. 2022, arXiv:2201.03782): a soft prompt found by forward passes alone.
//!
//! The prompt is `p = p₀ + A·z` with `A` a fixed random projection of `[tokens · width, d]`, and [CMA-ES](crate::cma_es) searches
//! `z`. A step is a generation: every candidate's loss on the step's rows, then the prompt of the distribution's new mean. The
//! layer-wise version (BBTv2, arXiv:2205.11200) has a prompt in front of each block's input and a search for each, whose generations
//! take turns.
//!
//! `A` is never stored: its elements come from the counter generator, a function of seed, layer and place.

mod start;

pub use start::start;
pub(crate) use start::{prompt_of, write_block};

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::suggest::did_you_mean;
use peft_core::{Error, Result};
use rayon::prelude::*;

use crate::cma_es::{CmaEs, CmaEsConfig};
use crate::mezo::Estimate;

/// Keeps the numbers apart from those of other purposes, which share the run's seed.
const PURPOSE: u64 = 0x4242_5421 << 32;
/// Rows of `A` that are made together.
const ROWS: usize = 1024;

/// How the elements of `A` are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Projection {
    /// Normal with deviation `α·σ̂ / (√d·σ)`, where `σ̂` is that of the embeddings (in the layer-wise version, of the hidden states
    /// that go into the layer): a first candidate's `A·z` is then as large as they are, times `α` (BBTv2).
    #[default]
    Normal,
    /// Uniform in `±α/√d`, whatever the model (the first version).
    Uniform,
}

impl Projection {
    const NAMES: [(&'static str, Self); 2] = [("normal", Self::Normal), ("uniform", Self::Uniform)];
}

impl FromStr for Projection {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, p)| *p).ok_or_else(|| {
            let near = did_you_mean(name, Self::NAMES.map(|(known, _)| known));
            Error::config("train.bbt_projection", format!("`{name}` is neither `normal` nor `uniform`{near}"))
        })
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Normal => "normal",
            Self::Uniform => "uniform",
        })
    }
}

/// The settings of Black-Box Tuning.
#[derive(Debug, Clone, PartialEq)]
pub struct BbtConfig {
    /// Coordinates that are searched, of each layer: the paper's intrinsic dimension `d` (`bbt_dim`).
    pub dim: usize,
    /// Candidates a generation (`bbt_population`).
    pub population: usize,
    /// The first step size `σ` (`bbt_sigma`).
    pub sigma: f64,
    /// `α` of the projection (`bbt_alpha`).
    pub alpha: f64,
    /// How the projection is drawn (`bbt_projection`).
    pub projection: Projection,
    /// The run's seed.
    pub seed: u64,
}

/// The most coordinates: their covariance is a square of them.
const MAX_DIM: usize = 4096;

impl BbtConfig {
    fn check(&self) -> Result<()> {
        let out = |key: &str, message: String| Err(Error::config(format!("train.{key}"), message));
        if self.dim == 0 || self.dim > MAX_DIM {
            return out("bbt_dim", format!("is {}; it is a number from 1 to {MAX_DIM}", self.dim));
        }
        if self.population < 4 {
            return out("bbt_population", format!("is {}; a generation has 4 candidates or more", self.population));
        }
        for (key, value) in [("bbt_sigma", self.sigma), ("bbt_alpha", self.alpha)] {
            if !(value > 0.0 && value.is_finite()) {
                return out(key, format!("is {value}; it must be a number above 0"));
            }
        }
        Ok(())
    }
}

/// Where the search for one layer's prompt begins.
#[derive(Debug, Clone)]
pub struct StartRows {
    /// `p₀`, `[tokens, width]`.
    pub rows: Tensor,
    /// `σ̂`, the deviation of what such rows stand among.
    pub deviation: f64,
}

/// Whether there is one prompt in front of the tokens, or one in front of every block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Embeddings, which go through all blocks.
    Embeddings,
    /// The input of each block, of which the sequence sees the keys and values.
    EveryBlock,
}

#[derive(Debug)]
struct Layer {
    search: CmaEs,
    /// `p₀`, flat.
    start: Vec<f32>,
    tokens: usize,
    /// Deviation, or bound, of the elements of `A`.
    scale: f32,
}

/// Black-Box Tuning under way.
#[derive(Debug)]
pub struct Bbt {
    config: BbtConfig,
    depth: Depth,
    layers: Vec<Layer>,
}

impl Bbt {
    /// A search before its first generation.
    ///
    /// # Errors
    /// A setting out of range, by its key; starts that are not finite matrices.
    pub fn new(config: BbtConfig, depth: Depth, starts: &[StartRows]) -> Result<Self> {
        config.check()?;
        let layer = |(site, start): (usize, &StartRows)| {
            let (tokens, _) = start.rows.dims2()?;
            let root = (config.dim as f64).sqrt();
            let scale = match config.projection {
                Projection::Normal => config.alpha * start.deviation / (root * config.sigma),
                Projection::Uniform => config.alpha / root,
            };
            let rows = start.rows.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            if !(scale > 0.0 && scale.is_finite()) || rows.iter().any(|x| !x.is_finite()) {
                return Err(Error::msg(format!(
                    "bbt: the start of layer {site} is not finite, or all alike (deviation {})",
                    start.deviation
                )));
            }
            let search = CmaEs::new(CmaEsConfig {
                mean: vec![0.0; config.dim],
                sigma: config.sigma,
                population: Some(config.population),
                seed: config.seed,
                site: site as u32,
            })?;
            Ok(Layer { search, start: rows, tokens, scale: scale as f32 })
        };
        let layers = starts.iter().enumerate().map(layer).collect::<Result<Vec<_>>>()?;
        match layers.is_empty() {
            true => Err(Error::msg("bbt: there is no prompt to search")),
            false => Ok(Self { config, depth, layers }),
        }
    }

    /// Where the prompts stand.
    #[must_use]
    pub fn depth(&self) -> Depth {
        self.depth
    }

    /// The layer whose generation comes next: layers take turns.
    #[must_use]
    pub fn turn(&self) -> usize {
        let done: u64 = self.layers.iter().map(|l| l.search.generation()).sum();
        (done % self.layers.len().max(1) as u64) as usize
    }

    /// The step size of the search whose turn it is.
    #[must_use]
    pub fn sigma(&self) -> f64 {
        self.layers.get(self.turn()).map_or(0.0, |layer| layer.search.sigma())
    }

    /// One generation. `write` puts a layer's prompt `[tokens, width]` into the adapter, whose loss is then `loss`; in the end the
    /// prompt is that of the new mean. Where no candidate's loss is finite, the estimate says so and the prompt is the old mean's.
    /// The estimate's norm is the deviation of the losses over `σ`, which estimates that of the gradient by `z`.
    ///
    /// # Errors
    /// Those of `write` and `loss`; a search that diverged.
    pub fn step(
        &mut self,
        mut write: impl FnMut(usize, &Tensor) -> Result<()>,
        mut loss: impl FnMut() -> Result<f64>,
    ) -> Result<Estimate> {
        let turn = self.turn();
        let points = self.layer(turn)?.search.ask()?;
        let mut each = || -> Result<Vec<f64>> {
            let candidates = self.prompts(turn, &points)?;
            let value = |candidate: &Tensor| write(turn, candidate).and_then(|()| loss());
            candidates.iter().map(value).collect()
        };
        let values = each();
        let finite: Vec<f64> = values.iter().flatten().copied().filter(|v| v.is_finite()).collect();
        let sigma = self.layer(turn)?.search.sigma();
        let told = match (&values, self.layers.get_mut(turn)) {
            (Ok(values), Some(layer)) if !finite.is_empty() => layer.search.tell(&points, values),
            _ => Ok(()),
        };
        let mean = self.layer(turn)?.search.mean().to_vec();
        for prompt in self.prompts(turn, &[mean])? {
            write(turn, &prompt)?;
        }
        values.and(told)?;
        let count = finite.len() as f64;
        let loss = if finite.is_empty() { f64::NAN } else { finite.iter().sum::<f64>() / count };
        let variance = finite.iter().map(|v| (v - loss).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
        Ok(Estimate { loss, norm: variance.sqrt() / sigma })
    }

    fn layer(&self, layer: usize) -> Result<&Layer> {
        self.layers.get(layer).ok_or_else(|| Error::msg(format!("bbt: there is no layer {layer}")))
    }

    /// `p₀ + A·z` for each `z`, `[tokens, width]`.
    fn prompts(&self, layer: usize, points: &[Vec<f64>]) -> Result<Vec<Tensor>> {
        let (site, dim, projection) = (layer as u32, self.config.dim, self.config.projection);
        let Layer { start, tokens, scale, .. } = self.layer(layer)?;
        // A piece of rows of A after the other, each with a number of its own.
        let piece = |(number, start): (usize, &[f32])| -> Vec<Vec<f32>> {
            let stream = Stream { seed: self.config.seed ^ PURPOSE, step: number as u32, site };
            let a = match projection {
                Projection::Normal => stream.normal_vec(start.len() * dim, *scale),
                Projection::Uniform => stream.uniform_vec(start.len() * dim, -scale, *scale),
            };
            let of_point = |z: &Vec<f64>| {
                let row = |(a, start): (&[f32], &f32)| {
                    let moved: f64 = a.iter().zip(z).map(|(a, z)| f64::from(*a) * z).sum();
                    (f64::from(*start) + moved) as f32
                };
                a.chunks_exact(dim).zip(start).map(row).collect()
            };
            points.iter().map(of_point).collect()
        };
        let pieces: Vec<Vec<Vec<f32>>> = start.par_chunks(ROWS).enumerate().map(piece).collect();
        let whole = |i: usize| {
            let rows: Vec<f32> = pieces.iter().filter_map(|piece| piece.get(i)).flatten().copied().collect();
            Ok(Tensor::from_vec(rows, (*tokens, start.len() / tokens.max(&1)), &Device::Cpu)?)
        };
        (0..points.len()).map(whole).collect()
    }

    /// All that a checkpoint has to hold beside the adapter.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let states = self.layers.iter().enumerate().map(|(i, layer)| layer.search.state(&prefix(i)));
        Ok(states.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// Takes back what [`Bbt::state`] gave.
    ///
    /// # Errors
    /// Tensors that are missing, misshapen or not of this search; the message names them.
    pub fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let known = self.state()?;
        if let Some(key) = state.keys().find(|key| !known.iter().any(|(name, _)| name == *key)) {
            return Err(Error::msg(format!("`{key}` is not a tensor that bbt writes")));
        }
        self.layers.iter_mut().enumerate().try_for_each(|(i, layer)| layer.search.load_state(state, &prefix(i)))
    }
}

fn prefix(layer: usize) -> String {
    format!("layer.{layer}.")
}

#[cfg(test)]
mod tests;
