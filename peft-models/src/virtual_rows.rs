//! The rows of virtual tokens in one pass: where those of a decoder lie and who sees them, which adapter they go through, and
//! the keys and values of prefixes.

use candle_core::Tensor;
use peft_core::kernels::SequenceSpan;
use peft_core::{Ctx, Result, Route, TokenBatch, VirtualSpans};

use crate::kv_cache::LayerCache;

/// What virtual tokens make of a batch without a cache.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Positions of the hidden rows: the batch's own, moved, then those of prompts.
    pub(crate) positions: Vec<u32>,
    /// The sequences of attention: the batch's own, then each prompt.
    pub(crate) sequences: Vec<SequenceSpan>,
    /// What blocks need besides.
    pub(crate) rows: VirtualRows,
}

impl Layout {
    /// The layout of `batch` for the adapters of `ctx`.
    ///
    /// # Errors
    /// When the batch is malformed, or a sequence goes through several adapters one of which has virtual tokens.
    pub(crate) fn of(batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<Self> {
        let tokens = batch.ids.len();
        let owns = batch.sequences()?;
        let spans = VirtualSpans::of(batch.bounds, ctx)?;
        let rows = spans.rows(tokens);
        let mut positions = batch.positions.to_vec();
        let mut sequences = Vec::with_capacity(batch.bounds.len());
        for (i, own) in owns.enumerate() {
            let prefix = spans.rows_of_sequence(i, &rows);
            let shift = spans.positions_of_sequence(i) as u32;
            positions.iter_mut().take(own.end).skip(own.start).for_each(|p| *p = p.saturating_add(shift));
            sequences.push(SequenceSpan { queries: own.clone(), keys: own, prefix });
        }
        let prompts = || spans.iter().zip(&rows).filter(|(span, _)| span.tokens.is_prompt());
        for (_, rows) in prompts() {
            positions.extend((0u32..).take(rows.len()));
            sequences.push(SequenceSpan { queries: rows.clone(), keys: rows.clone(), prefix: 0..0 });
        }
        let route = ctx.route.followed_by(tokens, prompts().map(|(span, rows)| (rows.len(), span.slot)));
        let route = prompts().next().map(|_| route);
        Ok(Self { positions, sequences, rows: VirtualRows::new(spans, route, None) })
    }
}

/// What the blocks of one pass need to know of its virtual tokens. Nothing, where there are none.
#[derive(Debug, Clone, Default)]
pub(crate) struct VirtualRows {
    spans: VirtualSpans,
    /// The route of all hidden rows, where it is not that of the batch's own tokens.
    route: Option<Route>,
    /// The first pass of all hidden rows, where they are not the batch's own tokens and others behind.
    first: Option<Tensor>,
}

impl VirtualRows {
    /// Those of a pass whose hidden rows go through `route`, where that is not the one of the batch's own tokens, and have `first` as
    /// their first pass, where these do not begin with the batch's tokens.
    pub(crate) fn new(spans: VirtualSpans, route: Option<Route>, first: Option<Tensor>) -> Self {
        Self { spans, route, first }
    }

    /// Whether what stands in front of a sequence takes positions; true where nothing does.
    pub(crate) fn moves_positions(&self, sequence: usize) -> bool {
        self.spans.of_sequence(sequence).is_none() || self.spans.positions_of_sequence(sequence) > 0
    }

    /// The context of the hidden rows, for a context of the batch's own tokens.
    pub(crate) fn ctx<'c>(&'c self, ctx: &Ctx<'c>) -> Ctx<'c> {
        Ctx { route: self.route.as_ref().unwrap_or(ctx.route), first: self.first.as_ref().or(ctx.first), ..*ctx }
    }

    /// `keys` and `values` of layer `layer`, whose attention reads `x`, those of the prefixes behind them.
    pub(crate) fn extend(
        &self,
        layer: usize,
        x: &Tensor,
        (keys, values): (Tensor, Tensor),
        ctx: &Ctx<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let prefixes = self.spans.prefixes(layer, x, ctx)?;
        if prefixes.is_empty() {
            return Ok((keys, values));
        }
        let dtype = keys.dtype();
        let (mut all_keys, mut all_values) = (vec![keys], vec![values]);
        for (keys, values) in prefixes {
            all_keys.push(keys.to_dtype(dtype)?);
            all_values.push(values.to_dtype(dtype)?);
        }
        Ok((Tensor::cat(&all_keys, 0)?, Tensor::cat(&all_values, 0)?))
    }

    /// Writes the prefixes that are another thing for each sequence where the cache of layer `layer` has room for them.
    pub(crate) fn write_gated(&self, layer: usize, x: &Tensor, cache: &mut LayerCache, ctx: &Ctx<'_>) -> Result<()> {
        for (sequence, keys, values) in self.spans.gated_prefixes(layer, x, ctx)? {
            if let Some(span) = ctx.sequences.get(sequence) {
                cache.write(span.prefix.start, &keys, &values)?;
            }
        }
        Ok(())
    }
}
