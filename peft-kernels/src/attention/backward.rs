//! The tiled backward kernel: probabilities are made again from the saved log-sum-exp (FlashAttention-2, Dao 2023).
//!
//! With `P` the probabilities, `dP = dO·Vᵀ` and `δ = rowsum(dO ∘ O)`: `dS = P ∘ (dP − δ)`, `dV = Pᵀ·dO`, `dK = dSᵀ·Q`,
//! `dQ = dS·K`; the gradient of a relative bias is the sum of `dS` over all pairs of one distance.
//!
//! A work item is a run of key blocks of one sequence and key head. It owns the gradients of those keys. Of the gradients
//! of the queries, which all runs of a sequence contribute to, the first run writes the result and the others hand over
//! a part, added in order afterwards: what is summed in what order depends on the plan only, never on the threads.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::bias::Table;
use super::cpu::{Packed, Problem, STRIP, Scratch, TILE, blocks, filled, for_items, in_block, room, wanted_blocks};
use super::plan::Sight;
use super::simd::{Gemm, PAD, dot, exp2, tanh, vectors_mut};
use crate::shared::Shared;

/// Work items that there should be about, so that a pool of a few threads ends evenly.
const ITEMS: usize = 16;
/// Runs a sequence is cut into at most: each but the first takes memory like the queries it sees.
const RUNS: usize = 4;

/// The result, its gradient, and what the forward saved.
#[derive(Debug, Clone, Copy)]
pub(super) struct Upstream<'a> {
    pub(super) out: &'a [f32],
    pub(super) grad: &'a [f32],
    pub(super) lse: &'a [f32],
}

/// Gradients of q, k, v and the bias as far as `needs` asks for them.
pub(super) fn backward(p: &Problem<'_>, up: Upstream<'_>, needs: [bool; 4]) -> [Option<Vec<f32>>; 4] {
    let [needs_q, needs_k, needs_v, needs_bias] = needs;
    let room_for = |needed: bool, n: usize| vec![0f32; if needed { n } else { 0 }];
    let mut dq = room_for(needs_q, p.q.len());
    let mut dk = room_for(needs_k, p.k.len());
    let mut dv = room_for(needs_v, p.v.len());
    let distances = p.bias.filter(|_| needs_bias).map_or(0, Table::distances);
    let mut d_bias = vec![0f32; distances * p.plan.heads];
    let items = plan_items(p);
    if !items.is_empty() && needs.contains(&true) {
        let wanted = wanted_blocks(p, |_| true);
        let packs = Packs {
            keys_t: Packed::new(p, p.k, true, &wanted),
            keys: needs_q.then(|| Packed::new(p, p.k, false, &wanted)),
            values_t: (needs_q || needs_k || needs_bias).then(|| Packed::new(p, p.v, true, &wanted)),
        };
        let parts = {
            let to = Gradients { q: Shared::new(&mut dq), k: Shared::new(&mut dk), v: Shared::new(&mut dv) };
            for_items(&items, p.work().saturating_mul(2), |item| {
                Scratch::with(|s| p.arch.dispatch(Run { p, up, packs: &packs, item, needs, s, to: &to }))
            })
        };
        add_prefix_parts(p, &items, &parts, &mut dk, &mut dv);
        if needs_q {
            add_query_parts(p, &items, &parts, &Shared::new(&mut dq));
        }
        add_bias_parts(p, &items, &parts, &mut d_bias);
    }
    [needs_q.then_some(dq), needs_k.then_some(dk), needs_v.then_some(dv), needs_bias.then_some(d_bias)]
}

struct Packs {
    keys_t: Packed,
    keys: Option<Packed>,
    values_t: Option<Packed>,
}

struct Gradients<'a> {
    q: Shared<'a>,
    k: Shared<'a>,
    v: Shared<'a>,
}

#[derive(Debug, Clone)]
struct Item {
    sequence: usize,
    kv: usize,
    blocks: Range<usize>,
    /// The keys of `blocks` that are the sequence's.
    keys: Range<usize>,
    /// Where the part (prefix or own keys) starts, and who sees it.
    offset: usize,
    sight: Sight,
    prefix: bool,
    /// The queries that see any of `keys`.
    queries: Range<usize>,
    /// The first run of its sequence and head, which writes the gradient of the queries itself.
    first: bool,
}

