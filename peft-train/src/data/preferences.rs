//! Rows with answers of which one is preferred: pairs of a chosen and a rejected answer, or single answers that are desirable or not.
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

use std::ops::Range;

use serde_json::Value;

use super::batch::Batch;
use super::dataset::{Dataset, each_encoded};
use super::encode::{EncodeOptions, Encoder, Example, IGNORE_INDEX};
use super::error::{DataError, Location};
use super::format::Format;
use super::render::{Rendered, Renderer, message_list, prompt_of, token_ids};
use super::source::{DataSpec, Row, data_files, read_rows};
use super::tasks::task_of;
use super::tokenizer::TextTokenizer;
use crate::preference::{Answer, Preference};

/// A row's answers, by the numbers of their sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preferred {
    /// Two answers to one prompt.
    Pair {
        /// The better one.
        chosen: usize,
        /// The other.
        rejected: usize,
    },
    /// One answer.
    One {
        /// It.
        answer: usize,
        /// Whether it is wanted.
        desirable: bool,
    },
}

impl Preferred {
    fn first(self) -> usize {
        match self {
            Self::Pair { chosen, .. } => chosen,
            Self::One { answer, .. } => answer,
        }
    }

    fn second(self) -> Option<usize> {
        match self {
            Self::Pair { rejected, .. } => Some(rejected),
            Self::One { .. } => None,
        }
    }
}

/// All rows with their answers, in the order in which [`Dataset::load`] has the rows.
#[derive(Clone, Debug)]
pub struct Preferences {
    examples: Dataset,
    rows: Vec<Preferred>,
    max_length: Option<usize>,
}

/// Rows of [`Preferences`] as the model takes them: first the chosen answer, or the only one, of each, then the rejected ones.
#[derive(Clone, Debug)]
pub struct PreferenceBatch {
    /// The sequences; their `rows` are the numbers of sequences in [`Preferences`].
    pub batch: Batch,
    /// The rows, by sequences of the batch.
    pub rows: Vec<Preferred>,
    /// For each sequence, its counted tokens among [`Batch::targets`].
    pub spans: Vec<Range<usize>>,
    /// For each counted token, whether it belongs to an answer; others are a prompt's.
    pub in_answer: Vec<bool>,
    /// Where the rows come from.
    pub sources: Vec<Location>,
    /// For each sequence, the answer's log-likelihood under the reference; empty where the objective has none.
    pub reference: Vec<f64>,
    /// Answers behind prompts that are not theirs, of which KTO makes its `z`.
    pub mismatched: Option<Box<Mismatched>>,
}

/// Answers behind prompts that are not theirs.
#[derive(Clone, Debug, Default)]
pub struct Mismatched {
    /// The sequences.
    pub batch: Batch,
    /// The log-likelihood of each answer under the reference.
    pub reference: Vec<f64>,
}

impl Preferences {
    /// Reads and encodes everything that `spec` names, for `objective`.
    ///
    /// # Errors
    /// A row that lacks a column or an answer, whose answers are the same, or that has one answer where the objective compares two;
    /// with KTO, rows that are all desirable or all undesirable; and all that a row can be refused for.
    pub fn load(
        spec: &DataSpec,
        tokenizer: Option<&dyn TextTokenizer>,
        options: &EncodeOptions,
        objective: &Preference,
    ) -> Result<Self, DataError> {
        let options = EncodeOptions { format: Format::Preference, preferences: true, ..options.clone() };
        let encoder = Encoder::new(tokenizer, &options)?;
        let (mut examples, mut rows) = (Dataset::new(), Vec::new());
        let one = |row: &Row| {
            let encoded = encoder.preferred(row)?;
            if matches!(encoded, Encoded::One(..)) && !objective.takes_single_answers() {
                return Err(DataError::row(
                    &row.at,
                    format!(
                        "{} compares two answers, and this row has one: name them `chosen` and `rejected`, or train with \
                         train.objective = \"kto\"",
                        objective.name()
                    ),
                ));
            }
            Ok(encoded)
        };
        for path in spec.parts()?.0 {
            for file in data_files(path)? {
                each_encoded(&file, one, |encoded| {
                    let first = examples.len();
                    rows.push(match encoded {
                        Encoded::Pair(chosen, rejected) => {
                            examples.push(&chosen);
                            examples.push(&rejected);
                            Preferred::Pair { chosen: first, rejected: first + 1 }
                        }
                        Encoded::One(answer, desirable) => {
                            examples.push(&answer);
                            Preferred::One { answer: first, desirable }
                        }
                    });
                })?;
            }
        }
        if rows.is_empty() {
            return Err(DataError::Config("the data has no rows".into()));
        }
        let preferences = Self { examples, rows, max_length: options.max_length };
        preferences.check_classes(objective)?;
        Ok(preferences)
    }

