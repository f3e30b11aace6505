//! Conversations through a chat template, and which bytes of the result are the assistant's.

use std::ops::Range;
use std::path::Path;

use minijinja::Value;
use serde_json::Map;

use super::template::{ChatEngine, json_value, rewrite_generation_blocks};

/// Noncharacters of Unicode, which no text has: they mark a generation block's ends, and stand in for a turn's content.
const OPEN: char = '\u{fdd0}';
const CLOSE: char = '\u{fdd1}';
const STAND_IN: &str = "\u{fdd2}";

/// Why a conversation could not be rendered or masked.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ChatError(String);

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    engine: ChatEngine,
    has_generation_blocks: bool,
    has_generation_prompt: bool,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Compiles Jinja source as found in `tokenizer_config.json` or `chat_template.jinja`.
    ///
    /// # Errors
    /// Syntax errors, with the template's line.
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self, ChatError> {
        let (source, has_generation_blocks) = rewrite_generation_blocks(source);
        let engine = ChatEngine::new(&source, has_generation_blocks.then_some((OPEN, CLOSE)))
            .map_err(|e| ChatError(format!("chat template: {e}")))?;
        Ok(Self {
            engine,
            has_generation_blocks,
            has_generation_prompt: source.contains("add_generation_prompt"),
            bos_token: bos_token.unwrap_or_default().to_string(),
            eos_token: eos_token.unwrap_or_default().to_string(),
        })
    }

    /// The source that `data.chat_template` stands for: a file's content, or the setting itself if it is a template.
    ///
    /// # Errors
    /// A path that can't be read, and text that is neither a path nor a template.
    pub fn source_of(setting: &str) -> Result<String, ChatError> {
        if setting.contains("{%") || setting.contains("{{") {
            return Ok(setting.to_string());
        }
        std::fs::read_to_string(Path::new(setting)).map_err(|e| {
            ChatError(format!(
                "data.chat_template: `{setting}` is no Jinja template (it has no `{{{{` or `{{%`), and as a path: {e}"
            ))
        })
    }

    /// Text of a conversation. `messages` are objects `{role, content, …}`; `extra` holds further variables (`tools`).
    ///
    /// # Errors
    /// What the template raises, with its line.
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        extra: &Map<String, serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let text = self.render_values(&values(messages), extra, add_generation_prompt)?;
        if !self.has_generation_blocks {
            return Ok(text);
        }
        Ok(text.replace([OPEN, CLOSE], ""))
    }

    fn render_values(
        &self,
        messages: &[Value],
        extra: &Map<String, serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let own = [
            ("messages", Value::from(messages.to_vec())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("bos_token", Value::from(self.bos_token.as_str())),
            ("eos_token", Value::from(self.eos_token.as_str())),
        ];
        // transformers passes `tools` and `documents` always, as None where there are none.
        let absent = [("tools", Value::from(())), ("documents", Value::from(()))];
        let given = extra.iter().map(|(k, v)| (k.as_str(), json_value(v)));
        let context = Value::from_pairs(absent.into_iter().chain(given).chain(own));
        self.engine.render(context).map_err(|e| ChatError(format!("chat template: {e}")))
    }

    /// Text of a whole conversation, and the byte ranges of it that the assistant says, each with its end-of-turn token
    /// but without white space behind that.
    ///
    /// The ranges are the template's `{% generation %}` blocks if it has them. Otherwise each assistant turn is found by
    /// rendering the conversation before it (with the generation prompt) and up to it, and taking what the second adds.
    /// Where these are no prefixes of the whole (templates that drop earlier reasoning, or move the system turn), or the
    /// template knows no generation prompt, the turn's content is swapped for a stand-in and the texts on both sides are compared. If that fails too, it is an
    /// error: no mask is guessed.
    ///
    /// # Errors
    /// What the template raises; a conversation without an assistant turn; a turn that can't be found in the text.
    pub fn render_with_targets(
        &self,
        messages: &[serde_json::Value],
        extra: &Map<String, serde_json::Value>,
    ) -> Result<(String, Vec<Range<usize>>), ChatError> {
        if !messages.iter().any(is_assistant) {
            return Err(ChatError("the conversation has no assistant turn, so nothing counts".into()));
        }
        let turns = values(messages);
        let full = self.render_values(&turns, extra, false)?;
        if self.has_generation_blocks {
            return split_marks(&full);
        }
        let mut targets = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if !is_assistant(message) {
                continue;
            }
            let content = message.get("content").and_then(|c| c.as_str()).unwrap_or_default();
            let by_prefix = || self.by_prefix(&turns, i, extra, &full, content);
            let by_stand_in = || self.by_stand_in(messages, i, extra, &full);
            // Without a generation prompt, what a turn adds to the text may begin with its header.
            let range = if self.has_generation_prompt {
                by_prefix().or_else(by_stand_in)
            } else {
                by_stand_in().or_else(by_prefix)
            };
            let range = range.ok_or_else(|| {
                    ChatError(format!(
                        "the chat template renders message {} differently as the conversation goes on, so its tokens can't \
                         be told apart; put `{{% generation %}} … {{% endgeneration %}}` around the assistant's text in \
                         a template of your own (`data.chat_template`)",
                        i + 1
                    ))
            })?;
            targets.push(range);
        }
        Ok((full, targets))
    }

    fn by_prefix(
        &self,
        turns: &[Value],
        i: usize,
        extra: &Map<String, serde_json::Value>,
        full: &str,
        content: &str,
    ) -> Option<Range<usize>> {
        let earlier = turns.get(..i).filter(|t| !t.is_empty())?;
        let before = self.render_values(earlier, extra, true).ok()?;
        let start = if full.starts_with(&before) {
            before.len()
        } else {
            // A generation prompt may say more than a finished turn shows (`<think>`): what both share is the header.
            let bare = self.render_values(earlier, extra, false).ok()?;
            full.starts_with(&bare).then(|| common_prefix(full, &before))?
        };
        let end = if i + 1 == turns.len() {
            full.len()
        } else {
            let upto = self.render_values(turns.get(..=i)?, extra, false).ok()?;
            full.starts_with(&upto).then_some(upto.len())?
        };
        let turn = full.get(start..end).filter(|t| !t.is_empty())?;
        let content = content.trim();
        let tail = match turn.rfind(content) {
            Some(at) if !content.is_empty() => turn.get(at + content.len()..)?,
            _ => turn,
        };
        Some(start..end - loose_end(tail))
    }

    fn by_stand_in(
        &self,
        messages: &[serde_json::Value],
        i: usize,
        extra: &Map<String, serde_json::Value>,
        full: &str,
    ) -> Option<Range<usize>> {
        let mut swapped = messages.to_vec();
        let message = swapped.get_mut(i)?.as_object_mut()?;
        message.get("content")?.as_str().filter(|c| !c.trim().is_empty())?;
        message.insert("content".into(), STAND_IN.into());
        let turns = values(&swapped);
        let split = |text: &str| -> Option<(String, String)> {
            let (before, after) = text.split_once(STAND_IN)?;
            (!after.contains(STAND_IN)).then(|| (before.to_string(), after.to_string()))
        };
        let (before, after) = split(&self.render_values(&turns, extra, false).ok()?)?;
        let content_end = full.len().checked_sub(after.len())?;
        if !full.starts_with(&before) || !full.ends_with(&after) || content_end <= before.len() {
            return None;
        }
        let tail = if i + 1 == turns.len() {
            after
        } else {
            // What closes the turn: the text behind it, as far as it is the same when nothing follows.
            let (_, alone) = split(&self.render_values(turns.get(..=i)?, extra, false).ok()?)?;
            let shared = common_prefix(&after, &alone);
            after.get(..shared)?.to_string()
        };
        // Vocabularies join a space to the word behind it, so a space before the content is the assistant's to say.
        let start = before.trim_end_matches(' ').len();
        Some(start..content_end + tail.len() - loose_end(&tail))
    }
}

