//! A base model as a chain of segments: what the trainer's block-wise backward and the decoder's cache work on.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_kernels::FrozenWeight;

use crate::ctx::Ctx;
use crate::error::{Error, Result};
use crate::experts::FrozenExperts;
use crate::head::HeadKind;
use crate::layers::{FrozenEmbedding, FrozenLinear, FrozenNorm};
use crate::read_rows::ReadRows;
use crate::site::{SiteId, SiteTable};
use crate::sublayer::SublayerSite;
use crate::virtual_tokens::PromptDims;

/// Token sequences, packed one after another without padding. For an encoder–decoder, the first half of them are what
/// the decoder reads, and the second half the sources of these, in the same order.
#[derive(Debug, Clone, Copy)]
pub struct TokenBatch<'a> {
    /// Token ids, `[tokens]`.
    pub ids: &'a [u32],
    /// Position of each token in its sequence, `[tokens]`.
    pub positions: &'a [u32],
    /// Sequence `i` holds tokens `bounds[i]..bounds[i + 1]`.
    pub bounds: &'a [usize],
    /// Token type of each token, `[tokens]` (BERT's `token_type_ids`), or empty where all are 0.
    pub types: &'a [u32],
}

impl TokenBatch<'_> {
    /// The tokens of each sequence.
    ///
    /// # Errors
    /// When the bounds do not cover the tokens, or another field has another length.
    pub fn sequences(&self) -> Result<impl Iterator<Item = Range<usize>>> {
        let fits = self.bounds.first() == Some(&0)
            && self.bounds.last() == Some(&self.ids.len())
            && self.positions.len() == self.ids.len()
            && (self.types.is_empty() || self.types.len() == self.ids.len())
            && self.bounds.is_sorted();
        if !fits {
            return Err(Error::msg("a batch's bounds do not cover its tokens"));
        }
        Ok(self.bounds.windows(2).map(|w| w[0]..w[1]))
    }
}

/// What a model's head computes, which decides what the rows of training data hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Logits over the vocabulary: every hidden state predicts the next token.
    CausalLm,
    /// Logits over the vocabulary: every hidden state of a target's decoder predicts a token of the target, which the
    /// decoder reads one place later (`*ForConditionalGeneration`).
    Seq2SeqLm,
    /// The outputs of a head of its own (`*ForSequenceClassification`, `*ForTokenClassification`, `*ForQuestionAnswering`).
    Head {
        /// What they are held against.
        kind: HeadKind,
        /// How many there are.
        outputs: usize,
        /// Whose hidden states reach the head.
        reads: ClassToken,
    },
}

impl Task {
    /// PEFT's name for it, as in `task_type`.
    #[must_use]
    pub fn peft_name(self) -> &'static str {
        match self {
            Self::CausalLm => "CAUSAL_LM",
            Self::Seq2SeqLm => "SEQ_2_SEQ_LM",
            Self::Head { kind, .. } => kind.peft_name(),
        }
    }
}

/// The tokens whose hidden states reach a head: the one that stands for its sequence, or all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClassToken {
    /// The first, `[CLS]` of encoders.
    First,
    /// The last, which alone has seen all others in a causal model.
    Last,
    /// Every token, each for itself.
    Every,
}

