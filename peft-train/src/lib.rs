//! peft-train

pub mod data;
