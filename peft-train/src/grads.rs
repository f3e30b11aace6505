//! Gradients of the trainable parameters, taken out of candle's store as soon as they are made.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId};
use peft_core::{Parameter, kernels};

/// One gradient a parameter, in the parameters' order, summed over micro-batches.
///
/// candle's store keeps gradients of everything and lets parameter gradients hold the graph that made them. So wanted
/// gradients are drained and detached here after each segment, and the store is dropped.
#[derive(Debug, Clone)]
pub struct Grads {
    index: HashMap<TensorId, usize>,
    sums: Vec<Option<Tensor>>,
}

impl Grads {
    /// Without gradients, for these parameters.
    #[must_use]
    pub fn new(parameters: &[&Parameter]) -> Self {
        let index = parameters.iter().enumerate().map(|(i, p)| (p.var().as_tensor().id(), i)).collect();
        Self { index, sums: vec![None; parameters.len()] }
    }

    /// Adds the parameters' gradients in candle's `store`, and gives that of `leaf` where one is named.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn drain(&mut self, store: GradStore, leaf: Option<TensorId>) -> Result<Option<Tensor>> {
        let all = store.get_ids().filter_map(|id| Some((*id, store.get_id(*id)?.detach()))).collect::<Vec<_>>();
        self.collect(all, leaf)
    }

    /// Adds the parameters' gradients among `found`, and gives that of `leaf` where one is named.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn collect(&mut self, found: Vec<(TensorId, Tensor)>, leaf: Option<TensorId>) -> Result<Option<Tensor>> {
        let mut of_leaf = None;
        for (id, grad) in found {
            if leaf == Some(id) {
                of_leaf = Some(grad);
            } else if let Some(sum) = self.index.get(&id).and_then(|&i| self.sums.get_mut(i)) {
                *sum = Some(match sum.take() {
                    Some(sum) => kernels::add(&sum, &grad)?,
                    None => grad,
                });
            }
        }
        Ok(of_leaf)
    }

    /// The sums, in the parameters' order; `None` where nothing reached a parameter.
    #[must_use]
    pub fn into_vec(self) -> Vec<Option<Tensor>> {
        self.sums
    }
}
