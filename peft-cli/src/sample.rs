//! Small pieces that several commands show: generations, downloads, memory.

use std::sync::Arc;
use std::sync::Mutex;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use peft_core::AdapterSet;
use peft_hub::{Event, Progress};
use peft_models::AnyModel;
use peft_models::generate::{GenerateOptions, Request};
use peft_models::tokenizer::Tokenizer;

/// Greedy continuations of `prompts`, through slot 0 of `adapters` where there is one.
pub(crate) fn continuations(
    model: &AnyModel,
    tokenizer: &Tokenizer,
    adapters: &AdapterSet,
    prompts: &[String],
    max_new_tokens: usize,
) -> Result<Vec<String>> {
    let slot = adapters.adapter(0).map(|_| 0);
    let requests =
        prompts.iter().map(|p| Ok(Request { prompt: tokenizer.encode(p, true)?, slot })).collect::<Result<Vec<_>>>()?;
    let options =
        GenerateOptions { max_new_tokens, stop: tokenizer.eos_token_ids().to_vec(), ..GenerateOptions::default() };
    let written = model.generate(adapters, &requests, &options, |_, _| true)?;
    written.iter().map(|ids| Ok(tokenizer.decode(ids, true)?)).collect()
}

/// A progress bar a file.
pub(crate) fn download_progress() -> Progress {
    let bar: Mutex<Option<ProgressBar>> = Mutex::new(None);
    Arc::new(move |event| {
        let Ok(mut bar) = bar.lock() else { return };
        match event {
            Event::Start { file, size, have } => {
                let new = ProgressBar::new(size.unwrap_or(0));
                if let Ok(style) = ProgressStyle::with_template("{msg} {bar:24} {bytes}/{total_bytes} {eta}") {
                    new.set_style(style);
                }
                new.set_message(file.to_string());
                new.set_position(have);
                *bar = Some(new);
            }
            Event::Advance { bytes, .. } => {
                if let Some(bar) = bar.as_ref() {
                    bar.inc(bytes);
                }
            }
            Event::Done { .. } => {
                if let Some(bar) = bar.take() {
                    bar.finish_and_clear();
                }
            }
            Event::Note { message } => eprintln!("{message}"),
            _ => {}
        }
    })
}

/// Peak resident memory of this process in bytes, where the system tells it.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Memory that is free for this process now, in bytes, where the system tells it.
pub(crate) fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
