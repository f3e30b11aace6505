//! Writing text: prefill, then one token a step for every sequence still open, with a cache of keys and values.

use candle_core::{DType, Tensor};
use peft_core::kernels::{SequenceSpan, Stream, argmax_rows};
use peft_core::{AdapterSet, BaseModel, Ctx, Error, Result, Route, Segmented, TokenBatch, VirtualModule, VirtualSpans};

use crate::cached_step::{CachedStep, StepPrompt, StepSequence, write_prefix};
use crate::decoder::Decoder;
use crate::encoder_decoder::EncoderDecoder;
use crate::kv_cache::LayerCache;
use crate::sampling::Sampling;

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

impl GenerateOptions {
    fn sampling(&self) -> Sampling {
        Sampling { temperature: self.temperature, top_p: self.top_p, seed: self.seed, ..Sampling::default() }
    }
}

/// One sequence to continue, or to write a target for.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt's or the source's tokens, at least one.
    pub prompt: Vec<u32>,
    /// The adapter's slot in the set, `None` for the base alone.
    pub slot: Option<usize>,
}

/// A sequence that is not at its end.
struct Open {
    row: usize,
    /// Its own rows of the cache.
    keys: std::ops::Range<usize>,
    /// Rows of its adapter's virtual tokens, which it may share with others.
    prefix: std::ops::Range<usize>,
    /// How many positions its own begin after.
    first_position: usize,
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
    on_token: impl FnMut(usize, u32) -> bool,
) -> Result<Vec<Vec<u32>>> {
    check(requests, options)?;
    if options.max_new_tokens == 0 || requests.is_empty() {
        return Ok(vec![Vec::new(); requests.len()]);
    }
    let bounds = bounds_of(requests);
    let route = Route::rows(&bounds, &slots_of(requests));
    let virtual_tokens = VirtualSpans::of(&bounds, &Ctx::eval(adapters, &route))?;
    // Virtual tokens come first in the cache, then a region for each sequence.
    let mut capacity = 0;
    let mut place = |n: usize| {
        capacity += n;
        capacity - n..capacity
    };
    let virtual_rows: Vec<_> = virtual_tokens.iter().map(|span| place(span.tokens.count)).collect();
    let mut open: Vec<Open> = Vec::with_capacity(requests.len());
    for (row, r) in requests.iter().enumerate() {
        let prefix = virtual_tokens.rows_of_sequence(row, &virtual_rows);
        let region = place(r.prompt.len() + options.max_new_tokens);
        let first_position = virtual_tokens.positions_of_sequence(row);
        open.push(Open { row, keys: region.start..region.start + r.prompt.len(), prefix, first_position, last: 0 });
    }
    let width = model.config().key_value_size();
    let new_caches = || {
        let new = |_| LayerCache::new(capacity, width, model.dtype(), model.device());
        (0..model.num_blocks()).map(new).collect::<Result<Vec<_>>>()
    };
    let mut caches = new_caches()?;
    // Those of the base alone, where an adapter reads what it makes.
    let mut of_base = if Ctx::eval(adapters, &route).reads_first_pass() { new_caches()? } else { Vec::new() };

    let mut first = Step {
        ids: requests.iter().flat_map(|r| r.prompt.iter().copied()).collect(),
        lengths: requests.iter().map(|r| r.prompt.len()).collect(),
        prompts: Vec::new(),
    };
    for (span, rows) in virtual_tokens.iter().zip(virtual_rows) {
        let ctx = Ctx::eval(adapters, &route);
        match &span.tokens.module {
            VirtualModule::Prompt(module) => {
                first.prompts.push(StepPrompt { slot: span.slot, rows, embeddings: module.embeddings(&ctx)? });
            }
            VirtualModule::Prefix(module) => write_prefix(module.as_ref(), rows.start, &mut caches, &ctx)?,
        }
    }
    write(requests, options, on_token, open, first, |step, slots, open| {
        let of_base = (!of_base.is_empty()).then_some(of_base.as_mut_slice());
        let logits = step.cached(slots, open).run(model, adapters, &mut caches, of_base)?;
        logits.ok_or_else(|| Error::msg("a step without sequences"))
    })
}

