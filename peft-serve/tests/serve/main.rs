//! The registry and the engine, on a tiny random base.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod base;
mod engine;
#[cfg(feature = "http")]
mod http;
mod registry;
