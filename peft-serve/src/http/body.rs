//! Bodies as they come, and the fields of a request.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use futures_util::StreamExt;
use peft_models::sampling::Sampling;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{ApiError, ServerOptions};
use crate::grammar::Grammar;

/// A body of JSON, within the server's limits of size and time.
pub(super) async fn read<T: DeserializeOwned>(
    headers: &HeaderMap,
    body: Body,
    options: &ServerOptions,
) -> Result<T, ApiError> {
    let limit = options.max_body;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
    if announced.is_some_and(|n: u64| n > limit as u64) {
        return Err(ApiError::too_large(limit));
    }
    let mut chunks = body.into_data_stream();
    let mut bytes: Vec<u8> = Vec::new();
    let reading = async {
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|e| ApiError::invalid("", format!("the body cannot be read: {e}")))?;
            if bytes.len() + chunk.len() > limit {
                return Err(ApiError::too_large(limit));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(())
    };
    let patience = options.timeout.min(Duration::from_secs(30));
    tokio::time::timeout(patience, reading).await.map_err(|_| ApiError::timeout("the body took too long"))??;
    parse(&bytes)
}

/// JSON to a value; the error names the field.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // serde reads a list as an object's values in order.
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(ApiError::invalid("", "the body is a list; it has to be an object with `model` and more"));
    }
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|e| {
        let path = e.path().to_string();
        ApiError::invalid(if path == "." { "" } else { &path }, format!("{}", e.inner()))
    })?;
    reader.end().map_err(|e| ApiError::invalid("", e.to_string()))?;
    Ok(value)
}

/// One of something, or a list.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Strings {
    One(String),
    Many(Vec<String>),
}

/// What to go on with.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    ManyTokens(Vec<Vec<u32>>),
}

/// `logprobs`: a number in completions, a flag in chats.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
pub(super) enum Logprobs {
    Flag(bool),
    Number(usize),
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct StreamOptions {
    pub(super) include_usage: Option<bool>,
}

/// The fields of completions and of chats. Others are not looked at.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Fields {
    pub(super) model: String,
    pub(super) prompt: Option<Prompt>,
    pub(super) messages: Option<Vec<Value>>,
    pub(super) max_tokens: Option<usize>,
    pub(super) max_completion_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<i64>,
    stop: Option<Strings>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    n: Option<usize>,
    logprobs: Option<Logprobs>,
    top_logprobs: Option<usize>,
    // What would change the answer and is not there: a request that asks for it is refused rather than answered wrongly.
    best_of: Option<usize>,
    echo: Option<bool>,
    suffix: Option<Value>,
    tools: Option<Vec<Value>>,
    functions: Option<Vec<Value>>,
    response_format: Option<ResponseFormat>,
    grammar: Option<Form>,
}

/// OpenAI's forms of an answer.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: NamedSchema },
}

#[derive(Debug, Clone, Deserialize)]
struct NamedSchema {
    schema: Option<Map<String, Value>>,
}

/// Forms that OpenAI's API has no place for, as mistral.rs takes them.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "type", content = "value", rename_all = "snake_case")]
enum Form {
    Regex(String),
    Lark(String),
    JsonSchema(Map<String, Value>),
}

const MOST_LOGPROBS: usize = 20;
const MOST_STOPS: usize = 16;

impl Fields {
    /// Refuses what is not there.
    pub(super) fn check(&self) -> Result<(), ApiError> {
        let absent = [
            ("best_of", self.best_of.is_some_and(|n| n > 1)),
            ("echo", self.echo == Some(true)),
            ("suffix", self.suffix.is_some()),
            ("tools", self.tools.as_ref().is_some_and(|t| !t.is_empty())),
            ("functions", self.functions.as_ref().is_some_and(|t| !t.is_empty())),
        ];
        match absent.iter().find(|(_, asked)| *asked) {
            Some((name, _)) => Err(ApiError::invalid(*name, "is not supported by this server")),
            None => Ok(()),
        }
    }

    /// How many answers to each prompt.
    pub(super) fn choices(&self) -> Result<usize, ApiError> {
        match self.n.unwrap_or(1) {
            0 => Err(ApiError::invalid("n", "is 0: there is nothing to answer")),
            n => Ok(n),
        }
    }

