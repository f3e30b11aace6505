//! An OpenAI-compatible API as a source of log-probabilities.
//!
//! `/completions` is sent prompt and answer as one text and echoes it with the log-probability of every token (`echo`, `logprobs`).
//! `/chat/completions` gives those of the likeliest first tokens of its own answer (`top_logprobs`), which is enough where the
//! answers to choose from begin differently. What comes back is not trusted: every number that is used is checked.

use std::time::Duration;

use peft_core::suggest::did_you_mean;
use serde::Deserialize;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::Uri;

use crate::data::Score;
use crate::recipe::EndpointTable;

/// Texts in one request.
const TEXTS: usize = 64;
/// The largest answer, in bytes.
const MAX_ANSWER: u64 = 64 << 20;
/// Tokens that a chat API is asked for: the most that OpenAI's takes.
const TOP: usize = 20;
/// The longest pause before another try, in seconds.
const MAX_WAIT: u64 = 60;
/// A log-probability above 0 by more than rounding is none.
const ROUNDING: f64 = 1e-3;

/// What can go wrong with an endpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// A setting that cannot be used.
    #[error("`{name}` {why}")]
    Setting {
        /// The key of the recipe.
        name: &'static str,
        /// What is wrong with it, and the way out.
        why: String,
    },
    /// The server cannot be reached, or went away.
    #[error("{url}: {why}")]
    Connection {
        /// The address.
        url: String,
        /// What the network said.
        why: String,
    },
    /// The server refused.
    #[error("{url}: HTTP {status}{why}")]
    Status {
        /// The address.
        url: String,
        /// The status.
        status: u16,
        /// The server's words, and the way out.
        why: String,
    },
    /// The answer is not what the API promises.
    #[error("{url}: {why}")]
    Answer {
        /// The address.
        url: String,
        /// What is wrong with it, and the way out.
        why: String,
    },
}

/// Result of a question to an endpoint.
pub(super) type Result<T, E = EndpointError> = std::result::Result<T, E>;

/// Which of the API's two questions is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    /// `/completions` with `echo` and `logprobs`.
    Completions,
    /// `/chat/completions` with `top_logprobs`.
    Chat,
}

/// How to ask.
#[derive(Clone)]
pub struct EndpointOptions {
    /// Address up to the version: `http://localhost:8000/v1`.
    pub url: String,
    /// The model's name there.
    pub model: String,
    /// Which question.
    pub api: Api,
    /// The API key.
    pub key: Option<String>,
    /// How long an answer may take.
    pub timeout: Duration,
    /// How often a request is sent again.
    pub retries: u32,
    /// The pause before the first of these; it doubles.
    pub retry_wait: Duration,
}

impl std::fmt::Debug for EndpointOptions {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EndpointOptions")
            .field("url", &self.url)
            .field("model", &self.model)
            .field("api", &self.api)
            .finish_non_exhaustive()
    }
}

impl EndpointOptions {
    /// The `[endpoint]` table of a recipe, with the API key from the variable that it names (`variable` reads it).
    ///
    /// # Errors
    /// A key that is missing or out of range, a variable that is not set.
    pub fn of_table(table: &EndpointTable, variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let setting = |name, why: String| Err(EndpointError::Setting { name, why });
        let Some(url) = table.url.as_deref().map(|url| url.trim_end_matches('/').to_owned()) else {
            return setting("endpoint.url", "is not given; it is an address such as http://localhost:8000/v1".into());
        };
        let parsed: Option<Uri> = url.parse().ok();
        if !parsed.is_some_and(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some()) {
            return setting(
                "endpoint.url",
                format!("is {url:?}, which is no address such as http://localhost:8000/v1"),
            );
        }
        let Some(model) = table.model.clone() else {
            return setting("endpoint.model", "is not given; it is the model's name at the endpoint".into());
        };
        let api = match table.api.as_str() {
            "completions" => Api::Completions,
            "chat" => Api::Chat,
            other => {
                let near = did_you_mean(other, ["completions", "chat"]);
                return setting("endpoint.api", format!("is {other:?}, neither \"completions\" nor \"chat\"{near}"));
            }
        };
        if !(table.timeout > 0.0 && table.timeout <= 86_400.0) {
            return setting("endpoint.timeout", format!("is {}; it is a number of seconds above 0", table.timeout));
        }
        let key = match &table.api_key_env {
            None => None,
            Some(name) => match variable(name).filter(|key| !key.is_empty()) {
                None => return setting("endpoint.api_key_env", format!("names {name}, and that variable is not set")),
                Some(key) if !key.bytes().all(|b| b.is_ascii_graphic()) => {
                    return setting(
                        "endpoint.api_key_env",
                        format!("names {name}, which holds characters that no key has"),
                    );
                }
                Some(key) => Some(key),
            },
        };
        Ok(Self {
            url,
            model,
            api,
            key,
            timeout: Duration::from_secs_f64(table.timeout),
            retries: table.retries.min(10),
            retry_wait: Duration::from_secs(1),
        })
    }
}

