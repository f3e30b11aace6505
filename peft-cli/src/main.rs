//! `peft-cli`: train, evaluate, merge and run adapters over a frozen base model.

use std::process::ExitCode;

use clap::Parser;

mod args;
mod cmd;
mod memory;
mod open;
mod sample;

/// Large tensors are made and dropped at every step; mimalloc keeps their pages instead of returning them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let args = args::Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    match cmd::run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}
