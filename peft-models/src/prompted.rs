//! Prompts in front of sequences that attention reads from both ends: each sequence has rows of its own for them.

use std::ops::Range;

use candle_core::Tensor;
use peft_core::{Ctx, Result, Route, VirtualModule, VirtualSpan, VirtualSpans};

/// Where each sequence lies.
pub(crate) type Rows = Vec<Range<usize>>;

/// Sequences with the prompts of their adapters in front of them.
pub(crate) struct Prompted<'a> {
    /// Each sequence's rows among the tokens of all.
    pub(crate) tokens: Rows,
    pub(crate) virtual_tokens: &'a VirtualSpans,
}

impl Prompted<'_> {
    /// Rows of the prompt in front of sequence `i`.
    pub(crate) fn prompt_length(&self, i: usize) -> usize {
        let span = self.virtual_tokens.of_sequence(i).and_then(|at| self.virtual_tokens.iter().nth(at));
        span.filter(|span| span.tokens.is_prompt()).map_or(0, |span| span.tokens.count)
    }

    /// Positions that the prefix in front of the keys of sequence `i` takes.
    pub(crate) fn prefix_positions(&self, i: usize) -> usize {
        self.virtual_tokens.positions_of_sequence(i) - self.prompt_length(i)
    }

    /// Each sequence's rows with its prompt.
    pub(crate) fn rows(&self) -> Rows {
        let mut end = 0;
        let with_prompt = |(i, tokens): (usize, &Range<usize>)| {
            let start = end;
            end += self.prompt_length(i) + tokens.len();
            start..end
        };
        self.tokens.iter().enumerate().map(with_prompt).collect()
    }

    /// The embeddings of all rows, for those of the tokens.
    pub(crate) fn with_prompts(&self, tokens: Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
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

    /// The first pass of all rows, for that of the tokens, where prompts move them; nothing reads it of the rows of prompts.
    pub(crate) fn first_pass(&self, first: Option<&Tensor>) -> Result<Option<Tensor>> {
        let (Some(first), true) = (first, self.virtual_tokens.iter().any(|span| span.tokens.is_prompt())) else {
            return Ok(None);
        };
        let mut pieces = Vec::with_capacity(2 * self.tokens.len());
        for (i, own) in self.tokens.iter().enumerate() {
            pieces.push(Tensor::zeros((self.prompt_length(i), first.dim(1)?), first.dtype(), first.device())?);
            pieces.push(first.narrow(0, own.start, own.len())?);
        }
        Ok(Some(Tensor::cat(&pieces, 0)?))
    }

    /// The route of all rows, where it is not `route`; the tokens of the sequences are rows `from..` of that.
    pub(crate) fn route(&self, route: &Route, from: usize) -> Option<Route> {
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
