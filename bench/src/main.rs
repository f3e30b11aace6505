//! `peft-bench naive|step|decode --model PATH`: one line of JSON with tokens a second, peak memory and what was computed.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser};
use peft_bench::decode::{self, Decoding};
use peft_bench::{Settings, naive, ours};
use peft_core::kernels;
use peft_models::ModelFiles;

/// As in `peft-cli`. All programs that are measured get it.
#[global_allocator]
static ALLOCATOR: peft_alloc::MiMalloc = peft_alloc::MiMalloc;

/// Measure on random tokens: a LoRA training step (all linear layers of the blocks, AdamW), or greedy decoding.
#[derive(Debug, Parser)]
enum Command {
    /// A training step as one would write it in stock candle
    Naive(StepArgs),
    /// A training step as peft-train makes it
    Step(StepArgs),
    /// Greedy decoding as `peft-cli generate` makes it
    Decode(DecodeArgs),
}

#[derive(Debug, Args)]
struct StepArgs {
    /// A model folder or a .gguf file of the Llama family
    #[arg(long)]
    model: PathBuf,
    /// Sequences a batch
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens a sequence
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Optimiser steps; the first is not timed
    #[arg(long, default_value_t = 4)]
    steps: usize,
    /// LoRA rank
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Run every block again in the backward pass (step only)
    #[arg(long, conflicts_with = "keep")]
    checkpointing: bool,
    /// Blocks that are not run again, from the top; all by default (step only)
    #[arg(long)]
    keep: Option<usize>,
    /// Hold weights as they lie in the file, not in f32 (step only)
    #[arg(long)]
    stored: bool,
}

impl StepArgs {
    fn settings(&self) -> Settings {
        let keep = if self.checkpointing { 0 } else { self.keep.unwrap_or(usize::MAX) };
        let Self { batch, seq, steps, rank, stored, .. } = *self;
        Settings { batch, seq, steps, rank, keep, stored }
    }
}

#[derive(Debug, Args)]
struct DecodeArgs {
    /// A model folder or a .gguf file of the Llama family
    #[arg(long)]
    model: PathBuf,
    /// Sequences a batch
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 32)]
    prompt_tokens: usize,
    /// Tokens to write after each prompt
    #[arg(long, default_value_t = 64)]
    new_tokens: usize,
    /// Hold weights as they lie in the file, not in f32
    #[arg(long)]
    stored: bool,
    /// An adapter's folder; given several times, the sequences take them in turn
    #[arg(long)]
    adapter: Vec<PathBuf>,
}

fn main() -> Result<()> {
    peft_alloc::keep_pages();
    let command = Command::parse();
    let measured = kernels::on_pool(|| match command {
        Command::Naive(args) => Ok(naive::run(&ModelFiles::open(&args.model)?, &args.settings())?.1),
        Command::Step(args) => Ok(ours::run(&ModelFiles::open(&args.model)?, &args.settings())?.1),
        Command::Decode(args) => {
            let DecodeArgs { model, batch, prompt_tokens, new_tokens, stored, adapter } = args;
            let settings = Decoding { batch, prompt_tokens, new_tokens, stored, adapters: adapter };
            decode::run(&ModelFiles::open(&model)?, &settings)
        }
    });
    println!("{}", measured?);
    Ok(())
}
