//! Whatever model a folder holds, behind one type.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::FrozenWeight;
use peft_core::{
    BaseLayer, BaseModel, Ctx, Error, PromptDims, Result, Segmented, SiteId, SiteTable, SublayerSite, Task, TokenBatch,
};

use crate::decoder::{Decoder, DecoderInput};
use crate::encoder::{Encoder, EncoderInput};

/// A model of one of the skeletons.
#[derive(Debug)]
pub enum AnyModel {
    /// A causal language model, or a decoder with a class head.
    Decoder(Decoder),
    /// An encoder with a class head.
    Encoder(Encoder),
}

/// What the blocks of an [`AnyModel`] need of a batch.
#[derive(Debug, Clone)]
pub enum AnyInput {
    /// For a decoder.
    Decoder(DecoderInput),
    /// For an encoder.
    Encoder(EncoderInput),
}

/// Widths of what one block computes, in elements a token: what estimates of memory are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockWidths {
    /// The residual stream.
    pub hidden: usize,
    /// All query heads.
    pub query: usize,
    /// All key heads.
    pub key_value: usize,
    /// Attention heads.
    pub heads: usize,
    /// Inside the MLP: gate and up of a gated one together.
    pub mlp: usize,
}

/// The same expression for either model.
macro_rules! either {
    ($any:expr, $m:ident => $body:expr) => {
        match $any {
            AnyModel::Decoder($m) => $body,
            AnyModel::Encoder($m) => $body,
        }
    };
}

impl AnyModel {
    /// The model as a decoder that writes text.
    ///
    /// # Errors
    /// When it is an encoder, or its head gives classes.
    pub fn as_language_model(&self) -> Result<&Decoder> {
        match self {
            Self::Decoder(model) if model.task() == Task::CausalLm => Ok(model),
            _ => Err(Error::msg(format!(
                "this model ({}) has a class head and cannot write text; `eval` measures it, a causal language model \
                 generates",
                self.model_type()
            ))),
        }
    }

    /// Bytes of all frozen weights; a tied table counts once.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        either!(self, m => m.nbytes())
    }

    /// Parameters of the base; a tied table counts once.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        either!(self, m => m.parameter_count())
    }

    /// Widths of one block.
    #[must_use]
    pub fn block_widths(&self) -> BlockWidths {
        match self {
            Self::Decoder(m) => {
                let c = m.config();
                BlockWidths {
                    hidden: c.hidden_size,
                    query: c.query_size(),
                    key_value: c.key_value_size(),
                    heads: c.num_attention_heads,
                    mlp: if c.family.layout.mlp.is_gated() { 2 } else { 1 } * c.intermediate_size,
                }
            }
            Self::Encoder(m) => {
                let c = m.config();
                BlockWidths {
                    hidden: c.hidden_size,
                    query: c.hidden_size,
                    key_value: c.hidden_size,
                    heads: c.num_attention_heads,
                    mlp: c.intermediate_size,
                }
            }
        }
    }
}

impl BaseModel for AnyModel {
    fn sites(&self) -> &Arc<SiteTable> {
        either!(self, m => m.sites())
    }

    fn layer(&self, site: SiteId) -> Result<BaseLayer<'_>> {
        either!(self, m => m.layer(site))
    }

    fn model_type(&self) -> &str {
        either!(self, m => m.model_type())
    }

    fn device(&self) -> &Device {
        either!(self, m => m.device())
    }

    fn dtype(&self) -> DType {
        either!(self, m => m.dtype())
    }

    fn tied_embedding(&self) -> Option<&str> {
        either!(self, m => m.tied_embedding())
    }

    fn prompt_dims(&self) -> Option<PromptDims> {
        either!(self, m => m.prompt_dims())
    }

    fn task(&self) -> Task {
        either!(self, m => m.task())
    }

    fn sublayers(&self) -> Vec<SublayerSite> {
        either!(self, m => m.sublayers())
    }

    fn fresh_layers(&self) -> &[String] {
        either!(self, m => m.fresh_layers())
    }
}

impl Segmented for AnyModel {
    type Input = AnyInput;

    fn prepare(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<AnyInput> {
        match self {
            Self::Decoder(m) => m.prepare(batch, ctx).map(AnyInput::Decoder),
            Self::Encoder(m) => m.prepare(batch, ctx).map(AnyInput::Encoder),
        }
    }

    fn embed(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        either!(self, m => m.embed(batch, ctx))
    }

    fn num_blocks(&self) -> usize {
        either!(self, m => m.num_blocks())
    }

    fn block(&self, i: usize, hidden: &Tensor, input: &AnyInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        match (self, input) {
            (Self::Decoder(m), AnyInput::Decoder(input)) => m.block(i, hidden, input, ctx),
            (Self::Encoder(m), AnyInput::Encoder(input)) => m.block(i, hidden, input, ctx),
            _ => Err(Error::msg("the batch was prepared by another model")),
        }
    }

    fn final_norm(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        either!(self, m => m.final_norm(hidden, ctx))
    }

    fn logits(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        either!(self, m => m.logits(hidden, ctx))
    }

    fn plain_head(&self, ctx: &Ctx<'_>) -> Option<(&FrozenWeight, Option<f32>)> {
        either!(self, m => m.plain_head(ctx))
    }

    fn vocab_size(&self) -> usize {
        either!(self, m => m.vocab_size())
    }
}
