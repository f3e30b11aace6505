//! With the feature `cuda`: compiles kernels/*.cu into one fat binary each, machine code for the cards below and PTX for
//! later ones. Without it: nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A100; H100 and H200. RTX 30 and 40 (8.6, 8.9) run what is compiled for 8.0; later cards compile the PTX of 9.0.
const ARCHITECTURES: [&str; 3] =
    ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=kernels");
    for variable in ["NVCC", "PEFT_REAL_NVCC", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    let nvcc = std::env::var_os("NVCC").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("CUDA_HOME").or_else(|| std::env::var_os("CUDA_PATH"))?;
        Some(Path::new(&home).join("bin/nvcc"))
    });
    let nvcc = nvcc.unwrap_or_else(|| "nvcc".into());
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let mut sources: Vec<PathBuf> =
        std::fs::read_dir("kernels")?.map(|e| Ok(e?.path())).collect::<Result<_, std::io::Error>>()?;
    sources.retain(|p| p.extension().is_some_and(|e| e == "cu"));
    sources.sort();
    let running: Vec<_> = sources
        .iter()
        .map(|source| {
            let image = out.join(source.file_name().unwrap_or_default()).with_extension("fatbin");
            let mut command = Command::new(&nvcc);
            command.args(["-fatbin", "-std=c++17", "-O3", "-o"]).arg(&image).arg(source);
            for architecture in ARCHITECTURES {
                command.args(["-gencode", architecture]);
            }
            command
                .spawn()
                .map_err(|e| format!("cannot run {}: {e}; scripts/cuda-toolkit.sh makes one", nvcc.display()))
        })
        .collect();
    let mut failed = Vec::new();
    for (child, source) in running.into_iter().zip(&sources) {
        if !child?.wait()?.success() {
            failed.push(source.display().to_string());
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("nvcc failed on {}", failed.join(", ")).into()) }
}
