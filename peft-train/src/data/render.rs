//! A row's columns as the parts that become tokens: one match over the formats.

use std::collections::BTreeMap;
use std::ops::Range;

use peft_core::HeadKind;
use serde_json::{Map, Value};

use super::chat::ChatTemplate;
use super::classes::{ClassHead, label_column};
use super::encode::IGNORE_INDEX;
use super::error::{DataError, nearest};
use super::format::Format;
use super::pairs::DecoderInputs;
use super::source::{Row, kind_of};
use super::template::RowTemplate;

/// The Alpaca instruction prompts (Taori et al., 2023), with and without an input. The output follows directly.
const ALPACA_WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides further \
     context. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### \
     Input:\n{input}\n\n### Response:\n";
const ALPACA: &str = "Below is an instruction that describes a task. Write a response that appropriately completes the \
     request.\n\n### Instruction:\n{instruction}\n\n### Response:\n";

/// A row before tokenisation.
#[derive(Clone, Debug, PartialEq)]
pub enum Rendered {
    /// All of it counts.
    Text(String),
    /// Tokenised apart and joined; the completion and the end token count. On an encoder–decoder, source and target.
    Prompted {
        /// Context.
        prompt: String,
        /// Target, without end token.
        completion: String,
    },
    /// Tokenised as one text; the byte ranges count.
    Chat {
        /// The rendered conversation.
        text: String,
        /// The assistant's turns, in order.
        targets: Vec<Range<usize>>,
    },
    /// Tokenised already.
    Tokens {
        /// Token ids.
        input_ids: Vec<u32>,
        /// Aligned with `input_ids`; on an encoder–decoder, the target.
        labels: Vec<i32>,
    },
}

/// What rendering a row needs besides the row.
#[derive(Debug)]
pub(crate) struct Renderer {
    pub(crate) format: Format,
    pub(crate) template: Option<RowTemplate>,
    pub(crate) chat: Option<ChatTemplate>,
    pub(crate) label_words: BTreeMap<String, String>,
    pub(crate) class_head: Option<ClassHead>,
    pub(crate) decoder: Option<DecoderInputs>,
    pub(crate) vocab_size: Option<usize>,
    /// Whether rows of answers that are preferred to others are asked for.
    pub(crate) preferences: bool,
    /// Whether texts become a source and a target by what is hidden of them.
    pub(crate) hides_spans: bool,
}

impl Renderer {
    /// Refuses formats and settings that do not go together, before any row is read.
    pub(crate) fn check(&self) -> Result<(), DataError> {
        let config = |message: &str| Err(DataError::Config(message.to_string()));
        if let Some(head) = &self.class_head {
            return self.check_head(head);
        }
        if self.decoder.is_some() {
            self.check_pairs()?;
        }
        match self.format {
            Format::Text | Format::Completion | Format::Alpaca => {}
            Format::Seq2seq if self.decoder.is_some() => {}
            Format::Chat if self.template.is_some() => {
                return config(
                    "format chat takes no `data.template`; the conversation goes through the chat template \
                     (`data.chat_template` replaces the tokenizer's own)",
                );
            }
            Format::Chat if self.chat.is_none() => {
                return config(
                    "the tokenizer has no chat template, which format chat needs; set `data.chat_template` to a \
                     template's path or text, or use format completion with `data.template`",
                );
            }
            Format::Chat => {}
            Format::Tokens if self.template.is_some() => {
                return config("format tokens takes no `data.template`: its rows hold token ids");
            }
            Format::Tokens => {}
            Format::Classification if self.template.is_none() => {
                return config(
                    "format classification on a causal LM needs `data.template`, which renders the prompt that the label \
                     answers, such as \"Review: {{ text }}\\nSentiment: \"; a class head comes with encoder and \
                     sequence-classification models. To train on the texts themselves, use format text",
                );
            }
            Format::Classification => {}
            Format::TokenClassification | Format::QuestionAnswering => {
                return config(&format!(
                    "format {} comes with models that have a head for it: a `*{}`, or an encoder and model.head = \"{}\"",
                    self.format,
                    if self.format == Format::QuestionAnswering {
                        "ForQuestionAnswering"
                    } else {
                        "ForTokenClassification"
                    },
                    self.format,
                ));
            }
            Format::Seq2seq => {
                return config(
                    "format seq2seq comes with encoder-decoder models; on a causal LM, name the columns `prompt` and \
                     `completion` and use format completion",
                );
            }
            Format::Preference if self.preferences => {}
            Format::Preference => {
                return config(
                    "format preference comes with preference objectives; to train on the chosen answers, name the columns \
                     `prompt` and `completion` and use format completion",
                );
            }
        }
        if !self.label_words.is_empty() && self.format != Format::Classification {
            return config("`data.label_words` belongs to format classification");
        }
        Ok(())
    }

