//! Rows with answers of which one is preferred: pairs of a chosen and a rejected answer, or single answers that are desirable or not.
//!
//! What the columns of a row may be is in `preferred_rows.rs`.

use std::ops::Range;

use super::batch::Batch;
use super::dataset::{Dataset, each_encoded};
use super::encode::{EncodeOptions, Encoder, IGNORE_INDEX};
use super::error::{DataError, Location};
use super::format::Format;
use super::preferred_rows::Encoded;
use super::source::{DataSpec, Row, data_files, read_rows};
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
