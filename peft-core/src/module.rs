//! What a method implements for one site.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::Tensor;
use peft_kernels::{ExpertPlan, LowRank, ServingForm};

use crate::ctx::Ctx;
use crate::error::Result;
use crate::experts::FrozenExperts;
use crate::layers::{FrozenEmbedding, FrozenLinear, FrozenNorm};
use crate::param::Parameter;

/// A small trainable module wrapped around a frozen linear layer.
pub trait PeftModule: Send + Sync + Debug {
    /// Output `[tokens, out]` of the wrapped layer for `x: [tokens, in]`. Parameters are read through
    /// [`Parameter::get`], so that the same code trains and evaluates.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn forward(&self, base: &FrozenLinear, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor>;

    /// The module as no more than `W x + b + s·B(A(drop(x)))`, in tensors that are tracked where the pass trains. Layers
    /// that read the same input are then run together; `None` for what is more than that.
    fn low_rank(&self, _base: &FrozenLinear, _ctx: &Ctx<'_>) -> Option<LowRank> {
        None
    }

    /// Whether the module has to know which rows are a sequence ([`Ctx::sequences`]), so that it is given all rows of a sequence
    /// together.
    fn reads_sequences(&self) -> bool {
        false
    }

    /// The trainable parameters, in the order in which they are stored.
    fn parameters(&self) -> Vec<&Parameter>;

    /// Tensors that belong to the module and are not trained, such as the part of the base weight that PiSSA starts from.
    /// Checkpoints hold them beside the parameters, so that a run goes on bit by bit.
    fn frozen(&self) -> Vec<&Parameter> {
        Vec::new()
    }

    /// The tensors that other programs are given, by their keys in the adapter file: the parameters, unless a method's
    /// file form differs from what it trains.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn exported(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(self.parameters().into_iter().map(|p| (p.name().to_string(), p.value())).collect())
    }

    /// Refuses values that were read from a file and cannot be used, such as indices outside of the weight.
    ///
    /// # Errors
    /// What is wrong.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// The module as it is for one task, sharing all parameters; `None` where it is the same for every task. Whoever builds
    /// an adapter of modules that depend on it says so with [`crate::Adapter::set_tasks`].
    fn for_task(&self, _task: usize) -> Option<Arc<dyn PeftModule>> {
        None
    }

    /// What merging does to the base layer, in `f32`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn delta(&self, base: &FrozenLinear) -> Result<Delta>;

    /// The form that one routed kernel serves in a batch of many adapters and methods, or `None` for what does not fit
    /// it; such rows are run through [`PeftModule::forward`] apart.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn lower(&self, base: &FrozenLinear) -> Result<Option<ServingForm>>;
}

/// What merging does to a linear layer. Tensors are `f32`.
#[derive(Debug, Clone)]
pub enum Delta {
    /// `W ← W + weight`, `b ← b + bias`.
    Add {
        /// `[out, in]`.
        weight: Tensor,
        /// `[out]`; a layer without a bias gets one.
        bias: Option<Tensor>,
    },
    /// `W ← diag(l)·W`, `b ← l ⊙ b`, with `l: [out]`.
    ScaleOutput(Tensor),
    /// `W ← W·diag(l)`, with `l: [in]`.
    ScaleInput(Tensor),
    /// `W ← weight`, `b ← bias` where there is one.
    Replace {
        /// `[out, in]`.
        weight: Tensor,
        /// `[out]`; `None` keeps the base's.
        bias: Option<Tensor>,
    },
    /// This method cannot be merged; the text says why.
    Unmergeable(String),
}

/// Makes the logits of a frozen head, for methods that need them.
pub type FrozenLogits<'a> = dyn Fn() -> Result<Tensor> + 'a;

/// A trainable module around a frozen token embedding.
pub trait EmbeddingModule: Send + Sync + Debug {
    /// Embeddings `[ids.len(), dim]`.
    ///
    /// # Errors
    /// When an id is outside the vocabulary or a tensor operation fails.
    fn forward(&self, base: &FrozenEmbedding, ids: &[u32], ctx: &Ctx<'_>) -> Result<Tensor>;

    /// The logits of a head that is tied to this embedding; `frozen` makes those of the frozen table. Methods that change
    /// the tied table itself override this; LoRA on an embedding, as in PEFT, leaves the head alone.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn tied_logits(&self, _hidden: &Tensor, frozen: &FrozenLogits<'_>, _ctx: &Ctx<'_>) -> Result<Tensor> {
        frozen()
    }

    /// Whether [`EmbeddingModule::tied_logits`] changes the logits of a tied head.
    fn changes_tied_head(&self) -> bool {
        false
    }

    /// The trainable parameters, in the order in which they are stored.
    fn parameters(&self) -> Vec<&Parameter>;

    /// The merged table for the base table `weight: [vocab, dim]` in `f32`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn merge(&self, weight: &Tensor) -> Result<Tensor>;
}

/// A trainable module in place of a frozen normalisation.
pub trait NormModule: Send + Sync + Debug {
    /// The normalised `x: [tokens, dim]`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn forward(&self, base: &FrozenNorm, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor>;

    /// The trainable parameters, in the order in which they are stored.
    fn parameters(&self) -> Vec<&Parameter>;

    /// The merged weight and bias, in `f32`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn merge(&self, base: &FrozenNorm) -> Result<(Tensor, Option<Tensor>)>;
}

/// A trainable module on the weights of the experts of a mixture.
pub trait ExpertsModule: Send + Sync + Debug {
    /// Rows `[pairs, out]` for `x: [pairs, in]`, both sorted by expert as `plan` says.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn forward(&self, base: &FrozenExperts, x: &Tensor, plan: &Arc<ExpertPlan>, ctx: &Ctx<'_>) -> Result<Tensor>;

    /// The trainable parameters, in the order in which they are stored.
    fn parameters(&self) -> Vec<&Parameter>;

    /// What merging adds to the weight of one expert, `[out, in]` in `f32`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn delta(&self, expert: usize) -> Result<Tensor>;
}
