//! Rows of format `preference` as answers.
//!
//! | columns | a row is |
//! |---|---|
//! | `prompt`, `chosen`, `rejected` | texts, read as `completion` rows are, or lists of messages |
//! | `prompt`, `completion`, `label` | the same with one answer, for KTO; `label` is true where it is desirable |
//! | `prompt_ids`, `chosen_ids`, `rejected_ids` (or `completion_ids`, `label`) | tokens, as they are; TRL's names |
//!
//! Of messages, those of `prompt` come in front of both answers. Without `prompt`, or where it is a text and the answers begin with
//! another turn than the assistant's, the answers are whole conversations, and what both begin with is the prompt. The assistant's
//! turns behind the prompt count.

use serde_json::Value;

use super::encode::{Encoder, Example, IGNORE_INDEX};
use super::error::DataError;
use super::render::{Rendered, Renderer, message_list, prompt_of, token_ids};
use super::source::Row;
use super::tasks::task_of;

/// A row's answers as tokens.
pub(super) enum Encoded {
    Pair(Example, Example),
    One(Example, bool),
}

impl Encoded {
    /// What stands for the row where its other answer is not looked at.
    pub(super) fn own(self) -> Example {
        match self {
            Self::Pair(own, _) | Self::One(own, _) => own,
        }
    }
}

impl Encoder<'_> {
    /// The answers of a row of format `preference`.
    pub(super) fn preferred(&self, row: &Row) -> Result<Encoded, DataError> {
        let task = self.tasks.map(|tasks| task_of(row, tasks)).transpose()?;
        let closes = || {
            match self.tokenizer {
            Some(t) if t.eos_id().is_none() => Err(DataError::Config(
                "format preference closes an answer with the end token, and the tokenizer names none; set `eos_token` in \
                 tokenizer_config.json"
                    .into(),
            )),
            _ => Ok(()),
        }
        };
        let encode = |rendered: Rendered| -> Result<Example, DataError> {
            if matches!(rendered, Rendered::Prompted { .. }) {
                closes()?;
            }
            Ok(Example { task, ..self.of_rendered(rendered, row)? })
        };
        match self.renderer.preferred(row)? {
            Answers::Pair(chosen, rejected) => {
                let same = chosen == rejected;
                let (chosen, rejected) = (encode(chosen)?, encode(rejected)?);
                if same || (&chosen.input_ids, &chosen.labels) == (&rejected.input_ids, &rejected.labels) {
                    let why = match (same, chosen.truncation.target_tokens + rejected.truncation.target_tokens > 0) {
                        (false, true) => {
                            ", once they are cut to data.max_length: raise it, or leave the row out".to_string()
                        }
                        (false, false) => " as tokens: leave the row out".to_string(),
                        (true, _) => ": leave the row out, nothing in it is preferred".to_string(),
                    };
                    return Err(DataError::row(&row.at, format!("`chosen` and `rejected` are the same{why}")));
                }
                Ok(Encoded::Pair(chosen, rejected))
            }
            Answers::One(answer, desirable) => Ok(Encoded::One(encode(answer)?, desirable)),
        }
    }
}

/// A row's answers, each with its prompt.
pub(super) enum Answers {
    Pair(Rendered, Rendered),
    One(Rendered, bool),
}

impl Renderer {
    /// The answers of a row of format `preference`.
    pub(super) fn preferred(&self, row: &Row) -> Result<Answers, DataError> {
        let has = |name: &str| row.fields.get(name).is_some_and(|v| !v.is_null());
        let tokens = ["prompt_ids", "chosen_ids", "rejected_ids", "completion_ids"].into_iter().any(has);
        let [chosen, rejected, completion] = match tokens {
            true => ["chosen_ids", "rejected_ids", "completion_ids"],
            false => ["chosen", "rejected", "completion"],
        };
        match (has(chosen) || has(rejected), has(completion)) {
            (true, true) => Err(DataError::row(
                &row.at,
                format!("has a `{completion}` beside `{chosen}` and `{rejected}`; leave one or the other out"),
            )),
            (false, true) => Ok(Answers::One(self.answer(row, completion, None)?, desirable(row)?)),
            _ => {
                let pair = (self.answer(row, chosen, Some(rejected))?, self.answer(row, rejected, Some(chosen))?);
                Ok(Answers::Pair(pair.0, pair.1))
            }
        }
    }