fn values(messages: &[serde_json::Value]) -> Vec<Value> {
    messages.iter().map(json_value).collect()
}

fn is_assistant(message: &serde_json::Value) -> bool {
    message.get("role").and_then(|r| r.as_str()) == Some("assistant")
}

/// Length of the white space behind an end-of-turn token; none if white space is all that ends the turn.
fn loose_end(tail: &str) -> usize {
    let kept = tail.trim_end();
    if kept.is_empty() { 0 } else { tail.len() - kept.len() }
}

fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y).map_or(a.len().min(b.len()), |((at, _), _)| at)
}

fn split_marks(marked: &str) -> Result<(String, Vec<Range<usize>>), ChatError> {
    let mut text = String::with_capacity(marked.len());
    let mut ranges = Vec::new();
    let mut open = None;
    for c in marked.chars() {
        match c {
            OPEN => open = Some(text.len()),
            CLOSE => {
                let start = open.take().unwrap_or(text.len());
                if start < text.len() {
                    ranges.push(start..text.len());
                }
            }
            c => text.push(c),
        }
    }
    if ranges.is_empty() {
        return Err(ChatError(
            "the chat template's `{% generation %}` blocks render nothing for this conversation, so nothing counts"
                .into(),
        ));
    }
    Ok((text, ranges))
}