/// Writes a target for the source of every request, all in one batch, each through its own adapter; otherwise as
/// [`generate`].
///
/// # Errors
/// As [`generate`].
pub fn generate_targets(
    model: &EncoderDecoder,
    adapters: &AdapterSet,
    requests: &[Request],
    options: &GenerateOptions,
    on_token: impl FnMut(usize, u32) -> bool,
) -> Result<Vec<Vec<u32>>> {
    check(requests, options)?;
    if options.max_new_tokens == 0 || requests.is_empty() {
        return Ok(vec![Vec::new(); requests.len()]);
    }
    let bounds = bounds_of(requests);
    let ids: Vec<u32> = requests.iter().flat_map(|r| r.prompt.iter().copied()).collect();
    let positions: Vec<u32> = requests.iter().flat_map(|r| 0..r.prompt.len() as u32).collect();
    let route = Route::rows(&bounds, &slots_of(requests));
    let ctx = Ctx::eval(adapters, &route);
    let sources = TokenBatch { ids: &ids, positions: &positions, bounds: &bounds, types: &[] };
    let encoded = model.encode(sources, &ctx)?;
    let virtual_tokens = VirtualSpans::of(&bounds, &ctx)?;
    let prefixes = virtual_tokens.prefix_rows(0);
    let first_key = prefixes.last().map_or(0, |rows| rows.end);
    let (region, width) = (options.max_new_tokens, model.config().attention_size());
    let mut caches = (0..model.config().decoder_layers)
        .map(|_| LayerCache::new(first_key + requests.len() * region, width, model.dtype(), model.device()))
        .collect::<Result<Vec<_>>>()?;
    for (span, rows) in virtual_tokens.iter().zip(&prefixes) {
        if let VirtualModule::Prefix(module) = &span.tokens.module {
            write_prefix(module.as_ref(), rows.start, &mut caches, &ctx)?;
        }
    }
    let open = (0..requests.len()).map(|row| {
        let prefix = virtual_tokens.rows_of_sequence(row, &prefixes);
        // The start token's key is the first.
        let start = first_key + row * region;
        // Prompts are the encoder's.
        let first_position = if prefix.is_empty() { 0 } else { virtual_tokens.positions_of_sequence(row) };
        Open { row, keys: start..start + 1, prefix, first_position, last: 0 }
    });
    let start = model.config().decoder_start_token_id;
    let first = Step { ids: vec![start; requests.len()], lengths: vec![1; requests.len()], prompts: Vec::new() };
    write(requests, options, on_token, open.collect(), first, |step, slots, open| {
        let spans = open.iter().enumerate().map(|(i, o)| {
            let span = |keys, prefix| SequenceSpan { queries: i..i + 1, keys, prefix };
            (span(o.keys.clone(), o.prefix.clone()), span(encoded.rows(o.row), 0..0))
        });
        let (own, cross) = spans.unzip();
        let route = Route::rows(&(0..=open.len()).collect::<Vec<_>>(), slots);
        let ctx = Ctx::eval(adapters, &route);
        let positions: Vec<u32> = open.iter().map(|o| (o.first_position + o.keys.len() - 1) as u32).collect();
        let hidden = model.decode_cached((&step.ids, &positions), [own, cross], &encoded, &mut caches, &ctx)?;
        model.logits(&model.final_norm(&hidden, &ctx)?, &ctx)
    })
}

/// Where each request's tokens lie in all of them.
fn bounds_of(requests: &[Request]) -> Vec<usize> {
    let mut bounds = vec![0];
    for request in requests {
        bounds.push(bounds.last().copied().unwrap_or(0) + request.prompt.len());
    }
    bounds
}

fn slots_of(requests: &[Request]) -> Vec<Option<usize>> {
    requests.iter().map(|r| r.slot).collect()
}

