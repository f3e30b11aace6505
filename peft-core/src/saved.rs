//! `modules_to_save` and full fine-tuning: layers that are trained whole, on a copy of their own.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_kernels::ServingForm;

use crate::ctx::Ctx;
use crate::error::{Error, Result};
use crate::layers::{FrozenEmbedding, FrozenLinear, FrozenNorm};
use crate::module::{Delta, EmbeddingModule, FrozenLogits, NormModule, PeftModule};
use crate::param::{Parameter, Role};
use crate::segmented::BaseLayer;
use crate::set::SiteModule;

/// A copy of `layer` that is trained whole in its place, its tensors called `{prefix}.weight` and `{prefix}.bias`. As in
/// PEFT, a head that is tied to a copied embedding stays on the frozen table.
///
/// # Errors
/// When the base cannot be read; experts, of which no method trains a copy.
pub fn trained_copy(prefix: &str, layer: BaseLayer<'_>) -> Result<SiteModule> {
    Ok(match layer {
        BaseLayer::Linear(layer) => SiteModule::Linear(Arc::new(TrainedLinear::new(prefix, layer)?)),
        BaseLayer::Embedding(e) => SiteModule::Embedding(Arc::new(TrainedEmbedding::new(prefix, e, false)?)),
        BaseLayer::Norm(norm) => SiteModule::Norm(Arc::new(TrainedNorm::new(prefix, norm)?)),
        BaseLayer::Experts(experts) => return Err(untrained(experts.path())),
    })
}

/// The refusal of methods that would train the weights of experts whole.
#[must_use]
pub fn untrained(path: &str) -> Error {
    Error::site(
        path,
        "holds the weights of experts, which are adapted by LoRA alone: name them in target_parameters, for example \
         [\"gate_up_proj\", \"down_proj\"]",
    )
}

/// A linear layer whose own weight (and bias) are trained in place of the base's.
#[derive(Debug)]
pub struct TrainedLinear {
    /// As files have it: `[out, in]`, and `[in, out]` of a `Conv1D`.
    weight: Parameter,
    bias: Option<Parameter>,
    fan_in_fan_out: bool,
}

impl TrainedLinear {
    /// A copy of `base` in `f32`; `prefix` is put in front of `.weight` and `.bias` in the file.
    ///
    /// # Errors
    /// When the base cannot be read.
    pub fn new(prefix: &str, base: &FrozenLinear) -> Result<Self> {
        let mut weight = base.weight().to_dense(DType::F32)?;
        if base.is_fan_in_fan_out() {
            weight = weight.t()?.contiguous()?;
        }
        let weight = Parameter::new(format!("{prefix}.weight"), &weight, Role::Plain)?;
        let bias = match base.bias() {
            Some(b) => Some(Parameter::new(format!("{prefix}.bias"), &b.to_dtype(DType::F32)?, Role::NoDecay)?),
            None => None,
        };
        Ok(Self { weight, bias, fan_in_fan_out: base.is_fan_in_fan_out() })
    }

    /// `[out, in]` for a weight as files have it.
    fn oriented(&self, weight: Tensor) -> Result<Tensor> {
        Ok(if self.fan_in_fan_out { weight.t()? } else { weight })
    }
}

impl PeftModule for TrainedLinear {
    fn forward(&self, _: &FrozenLinear, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let y = peft_kernels::trainable_linear(x, &self.oriented(self.weight.get(ctx))?)?;
        match &self.bias {
            Some(b) => Ok(peft_kernels::add_bias(&y, &b.get(ctx))?),
            None => Ok(y),
        }
    }

    fn parameters(&self) -> Vec<&Parameter> {
        std::iter::once(&self.weight).chain(&self.bias).collect()
    }

    fn delta(&self, _: &FrozenLinear) -> Result<Delta> {
        Ok(Delta::Replace {
            weight: self.oriented(self.weight.value())?,
            bias: self.bias.as_ref().map(Parameter::value),
        })
    }

    fn lower(&self, _: &FrozenLinear) -> Result<Option<ServingForm>> {
        Ok(None)
    }
}

/// An embedding whose own table is trained in place of the base's. With `tied`, the output head follows it.
#[derive(Debug)]
pub struct TrainedEmbedding {
    weight: Parameter,
    tied: bool,
}

impl TrainedEmbedding {
    /// A copy of `base` in `f32`, stored as `{prefix}.weight`.
    ///
    /// # Errors
    /// When the base cannot be read.
    pub fn new(prefix: &str, base: &FrozenEmbedding, tied: bool) -> Result<Self> {
        let weight = base.weight().to_dense(DType::F32)?;
        Ok(Self { weight: Parameter::new(format!("{prefix}.weight"), &weight, Role::Plain)?, tied })
    }
}

impl EmbeddingModule for TrainedEmbedding {
    fn forward(&self, _: &FrozenEmbedding, ids: &[u32], ctx: &Ctx<'_>) -> Result<Tensor> {
        Ok(peft_kernels::embedding(ids, &self.weight.get(ctx))?)
    }

    fn tied_logits(&self, hidden: &Tensor, _: &FrozenLogits<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        Ok(peft_kernels::trainable_linear(hidden, &self.weight.get(ctx))?)
    }

    fn changes_tied_head(&self) -> bool {
        self.tied
    }

    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.weight]
    }

    fn merge(&self, _: &Tensor) -> Result<Tensor> {
        Ok(self.weight.value())
    }
}

/// A normalisation whose own weight (and bias) are trained in place of the base's.
#[derive(Debug)]
pub struct TrainedNorm {
    weight: Parameter,
    bias: Option<Parameter>,
}

impl TrainedNorm {
    /// A copy of `base` in `f32`, stored as `{prefix}.weight` and `{prefix}.bias`.
    ///
    /// # Errors
    /// When the base cannot be read.
    pub fn new(prefix: &str, base: &FrozenNorm) -> Result<Self> {
        let of = |name: &str, t: &Tensor| {
            Parameter::new(format!("{prefix}.{name}"), &t.to_dtype(DType::F32)?, Role::NoDecay)
        };
        let bias = match base.bias() {
            Some(b) => Some(of("bias", b)?),
            None => None,
        };
        Ok(Self { weight: of("weight", base.weight())?, bias })
    }
}

impl NormModule for TrainedNorm {
    fn forward(&self, base: &FrozenNorm, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        base.apply(x, &self.weight.get(ctx), self.bias.as_ref().map(|b| b.get(ctx)).as_ref())
    }

    fn parameters(&self) -> Vec<&Parameter> {
        std::iter::once(&self.weight).chain(&self.bias).collect()
    }

    fn merge(&self, _: &FrozenNorm) -> Result<(Tensor, Option<Tensor>)> {
        Ok((self.weight.value(), self.bias.as_ref().map(Parameter::value)))
    }
}
