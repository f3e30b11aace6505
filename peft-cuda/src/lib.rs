/*!
The CUDA kernels of this project, and how each is launched.

A function here checks nothing and touches no memory: it says which kernel runs on how many blocks with what arguments, as a
[`Launch`]. `peft-kernels` sends it to a card; `peft-cuda-emulation` runs the same kernel source with the same launch on the
host, which is what the tests do. See `docs/cuda-kernels.md`.

With the feature `cuda`, `IMAGES` holds the compiled kernels.
*/

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod norm;
pub mod pointwise;
pub mod rows;

mod launch;

pub use launch::{Args, Element, Launch, Operand};

/// The kernels of one source file, as machine code and PTX in a fat binary that the driver loads.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    /// The source file's name.
    pub name: &'static str,
    /// What `cuModuleLoadData` takes. Empty where the build had no real nvcc.
    pub bytes: &'static [u8],
}

#[cfg(feature = "cuda")]
macro_rules! images {
    ($($name:literal),*) => {
        /// All compiled kernels.
        pub const IMAGES: &[Image] = &[
            $(Image { name: $name, bytes: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")) }),*
        ];
    };
}
#[cfg(feature = "cuda")]
images!("adamw", "attention_bf16", "attention_f16", "attention_f32", "cross_entropy", "norm", "pointwise", "rows");
