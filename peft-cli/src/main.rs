//! `peft-cli`: train, evaluate, merge and run adapters over a frozen base model.

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::args::{Command, LogFormat};

/// A line on stdout. A reader that has gone (`… | head`) ends the program quietly, where `println!` would panic.
macro_rules! out {
    ($($text:tt)*) => { $crate::write_out(format_args!("{}\n", format_args!($($text)*))) };
}

/// As `out!`, without the end of the line.
macro_rules! out_part {
    ($($text:tt)*) => { $crate::write_out(format_args!($($text)*)) };
}

mod args;
mod cmd;
mod device;
mod memory;
mod open;
mod sample;

#[global_allocator]
static ALLOCATOR: peft_alloc::MiMalloc = peft_alloc::MiMalloc;

fn main() -> ExitCode {
    let args = args::Args::parse();
    start_log(&args);
    // A server's threads have work for the pool, and must not be one of it.
    let ran = match args.command {
        Command::Serve(_) => cmd::run(args),
        _ => peft_core::kernels::on_pool(|| cmd::run(args)),
    };
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The log goes to stderr: what went wrong, and what RUST_LOG asks for. A server says what it does.
fn start_log(args: &args::Args) {
    let (level, json) = match &args.command {
        Command::Serve(serve) => (LevelFilter::INFO, serve.log == LogFormat::Json),
        _ => (LevelFilter::ERROR, false),
    };
    let filter = EnvFilter::builder().with_default_directive(level.into()).from_env_lossy();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match json {
        true => log.json().flatten_event(true).init(),
        false => log.init(),
    }
}

fn write_out(text: std::fmt::Arguments<'_>) {
    use std::io::Write;
    let mut stdout = std::io::stdout().lock();
    if let Err(e) = stdout.write_fmt(text).and_then(|()| stdout.flush()) {
        if e.kind() == std::io::ErrorKind::BrokenPipe {
            std::process::exit(0);
        }
        eprintln!("error: cannot write to stdout: {e}");
        std::process::exit(1);
    }
}
