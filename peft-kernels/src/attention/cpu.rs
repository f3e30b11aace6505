//! What the fused CPU kernels share: the problem, packed keys and scratch memory.
//!
//! Queries are taken in tiles of [`TILE`] rows and keys in blocks of [`TILE`] rows, so that a tile's logits, keys and
//! values stay in the near caches. Blocks count from the first key of the whole batch, not of a sequence: keys are packed
//! once, and a sequence that starts inside a block uses part of its columns.

use std::cell::Cell;
use std::ops::Range;

use candle_core::Result;
use rayon::prelude::*;

use super::bias::Table;
use super::plan::{AttentionPlan, Sight};
use super::simd::padded;

/// Queries in a tile and keys in a block.
pub(super) const TILE: usize = 64;
/// Query rows whose logits are made, softmaxed and used before the next rows'.
pub(super) const STRIP: usize = 8;
/// Multiply-adds below which starting other threads costs more than it saves.
const PARALLEL_WORK: usize = 1 << 18;

/// The arguments of one call and what follows from the plan.
#[derive(Debug, Clone, Copy)]
pub(super) struct Problem<'a> {
    pub(super) plan: &'a AttentionPlan,
    pub(super) q: &'a [f32],
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    /// What is added to logits for the distance of query and key.
    pub(super) bias: Option<&'a Table>,
    /// Width of a row of q.
    pub(super) q_width: usize,
    /// Width of a row of k and v.
    pub(super) kv_width: usize,
    pub(super) q_tokens: usize,
    pub(super) k_tokens: usize,
    pub(super) group: usize,
    pub(super) head_dim: usize,
    /// `head_dim` in whole vectors.
    pub(super) dim: usize,
    /// What q is multiplied with: logits come out in base 2, or ready for the `tanh` of the soft cap.
    pub(super) q_scale: f32,
    /// What the `tanh` is multiplied with to give a logit in base 2.
    pub(super) cap: Option<f32>,
    pub(super) arch: pulp::Arch,
}

impl<'a> Problem<'a> {
    /// The plan has been validated against these slices.
    pub(super) fn new(plan: &'a AttentionPlan, q: &'a [f32], k: &'a [f32], v: &'a [f32]) -> Result<Self> {
        let (q_width, kv_width) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
        let (q_tokens, k_tokens) = (q.len() / q_width.max(1), k.len() / kv_width.max(1));
        if k.len() != v.len() || q.len() != q_tokens * q_width || k.len() != k_tokens * kv_width {
            candle_core::bail!(
                "attention: {} q, {} k and {} v elements do not fit the plan",
                q.len(),
                k.len(),
                v.len()
            );
        }
        let log2_e = std::f32::consts::LOG2_E;
        Ok(Self {
            plan,
            q,
            k,
            v,
            bias: None,
            q_width,
            kv_width,
            q_tokens,
            k_tokens,
            group: plan.group(),
            head_dim: plan.head_dim,
            dim: padded(plan.head_dim),
            q_scale: plan.softcap.map_or(plan.scale * log2_e, |c| plan.scale / c),
            cap: plan.softcap.map(|c| c * log2_e),
            arch: pulp::Arch::new(),
        })
    }

    /// Copies rows of one head of a matrix like q, times `scale`, into rows of `dim` elements whose padding stays.
    pub(super) fn load_rows(&self, to: &mut [f32], from: &[f32], rows: Range<usize>, head: usize, scale: f32) {
        let d = self.head_dim;
        for (to, row) in to.chunks_exact_mut(self.dim).zip(rows) {
            let at = row * self.q_width + head * d;
            for (y, x) in to[..d].iter_mut().zip(&from[at..at + d]) {
                *y = x * scale;
            }
        }
    }

    /// The two ranges of keys that a sequence's queries see: the prefix, then its own.
    pub(super) fn parts(&self, sequence: usize) -> [(Range<usize>, Sight); 2] {
        let span = &self.plan.sequences[sequence];
        [(span.prefix.clone(), Sight::prefix(self.plan, span)), (span.keys.clone(), Sight::own(self.plan, span))]
    }

    /// Multiply-adds of one product over all visible tiles, roughly.
    pub(super) fn work(&self) -> usize {
        let keys = |s: &super::SequenceSpan| match self.plan.window {
            Some(w) => s.prefix.len() + s.keys.len().min(w.saturating_mul(2)),
            None => s.prefix.len() + s.keys.len(),
        };
        let pairs = self.plan.sequences.iter().map(|s| s.queries.len().saturating_mul(keys(s)));
        pairs.fold(0usize, usize::saturating_add).saturating_mul(self.q_width)
    }
}

/// Calls `f` on all items, over the thread pool if there is enough work, and keeps the order of the results.
pub(super) fn for_items<T: Sync, R: Send>(items: &[T], work: usize, f: impl Fn(&T) -> R + Sync + Send) -> Vec<R> {
    if work < PARALLEL_WORK || crate::cpu::threads() == 1 {
        return items.iter().map(f).collect();
    }
    items.par_iter().with_max_len(1).map(f).collect()
}

