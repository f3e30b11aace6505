//! The tiled forward kernel: online softmax over key blocks, after FlashAttention-2 (Dao 2023, arXiv 2307.08691).

use pulp::{Simd, WithSimd};

use super::cpu::{Packed, Problem, STRIP, Scratch, TILE, blocks, filled, for_items, in_block, room, wanted_blocks};
use super::narrow;
use super::simd::{Gemm, PAD, exp2, tanh, vectors, vectors_mut};
use crate::shared::Shared;

/// The result `[q_tokens, heads·head_dim]` and the base-2 log-sum-exp of the logits, `[heads, q_tokens]`.
///
/// The log-sum-exp is `+∞` for a query that sees no key, which makes all its probabilities 0 in the backward.
pub(super) fn forward(p: &Problem<'_>) -> (Vec<f32>, Vec<f32>) {
    let mut out = vec![0f32; p.q_tokens * p.q_width];
    let mut lse = vec![f32::INFINITY; p.q_tokens * p.plan.heads];
    let (to, to_lse) = (Shared::new(&mut out), Shared::new(&mut lse));
    narrow::forward(p, &to, &to_lse);
    let mut items = Vec::new();
    for (sequence, span) in p.plan.sequences.iter().enumerate().filter(|(_, s)| !narrow::takes(s)) {
        for head in 0..p.plan.heads {
            // The longest rows of a causal mask first, so that the pool ends evenly.
            items.extend((0..span.queries.len()).step_by(TILE).rev().map(|first| Item { sequence, head, first }));
        }
    }
    if !items.is_empty() {
        let wanted = wanted_blocks(p, |i| !narrow::takes(&p.plan.sequences[i]));
        let keys = Packed::new(p, p.k, true, &wanted);
        let values = Packed::new(p, p.v, false, &wanted);
        for_items(&items, p.work(), |item| {
            Scratch::with(|s| {
                p.arch.dispatch(Tile { p, keys: &keys, values: &values, item: *item, s, to: &to, to_lse: &to_lse })
            })
        });
    }
    (out, lse)
}

#[derive(Debug, Clone, Copy)]
struct Item {
    sequence: usize,
    head: usize,
    first: usize,
}

struct Tile<'a> {
    p: &'a Problem<'a>,
    keys: &'a Packed,
    values: &'a Packed,
    item: Item,
    s: &'a mut Scratch,
    to: &'a Shared<'a>,
    to_lse: &'a Shared<'a>,
}

impl WithSimd for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { p, item: Item { sequence, head, first }, s, .. } = self;
        let span = &p.plan.sequences[sequence];
        let n = TILE.min(span.queries.len() - first);
        let token = span.queries.start + first;
        let (d, dim, kv) = (p.head_dim, p.dim, head / p.group);
        let q = filled(&mut s.q, n * dim, 0.0);
        p.load_rows(q, p.q, token..token + n, head, p.q_scale);
        let out = filled(&mut s.out, n * dim, 0.0);
        let max = filled(&mut s.max, n, f32::NEG_INFINITY);
        let sum = filled(&mut s.sum, n, 0.0);
        let logits = room(&mut s.logits, STRIP * TILE);

        for (range, sight) in p.parts(sequence) {
            let offset = range.start;
            let seen = sight.keys_of(first).start + offset..sight.keys_of(first + n - 1).end + offset;
            for block in blocks(&seen) {
                let (keys, values) = (self.keys.block(kv, block), self.values.block(kv, block));
                for row in (0..n).step_by(STRIP) {
                    let rows = STRIP.min(n - row);
                    let seen_by = |r: usize| in_block(sight.keys_of(first + r), offset, block);
                    let (top, bottom) = (seen_by(row), seen_by(row + rows - 1));
                    let seen = top.start..bottom.end;
                    if seen.is_empty() {
                        continue;
                    }
                    // Whole vectors around what the strip sees; the padding of the packed block makes that safe.
                    let columns = seen.start / PAD * PAD..seen.end.next_multiple_of(PAD);
                    simd.vectorize(Gemm {
                        m: rows,
                        k: d,
                        n: columns.len(),
                        a: &q[row * dim..],
                        a_row: dim,
                        a_col: 1,
                        b: &keys[columns.start..],
                        b_row: TILE,
                        c: &mut logits[columns.start..],
                        c_row: TILE,
                        add: false,
                    });
                    for r in 0..rows {
                        let line = &mut logits[r * TILE + columns.start..r * TILE + columns.end];
                        let seen = seen_by(row + r);
                        if seen.is_empty() {
                            line.fill(0.0);
                            continue;
                        }
                        let at = row + r;
                        let keys = block * TILE + seen.start - offset..block * TILE + seen.end - offset;
                        let bias = p.bias.map(|b| b.of(head, sight.position(first + at), &keys));
                        let seen = seen.start - columns.start..seen.end - columns.start;
                        let factor = online_softmax(simd, line, seen, p.cap, bias, &mut max[at], &mut sum[at]);
                        if factor != 1.0 {
                            scale(simd, &mut out[at * dim..(at + 1) * dim], factor);
                        }
                    }
                    simd.vectorize(Gemm {
                        m: rows,
                        k: seen.len(),
                        n: dim,
                        a: &logits[seen.start..],
                        a_row: TILE,
                        a_col: 1,
                        b: &values[seen.start * dim..],
                        b_row: dim,
                        c: &mut out[row * dim..],
                        c_row: dim,
                        add: true,
                    });
                }
            }
        }
        for (r, (line, (max, sum))) in out.chunks_exact(dim).zip(max.iter().zip(sum.iter())).enumerate() {
            #[allow(unsafe_code)]
            // SAFETY: sequences do not share queries, and items of a sequence differ in head or rows.
            let (to, to_lse) = unsafe {
                let token = token + r;
                (self.to.slice(token * p.q_width + head * d, d), self.to_lse.slice(head * p.q_tokens + token, 1))
            };
            finish(line, *max, *sum, to, &mut to_lse[0]);
        }
    }
}

