//! Completions and chats: one call, its choices, and what is said of them.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use futures_util::StreamExt;
use futures_util::stream::{BoxStream, SelectAll};
use serde_json::{Value, json};

use super::body::Fields;
use super::prompt::{Asked, Kind};
use super::{ApiError, Shared, answer_json, body, seconds, stream};
use crate::request::{Event, FinishReason, Logprobs, Token};

/// `POST /v1/completions`
pub(super) async fn completions(State(shared): State<Arc<Shared>>, request: Request) -> Result<Response, ApiError> {
    respond(shared, request, Kind::Completion).await
}

/// `POST /v1/chat/completions`
pub(super) async fn chat(State(shared): State<Arc<Shared>>, request: Request) -> Result<Response, ApiError> {
    respond(shared, request, Kind::Chat).await
}

/// The events of all choices, each with the choice's number.
pub(super) type Choices = SelectAll<BoxStream<'static, (usize, Event)>>;

async fn respond(shared: Arc<Shared>, request: Request, kind: Kind) -> Result<Response, ApiError> {
    let access = shared.keys.check_user(request.headers())?;
    let began = Instant::now();
    let (parts, body) = request.into_parts();
    let fields: Fields = body::read(&parts.headers, body, &shared.options).await?;
    let asking = shared.clone();
    let asked = tokio::task::spawn_blocking(move || asking.ask(&fields, kind, &access).map(|asked| (asked, fields)));
    let (asked, fields) = asked.await.map_err(|_| ApiError::internal("the prompt could not be prepared"))??;
    let Asked { requests, prompt_tokens } = asked;
    let mut choices: Choices = SelectAll::new();
    let count = requests.len();
    for (i, request) in requests.into_iter().enumerate() {
        // If one is refused, those before it are dropped, which cancels them.
        choices.push(shared.parts.engine.submit(request)?.map(move |event| (i, event)).boxed());
    }
    let call = Call::new(shared, kind, fields.model, began, prompt_tokens, count);
    if fields.stream == Some(true) {
        let usage = fields.stream_options.is_some_and(|o| o.include_usage == Some(true));
        return Ok(stream::respond(call, choices, usage));
    }
    collect(call, choices).await
}

/// One call, which is written to the log when it is over.
pub(super) struct Call {
    shared: Arc<Shared>,
    pub(super) kind: Kind,
    id: String,
    created: u64,
    model: String,
    began: Instant,
    prompt_tokens: usize,
    pub(super) choices: usize,
    written: usize,
    outcome: &'static str,
}

impl Call {
    fn new(
        shared: Arc<Shared>,
        kind: Kind,
        model: String,
        began: Instant,
        prompt_tokens: usize,
        choices: usize,
    ) -> Self {
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{:x}-{:x}", shared.started, shared.next_request());
        let created = seconds(SystemTime::now());
        Self { shared, kind, id, created, model, began, prompt_tokens, choices, written: 0, outcome: "cancelled" }
    }

    /// When it has to be over.
    pub(super) fn deadline(&self) -> tokio::time::Instant {
        (self.began + self.shared.options.timeout).into()
    }

    pub(super) fn timed_out(&mut self) -> ApiError {
        self.outcome = "timeout";
        ApiError::timeout(format!("the answer took longer than {} s", self.shared.options.timeout.as_secs()))
    }

    pub(super) fn failed(&mut self, message: &str) -> ApiError {
        self.outcome = "failed";
        ApiError::internal(message)
    }

    pub(super) fn finished(&mut self) {
        self.outcome = "finished";
    }

    /// Counts a written token.
    pub(super) fn wrote(&mut self) {
        if self.written == 0 {
            self.shared.metrics.first_token(self.began.elapsed().as_secs_f64());
        }
        self.written += 1;
    }

