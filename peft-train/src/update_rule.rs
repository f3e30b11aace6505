//! What changes the parameters in a step: gradients through an optimiser, or forward passes alone.

use std::collections::HashMap;

use candle_core::Tensor;
use peft_core::{Error, Result};

use crate::bbt::Bbt;
use crate::mezo::Mezo;
use crate::optim::Optimizer;

/// What changes the parameters in a step, with its state.
#[derive(Debug)]
pub enum UpdateRule {
    /// Gradients, and an optimiser that makes updates of them.
    Gradient(Box<dyn Optimizer>),
    /// Losses at two points, and no gradient.
    Mezo(Mezo),
    /// Losses of the candidates of a search, and no gradient.
    Bbt(Bbt),
}

impl UpdateRule {
    /// All that a checkpoint has to hold, as named tensors.
    ///
    /// # Errors
    /// When a tensor cannot be copied.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        match self {
            Self::Gradient(optimizer) => optimizer.state().map_err(|e| Error::msg(e.to_string())),
            Self::Mezo(mezo) => mezo.state(),
            Self::Bbt(bbt) => bbt.state(),
        }
    }

    /// Takes back what [`UpdateRule::state`] gave.
    ///
    /// # Errors
    /// Tensors that are missing, misshapen or another rule's; the message names them.
    pub fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        match self {
            Self::Gradient(optimizer) => optimizer.load_state(state).map_err(|e| Error::msg(e.to_string())),
            Self::Mezo(mezo) => mezo.load_state(state),
            Self::Bbt(bbt) => bbt.load_state(state),
        }
    }
}

impl From<Box<dyn Optimizer>> for UpdateRule {
    fn from(optimizer: Box<dyn Optimizer>) -> Self {
        Self::Gradient(optimizer)
    }
}

impl From<Mezo> for UpdateRule {
    fn from(mezo: Mezo) -> Self {
        Self::Mezo(mezo)
    }
}

impl From<Bbt> for UpdateRule {
    fn from(bbt: Bbt) -> Self {
        Self::Bbt(bbt)
    }
}
