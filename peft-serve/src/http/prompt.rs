//! From the fields of a request to what the engine is asked.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::body::{Fields, Prompt};
use super::keys::Access;
use super::{ApiError, Shared};
use crate::registry::Generation;
use crate::request::Request;

/// Which of OpenAI's two kinds of text is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Completion,
    Chat,
}

/// Requests of one call, in the order of their choices, and the tokens of all prompts.
pub(super) struct Asked {
    pub(super) requests: Vec<Request>,
    pub(super) prompt_tokens: usize,
}

/// Tokens that a completion gets that names no number, as OpenAI's does.
const COMPLETION_TOKENS: usize = 16;

impl Shared {
    /// Opens the adapter, if need be, and tokenises the prompts; it may take a while.
    pub(super) fn ask(&self, fields: &Fields, kind: Kind, access: &Access) -> Result<Asked, ApiError> {
        fields.check()?;
        let adapter = self.adapter(&fields.model, access)?;
        let (n, stop, logprobs) = (fields.choices()?, fields.stop()?, fields.logprobs()?);
        let sampling = fields.sampling(RandomState::new().hash_one(self.started))?;
        let prompts = match kind {
            Kind::Completion => self.prompts(fields)?,
            Kind::Chat => vec![self.conversation(fields)?],
        };
        let choices = prompts.len().saturating_mul(n);
        if choices > self.options.max_choices {
            let message = format!("{choices} answers are more than the {} of one request", self.options.max_choices);
            return Err(ApiError::invalid(if n > 1 { "n" } else { "prompt" }, message));
        }
        let constraint = match fields.grammar()? {
            Some((field, grammar)) => {
                let made = self.parts.engine.constraint(&grammar);
                Some(made.map_err(|why| ApiError::invalid(field, why))?)
            }
            None => None,
        };
        let virtual_tokens = adapter.as_ref().map_or(0, |a| a.virtual_tokens());
        let mut requests = Vec::with_capacity(choices);
        for prompt in &prompts {
            let max_tokens = self.max_tokens(fields, kind, prompt.len() + virtual_tokens)?;
            for i in 0..n {
                let mut sampling = sampling.clone();
                sampling.seed = sampling.seed.wrapping_add(i as u64);
                requests.push(Request {
                    prompt: prompt.clone(),
                    adapter: adapter.clone(),
                    sampling,
                    max_tokens,
                    stop_tokens: self.parts.tokenizer.eos_token_ids().to_vec(),
                    stop: stop.clone(),
                    logprobs,
                    constraint: constraint.clone(),
                });
            }
        }
        Ok(Asked { requests, prompt_tokens: prompts.iter().map(Vec::len).sum() })
    }

    fn adapter(&self, model: &str, access: &Access) -> Result<Option<Arc<Generation>>, ApiError> {
        access.check(model)?;
        if model == self.options.model {
            return Ok(None);
        }
        self.parts.registry.lease(model).map(Some).map_err(|e| access.tell(e))
    }

    fn max_tokens(&self, fields: &Fields, kind: Kind, before: usize) -> Result<usize, ApiError> {
        let limit = self.options.max_tokens;
        let (field, given) = match (fields.max_completion_tokens, fields.max_tokens) {
            (Some(n), _) => ("max_completion_tokens", Some(n)),
            (None, n) => ("max_tokens", n),
        };
        match given {
            Some(n) if n > limit => {
                Err(ApiError::invalid(field, format!("{n} is more than the {limit} of this server")))
            }
            Some(n) => Ok(n),
            // What is left; a prompt that leaves nothing is refused for what it is.
            None => {
                let room = self.parts.engine.context_length().saturating_sub(before).max(1);
                Ok(room.min(if kind == Kind::Chat { limit } else { COMPLETION_TOKENS.min(limit) }))
            }
        }
    }

    fn prompts(&self, fields: &Fields) -> Result<Vec<Vec<u32>>, ApiError> {
        let encode = |text: &String| {
            self.parts.tokenizer.encode(text, true).map_err(|e| ApiError::invalid("prompt", e.to_string()))
        };
        match &fields.prompt {
            None => Err(ApiError::invalid("prompt", "is missing")),
            Some(Prompt::Text(text)) => Ok(vec![encode(text)?]),
            Some(Prompt::Tokens(ids)) => Ok(vec![ids.clone()]),
            // Tokenising is work; what is too many is refused before.
            Some(Prompt::Texts(texts)) => texts.iter().take(self.options.max_choices + 1).map(encode).collect(),
            Some(Prompt::ManyTokens(many)) => Ok(many.clone()),
        }
    }

    fn conversation(&self, fields: &Fields) -> Result<Vec<u32>, ApiError> {
        let Some(chat) = &self.parts.chat else {
            let message = "the model's tokenizer has no chat template; use /v1/completions";
            return Err(ApiError::invalid("messages", message));
        };
        let messages = fields.messages.as_ref().filter(|m| !m.is_empty());
        let messages = messages.ok_or_else(|| ApiError::invalid("messages", "is missing or empty"))?;
        let messages = messages.iter().enumerate().map(|(i, m)| message(i, m)).collect::<Result<Vec<_>, _>>()?;
        let text = chat(&messages, &Map::new()).map_err(|e| ApiError::invalid("messages", e))?;
        self.parts.tokenizer.encode(&text, false).map_err(|e| ApiError::invalid("messages", e.to_string()))
    }
}

/// A message as templates read it: its content is one text.
fn message(i: usize, given: &Value) -> Result<Value, ApiError> {
    let at = |key: &str| format!("messages[{i}].{key}");
    let fields = given.as_object().ok_or_else(|| ApiError::invalid(format!("messages[{i}]"), "is not an object"))?;
    let role = fields.get("role").and_then(Value::as_str);
    let role = role.ok_or_else(|| ApiError::invalid(at("role"), "is missing, or not a string"))?;
    let content = match fields.get("content") {
        Some(Value::String(text)) => text.clone(),
        None | Some(Value::Null) if role == "assistant" => String::new(),
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for (j, part) in parts.iter().enumerate() {
                match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
                    (Some("text"), Some(part)) => text.push_str(part),
                    _ => return Err(ApiError::invalid(at(&format!("content[{j}]")), "is not a part of type text")),
                }
            }
            text
        }
        _ => return Err(ApiError::invalid(at("content"), "is not a string or a list of parts")),
    };
    let mut message = json!({"role": role, "content": content});
    if let (Some(name), Some(map)) = (fields.get("name"), message.as_object_mut()) {
        map.insert("name".into(), name.clone());
    }
    Ok(message)
}
