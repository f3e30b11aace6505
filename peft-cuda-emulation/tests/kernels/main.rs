//! Every kernel, run on the host, beside the operations of peft-kernels in `f64`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
#![cfg(target_os = "linux")]

mod adamw;
mod attention;
mod cross_entropy;
mod harness;
mod norm;
mod pointwise;
mod rows;
