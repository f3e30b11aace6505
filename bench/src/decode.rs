//! Greedy decoding through `peft_models::generate`, which `hf_decode.py` does with transformers' `generate`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use peft_core::AdapterSet;
use peft_models::ModelFiles;
use peft_models::generate::{GenerateOptions, Request, generate};
use peft_models::source::Placement;
use peft_train::methods;
use serde_json::{Value, json};

use crate::{peak_rss_mb, random_tokens};

/// Times that the whole is measured, after a run that is not; the median counts.
const RUNS: usize = 3;

/// What is measured.
#[derive(Debug, Clone)]
pub struct Decoding {
    /// Sequences a batch.
    pub batch: usize,
    /// Random tokens of each prompt.
    pub prompt_tokens: usize,
    /// Tokens to write after each prompt, whatever they are.
    pub new_tokens: usize,
    /// Weights as they lie in the file instead of `f32`.
    pub stored: bool,
    /// Folders of adapters; the sequences take them in turn.
    pub adapters: Vec<PathBuf>,
}

/// Loads `files` and decodes. `tokens_per_second` counts new tokens over the time of prefill and decoding together,
/// `prefill_ms` is the time to the first token, and `tokens` are the first ones of the first sequence.
///
/// # Errors
/// When the model or an adapter cannot be loaded or a step fails.
pub fn run(files: &ModelFiles, settings: &Decoding) -> Result<Value> {
    let Decoding { batch, prompt_tokens, new_tokens, .. } = *settings;
    ensure!(batch > 0 && prompt_tokens > 0 && new_tokens > 1, "nothing to measure: a sequence, a token, two new ones");
    let weights = if settings.stored { None } else { Some(DType::F32) };
    let model = files.load(&Placement::cpu(weights), 0)?;
    let mut set = AdapterSet::empty();
    for path in &settings.adapters {
        let name = path.to_str().context("an adapter's path is not text")?;
        set = set.with(name, Arc::new(methods::open(path, &model)?.adapter));
    }
    let ids = random_tokens(batch * prompt_tokens, files.config().vocab_size);
    let requests: Vec<Request> = ids
        .chunks(prompt_tokens)
        .enumerate()
        .map(|(i, prompt)| Request { prompt: prompt.to_vec(), slot: i.checked_rem(settings.adapters.len()) })
        .collect();
    let timed = |max_new_tokens| -> Result<(f64, Vec<Vec<u32>>)> {
        let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
        let started = Instant::now();
        let written = generate(&model, &set, &requests, &options, |_, _| true)?;
        Ok((started.elapsed().as_secs_f64(), written))
    };
    timed(2)?;
    let (mut first, mut whole, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        first.push(timed(1)?.0);
        let (seconds, written) = timed(new_tokens)?;
        whole.push(seconds);
        tokens = written.into_iter().next().unwrap_or_default();
    }
    let (first, whole) = (median(first), median(whole));
    tokens.truncate(8);
    let round = |x: f64| (x * 100.0).round() / 100.0;
    Ok(json!({
        "tokens_per_second": round((batch * new_tokens) as f64 / whole),
        "prefill_ms": round(1e3 * first),
        "step_ms": round(1e3 * (whole - first) / (new_tokens - 1) as f64),
        "peak_rss_mb": peak_rss_mb()?,
        "tokens": tokens,
    }))
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
}