/// A text and the answers that may follow it.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// What comes before the answer.
    pub prompt: String,
    /// The answers.
    pub answers: Vec<String>,
}

/// A connection to one endpoint.
#[derive(Debug)]
pub struct Endpoint {
    agent: Agent,
    options: EndpointOptions,
}

#[derive(Deserialize)]
struct Completions {
    choices: Vec<Completion>,
}

#[derive(Deserialize)]
struct Completion {
    index: Option<usize>,
    logprobs: Option<TokenLogprobs>,
}

#[derive(Deserialize)]
struct TokenLogprobs {
    #[serde(default)]
    tokens: Vec<String>,
    #[serde(default)]
    token_logprobs: Vec<Option<f64>>,
    #[serde(default)]
    text_offset: Vec<usize>,
}

#[derive(Deserialize)]
struct Chats {
    choices: Vec<Chat>,
}

#[derive(Deserialize)]
struct Chat {
    logprobs: Option<ChatLogprobs>,
}

#[derive(Deserialize)]
struct ChatLogprobs {
    content: Option<Vec<ChatToken>>,
}

#[derive(Deserialize)]
struct ChatToken {
    #[serde(default)]
    top_logprobs: Vec<TopLogprob>,
}

#[derive(Deserialize)]
struct TopLogprob {
    token: String,
    logprob: f64,
}

