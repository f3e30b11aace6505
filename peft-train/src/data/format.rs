//! What the columns of a row mean.

use std::fmt;
use std::str::FromStr;

use super::error::{DataError, nearest};

/// The row formats of the command line's `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// `text`: every token counts.
    Text,
    /// `prompt`, `completion`: the completion and the end token count.
    Completion,
    /// `instruction`, `input`, `output`: the output and the end token count.
    Alpaca,
    /// `messages` or `conversations`: the assistant's turns count.
    Chat,
    /// `text`, perhaps `text_pair`, and `label`: on a causal LM, the label's words and the end token count.
    Classification,
    /// `tokens` (words) and `labels` or `ner_tags`, one a word: for a head over tokens.
    TokenClassification,
    /// `question`, `context`, `answers`: for a head that finds the answer in the context.
    QuestionAnswering,
    /// `source`, `target`: the target counts.
    Seq2seq,
    /// `input_ids`, `labels`: as labelled.
    Tokens,
    /// `prompt`, `chosen`, `rejected`; or, for KTO, `prompt`, `completion`, `label`: preference objectives.
    Preference,
}

impl Format {
    /// All formats, in the order of the contract.
    pub const ALL: [Self; 10] = [
        Self::Text,
        Self::Completion,
        Self::Alpaca,
        Self::Chat,
        Self::Classification,
        Self::TokenClassification,
        Self::QuestionAnswering,
        Self::Seq2seq,
        Self::Tokens,
        Self::Preference,
    ];

    /// The name in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Completion => "completion",
            Self::Alpaca => "alpaca",
            Self::Chat => "chat",
            Self::Classification => "classification",
            Self::TokenClassification => "token_classification",
            Self::QuestionAnswering => "question_answering",
            Self::Seq2seq => "seq2seq",
            Self::Tokens => "tokens",
            Self::Preference => "preference",
        }
    }

    /// The columns that it reads, for messages.
    pub fn columns(self) -> &'static str {
        match self {
            Self::Text => "`text`",
            Self::Completion => "`prompt`, `completion`",
            Self::Alpaca => "`instruction`, `input` (may be missing), `output`",
            Self::Chat => "`messages` [{role, content}] or `conversations` [{from, value}]",
            Self::Classification => "`text`, `label`",
            Self::TokenClassification => "`tokens`, `labels` or `ner_tags`",
            Self::QuestionAnswering => "`question`, `context`, `answers` {text, answer_start}",
            Self::Seq2seq => "`source`, `target`",
            Self::Tokens => "`input_ids`, `labels`",
            Self::Preference => "`prompt`, `chosen`, `rejected`",
        }
    }

    /// The format that a row's columns speak for. With a template, columns of no format are text, or completion where
    /// the row has a target (`completion`, `output` or `label`).
    ///
    /// # Errors
    /// Columns of no format; the message lists what each format reads.
    pub fn detect<'a>(columns: impl IntoIterator<Item = &'a str>, has_template: bool) -> Result<Self, DataError> {
        let columns: Vec<&str> = columns.into_iter().collect();
        let has = |name: &str| columns.contains(&name);
        Ok(if has("messages") || has("conversations") {
            Self::Chat
        } else if has("input_ids") {
            Self::Tokens
        } else if (has("chosen") && has("rejected")) || has("prompt_ids") {
            Self::Preference
        } else if has("prompt") && has("completion") {
            Self::Completion
        } else if has("instruction") && has("output") {
            Self::Alpaca
        } else if has("source") && has("target") {
            Self::Seq2seq
        } else if has("text") && has("label") {
            Self::Classification
        } else if has_template && ["completion", "output", "label"].into_iter().any(has) {
            Self::Completion
        } else if has("text") || has_template {
            Self::Text
        } else {
            let names: Vec<String> = columns.iter().map(|c| format!("`{c}`")).collect();
            let formats: Vec<String> = Self::ALL.iter().map(|f| format!("{} ({})", f.name(), f.columns())).collect();
            return Err(DataError::Config(format!(
                "no format fits the columns {}; name them as one of: {}; or write `data.template` over your columns",
                names.join(", "),
                formats.join(", ")
            )));
        })
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = DataError;

    fn from_str(name: &str) -> Result<Self, DataError> {
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name);
            DataError::UnknownFormat {
                name: name.to_string(),
                hint: nearest(name, names).map(|n| format!("; did you mean `{n}`?")).unwrap_or_default(),
                known: names.join(", "),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_parse_and_near_names_are_offered() {
        for f in Format::ALL {
            assert_eq!(f.name().parse::<Format>().unwrap(), f);
        }
        let e = "completions".parse::<Format>().unwrap_err().to_string();
        assert!(e.contains("did you mean `completion`?"), "{e}");
        let e = "xyz".parse::<Format>().unwrap_err().to_string();
        assert!(e.contains("formats are text, completion") && !e.contains("did you"), "{e}");
    }

    #[test]
    fn columns_tell_the_format() {
        let detect = |c: &[&str], t| Format::detect(c.iter().copied(), t);
        for (columns, template, expected) in [
            (&["text"][..], false, Format::Text),
            (&["prompt", "completion", "id"], false, Format::Completion),
            (&["instruction", "output"], false, Format::Alpaca),
            (&["messages"], false, Format::Chat),
            (&["conversations", "id"], false, Format::Chat),
            (&["text", "label", "score"], true, Format::Classification),
            (&["source", "target"], false, Format::Seq2seq),
            (&["input_ids"], false, Format::Tokens),
            (&["prompt", "chosen", "rejected"], false, Format::Preference),
            (&["prompt_ids", "completion_ids", "label"], false, Format::Preference),
            (&["question", "label"], true, Format::Completion),
            (&["question", "answer"], true, Format::Text),
        ] {
            assert_eq!(detect(columns, template).unwrap(), expected, "{columns:?}");
        }
        let e = detect(&["question", "answer"], false).unwrap_err().to_string();
        assert!(e.contains("`question`, `answer`") && e.contains("data.template"), "{e}");
    }
}