/// Gradients that an item could not write: rows of the queries that it saw `[group, queries, head_dim]`, of its prefix
/// keys and values `[keys, head_dim]`, and of the bias `[group, distances]`.
#[derive(Debug, Default)]
struct Part {
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    d_bias: Vec<f32>,
}

/// Cuts the keys into work items of about equal work. A function of the plan alone.
fn plan_items(p: &Problem<'_>) -> Vec<Item> {
    let sequences = p.plan.sequences.iter().filter(|s| !s.queries.is_empty()).count();
    let pairs = (sequences * p.plan.kv_heads).max(1);
    let runs = ((ITEMS + pairs / 2) / pairs).clamp(1, RUNS);
    let mut items: Vec<Item> = Vec::new();
    for (sequence, _) in p.plan.sequences.iter().enumerate().filter(|(_, s)| !s.queries.is_empty()) {
        let mut of_sequence: Vec<Item> = Vec::new();
        for (part, (range, sight)) in p.parts(sequence).into_iter().enumerate() {
            let offset = range.start;
            let item = |blocks: Range<usize>| {
                let keys = range.start.max(blocks.start * TILE)..range.end.min(blocks.end * TILE);
                let queries = sight.queries_of(keys.start - offset).start..sight.queries_of(keys.end - 1 - offset).end;
                Item { sequence, kv: 0, blocks, keys, offset, sight, prefix: part == 0, queries, first: false }
            };
            let all = blocks(&range);
            let cost = |b: usize| item(b..b + 1).queries.len().div_ceil(TILE);
            let total: usize = all.clone().map(cost).sum();
            let (mut start, mut done) = (all.start, 0);
            for b in all.clone() {
                done += cost(b);
                let cut = of_sequence.iter().filter(|i| i.prefix == (part == 0)).count() + 1;
                if b + 1 == all.end || (part == 1 && cut < runs && done * runs >= total * cut) {
                    of_sequence.push(item(start..b + 1));
                    start = b + 1;
                }
            }
        }
        of_sequence.retain(|i| !i.queries.is_empty());
        for kv in 0..p.plan.kv_heads {
            items.extend(of_sequence.iter().enumerate().map(|(i, item)| Item { kv, first: i == 0, ..item.clone() }));
        }
    }
    items
}

fn add_prefix_parts(p: &Problem<'_>, items: &[Item], parts: &[Part], dk: &mut [f32], dv: &mut [f32]) {
    let d = p.head_dim;
    for (item, part) in items.iter().zip(parts) {
        for (to, from) in [(&mut *dk, &part.dk), (&mut *dv, &part.dv)] {
            for (key, from) in item.keys.clone().zip(from.chunks_exact(d)) {
                let to = &mut to[key * p.kv_width + item.kv * d..][..d];
                to.iter_mut().zip(from).for_each(|(y, x)| *y += x);
            }
        }
    }
}

fn add_query_parts(p: &Problem<'_>, items: &[Item], parts: &[Part], dq: &Shared<'_>) {
    let d = p.head_dim;
    let mut pairs: Vec<&[Item]> = Vec::new();
    pairs.extend(items.chunk_by(|a, b| (a.sequence, a.kv) == (b.sequence, b.kv)));
    let mut starts = Vec::with_capacity(pairs.len());
    let mut at = 0;
    for items in &pairs {
        starts.push(at);
        at += items.len();
    }
    pairs.par_iter().zip(&starts).for_each(|(items, start)| {
        for (item, part) in items.iter().zip(&parts[*start..]).filter(|(_, part)| !part.dq.is_empty()) {
            let n = item.queries.len();
            for (row, from) in part.dq.chunks_exact(d).enumerate() {
                let (head, query) = (item.kv * p.group + row / n, item.queries.start + row % n);
                let token = p.plan.sequences[item.sequence].queries.start + query;
                #[allow(unsafe_code)]
                // SAFETY: pairs differ in sequence or head, and one thread adds the parts of a pair.
                let to = unsafe { dq.slice(token * p.q_width + head * d, d) };
                to.iter_mut().zip(from).for_each(|(y, x)| *y += x);
            }
        }
    });
}