impl Endpoint {
    /// A connection; nothing is sent yet.
    #[must_use]
    pub fn new(options: EndpointOptions) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0) // the key stays with the address that the user gave
            .timeout_global(Some(options.timeout))
            .user_agent(concat!("peft-cli/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        Self { agent, options }
    }

    /// How likely each answer of each question is.
    ///
    /// # Errors
    /// A server that cannot be reached, refuses, or gives no usable log-probabilities; the message names the address.
    pub fn scores(&self, questions: &[Question]) -> Result<Vec<Vec<Score>>> {
        match self.options.api {
            Api::Completions => self.completions(questions),
            Api::Chat => questions.iter().map(|question| self.chat(question)).collect(),
        }
    }

    fn completions(&self, questions: &[Question]) -> Result<Vec<Vec<Score>>> {
        let url = format!("{}/completions", self.options.url);
        let pairs: Vec<(&str, &str)> = questions
            .iter()
            .flat_map(|q| q.answers.iter().map(|answer| (q.prompt.as_str(), answer.as_str())))
            .collect();
        let mut scores = Vec::with_capacity(pairs.len());
        for part in pairs.chunks(TEXTS) {
            let texts: Vec<String> = part.iter().map(|(prompt, answer)| format!("{prompt}{answer}")).collect();
            // One token is asked for, since not every server takes none; it stands behind the text and is not counted.
            let body = json!({"model": self.options.model, "prompt": texts, "max_tokens": 1, "temperature": 0,
                "logprobs": 1, "echo": true});
            let answer: Completions = self.ask(&url, &body)?;
            let bad = |why: String| EndpointError::Answer { url: url.clone(), why };
            if answer.choices.len() != part.len() {
                return Err(bad(format!("{} texts were sent, and {} came back", part.len(), answer.choices.len())));
            }
            let mut of_part: Vec<Option<Score>> = vec![None; part.len()];
            for (place, choice) in answer.choices.into_iter().enumerate() {
                let index = choice.index.unwrap_or(place);
                let (Some(slot), Some((prompt, text))) = (of_part.get_mut(index), part.get(index)) else {
                    return Err(bad(format!("a choice has index {index}, and {} texts were sent", part.len())));
                };
                let logprobs = choice.logprobs.ok_or_else(|| bad(no_logprobs()))?;
                *slot = Some(score(prompt, text, &logprobs).map_err(bad)?);
            }
            let all = of_part.into_iter().collect::<Option<Vec<_>>>();
            scores.extend(all.ok_or_else(|| bad("two choices have one index".into()))?);
        }
        let mut scores = scores.into_iter();
        Ok(questions.iter().map(|q| scores.by_ref().take(q.answers.len()).collect()).collect())
    }

    fn chat(&self, question: &Question) -> Result<Vec<Score>> {
        let url = format!("{}/chat/completions", self.options.url);
        let body = json!({"model": self.options.model, "messages": [{"role": "user", "content": question.prompt}],
            "max_tokens": 1, "temperature": 0, "logprobs": true, "top_logprobs": TOP});
        let answer: Chats = self.ask(&url, &body)?;
        let bad = |why: String| EndpointError::Answer { url: url.clone(), why };
        let first = answer.choices.into_iter().next().and_then(|c| c.logprobs).and_then(|l| l.content);
        let first = first.and_then(|tokens| tokens.into_iter().next()).filter(|token| !token.top_logprobs.is_empty());
        first_tokens(&question.answers, &first.ok_or_else(|| bad(no_logprobs()))?.top_logprobs).map_err(bad)
    }

    /// Sends a request until there is an answer, and reads that.
    fn ask<T: for<'de> Deserialize<'de>>(&self, url: &str, body: &Value) -> Result<T> {
        let mut tries = 0;
        loop {
            let (error, wait) = match self.ask_once(url, body) {
                Ok(text) => {
                    return serde_json::from_str(&text).map_err(|e| EndpointError::Answer {
                        url: url.to_owned(),
                        why: format!("the answer is not that of an OpenAI-compatible API: {e}"),
                    });
                }
                Err(failed) => failed,
            };
            let Some(wait) = wait.filter(|_| tries < self.options.retries) else { return Err(error) };
            std::thread::sleep(wait.max(self.options.retry_wait * (1 << tries.min(6))));
            tries += 1;
        }
    }

    /// The text of an answer; or what went wrong and, where another try may help, how long the server asks to wait.
    fn ask_once(&self, url: &str, body: &Value) -> Result<String, (EndpointError, Option<Duration>)> {
        let connection = |why: String| EndpointError::Connection { url: url.to_owned(), why };
        let mut request = self.agent.post(url).header("content-type", "application/json");
        if let Some(key) = &self.options.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response =
            request.send(body.to_string()).map_err(|e| (connection(e.to_string()), Some(Duration::ZERO)))?;
        let status = response.status().as_u16();
        let asked = response.headers().get("retry-after").and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        let text = response.body_mut().with_config().limit(MAX_ANSWER).read_to_string();
        if response.status().is_success() {
            let too_large = |e: ureq::Error| match e {
                ureq::Error::BodyExceedsLimit(_) => (connection(e.to_string()), None),
                other => (connection(other.to_string()), Some(Duration::ZERO)),
            };
            return text.map_err(too_large);
        }
        let hint = match status {
            401 | 403 => "; name the variable that holds the API key in endpoint.api_key_env",
            404 => "; endpoint.url ends with the version (…/v1), and endpoint.model is a model of the server",
            300..=399 => "; it points elsewhere: give endpoint.url that address",
            _ => "",
        };
        let error = EndpointError::Status {
            url: url.to_owned(),
            status,
            why: format!("{}{hint}", said(&text.unwrap_or_default())),
        };
        let again = status == 408 || status == 429 || status >= 500;
        Err((error, again.then(|| Duration::from_secs(asked.unwrap_or(0).min(MAX_WAIT)))))
    }
}

/// The server's own words about an error, on one line and not too many.
fn said(text: &str) -> String {
    let message = serde_json::from_str::<Value>(text).ok().and_then(|v| {
        let error = v.get("error").unwrap_or(&v);
        error.as_str().or_else(|| error.get("message")?.as_str()).map(str::to_owned)
    });
    let line: String = message
        .unwrap_or_else(|| text.to_owned())
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(200)
        .collect();
    if line.trim().is_empty() { String::new() } else { format!(" ({})", line.trim()) }
}

fn no_logprobs() -> String {
    "the answer has no log-probabilities: the server does not give them for this model (completions need echo and logprobs; \
     endpoint.api = \"chat\" needs top_logprobs)"
        .into()
}

