//! What the engine is asked, and what it answers.

use std::sync::Arc;

use peft_models::sampling::Sampling;

use crate::grammar::Constraint;
use crate::registry::Generation;

/// A text to go on with.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt's tokens, at least one.
    pub prompt: Vec<u32>,
    /// The adapter, `None` for the base alone.
    pub adapter: Option<Arc<Generation>>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens to write, at most; at least one.
    pub max_tokens: usize,
    /// Tokens that end the text; they are not part of it.
    pub stop_tokens: Vec<u32>,
    /// Strings that end the text; they are not part of it. For an engine with a tokenizer.
    pub stop: Vec<String>,
    /// Asks for the log-probability of every token, and for so many of the likeliest ones beside it.
    pub logprobs: Option<usize>,
    /// The form that the text has to have ([`crate::Engine::constraint`]); it then ends where the form is complete.
    pub constraint: Option<Constraint>,
}

impl Request {
    /// A request to write up to `max_tokens` behind `prompt`, each the likeliest.
    #[must_use]
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
            adapter: None,
            sampling: Sampling::default(),
            max_tokens,
            stop_tokens: Vec::new(),
            stop: Vec::new(),
            logprobs: None,
            constraint: None,
        }
    }
}

/// One thing that happened to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token was written.
    Token(Token),
    /// The text is at its end; the last event.
    Finished(Finished),
    /// The text cannot go on; the last event. The message says why.
    Failed(String),
}

/// A token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its number.
    pub id: u32,
    /// The text that is certain now. A token may add none, and what a later one adds may begin with what this one said.
    pub text: String,
    /// Where they were asked for.
    pub logprobs: Option<Logprobs>,
}

/// Natural logarithms of probabilities, by the model's own logits, before any penalty or temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// That of the token.
    pub chosen: f32,
    /// The likeliest tokens with theirs, the likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Why a text is at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token or a stop string came.
    Stop,
    /// There are as many tokens as were asked for.
    Length,
}

/// The end of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// Text that had been held back.
    pub text: String,
}

/// Why the engine does not take a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Something about the request is wrong.
    #[error("`{field}`: {message}")]
    Invalid {
        /// Which part of it.
        field: &'static str,
        /// What is wrong.
        message: String,
    },
    /// Too many requests are waiting.
    #[error("{waiting} requests are waiting already; try again later")]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// The engine is shutting down, or has stopped.
    #[error("the server is shutting down")]
    Stopping,
}
