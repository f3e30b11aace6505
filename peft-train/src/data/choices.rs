//! Rows with several possible answers, of which one is right: verbalised classes, multiple choice.
//!
//! Every answer of a row is encoded as the row's own would be. The answers are the same for all rows (`data.choices`), or each
//! row's own, in a column `choices`.

use std::ops::Range;

use serde_json::Value;

use super::batch::Batch;
use super::dataset::{Dataset, each_encoded};
use super::encode::{EncodeOptions, Encoder};
use super::error::{DataError, Location};
use super::format::Format;
use super::source::{DataSpec, Row, data_files};
use super::tokenizer::TextTokenizer;

/// The column of a row's own answers.
const COLUMN: &str = "choices";

/// All rows with all of their answers, in the order in which [`Dataset::load`] has the rows.
#[derive(Clone, Debug)]
pub struct Choices {
    examples: Dataset,
    rows: Vec<ChoiceRow>,
    classes: Option<usize>,
    with_end: bool,
}

/// The answers of one row: which sequences, and which of them is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChoiceRow {
    /// The answers, in order.
    pub sequences: Range<usize>,
    /// The number of the right one among them.
    pub right: usize,
}

/// Rows of [`Choices`] as the model takes them: a sequence an answer.
#[derive(Clone, Debug)]
pub struct ChoiceBatch {
    /// The sequences.
    pub batch: Batch,
    /// Which of them belong to each row.
    pub rows: Vec<ChoiceRow>,
    /// Where the rows come from.
    pub sources: Vec<Location>,
    /// Whether an answer's end token belongs to what is compared.
    pub with_end: bool,
}

/// How likely an answer is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Sum of negative log-likelihoods, the end token included, in nats.
    pub nll: f64,
    /// The same without the end token.
    pub nll_of_text: f64,
    /// Tokens, the end token included.
    pub tokens: usize,
}

impl Choices {
    /// Reads and encodes everything that `spec` names, each row with each of its answers: those in its column `choices`, or
    /// `given`.
    ///
    /// # Errors
    /// A format without answers, a row whose own answer is none of them, and all that a row can be refused for.
    pub fn load(
        spec: &DataSpec,
        format: Format,
        tokenizer: Option<&dyn TextTokenizer>,
        options: &EncodeOptions,
        given: &[String],
    ) -> Result<Self, DataError> {
        let column = answer_column(format)?;
        check_apart(given).map_err(|why| DataError::Config(format!("the list of choices {why}")))?;
        let options = EncodeOptions { format, ..options.clone() };
        let encoder = Encoder::new(tokenizer, &options)?;
        let (mut examples, mut rows) = (Dataset::new(), Vec::new());
        let (mut classes, mut with_end) = (Some(given.len()), begins_another(given));
        for path in spec.parts()?.0 {
            for file in data_files(path)? {
                let with_answers = |row: &Row| of_row(row, column, given, |row| encoder.encode(row));
                each_encoded(&file, with_answers, |of_row| {
                    if of_row.own {
                        classes = None;
                    }
                    with_end = with_end || of_row.with_end;
                    let first = examples.len();
                    of_row.examples.iter().for_each(|example| examples.push(example));
                    rows.push(ChoiceRow { sequences: first..examples.len(), right: of_row.right });
                })?;
            }
        }
        if rows.is_empty() {
            return Err(DataError::Config("the data has no rows".into()));
        }
        Ok(Self { examples, rows, classes, with_end })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// How many answers there are, where all rows have the same, in the same order: then they are classes.
    pub fn classes(&self) -> Option<usize> {
        self.classes
    }

    /// Tokens of the row that has most, all answers together.
    pub fn longest_row(&self) -> usize {
        let tokens = |row: &ChoiceRow| row.sequences.clone().map(|s| self.examples.row_length(s)).sum();
        self.rows.iter().map(tokens).max().unwrap_or(0)
    }

    /// Answers of the row that has most.
    pub fn most_answers(&self) -> usize {
        self.rows.iter().map(|row| row.sequences.len()).max().unwrap_or(0)
    }

    /// Packs rows with all of their answers, in the order given.
    pub fn batch(&self, rows: &[usize]) -> ChoiceBatch {
        let (mut sequences, mut of_batch) = (Vec::new(), Vec::new());
        for row in rows.iter().filter_map(|&r| self.rows.get(r)) {
            let first = sequences.len();
            sequences.extend(row.sequences.clone());
            of_batch.push(ChoiceRow { sequences: first..sequences.len(), right: row.right });
        }
        let first = |row: &usize| self.rows.get(*row).and_then(|row| self.examples.source(row.sequences.start));
        ChoiceBatch {
            batch: Batch::new(&self.examples, &sequences),
            rows: of_batch,
            sources: rows.iter().filter_map(first).collect(),
            with_end: self.with_end,
        }
    }
}

impl ChoiceBatch {
    /// For each sequence, its counted tokens among [`Batch::targets`].
    pub fn spans(&self) -> Vec<Range<usize>> {
        let positions = self.batch.targets().positions;
        let mut next = 0;
        let ends = self.batch.bounds.iter().skip(1).map(|&end| {
            let first = next;
            next = positions.partition_point(|&p| (p as usize) < end);
            first..next
        });
        ends.collect()
    }