/// Adds up `[distances, heads]`; all sequences contribute to it.
fn add_bias_parts(p: &Problem<'_>, items: &[Item], parts: &[Part], d_bias: &mut [f32]) {
    let Some(distances) = p.bias.map(Table::distances) else { return };
    for (item, part) in items.iter().zip(parts) {
        for (g, from) in part.d_bias.chunks_exact(distances.max(1)).enumerate() {
            let head = item.kv * p.group + g;
            let to = d_bias.iter_mut().skip(head).step_by(p.plan.heads);
            to.zip(from).for_each(|(y, x)| *y += x);
        }
    }
}

struct Run<'a> {
    p: &'a Problem<'a>,
    up: Upstream<'a>,
    packs: &'a Packs,
    item: &'a Item,
    needs: [bool; 4],
    s: &'a mut Scratch,
    to: &'a Gradients<'a>,
}

impl WithSimd for Run<'_> {
    type Output = Part;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Part {
        let Self { p, up, packs, item, needs: [needs_q, needs_k, needs_v, needs_bias], s, to } = self;
        let (d, dim) = (p.head_dim, p.dim);
        let seen_queries = item.queries.len();
        let from = p.plan.sequences[item.sequence].queries.start;
        let mut part = Part::default();
        if needs_q && !item.first {
            part.dq = vec![0f32; p.group * seen_queries * d];
        }
        let bias = p.bias.filter(|_| needs_bias);
        part.d_bias = vec![0f32; p.group * bias.map_or(0, Table::distances)];
        let q = filled(&mut s.q, TILE * dim, 0.0);
        let grad = filled(&mut s.grad, TILE * dim, 0.0);
        let probabilities = room(&mut s.logits, TILE * TILE);
        let d_logits = room(&mut s.d_logits, TILE * TILE);
        let dq = room(&mut s.out, TILE * dim);
        let delta = room(&mut s.sum, TILE);
        let keys = item.blocks.len() * TILE * dim;
        let dk = filled(&mut s.d_keys, if needs_k { keys } else { 0 }, 0.0);
        let dv = filled(&mut s.d_values, if needs_v { keys } else { 0 }, 0.0);

        for g in 0..p.group {
            let head = item.kv * p.group + g;
            for first in item.queries.clone().step_by(TILE) {
                let n = TILE.min(item.queries.end - first);
                let token = from + first;
                p.load_rows(&mut q[..n * dim], p.q, token..token + n, head, p.q_scale);
                p.load_rows(&mut grad[..n * dim], up.grad, token..token + n, head, 1.0);
                let lse = &up.lse[head * p.q_tokens + token..][..n];
                for (r, (delta, grad)) in delta.iter_mut().zip(grad[..n * dim].chunks_exact(dim)).enumerate() {
                    *delta = dot(simd, grad, &up.out[(token + r) * p.q_width + head * d..][..d]);
                }
                dq[..n * dim].fill(0.0);
                for block in item.blocks.clone() {
                    let tile = Tile { simd, p, item, head, block, first, n };
                    let seen = tile.keys(0).start..tile.keys(n - 1).end;
                    if seen.is_empty() {
                        continue;
                    }
                    let whole = tile.keys(n - 1).start == 0 && tile.keys(0).end == TILE;
                    if !whole {
                        probabilities[..n * TILE].fill(0.0);
                        d_logits[..n * TILE].fill(0.0);
                    }
                    tile.probabilities(packs, q, grad, lse, delta, probabilities, d_logits);
                    let at = (block - item.blocks.start) * TILE * dim;
                    if needs_v {
                        tile.add_to_keys(seen.clone(), whole, probabilities, grad, &mut dv[at..]);
                    }
                    if needs_k {
                        tile.add_to_keys(seen.clone(), whole, d_logits, q, &mut dk[at..]);
                    }
                    if let Some(bias) = bias {
                        tile.add_to_bias(d_logits, bias, &mut part.d_bias[g * bias.distances()..]);
                    }
                    if let Some(keys) = &packs.keys {
                        tile.add_to_queries(d_logits, keys.block(item.kv, block), dq);
                    }
                }
                if needs_q {
                    for (r, line) in dq[..n * dim].chunks_exact(dim).enumerate() {
                        let to = if item.first {
                            #[allow(unsafe_code)]
                            // SAFETY: only the first run of a sequence and head writes here, one tile at a time.
                            unsafe {
                                to.q.slice((token + r) * p.q_width + head * d, d)
                            }
                        } else {
                            let row = g * seen_queries + first - item.queries.start + r;
                            &mut part.dq[row * d..(row + 1) * d]
                        };
                        to.iter_mut().zip(line).for_each(|(y, x)| *y = x * p.plan.scale);
                    }
                }
            }
        }
        // q was loaded times q_scale, and dK wants it times scale.
        let undo = p.plan.softcap.unwrap_or(std::f32::consts::LN_2);
        let skip = item.keys.start - item.blocks.start * TILE;
        for (needed, from, factor, to, own) in
            [(needs_k, &*dk, undo, &to.k, &mut part.dk), (needs_v, &*dv, 1.0, &to.v, &mut part.dv)]
        {
            if !needed {
                continue;
            }
            if item.prefix {
                own.resize(item.keys.len() * d, 0.0);
            }
            for (i, line) in from.chunks_exact(dim).skip(skip).take(item.keys.len()).enumerate() {
                let to = if item.prefix {
                    &mut own[i * d..(i + 1) * d]
                } else {
                    #[allow(unsafe_code)]
                    // SAFETY: sequences do not share own keys, and runs of a sequence differ in keys or head.
                    unsafe {
                        to.slice((item.keys.start + i) * p.kv_width + item.kv * d, d)
                    }
                };
                to.iter_mut().zip(line).for_each(|(y, x)| *y = x * factor);
            }
        }
        part
    }
}

