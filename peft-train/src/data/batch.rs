//! Packed batches: sequences one after another, without padding.

use std::ops::Range;

use peft_core::HeadKind;

use super::dataset::Dataset;
use super::encode::{IGNORE_INDEX, Predictor};

/// Rows as the model takes them. Sequence `i` is `bounds[i]..bounds[i + 1]` of every token-wise field; for an
/// encoder–decoder these are what its decoder reads of all rows, then the source of each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// `[tokens]`.
    pub input_ids: Vec<u32>,
    /// `[tokens]`: from 0 in every sequence.
    pub position_ids: Vec<u32>,
    /// `[sequences + 1]`: where sequences begin, and the number of tokens.
    pub bounds: Vec<usize>,
    /// `[tokens]`, aligned with `input_ids`; −100 where nothing counts.
    pub labels: Vec<i32>,
    /// `[sequences]`: the data set's rows.
    pub rows: Vec<usize>,
    /// `[tokens]`: token types, or empty where all are 0.
    pub types: Vec<u32>,
    /// `[sequences]`: the task of each, or empty where rows have none.
    pub tasks: Vec<usize>,
    /// Whose hidden state predicts a label.
    pub predictor: Predictor,
    /// What the labels are held against; cross-entropy for language models, too.
    pub kind: HeadKind,
    /// `[sequences, outputs]`: what the outputs of a head should be that is for numbers or for several classes, or empty.
    pub values: Vec<f32>,
}

/// The positions that count towards the loss, after the shift.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    /// `[counted]`: rows of the hidden states `[tokens, hidden]` that predict, ascending.
    pub positions: Vec<u32>,
    /// `[counted]`: what each of them should predict. For a head that finds an answer all tokens count, and a bit says which is the
    /// first of it (1) and which the last (2); for one that is for numbers or several classes, [`Batch::values`] are in this order.
    pub ids: Vec<u32>,
}

impl Batch {
    /// Packs rows of a data set, in the order given.
    pub fn new(dataset: &Dataset, rows: &[usize]) -> Self {
        let tokens = rows.iter().map(|&r| dataset.row_length(r)).sum();
        let sequences = if dataset.is_paired() { 2 * rows.len() } else { rows.len() };
        let mut batch = Self {
            input_ids: Vec::with_capacity(tokens),
            position_ids: Vec::with_capacity(tokens),
            bounds: Vec::with_capacity(sequences + 1),
            labels: Vec::with_capacity(tokens),
            rows: rows.to_vec(),
            types: Vec::new(),
            tasks: Vec::new(),
            predictor: dataset.predictor(),
            kind: dataset.kind(),
            values: rows.iter().flat_map(|&row| dataset.values(row)).copied().collect(),
        };
        batch.bounds.push(0);
        for &row in rows {
            batch.push(dataset, row, dataset.source_tokens(row)..dataset.row_length(row));
        }
        if dataset.is_paired() {
            rows.iter().for_each(|&row| batch.push(dataset, row, 0..dataset.source_tokens(row)));
        }
        batch
    }

    /// Adds tokens of a row as a sequence.
    fn push(&mut self, dataset: &Dataset, row: usize, tokens: Range<usize>) {
        self.position_ids.extend((0u32..).take(tokens.len()));
        self.input_ids.extend_from_slice(dataset.input_ids(row).get(tokens.clone()).unwrap_or_default());
        self.labels.extend(dataset.labels(row).get(tokens.clone()).unwrap_or_default());
        self.types.extend_from_slice(dataset.types(row).get(tokens).unwrap_or_default());
        self.tasks.extend(dataset.task(row));
        self.bounds.push(self.input_ids.len());
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.bounds.len().saturating_sub(1)
    }

    /// How many losses its own is the mean of: one a counted token, or one a sequence for a head that finds an answer in it.
    pub fn counted(&self) -> usize {
        if self.kind == HeadKind::QuestionAnswering { self.sequences() } else { self.targets().ids.len() }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Which positions predict a counted label of their own sequence: position `t` predicts `labels[t + 1]`, or `labels[t]`
    /// for a class head and for a decoder that reads shifted targets.
    pub fn targets(&self) -> Targets {
        let mut targets = Targets::default();
        let distance = self.predictor.distance();
        for pair in self.bounds.windows(2) {
            let &[from, to] = pair else { continue };
            let sequence = self.labels.get(from..to).unwrap_or_default();
            for (t, &label) in sequence.iter().enumerate().skip(distance) {
                if label == IGNORE_INDEX {
                    continue;
                }
                if let (Ok(id), Ok(position)) = (u32::try_from(label), u32::try_from(from + t - distance)) {
                    targets.positions.push(position);
                    targets.ids.push(id);
                }
            }
        }
        targets
    }
}