/// A frozen layer, looked up by its site.
#[derive(Debug, Clone, Copy)]
pub enum BaseLayer<'a> {
    /// A linear layer.
    Linear(&'a FrozenLinear),
    /// A token embedding.
    Embedding(&'a FrozenEmbedding),
    /// A normalisation.
    Norm(&'a FrozenNorm),
    /// The experts of a mixture.
    Experts(&'a FrozenExperts),
}

/// Access to the frozen layers, for methods that start from the base's weights.
pub trait BaseModel: Send + Sync {
    /// The model's sites.
    fn sites(&self) -> &Arc<SiteTable>;

    /// The frozen layer at a site.
    ///
    /// # Errors
    /// When the site is not the model's.
    fn layer(&self, site: SiteId) -> Result<BaseLayer<'_>>;

    /// `model_type` as transformers names it: `llama`.
    fn model_type(&self) -> &str;

    /// Where weights and activations live.
    fn device(&self) -> &Device;

    /// The element type of activations.
    fn dtype(&self) -> DType;

    /// Path of the embedding whose table the output head shares, where they are tied.
    fn tied_embedding(&self) -> Option<&str>;

    /// What virtual tokens have to know, or `None` where the model does not ask its adapters for any.
    fn prompt_dims(&self) -> Option<PromptDims> {
        None
    }

    /// The sublayers of its blocks, in order; none where the model does not ask their ends for adapters.
    fn sublayers(&self) -> Vec<SublayerSite> {
        Vec::new()
    }

    /// What the head computes.
    fn task(&self) -> Task {
        Task::CausalLm
    }

    /// Paths of the layers that the checkpoint has no weights for and that start at random. They have to be trained and
    /// stored with the adapter, since nothing else holds them.
    fn fresh_layers(&self) -> &[String] {
        &[]
    }
}

/// A model as segments. Segment 0 embeds, segments `1..=num_blocks` are blocks, the last makes logits.
pub trait Segmented: BaseModel {
    /// What all blocks need of a batch: attention spans and, for decoders, rotary positions.
    type Input: Send + Sync;

    /// Prepares a batch for a pass through the adapters of `ctx`, whose virtual tokens move positions and are seen by
    /// attention.
    ///
    /// # Errors
    /// When the batch is malformed or longer than the model's positions.
    fn prepare(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<Self::Input>;

    /// Hidden states `[tokens, hidden]` before the first block. Where adapters of `ctx` put prompts in front of sequences, there
    /// are rows of these too, up to the last block. In a causal model they follow those of the batch's own tokens; elsewhere
    /// the model itself finds the rows that [`Segmented::last_block`] is asked for.
    ///
    /// # Errors
    /// When an id is outside the vocabulary or a tensor operation fails.
    fn embed(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<Tensor>;

    /// How many blocks there are.
    fn num_blocks(&self) -> usize;

    /// Runs block `i` (from 0): `[tokens, hidden]` to the same shape.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn block(&self, i: usize, hidden: &Tensor, input: &Self::Input, ctx: &Ctx<'_>) -> Result<Tensor>;

    /// `rows` of what the last block makes, `[rows, hidden]`: only these reach [`Segmented::final_norm`], so that a model may
    /// leave out what makes the others. They are counted among the batch's own tokens; behind a prompt an encoder takes the same
    /// place of the sequence, its prompt included.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn last_block(&self, hidden: &Tensor, rows: &ReadRows, input: &Self::Input, ctx: &Ctx<'_>) -> Result<Tensor> {
        let last = self.num_blocks().checked_sub(1).ok_or_else(|| Error::msg("a model without blocks"))?;
        rows.of(&self.block(last, hidden, input, ctx)?)
    }

    /// What stands between the last block and the output layer, `[rows, hidden]` to the same shape: the final norm of a
    /// decoder, the pooler of an encoder with a class head. It sees only the rows that reach the head.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn final_norm(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor>;

    /// What transformers calls the last hidden state, `[rows, hidden]`, from what the last block makes: that behind the final norm
    /// of a decoder, in front of the pooler of an encoder.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn last_hidden_state(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        self.final_norm(hidden, ctx)
    }

    /// Logits `[rows, vocab]`, or `[rows, outputs]` of a head of its own, from what [`Segmented::final_norm`] gives.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn logits(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor>;

    /// The head's weight and the cap on its logits when the head is frozen and no adapter of `ctx` touches it, so that
    /// loss and gradient may be made chunk by chunk without a graph.
    fn plain_head(&self, ctx: &Ctx<'_>) -> Option<(&FrozenWeight, Option<f32>)>;

    /// What block `i` makes of `hidden` `[tokens, hidden]`, a sequence of its own from position 0 on, without adapters: its result,
    /// and the keys and values that a prefix has in their place ([`crate::PrefixModule::keys_values`]).
    ///
    /// # Errors
    /// When the model is no causal decoder, or a tensor operation fails.
    fn keys_values(&self, i: usize, hidden: &Tensor) -> Result<[Tensor; 3]> {
        let (_, _) = (i, hidden);
        Err(Error::msg(format!("a model of type `{}` takes no prompts in front of its blocks here", self.model_type())))
    }

    /// Rows of the vocabulary.
    fn vocab_size(&self) -> usize;
}
