//! What a model's own head is for: the classes that transformers has beside those of language models.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::suggest::did_you_mean;

/// What a head's outputs are held against. It decides what rows hold, which tokens are read, the loss, and the scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadKind {
    /// One class a sequence: cross-entropy.
    #[default]
    Classification,
    /// Any number of the classes a sequence: the mean binary cross-entropy over them.
    MultiLabel,
    /// Numbers a sequence: the mean square of the differences.
    Regression,
    /// One class a token: cross-entropy.
    TokenClassification,
    /// The first and the last token of an answer: the mean of two cross-entropies over the tokens of a sequence.
    QuestionAnswering,
}

impl HeadKind {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Classification, Self::MultiLabel, Self::Regression, Self::TokenClassification, Self::QuestionAnswering];

    /// The name in recipes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Classification => "classification",
            Self::MultiLabel => "multi_label",
            Self::Regression => "regression",
            Self::TokenClassification => "token_classification",
            Self::QuestionAnswering => "question_answering",
        }
    }

    /// PEFT's name for the task, as in `task_type`.
    #[must_use]
    pub fn peft_name(self) -> &'static str {
        match self {
            Self::Classification | Self::MultiLabel | Self::Regression => "SEQ_CLS",
            Self::TokenClassification => "TOKEN_CLS",
            Self::QuestionAnswering => "QUESTION_ANS",
        }
    }

    /// How the names of transformers' classes for it end.
    #[must_use]
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Classification | Self::MultiLabel | Self::Regression => "ForSequenceClassification",
            Self::TokenClassification => "ForTokenClassification",
            Self::QuestionAnswering => "ForQuestionAnswering",
        }
    }

    /// transformers' `problem_type`, which tells heads of one class apart.
    #[must_use]
    pub fn problem_type(self) -> Option<&'static str> {
        match self {
            Self::Classification => Some("single_label_classification"),
            Self::MultiLabel => Some("multi_label_classification"),
            Self::Regression => Some("regression"),
            Self::TokenClassification | Self::QuestionAnswering => None,
        }
    }

    /// Whether it reads every token, instead of one that stands for its sequence.
    #[must_use]
    pub fn is_of_tokens(self) -> bool {
        matches!(self, Self::TokenClassification | Self::QuestionAnswering)
    }

    /// The modules that PEFT trains and stores whole with an adapter (`peft_model.py`, the classes of the tasks).
    #[must_use]
    pub fn saved_modules(self) -> &'static [&'static str] {
        match self {
            Self::QuestionAnswering => &["qa_outputs"],
            _ => &["classifier", "score"],
        }
    }
}

impl fmt::Display for HeadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for HeadKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let names = Self::ALL.map(Self::name);
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let near = did_you_mean(name, names);
            Error::config("model.head", format!("`{name}` is not a head{near}; known: {}", names.join(", ")))
        })
    }
}

/// The outputs of a head: their names, and what they are for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Labels {
    /// Names of the classes, or of the numbers, by their number.
    pub names: Vec<String>,
    /// What the head is for.
    pub kind: HeadKind,
}

impl Labels {
    /// Whether there is no head.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }
}

impl From<Vec<String>> for Labels {
    fn from(names: Vec<String>) -> Self {
        Self { names, kind: HeadKind::default() }
    }
}
