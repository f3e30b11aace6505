//! Answers piece by piece, as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::sse::{Event as Sse, KeepAlive, Sse as SseResponse};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream::unfold;
use serde_json::{Value, json};

use super::answer::{Call, Choices, reason};
use super::prompt::Kind;
use crate::request::{Event, Token};

/// An answer that is being told. Dropping it, as when the client goes away, cancels what is left.
struct Telling {
    call: Call,
    choices: Choices,
    usage: bool,
    /// Pieces that are ready.
    ready: VecDeque<String>,
    /// Characters of each choice so far, for offsets.
    offsets: Vec<usize>,
    open: usize,
    over: bool,
}

pub(super) fn respond(call: Call, choices: Choices, usage: bool) -> Response {
    let (offsets, open) = (vec![0; call.choices], call.choices);
    let mut telling = Telling { call, choices, usage, ready: VecDeque::new(), offsets, open, over: false };
    if telling.call.kind == Kind::Chat {
        for index in 0..telling.call.choices {
            let delta = json!({"role": "assistant", "content": ""});
            telling.piece(json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null}));
        }
    }
    let events = unfold(telling, |mut telling| async {
        let data = telling.next().await?;
        Some((Ok::<_, Infallible>(Sse::default().data(data)), telling))
    });
    SseResponse::new(events).keep_alive(KeepAlive::default()).into_response()
}

impl Telling {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Some(data);
            }
            if self.over {
                return None;
            }
            match tokio::time::timeout_at(self.call.deadline(), self.choices.next()).await {
                Ok(Some((index, event))) => self.take(index, event),
                Ok(None) if self.open == 0 => self.end(),
                Ok(None) => self.fail("the engine has stopped"),
                Err(_) => {
                    let error = self.call.timed_out().json();
                    self.ready.push_back(error.to_string());
                    self.over = true;
                }
            }
        }
    }

    fn take(&mut self, index: usize, event: Event) {
        let (text, logprobs, end) = match event {
            Event::Token(Token { id, text, logprobs }) => {
                self.call.wrote();
                (text, logprobs.map(|logprobs| (id, logprobs)), None)
            }
            Event::Finished(end) => {
                self.open = self.open.saturating_sub(1);
                (end.text, None, Some(reason(end.reason)))
            }
            Event::Failed(message) => return self.fail(&message),
        };
        if text.is_empty() && logprobs.is_none() && end.is_none() {
            return;
        }
        let logprobs = match (logprobs, self.offsets.get_mut(index)) {
            (Some(token), Some(offset)) => self.call.logprobs(&[token], offset),
            _ => Value::Null,
        };
        let mut choice = json!({"index": index, "logprobs": logprobs, "finish_reason": end});
        match self.call.kind {
            Kind::Completion => choice["text"] = text.into(),
            Kind::Chat if text.is_empty() => choice["delta"] = json!({}),
            Kind::Chat => choice["delta"] = json!({"content": text}),
        }
        self.piece(choice);
    }

    fn piece(&mut self, choice: Value) {
        let mut piece = self.call.object(true, vec![choice]);
        if self.usage {
            piece["usage"] = Value::Null;
        }
        self.ready.push_back(piece.to_string());
    }

    fn fail(&mut self, message: &str) {
        let error = self.call.failed(message).json();
        self.ready.push_back(error.to_string());
        self.over = true;
    }

    fn end(&mut self) {
        self.call.finished();
        if self.usage {
            let mut last = self.call.object(true, Vec::new());
            last["usage"] = self.call.usage();
            self.ready.push_back(last.to_string());
        }
        self.ready.push_back("[DONE]".into());
        self.over = true;
    }
}