    /// With answers of one kind alone there is nothing that one is better than.
    fn check_classes(&self, objective: &Preference) -> Result<(), DataError> {
        let is = |wanted: bool| {
            move |row: &Preferred| match *row {
                Preferred::Pair { .. } => false,
                Preferred::One { desirable, .. } => desirable == wanted,
            }
        };
        let missing = [(true, "false", "undesirable"), (false, "true", "desirable")];
        match missing.iter().find(|(wanted, ..)| self.rows.iter().all(is(*wanted))) {
            Some((label, lacks, kind)) => {
                let at = self.examples.source(0).map_or_else(String::new, |at| format!("{}: ", at.file.display()));
                Err(DataError::Config(format!(
                    "{at}{} needs answers of both kinds, and every row has `label` {label}; add {kind} ones, with `label` {lacks}, \
                     or train on completion rows with train.objective = \"loss\"",
                    objective.name()
                )))
            }
            None => Ok(()),
        }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Number of answers.
    pub fn sequences(&self) -> usize {
        self.examples.len()
    }

    /// Tokens of an answer with its prompt.
    pub(crate) fn length(&self, sequence: usize) -> usize {
        self.examples.row_length(sequence)
    }

    /// The answers of rows, in their order.
    pub(crate) fn answers_of<'a>(&'a self, rows: &'a [usize]) -> impl Iterator<Item = usize> + 'a {
        let rows = rows.iter().filter_map(|&row| self.rows.get(row));
        rows.flat_map(|row| std::iter::once(row.first()).chain(row.second()))
    }

    /// The same, first the chosen or only ones of all rows.
    pub(crate) fn chosen_first(&self, rows: &[usize]) -> Vec<usize> {
        let of = rows.iter().filter_map(|&row| self.rows.get(row));
        of.clone().map(|row| row.first()).chain(of.filter_map(|row| row.second())).collect()
    }

    /// Tokens of the row that has most, both answers together.
    pub fn longest_row(&self) -> usize {
        let length = |s: usize| self.length(s);
        self.rows.iter().map(|row| length(row.first()) + row.second().map_or(0, length)).max().unwrap_or(0)
    }

    /// Answers of the row that has most.
    pub fn most_answers(&self) -> usize {
        if self.rows.iter().any(|row| row.second().is_some()) { 2 } else { 1 }
    }

    /// Packs rows, in the order given; with `with_prompts` the prompts of chosen answers count, too. References are not in it.
    pub fn batch(&self, rows: &[usize], with_prompts: bool) -> PreferenceBatch {
        let of: Vec<Preferred> = rows.iter().filter_map(|&row| self.rows.get(row)).copied().collect();
        let mut batch = Batch::new(&self.examples, &self.chosen_first(rows));
        let mut seconds = of.len()..;
        let rows: Vec<Preferred> = of
            .iter()
            .enumerate()
            .map(|(i, row)| match *row {
                Preferred::Pair { .. } => Preferred::Pair { chosen: i, rejected: seconds.next().unwrap_or_default() },
                Preferred::One { desirable, .. } => Preferred::One { answer: i, desirable },
            })
            .collect();
        let answered: Vec<bool> = batch.labels.iter().map(|&label| label != IGNORE_INDEX).collect();
        if with_prompts {
            for chosen in rows.iter().map(|row| row.first()) {
                let span = batch.bounds.get(chosen).copied().zip(batch.bounds.get(chosen + 1).copied());
                let span = span.map_or(0..0, |(from, to)| from..to);
                let ids = batch.input_ids.get(span.clone()).unwrap_or_default();
                let labels = batch.labels.get_mut(span).unwrap_or_default();
                labels.iter_mut().zip(ids).for_each(|(label, &id)| *label = id as i32);
            }
        }
        let distance = batch.predictor.distance();
        let positions = batch.targets().positions;
        let counts = |&position: &u32| answered.get(position as usize + distance).copied().unwrap_or(false);
        let in_answer = positions.iter().map(counts).collect();
        let mut next = 0;
        let spans = batch.bounds.iter().skip(1).map(|&end| {
            let first = next;
            next = positions.partition_point(|&p| (p as usize) < end);
            first..next
        });
        PreferenceBatch {
            rows,
            spans: spans.collect(),
            in_answer,
            sources: of.iter().filter_map(|row| self.examples.source(row.first())).collect(),
            reference: Vec::new(),
            mismatched: None,
            batch,
        }
    }

    /// Packs answers by themselves.
    pub(crate) fn alone(&self, sequences: &[usize]) -> Batch {
        Batch::new(&self.examples, sequences)
    }

    /// The prompt of each sequence with the answer of the one before it, of the first with that of the last; the order is TRL's, which
    /// turns the answers of a batch by one. Cut on the right where they are longer than rows may be.
    pub(crate) fn mismatched(&self, sequences: &[usize]) -> Vec<Mispaired> {
        let last = sequences.last().into_iter();
        last.chain(sequences).zip(sequences).map(|(&answer, &prompt)| Mispaired { prompt, answer }).collect()
    }

    /// Packs prompts with answers of others.
    pub(crate) fn pack_mismatched(&self, pairs: &[Mispaired]) -> Batch {
        let mut batch = Batch { bounds: vec![0], predictor: self.examples.predictor(), ..Batch::default() };
        for &Mispaired { prompt, answer } in pairs {
            let begins = |sequence: usize| {
                let labels = self.examples.labels(sequence);
                labels.iter().position(|&l| l != IGNORE_INDEX).unwrap_or(labels.len())
            };
            let (of_prompt, from) = (begins(prompt), begins(answer));
            let ids = self.examples.input_ids(prompt).iter().take(of_prompt);
            let ids = ids.chain(self.examples.input_ids(answer).iter().skip(from));
            let labels = self.examples.labels(answer).into_iter().skip(from);
            let labels = std::iter::repeat_n(IGNORE_INDEX, of_prompt).chain(labels);
            let most = self.max_length.unwrap_or(usize::MAX);
            let before = batch.input_ids.len();
            batch.input_ids.extend(ids.take(most));
            batch.labels.extend(labels.take(most));
            batch.position_ids.extend((0u32..).take(batch.input_ids.len() - before));
            batch.tasks.extend(self.examples.task(prompt));
            batch.bounds.push(batch.input_ids.len());
            batch.rows.push(answer);
        }
        batch
    }
}

/// Whether the first row of a data set has one answer, where others would have a pair.
///
/// # Errors
/// An unreadable row.
pub fn single_answers_in(spec: &DataSpec) -> Result<bool, DataError> {
    for path in spec.parts()?.0 {
        for file in data_files(path)? {
            if let Some(row) = read_rows(&file)?.next() {
                let fields = row?.fields;
                return Ok(["completion", "completion_ids"].iter().any(|name| fields.contains_key(*name)));
            }
        }
    }
    Ok(false)
}

/// A prompt and an answer that is not its own, by their sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mispaired {
    pub(crate) prompt: usize,
    pub(crate) answer: usize,
}

impl PreferenceBatch {
    /// The likelihood of each sequence's answer, given the negative log-likelihood of each counted token.
    pub fn answers(&self, nll: &[f32]) -> Vec<Answer> {
        let answer = |(i, span): (usize, &Range<usize>)| {
            let nll = nll.get(span.clone()).unwrap_or_default();
            let counts = self.in_answer.get(span.clone()).unwrap_or_default();
            let tokens = nll.iter().zip(counts).filter(|(_, counts)| **counts);
            Answer {
                log_likelihood: -tokens.clone().map(|(&x, _)| f64::from(x)).sum::<f64>(),
                reference: self.reference.get(i).copied().unwrap_or_default(),
                tokens: tokens.count(),
            }
        };
        self.spans.iter().enumerate().map(answer).collect()
    }
}

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
