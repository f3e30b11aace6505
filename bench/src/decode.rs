//! Greedy decoding by the base alone, through this project's library.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use peft_core::AdapterSet;
use peft_models::generate::{GenerateOptions, Request, generate};
use peft_models::source::Placement;
use peft_models::{Decoder, ModelFiles};
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

/// Writes `new_tokens` tokens after each of `prompts`, all in one batch, in `f32`; `stored` leaves the weights as they lie
/// in the file. The seconds are those of the whole call, the prompts' own pass included.
///
/// # Errors
/// When the model cannot be loaded or generation fails.
pub fn run(files: &ModelFiles, prompts: &[Vec<u32>], new_tokens: usize, stored: bool) -> Result<Value> {
    let weights = if stored { None } else { Some(DType::F32) };
    let model: Decoder = files.load_decoder(&Placement::cpu(weights), 0)?;
    let requests: Vec<Request> = prompts.iter().map(|p| Request { prompt: p.clone(), slot: None }).collect();
    let write = |max_new_tokens| {
        let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
        generate(&model, &AdapterSet::empty(), &requests, &options, |_, _| true)
    };
    // Whatever is made at the first use is not what is measured.
    write(2)?;
    let started = Instant::now();
    let written = write(new_tokens)?;
    Ok(json!({ "seconds": started.elapsed().as_secs_f64(), "tokens": written }))
}