/// `n` queries from `first` against one key block.
#[derive(Clone, Copy)]
struct Tile<'a, S> {
    simd: S,
    p: &'a Problem<'a>,
    item: &'a Item,
    head: usize,
    block: usize,
    first: usize,
    n: usize,
}

impl<S: Simd> Tile<'_, S> {
    /// The keys of the block that query `r` of the tile sees.
    #[inline(always)]
    fn keys(&self, r: usize) -> Range<usize> {
        in_block(self.item.sight.keys_of(self.first + r), self.item.offset, self.block)
    }

    /// The position of query `r` of the tile, and which of the part's keys those `seen` of the block are.
    #[inline(always)]
    fn distances(&self, r: usize, seen: &Range<usize>) -> (isize, Range<usize>) {
        let key = |j: usize| self.block * TILE + j - self.item.offset;
        (self.item.sight.position(self.first + r), key(seen.start)..key(seen.end))
    }

    /// The queries of the tile that see keys `keys` of the block (which are all the sequence's).
    #[inline(always)]
    fn queries(&self, keys: Range<usize>) -> Range<usize> {
        let key = |j: usize| self.item.sight.queries_of(self.block * TILE + j - self.item.offset);
        let limit = |i: usize| i.clamp(self.first, self.first + self.n) - self.first;
        limit(key(keys.start).start)..limit(key(keys.end - 1).end)
    }

    /// The columns that rows `row..row + rows` see, and whole vectors around them.
    #[inline(always)]
    fn strip(&self, row: usize) -> (usize, Range<usize>, Range<usize>) {
        let rows = STRIP.min(self.n - row);
        let seen = self.keys(row).start..self.keys(row + rows - 1).end;
        let columns = seen.start / PAD * PAD..seen.end.next_multiple_of(PAD);
        (rows, seen, columns)
    }

    /// Fills what each strip sees with `P` and, if keys or queries need a gradient, `dS`.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn probabilities(
        &self,
        packs: &Packs,
        q: &[f32],
        grad: &[f32],
        lse: &[f32],
        delta: &[f32],
        probabilities: &mut [f32],
        d_logits: &mut [f32],
    ) {
        let Self { simd, p, item, block, n, .. } = *self;
        for row in (0..n).step_by(STRIP) {
            let (rows, seen, columns) = self.strip(row);
            if seen.is_empty() {
                continue;
            }
            let product = |a: &[f32], b: &[f32], c: &mut [f32]| {
                simd.vectorize(Gemm {
                    m: rows,
                    k: p.head_dim,
                    n: columns.len(),
                    a: &a[row * p.dim..],
                    a_row: p.dim,
                    a_col: 1,
                    b: &b[columns.start..],
                    b_row: TILE,
                    c: &mut c[row * TILE + columns.start..],
                    c_row: TILE,
                    add: false,
                });
            };
            product(q, packs.keys_t.block(item.kv, block), probabilities);
            if let Some(values) = &packs.values_t {
                product(grad, values.block(item.kv, block), d_logits);
            }
            for r in row..row + rows {
                let line = r * TILE + columns.start..r * TILE + columns.end;
                let (x, dx) = (&mut probabilities[line.clone()], &mut d_logits[line]);
                let seen = self.keys(r);
                if let Some(bias) = p.bias.filter(|_| !seen.is_empty()) {
                    let (position, keys) = self.distances(r, &seen);
                    let x = &mut x[seen.start - columns.start..];
                    x.iter_mut().zip(bias.of(self.head, position, &keys)).for_each(|(x, b)| *x += b);
                }
                let (lse, delta) = (simd.splat_f32s(lse[r]), simd.splat_f32s(delta[r]));
                let both = vectors_mut::<S>(x).iter_mut().zip(vectors_mut::<S>(dx));
                if let Some(cap) = p.cap {
                    let one = simd.splat_f32s(1.0);
                    for (x, dx) in both {
                        let t = tanh(simd, *x);
                        *x = exp2(simd, simd.sub_f32s(simd.mul_f32s(simd.splat_f32s(cap), t), lse));
                        let d_tanh = simd.sub_f32s(one, simd.mul_f32s(t, t));
                        *dx = simd.mul_f32s(simd.mul_f32s(*x, d_tanh), simd.sub_f32s(*dx, delta));
                    }
                } else {
                    for (x, dx) in both {
                        *x = exp2(simd, simd.sub_f32s(*x, lse));
                        *dx = simd.mul_f32s(*x, simd.sub_f32s(*dx, delta));
                    }
                }
                // A query that sees nothing here has an empty range, and everything is hidden.
                let (start, end) = if seen.is_empty() {
                    (columns.len(), columns.len())
                } else {
                    (seen.start - columns.start, seen.end - columns.start)
                };
                for x in [x, dx] {
                    x[..start].fill(0.0);
                    x[end..].fill(0.0);
                }
            }
        }
    }

    /// `to += weightsᵀ × rows`, for the keys `seen` of the block.
    #[inline(always)]
    fn add_to_keys(&self, seen: Range<usize>, whole: bool, weights: &[f32], rows: &[f32], to: &mut [f32]) {
        let dim = self.p.dim;
        let step = if whole { TILE } else { STRIP };
        for key in seen.clone().step_by(step) {
            let keys = key..(key + step).min(seen.end);
            let queries = self.queries(keys.clone());
            if queries.is_empty() {
                continue;
            }
            self.simd.vectorize(Gemm {
                m: keys.len(),
                k: queries.len(),
                n: dim,
                a: &weights[queries.start * TILE + key..],
                a_row: 1,
                a_col: TILE,
                b: &rows[queries.start * dim..],
                b_row: dim,
                c: &mut to[key * dim..],
                c_row: dim,
                add: true,
            });
        }
    }

    /// `to += dS`, by distance.
    #[inline(always)]
    fn add_to_bias(&self, d_logits: &[f32], bias: &Table, to: &mut [f32]) {
        for r in 0..self.n {
            let seen = self.keys(r);
            if seen.is_empty() {
                continue;
            }
            let (position, keys) = self.distances(r, &seen);
            let from = &d_logits[r * TILE + seen.start..r * TILE + seen.end];
            to[bias.rows(position, &keys)].iter_mut().zip(from).for_each(|(y, x)| *y += x);
        }
    }

    /// `to += dS × keys`.
    #[inline(always)]
    fn add_to_queries(&self, d_logits: &[f32], keys: &[f32], to: &mut [f32]) {
        let dim = self.p.dim;
        for row in (0..self.n).step_by(STRIP) {
            let (rows, seen, _) = self.strip(row);
            if seen.is_empty() {
                continue;
            }
            self.simd.vectorize(Gemm {
                m: rows,
                k: seen.len(),
                n: dim,
                a: &d_logits[row * TILE + seen.start..],
                a_row: TILE,
                a_col: 1,
                b: &keys[seen.start * dim..],
                b_row: dim,
                c: &mut to[row * dim..],
                c_row: dim,
                add: true,
            });
        }
    }
}
