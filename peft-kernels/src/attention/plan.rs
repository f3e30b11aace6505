//! Who attends to whom: the packed sequences of a batch and the shape of their masks.

use std::ops::Range;

use candle_core::{Result, Tensor};

/// Where one sequence lies in the packed queries and keys of a batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SequenceSpan {
    /// Its rows of `q`. Sequences may not share queries.
    pub queries: Range<usize>,
    /// Its own rows of `k` and `v`. Sequences may not share them; keys that several sequences see are a `prefix`.
    pub keys: Range<usize>,
    /// Further rows of `k` and `v`, which stand before its own (prefix tuning). May be empty, and may be shared by several sequences: its gradient is then the sum of theirs.
    pub prefix: Range<usize>,
}

/// What [`attention`](crate::attention) computes: heads, scaling, mask, and the sequences of the batch.
///
/// With `nq` queries and `nk` own keys, query `i` of a sequence stands at position `p = i + nk − nq` of its keys, so that
/// a cache of earlier keys simply makes `nk` larger than `nq`. `causal` lets it see the keys `0..=p`. `window = Some(w)`
/// keeps of those the last `w` (`j > p − w`, as `sliding_window` in transformers); without `causal` it keeps the keys with
/// `|j − p| ≤ w` (as transformers' bidirectional sliding window). The keys of a prefix stand before the first own key, at
/// positions `−len..0`, so that causal queries see all of them and a window reaches over to the last. A query that sees no
/// key at all gives zeros.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionPlan {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`. Query head `h` uses key head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements of a head, of queries, keys and values alike.
    pub head_dim: usize,
    /// What `q·k` is multiplied with, usually `head_dim^−½`.
    pub scale: f32,
    /// Whether a query sees only keys up to its own position.
    pub causal: bool,
    /// The sliding window, in keys.
    pub window: Option<usize>,
    /// `c · tanh(logit / c)` in place of each scaled logit (Gemma 2).
    pub softcap: Option<f32>,
    /// The sequences of the batch.
    pub sequences: Vec<SequenceSpan>,
}

impl AttentionPlan {
    /// Causal attention with the usual scale over sequences of the given lengths, packed one after another.
    pub fn causal(heads: usize, kv_heads: usize, head_dim: usize, lengths: &[usize]) -> Self {
        let mut end = 0usize;
        let sequences = lengths
            .iter()
            .map(|n| {
                let start = end;
                end = end.saturating_add(*n);
                SequenceSpan { queries: start..end, keys: start..end, prefix: 0..0 }
            })
            .collect();
        let scale = 1.0 / (head_dim.max(1) as f32).sqrt();
        Self { heads, kv_heads, head_dim, scale, causal: true, window: None, softcap: None, sequences }
    }

    /// Query heads that share one key head.
    pub fn group(&self) -> usize {
        self.heads.checked_div(self.kv_heads).unwrap_or(0)
    }

    /// Checks the plan against the tensors and returns `(query tokens, key tokens)`.
    pub(super) fn validate(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(usize, usize)> {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        if heads == 0 || kv_heads == 0 || head_dim == 0 || heads % kv_heads != 0 {
            candle_core::bail!(
                "attention: {heads} heads of {head_dim} cannot share {kv_heads} key heads; \
                 num_key_value_heads must divide num_attention_heads"
            );
        }
        if !self.scale.is_finite() {
            candle_core::bail!("attention: the scale is {}", self.scale);
        }
        if self.softcap.is_some_and(|c| !(c.is_finite() && c > 0.0)) {
            candle_core::bail!("attention: softcap is {:?}; leave it out or give a positive number", self.softcap);
        }
        if self.window == Some(0) {
            candle_core::bail!("attention: a sliding window of 0 sees nothing; leave it out for full attention");
        }
        let matrix = |name: &str, t: &Tensor, heads: usize| match t.dims() {
            [tokens, width] if heads.checked_mul(head_dim) == Some(*width) => Ok(*tokens),
            dims => candle_core::bail!(
                "attention: {name} has shape {dims:?}, not [tokens, {heads} heads × head_dim {head_dim}]"
            ),
        };
        let (nq, nk, nv) = (matrix("q", q, heads)?, matrix("k", k, kv_heads)?, matrix("v", v, kv_heads)?);
        if nk != nv {
            candle_core::bail!("attention: {nk} keys but {nv} values");
        }
        if q.dtype() != k.dtype() || q.dtype() != v.dtype() {
            candle_core::bail!("attention: q is {:?}, k {:?}, v {:?}", q.dtype(), k.dtype(), v.dtype());
        }
        for (i, s) in self.sequences.iter().enumerate() {
            for (name, range, tokens) in [("queries", &s.queries, nq), ("keys", &s.keys, nk), ("prefix", &s.prefix, nk)]
            {
                if range.start > range.end || range.end > tokens {
                    candle_core::bail!(
                        "attention: {name} {range:?} of sequence {i} leave the {tokens} tokens there are"
                    );
                }
            }
            if overlap(&s.keys, &s.prefix) {
                candle_core::bail!("attention: prefix {:?} of sequence {i} overlaps its keys {:?}", s.prefix, s.keys);
            }
        }
        self.disjoint("queries", |s| &s.queries)?;
        self.disjoint("keys", |s| &s.keys)?;
        Ok((nq, nk))
    }

    fn disjoint(&self, name: &str, range: impl Fn(&SequenceSpan) -> &Range<usize>) -> Result<()> {
        let mut ranges: Vec<_> = self.sequences.iter().map(range).filter(|r| !r.is_empty()).collect();
        ranges.sort_by_key(|r| r.start);
        match ranges.windows(2).find(|w| overlap(w[0], w[1])) {
            Some(w) => candle_core::bail!(
                "attention: two sequences share {name} ({:?} and {:?}); keys that several sequences see are a prefix",
                w[0],
                w[1]
            ),
            None => Ok(()),
        }
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    !a.is_empty() && !b.is_empty() && a.start < b.end && b.start < a.end
}

/// Which keys of one range the queries of one sequence see. Both bounds grow with the query.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sight {
    queries: isize,
    keys: isize,
    /// How many further keys of the sequence stand behind those of the range.
    behind: isize,
    /// Keys that a query sees to the left of its position, at most.
    left: isize,
    /// And to the right.
    right: isize,
}

/// No limit, small enough to be added to lengths.
const FAR: isize = isize::MAX / 4;

impl Sight {
    /// Of the own keys of one of `plan`'s sequences, relative to their start and that of its queries.
    pub(super) fn own(plan: &AttentionPlan, span: &SequenceSpan) -> Self {
        Self::of(plan, span.queries.len(), span.keys.len(), 0)
    }