    fn check_head(&self, head: &ClassHead) -> Result<(), DataError> {
        let config = |message: String| Err(DataError::Config(message));
        let own = match head.kind {
            HeadKind::TokenClassification => Format::TokenClassification,
            HeadKind::QuestionAnswering => Format::QuestionAnswering,
            _ => Format::Classification,
        };
        if self.format != own && self.format != Format::Tokens {
            let tokens = match head.kind {
                HeadKind::TokenClassification => "`input_ids`, `labels`",
                HeadKind::QuestionAnswering => "`input_ids`, `start_positions`, `end_positions`",
                _ => "`input_ids`, `label`",
            };
            let pair = if own == Format::Classification { ", perhaps `text_pair`" } else { "" };
            let what = match head.kind {
                HeadKind::Classification => "class head".to_string(),
                kind => format!("head for {kind}"),
            };
            return config(format!(
                "the model has a {what}, which takes format {own} ({}{pair}) or tokens ({tokens}), not {}",
                own.columns(),
                self.format
            ));
        }
        if own == Format::Classification && !self.label_words.is_empty() {
            return config(
                "`data.label_words` are what a causal LM answers; a class head has `data.labels`, the names of its classes"
                    .into(),
            );
        }
        match (self.format, &self.template) {
            (_, None) | (Format::Classification, Some(_)) => Ok(()),
            (Format::Tokens, Some(_)) => {
                config("format tokens takes no `data.template`: its rows hold token ids".into())
            }
            (format, Some(_)) => {
                config(format!("format {format} takes no `data.template`: its labels are places in the text"))
            }
        }
    }

    pub(crate) fn render(&self, row: &Row) -> Result<Rendered, DataError> {
        match self.format {
            Format::Text => self.text(row),
            Format::Completion => self.completion(row),
            Format::Alpaca => self.alpaca(row),
            Format::Chat => self.chat(row),
            Format::Classification => self.classification(row),
            Format::Tokens => self.tokens(row),
            Format::Seq2seq if self.decoder.is_some() => self.pair(row),
            Format::Seq2seq | Format::Preference | Format::TokenClassification | Format::QuestionAnswering => {
                self.check()?;
                Err(DataError::row(&row.at, format!("format {} is not available here", self.format)))
            }
        }
    }

    /// The text of a row for a head that reads a whole sequence, and its second text if it has one.
    pub(super) fn texts(&self, row: &Row) -> Result<(String, Option<String>), DataError> {
        if let Some(template) = &self.template {
            return Ok((prompt_of(template, label_column(row), row)?, None));
        }
        let pair = match row.fields.get("text_pair") {
            None | Some(Value::Null) => None,
            Some(_) => Some(row.string("text_pair")?.to_string()),
        };
        Ok((row.string("text")?.to_string(), pair))
    }

    fn text(&self, row: &Row) -> Result<Rendered, DataError> {
        let text = match &self.template {
            Some(template) => template.render(row)?,
            None => row.string("text")?.to_string(),
        };
        if text.is_empty() {
            return Err(DataError::row(&row.at, "the text is empty, so no token counts"));
        }
        Ok(Rendered::Text(text))
    }

