//! Whatever model a folder holds, behind one type.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::FrozenWeight;
use peft_core::{
    AdapterSet, BaseLayer, BaseModel, Ctx, Error, PromptDims, ReadRows, Result, Segmented, SiteId, SiteTable,
    SublayerSite, Task, TokenBatch,
};

use crate::decoder::{Decoder, DecoderInput};
use crate::encoder::{Encoder, EncoderInput};
use crate::encoder_decoder::{EncoderDecoder, EncoderDecoderInput};
use crate::generate::{self, GenerateOptions, Request};

/// A model of one of the skeletons.
#[derive(Debug)]
pub enum AnyModel {
    /// A causal language model, or a decoder with a class head.
    Decoder(Decoder),
    /// An encoder with a class head.
    Encoder(Encoder),
    /// An encoder–decoder with a language model head.
    EncoderDecoder(Box<EncoderDecoder>),
}

/// What the blocks of an [`AnyModel`] need of a batch.
#[derive(Debug, Clone)]
pub enum AnyInput {
    /// For a decoder.
    Decoder(DecoderInput),
    /// For an encoder.
    Encoder(EncoderInput),
    /// For an encoder–decoder.
    EncoderDecoder(EncoderDecoderInput),
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

/// The same expression for any model.
macro_rules! each {
    ($any:expr, $m:ident => $body:expr) => {
        match $any {
            AnyModel::Decoder($m) => $body,
            AnyModel::Encoder($m) => $body,
            AnyModel::EncoderDecoder($m) => $body,
        }
    };
}

impl AnyModel {
    /// The model as a decoder that writes text.
    ///
    /// # Errors
    /// When it is an encoder or an encoder–decoder, or its head gives classes.
    pub fn as_language_model(&self) -> Result<&Decoder> {
        match self {
            Self::Decoder(model) if model.task() == Task::CausalLm => Ok(model),
            Self::EncoderDecoder(model) => Err(Error::msg(format!(
                "this model ({}) writes a target for a source, and this needs a causal language model",
                model.model_type()
            ))),
            _ => Err(Error::msg(format!(
                "this model ({}) has a class head and cannot write text; `eval` measures it, a causal language model \
                 generates",
                self.model_type()
            ))),
        }
    }

    /// Refuses a model that cannot write text.
    ///
    /// # Errors
    /// When its head gives classes.
    pub fn check_writes(&self) -> Result<()> {
        match self {
            Self::EncoderDecoder(_) => Ok(()),
            _ => self.as_language_model().map(|_| ()),
        }
    }

    /// Continues every request, or writes a target for it: [`generate::generate`], [`generate::generate_targets`].
    ///
    /// # Errors
    /// As these, and when the model's head gives classes.
    pub fn generate(
        &self,
        adapters: &AdapterSet,
        requests: &[Request],
        options: &GenerateOptions,
        on_token: impl FnMut(usize, u32) -> bool,
    ) -> Result<Vec<Vec<u32>>> {
        match self {
            Self::EncoderDecoder(m) => generate::generate_targets(m, adapters, requests, options, on_token),
            _ => generate::generate(self.as_language_model()?, adapters, requests, options, on_token),
        }
    }

    /// Bytes of all frozen weights; a tied table counts once.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        each!(self, m => m.nbytes())
    }

    /// Parameters of the base; a tied table counts once.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        each!(self, m => m.parameter_count())
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
                    mlp: if c.family.layout.mlp.is_gated() { 2 } else { 1 } * c.mlp_width(),
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
            Self::EncoderDecoder(m) => {
                let c = m.config();
                BlockWidths {
                    hidden: c.hidden_size,
                    // A block of the decoder has queries twice, for targets and for sources.
                    query: 2 * c.attention_size(),
                    key_value: c.attention_size(),
                    heads: c.num_attention_heads,
                    mlp: if c.mlp.is_gated() { 2 } else { 1 } * c.intermediate_size,
                }
            }
        }
    }
}

impl BaseModel for AnyModel {
    fn sites(&self) -> &Arc<SiteTable> {
        each!(self, m => m.sites())
    }

    fn layer(&self, site: SiteId) -> Result<BaseLayer<'_>> {
        each!(self, m => m.layer(site))
    }

    fn model_type(&self) -> &str {
        each!(self, m => m.model_type())
    }

    fn device(&self) -> &Device {
        each!(self, m => m.device())
    }

    fn dtype(&self) -> DType {
        each!(self, m => m.dtype())
    }

    fn tied_embedding(&self) -> Option<&str> {
        each!(self, m => m.tied_embedding())
    }

    fn prompt_dims(&self) -> Option<PromptDims> {
        each!(self, m => m.prompt_dims())
    }

    fn task(&self) -> Task {
        each!(self, m => m.task())
    }

    fn sublayers(&self) -> Vec<SublayerSite> {
        each!(self, m => m.sublayers())
    }

    fn fresh_layers(&self) -> &[String] {
        each!(self, m => m.fresh_layers())
    }
}

impl Segmented for AnyModel {
    type Input = AnyInput;

    fn prepare(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<AnyInput> {
        match self {
            Self::Decoder(m) => m.prepare(batch, ctx).map(AnyInput::Decoder),
            Self::Encoder(m) => m.prepare(batch, ctx).map(AnyInput::Encoder),
            Self::EncoderDecoder(m) => m.prepare(batch, ctx).map(AnyInput::EncoderDecoder),
        }
    }

    fn embed(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        each!(self, m => m.embed(batch, ctx))
    }

    fn num_blocks(&self) -> usize {
        each!(self, m => m.num_blocks())
    }

    fn block(&self, i: usize, hidden: &Tensor, input: &AnyInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        match (self, input) {
            (Self::Decoder(m), AnyInput::Decoder(input)) => m.block(i, hidden, input, ctx),
            (Self::Encoder(m), AnyInput::Encoder(input)) => m.block(i, hidden, input, ctx),
            (Self::EncoderDecoder(m), AnyInput::EncoderDecoder(input)) => m.block(i, hidden, input, ctx),
            _ => Err(Error::msg("the batch was prepared by another model")),
        }
    }

    fn last_block(&self, hidden: &Tensor, rows: &ReadRows, input: &AnyInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        match (self, input) {
            (Self::Decoder(m), AnyInput::Decoder(input)) => m.last_block(hidden, rows, input, ctx),
            (Self::Encoder(m), AnyInput::Encoder(input)) => m.last_block(hidden, rows, input, ctx),
            (Self::EncoderDecoder(m), AnyInput::EncoderDecoder(input)) => m.last_block(hidden, rows, input, ctx),
            _ => Err(Error::msg("the batch was prepared by another model")),
        }
    }

    fn final_norm(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        each!(self, m => m.final_norm(hidden, ctx))
    }

    fn last_hidden_state(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        each!(self, m => m.last_hidden_state(hidden, ctx))
    }

    fn logits(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        each!(self, m => m.logits(hidden, ctx))
    }

    fn plain_head(&self, ctx: &Ctx<'_>) -> Option<(&FrozenWeight, Option<f32>)> {
        each!(self, m => m.plain_head(ctx))
    }

    fn keys_values(&self, i: usize, hidden: &Tensor) -> Result<[Tensor; 3]> {
        each!(self, m => m.keys_values(i, hidden))
    }

    fn vocab_size(&self) -> usize {
        each!(self, m => m.vocab_size())
    }
}