/// Chooses tokens until every sequence of `open` has ended. `logits` makes those after the last token of each sequence, for
/// a step, the slots of its sequences and where these are.
fn write(
    requests: &[Request],
    options: &GenerateOptions,
    mut on_token: impl FnMut(usize, u32) -> bool,
    mut open: Vec<Open>,
    mut step: Step,
    mut logits: impl FnMut(&Step, &[Option<usize>], &[Open]) -> Result<Tensor>,
) -> Result<Vec<Vec<u32>>> {
    let mut written: Vec<Vec<u32>> = vec![Vec::new(); requests.len()];
    let mut made = 0;
    loop {
        let slots: Vec<Option<usize>> = open.iter().filter_map(|o| requests.get(o.row)).map(|r| r.slot).collect();
        let logits = logits(&step, &slots, &open)?;
        let streams = open.iter().map(|o| Stream { seed: options.seed, step: made, site: o.row as u32 });
        let chosen = choose(&logits, options, streams)?;
        let mut still = Vec::with_capacity(open.len());
        for (mut o, token) in open.into_iter().zip(chosen) {
            let Some(tokens) = written.get_mut(o.row) else { continue };
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
        step = Step { ids: still.iter().map(|o| o.last).collect(), lengths: vec![1; still.len()], prompts: Vec::new() };
        open = still;
        made += 1;
    }
}

fn check(requests: &[Request], options: &GenerateOptions) -> Result<()> {
    if let Some(i) = requests.iter().position(|r| r.prompt.is_empty()) {
        return Err(Error::msg(format!("prompt {} is empty: there is nothing to continue", i + 1)));
    }
    options.sampling().check()
}

/// The new tokens of all open sequences.
struct Step {
    ids: Vec<u32>,
    /// How many each sequence has.
    lengths: Vec<usize>,
    /// Prompts that run with the first step.
    prompts: Vec<StepPrompt>,
}

impl Step {
    /// This step as the cache sees it.
    fn cached(&self, slots: &[Option<usize>], open: &[Open]) -> CachedStep {
        let sequences = open.iter().zip(slots).zip(&self.lengths).map(|((o, slot), tokens)| StepSequence {
            slot: *slot,
            tokens: *tokens,
            keys: o.keys.clone(),
            prefix: o.prefix.clone(),
            first_position: o.first_position,
            read: true,
        });
        CachedStep { ids: self.ids.clone(), sequences: sequences.collect(), prompts: self.prompts.clone() }
    }
}

/// The next token of each sequence: the likeliest, or one drawn from the nucleus with the numbers of its stream.
fn choose(logits: &Tensor, options: &GenerateOptions, streams: impl Iterator<Item = Stream>) -> Result<Vec<u32>> {
    let broken = || Error::msg("the model's logits are not numbers; check the weights, or use f32");
    let best = argmax_rows(logits)?.into_iter().map(|token| token.ok_or_else(broken));
    if options.temperature == 0.0 {
        return best.collect();
    }
    let rows = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let sampling = options.sampling();
    best.zip(rows).zip(streams).map(|((best, row), stream)| Ok(sampling.draw(&row, best?, stream))).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;
    use peft_core::Mode;
    use serde_json::json;

    use super::*;
    use crate::config::DecoderConfig;
    use crate::source::{Placement, RandomSource};

    #[test]
    fn greedy_takes_the_first_of_the_largest_and_the_nucleus_cuts_the_tail() {
        let logits = Tensor::new(&[[0f32, 3.0, 3.0, -5.0]], &Device::Cpu).unwrap();
        let token = |options: &GenerateOptions, step| {
            choose(&logits, options, std::iter::once(Stream { seed: 1, step, site: 0 })).unwrap()[0]
        };
        let greedy = GenerateOptions::default();
        assert_eq!(token(&greedy, 0), 1);
        let nucleus = GenerateOptions { temperature: 1.0, top_p: 0.9, ..greedy.clone() };
        let drawn: std::collections::BTreeSet<u32> = (0..200).map(|i| token(&nucleus, i)).collect();
        assert_eq!(drawn.into_iter().collect::<Vec<_>>(), [1, 2]);
        let all = GenerateOptions { temperature: 50.0, ..greedy.clone() };
        let drawn: std::collections::BTreeSet<u32> = (0..200).map(|i| token(&all, i)).collect();
        assert_eq!(drawn.len(), 4);
        let broken = Tensor::new(&[[f32::NAN]], &Device::Cpu).unwrap();
        assert!(choose(&broken, &greedy, std::iter::empty()).is_err());
    }

    fn tiny(weights: DType) -> Decoder {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 71, "hidden_size": 40,
            "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 5, "num_key_value_heads": 1,
            "head_dim": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 128,
            "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 1,
        });
        let config = DecoderConfig::from_hf_map(config.as_object().unwrap().clone(), "config.json".as_ref()).unwrap();
        let placement = Placement::cpu(Some(weights));
        let source = RandomSource { seed: 3, std: 0.4, untied_head: false, placement: placement.clone() };
        Decoder::load(config, &source, &placement).unwrap()
    }

    /// The likeliest next token by a pass over the whole text, without a cache.
    fn next_by_definition(model: &Decoder, text: &[u32]) -> u32 {
        let (set, route) = (AdapterSet::empty(), Route::Base);
        let ctx = Ctx { mode: Mode::Eval, ..Ctx::eval(&set, &route) };
        let positions: Vec<u32> = (0..text.len() as u32).collect();
        let batch = TokenBatch { ids: text, positions: &positions, bounds: &[0, text.len()], types: &[] };
        let input = model.prepare(batch, &ctx).unwrap();
        let mut hidden = model.embed(batch, &ctx).unwrap();
        for i in 0..model.num_blocks() {
            hidden = model.block(i, &hidden, &input, &ctx).unwrap();
        }
        let logits = model.logits(&model.final_norm(&hidden, &ctx).unwrap(), &ctx).unwrap();
        argmax_rows(&logits).unwrap().last().copied().flatten().unwrap()
    }

    /// Prompts of one token and of more than a thin product takes, in every storage.
    #[test]
    fn a_batch_writes_what_each_sequence_writes_alone_and_by_definition() {
        for weights in [DType::F32, DType::BF16, DType::F16] {
            let model = tiny(weights);
            let requests: Vec<Request> = [1, 3, 20, 40, 7]
                .map(|n| Request { prompt: (0..n).map(|i| (i * 13 + n) % 71).collect(), slot: None })
                .to_vec();
            let options = GenerateOptions { max_new_tokens: 12, ..GenerateOptions::default() };
            let run =
                |requests: &[Request]| generate(&model, &AdapterSet::empty(), requests, &options, |_, _| true).unwrap();
            let together = run(&requests);
            for (request, written) in requests.iter().zip(&together) {
                assert_eq!(&run(std::slice::from_ref(request))[0], written);
                let mut text = request.prompt.clone();
                for token in written {
                    assert_eq!(next_by_definition(&model, &text), *token, "{weights:?} after {} tokens", text.len());
                    text.push(*token);
                }
                assert_eq!(text.len(), request.prompt.len() + 12);
            }
        }
    }

    #[test]
    fn a_sequence_that_ends_leaves_the_others_going() {
        let model = tiny(DType::F32);
        let request = |first| Request { prompt: vec![first, 5, 9], slot: None };
        let requests = [request(2), request(3), request(4)];
        let options = GenerateOptions { max_new_tokens: 6, ..GenerateOptions::default() };
        let whole = generate(&model, &AdapterSet::empty(), &requests, &options, |_, _| true).unwrap();
        let mut seen = 0;
        let cut = generate(&model, &AdapterSet::empty(), &requests, &options, |row, _| {
            seen += usize::from(row == 1);
            row != 1 || seen < 2
        })
        .unwrap();
        assert_eq!((&cut[0], &cut[1][..], &cut[2]), (&whole[0], &whole[1][..2], &whole[2]));
    }
}