    /// Of the prefix of one of `plan`'s sequences.
    pub(super) fn prefix(plan: &AttentionPlan, span: &SequenceSpan) -> Self {
        Self::of(plan, span.queries.len(), span.prefix.len(), span.keys.len())
    }

    fn of(plan: &AttentionPlan, queries: usize, keys: usize, behind: usize) -> Self {
        let window = plan.window.map(|w| isize::try_from(w).unwrap_or(FAR).min(FAR));
        let (left, right) = match (plan.causal, window) {
            (true, Some(w)) => (w - 1, 0),
            (true, None) => (FAR, 0),
            (false, Some(w)) => (w, w),
            (false, None) => (FAR, FAR),
        };
        Self { queries: queries as isize, keys: keys as isize, behind: behind as isize, left, right }
    }

    /// Where query `i` stands, counted in keys from the first of the range.
    #[inline]
    pub(super) fn position(&self, i: usize) -> isize {
        i as isize + self.keys + self.behind - self.queries
    }

    /// The keys that query `i` sees; empty ranges have `start == end`.
    #[inline]
    pub(super) fn keys_of(&self, i: usize) -> Range<usize> {
        let p = self.position(i);
        let start = (p - self.left).clamp(0, self.keys);
        let end = (p + self.right + 1).clamp(start, self.keys);
        start as usize..end as usize
    }

    /// The queries that see key `j`.
    #[inline]
    pub(super) fn queries_of(&self, j: usize) -> Range<usize> {
        let i = j as isize - self.keys - self.behind + self.queries;
        let start = (i - self.right).clamp(0, self.queries);
        let end = (i + self.left + 1).clamp(start, self.queries);
        start as usize..end as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sight_is_the_mask_of_transformers() {
        for nq in [1usize, 2, 5, 9] {
            for nk in [1usize, 4, 5, 12] {
                for (causal, window) in [
                    (true, None),
                    (true, Some(1)),
                    (true, Some(3)),
                    (false, None),
                    (false, Some(2)),
                    (true, Some(usize::MAX)),
                ] {
                    let mut plan = AttentionPlan::causal(1, 1, 8, &[]);
                    (plan.causal, plan.window) = (causal, window);
                    // A prefix is seen as the same keys at the beginning of a longer sequence would be.
                    for (prefix, own) in [(0, nk), (nk / 2, nk - nk / 2), (nk, 0)] {
                        let span = SequenceSpan { queries: 0..nq, keys: prefix..nk, prefix: 0..prefix };
                        let (before, after) = (Sight::prefix(&plan, &span), Sight::own(&plan, &span));
                        let whole = Sight::own(&plan, &SequenceSpan { queries: 0..nq, keys: 0..nk, prefix: 0..0 });
                        let clipped = |r: Range<usize>, from: usize, n: usize| {
                            let clip = |x: usize| x.clamp(from, from + n) - from;
                            clip(r.start)..clip(r.end)
                        };
                        let same = |a: Range<usize>, b: Range<usize>| a == b || (a.is_empty() && b.is_empty());
                        for i in 0..nq {
                            assert!(same(before.keys_of(i), clipped(whole.keys_of(i), 0, prefix)), "{span:?} {i}");
                            assert!(same(after.keys_of(i), clipped(whole.keys_of(i), prefix, own)), "{span:?} {i}");
                        }
                        assert!((0..prefix).all(|j| same(before.queries_of(j), whole.queries_of(j))));
                    }
                    let span = SequenceSpan { queries: 0..nq, keys: 0..nk, prefix: 0..0 };
                    let sight = Sight::own(&plan, &span);
                    for i in 0..nq {
                        for j in 0..nk {
                            let (p, j_) = (i as i128 + nk as i128 - nq as i128, j as i128);
                            let w = window.map(|w| w as i128);
                            let want = if causal {
                                j_ <= p && w.is_none_or(|w| j_ > p - w)
                            } else {
                                w.is_none_or(|w| (j_ - p).abs() <= w)
                            };
                            assert_eq!(sight.keys_of(i).contains(&j), want, "query {i} of {nq}, key {j} of {nk}");
                            assert_eq!(sight.queries_of(j).contains(&i), want, "key {j} of {nk}, query {i} of {nq}");
                        }
                    }
                }
            }
        }
    }
}
