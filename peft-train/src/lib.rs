/*!
Training: rows to tokens to batches, the block-wise step, optimisers, checkpoints and logs. Nothing here serves.
*/

pub mod audit;
pub mod data;
mod driver;
pub mod early_stop;
mod grads;
pub mod log;
pub mod optim;
pub mod schedule;

pub use driver::{Checkpointing, Measured, evaluate, forward_backward, token_losses};
pub use grads::Grads;
