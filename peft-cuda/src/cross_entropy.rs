//! Cross-entropy of rows of logits (`kernels/cross_entropy.cu`).

use crate::launch::{Args, Launch, Operand, aligned, count};

/// Bytes of what a warp found in a row.
const PART: u32 = 16;

/// A chunk of logits and what is known of its rows.
#[derive(Debug, Clone, Copy)]
pub struct Chunk {
    /// `[rows, vocab]`.
    pub logits: Operand,
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub vocab: usize,
    /// Of each row the target, `u32`, less than `vocab`: the kernel does not check it.
    pub targets: u64,
    /// Of each row its weight, `f32`; 0 where all are 1.
    pub weights: u64,
}

impl Chunk {
    /// Of each row the loss (`nll`, `f32`, without weight and scale) and whether the target is the first largest logit (`hits`,
    /// `u32`, 1 or 0). With `scale`, the gradient of `scale · Σ weight·nll` replaces the logits. `softcap` caps logits by
    /// `cap · tanh(logit / cap)` first. A row with NaN or +∞, or of −∞ alone, has the loss NaN and a gradient of NaN.
    #[must_use]
    pub fn losses(&self, nll: u64, hits: u64, scale: Option<f32>, softcap: Option<f32>) -> Launch {
        let vector = aligned(self.vocab, &[self.logits]);
        let per_thread = if vector { self.logits.element.per_access() } else { 1 };
        let threads = self.vocab.div_ceil(per_thread).next_multiple_of(32).clamp(32, 512);
        let args = Args::new().long(self.logits.address).long(self.targets).long(self.weights).long(nll).long(hits);
        let args = args.int(count(self.vocab)).float(scale.unwrap_or(0.0)).float(softcap.unwrap_or(0.0));
        let ending = if vector { "_vector" } else { "" };
        Launch {
            file: "cross_entropy",
            kernel: format!("cross_entropy_{}{ending}", self.logits.element.name()),
            grid: [count(self.rows), 1, 1],
            threads: count(threads),
            shared: 16 * PART,
            args: args.int(u32::from(scale.is_some())),
        }
    }

    /// Adds `[Σ weight·nll, Σ nll, Σ hits]` of the rows to `totals` (three `f64`, zeros before the first chunk).
    #[must_use]
    pub fn totals(&self, nll: u64, hits: u64, totals: u64) -> Launch {
        let args = Args::new().long(nll).long(hits).long(self.weights).long(totals).int(count(self.rows));
        Launch {
            file: "cross_entropy",
            kernel: "cross_entropy_totals".into(),
            grid: [u32::from(self.rows > 0), 1, 1],
            threads: 256,
            shared: 3 * 8 * 8,
            args,
        }
    }
}
