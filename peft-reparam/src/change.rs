//! What a method does to a frozen linear layer, and the module that does it.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_core::kernels::{self, ServingForm};
use peft_core::{Ctx, Delta, Error, FrozenLinear, Parameter, PeftModule, Result};

/// How a layer `y = W x + b` with `W: [out, in]` differs from the base.
#[derive(Debug, Clone)]
pub enum Change {
    /// `W + B·A`.
    LowRank {
        /// `[rank, in]`.
        a: Tensor,
        /// `[out, rank]`.
        b: Tensor,
    },
    /// `W + ΔW`, with `ΔW: [out, in]`.
    Dense(Tensor),
    /// `W·(I + B·A)`.
    LowRankInput {
        /// `[rank, in]`.
        a: Tensor,
        /// `[in, rank]`.
        b: Tensor,
    },
    /// Runs of `width` inputs each go through their block `R`, as rows: `x·diag(R₁, R₂, …)`; then `W`, then a factor for
    /// each output where there is one. The bias is as it was.
    BlockInput {
        /// `[in / width, width, width]`.
        blocks: Tensor,
        /// `[out]`.
        scale: Option<Tensor>,
    },
    /// Outputs, bias included, mixed in pairs: of every group the two halves `(y₁, y₂)` become
    /// `c ⊙ (y₁, y₂) + s ⊙ (−y₂, y₁)`.
    PairedOutput {
        /// `c: [out]`.
        cos: Tensor,
        /// `s: [out]`.
        sin: Tensor,
        /// Outputs of a group, even.
        group: usize,
    },
}

/// A method's formula at one site: from the parameters, in the order of the file, to the change.
///
/// Written in tensor operations that candle differentiates; what is frozen in it (projections, norms) is a constant of
/// the formula and small beside the weight.
pub(crate) trait Formula: Send + Sync + Debug {
    fn change(&self, parameters: &[Tensor]) -> Result<Change>;

    /// The change in a pass of the layer `base`, for formulas that draw random numbers in training.
    fn drawn(&self, parameters: &[Tensor], _base: &FrozenLinear, _ctx: &Ctx<'_>) -> Result<Change> {
        self.change(parameters)
    }

    /// The formula as it is for one task; `None` where it is the same for every task.
    fn for_task(&self, _task: usize) -> Option<Box<dyn Formula>> {
        None
    }

    /// Why there is no one change to merge, in words.
    fn unmergeable(&self) -> Option<String> {
        None
    }

    /// The tensors in files, by their keys, where these are not the parameters of the site.
    fn exported(&self, _parameters: &[Parameter]) -> Result<Option<Vec<(String, Tensor)>>> {
        Ok(None)
    }

    /// Refuses frozen tensors that were read from a file and cannot be used.
    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// The parameters as an array, for formulas with a fixed number of them.
pub(crate) fn exactly<T, const N: usize>(parameters: &[T]) -> Result<&[T; N]> {
    parameters.try_into().map_err(|_| Error::msg(format!("{} parameters where the formula has {N}", parameters.len())))
}

/// A linear layer whose weight is the base's and a [`Change`].
#[derive(Debug)]
pub struct ReparamLinear {
    pub(crate) parameters: Vec<Parameter>,
    /// What the formula reads behind them, and trains for several sites.
    pub(crate) shared: Vec<Parameter>,
    pub(crate) formula: Box<dyn Formula>,
    /// Dropout on the input of an added branch.
    pub(crate) dropout: f32,
}

impl ReparamLinear {
    /// What the formula reads, in order.
    fn read(&self) -> impl Iterator<Item = &Parameter> {
        self.parameters.iter().chain(&self.shared)
    }

    /// The present change, untracked and in `f32`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn change(&self) -> Result<Change> {
        let values: std::result::Result<Vec<_>, _> = self.read().map(|p| p.value().to_dtype(DType::F32)).collect();
        self.formula.change(&values?)
    }
}

/// `x: [tokens, n·width]` with its runs of `width` columns multiplied by `blocks: [n, width, width]`.
fn times_blocks(x: &Tensor, blocks: &Tensor) -> Result<Tensor> {
    let (n, width, _) = blocks.dims3()?;
    let rows = x.dim(0)?;
    let runs = x.reshape((rows, n, width))?.transpose(0, 1)?.contiguous()?;
    let mixed = runs.matmul(&blocks.to_dtype(x.dtype())?.contiguous()?)?;
    Ok(mixed.transpose(0, 1)?.contiguous()?.reshape((rows, n * width))?)
}

/// `(−y₂, y₁)` for the halves `(y₁, y₂)` of every group of the columns of `y`.
fn swapped_halves(y: &Tensor, group: usize) -> Result<Tensor> {
    let (rows, width) = y.dims2()?;
    let halves = y.reshape((rows, width / group, 2, group / 2))?;
    let (first, second) = (halves.narrow(2, 0, 1)?, halves.narrow(2, 1, 1)?);
    Ok(Tensor::cat(&[second.neg()?, first], 2)?.reshape((rows, width))?)
}

