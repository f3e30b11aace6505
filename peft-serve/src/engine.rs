//! The compute thread: requests join and leave the batch between steps.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Tensor};
use peft_core::kernels::{argmax_rows, on_pool};
use peft_core::{AdapterSet, BaseModel, Ctx, Error, Result, Route, Segmented, VirtualModule, VirtualTokens};
use peft_models::cached_step::{CachedStep, StepPrompt, StepSequence, write_prefix};
use peft_models::tokenizer::Tokenizer;
use peft_models::{Decoder, LayerCache};
use rayon::prelude::*;
use tokio::sync::mpsc;

use crate::arena::Arena;
use crate::handle::{Counters, EngineOptions};
use crate::registry::Generation;
use crate::request::{Event, Logprobs, Request};
use crate::row::{Row, not_numbers};

/// A request with its reader.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) request: Request,
    pub(crate) events: mpsc::UnboundedSender<Event>,
}

impl Job {
    /// Tells the reader, who may have gone.
    pub(crate) fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }

    fn is_gone(&self) -> bool {
        self.events.is_closed()
    }

    fn rows(&self) -> usize {
        self.request.prompt.len() + self.request.max_tokens
    }
}

/// What the compute thread is told.
#[derive(Debug)]
pub(crate) enum Command {
    Job(Box<Job>),
    /// Finish what is there and take no more.
    Stop,
}

/// Virtual tokens in the cache, which all sequences of their adapter see.
struct Shared {
    adapter: Arc<Generation>,
    /// What rotary frequencies depended on when they were made.
    regime: Vec<usize>,
    rows: Range<usize>,
    written: bool,
    users: usize,
}

/// A sequence of the batch with its virtual tokens.
struct Place {
    row: Row,
    shared: Option<u64>,
}

/// The part of a step that one sequence has.
#[derive(Debug, Clone, Copy)]
struct Part {
    place: usize,
    tokens: usize,
}

type Chosen = Result<(u32, Option<Logprobs>)>;

/// The state of the compute thread.
pub(crate) struct Loop {
    model: Arc<Decoder>,
    tokenizer: Option<Arc<Tokenizer>>,
    options: EngineOptions,
    commands: mpsc::UnboundedReceiver<Command>,
    counters: Arc<Counters>,
    waiting: VecDeque<Job>,
    batch: Vec<Place>,
    arena: Arena,
    caches: Vec<LayerCache>,
    shared: BTreeMap<u64, Shared>,
    next_shared: u64,
}

