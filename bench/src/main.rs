//! `peft-bench`: one measurement a process, as a line of JSON on stdout; and `growth`, which makes a curve of many.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use peft_bench::growth::{self, GrowthOptions};
use peft_bench::{Settings, decode, methods_picture, naive, ours, serve, shape};
use peft_core::kernels;
use peft_models::ModelFiles;

/// As in `peft-cli`. All measurements get it.
#[global_allocator]
static ALLOCATOR: peft_alloc::MiMalloc = peft_alloc::MiMalloc;

/// Measure training steps and decoding. `bench/vs_hf_peft` compares with Hugging Face PEFT.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// A LoRA training step (all linear layers of the blocks, AdamW) on random tokens, as peft-train makes it
    Step(StepArgs),
    /// The same step as one would write it in stock candle
    Naive(StepArgs),
    /// Greedy tokens after prompts, by the base alone or beside an adapter
    Decode(DecodeArgs),
    /// Many adapters in one batch beside one, switching and loading: ratios of one run
    Serve(ServeArgs),
    /// How a step's speed and memory grow, one dimension at a time: tables on stdout, pictures in a folder
    Growth(GrowthArgs),
    /// A picture of what bench/methods measured: accuracy over trained parameters
    MethodsPicture(MethodsPictureArgs),
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// A model folder or a .gguf file
    #[arg(long)]
    model: PathBuf,
    /// Tokens that each row writes
    #[arg(long, default_value_t = 32)]
    new_tokens: usize,
    /// How often everything is measured, in turn
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

#[derive(Debug, Args)]
struct StepArgs {
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
    /// Blocks, instead of the model's; the weights are then random (step only)
    #[arg(long)]
    layers: Option<usize>,
    /// Tokens of the vocabulary, instead of the model's; the weights are then random (step only)
    #[arg(long)]
    vocab: Option<usize>,
}

impl StepArgs {
    fn settings(&self) -> Settings {
        let Self { batch, seq, steps, rank, stored, .. } = *self;
        let keep = if self.checkpointing { 0 } else { self.keep.unwrap_or(usize::MAX) };
        Settings { batch, seq, steps, rank, keep, stored }
    }

    fn files(&self) -> Result<ModelFiles> {
        let mut files = ModelFiles::open(&self.model)?;
        if files.lacks_class_head() {
            files.set_labels(vec!["LABEL_0".into(), "LABEL_1".into()])?;
        }
        if self.layers.is_none() && self.vocab.is_none() {
            return Ok(files);
        }
        shape::random(files.decoder_config()?, self.layers, self.vocab)
    }
}

#[derive(Debug, Args)]
struct DecodeArgs {
    /// A model folder or a .gguf file of the Llama family
    #[arg(long)]
    model: PathBuf,
    /// The prompts, one batch: JSONL with `input_ids`
    #[arg(long)]
    rows: PathBuf,
    /// A folder with an adapter: decoding with it and without it in turn, and by how much it is slower
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Tokens to write after each prompt, whatever they are
    #[arg(long, default_value_t = 128)]
    new_tokens: usize,
    /// Hold weights as they lie in the file, not in f32
    #[arg(long)]
    stored: bool,
}

#[derive(Debug, Args)]
struct GrowthArgs {
    /// A model folder or a .gguf file of the Llama family
    #[arg(long)]
    model: PathBuf,
    /// Folder of the pictures
    #[arg(long, default_value = "docs/growth")]
    out: PathBuf,
    /// Sweeps, with commas between; all by default
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Measurements a point; the median counts
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Points up to this value only
    #[arg(long)]
    up_to: Option<usize>,
}

#[derive(Debug, Args)]
struct MethodsPictureArgs {
    /// Measurements, JSON lines
    #[arg(long)]
    results: PathBuf,
    /// Whose lines to draw
    #[arg(long)]
    model: String,
    /// The picture, an SVG file
    #[arg(long)]
    out: PathBuf,
}

fn main() -> Result<()> {
    peft_alloc::keep_pages();
    let report = match Cli::parse().what {
        What::Step(args) => kernels::on_pool(|| anyhow::Ok(ours::run(&args.files()?, &args.settings())?.1))?,
        What::Naive(args) => kernels::on_pool(|| anyhow::Ok(naive::run(&args.files()?, &args.settings())?.1))?,
        What::Decode(args) => kernels::on_pool(|| {
            let files = ModelFiles::open(&args.model)?;
            let prompts = decode::prompts(&args.rows)?;
            match &args.adapter {
                None => decode::run(&files, &prompts, args.new_tokens, args.stored),
                Some(adapter) => decode::with_adapter(&files, adapter, &prompts, args.new_tokens, args.stored),
            }
        })?,
        What::Serve(args) => serve::run(&args.model, args.new_tokens, args.rounds)?,
        What::Growth(GrowthArgs { model, out, only, rounds, up_to }) => {
            return growth::run(&GrowthOptions { model, out, only, rounds, up_to });
        }
        What::MethodsPicture(MethodsPictureArgs { results, model, out }) => {
            let svg = methods_picture::draw(&results, &model)?;
            return std::fs::write(&out, svg).with_context(|| out.display().to_string());
        }
    };
    println!("{report}");
    Ok(())
}
