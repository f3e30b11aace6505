/*!
Training: rows to tokens to batches, the block-wise step, optimisers, checkpoints and logs. Nothing here serves.
*/

pub mod adapter_files;
pub mod audit;
mod catalogue;
pub mod checkpoint;
pub mod class_labels;
mod classify;
pub mod combine;
pub mod data;
mod driver;
pub mod early_stop;
pub mod eva;
mod grads;
pub mod log;
pub mod methods;
pub mod optim;
pub mod recipe;
pub mod schedule;
mod trainer;

pub use classify::{Confusion, evaluate_classes};
pub use driver::{Checkpointing, Keep, LOGIT_ROWS, Measured, evaluate, forward_backward, predict, token_losses};
pub use grads::Grads;
pub use trainer::{Ended, Outcome, Plan, Trainer, evaluate_dataset};
