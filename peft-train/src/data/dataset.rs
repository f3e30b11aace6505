//! Encoded rows, flat in memory.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use peft_core::HeadKind;
use rayon::prelude::*;

use super::encode::{EncodeOptions, Encoder, Example, IGNORE_INDEX, Predictor};
use super::error::{DataError, Location};
use super::format::Format;
use super::labels::Labels;
use super::questions::Question;
use super::source::{DataSpec, Row, data_files, read_rows};
use super::tokenizer::TextTokenizer;

/// Rows encoded together by the thread pool; also the number of undigested rows in memory.
const CHUNK: usize = 256;

/// All rows of a training or evaluation set, one after another: 4 bytes a token, and 4 more where labels are not its tokens.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    input_ids: Vec<u32>,
    labels: Labels,
    /// Aligned with `input_ids`, or empty where all are 0.
    types: Vec<u32>,
    /// How many tokens of each row are the source of an encoder–decoder, or empty where rows are one sequence.
    source_tokens: Vec<u32>,
    /// The task of each row, or empty where rows have none.
    tasks: Vec<u32>,
    predictor: Predictor,
    kind: HeadKind,
    /// `[rows, outputs]`, or empty where rows have none.
    values: Vec<f32>,
    /// Of each row, or empty where they are not kept.
    questions: Vec<Arc<Question>>,
    bounds: Vec<usize>,
    sources: Vec<(u32, u64)>,
    files: Vec<(Arc<Path>, bool)>,
    parts: Vec<Range<usize>>,
    weights: Option<Vec<f64>>,
    stats: DatasetStats,
}

/// What a data set holds, in rows and tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DatasetStats {
    /// Rows.
    pub rows: usize,
    /// Tokens of all rows.
    pub tokens: usize,
    /// Tokens that count towards the loss.
    pub counted_tokens: usize,
    /// Tokens of the longest row.
    pub max_length: usize,
    /// Rows that lost context before their first target to `max_length`.
    pub truncated_prompts: usize,
    /// Rows that lost counted tokens to `max_length`.
    pub truncated_targets: usize,
    /// Whole targets (later turns) lost to `max_length`.
    pub lost_targets: usize,
}

impl std::fmt::Display for DatasetStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} rows, {} tokens ({} counted), longest row {}",
            self.rows, self.tokens, self.counted_tokens, self.max_length
        )?;
        if self.truncated_prompts > 0 {
            write!(f, "; {} rows with context cut", self.truncated_prompts)?;
        }
        if self.truncated_targets > 0 {
            write!(f, "; {} rows with counted tokens cut", self.truncated_targets)?;
        }
        if self.lost_targets > 0 {
            write!(f, "; {} later turns cut as a whole", self.lost_targets)?;
        }
        Ok(())
    }
}

impl Dataset {
    /// Reads and encodes everything that `spec` names, in order, on all threads. Without `format`, the first row's
    /// columns decide it, for all files. Returns the format too.
    ///
    /// # Errors
    /// The first unreadable or unusable row, with file and line; settings that do not fit.
    pub fn load(
        spec: &DataSpec,
        format: Option<Format>,
        tokenizer: Option<&dyn TextTokenizer>,
        options: &EncodeOptions,
    ) -> Result<(Self, Format), DataError> {
        let (paths, weights) = spec.parts()?;
        let files: Vec<Vec<_>> = paths.iter().map(|p| data_files(p)).collect::<Result<_, _>>()?;
        let format = match format {
            Some(format) => format,
            None => first_format(&files, options)?,
        };
        let options = EncodeOptions { format, ..options.clone() };
        let encoder = Encoder::new(tokenizer, &options)?;
        let mut dataset = Self::new();
        for part in files {
            let start = dataset.len();
            for path in part {
                each_encoded(&path, |row| encoder.encode(row), |example| dataset.push(&example))?;
            }
            dataset.parts.push(start..dataset.len());
        }
        dataset.weights = weights;
        Ok((dataset, format))
    }

    pub(super) fn new() -> Self {
        Self { bounds: vec![0], ..Self::default() }
    }

