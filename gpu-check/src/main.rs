//! Runs every operation of peft-kernels, forward and backward, and a few training steps on a device, in three float
//! types, and compares each with the CPU.
//!
//! ```sh
//! gpu-check --device cuda:0
//! gpu-check --device cpu --small    # the rehearsal: bf16 and f16 go through the backend-neutral forms
//! ```
//! Exit status: 0 when all is within its limit, 1 when something is not, or when the device cannot be used.

mod cases;
mod measure;
mod train;

use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use candle_core::{DType, Device};
use clap::Parser;

use crate::measure::{Place, Tally};

/// Compares every operation and a few training steps on a device with the CPU.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Device: cuda:0, metal or cpu (a rehearsal)
    #[arg(long)]
    device: String,
    /// Float types to check
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16,f16")]
    dtypes: Vec<String>,
    /// Small shapes only, for a quick look
    #[arg(long)]
    small: bool,
    /// Only operations whose line contains this
    #[arg(long)]
    only: Option<String>,
    /// Timed calls of each operation, after a warm-up
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    let device = device(&args.device)?;
    let dtypes = args.dtypes.iter().map(|d| dtype(d)).collect::<Result<Vec<_>>>()?;
    let wanted = |name: &str| args.only.as_ref().is_none_or(|o| name.contains(o.as_str()));
    println!("device {}; errors are ‖out − reference‖ / ‖reference‖", args.device);
    let mut tally = Tally::default();
    for dtype in dtypes {
        let place = Place { device: device.clone(), dtype };
        println!(
            "\n{:<52} {:>10} {:>10} {:>8}      {:>10} {:>10}",
            dtype.as_str(),
            "forward",
            "backward",
            "limit",
            "fwd µs",
            "fwd+bwd µs"
        );
        for case in cases::all(args.small)?.iter().filter(|c| wanted(&c.name)) {
            tally.add(case.check(&place, args.repeat));
        }
        if wanted("training") {
            tally.add(train::check(&place));
        }
    }
    if tally.checked == 0 {
        bail!("nothing is called `{}`; run without --only to see every name", args.only.as_deref().unwrap_or_default());
    }
    println!("\n{} checked, {} BAD", tally.checked, tally.bad.len());
    for name in &tally.bad {
        println!("BAD  {name}");
    }
    Ok(tally.bad.is_empty())
}

fn dtype(name: &str) -> Result<DType> {
    match name {
        "f32" => Ok(DType::F32),
        "bf16" => Ok(DType::BF16),
        "f16" => Ok(DType::F16),
        other => bail!("--dtypes {other}: use f32, bf16 or f16"),
    }
}

/// Opens a device, or says in one line what is missing and what to do.
fn device(name: &str) -> Result<Device> {
    let (kind, index) = name.split_once(':').unwrap_or((name, "0"));
    let index: usize = index.parse().with_context(|| format!("--device {name}: `{index}` is not a device number"))?;
    match kind {
        "cpu" => Ok(Device::Cpu),
        "cuda" if !cfg!(feature = "cuda") => bail!(
            "this gpu-check was built without CUDA; build it with `cargo build --release --features cuda -p gpu-check` \
             (docs/gpu.md), or rehearse with --device cpu"
        ),
        "metal" if !cfg!(feature = "metal") => bail!(
            "this gpu-check was built without Metal; build it with `cargo build --release --features metal -p \
             gpu-check` on a Mac, or rehearse with --device cpu"
        ),
        "cuda" => opened(|| Device::new_cuda(index)).with_context(|| {
            format!(
                "cannot use {name}: is there a card and its driver (`nvidia-smi`), and are the CUDA 13 libraries on \
                 LD_LIBRARY_PATH (docs/gpu.md, Running)? Rehearse with --device cpu"
            )
        }),
        "metal" => opened(|| Device::new_metal(index))
            .with_context(|| format!("cannot use {name}: is this a Mac with a GPU? Rehearse with --device cpu")),
        other => bail!("--device {other}: use cuda:0, metal or cpu"),
    }
}

/// The CUDA bindings panic where a library is absent; that is an error like any other here.
fn opened(open: impl FnOnce() -> candle_core::Result<Device> + std::panic::UnwindSafe) -> Result<Device> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let opened = std::panic::catch_unwind(open);
    std::panic::set_hook(hook);
    match opened {
        Ok(device) => device.map_err(|e| anyhow!("{}", e.to_string().lines().next().unwrap_or_default())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a driver library is missing");
            bail!("{}", text.lines().next().unwrap_or_default())
        }
    }
}
