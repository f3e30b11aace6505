//! The engine as the rest of a program sees it: requests go in, streams of events come out.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use futures_core::Stream;
use peft_core::{Result, Segmented};
use peft_models::Decoder;
use peft_models::tokenizer::Tokenizer;
use tokio::sync::{mpsc, watch};

use crate::engine::{Command, Job, Loop};
use crate::grammar::{Constraint, Grammar, Grammars};
use crate::request::{Event, FinishReason, Logprobs, Refused, Request};

/// How much the engine does at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    /// Sequences in a batch, at most.
    pub max_rows: usize,
    /// Rows of the cache of keys and values, for all sequences together. A sequence takes as many as it has tokens when it is at
    /// its longest, virtual tokens of an adapter once for all its sequences.
    pub cache_tokens: usize,
    /// Tokens of prompts in one step, at most: a longer prompt is read in pieces, between which other sequences go on.
    pub prefill_tokens: usize,
    /// Requests that wait for a place, at most.
    pub queue: usize,
    /// Tokens of a text, at most, its prompt and virtual tokens among them; `None` is the model's `max_position_embeddings`.
    /// A cache with less room, and a model with learned positions, have the last word.
    pub context: Option<usize>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { max_rows: 16, cache_tokens: 16_384, prefill_tokens: 256, queue: 256, context: None }
    }
}

/// What the engine holds and has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Requests that wait for a place.
    pub waiting: usize,
    /// Sequences in the batch.
    pub running: usize,
    /// Rows of the cache in use.
    pub cache_used: usize,
    /// Rows of the cache.
    pub cache_tokens: usize,
    /// Steps so far.
    pub steps: u64,
    /// Tokens of prompts read so far.
    pub prompt_tokens: u64,
    /// Tokens written so far.
    pub written_tokens: u64,
    /// Requests that came to their end so far.
    pub finished: u64,
    /// Requests that failed so far.
    pub failed: u64,
    /// Requests whose reader went away so far.
    pub cancelled: u64,
}

/// Numbers that the compute thread writes and everybody reads.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) waiting: AtomicUsize,
    pub(crate) running: AtomicUsize,
    pub(crate) cache_used: AtomicUsize,
    pub(crate) steps: AtomicU64,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) written_tokens: AtomicU64,
    pub(crate) finished: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) cancelled: AtomicU64,
}

/// A running engine. Clones are the same engine; when the last one is dropped, it finishes its requests and ends.
#[derive(Debug, Clone)]
pub struct Engine {
    commands: mpsc::UnboundedSender<Command>,
    counters: Arc<Counters>,
    options: EngineOptions,
    limits: Limits,
    tokenizer: Option<Arc<Tokenizer>>,
    /// Made for the first answer that has to be of a form; the error is the message.
    grammars: Arc<OnceLock<Result<Grammars, String>>>,
    stopped: watch::Receiver<bool>,
}

/// What a request is held to.
#[derive(Debug, Clone, Copy)]
struct Limits {
    vocabulary: usize,
    positions: usize,
}

impl Engine {
    /// Starts the compute thread for a model; stop strings and texts need the tokenizer.
    ///
    /// # Errors
    /// Options of zero, no memory for the cache, or no thread.
    pub fn start(model: Arc<Decoder>, tokenizer: Option<Arc<Tokenizer>>, options: EngineOptions) -> Result<Self> {
        let config = model.config();
        let wanted = options.context.unwrap_or(config.max_position_embeddings);
        let limits = Limits {
            vocabulary: model.vocab_size(),
            positions: config.learned_positions().map_or(wanted, |most| most.min(wanted)),
        };
        let (commands, received) = mpsc::unbounded_channel();
        let (ended, stopped) = watch::channel(false);
        let counters = Arc::new(Counters::default());
        let work = Loop::new(model, tokenizer.clone(), options, received, counters.clone())?;
        let thread = std::thread::Builder::new().name("peft-serve".into());
        // Should the thread end in a panic, `ended` is dropped, which readers notice as well.
        let run = move || {
            work.run();
            ended.send_replace(true);
        };
        thread.spawn(run).map_err(|e| peft_core::Error::msg(format!("no thread for the engine: {e}")))?;
        Ok(Self { commands, counters, options, limits, tokenizer, grammars: Arc::default(), stopped })
    }

