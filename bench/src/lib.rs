/*!
What is measured of this project: a LoRA training step on random tokens, written twice, and decoding.

The step is written [`ours`], through `peft-train`, and [`naive`], as one would in stock candle. Both start from the same
weights, the same A and the same tokens, so their losses must agree. [`growth`] measures it over one dimension at a time.
*/

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use peft_core::kernels::Stream;
use serde_json::{Value, json};

pub mod decode;
pub mod growth;
pub mod methods_picture;
pub mod naive;
pub mod ours;
pub mod serve;
pub mod shape;
mod style;

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Sequences a batch.
    pub batch: usize,
    /// Tokens a sequence.
    pub seq: usize,
    /// Optimiser steps; the first is not timed.
    pub steps: usize,
    /// LoRA rank on every linear layer of the blocks.
    pub rank: usize,
    /// Blocks that are not run again in the backward pass, from the top (ours only).
    pub keep: usize,
    /// Weights as they lie in the file instead of `f32` (ours only).
    pub stored: bool,
}

/// Factor of the low-rank product: `lora_alpha / r`.
pub const SCALE: f64 = 2.0;
/// Constant learning rate of AdamW, without weight decay.
pub const LEARNING_RATE: f64 = 2e-4;
/// The linear layers of a Llama block, as transformers names them.
pub const LINEARS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// Token ids `[n]`, the same for every step: a linear congruential generator, Knuth's constants.
#[must_use]
pub fn random_tokens(n: usize, vocab: usize) -> Vec<u32> {
    let mut state = 0_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab.max(1) as u64) as u32
    };
    (0..n).map(|_| next()).collect()
}

/// Where LoRA's A of the layer at `path` starts: `[rank, inp]`, uniform in ±1/√inp.
///
/// # Errors
/// When the tensor cannot be made.
pub fn start_a(path: &str, rank: usize, inp: usize) -> Result<Tensor> {
    let site = path.bytes().fold(0_u32, |h, b| h.wrapping_mul(31).wrapping_add(u32::from(b)));
    let bound = 1.0 / (inp as f32).sqrt();
    let values = Stream { seed: 1, step: 0, site }.uniform_vec(rank * inp, -bound, bound);
    Ok(Tensor::from_vec(values, (rank, inp), &Device::Cpu)?)
}

/// Runs `step` as often as asked and gives the losses and what it took.
///
/// # Errors
/// When a step fails or its loss is not a number.
pub fn measure(settings: &Settings, mut step: impl FnMut() -> Result<f64>) -> Result<(Vec<f64>, Value)> {
    ensure!(
        settings.steps > 0 && settings.batch > 0 && settings.seq > 1,
        "nothing to measure: a step, a row, two tokens"
    );
    let (mut losses, mut seconds) = (Vec::new(), Vec::new());
    for i in 0..settings.steps {
        let started = Instant::now();
        let loss = step()?;
        ensure!(loss.is_finite(), "the loss of step {} is {loss}", i + 1);
        losses.push(loss);
        seconds.push(started.elapsed().as_secs_f64());
    }
    let timed = seconds.get(1..).filter(|s| !s.is_empty()).unwrap_or(&seconds);
    let tokens = settings.batch * settings.seq * timed.len();
    let report = json!({
        "tokens_per_second": (tokens as f64 / timed.iter().sum::<f64>() * 10.0).round() / 10.0,
        "peak_rss_mb": peak_rss_mb()?,
        "loss": losses.first(),
        "last_loss": losses.last(),
    });
    Ok((losses, report))
}

/// Largest resident memory that this process ever had, in units of 10⁶ bytes.
fn peak_rss_mb() -> Result<Option<u64>> {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return Ok(None) };
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).context("/proc/self/status has no VmHWM")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(Some(kib * 1024 / 1_000_000))
}

/// The code in the documentation compiles and runs.
#[cfg(doctest)]
mod documentation {
    #[doc = include_str!("../../README.md")]
    struct Readme;
    #[doc = include_str!("../../docs/adding-a-method.md")]
    struct AddingAMethod;
}