    /// An object with the fields that all answers and pieces of answers have.
    pub(super) fn object(&self, piece: bool, choices: Vec<Value>) -> Value {
        let object = match (self.kind, piece) {
            (Kind::Completion, _) => "text_completion",
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
        };
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
        })
    }

    pub(super) fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.written,
            "total_tokens": self.prompt_tokens + self.written,
        })
    }

    fn token_text(&self, id: u32) -> String {
        self.shared.parts.tokenizer.decode(&[id], false).unwrap_or_default()
    }

    /// Log-probabilities of tokens in the shape of the call's kind; `offset` is where the first one's text begins, in characters.
    pub(super) fn logprobs(&self, tokens: &[(u32, Logprobs)], offset: &mut usize) -> Value {
        if tokens.is_empty() {
            return Value::Null;
        }
        if self.kind == Kind::Chat {
            let one = |id: u32, logprob: f32| {
                let text = self.token_text(id);
                // A part of a character has no text of its own.
                let bytes = (!text.contains('\u{FFFD}')).then(|| text.bytes().collect::<Vec<u8>>());
                json!({"token": text, "logprob": finite(logprob), "bytes": bytes})
            };
            let content = tokens.iter().map(|(id, logprobs)| {
                let mut token = one(*id, logprobs.chosen);
                let top: Vec<Value> = logprobs.top.iter().map(|(id, x)| one(*id, *x)).collect();
                token["top_logprobs"] = top.into();
                token
            });
            return json!({"content": content.collect::<Vec<_>>(), "refusal": null});
        }
        let (mut texts, mut chosen, mut top, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (id, logprobs) in tokens {
            let text = self.token_text(*id);
            offsets.push(*offset);
            *offset += text.chars().count();
            texts.push(text);
            chosen.push(finite(logprobs.chosen));
            let likeliest = logprobs.top.iter().map(|(id, x)| (self.token_text(*id), finite(*x).into()));
            top.push(Value::Object(likeliest.collect()));
        }
        json!({"tokens": texts, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets})
    }
}

/// JSON has no infinity; OpenAI's stand-in for what is not likely at all.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

pub(super) fn reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let seconds = self.began.elapsed().as_secs_f64();
        self.shared.metrics.whole(seconds);
        tracing::info!(
            id = self.id,
            model = self.model,
            outcome = self.outcome,
            choices = self.choices,
            prompt_tokens = self.prompt_tokens,
            written_tokens = self.written,
            seconds,
            "answered"
        );
    }
}

/// A choice as far as it has come.
#[derive(Default)]
struct Choice {
    text: String,
    logprobs: Vec<(u32, Logprobs)>,
    reason: Option<FinishReason>,
}

/// Waits for all choices.
async fn collect(mut call: Call, mut choices: Choices) -> Result<Response, ApiError> {
    let mut made: Vec<Choice> = (0..call.choices).map(|_| Choice::default()).collect();
    let deadline = call.deadline();
    loop {
        let Ok(next) = tokio::time::timeout_at(deadline, choices.next()).await else { return Err(call.timed_out()) };
        let Some((i, event)) = next else { break };
        let Some(choice) = made.get_mut(i) else { continue };
        match event {
            Event::Token(Token { id, text, logprobs }) => {
                call.wrote();
                choice.text.push_str(&text);
                choice.logprobs.extend(logprobs.map(|logprobs| (id, logprobs)));
            }
            Event::Finished(end) => {
                choice.text.push_str(&end.text);
                choice.reason = Some(end.reason);
            }
            Event::Failed(message) => return Err(call.failed(&message)),
        }
    }
    let mut values = Vec::with_capacity(made.len());
    for (index, choice) in made.into_iter().enumerate() {
        let Some(end) = choice.reason else { return Err(call.failed("the engine has stopped")) };
        let logprobs = call.logprobs(&choice.logprobs, &mut 0);
        let mut value = json!({"index": index, "logprobs": logprobs, "finish_reason": reason(end)});
        match call.kind {
            Kind::Completion => value["text"] = choice.text.into(),
            Kind::Chat => value["message"] = json!({"role": "assistant", "content": choice.text, "refusal": null}),
        }
        values.push(value);
    }
    call.finished();
    let mut answer = call.object(false, values);
    answer["usage"] = call.usage();
    Ok(answer_json(StatusCode::OK, &answer))
}