/// `c ⊙ y + s ⊙ (−y₂, y₁)` over the columns of `y: [rows, out]`.
fn pair_columns(y: &Tensor, cos: &Tensor, sin: &Tensor, group: usize) -> Result<Tensor> {
    let turned = kernels::scale_columns(&swapped_halves(y, group)?, sin)?;
    Ok(kernels::add(&kernels::scale_columns(y, cos)?, &turned)?)
}

impl PeftModule for ReparamLinear {
    fn forward(&self, base: &FrozenLinear, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let parameters: Vec<_> = self.read().map(|p| p.get(ctx)).collect();
        let dropout = ctx.dropout(base.site(), self.dropout);
        Ok(match self.formula.drawn(&parameters, base, ctx)? {
            Change::LowRank { a, b } => kernels::lora_linear(x, base.weight(), base.bias(), &a, &b, 1.0, dropout)?,
            Change::Dense(delta) => {
                let dropped = dropout.map(|d| kernels::dropout(x, d.p, d.stream)).transpose()?;
                let added = kernels::trainable_linear(dropped.as_ref().unwrap_or(x), &delta)?;
                kernels::add(&base.base(x)?, &added)?
            }
            Change::LowRankInput { a, b } => {
                let moved = kernels::lora_delta(x, &a, &b, 1.0, None)?;
                base.base(&kernels::add(x, &moved.to_dtype(x.dtype())?)?)?
            }
            Change::BlockInput { blocks, scale } => {
                let turned = times_blocks(x, &blocks)?;
                match scale {
                    None => base.base(&turned)?,
                    Some(scale) => {
                        let y = kernels::scale_columns(&kernels::frozen_linear(&turned, base.weight(), None)?, &scale)?;
                        match base.bias() {
                            Some(bias) => kernels::add_bias(&y, bias)?,
                            None => y,
                        }
                    }
                }
            }
            Change::PairedOutput { cos, sin, group } => pair_columns(&base.base(x)?, &cos, &sin, group)?,
        })
    }

    fn parameters(&self) -> Vec<&Parameter> {
        self.parameters.iter().collect()
    }

    fn exported(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(match self.formula.exported(&self.parameters)? {
            Some(tensors) => tensors,
            None => self.parameters.iter().map(|p| (p.name().to_string(), p.value())).collect(),
        })
    }

    fn check(&self) -> Result<()> {
        self.formula.check()
    }

    fn for_task(&self, task: usize) -> Option<Arc<dyn PeftModule>> {
        let formula = self.formula.for_task(task)?;
        let (parameters, shared) = (self.parameters.clone(), self.shared.clone());
        Some(Arc::new(Self { parameters, shared, formula, dropout: self.dropout }))
    }

    fn delta(&self, base: &FrozenLinear) -> Result<Delta> {
        if let Some(why) = self.formula.unmergeable() {
            return Ok(Delta::Unmergeable(why));
        }
        let dense = || base.weight().to_dense(DType::F32);
        Ok(match self.change()? {
            Change::LowRank { a, b } => Delta::Add { weight: b.matmul(&a)?, bias: None },
            Change::Dense(weight) => Delta::Add { weight, bias: None },
            Change::LowRankInput { a, b } => Delta::Add { weight: dense()?.matmul(&b)?.matmul(&a)?, bias: None },
            Change::BlockInput { blocks, scale } => {
                // y = W·(x·R)ᵀ, and so W' = W·Rᵀ.
                let weight = times_blocks(&dense()?, &blocks.transpose(1, 2)?)?;
                let weight = match scale {
                    Some(scale) => weight.broadcast_mul(&scale.unsqueeze(1)?)?,
                    None => weight,
                };
                Delta::Replace { weight, bias: None }
            }
            Change::PairedOutput { cos, sin, group } => {
                let mix = |columns: Tensor| pair_columns(&columns, &cos, &sin, group);
                let weight = mix(dense()?.t()?.contiguous()?)?.t()?.contiguous()?;
                let bias = match base.bias() {
                    Some(bias) => Some(mix(bias.to_dtype(DType::F32)?.unsqueeze(0)?)?.squeeze(0)?),
                    None => None,
                };
                Delta::Replace { weight, bias }
            }
        })
    }

    fn lower(&self, base: &FrozenLinear) -> Result<Option<ServingForm>> {
        let low_rank = match self.change()? {
            Change::LowRank { a, b } => (a, b),
            Change::LowRankInput { a, b } => {
                // W·B, as the transpose of Bᵀ·Wᵀ.
                let b = base.weight().matmul_t(&b.t()?.contiguous()?)?.t()?.contiguous()?;
                (a, b)
            }
            Change::Dense(_) | Change::BlockInput { .. } | Change::PairedOutput { .. } => return Ok(None),
        };
        Ok(Some(ServingForm { low_rank: Some(low_rank), ..ServingForm::default() }))
    }
}
