//! What a method does in training beside what its modules compute.

use std::collections::HashMap;
use std::fmt::Debug;

use candle_core::Tensor;
use serde_json::{Map, Value};

use crate::error::Result;

/// A token of a prompt that counts towards the loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PromptTarget {
    /// The virtual token whose hidden state predicts it, counted from 0.
    pub place: usize,
    /// What it should predict.
    pub id: u32,
    /// What its likelihood weighs, where a row's own token weighs 1.
    pub weight: f64,
}

/// The part of a method that acts on the training loop, such as AdaLoRA's regulariser and its allocator of ranks.
///
/// An adapter is shared while it is trained, so what a hook remembers lies behind a lock. What is not written does nothing.
pub trait TrainingHook: Send + Sync + Debug {
    /// A term of the loss that is a function of the parameters alone, and its gradients by the parameters' names.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn penalty(&self) -> Result<(f64, Vec<(String, Tensor)>)> {
        Ok((0.0, Vec::new()))
    }

    /// Tokens of the adapter's prompt that count towards the loss beside those of the rows, once for each row.
    fn prompt_targets(&self) -> &[PromptTarget] {
        &[]
    }

    /// Acts after the optimiser's update number `step`, counted from 0, that was made of `gradients`, by the parameters' names.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn after_step(&self, _step: u64, _gradients: &HashMap<&str, &Tensor>) -> Result<()> {
        Ok(())
    }

    /// What a checkpoint has to hold for a run to go on bit by bit, as named tensors.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }

    /// Takes back what [`TrainingHook::state`] gave.
    ///
    /// # Errors
    /// A tensor that is missing, misshapen or not this hook's; the message names it.
    fn load_state(&self, _state: &HashMap<String, Tensor>) -> Result<()> {
        Ok(())
    }

    /// Changes what other programs are given of the adapter: its config and its tensors by their keys.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn export(&self, _config: &mut Map<String, Value>, _tensors: &mut [(String, Tensor)]) -> Result<()> {
        Ok(())
    }
}
