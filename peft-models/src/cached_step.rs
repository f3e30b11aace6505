//! One pass over new tokens of several sequences whose earlier tokens are in a cache.

use std::ops::Range;

use candle_core::Tensor;
use peft_core::kernels::SequenceSpan;
use peft_core::{AdapterSet, BaseModel, Ctx, PrefixModule, Result, Route, Segmented};

use crate::decoder::Decoder;
use crate::kv_cache::LayerCache;

/// The part that one sequence has in a [`CachedStep`].
#[derive(Debug, Clone)]
pub struct StepSequence {
    /// The adapter's slot in the set, `None` for the base alone.
    pub slot: Option<usize>,
    /// How many of the step's tokens are its own.
    pub tokens: usize,
    /// Its rows of the cache so far, those of the new tokens at the end.
    pub keys: Range<usize>,
    /// Rows of its adapter's virtual tokens, which it may share with others; empty where there are none.
    pub prefix: Range<usize>,
    /// Whether the logits behind its last token are asked for.
    pub read: bool,
}

/// A prompt of virtual tokens that becomes rows of the cache in this step.
#[derive(Debug, Clone)]
pub struct StepPrompt {
    /// The adapter's slot in the set.
    pub slot: usize,
    /// The rows of the cache that it fills.
    pub rows: Range<usize>,
    /// Its embeddings `[rows.len(), hidden]`.
    pub embeddings: Tensor,
}

/// New tokens of several sequences, and where these are in the cache.
#[derive(Debug, Clone, Default)]
pub struct CachedStep {
    /// The new tokens, sequence after sequence.
    pub ids: Vec<u32>,
    /// Each sequence's part.
    pub sequences: Vec<StepSequence>,
    /// Prompts that sequences of this step and later ones see.
    pub prompts: Vec<StepPrompt>,
}

impl CachedStep {
    /// Writes keys and values of all new tokens to the cache. Gives the logits `[sequences that read, vocab]` behind the last
    /// token of each sequence that asks for them, and nothing where none does.
    ///
    /// # Errors
    /// A token outside the vocabulary, a position that the model does not have, or a tensor operation that fails.
    pub fn run(&self, model: &Decoder, adapters: &AdapterSet, caches: &mut [LayerCache]) -> Result<Option<Tensor>> {
        let mut bounds = vec![0];
        let mut positions: Vec<u32> = Vec::with_capacity(self.ids.len());
        let mut spans = Vec::with_capacity(self.sequences.len() + self.prompts.len());
        for sequence in &self.sequences {
            let queries = positions.len()..positions.len() + sequence.tokens;
            bounds.push(queries.end);
            let first = (sequence.prefix.len() + sequence.keys.len()).saturating_sub(sequence.tokens);
            positions.extend((first as u32..).take(sequence.tokens));
            spans.push(SequenceSpan { queries, keys: sequence.keys.clone(), prefix: sequence.prefix.clone() });
        }
        let slots: Vec<Option<usize>> = self.sequences.iter().map(|s| s.slot).collect();
        let route = Route::rows(&bounds, &slots);
        let ctx = Ctx::eval(adapters, &route);
        let mut rows = vec![model.embed_tokens(&self.ids, &ctx)?];
        for prompt in &self.prompts {
            let queries = positions.len()..positions.len() + prompt.rows.len();
            positions.extend((0u32..).take(prompt.rows.len()));
            spans.push(SequenceSpan { queries, keys: prompt.rows.clone(), prefix: 0..0 });
            rows.push(prompt.embeddings.to_dtype(model.dtype())?);
        }
        let with_prompts = route.followed_by(self.ids.len(), self.prompts.iter().map(|p| (p.rows.len(), p.slot)));
        let input = model.prepare_cached(&positions, spans)?;
        let hidden = match rows.as_slice() {
            [own] => own.clone(),
            rows => Tensor::cat(rows, 0)?,
        };
        let mut hidden = model.add_positions(hidden, &positions, &Ctx { route: &with_prompts, ..ctx })?;
        for (i, cache) in caches.iter_mut().enumerate() {
            hidden = model.block_cached(i, &hidden, &input, &Ctx { route: &with_prompts, ..ctx }, cache)?;
        }
        let ends = bounds.iter().skip(1).zip(&self.sequences).filter(|(_, sequence)| sequence.read);
        let last: Vec<usize> = ends.filter_map(|(end, _)| end.checked_sub(1)).collect();
        if last.is_empty() {
            return Ok(None);
        }
        let index: Vec<u32> = last.iter().map(|&i| i as u32).collect();
        let rows = hidden.index_select(&Tensor::new(index, hidden.device())?, 0)?;
        let route = route.select(&last);
        let ctx = Ctx { route: &route, ..ctx };
        model.logits(&model.final_norm(&rows, &ctx)?, &ctx).map(Some)
    }
}

/// Puts the keys and values of a prefix into the rows of the cache from `start` on.
///
/// # Errors
/// When a tensor operation fails.
pub fn write_prefix(module: &dyn PrefixModule, start: usize, caches: &mut [LayerCache], ctx: &Ctx<'_>) -> Result<()> {
    for (layer, cache) in caches.iter_mut().enumerate() {
        let (keys, values) = module.keys_values(layer, ctx)?;
        cache.write(start, &keys, &values)?;
    }
    Ok(())
}
