//! Compiles the kernels of peft-cuda with the C++ compiler of the host.

use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rustc-check-cfg=cfg(emulated)");
    println!("cargo::rerun-if-changed=emulator");
    println!("cargo::rerun-if-changed=../peft-cuda/kernels");
    // Fibers are made with ucontext.h, which Windows and Apple do not have (any more).
    if std::env::var("CARGO_CFG_TARGET_OS")? != "linux" {
        return Ok(());
    }
    let kernels = Path::new("../peft-cuda/kernels");
    let mut sources: Vec<PathBuf> =
        std::fs::read_dir(kernels)?.map(|e| Ok(e?.path())).collect::<Result<_, std::io::Error>>()?;
    sources.retain(|p| p.extension().is_some_and(|e| e == "cu"));
    sources.sort();
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).debug(false).warnings(false).include("emulator").include(kernels);
    // A jump from one stack to another is what is wanted here. A multiplication and an addition stay two operations,
    // so that results do not depend on the host.
    build.flag("-U_FORTIFY_SOURCE").flag("-ffp-contract=off").define("PEFT_EMULATION", None);
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    for source in &sources {
        // Compilers take a .cu file for CUDA whatever they are told; a file that includes it is C++. On a card each file is a
        // program of its own, in which names mean what they mean there.
        let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let wrapper = out.join(format!("{name}.cpp"));
        let text = format!("#include \"cuda_on_host.h\"\nnamespace kernels_{name} {{\n#include \"{name}.cu\"\n}}\n");
        std::fs::write(&wrapper, text)?;
        build.file(wrapper);
    }
    build.file("emulator/fibers.cpp").file("emulator/faulty.cpp");
    // Kernels register themselves by static constructors, which a linker would leave out of an archive.
    println!("cargo::rustc-cfg=emulated");
    build.link_lib_modifier("+whole-archive").compile("peft_cuda_kernels");
    Ok(())
}
