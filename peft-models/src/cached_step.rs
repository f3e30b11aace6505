//! One pass over new tokens of several sequences whose earlier tokens are in a cache.

use std::ops::Range;

use candle_core::Tensor;
use peft_core::kernels::SequenceSpan;
use peft_core::{AdapterSet, BaseModel, Ctx, Error, PrefixModule, ReadRows, Result, Route, Segmented, VirtualSpans};

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
    /// The position of its first token: how many virtual tokens stand before it.
    pub first_position: usize,
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
    /// token of each sequence that asks for them, and nothing where none does. `of_base` is another cache with the same rows, of the base
    /// alone; only adapters that read a first pass need one.
    ///
    /// # Errors
    /// A token outside the vocabulary, a position that the model does not have, an adapter that reads a first pass without a cache for
    /// it, or a tensor operation that fails.
    pub fn run(
        &self,
        model: &Decoder,
        adapters: &AdapterSet,
        caches: &mut [LayerCache],
        of_base: Option<&mut [LayerCache]>,
    ) -> Result<Option<Tensor>> {
        let (bounds, route) = self.route();
        let ctx = Ctx::eval(adapters, &route);
        let first = match (ctx.reads_first_pass(), of_base) {
            (false, _) => None,
            (true, Some(of_base)) => Some(self.first_pass(model, adapters, of_base)?),
            (true, None) => {
                return Err(Error::msg("an adapter of this step reads a first pass, which has no cache here"));
            }
        };
        let ctx = Ctx { first: first.as_ref(), ..ctx };
        let hidden = self.hidden(model, &ctx, &bounds, caches)?;
        let ends = bounds.iter().skip(1).zip(&self.sequences).filter(|(_, sequence)| sequence.read);
        let last: Vec<u32> = ends.filter_map(|(end, _)| end.checked_sub(1)).map(|row| row as u32).collect();
        if last.is_empty() {
            return Ok(None);
        }
        let last = ReadRows::new(last, &ctx)?;
        let ctx = last.ctx(&ctx);
        model.logits(&model.final_norm(&last.of(&hidden)?, &ctx)?, &ctx).map(Some)
    }

    /// Where each sequence's tokens lie, and which adapter they use.
    fn route(&self) -> (Vec<usize>, Route) {
        let mut bounds = vec![0];
        bounds.extend(self.sequences.iter().scan(0, |end, sequence| {
            *end += sequence.tokens;
            Some(*end)
        }));
        let slots: Vec<Option<usize>> = self.sequences.iter().map(|s| s.slot).collect();
        let route = Route::rows(&bounds, &slots);
        (bounds, route)
    }

    /// What the base alone makes of the new tokens, `[tokens, hidden]`, with its own `caches`.
    fn first_pass(&self, model: &Decoder, adapters: &AdapterSet, caches: &mut [LayerCache]) -> Result<Tensor> {
        let alone = |sequence: &StepSequence| StepSequence { slot: None, prefix: 0..0, ..sequence.clone() };
        let sequences = self.sequences.iter().map(alone).collect();
        let step = Self { ids: self.ids.clone(), sequences, prompts: Vec::new() };
        let (bounds, route) = step.route();
        let ctx = Ctx::eval(adapters, &route);
        let hidden = step.hidden(model, &ctx, &bounds, caches)?;
        model.last_hidden_state(&hidden, &ctx)
    }

    /// What the last block makes of the new tokens and, behind them, of the prompts.
    fn hidden(&self, model: &Decoder, ctx: &Ctx<'_>, bounds: &[usize], caches: &mut [LayerCache]) -> Result<Tensor> {
        let mut positions: Vec<u32> = Vec::with_capacity(self.ids.len());
        let mut spans = Vec::with_capacity(self.sequences.len() + self.prompts.len());
        for sequence in &self.sequences {
            let queries = positions.len()..positions.len() + sequence.tokens;
            let first = (sequence.first_position + sequence.keys.len()).saturating_sub(sequence.tokens);
            positions.extend((first as u32..).take(sequence.tokens));
            spans.push(SequenceSpan { queries, keys: sequence.keys.clone(), prefix: sequence.prefix.clone() });
        }
        let mut rows = vec![model.embed_tokens(&self.ids, ctx)?];
        for prompt in &self.prompts {
            let queries = positions.len()..positions.len() + prompt.rows.len();
            positions.extend((0u32..).take(prompt.rows.len()));
            spans.push(SequenceSpan { queries, keys: prompt.rows.clone(), prefix: 0..0 });
            rows.push(prompt.embeddings.to_dtype(model.dtype())?);
        }
        let with_prompts = ctx.route.followed_by(self.ids.len(), self.prompts.iter().map(|p| (p.rows.len(), p.slot)));
        let input = model.prepare_cached(&positions, spans, VirtualSpans::of(bounds, ctx)?)?;
        let hidden = match rows.as_slice() {
            [own] => own.clone(),
            rows => Tensor::cat(rows, 0)?,
        };
        let ctx = Ctx { route: &with_prompts, ..*ctx };
        let mut hidden = model.add_positions(hidden, &positions, &ctx)?;
        for (i, cache) in caches.iter_mut().enumerate() {
            hidden = model.block_cached(i, &hidden, &input, &ctx, cache)?;
        }
        Ok(hidden)
    }
}

/// Puts the keys and values of a prefix into the rows of the cache from `start` on. Where they depend on the sequence, each step does.
///
/// # Errors
/// When a tensor operation fails.
pub fn write_prefix(module: &dyn PrefixModule, start: usize, caches: &mut [LayerCache], ctx: &Ctx<'_>) -> Result<()> {
    if module.gate(0).is_some() {
        return Ok(());
    }
    for (layer, cache) in caches.iter_mut().enumerate() {
        let (keys, values) = module.keys_values(layer, ctx)?;
        cache.write(start, &keys, &values)?;
    }
    Ok(())
}