    /// The field that asks for a form of the answer, and the form.
    pub(super) fn grammar(&self) -> Result<Option<(&'static str, Grammar)>, ApiError> {
        let format = match &self.response_format {
            None | Some(ResponseFormat::Text) => None,
            Some(ResponseFormat::JsonObject) => Some(Grammar::JsonObject),
            // Without a schema OpenAI takes any JSON.
            Some(ResponseFormat::JsonSchema { json_schema }) => {
                Some(Grammar::JsonSchema(json_schema.schema.clone().unwrap_or_default().into()))
            }
        };
        let form = self.grammar.as_ref().map(|form| match form {
            Form::Regex(pattern) => Grammar::Regex(pattern.clone()),
            Form::Lark(text) => Grammar::Lark(text.clone()),
            Form::JsonSchema(schema) => Grammar::JsonSchema(schema.clone().into()),
        });
        match (format, form) {
            (Some(_), Some(_)) => {
                Err(ApiError::invalid("grammar", "does not go with response_format: an answer has one form"))
            }
            (Some(format), None) => Ok(Some(("response_format", format))),
            (None, form) => Ok(form.map(|form| ("grammar", form))),
        }
    }

    pub(super) fn stop(&self) -> Result<Vec<String>, ApiError> {
        let stop = match &self.stop {
            None => Vec::new(),
            Some(Strings::One(one)) => vec![one.clone()],
            Some(Strings::Many(many)) => many.clone(),
        };
        if stop.len() > MOST_STOPS {
            return Err(ApiError::invalid("stop", format!("{} strings are more than {MOST_STOPS}", stop.len())));
        }
        Ok(stop)
    }

    /// How many likeliest tokens to show beside each one; nothing where none are asked for.
    pub(super) fn logprobs(&self) -> Result<Option<usize>, ApiError> {
        let (field, wanted) = match (self.logprobs, self.top_logprobs) {
            (None | Some(Logprobs::Flag(false)), None | Some(0)) => return Ok(None),
            (None | Some(Logprobs::Flag(false)), Some(_)) => {
                return Err(ApiError::invalid("top_logprobs", "goes with logprobs = true"));
            }
            (Some(Logprobs::Flag(true)), top) => ("top_logprobs", top.unwrap_or(0)),
            (Some(Logprobs::Number(n)), _) => ("logprobs", n),
        };
        if wanted > MOST_LOGPROBS {
            return Err(ApiError::invalid(field, format!("{wanted} is more than {MOST_LOGPROBS}")));
        }
        Ok(Some(wanted))
    }

    /// How tokens are chosen; `random` is the seed where none is given.
    pub(super) fn sampling(&self, random: u64) -> Result<Sampling, ApiError> {
        let none = Sampling::default();
        let mut logit_bias = Vec::new();
        for (id, bias) in self.logit_bias.iter().flatten() {
            let parsed = id.parse::<u32>();
            let id = parsed.map_err(|_| ApiError::invalid("logit_bias", format!("`{id}` is not a token's number")))?;
            logit_bias.push((id, *bias));
        }
        let sampling = Sampling {
            repetition_penalty: self.repetition_penalty.unwrap_or(none.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(none.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(none.frequency_penalty),
            logit_bias,
            temperature: self.temperature.unwrap_or(1.0),
            // −1 is all, as vLLM has it.
            top_k: self.top_k.and_then(|k| usize::try_from(k).ok()).unwrap_or(0),
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            seed: self.seed.map_or(random, |seed| seed as u64),
        };
        Ok(sampling)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_wrong_is_named() {
        for (body, names) in [
            ("", "EOF"),
            ("{", "EOF"),
            ("[]", "model"),
            (r#"{"prompt": "a"}"#, "model"),
            (r#"{"model": "m", "temperature": "warm"}"#, "`temperature`"),
            (r#"{"model": "m", "prompt": [1, "a"]}"#, "`prompt`"),
            (r#"{"model": "m", "prompt": [-1]}"#, "`prompt`"),
            (r#"{"model": "m", "logit_bias": {"5": "x"}}"#, "`logit_bias.5`"),
            (r#"{"model": "m", "stream_options": {"include_usage": 3}}"#, "`stream_options.include_usage`"),
            (r#"{"model": "m"} {}"#, "trailing"),
            (r#"{"model": "m", "n": 1e99}"#, "`n`"),
        ] {
            let error = parse::<Fields>(body.as_bytes()).unwrap_err().json().to_string();
            assert!(error.contains(names), "{body}: {error}");
        }
        assert!(parse::<Fields>(&[b'['; 100_000]).is_err());
        assert!(parse::<Fields>(b"\xff\xfe").is_err());
        let fields: Fields = parse(br#"{"model": "m", "prompt": null, "user": {"any": 1}, "top_k": -1}"#).unwrap();
        assert_eq!((fields.sampling(7).unwrap().top_k, fields.sampling(7).unwrap().seed), (0, 7));
    }
}
