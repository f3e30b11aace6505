//! Writing text: prefill, then one token a step for every sequence still open, with a cache of keys and values.

use candle_core::{DType, Tensor};
use peft_core::kernels::Stream;
use peft_core::{AdapterSet, BaseModel, Ctx, Error, Result, Route, Segmented, TokenBatch};

use crate::decoder::Decoder;
use crate::kv_cache::LayerCache;

/// How tokens are chosen and when writing ends.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Tokens a sequence, at most.
    pub max_new_tokens: usize,
    /// 0 is greedy.
    pub temperature: f32,
    /// Sample from the likeliest tokens that make up this share, in `(0, 1]`.
    pub top_p: f32,
    /// Seed of the sampling.
    pub seed: u64,
    /// Tokens that end a sequence; they are not part of it.
    pub stop: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 128, temperature: 0.0, top_p: 1.0, seed: 0, stop: Vec::new() }
    }
}

/// One sequence to continue.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt's tokens, at least one.
    pub prompt: Vec<u32>,
    /// The adapter's slot in the set, `None` for the base alone.
    pub slot: Option<usize>,
}

struct Open {
    row: usize,
    keys: std::ops::Range<usize>,
    last: u32,
}

/// Continues every request, all in one batch, each through its own adapter. `on_token` is told each token as it comes, by
/// request; `false` ends that sequence. Gives the new tokens of each request.
///
/// # Errors
/// An empty prompt, a token outside the vocabulary, wrong options, or a tensor operation that fails.
pub fn generate(
    model: &Decoder,
    adapters: &AdapterSet,
    requests: &[Request],
    options: &GenerateOptions,
    mut on_token: impl FnMut(usize, u32) -> bool,
) -> Result<Vec<Vec<u32>>> {
    check(requests, options)?;
    let mut written: Vec<Vec<u32>> = vec![Vec::new(); requests.len()];
    if options.max_new_tokens == 0 || requests.is_empty() {
        return Ok(written);
    }
    let mut start = 0;
    let mut open: Vec<Open> = Vec::with_capacity(requests.len());
    let mut capacity = 0;
    for (row, r) in requests.iter().enumerate() {
        open.push(Open { row, keys: capacity..capacity + r.prompt.len(), last: 0 });
        capacity += r.prompt.len() + options.max_new_tokens;
        start += r.prompt.len();
    }
    let width = model.config().key_value_size();
    let mut caches = (0..model.num_blocks())
        .map(|_| LayerCache::new(capacity, width, model.dtype(), model.device()))
        .collect::<Result<Vec<_>>>()?;

    let ids: Vec<u32> = requests.iter().flat_map(|r| r.prompt.iter().copied()).collect();
    let positions: Vec<u32> = requests.iter().flat_map(|r| 0..r.prompt.len() as u32).collect();
    let lengths: Vec<usize> = requests.iter().map(|r| r.prompt.len()).collect();
    debug_assert_eq!(ids.len(), start);
    let mut step = Step { ids, positions, lengths };
    loop {
        let slots: Vec<Option<usize>> = open.iter().filter_map(|o| requests.get(o.row)).map(|r| r.slot).collect();
        let logits = step.run(model, adapters, &slots, &open, &mut caches)?;
        let mut still = Vec::with_capacity(open.len());
        for (mut o, logits) in open.into_iter().zip(logits) {
            let Some(tokens) = written.get_mut(o.row) else { continue };
            let stream = Stream { seed: options.seed, step: tokens.len() as u32, site: o.row as u32 };
            let token = choose(&logits, options, stream)?;
            if options.stop.contains(&token) {
                continue;
            }
            tokens.push(token);
            if on_token(o.row, token) && tokens.len() < options.max_new_tokens {
                o.last = token;
                o.keys.end += 1;
                still.push(o);
            }
        }
        if still.is_empty() {
            return Ok(written);
        }
        step = Step {
            ids: still.iter().map(|o| o.last).collect(),
            positions: still.iter().map(|o| (o.keys.len() - 1) as u32).collect(),
            lengths: vec![1; still.len()],
        };
        open = still;
    }
}

fn check(requests: &[Request], options: &GenerateOptions) -> Result<()> {
    if let Some(i) = requests.iter().position(|r| r.prompt.is_empty()) {
        return Err(Error::msg(format!("prompt {} is empty: there is nothing to continue", i + 1)));
    }
    if !(options.temperature.is_finite() && options.temperature >= 0.0) {
        return Err(Error::config("temperature", format!("{} is not a number from 0", options.temperature)));
    }
    if !(options.top_p > 0.0 && options.top_p <= 1.0) {
        return Err(Error::config("top_p", format!("{} is outside (0, 1]", options.top_p)));
    }
    Ok(())
}

