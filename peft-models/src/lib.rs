//! peft-models

pub mod config;
pub mod gguf;
pub mod rope;
pub mod tokenizer;
