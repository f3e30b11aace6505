//! `peft-bench naive|step --model PATH`: one line of JSON with tokens a second, peak memory and the loss of step 1.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use peft_bench::{Settings, naive, ours};
use peft_core::kernels;
use peft_models::ModelFiles;

/// As in `peft-cli`. Both steps get it.
#[global_allocator]
static ALLOCATOR: peft_alloc::MiMalloc = peft_alloc::MiMalloc;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum What {
    /// As one would write it in stock candle
    Naive,
    /// As peft-train makes it
    Step,
}

/// Measure a LoRA training step (all linear layers of the blocks, AdamW) on random tokens.
#[derive(Debug, Parser)]
struct Args {
    what: What,
    /// A model folder or a .gguf file. One with a class head, or an encoder (two classes), is trained to classify (step only)
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

fn main() -> Result<()> {
    peft_alloc::keep_pages();
    let args = Args::parse();
    let measured = kernels::on_pool(|| -> Result<_> {
        let mut files = ModelFiles::open(&args.model)?;
        if files.lacks_class_head() {
            files.set_labels(vec!["LABEL_0".into(), "LABEL_1".into()])?;
        }
        let Args { batch, seq, steps, rank, checkpointing, keep, stored, .. } = args;
        let keep = if checkpointing { 0 } else { keep.unwrap_or(usize::MAX) };
        let settings = Settings { batch, seq, steps, rank, keep, stored };
        Ok(match args.what {
            What::Naive => naive::run(&files, &settings)?.1,
            What::Step => ours::run(&files, &settings)?.1,
        })
    });
    println!("{}", measured?);
    Ok(())
}