    /// Collects examples made elsewhere, as one part.
    pub fn from_examples<'e>(examples: impl IntoIterator<Item = &'e Example>) -> Self {
        let mut dataset = Self::new();
        for example in examples {
            dataset.push(example);
        }
        dataset.parts.push(0..dataset.len());
        dataset
    }

    /// Adds a row behind the others, to no part.
    pub(super) fn push(&mut self, example: &Example) {
        self.labels.extend(&example.labels, &example.input_ids, &self.input_ids);
        self.input_ids.extend_from_slice(&example.input_ids);
        if !(self.types.is_empty() && example.types.is_empty()) {
            self.types.resize(self.bounds.last().copied().unwrap_or_default(), 0);
            self.types.extend_from_slice(&example.types);
            self.types.resize(self.input_ids.len(), 0);
        }
        if !(self.source_tokens.is_empty() && example.source_tokens == 0) {
            self.source_tokens.resize(self.len(), 0);
            self.source_tokens.push(example.source_tokens as u32);
        }
        self.tasks.extend(example.task);
        self.predictor = example.predictor;
        self.kind = example.head.kind;
        self.values.extend_from_slice(&example.head.values);
        self.questions.extend(example.head.question.clone());
        self.bounds.push(self.input_ids.len());
        let at = &example.source;
        if self.files.last().is_none_or(|(file, _)| **file != *at.file) {
            self.files.push((Arc::clone(&at.file), at.is_line));
        }
        self.sources.push((self.files.len() as u32 - 1, at.number));
        let stats = &mut self.stats;
        stats.rows += 1;
        stats.tokens += example.input_ids.len();
        let counts = example.labels.iter().skip(example.predictor.distance()).filter(|l| **l != IGNORE_INDEX);
        // A question has one answer among all of its tokens.
        stats.counted_tokens += if self.kind == HeadKind::QuestionAnswering { 1 } else { counts.count() };
        stats.max_length = stats.max_length.max(example.input_ids.len());
        stats.truncated_prompts += usize::from(example.truncation.prompt_tokens > 0);
        stats.truncated_targets += usize::from(example.truncation.target_tokens > 0);
        stats.lost_targets += example.truncation.whole_targets;
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.sources.len()
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    fn range(&self, row: usize) -> Range<usize> {
        match (self.bounds.get(row), self.bounds.get(row + 1)) {
            (Some(&from), Some(&to)) => from..to,
            _ => 0..0,
        }
    }

    /// Token ids of a row; empty for a row that does not exist.
    pub fn input_ids(&self, row: usize) -> &[u32] {
        self.input_ids.get(self.range(row)).unwrap_or_default()
    }

    /// Labels of a row, aligned with its ids; empty for a row that does not exist.
    pub fn labels(&self, row: usize) -> Vec<i32> {
        self.labels.get(self.range(row), &self.input_ids)
    }

    /// Token types of a row, aligned with its ids; empty where all are 0.
    pub fn types(&self, row: usize) -> &[u32] {
        self.types.get(self.range(row)).unwrap_or_default()
    }

    /// How many tokens of a row, in front, are the source of an encoder–decoder; 0 where the row is one sequence.
    pub fn source_tokens(&self, row: usize) -> usize {
        self.source_tokens.get(row).map_or(0, |&n| n as usize)
    }

    /// The task of a row, where rows have one.
    pub fn task(&self, row: usize) -> Option<usize> {
        self.tasks.get(row).map(|&task| task as usize)
    }

    /// What the head is for, of rows for a head of its own.
    pub fn kind(&self) -> HeadKind {
        self.kind
    }

    /// What a row holds instead of one class, `[outputs]`; empty where it holds nothing.
    pub fn values(&self, row: usize) -> &[f32] {
        let outputs = self.values.len().checked_div(self.len()).unwrap_or(0);
        self.values.get(row * outputs..(row + 1) * outputs).unwrap_or_default()
    }

    /// The texts of a row's question, where they were kept.
    pub fn question(&self, row: usize) -> Option<&Question> {
        self.questions.get(row).map(Arc::as_ref)
    }

    /// Whether some rows that are kept have no answer.
    pub fn has_unanswerable(&self) -> bool {
        self.questions.iter().any(|question| question.answers.is_empty())
    }

    /// Whether rows are a source and what a decoder reads.
    pub fn is_paired(&self) -> bool {
        !self.source_tokens.is_empty()
    }

    /// Whose hidden state predicts a label.
    pub fn predictor(&self) -> Predictor {
        self.predictor
    }

    /// Tokens of a row.
    pub fn row_length(&self, row: usize) -> usize {
        self.range(row).len()
    }

    /// Where a row comes from.
    pub fn source(&self, row: usize) -> Option<Location> {
        let &(file, number) = self.sources.get(row)?;
        let (path, is_line) = self.files.get(file as usize)?;
        Some(Location { file: Arc::clone(path), number, is_line: *is_line })
    }

    /// The rows of each part of a mixture; one part where there is no mixture.
    pub fn parts(&self) -> &[Range<usize>] {
        &self.parts
    }

    /// The weights of the parts; none where every row is taken once an epoch.
    pub fn weights(&self) -> Option<&[f64]> {
        self.weights.as_deref()
    }

    /// Rows and tokens.
    pub fn stats(&self) -> DatasetStats {
        self.stats
    }
}

