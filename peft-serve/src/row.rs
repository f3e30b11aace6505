//! One sequence of the batch.

use std::ops::Range;
use std::sync::Arc;

use peft_core::kernels::Stream;
use peft_core::{Error, Result};
use peft_models::sampling::Seen;
use peft_models::tokenizer::Tokenizer;

use crate::engine::Job;
use crate::registry::Generation;
use crate::request::{Event, FinishReason, Finished, Logprobs, Token};
use crate::text::{Piece, Text};

/// A request that has a place in the batch.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) job: Job,
    /// Its rows of the cache.
    pub(crate) region: Range<usize>,
    /// The tokens of the prompt and those written.
    tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    done: usize,
    seen: Seen,
    text: Text,
}

impl Row {
    pub(crate) fn new(job: Job, region: Range<usize>) -> Self {
        let tokens = job.request.prompt.clone();
        let seen = if job.request.sampling.looks_back() { Seen::of_prompt(&tokens) } else { Seen::default() };
        Self { job, region, tokens, done: 0, seen, text: Text::default() }
    }

    pub(crate) fn adapter(&self) -> Option<&Arc<Generation>> {
        self.job.request.adapter.as_ref()
    }

    /// Tokens that the model has not seen.
    pub(crate) fn ahead(&self) -> &[u32] {
        self.tokens.get(self.done..).unwrap_or_default()
    }

    /// Whether its prompt has been read, so that one token follows another.
    pub(crate) fn writes(&self) -> bool {
        self.done >= self.job.request.prompt.len()
    }

    pub(crate) fn length(&self) -> usize {
        self.tokens.len()
    }

    /// Its rows of the cache when `n` more tokens are in it.
    pub(crate) fn keys(&self, n: usize) -> Range<usize> {
        self.region.start..self.region.start + self.done + n
    }

    /// The cache has `n` more of its tokens.
    pub(crate) fn advance(&mut self, n: usize) {
        self.done += n;
    }

    /// Where the next token's random number comes from: that of a request alone.
    fn stream(&self) -> Stream {
        let step = self.tokens.len() - self.job.request.prompt.len();
        Stream { seed: self.job.request.sampling.seed, step: step as u32, site: 0 }
    }

    /// The next token from a row of logits.
    ///
    /// # Errors
    /// Logits that are not numbers, and a form that no token can go on with.
    pub(crate) fn choose(&self, logits: &mut [f32]) -> Result<(u32, Option<Logprobs>)> {
        let request = &self.job.request;
        let own = request.logprobs.map(|top| (top, logits.to_vec()));
        if let Some(constraint) = &request.constraint {
            constraint.allow(logits, &request.stop_tokens)?;
        }
        let token = request.sampling.choose(logits, &self.seen, self.stream()).ok_or_else(not_numbers)?;
        Ok((token, own.map(|(top, logits)| logprobs(&logits, token, top))))
    }

    /// Takes the token that was chosen and tells the reader. Whether the text goes on.
    pub(crate) fn write(&mut self, id: u32, logprobs: Option<Logprobs>, tokenizer: Option<&Tokenizer>) -> Result<bool> {
        if self.job.request.stop_tokens.contains(&id) {
            self.finish(FinishReason::Stop, tokenizer)?;
            return Ok(false);
        }
        self.tokens.push(id);
        let complete = self.job.request.constraint.as_ref().map_or(Ok(false), |constraint| constraint.wrote(id))?;
        if self.job.request.sampling.looks_back() {
            self.seen.wrote(id);
        }
        let piece = match tokenizer {
            Some(tokenizer) => self.text.push(id, tokenizer, &self.job.request.stop)?,
            None => Piece { text: String::new(), stopped: false },
        };
        self.job.tell(Event::Token(Token { id, text: piece.text, logprobs }));
        if piece.stopped {
            self.job.tell(Event::Finished(Finished { reason: FinishReason::Stop, text: String::new() }));
            return Ok(false);
        }
        if complete {
            self.finish(FinishReason::Stop, tokenizer)?;
            return Ok(false);
        }
        if self.tokens.len() - self.job.request.prompt.len() == self.job.request.max_tokens {
            self.finish(FinishReason::Length, tokenizer)?;
            return Ok(false);
        }
        Ok(true)
    }

    fn finish(&mut self, reason: FinishReason, tokenizer: Option<&Tokenizer>) -> Result<()> {
        let rest = match tokenizer {
            Some(tokenizer) => self.text.finish(tokenizer, &self.job.request.stop)?,
            None => Piece { text: String::new(), stopped: false },
        };
        let reason = if rest.stopped { FinishReason::Stop } else { reason };
        self.job.tell(Event::Finished(Finished { reason, text: rest.text }));
        Ok(())
    }
}

pub(crate) fn not_numbers() -> Error {
    Error::msg("the model's logits are not numbers; check the weights, or use f32")
}

/// The logarithm of the softmax of `logits` at `chosen` and at the `top` likeliest.
fn logprobs(logits: &[f32], chosen: u32, top: usize) -> Logprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    let of = |x: f32| (f64::from(x - max) - sum.ln()) as f32;
    let mut order: Vec<(u32, f32)> = logits.iter().enumerate().map(|(i, x)| (i as u32, *x)).collect();
    let likelier = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if top < order.len() {
        order.select_nth_unstable_by(top, likelier);
        order.truncate(top);
    }
    order.sort_unstable_by(likelier);
    let chosen = logits.get(chosen as usize).copied().map_or(f32::NEG_INFINITY, of);
    Logprobs { chosen, top: order.into_iter().map(|(id, x)| (id, of(x))).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let found = logprobs(&[1.0, 3.0, 3.0, -5.0], 0, 3);
        let sum = (1f64.exp() + 2.0 * 3f64.exp() + (-5f64).exp()).ln();
        assert!((f64::from(found.chosen) - (1.0 - sum)).abs() < 1e-6);
        assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 0]);
        assert!((f64::from(found.top[1].1) - (3.0 - sum)).abs() < 1e-6);
        assert_eq!(logprobs(&[1.0, 2.0], 1, 9).top.len(), 2);
    }
}