    /// The answer in a column; `other` is the column of the answer that it is compared with.
    fn answer(&self, row: &Row, column: &str, other: Option<&str>) -> Result<Rendered, DataError> {
        let empty = || DataError::row(&row.at, format!("`{column}` is empty: there is no answer to prefer"));
        let value = row.required(column)?;
        if column.ends_with("_ids") {
            if self.template.is_some() {
                return Err(DataError::Config(
                    "rows of `prompt_ids` take no `data.template`: they hold token ids".into(),
                ));
            }
            let (mut input_ids, answer) = (token_ids(self, row, "prompt_ids")?, token_ids(self, row, column)?);
            if answer.is_empty() {
                return Err(empty());
            }
            let mut labels = vec![IGNORE_INDEX; input_ids.len()];
            labels.extend(answer.iter().map(|&id| id as i32));
            input_ids.extend(answer);
            return Ok(Rendered::Tokens { input_ids, labels });
        }
        match value {
            Value::String(text) if text.is_empty() => Err(empty()),
            Value::String(text) => {
                let prompt = match &self.template {
                    Some(template) => prompt_of(template, column, row)?,
                    None => row.string("prompt")?.to_string(),
                };
                Ok(Rendered::Prompted { prompt, completion: text.clone() })
            }
            Value::Array(list) if list.is_empty() => Err(empty()),
            Value::Array(_) => self.answer_in_chat(row, column, other),
            found => Err(row.wrong_type(column, "a text or a list of messages", found)),
        }
    }

    fn answer_in_chat(&self, row: &Row, column: &str, other: Option<&str>) -> Result<Rendered, DataError> {
        if self.template.is_some() {
            return Err(DataError::Config(
                "messages take no `data.template`: they go through the chat template (`data.chat_template` replaces the \
                 tokenizer's own)"
                    .into(),
            ));
        }
        let own = message_list(row, column)?;
        let role = |message: &Value| message.get("role").and_then(Value::as_str).map(str::to_owned);
        let is_assistant = |message: &Value| role(message).as_deref() == Some("assistant");
        let whole = !own.first().is_some_and(is_assistant);
        let (mut messages, answer) = match row.fields.get("prompt") {
            Some(Value::Array(_)) => (message_list(row, "prompt")?, own),
            Some(Value::String(prompt)) if !whole => {
                (vec![serde_json::json!({"role": "user", "content": prompt})], own)
            }
            None | Some(Value::Null | Value::String(_)) if whole => {
                let shared = match other {
                    Some(other) => {
                        let other = message_list(row, other)?;
                        own.iter().zip(&other).take_while(|(a, b)| a == b).count()
                    }
                    // Of a conversation by itself, the last turn is the answer.
                    None => own.len() - 1,
                };
                let mut messages = own;
                let answer = messages.split_off(shared);
                (messages, answer)
            }
            None | Some(Value::Null) => {
                return Err(DataError::row(
                    &row.at,
                    format!("`prompt` is missing, and `{column}` begins with the assistant's turn"),
                ));
            }
            Some(found) => return Err(row.wrong_type("prompt", "a text or a list of messages", found)),
        };
        let turns = answer.iter().filter(|message| is_assistant(message)).count();
        if turns == 0 {
            // Of two conversations that are the same nothing is left; that is said of the pair.
            if !answer.is_empty() || other.is_none() {
                return Err(DataError::row(
                    &row.at,
                    format!("`{column}` has no turn of the assistant behind the prompt"),
                ));
            }
            return Err(DataError::row(
                &row.at,
                "`chosen` and `rejected` are the same, or one is the beginning of the other: leave the row out"
                    .to_string(),
            ));
        }
        messages.extend(answer);
        match self.conversation(row, &messages)? {
            Rendered::Chat { text, mut targets } => {
                targets.drain(..targets.len().saturating_sub(turns));
                Ok(Rendered::Chat { text, targets })
            }
            rendered => Ok(rendered),
        }
    }
}

/// KTO's `label`.
fn desirable(row: &Row) -> Result<bool, DataError> {
    let value = row.required("label")?;
    let found = match value {
        Value::Bool(label) => Some(*label),
        Value::Number(n) => match n.as_i64() {
            Some(1) => Some(true),
            Some(0) => Some(false),
            _ => None,
        },
        // CSV has texts alone.
        Value::String(text) => match text.trim().to_ascii_lowercase().as_str() {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        },
        _ => None,
    };
    found.ok_or_else(|| {
        DataError::row(&row.at, format!("`label` is {value}; it is true of an answer that is desirable, or false"))
    })
}