/// Writes a row's result and log-sum-exp; a row that saw no key keeps the zeros and `+∞` that are there.
pub(super) fn finish(line: &[f32], max: f32, sum: f32, to: &mut [f32], lse: &mut f32) {
    if sum == 0.0 {
        return;
    }
    let factor = 1.0 / sum;
    for (y, x) in to.iter_mut().zip(line) {
        *y = x * factor;
    }
    *lse = max + sum.log2();
}

/// Turns one row of raw products into `2^(logit − max)`, 0 outside `seen`, and brings the row's running maximum and sum
/// up to date; `bias` is what the logits of `seen` get besides. Returns what the row's earlier results have to be
/// multiplied with.
#[inline(always)]
pub(super) fn online_softmax<S: Simd>(
    simd: S,
    line: &mut [f32],
    seen: std::ops::Range<usize>,
    cap: Option<f32>,
    bias: Option<&[f32]>,
    max: &mut f32,
    sum: &mut f32,
) -> f32 {
    if let Some(cap) = cap {
        let cap = simd.splat_f32s(cap);
        for x in vectors_mut::<S>(line) {
            *x = simd.mul_f32s(cap, tanh(simd, *x));
        }
    }
    if let Some(bias) = bias {
        line[seen.clone()].iter_mut().zip(bias).for_each(|(x, b)| *x += b);
    }
    line[..seen.start].fill(f32::NEG_INFINITY);
    line[seen.end..].fill(f32::NEG_INFINITY);
    let mut top = simd.splat_f32s(*max);
    for x in vectors::<S>(line) {
        top = simd.max_f32s(*x, top);
    }
    let new = simd.reduce_max_f32s(top);
    // Only where every visible logit is −∞ or NaN: probabilities become 0 or NaN, not NaN from ∞ − ∞.
    let base = simd.splat_f32s(if new == f32::NEG_INFINITY { 0.0 } else { new });
    let mut total = simd.splat_f32s(0.0);
    for x in vectors_mut::<S>(line) {
        *x = exp2(simd, simd.sub_f32s(*x, base));
        total = simd.add_f32s(total, *x);
    }
    let factor = if new == *max { 1.0 } else { (*max - new).exp2() };
    *sum = *sum * factor + simd.reduce_sum_f32s(total);
    *max = new;
    factor
}

#[inline(always)]
pub(super) fn scale<S: Simd>(simd: S, line: &mut [f32], factor: f32) {
    let factor = simd.splat_f32s(factor);
    for x in vectors_mut::<S>(line) {
        *x = simd.mul_f32s(*x, factor);
    }
}
