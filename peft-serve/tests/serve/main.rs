//! The registry and the engine, on a tiny random base.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod base;
#[cfg(feature = "http")]
#[path = "../../../peft-cli/tests/cli/byte_tokenizer.rs"]
mod byte_tokenizer;
mod engine;
#[cfg(feature = "http")]
mod form;
#[cfg(feature = "http")]
mod http;
mod registry;
#[cfg(feature = "http")]
mod running;