impl Loop {
    pub(crate) fn new(
        model: Arc<Decoder>,
        tokenizer: Option<Arc<Tokenizer>>,
        options: EngineOptions,
        commands: mpsc::UnboundedReceiver<Command>,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        let EngineOptions { max_rows, cache_tokens, prefill_tokens, queue, .. } = options;
        let sizes = [
            ("max_rows", max_rows),
            ("cache_tokens", cache_tokens),
            ("prefill_tokens", prefill_tokens),
            ("queue", queue),
        ];
        for (name, n) in sizes {
            if n == 0 {
                return Err(Error::config(name, "is 0, so nothing could run"));
            }
        }
        let width = model.config().key_value_size();
        let new = |_| LayerCache::new(cache_tokens, width, model.dtype(), model.device());
        let caches = (0..model.num_blocks()).map(new).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            model,
            tokenizer,
            options,
            commands,
            counters,
            waiting: VecDeque::new(),
            batch: Vec::new(),
            arena: Arena::new(cache_tokens),
            caches,
            shared: BTreeMap::new(),
            next_shared: 0,
        })
    }

    /// Runs until it is told to stop or nobody can hand in requests any more, and all are finished.
    pub(crate) fn run(mut self) {
        loop {
            if self.batch.is_empty() && self.waiting.is_empty() {
                match self.commands.blocking_recv() {
                    Some(command) => self.take(command),
                    None => return,
                }
            }
            while let Ok(command) = self.commands.try_recv() {
                self.take(command);
            }
            self.forget_vanished();
            self.admit();
            if !self.batch.is_empty() {
                // Entered anew for each step: threads that open adapters wait for the pool too, and nobody should wait for
                // a thread of it that waits for requests.
                on_pool(|| self.step());
            }
            self.counters.running.store(self.batch.len(), Ordering::Relaxed);
            self.counters.cache_used.store(self.arena.used(), Ordering::Relaxed);
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Job(job) => self.waiting.push_back(*job),
            // What has been sent is still received.
            Command::Stop => self.commands.close(),
        }
    }

    fn forget_vanished(&mut self) {
        let before = self.waiting.len();
        self.waiting.retain(|job| !job.is_gone());
        let gone = before - self.waiting.len();
        self.counters.waiting.fetch_sub(gone, Ordering::Relaxed);
        let ended: Vec<usize> = (0..self.batch.len()).filter(|&i| self.is_gone(i)).collect();
        self.counters.cancelled.fetch_add((gone + ended.len()) as u64, Ordering::Relaxed);
        self.leave(&ended);
    }

    fn is_gone(&self, place: usize) -> bool {
        self.batch.get(place).is_some_and(|p| p.row.job.is_gone())
    }

    /// Gives places to requests in the order in which they came. One that finds no room lets none pass.
    fn admit(&mut self) {
        while self.batch.len() < self.options.max_rows {
            let Some(job) = self.waiting.pop_front() else { return };
            match self.place(&job) {
                Ok(Some((region, shared))) => {
                    self.counters.waiting.fetch_sub(1, Ordering::Relaxed);
                    self.batch.push(Place { row: Row::new(job, region), shared });
                }
                Ok(None) => {
                    self.waiting.push_front(job);
                    return;
                }
                Err(e) => {
                    self.counters.waiting.fetch_sub(1, Ordering::Relaxed);
                    self.fail(&job, &e.to_string());
                }
            }
        }
    }

    fn fail(&self, job: &Job, message: &str) {
        tracing::warn!(adapter = job.request.adapter.as_ref().map(|a| a.name()), message, "a request failed");
        self.counters.failed.fetch_add(1, Ordering::Relaxed);
        job.tell(Event::Failed(message.to_owned()));
    }

    /// Room in the cache for a request and its adapter's virtual tokens; nothing while there is none.
    fn place(&mut self, job: &Job) -> Result<Option<(Range<usize>, Option<u64>)>> {
        let virtual_tokens = job.request.adapter.as_ref().map_or(0, |a| a.virtual_tokens());
        if job.rows() + virtual_tokens > self.arena.capacity() {
            return Err(Error::msg("the request is longer than the cache"));
        }
        let shared = match &job.request.adapter {
            Some(adapter) if virtual_tokens > 0 => {
                let regime = self.model.rope_regime(virtual_tokens + job.request.prompt.len());
                match self.share(adapter, regime)? {
                    Some(key) => Some(key),
                    None => return Ok(None),
                }
            }
            _ => None,
        };
        match self.arena.take(job.rows()) {
            Some(region) => Ok(Some((region, shared))),
            None => {
                self.leave_shared(shared);
                Ok(None)
            }
        }
    }

    /// The virtual tokens of an adapter, with one more user; nothing while there is no room for them.
    fn share(&mut self, adapter: &Arc<Generation>, regime: Vec<usize>) -> Result<Option<u64>> {
        // A gate makes them another thing for each sequence.
        let gated = adapter.adapter().virtual_tokens().is_some_and(VirtualTokens::is_gated);
        let known = |s: &Shared| !gated && Arc::ptr_eq(&s.adapter, adapter) && s.regime == regime;
        if let Some((key, shared)) = self.shared.iter_mut().map(|(k, s)| (*k, s)).find(|(_, s)| known(s)) {
            shared.users += 1;
            return Ok(Some(key));
        }
        let Some(tokens) = adapter.adapter().virtual_tokens() else { return Ok(None) };
        let Some(rows) = self.arena.take(tokens.count) else { return Ok(None) };
        let written = match &tokens.module {
            VirtualModule::Prompt(_) => false,
            VirtualModule::Prefix(module) => {
                let (set, route) = (AdapterSet::empty(), Route::Base);
                let ctx = Ctx::eval(&set, &route);
                if let Err(e) = write_prefix(module.as_ref(), rows.start, &mut self.caches, &ctx) {
                    self.arena.free(rows);
                    return Err(e);
                }
                true
            }
        };
        let key = self.next_shared;
        self.next_shared += 1;
        self.shared.insert(key, Shared { adapter: adapter.clone(), regime, rows, written, users: 1 });
        Ok(Some(key))
    }

    fn leave_shared(&mut self, key: Option<u64>) {
        let Some(key) = key else { return };
        let Some(shared) = self.shared.get_mut(&key) else { return };
        shared.users -= 1;
        if shared.users == 0 {
            let rows = shared.rows.clone();
            self.shared.remove(&key);
            self.arena.free(rows);
        }
    }

    /// Frees places, given in ascending order.
    fn leave(&mut self, ended: &[usize]) {
        for &i in ended.iter().rev() {
            let Place { row, shared } = self.batch.remove(i);
            self.arena.free(row.region.clone());
            self.leave_shared(shared);
        }
    }

    /// One more token for each sequence that writes, and some of the prompts of those that do not yet.
    fn step(&mut self) {
        let mut ended = Vec::new();
        for parts in self.plan() {
            match self.run_parts(&parts) {
                Ok(chosen) => self.write(&parts, chosen, &mut ended),
                // One of them is the cause; it shall be the only one that fails.
                Err(e) if parts.len() == 1 => self.fail_parts(&parts, &e, &mut ended),
                Err(_) => {
                    for part in parts {
                        match self.run_parts(&[part]) {
                            Ok(chosen) => self.write(&[part], chosen, &mut ended),
                            Err(e) => self.fail_parts(&[part], &e, &mut ended),
                        }
                    }
                }
            }
        }
        ended.sort_unstable();
        self.leave(&ended);
        self.counters.steps.fetch_add(1, Ordering::Relaxed);
    }

    fn fail_parts(&self, parts: &[Part], e: &Error, ended: &mut Vec<usize>) {
        for part in parts {
            if let Some(place) = self.batch.get(part.place) {
                self.fail(&place.row.job, &e.to_string());
                ended.push(part.place);
            }
        }
    }

    /// What runs in this step, in one pass for each regime of rotary frequencies, which most models have one of.
    fn plan(&self) -> Vec<Vec<Part>> {
        let mut passes: Vec<(Vec<usize>, Vec<Part>)> = Vec::new();
        let mut budget = self.options.prefill_tokens;
        for (i, place) in self.batch.iter().enumerate() {
            let row = &place.row;
            let virtual_tokens = self.virtual_rows(place).len();
            let regime = |tokens: usize| self.model.rope_regime(virtual_tokens + tokens);
            let (done, rest) = (row.length() - row.ahead().len(), row.ahead().len());
            let mut tokens = rest;
            if !row.writes() {
                tokens = rest.min(budget);
                let whole = row.adapter().is_some_and(|a| a.whole_prompts())
                    || (tokens < rest && regime(done + tokens) != regime(row.length()));
                if whole && tokens < rest {
                    // Such a prompt waits for a step without others.
                    tokens = if budget == self.options.prefill_tokens { rest } else { 0 };
                }
                budget = budget.saturating_sub(tokens);
                if tokens == 0 {
                    continue;
                }
            }
            let (regime, part) = (regime(done + tokens), Part { place: i, tokens });
            match passes.iter_mut().find(|(known, _)| *known == regime) {
                Some((_, parts)) => parts.push(part),
                None => passes.push((regime, vec![part])),
            }
        }
        passes.into_iter().map(|(_, parts)| self.by_adapter(parts)).collect()
    }

    /// Sequences of one adapter side by side, since neighbours go through it together.
    fn by_adapter(&self, mut parts: Vec<Part>) -> Vec<Part> {
        let mut met: Vec<*const Generation> = Vec::new();
        parts.sort_by_cached_key(|part| {
            let adapter = self.batch.get(part.place).and_then(|p| p.row.adapter()).map(Arc::as_ptr)?;
            let known = met.iter().position(|m| *m == adapter);
            Some(known.unwrap_or_else(|| {
                met.push(adapter);
                met.len() - 1
            }))
        });
        parts
    }

    fn virtual_rows(&self, place: &Place) -> Range<usize> {
        place.shared.and_then(|key| self.shared.get(&key)).map_or(0..0, |shared| shared.rows.clone())
    }

    /// Runs a pass. What each part's sequence says next, where it has read its prompt: `Some(None)` where logits are not numbers.
    fn run_parts(&mut self, parts: &[Part]) -> Result<Vec<Option<Chosen>>> {
        let mut adapters: Vec<&Arc<Generation>> = Vec::new();
        let mut step = CachedStep::default();
        let mut written = Vec::new();
        for part in parts {
            let Some(place) = self.batch.get(part.place) else { continue };
            let slot = place.row.adapter().map(|adapter| {
                let known = adapters.iter().position(|a| Arc::ptr_eq(a, adapter));
                known.unwrap_or_else(|| {
                    adapters.push(adapter);
                    adapters.len() - 1
                })
            });
            let ahead = place.row.ahead();
            step.ids.extend(ahead.iter().take(part.tokens));
            step.sequences.push(StepSequence {
                slot,
                tokens: part.tokens,
                keys: place.row.keys(part.tokens),
                prefix: self.virtual_rows(place),
                first_position: place
                    .row
                    .adapter()
                    .map_or(0, |a| a.adapter().virtual_tokens().map_or(0, VirtualTokens::positions)),
                read: part.tokens == ahead.len(),
            });
            let unwritten = place.shared.and_then(|key| Some((key, self.shared.get(&key).filter(|s| !s.written)?)));
            if let (Some((key, shared)), Some(slot)) = (unwritten, slot)
                && !written.contains(&key)
                && let Some(VirtualModule::Prompt(module)) =
                    shared.adapter.adapter().virtual_tokens().map(|t| &t.module)
            {
                let (set, route) = (AdapterSet::empty(), Route::Base);
                let embeddings = module.embeddings(&Ctx::eval(&set, &route))?;
                step.prompts.push(StepPrompt { slot, rows: shared.rows.clone(), embeddings });
                written.push(key);
            }
        }
        let set = AdapterSet::of(adapters.iter().map(|a| (a.name().to_owned(), a.adapter().clone())));
        let logits = step.run(&self.model, &set, &mut self.caches, None)?;
        for key in written {
            if let Some(shared) = self.shared.get_mut(&key) {
                shared.written = true;
            }
        }
        let reads: Vec<bool> = step.sequences.iter().map(|s| s.read).collect();
        let mut chosen = match logits {
            Some(logits) => self.choose(parts, &reads, &logits)?,
            None => Vec::new(),
        }
        .into_iter();
        Ok(reads.into_iter().map(|read| if read { chosen.next() } else { None }).collect())
    }

    /// The next token of each part that reads.
    fn choose(&self, parts: &[Part], reads: &[bool], logits: &Tensor) -> Result<Vec<Chosen>> {
        let rows: Vec<&Row> = parts
            .iter()
            .zip(reads)
            .filter_map(|(part, read)| if *read { self.batch.get(part.place).map(|p| &p.row) } else { None })
            .collect();
        let plain = |row: &&Row| {
            let request = &row.job.request;
            request.sampling.is_plain() && request.logprobs.is_none() && request.constraint.is_none()
        };
        if rows.iter().all(plain) {
            let plain = |token: Option<u32>| token.map(|token| (token, None)).ok_or_else(not_numbers);
            return Ok(argmax_rows(logits)?.into_iter().map(plain).collect());
        }
        let mut logits = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        Ok(rows.par_iter().zip(&mut logits).map(|(row, logits)| row.choose(logits)).collect())
    }

    fn write(&mut self, parts: &[Part], chosen: Vec<Option<Chosen>>, ended: &mut Vec<usize>) {
        let tokenizer = self.tokenizer.clone();
        let count = |counter: &AtomicU64, n: usize| counter.fetch_add(n as u64, Ordering::Relaxed);
        for (part, chosen) in parts.iter().zip(chosen) {
            let Some(place) = self.batch.get_mut(part.place) else { continue };
            if !place.row.writes() {
                count(&self.counters.prompt_tokens, part.tokens);
            }
            place.row.advance(part.tokens);
            let goes_on = match chosen {
                None => Ok(true),
                Some(Err(e)) => Err(e),
                Some(Ok((token, logprobs))) => {
                    count(&self.counters.written_tokens, 1);
                    place.row.write(token, logprobs, tokenizer.as_deref())
                }
            };
            match goes_on {
                Ok(true) => {}
                Ok(false) => {
                    count(&self.counters.finished, 1);
                    ended.push(part.place);
                }
                Err(e) => self.fail_parts(&[*part], &e, ended),
            }
        }
    }
}