    fn completion(&self, row: &Row) -> Result<Rendered, DataError> {
        let Some(template) = &self.template else {
            return Ok(Rendered::Prompted {
                prompt: row.string("prompt")?.to_string(),
                completion: row.string("completion")?.to_string(),
            });
        };
        let target =
            ["completion", "output", "label"].into_iter().find(|c| row.fields.contains_key(*c)).unwrap_or("completion");
        let value = row.required(target)?;
        let completion =
            scalar_text(value).ok_or_else(|| row.wrong_type(target, "a string, number or boolean", value))?;
        Ok(Rendered::Prompted { prompt: prompt_of(template, target, row)?, completion })
    }

    fn pair(&self, row: &Row) -> Result<Rendered, DataError> {
        let prompt = match &self.template {
            Some(template) => prompt_of(template, "target", row)?,
            None => row.string("source")?.to_string(),
        };
        Ok(Rendered::Prompted { prompt, completion: row.string("target")?.to_string() })
    }

    fn alpaca(&self, row: &Row) -> Result<Rendered, DataError> {
        let completion = row.string("output")?.to_string();
        let prompt = match &self.template {
            Some(template) => prompt_of(template, "output", row)?,
            None => {
                let instruction = row.string("instruction")?;
                let input = match row.fields.get("input") {
                    None | Some(Value::Null) => "",
                    Some(Value::String(s)) => s,
                    Some(other) => return Err(row.wrong_type("input", "a string", other)),
                };
                let (head, tail) =
                    if input.trim().is_empty() { (ALPACA, None) } else { (ALPACA_WITH_INPUT, Some(input)) };
                // The instruction goes in last piece first, so that braces in the data stay what they are.
                let (before, after) = head.split_once("{instruction}").unwrap_or((head, ""));
                let after = match (tail, after.split_once("{input}")) {
                    (Some(input), Some((a, b))) => format!("{a}{input}{b}"),
                    _ => after.to_string(),
                };
                format!("{before}{instruction}{after}")
            }
        };
        Ok(Rendered::Prompted { prompt, completion })
    }

    fn classification(&self, row: &Row) -> Result<Rendered, DataError> {
        let Some(template) = &self.template else {
            return Err(DataError::row(&row.at, "format classification needs `data.template`"));
        };
        let label = row.required("label")?;
        let label = scalar_text(label).ok_or_else(|| row.wrong_type("label", "a string, number or boolean", label))?;
        let word = if self.label_words.is_empty() {
            label
        } else {
            self.label_words.get(&label).cloned().ok_or_else(|| {
                let known: Vec<String> = self.label_words.keys().map(|k| format!("`{k}`")).collect();
                let hint = nearest(&label, self.label_words.keys().map(String::as_str))
                    .map(|n| format!("; did you mean `{n}`?"))
                    .unwrap_or_default();
                DataError::row(
                    &row.at,
                    format!("label `{label}` is not in `data.label_words`, which has {}{hint}", known.join(", ")),
                )
            })?
        };
        if word.is_empty() {
            return Err(DataError::row(&row.at, "the label is empty"));
        }
        let prompt = prompt_of(template, "label", row)?;
        // Vocabularies hold words with the space in front of them, so a space between the two belongs to the label.
        let bare = prompt.trim_end_matches(' ');
        let space = prompt.get(bare.len()..).unwrap_or_default();
        Ok(Rendered::Prompted { completion: format!("{space}{word}"), prompt: bare.to_string() })
    }

    fn chat(&self, row: &Row) -> Result<Rendered, DataError> {
        self.conversation(row, &messages(row)?)
    }

