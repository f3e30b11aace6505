//! The fused kernel: a row of logits is read from memory once and written once.
//!
//! A row is taken in blocks that stay in cache. Each block is replaced by `exp(z − m)` with `m` the block's own largest
//! value; when all blocks' sums are known, each block needs only one factor, `scale · exp(m − m_row) / sum`.

use rayon::prelude::*;

use crate::cpu::{PARALLEL_ELEMENTS, threads};
use crate::simd;

const BLOCK: usize = 1024;

/// Loss of one row.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Row {
    /// −log of the target's probability.
    pub(super) nll: f64,
    /// Whether the target is the (first) largest logit.
    pub(super) hit: bool,
}

/// Where the logits are and whether the gradient replaces them.
pub(super) enum Logits<'a> {
    Read(&'a [f32]),
    Replace(&'a mut [f32]),
}

/// Losses of all rows of `vocab` logits; `targets` are inside the vocabulary.
pub(super) fn losses(logits: Logits<'_>, vocab: usize, targets: &[u32], scale: f64, softcap: Option<f32>) -> Vec<Row> {
    let mut out = vec![Row::default(); targets.len()];
    if vocab == 0 || targets.is_empty() {
        return out;
    }
    let serial = threads() == 1 || targets.len() * vocab < PARALLEL_ELEMENTS;
    let task = if serial { targets.len() } else { targets.len().div_ceil(threads() * 4) };
    let rows = out.chunks_mut(task).zip(targets.chunks(task));
    match logits {
        Logits::Read(x) => {
            let run = |((out, targets), x): ((&mut [Row], &[u32]), &[f32])| {
                let mut blocks = Vec::new();
                for ((out, &t), x) in out.iter_mut().zip(targets).zip(x.chunks_exact(vocab)) {
                    *out = simd::run(
                        #[inline(always)]
                        || read_row(x, t as usize, softcap, &mut blocks),
                    );
                }
            };
            let work: Vec<_> = rows.zip(x.chunks(task * vocab)).collect();
            if serial { work.into_iter().for_each(run) } else { work.into_par_iter().for_each(run) }
        }
        Logits::Replace(x) => {
            let run = |((out, targets), x): ((&mut [Row], &[u32]), &mut [f32])| {
                let mut blocks = Vec::new();
                for ((out, &t), x) in out.iter_mut().zip(targets).zip(x.chunks_exact_mut(vocab)) {
                    *out = simd::run(
                        #[inline(always)]
                        || replace_row(x, t as usize, scale, softcap, &mut blocks),
                    );
                }
            };
            let work: Vec<_> = rows.zip(x.chunks_mut(task * vocab)).collect();
            if serial { work.into_iter().for_each(run) } else { work.into_par_iter().for_each(run) }
        }
    }
    out
}

#[derive(Debug, Clone, Copy)]
struct Block {
    max: f32,
    /// `Σ exp(z − max)`.
    sum: f32,
}

impl Block {
    /// What brings the block's exponentials to the row's largest value.
    fn weight(&self, row_max: f32) -> f64 {
        // A block of −∞ holds zeros (or NaN, which survives the product).
        if self.max == f32::NEG_INFINITY { 0.0 } else { (f64::from(self.max) - f64::from(row_max)).exp() }
    }
}

#[inline(always)]
fn read_row(x: &[f32], target: usize, softcap: Option<f32>, blocks: &mut Vec<Block>) -> Row {
    let mut copy = [0f32; BLOCK];
    let mut slope = [1f32; BLOCK];
    let mut first_in_block = false;
    blocks.clear();
    for (b, x) in x.chunks(BLOCK).enumerate() {
        let z = &mut copy[..x.len()];
        z.copy_from_slice(x);
        let (block, first) = exponentials(z, &mut slope, softcap, target.wrapping_sub(b * BLOCK));
        first_in_block |= first;
        blocks.push(block);
    }
    let z = capped(x[target], softcap).0;
    finish(blocks, z, target, first_in_block).0
}

#[inline(always)]
fn replace_row(x: &mut [f32], target: usize, scale: f64, softcap: Option<f32>, blocks: &mut Vec<Block>) -> Row {
    let mut slope = [1f32; BLOCK];
    let mut first_in_block = false;
    let (z, target_slope) = capped(x[target], softcap);
    blocks.clear();
    for (b, x) in x.chunks_mut(BLOCK).enumerate() {
        let (block, first) = exponentials(x, &mut slope, softcap, target.wrapping_sub(b * BLOCK));
        first_in_block |= first;
        blocks.push(block);
        if softcap.is_some() {
            x.iter_mut().zip(&slope).for_each(|(e, s)| *e *= s);
        }
    }
    let (row, max, total) = finish(blocks, z, target, first_in_block);
    for (x, block) in x.chunks_mut(BLOCK).zip(blocks) {
        let factor = (scale * block.weight(max) / total) as f32;
        x.iter_mut().for_each(|e| *e *= factor);
    }
    x[target] -= scale as f32 * target_slope;
    row
}

/// `cap·tanh(x/cap)` and its derivative.
#[inline(always)]
fn capped(x: f32, softcap: Option<f32>) -> (f32, f32) {
    match softcap {
        Some(cap) => {
            let t = simd::tanh(x / cap);
            (cap * t, (1.0 - t) * (1.0 + t))
        }
        None => (x, 1.0),
    }
}

/// Caps one block, replaces it by its exponentials, and says whether `target` (an index into the block, or past it)
/// is its first largest element.
#[inline(always)]
fn exponentials(x: &mut [f32], slope: &mut [f32; BLOCK], softcap: Option<f32>, target: usize) -> (Block, bool) {
    if softcap.is_some() {
        for (x, s) in x.iter_mut().zip(slope) {
            (*x, *s) = capped(*x, softcap);
        }
    }
    let max = simd::max(x);
    let first = x.get(target) == Some(&max) && !x[..target].contains(&max);
    let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
    x.iter_mut().for_each(|x| *x = simd::exp(*x - base));
    (Block { max, sum: simd::sum1(x, |e| e) }, first)
}

/// The row's loss, its largest value and `Σ exp(z − max)`.
fn finish(blocks: &[Block], target_logit: f32, target: usize, first_in_block: bool) -> (Row, f32, f64) {
    let max = blocks.iter().fold(f32::NEG_INFINITY, |m, b| if b.max > m { b.max } else { m });
    let total: f64 = blocks.iter().map(|b| f64::from(b.sum) * b.weight(max)).sum();
    let log_sum = f64::from(max) + total.ln();
    let first_block = blocks.iter().position(|b| b.max == max) == Some(target / BLOCK);
    (Row { nll: log_sum - f64::from(target_logit), hit: first_in_block && first_block }, max, total)
}