struct Step {
    ids: Vec<u32>,
    positions: Vec<u32>,
    lengths: Vec<usize>,
}

impl Step {
    /// Logits after the last token of each sequence.
    fn run(
        &self,
        model: &Decoder,
        adapters: &AdapterSet,
        slots: &[Option<usize>],
        open: &[Open],
        caches: &mut [LayerCache],
    ) -> Result<Vec<Vec<f32>>> {
        let mut bounds = vec![0];
        for n in &self.lengths {
            bounds.push(bounds.last().copied().unwrap_or(0) + n);
        }
        let route = Route::rows(&bounds, slots);
        let ctx = Ctx::eval(adapters, &route);
        let keys: Vec<_> = open.iter().map(|o| o.keys.clone()).collect();
        let input = model.prepare_cached(&self.positions, &self.lengths, &keys)?;
        let batch = TokenBatch { ids: &self.ids, positions: &self.positions, bounds: &bounds, types: &[] };
        let mut hidden = model.embed(batch, &ctx)?;
        for (i, cache) in caches.iter_mut().enumerate() {
            hidden = model.block_cached(i, &hidden, &input, &ctx, cache)?;
        }
        let last: Vec<usize> = bounds.iter().skip(1).map(|b| b - 1).collect();
        let index: Vec<u32> = last.iter().map(|&i| i as u32).collect();
        let rows = hidden.index_select(&Tensor::new(index, hidden.device())?, 0)?;
        let route = route.select(&last);
        let ctx = Ctx { route: &route, ..ctx };
        let logits = model.logits(&model.final_norm(&rows, &ctx)?, &ctx)?;
        Ok(logits.to_dtype(DType::F32)?.to_vec2::<f32>()?)
    }
}

/// The next token: the likeliest, or one drawn from the nucleus.
fn choose(logits: &[f32], options: &GenerateOptions, stream: Stream) -> Result<u32> {
    if logits.iter().any(|x| x.is_nan()) {
        return Err(Error::msg("the model's logits are not numbers; check the weights, or use f32"));
    }
    let best =
        || logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0))).map_or(0, |(i, _)| i as u32);
    if options.temperature == 0.0 {
        return Ok(best());
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut weights: Vec<(u32, f64)> =
        logits.iter().enumerate().map(|(i, x)| (i as u32, f64::from((x - max) / options.temperature).exp())).collect();
    let total: f64 = weights.iter().map(|w| w.1).sum();
    let mut nucleus = total;
    if options.top_p < 1.0 {
        weights.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let (mut sum, mut keep) = (0.0, 0);
        for w in &weights {
            sum += w.1;
            keep += 1;
            if sum >= f64::from(options.top_p) * total {
                break;
            }
        }
        weights.truncate(keep);
        nucleus = sum;
    }
    let mut draw = f64::from(stream.uniform(0)) * nucleus;
    for (token, w) in &weights {
        draw -= w;
        if draw < 0.0 {
            return Ok(*token);
        }
    }
    Ok(weights.last().map_or_else(best, |w| w.0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_the_largest_and_the_nucleus_cuts_the_tail() {
        let logits = [0.0, 3.0, 3.0, -5.0];
        let stream = |i| Stream { seed: 1, step: i, site: 0 };
        let greedy = GenerateOptions::default();
        assert_eq!(choose(&logits, &greedy, stream(0)).unwrap(), 1);
        let nucleus = GenerateOptions { temperature: 1.0, top_p: 0.9, ..greedy.clone() };
        let drawn: std::collections::BTreeSet<u32> =
            (0..200).map(|i| choose(&logits, &nucleus, stream(i)).unwrap()).collect();
        assert_eq!(drawn.into_iter().collect::<Vec<_>>(), [1, 2]);
        let all = GenerateOptions { temperature: 50.0, ..greedy.clone() };
        let drawn: std::collections::BTreeSet<u32> =
            (0..200).map(|i| choose(&logits, &all, stream(i)).unwrap()).collect();
        assert_eq!(drawn.len(), 4);
        assert!(choose(&[f32::NAN], &greedy, stream(0)).is_err());
    }
}