    /// The score of each answer of each row, given the negative log-likelihood of each counted token.
    pub fn scores(&self, nll: &[f32]) -> Vec<Vec<Score>> {
        let spans = self.spans();
        let score = |sequence: usize| {
            let own = spans.get(sequence).and_then(|span| nll.get(span.clone())).unwrap_or_default();
            let sum = |nll: &[f32]| nll.iter().map(|&x| f64::from(x)).sum::<f64>();
            // Answers are closed with the end token.
            let text = own.get(..own.len().saturating_sub(1)).unwrap_or_default();
            Score { nll: sum(own), nll_of_text: sum(text), tokens: own.len() }
        };
        self.rows.iter().map(|row| row.sequences.clone().map(score).collect()).collect()
    }

    /// The number of the likeliest answer. The end token is no part of an answer's text; but only with it can an answer be likelier
    /// than its own beginning.
    pub fn likeliest(&self, scores: &[Score]) -> usize {
        let compared = |score: &Score| if self.with_end { score.nll } else { score.nll_of_text };
        let ranked = scores.iter().map(compared).enumerate();
        ranked.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(i, _)| i)
    }
}

/// The column that holds a row's answer.
pub(super) fn answer_column(format: Format) -> Result<&'static str, DataError> {
    match format {
        Format::Completion => Ok("completion"),
        Format::Alpaca => Ok("output"),
        Format::Classification => Ok("label"),
        Format::Seq2seq => Ok("target"),
        other => Err(DataError::Config(format!(
            "choices go with rows of one answer (completion, alpaca, classification, seq2seq), not with format {other}"
        ))),
    }
}

/// One row with all of its answers.
pub(super) struct OfRow<T> {
    /// What was made of each answer.
    pub(super) examples: Vec<T>,
    /// The number of the right one.
    pub(super) right: usize,
    /// Whether they are the row's own.
    pub(super) own: bool,
    /// Whether one is the beginning of another, so that the end token decides between them.
    pub(super) with_end: bool,
}

/// A row with each of its answers in place of its own, through `encode`.
pub(super) fn of_row<T>(
    row: &Row,
    column: &str,
    given: &[String],
    encode: impl Fn(&Row) -> Result<T, DataError>,
) -> Result<OfRow<T>, DataError> {
    let own = match row.fields.get(COLUMN).filter(|v| !v.is_null()) {
        None => None,
        Some(Value::Array(list)) => {
            let texts = list.iter().map(text_of).collect::<Option<Vec<_>>>();
            let texts = texts.ok_or_else(|| DataError::row(&row.at, "`choices` is a list of texts"))?;
            if texts.len() < 2 {
                return Err(DataError::row(&row.at, "`choices` needs two or more answers"));
            }
            check_apart(&texts).map_err(|why| DataError::row(&row.at, format!("`choices` {why}")))?;
            Some(texts)
        }
        Some(_) => return Err(DataError::row(&row.at, "`choices` is a list of texts")),
    };
    let answers = own.as_deref().unwrap_or(given);
    if answers.is_empty() {
        let message = "has no choices: name them for all rows (data.choices), or give each row a column `choices`";
        return Err(DataError::row(&row.at, message));
    }
    let answer = row.required(column)?;
    let text = text_of(answer).ok_or_else(|| DataError::row(&row.at, format!("`{column}` is not a text")))?;
    let Some(right) = answers.iter().position(|a| *a == text) else {
        return Err(DataError::row(&row.at, format!("its {column} {text:?} is none of the choices {answers:?}")));
    };
    let with = |answer: &String| {
        let mut row = row.clone();
        row.fields.insert(column.into(), answer.clone().into());
        encode(&row)
    };
    let examples = answers.iter().map(with).collect::<Result<Vec<_>, _>>()?;
    Ok(OfRow { examples, right, own: own.is_some(), with_end: own.is_some_and(|own| begins_another(&own)) })
}

fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    }
}

fn check_apart(answers: &[String]) -> Result<(), String> {
    match answers.iter().enumerate().find(|(i, a)| answers.iter().take(*i).any(|b| b == *a)) {
        Some((_, twice)) => Err(format!("has {twice:?} twice")),
        None => Ok(()),
    }
}

/// Whether an answer is the beginning of another.
fn begins_another(answers: &[String]) -> bool {
    answers.iter().any(|a| answers.iter().any(|b| a != b && b.starts_with(a.as_str())))
}
