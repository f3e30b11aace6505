//! peft-core

// Files, errors and target matching.
pub mod error;
mod python_regex;
pub mod select;
pub mod select_defaults;
pub mod select_spec;
pub mod suggest;
pub use error::{Context, Error, Result};
