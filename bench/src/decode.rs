//! Greedy decoding through this project's library, by the base alone or beside an adapter that is served, not merged.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use peft_core::AdapterSet;
use peft_models::generate::{GenerateOptions, Request, generate};
use peft_models::source::Placement;
use peft_models::{Decoder, ModelFiles};
use peft_train::methods;
use serde_json::{Value, json};

/// The prompts in a JSONL file of `{"input_ids": […]}`.
///
/// # Errors
/// When the file cannot be read, holds no prompt, or a row is something else.
pub fn prompts(path: &Path) -> Result<Vec<Vec<u32>>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let prompt = |(i, line): (usize, &str)| {
        let place = || format!("{}, line {}", path.display(), i + 1);
        let mut row: Value = serde_json::from_str(line).with_context(place)?;
        let ids = row.get_mut("input_ids").map(Value::take).with_context(|| format!("{}: no `input_ids`", place()))?;
        serde_json::from_value(ids).with_context(|| format!("{}: `input_ids` are not token ids", place()))
    };
    let prompts = text.lines().enumerate().map(prompt).collect::<Result<Vec<_>>>()?;
    ensure!(!prompts.is_empty(), "{} holds no prompt", path.display());
    Ok(prompts)
}

/// How often base and adapter are measured in turn.
const ROUNDS: usize = 3;

/// Writes `new_tokens` tokens after each of `prompts`, all in one batch, in `f32`; `stored` leaves the weights as they lie
/// in the file. The seconds are those of the whole call, the prompts' own pass included.
///
/// # Errors
/// When the model cannot be loaded or generation fails.
pub fn run(files: &ModelFiles, prompts: &[Vec<u32>], new_tokens: usize, stored: bool) -> Result<Value> {
    let model = load(files, stored)?;
    let write = |new_tokens| write(&model, &AdapterSet::empty(), prompts, new_tokens);
    // Whatever is made at the first use is not what is measured.
    write(2)?;
    let (seconds, written) = write(new_tokens)?;
    Ok(json!({ "seconds": seconds, "tokens": written }))
}

/// The same with the adapter in a folder and without it, in turn: the medians of each, and the median of their ratios.
///
/// # Errors
/// As [`run`], and when the adapter does not fit the model.
pub fn with_adapter(
    files: &ModelFiles,
    adapter: &Path,
    prompts: &[Vec<u32>],
    new_tokens: usize,
    stored: bool,
) -> Result<Value> {
    let model = load(files, stored)?;
    let adapted = AdapterSet::one("adapter", Arc::new(methods::open(adapter, &model)?.adapter));
    let sets = [AdapterSet::empty(), adapted];
    let mut seconds = [Vec::new(), Vec::new()];
    for set in &sets {
        write(&model, set, prompts, 2)?;
    }
    for _ in 0..ROUNDS {
        for (set, seconds) in sets.iter().zip(&mut seconds) {
            seconds.push(write(&model, set, prompts, new_tokens)?.0);
        }
    }
    let [base, adapted] = seconds;
    let ratios = adapted.iter().zip(&base).map(|(a, b)| a / b).collect();
    Ok(json!({ "seconds": median(adapted), "base_seconds": median(base), "overhead": median(ratios) - 1.0 }))
}

fn load(files: &ModelFiles, stored: bool) -> Result<Decoder> {
    let weights = if stored { None } else { Some(DType::F32) };
    Ok(files.load_decoder(&Placement::cpu(weights), 0)?)
}

/// Seconds, and what was written, every row beside the set's only adapter if it has one.
fn write(model: &Decoder, set: &AdapterSet, prompts: &[Vec<u32>], new_tokens: usize) -> Result<(f64, Vec<Vec<u32>>)> {
    let slot = set.slot("adapter");
    let requests: Vec<Request> = prompts.iter().map(|p| Request { prompt: p.clone(), slot }).collect();
    let options = GenerateOptions { max_new_tokens: new_tokens, ..GenerateOptions::default() };
    let started = Instant::now();
    let written = generate(model, set, &requests, &options, |_, _| true)?;
    Ok((started.elapsed().as_secs_f64(), written))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
