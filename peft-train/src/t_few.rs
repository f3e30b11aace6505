//! T-Few's losses on rows with several possible answers (Liu et al. 2022, arXiv:2205.05638, section 3.2): likelihood of the right
//! answer, unlikelihood of the wrong ones, and a softmax over the answers' mean log-likelihoods.
//!
//! All three are functions of the tokens' negative log-likelihoods alone, and what reaches the logits of a token is its own
//! cross-entropy gradient times the derivative of the loss by that token's likelihood. So the losses are weights of tokens, and the
//! model and its head know nothing of them.

use crate::data::ChoiceBatch;
use crate::objective::MicroBatch;

/// What the paper adds to `1 − p`, so that a certain wrong token has a finite loss.
const FLOOR: f64 = 1e-2;

/// Weights of the losses beside the likelihood of the right answer; the paper adds all three.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TFew {
    /// Of the unlikelihood loss: mean of `−log(1 − p + 0.01)` over the tokens of wrong answers.
    pub unlikelihood: f64,
    /// Of the length-normalised loss: cross-entropy of the right answer under a softmax over mean log-likelihoods a token.
    pub length_normalised: f64,
}

impl Default for TFew {
    fn default() -> Self {
        Self { unlikelihood: 1.0, length_normalised: 1.0 }
    }
}

/// What the means of a step divide by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tokens of right answers.
    pub right: usize,
    /// Tokens of wrong answers.
    pub wrong: usize,
    /// Rows.
    pub rows: usize,
}

impl Counts {
    /// Of all micro-batches of a step.
    #[must_use]
    pub fn of(micro_batches: &[MicroBatch]) -> Self {
        let mut counts = Self::default();
        for micro_batch in micro_batches {
            let MicroBatch::Choices(choices) = micro_batch else { continue };
            let spans = choices.spans();
            for row in &choices.rows {
                counts.rows += 1;
                for (i, span) in row.sequences.clone().filter_map(|s| spans.get(s)).enumerate() {
                    *(if i == row.right { &mut counts.right } else { &mut counts.wrong }) += span.len();
                }
            }
        }
        counts
    }
}

impl TFew {
    /// This micro-batch's part of the loss, and its derivative by the negative log-likelihood `nll` of each counted token.
    #[must_use]
    pub fn weigh(&self, nll: &[f32], choices: &ChoiceBatch, counts: &Counts) -> (f64, Vec<f64>) {
        let (mut loss, mut weights) = (0.0, vec![0.0; nll.len()]);
        let spans = choices.spans();
        let (right, wrong, rows) = (counts.right.max(1) as f64, counts.wrong.max(1) as f64, counts.rows.max(1) as f64);
        for row in &choices.rows {
            let answers: Vec<_> = row.sequences.clone().filter_map(|s| spans.get(s).cloned()).collect();
            let tokens = |span: &std::ops::Range<usize>| nll.get(span.clone()).unwrap_or_default();
            let mean = |span| {
                let tokens = tokens(span);
                tokens.iter().map(|&x| f64::from(x)).sum::<f64>() / tokens.len().max(1) as f64
            };
            let means: Vec<f64> = answers.iter().map(mean).collect();
            let least = means.iter().copied().fold(f64::INFINITY, f64::min);
            let sum: f64 = means.iter().map(|m| (least - m).exp()).sum();
            for (i, (span, mean)) in answers.iter().zip(&means).enumerate() {
                let own = i == row.right;
                if own {
                    loss += self.length_normalised * (sum.ln() + mean - least) / rows;
                }
                let by_mean = (f64::from(u8::from(own)) - (least - mean).exp() / sum) * self.length_normalised / rows;
                let by_mean = by_mean / span.len().max(1) as f64;
                for (weight, &nll) in weights.get_mut(span.clone()).unwrap_or_default().iter_mut().zip(tokens(span)) {
                    let nll = f64::from(nll);
                    let of_token = if own {
                        loss += nll / right;
                        1.0 / right
                    } else {
                        let p = (-nll).exp();
                        let rest = 1.0 - p + FLOOR;
                        loss -= self.unlikelihood * rest.ln() / wrong;
                        -self.unlikelihood * p / rest / wrong
                    };
                    *weight = of_token + by_mean;
                }
            }
        }
        (loss, weights)
    }
}