    /// The form of an answer, for [`Request::constraint`]. The first one takes tens of milliseconds.
    ///
    /// # Errors
    /// An engine without a tokenizer, one whose tokens do not say which bytes they are, and what is wrong with the grammar: the
    /// message says it.
    pub fn constraint(&self, grammar: &Grammar) -> Result<Constraint, String> {
        let Some(tokenizer) = &self.tokenizer else {
            return Err("the engine was started without a tokenizer, and forms need one".into());
        };
        let make = || Grammars::new(tokenizer, self.limits.vocabulary).map_err(|e| e.to_string());
        self.grammars.get_or_init(make).as_ref().map_err(Clone::clone)?.begin(grammar)
    }

    /// Hands in a request. Dropping the answer frees its place at the next step.
    ///
    /// # Errors
    /// What is wrong with the request; [`Refused::Busy`] when too many are waiting, [`Refused::Stopping`] after
    /// [`Engine::shutdown`].
    pub fn submit(&self, request: Request) -> Result<Answer, Refused> {
        self.check(&request)?;
        let room = |waiting: usize| (waiting < self.options.queue).then_some(waiting + 1);
        if let Err(waiting) = self.counters.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room) {
            return Err(Refused::Busy { waiting });
        }
        let (events, received) = mpsc::unbounded_channel();
        if self.commands.send(Command::Job(Box::new(Job { request, events }))).is_err() {
            self.counters.waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(Refused::Stopping);
        }
        Ok(Answer { events: received })
    }

    /// How many tokens a text may have, its prompt and virtual tokens among them.
    #[must_use]
    pub fn context_length(&self) -> usize {
        self.limits.positions.min(self.options.cache_tokens)
    }

    /// What is wrong with a request.
    fn check(&self, request: &Request) -> Result<(), Refused> {
        let invalid = |field, message: String| Err(Refused::Invalid { field, message });
        if request.prompt.is_empty() {
            return invalid("prompt", "is empty: there is nothing to go on with".into());
        }
        if let Some(id) = request.prompt.iter().find(|id| **id as usize >= self.limits.vocabulary) {
            return invalid("prompt", format!("token {id} is outside the vocabulary of {}", self.limits.vocabulary));
        }
        if request.max_tokens == 0 {
            return invalid("max_tokens", "is 0: there is nothing to write".into());
        }
        if let Some(adapter) = request.adapter.as_ref().filter(|a| a.adapter().first_pass()) {
            let name = adapter.name();
            let message = format!("`{name}` reads a first pass over the base, which is not served; generate makes one");
            return invalid("model", message);
        }
        let virtual_tokens = request.adapter.as_ref().map_or(0, |a| a.virtual_tokens());
        let wanted = request.prompt.len().saturating_add(virtual_tokens).saturating_add(request.max_tokens);
        if wanted > self.context_length() {
            let of_adapter =
                if virtual_tokens > 0 { format!(", {virtual_tokens} of the adapter") } else { String::new() };
            return invalid(
                "max_tokens",
                format!(
                    "{} tokens of prompt{of_adapter} and {} to write are more than the {} that a text may have",
                    request.prompt.len(),
                    request.max_tokens,
                    self.context_length()
                ),
            );
        }
        if request.stop.iter().any(String::is_empty) {
            return invalid("stop", "an empty string stops everything".into());
        }
        if !request.stop.is_empty() && self.tokenizer.is_none() {
            return invalid("stop", "the engine was started without a tokenizer, and strings need one".into());
        }
        match request.sampling.check() {
            Err(peft_core::Error::Config { key, message }) => {
                let known = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"];
                let others = ["frequency_penalty", "logit_bias"];
                let field = known.into_iter().chain(others).find(|name| *name == key).unwrap_or("sampling");
                invalid(field, message)
            }
            Err(other) => invalid("sampling", other.to_string()),
            Ok(()) => Ok(()),
        }
    }

    /// What it holds and has done.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let c = &self.counters;
        let (size, count) = (|n: &AtomicUsize| n.load(Ordering::Relaxed), |n: &AtomicU64| n.load(Ordering::Relaxed));
        EngineStats {
            waiting: size(&c.waiting),
            running: size(&c.running),
            cache_used: size(&c.cache_used),
            cache_tokens: self.options.cache_tokens,
            steps: count(&c.steps),
            prompt_tokens: count(&c.prompt_tokens),
            written_tokens: count(&c.written_tokens),
            finished: count(&c.finished),
            failed: count(&c.failed),
            cancelled: count(&c.cancelled),
        }
    }

    /// Takes no more requests; those that are there are finished.
    pub fn shutdown(&self) {
        // An engine that has stopped need not be told.
        let _ = self.commands.send(Command::Stop);
    }

    /// Waits until all requests are finished after [`Engine::shutdown`].
    pub async fn stopped(&self) {
        // An error says that the thread is gone, which is as well.
        let _ = self.stopped.clone().wait_for(|stopped| *stopped).await;
    }

    /// Whether the compute thread is there.
    #[must_use]
    pub fn is_running(&self) -> bool {
        !*self.stopped.borrow() && !self.commands.is_closed()
    }
}

