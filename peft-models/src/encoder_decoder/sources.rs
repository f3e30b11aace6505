//! The sources of a batch and what virtual tokens put in front of them.

use std::ops::Range;

use candle_core::Tensor;
use peft_core::kernels::SequenceSpan;
use peft_core::{Ctx, Error, Result, Route, TokenBatch, VirtualModule, VirtualSpan, VirtualSpans};

/// Where each sequence lies.
type Rows = Vec<Range<usize>>;

/// A span of attention without a prefix.
pub(super) fn span(queries: Range<usize>, keys: Range<usize>) -> SequenceSpan {
    SequenceSpan { queries, keys, prefix: 0..0 }
}

/// The sources of a batch with the prompts of their adapters in front of them.
pub(super) struct Sources<'a> {
    /// Each source's rows among the tokens of all sources.
    pub(super) tokens: Rows,
    pub(super) virtual_tokens: &'a VirtualSpans,
}

impl Sources<'_> {
    /// Rows of the prompt in front of source `i`.
    fn prompt_length(&self, i: usize) -> usize {
        let span = self.virtual_tokens.of_sequence(i).and_then(|at| self.virtual_tokens.iter().nth(at));
        span.filter(|span| span.tokens.is_prompt()).map_or(0, |span| span.tokens.count)
    }

    /// Each source's rows with its prompt.
    pub(super) fn rows(&self) -> Rows {
        let mut end = 0;
        let with_prompt = |(i, tokens): (usize, &Range<usize>)| {
            let start = end;
            end += self.prompt_length(i) + tokens.len();
            start..end
        };
        self.tokens.iter().enumerate().map(with_prompt).collect()
    }

    /// The embeddings of all rows, for those of the tokens.
    pub(super) fn with_prompts(&self, tokens: Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let prompt = |span: &VirtualSpan| match &span.tokens.module {
            VirtualModule::Prompt(module) => Ok(Some(module.embeddings(ctx)?.to_dtype(tokens.dtype())?)),
            VirtualModule::Prefix(_) => Ok(None),
        };
        let prompts = self.virtual_tokens.iter().map(prompt).collect::<Result<Vec<_>>>()?;
        if prompts.iter().all(Option::is_none) {
            return Ok(tokens);
        }
        let mut pieces = Vec::with_capacity(2 * self.tokens.len());
        for (i, own) in self.tokens.iter().enumerate() {
            pieces.extend(self.virtual_tokens.of_sequence(i).and_then(|at| prompts.get(at)).cloned().flatten());
            pieces.push(tokens.narrow(0, own.start, own.len())?);
        }
        Ok(Tensor::cat(&pieces, 0)?)
    }

    /// The route of all rows, where it is not `route`; the tokens of the sources are rows `from..` of that.
    pub(super) fn route(&self, route: &Route, from: usize) -> Option<Route> {
        let Route::Rows(_) = route else { return None };
        if self.virtual_tokens.is_empty() {
            let all = self.tokens.iter().flat_map(|own| own.start + from..own.end + from);
            return Some(route.select(&all.collect::<Vec<_>>()));
        }
        // Virtual tokens stand in front of whole sequences, each of which has one adapter.
        let slot = |own: &Range<usize>| route.slots_of(own.start + from..own.end + from).next().flatten();
        let bounds: Vec<usize> = std::iter::once(0).chain(self.rows().iter().map(|rows| rows.end)).collect();
        Some(Route::rows(&bounds, &self.tokens.iter().map(slot).collect::<Vec<_>>()))
    }
}

/// The targets and sources of a batch, the latter counted from the first of them, and what virtual tokens belong to them.
pub(super) fn halves(batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<(Rows, Rows, VirtualSpans)> {
    let mut targets: Rows = batch.sequences()?.collect();
    if !targets.len().is_multiple_of(2) {
        return Err(Error::msg(format!("{} sequences are not as many targets as sources", targets.len())));
    }
    let mut sources = targets.split_off(targets.len() / 2);
    let first = targets.last().map_or(0, |t| t.end);
    sources.iter_mut().for_each(|s| *s = s.start - first..s.end - first);
    let bounds = batch.bounds.get(..=targets.len()).unwrap_or_default();
    let virtual_tokens = VirtualSpans::of(bounds, ctx)?;
    Ok((targets, sources, virtual_tokens))
}
