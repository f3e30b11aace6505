//! Trainable parameters.

use candle_core::{DType, Tensor, Var};

use crate::ctx::Ctx;
use crate::error::{Context, Result};

/// What the optimiser and the gradient audit need to know of a parameter besides its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Trained with the run's learning rate.
    Plain,
    /// LoRA's B: LoRA+ gives it a larger learning rate.
    LoraB,
    /// A parameter whose gradient is exactly zero while its partner is zero at the start (LoRA's A under B = 0).
    ZeroAtStart,
    /// Rows of a table of which a batch may touch none, so that a gradient of zeros is no fault.
    Rows,
    /// A bias, norm weight or magnitude, which weight decay leaves alone.
    NoDecay,
}

/// A named trainable tensor. Cloning shares the value.
#[derive(Debug, Clone)]
pub struct Parameter {
    name: String,
    var: Var,
    role: Role,
}

impl Parameter {
    /// A parameter that starts at `value`; `name` is its key in the adapter file.
    ///
    /// # Errors
    /// When the value cannot be copied.
    pub fn new(name: impl Into<String>, value: &Tensor, role: Role) -> Result<Self> {
        let name = name.into();
        let var = Var::from_tensor(&value.detach().contiguous()?).with_context(|| name.clone())?;
        Ok(Self { name, var, role })
    }

    /// The same parameter under another name.
    #[must_use]
    pub fn renamed(&self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self.clone() }
    }

    /// The key in the adapter file, such as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The variable itself, for the optimiser.
    #[must_use]
    pub fn var(&self) -> &Var {
        &self.var
    }

    /// What the optimiser and the audit need to know.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// The value as the forward pass of `ctx` sees it: tracked in training, else without a graph.
    #[must_use]
    pub fn get(&self, ctx: &Ctx<'_>) -> Tensor {
        if ctx.mode.tracks() { self.var.as_tensor().clone() } else { self.value() }
    }

    /// The present value, untracked. It shares storage with the variable and follows its updates.
    #[must_use]
    pub fn value(&self) -> Tensor {
        self.var.as_detached_tensor()
    }

    /// Number of elements.
    #[must_use]
    pub fn elem_count(&self) -> usize {
        self.var.elem_count()
    }

    /// Bytes of the value.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        self.elem_count() * self.var.dtype().size_in_bytes()
    }

    /// Overwrites the value.
    ///
    /// # Errors
    /// When shape or type differ.
    pub fn set(&self, value: &Tensor) -> Result<()> {
        let value = value.to_device(self.var.device())?.to_dtype(self.var.dtype())?;
        self.var.set(&value.contiguous()?).with_context(|| self.name.clone())
    }

    /// The element type of the value.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.var.dtype()
    }
}