fn checked(logprob: Option<f64>, token: &str) -> Result<f64, String> {
    match logprob {
        Some(value) if value.is_finite() && value <= ROUNDING => Ok(value.min(0.0)),
        Some(value) => Err(format!("the log-probability of {token:?} is {value}; it must be a number up to 0")),
        None => Err(format!("{token:?} has no log-probability")),
    }
}

/// The likelihood of the tokens of `answer`, which follows `prompt`: of all that end behind the prompt and begin before the text
/// ends.
fn score(prompt: &str, answer: &str, logprobs: &TokenLogprobs) -> Result<Score, String> {
    let TokenLogprobs { tokens, token_logprobs, text_offset } = logprobs;
    if tokens.is_empty() || tokens.len() != token_logprobs.len() {
        return Err(format!("{} tokens with {} log-probabilities came back", tokens.len(), token_logprobs.len()));
    }
    let lengths = || tokens.iter().map(|t| t.chars().count());
    let (boundary, end) = (prompt.chars().count(), prompt.chars().count() + answer.chars().count());
    // Where the tokens spell the text, their own lengths say where each begins (a server may count a begin token's name in its
    // offsets); where they are parts of characters, the offsets do.
    let (spelled, text) = (tokens.concat(), format!("{prompt}{answer}"));
    let starts: Vec<usize> = match spelled.find(&text).and_then(|at| spelled.get(..at)) {
        Some(before) => {
            let shift = before.chars().count();
            lengths()
                .scan(0usize, |next, length| Some(std::mem::replace(next, *next + length)))
                .map(|s| s.saturating_sub(shift))
                .collect()
        }
        None if text_offset.len() == tokens.len() && text_offset.is_sorted() => text_offset.clone(),
        None => return Err("the tokens do not spell the text that was sent, and have no places (text_offset)".into()),
    };
    let mut score = Score::default();
    let (mut first, mut last) = (usize::MAX, 0);
    for (i, start) in starts.iter().enumerate() {
        let own_end = start.saturating_add(lengths().nth(i).unwrap_or(0));
        let ends = starts.get(i + 1).copied().unwrap_or(own_end);
        if ends > boundary && *start < end {
            let token = tokens.get(i).map(String::as_str).unwrap_or_default();
            score.nll -= checked(token_logprobs.get(i).copied().flatten(), token)?;
            score.tokens += 1;
            (first, last) = (first.min(*start), ends);
        }
    }
    if score.tokens == 0 || first > boundary || last < end {
        return Err(
            "the text that was sent does not come back with log-probabilities: the server does not honour `echo`; use \
                    endpoint.api = \"chat\" if it has top_logprobs"
                .into(),
        );
    }
    score.nll_of_text = score.nll;
    Ok(score)
}

/// The likelihood of each answer's first token, whatever the space in front of it: of all tokens that it begins with and no other
/// does. An answer that has none among them is as unlikely as the least of them.
fn first_tokens(answers: &[String], top: &[TopLogprob]) -> Result<Vec<Score>, String> {
    let mut shares = vec![0.0f64; answers.len()];
    let mut least = 0.0f64;
    for TopLogprob { token, logprob } in top {
        let logprob = checked(Some(*logprob), token)?;
        least = least.min(logprob);
        let word = token.trim();
        let begins = |answer: &String| !word.is_empty() && answer.trim_start().starts_with(word);
        let mut of: Vec<usize> = answers.iter().enumerate().filter(|(_, a)| begins(a)).map(|(i, _)| i).collect();
        match (of.pop(), of.pop()) {
            (Some(b), Some(a)) => {
                let name = |i: usize| answers.get(i).map(String::as_str).unwrap_or_default();
                return Err(format!(
                    "{:?} and {:?} both begin with the token {token:?}, and a chat API gives one token: choose answers that begin \
                     differently, or endpoint.api = \"completions\"",
                    name(a),
                    name(b)
                ));
            }
            (Some(only), None) => shares.iter_mut().skip(only).take(1).for_each(|share| *share += logprob.exp()),
            _ => {}
        }
    }
    let score = |share: &f64| {
        let nll = if *share > 0.0 { -share.ln().min(0.0) } else { -least };
        Score { nll, nll_of_text: nll, tokens: 1 }
    };
    Ok(shares.iter().map(score).collect())
}

#[cfg(test)]
mod tests;