    /// Messages of a row, through the chat template.
    pub(super) fn conversation(&self, row: &Row, messages: &[Value]) -> Result<Rendered, DataError> {
        let Some(chat) = &self.chat else {
            return Err(DataError::row(
                &row.at,
                "messages need a chat template, and the tokenizer has none; set `data.chat_template`",
            ));
        };
        let mut extra = Map::new();
        for name in ["tools", "documents"] {
            match row.fields.get(name) {
                None | Some(Value::Null) => {}
                // Tables can't hold free-form objects, so data sets keep tools as JSON text.
                Some(Value::String(json)) => {
                    let value = serde_json::from_str(json).map_err(|e| {
                        DataError::row(&row.at, format!("column `{name}`: expected a list, or JSON text of one: {e}"))
                    })?;
                    extra.insert(name.into(), value);
                }
                Some(value) => {
                    extra.insert(name.into(), value.clone());
                }
            }
        }
        let (text, targets) =
            chat.render_with_targets(messages, &extra).map_err(|e| DataError::row(&row.at, e.to_string()))?;
        Ok(Rendered::Chat { text, targets })
    }

    fn in_vocab(&self, row: &Row, name: &str, i: usize, id: i64) -> Result<i32, DataError> {
        let limit = self.vocab_size.map_or(i64::from(i32::MAX), |v| v as i64);
        match i32::try_from(id) {
            Ok(small) if id >= 0 && id < limit => Ok(small),
            _ => {
                let message = format!("{name}[{i}] is {id}, outside the vocabulary (0 to {})", limit - 1);
                Err(DataError::row(&row.at, message))
            }
        }
    }

    pub(super) fn input_ids(&self, row: &Row) -> Result<Vec<u32>, DataError> {
        if let Some(mask) = row.fields.get("attention_mask").and_then(Value::as_array)
            && mask.iter().any(|m| m.as_i64() == Some(0))
        {
            return Err(DataError::row(
                &row.at,
                "`attention_mask` marks padding; leave padding out of `input_ids` and `labels`, batches are packed without it",
            ));
        }
        token_ids(self, row, "input_ids")
    }

    fn tokens(&self, row: &Row) -> Result<Rendered, DataError> {
        let class_id = match row.fields.get("labels") {
            Some(Value::Number(_)) => Some("labels"),
            None if row.fields.contains_key("label") => Some("label"),
            _ => None,
        };
        if let Some(name) = class_id {
            return Err(DataError::row(
                &row.at,
                format!(
                    "`{name}` is a class id, which needs the class head that comes with encoder and sequence-classification \
                     models; a causal LM takes `labels` as a list aligned with `input_ids`"
                ),
            ));
        }
        let input_ids = self.input_ids(row)?;
        let labels =
            match row.fields.get("labels") {
                None | Some(Value::Null) if self.decoder.is_none() => input_ids.iter().map(|&id| id as i32).collect(),
                _ => integers(row, "labels")?
                    .into_iter()
                    .enumerate()
                    .map(|(i, id)| {
                        if id == i64::from(IGNORE_INDEX) {
                            Ok(IGNORE_INDEX)
                        } else {
                            self.in_vocab(row, "labels", i, id)
                        }
                    })
                    .collect::<Result<Vec<i32>, _>>()?,
            };
        if self.decoder.is_none() && labels.len() != input_ids.len() {
            return Err(DataError::row(
                &row.at,
                format!(
                    "`labels` has {} entries, `input_ids` {}; they are aligned, with -100 where nothing counts",
                    labels.len(),
                    input_ids.len()
                ),
            ));
        }
        Ok(Rendered::Tokens { input_ids, labels })
    }
}

/// A column of token ids.
pub(super) fn token_ids(renderer: &Renderer, row: &Row, name: &str) -> Result<Vec<u32>, DataError> {
    let ids = integers(row, name)?.into_iter().enumerate();
    ids.map(|(i, id)| renderer.in_vocab(row, name, i, id).map(i32::unsigned_abs)).collect()
}

