//! LoRA on a token embedding.

use candle_core::{DType, Tensor};
use peft_core::kernels;
use peft_core::{Ctx, EmbeddingModule, FrozenEmbedding, Parameter, Result};

/// `y = E[ids] + s·(Aᵀ[ids])·Bᵀ` with `lora_embedding_A: [r, vocab]`, `lora_embedding_B: [dim, r]`, and DoRA's magnitude
/// over columns where it has one. A tied head keeps the frozen table, as in PEFT.
#[derive(Debug)]
pub struct LoraEmbedding {
    pub(crate) a: Parameter,
    pub(crate) b: Parameter,
    pub(crate) magnitude: Option<Parameter>,
    pub(crate) scale: f32,
}

impl LoraEmbedding {
    /// `[vocab, dim]` in `f32`.
    fn delta_weight(&self) -> Result<Tensor> {
        let (a, b) = (self.a.value().to_dtype(DType::F32)?, self.b.value().to_dtype(DType::F32)?);
        Ok((b.matmul(&a)?.t()? * f64::from(self.scale))?)
    }

    /// `m / ‖E + s·(BA)ᵀ‖` for each column: on an embedding PEFT takes norms over the vocabulary.
    fn dora_scale(&self, magnitude: &Tensor, base: &FrozenEmbedding) -> Result<Tensor> {
        let table = (base.weight().to_dense(DType::F32)? + self.delta_weight()?)?;
        let norm = table.sqr()?.sum(0)?.sqrt()?;
        Ok((magnitude / norm.to_dtype(magnitude.dtype())?)?)
    }
}

impl EmbeddingModule for LoraEmbedding {
    fn forward(&self, base: &FrozenEmbedding, ids: &[u32], ctx: &Ctx<'_>) -> Result<Tensor> {
        let y = base.base(ids)?;
        // Rows of Aᵀ are gathered with a scatter-add backward; no dropout, as in PEFT's embedding layer.
        let rows = kernels::embedding(ids, &self.a.get(ctx).t()?)?;
        let delta = (kernels::trainable_linear(&rows, &self.b.get(ctx))? * f64::from(self.scale))?;
        let y = (&y + delta.to_dtype(y.dtype())?)?;
        match &self.magnitude {
            Some(m) => Ok(kernels::scale_columns(&y, &self.dora_scale(&m.get(ctx), base)?)?),
            None => Ok(y),
        }
    }

    fn parameters(&self) -> Vec<&Parameter> {
        [&self.a, &self.b].into_iter().chain(&self.magnitude).collect()
    }

    fn merge(&self, weight: &Tensor) -> Result<Tensor> {
        let merged = (weight + self.delta_weight()?)?;
        match &self.magnitude {
            Some(m) => {
                let norm = merged.sqr()?.sum(0)?.sqrt()?;
                Ok(merged.broadcast_mul(&(m.value().to_dtype(DType::F32)? / norm)?)?)
            }
            None => Ok(merged),
        }
    }
}