/// The events of one request, as they come. It is a [`Stream`] as well; without [`Event::Finished`] or [`Event::Failed`] at its
/// end, the engine has died.
#[derive(Debug)]
pub struct Answer {
    events: mpsc::UnboundedReceiver<Event>,
}

/// An answer with all its tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Complete {
    /// The tokens.
    pub ids: Vec<u32>,
    /// The text, for an engine with a tokenizer.
    pub text: String,
    /// Log-probabilities of the tokens, where they were asked for.
    pub logprobs: Vec<Logprobs>,
    /// Why it is at its end.
    pub reason: FinishReason,
}

impl Answer {
    /// The next event; `None` behind the last.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Waits for the whole answer.
    ///
    /// # Errors
    /// Why the text could not go on.
    pub async fn complete(mut self) -> Result<Complete, String> {
        let mut all = Complete::default();
        while let Some(event) = self.next().await {
            if all.take(event)? {
                return Ok(all);
            }
        }
        Err(GONE.into())
    }

    /// As [`Answer::complete`], for a thread that may wait; not for one of an async runtime.
    ///
    /// # Errors
    /// Why the text could not go on.
    pub fn complete_blocking(mut self) -> Result<Complete, String> {
        let mut all = Complete::default();
        while let Some(event) = self.events.blocking_recv() {
            if all.take(event)? {
                return Ok(all);
            }
        }
        Err(GONE.into())
    }
}

const GONE: &str = "the engine has stopped";

impl Default for Complete {
    fn default() -> Self {
        Self { ids: Vec::new(), text: String::new(), logprobs: Vec::new(), reason: FinishReason::Stop }
    }
}

impl Complete {
    /// Adds what an event says. Whether it was the last.
    fn take(&mut self, event: Event) -> Result<bool, String> {
        match event {
            Event::Token(token) => {
                self.ids.push(token.id);
                self.text.push_str(&token.text);
                self.logprobs.extend(token.logprobs);
                Ok(false)
            }
            Event::Finished(end) => {
                self.text.push_str(&end.text);
                self.reason = end.reason;
                Ok(true)
            }
            Event::Failed(message) => Err(message),
        }
    }
}

impl Stream for Answer {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.events.poll_recv(cx)
    }
}