/// The format that the columns of the first row of a data set decide, as [`Dataset::load`] finds it.
///
/// # Errors
/// An unreadable row, columns of no format.
pub fn format_of(spec: &DataSpec, options: &EncodeOptions) -> Result<Format, DataError> {
    let files: Vec<Vec<_>> = spec.parts()?.0.iter().map(|p| data_files(p)).collect::<Result<_, _>>()?;
    first_format(&files, options)
}

/// The format that the first row's columns decide.
pub(super) fn first_format(files: &[Vec<std::path::PathBuf>], options: &EncodeOptions) -> Result<Format, DataError> {
    let path = files.iter().flatten().next().ok_or_else(|| DataError::Config("no data file".into()))?;
    match read_rows(path)?.next() {
        Some(Ok(row)) if options.class_head.is_some() => {
            let has = |name: &str| row.fields.contains_key(name);
            let kind = options.class_head.as_ref().map_or(HeadKind::default(), |head| head.kind);
            let of_head = match kind {
                HeadKind::TokenClassification if has("tokens") => Some(Format::TokenClassification),
                HeadKind::QuestionAnswering if has("question") && has("context") => Some(Format::QuestionAnswering),
                HeadKind::MultiLabel | HeadKind::Regression if has("text") && has("labels") => {
                    Some(Format::Classification)
                }
                _ => None,
            };
            match of_head.filter(|_| !has("input_ids")) {
                Some(format) => Ok(format),
                None => detected(&row, options),
            }
        }
        Some(Ok(row)) => detected(&row, options),
        Some(Err(e)) => Err(e),
        None => Err(DataError::file(path, "no rows")),
    }
}

fn detected(row: &Row, options: &EncodeOptions) -> Result<Format, DataError> {
    Format::detect(row.fields.keys().map(String::as_str), options.template.is_some()).map_err(|e| match e {
        DataError::Config(message) => DataError::row(&row.at, message),
        other => other,
    })
}

/// Encodes all rows of a file on all threads, and hands on what comes of them in the file's order. The threads end with it: each
/// remembers 10,000 words of the tokenizer, and what else it has allocated in between stays in pieces among them.
pub(super) fn each_encoded<T: Send>(
    path: &Path,
    encode: impl Fn(&Row) -> Result<T, DataError> + Sync,
    mut take: impl FnMut(T),
) -> Result<(), DataError> {
    let mut rows = read_rows(path)?;
    let threads = rayon::ThreadPoolBuilder::new().build();
    let threads = threads.map_err(|e| DataError::Config(format!("no threads to read {} with: {e}", path.display())))?;
    loop {
        let (chunk, failure) = next_chunk(&mut rows);
        let encoded: Vec<_> = threads.install(|| chunk.par_iter().map(&encode).collect());
        for one in encoded {
            take(one?);
        }
        match failure {
            Some(e) => return Err(e),
            None if chunk.len() < CHUNK => return Ok(()),
            None => {}
        }
    }
}

/// The next rows, and what stopped them before the chunk was full.
fn next_chunk(rows: &mut impl Iterator<Item = Result<Row, DataError>>) -> (Vec<Row>, Option<DataError>) {
    let mut chunk = Vec::new();
    for row in rows.take(CHUNK) {
        match row {
            Ok(row) => chunk.push(row),
            Err(e) => return (chunk, Some(e)),
        }
    }
    (chunk, None)
}
