//! `peft-cli`: train, evaluate, merge and run adapters over a frozen base model.

use std::process::ExitCode;

use clap::Parser;

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
mod memory;
mod open;
mod sample;

#[global_allocator]
static ALLOCATOR: peft_alloc::MiMalloc = peft_alloc::MiMalloc;

fn main() -> ExitCode {
    let args = args::Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    match peft_core::kernels::on_pool(|| cmd::run(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
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