/// A column of integers.
fn integers(row: &Row, name: &str) -> Result<Vec<i64>, DataError> {
    let value = row.required(name)?;
    let list = value.as_array().ok_or_else(|| row.wrong_type(name, "an array of token ids", value))?;
    list.iter()
        .enumerate()
        .map(|(i, v)| v.as_i64().ok_or_else(|| row.wrong_type(&format!("{name}[{i}]"), "an integer", v)))
        .collect()
}

/// Renders a prompt; a template that reads the target would show the answer to the model.
pub(super) fn prompt_of(template: &RowTemplate, target: &str, row: &Row) -> Result<String, DataError> {
    if template.reads(target) {
        return Err(DataError::Config(format!(
            "data.template reads column `{target}`, which is the target: the template renders the prompt only, and ends \
             where the target begins"
        )));
    }
    template.render(row)
}

fn scalar_text(value: &Value) -> Option<String> {
    match value {
        Value::String(s) => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        Value::Bool(b) => Some(b.to_string()),
        _ => None,
    }
}

/// `messages` as they are, or `conversations` (ShareGPT) with its speakers named as roles.
fn messages(row: &Row) -> Result<Vec<Value>, DataError> {
    let sharegpt = !row.fields.contains_key("messages") && row.fields.contains_key("conversations");
    turns(row, if sharegpt { "conversations" } else { "messages" }, sharegpt)
}

/// A column of messages `{role, content}`.
pub(super) fn message_list(row: &Row, column: &str) -> Result<Vec<Value>, DataError> {
    turns(row, column, false)
}

fn turns(row: &Row, column: &str, sharegpt: bool) -> Result<Vec<Value>, DataError> {
    let (role_key, content_key) = if sharegpt { ("from", "value") } else { ("role", "content") };
    let value = row.required(column)?;
    let list = value
        .as_array()
        .ok_or_else(|| row.wrong_type(column, &format!("a list of {{{role_key}, {content_key}}}"), value))?;
    if list.is_empty() {
        return Err(DataError::row(&row.at, format!("`{column}` is empty")));
    }
    list.iter()
        .enumerate()
        .map(|(i, message)| {
            let bad = |what: String| DataError::row(&row.at, format!("`{column}` message {}: {what}", i + 1));
            let object = message
                .as_object()
                .ok_or_else(|| bad(format!("expected {{{role_key}, {content_key}}}, found {}", kind_of(message))))?;
            let speaker = match object.get(role_key) {
                Some(Value::String(s)) => s.as_str(),
                Some(other) => {
                    return Err(bad(format!("`{role_key}`: expected a string, found {}", kind_of(other))));
                }
                None => return Err(bad(format!("`{role_key}` is missing"))),
            };
            let calls_tools = object.get("tool_calls").is_some_and(|t| !t.is_null());
            match object.get(content_key) {
                Some(Value::String(_) | Value::Array(_)) => {}
                None | Some(Value::Null) if calls_tools => {}
                None => return Err(bad(format!("`{content_key}` is missing"))),
                Some(other) => {
                    return Err(bad(format!("`{content_key}`: expected a string, found {}", kind_of(other))));
                }
            }
            if !sharegpt {
                // Parquet has a column for every key that any message uses; null stands for "not there".
                let mut present = object.clone();
                present.retain(|key, v| !v.is_null() || key == content_key);
                return Ok(Value::Object(present));
            }
            let role = match speaker {
                "human" | "user" => "user",
                "gpt" | "assistant" | "model" | "chatgpt" | "bot" => "assistant",
                "system" => "system",
                "tool" | "function_response" | "observation" => "tool",
                other => {
                    return Err(bad(format!(
                        "unknown speaker `{other}` in `from`; expected human, gpt, system or tool"
                    )));
                }
            };
            let content = object.get(content_key).cloned().unwrap_or_default();
            Ok(serde_json::json!({"role": role, "content": content}))
        })
        .collect()
}
