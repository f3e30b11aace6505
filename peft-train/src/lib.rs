//! peft-train

pub mod audit;
pub mod early_stop;
pub mod log;
pub mod optim;
pub mod schedule;
