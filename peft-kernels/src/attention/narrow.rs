//! The forward kernel for few queries over many keys (decoding): plain dot products over the keys where they lie.
//!
//! Packing a whole cache for one query would cost more than the query. All heads that share a key head go through the
//! keys together, and long caches are cut into chunks that threads take separately and whose softmaxes are joined after.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::SequenceSpan;
use super::cpu::{Problem, Scratch, filled, for_items, room};
use super::forward::{finish, online_softmax};
use super::plan::Sight;
use super::simd::{Gemm, PAD, dot};
use crate::shared::Shared;

/// Queries up to which a sequence is served here.
const MAX_QUERIES: usize = 4;
/// Keys a work item.
const CHUNK: usize = 512;

/// Whether the sequence is served by this kernel.
pub(super) fn takes(span: &SequenceSpan) -> bool {
    span.queries.len() <= MAX_QUERIES
}

#[derive(Debug, Clone)]
struct Item {
    sequence: usize,
    kv: usize,
    keys: Range<usize>,
    /// Where the part that `keys` belongs to starts, and who sees it.
    offset: usize,
    sight: Sight,
}

/// Maximum, sum and unnormalised result of each of an item's rows (queries within heads of the group).
type Part = Vec<f32>;

/// Serves the sequences of few queries.
pub(super) fn forward(p: &Problem<'_>, to: &Shared<'_>, to_lse: &Shared<'_>) {
    let mut items = Vec::new();
    let mut work = 0usize;
    for (sequence, span) in p.plan.sequences.iter().enumerate() {
        if !takes(span) || span.queries.is_empty() {
            continue;
        }
        for kv in 0..p.plan.kv_heads {
            for (range, sight) in p.parts(sequence) {
                let offset = range.start;
                let seen = sight.keys_of(0).start + offset..sight.keys_of(span.queries.len() - 1).end + offset;
                for start in seen.clone().step_by(CHUNK) {
                    let keys = start..seen.end.min(start + CHUNK);
                    work = work.saturating_add(keys.len() * p.group * span.queries.len() * p.head_dim);
                    items.push(Item { sequence, kv, keys, offset, sight });
                }
            }
        }
    }
    let parts = for_items(&items, work, |item| Scratch::with(|s| p.arch.dispatch(Chunk { p, item, s })));
    let mut rest = items.as_slice();
    let mut parts = parts.as_slice();
    while let Some(first) = rest.first() {
        let same = rest.iter().take_while(|i| (i.sequence, i.kv) == (first.sequence, first.kv)).count();
        join(p, first, &parts[..same], to, to_lse);
        (rest, parts) = (&rest[same..], &parts[same..]);
    }
}

/// Joins the chunks of one sequence and key head.
fn join(p: &Problem<'_>, item: &Item, parts: &[Part], to: &Shared<'_>, to_lse: &Shared<'_>) {
    let queries = &p.plan.sequences[item.sequence].queries;
    let (d, width) = (p.head_dim, p.head_dim + 2);
    let mut line = vec![0f32; d];
    for row in 0..p.group * queries.len() {
        let (head, token) = (item.kv * p.group + row / queries.len(), queries.start + row % queries.len());
        let rows = || parts.iter().map(|part| &part[row * width..(row + 1) * width]);
        let max = rows().filter(|r| r[1] != 0.0).fold(f32::NEG_INFINITY, |m, r| m.max(r[0]));
        let mut sum = 0f32;
        line.fill(0.0);
        for r in rows().filter(|r| r[1] != 0.0) {
            let factor = if r[0] == max { 1.0 } else { (r[0] - max).exp2() };
            sum += r[1] * factor;
            for (y, x) in line.iter_mut().zip(&r[2..]) {
                *y += x * factor;
            }
        }
        #[allow(unsafe_code)]
        // SAFETY: one thread runs this, and no other slice of these buffers is alive.
        let (to, to_lse) =
            unsafe { (to.slice(token * p.q_width + head * d, d), to_lse.slice(head * p.q_tokens + token, 1)) };
        finish(&line, max, sum, to, &mut to_lse[0]);
    }
}

struct Chunk<'a> {
    p: &'a Problem<'a>,
    item: &'a Item,
    s: &'a mut Scratch,
}

impl WithSimd for Chunk<'_> {
    type Output = Part;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Part {
        let Self { p, item, s } = self;
        let span = &p.plan.sequences[item.sequence];
        let (d, dim, n) = (p.head_dim, p.dim, span.queries.len());
        let rows = p.group * n;
        let keys = item.keys.len();
        let stride = keys.next_multiple_of(PAD);
        let q = filled(&mut s.q, rows * dim, 0.0);
        for g in 0..p.group {
            let at = &mut q[g * n * dim..(g + 1) * n * dim];
            p.load_rows(at, p.q, span.queries.clone(), item.kv * p.group + g, p.q_scale);
        }
        let logits = filled(&mut s.logits, rows * stride, 0.0);
        let kv_row = |of: &'_ [f32], j: usize| (item.keys.start + j) * p.kv_width + item.kv * d..of.len();
        for j in 0..keys {
            let key = &p.k[kv_row(p.k, j)][..d];
            for (q, to) in q.chunks_exact(dim).zip(logits.chunks_exact_mut(stride)) {
                to[j] = dot(simd, q, key);
            }
        }
        let width = d + 2;
        let mut part = vec![0f32; rows * width];
        for (row, line) in logits.chunks_exact_mut(stride).enumerate() {
            let seen = item.sight.keys_of(row % n);
            let start = (seen.start + item.offset).clamp(item.keys.start, item.keys.end) - item.keys.start;
            let end = (seen.end + item.offset).clamp(item.keys.start, item.keys.end) - item.keys.start;
            if start >= end {
                line.fill(0.0);
                continue;
            }
            let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
            let first = item.keys.start - item.offset;
            let (head, position) = (item.kv * p.group + row / n, item.sight.position(row % n));
            let bias = p.bias.map(|b| b.of(head, position, &(first + start..first + end)));
            online_softmax(simd, line, start..end, p.cap, bias, &mut max, &mut sum);
            (part[row * width], part[row * width + 1]) = (max, sum);
        }
        let out = room(&mut s.out, rows * dim);
        // Values are used where they lie if their rows are whole vectors.
        let (values, b_row) = if d == dim {
            (&p.v[kv_row(p.v, 0)], p.kv_width)
        } else {
            let packed = filled(&mut s.d_values, keys * dim, 0.0);
            for (j, to) in packed.chunks_exact_mut(dim).enumerate() {
                to[..d].copy_from_slice(&p.v[kv_row(p.v, j)][..d]);
            }
            (&*packed, dim)
        };
        simd.vectorize(Gemm {
            m: rows,
            k: keys,
            n: dim,
            a: logits,
            a_row: stride,
            a_col: 1,
            b: values,
            b_row,
            c: out,
            c_row: dim,
            add: false,
        });
        for (part, out) in part.chunks_exact_mut(width).zip(out.chunks_exact(dim)) {
            part[2..].copy_from_slice(&out[..d]);
        }
        part
    }
}