/// Blocks of one head's keys or values, padded with zeros: `[TILE, dim]`, or transposed `[head_dim, TILE]`.
#[derive(Debug)]
pub(super) struct Packed {
    data: Vec<f32>,
    blocks: usize,
    block: usize,
}

impl Packed {
    /// Packs the blocks for which `wanted` is true.
    pub(super) fn new(p: &Problem<'_>, from: &[f32], transposed: bool, wanted: &[bool]) -> Self {
        let (d, dim, blocks) = (p.head_dim, p.dim, wanted.len());
        let block = TILE * if transposed { d } else { dim };
        let mut data = vec![0f32; p.plan.kv_heads * blocks * block];
        let pack = |(i, to): (usize, &mut [f32])| {
            let (head, first) = (i / blocks, i % blocks * TILE);
            if !wanted[i % blocks] {
                return;
            }
            let row = |r: usize| &from[(first + r) * p.kv_width + head * d..][..d];
            let rows = TILE.min(p.k_tokens - first);
            if transposed {
                for r in 0..rows {
                    for (to, x) in to.chunks_exact_mut(TILE).zip(row(r)) {
                        to[r] = *x;
                    }
                }
            } else {
                for (r, to) in to.chunks_exact_mut(dim).enumerate().take(rows) {
                    to[..d].copy_from_slice(row(r));
                }
            }
        };
        if data.len() < crate::cpu::PARALLEL_ELEMENTS || crate::cpu::threads() == 1 {
            data.chunks_exact_mut(block).enumerate().for_each(pack);
        } else {
            data.par_chunks_exact_mut(block).enumerate().for_each(pack);
        }
        Self { data, blocks, block }
    }

    #[inline]
    pub(super) fn block(&self, head: usize, block: usize) -> &[f32] {
        &self.data[(head * self.blocks + block) * self.block..][..self.block]
    }
}

/// Which blocks hold keys of the sequences for which `keep` is true.
pub(super) fn wanted_blocks(p: &Problem<'_>, keep: impl Fn(usize) -> bool) -> Vec<bool> {
    let mut wanted = vec![false; p.k_tokens.div_ceil(TILE)];
    for (_, s) in p.plan.sequences.iter().enumerate().filter(|(i, s)| !s.queries.is_empty() && keep(*i)) {
        for range in [&s.keys, &s.prefix] {
            wanted[blocks(range)].fill(true);
        }
    }
    wanted
}

/// The blocks that a range of keys touches.
pub(super) fn blocks(keys: &Range<usize>) -> Range<usize> {
    if keys.is_empty() { 0..0 } else { keys.start / TILE..keys.end.div_ceil(TILE) }
}

/// `range` of a sequence's own keys, in keys of the batch, limited to one block, counted from that block's start.
#[inline]
pub(super) fn in_block(range: Range<usize>, offset: usize, block: usize) -> Range<usize> {
    let base = block * TILE;
    let start = (range.start + offset).clamp(base, base + TILE) - base;
    let end = (range.end + offset).clamp(base, base + TILE) - base;
    start..end.max(start)
}

/// A thread's buffers, kept from one work item to the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) q: Vec<f32>,
    pub(super) out: Vec<f32>,
    pub(super) logits: Vec<f32>,
    pub(super) max: Vec<f32>,
    pub(super) sum: Vec<f32>,
    pub(super) grad: Vec<f32>,
    pub(super) d_logits: Vec<f32>,
    pub(super) d_keys: Vec<f32>,
    pub(super) d_values: Vec<f32>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch {
        q: Vec::new(),
        out: Vec::new(),
        logits: Vec::new(),
        max: Vec::new(),
        sum: Vec::new(),
        grad: Vec::new(),
        d_logits: Vec::new(),
        d_keys: Vec::new(),
        d_values: Vec::new(),
    }) };
}

impl Scratch {
    /// Runs `f` with this thread's buffers.
    pub(super) fn with<R>(f: impl FnOnce(&mut Self) -> R) -> R {
        let mut scratch = SCRATCH.take();
        let result = f(&mut scratch);
        SCRATCH.set(scratch);
        result
    }
}

/// The first `n` elements of `buffer`, which grows to hold them; what they contain is left from before.
pub(super) fn room(buffer: &mut Vec<f32>, n: usize) -> &mut [f32] {
    if buffer.len() < n {
        buffer.resize(n, 0.0);
    }
    &mut buffer[..n]
}

/// The first `n` elements of `buffer`, all `value`.
pub(super) fn filled(buffer: &mut Vec<f32>, n: usize, value: f32) -> &mut [f32] {
    let part = room(buffer, n);
    part.fill(value);
    part
}
