//! Packed batches: sequences one after another, without padding.

use super::dataset::Dataset;
use super::encode::{IGNORE_INDEX, Predictor};

/// Rows as the model takes them. Sequence `i` is `bounds[i]..bounds[i + 1]` of every token-wise field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    /// Whose hidden state predicts a label.
    pub predictor: Predictor,
}

/// The positions that count towards the loss, after the shift.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    /// `[counted]`: rows of the hidden states `[tokens, hidden]` that predict, ascending.
    pub positions: Vec<u32>,
    /// `[counted]`: what each of them should predict.
    pub ids: Vec<u32>,
}

impl Batch {
    /// Packs rows of a data set, in the order given.
    pub fn new(dataset: &Dataset, rows: &[usize]) -> Self {
        let tokens = rows.iter().map(|&r| dataset.row_length(r)).sum();
        let mut batch = Self {
            input_ids: Vec::with_capacity(tokens),
            position_ids: Vec::with_capacity(tokens),
            bounds: Vec::with_capacity(rows.len() + 1),
            labels: Vec::with_capacity(tokens),
            rows: rows.to_vec(),
            types: Vec::new(),
            predictor: dataset.predictor(),
        };
        batch.bounds.push(0);
        for &row in rows {
            batch.input_ids.extend_from_slice(dataset.input_ids(row));
            batch.labels.extend_from_slice(dataset.labels(row));
            batch.types.extend_from_slice(dataset.types(row));
            batch.position_ids.extend((0u32..).take(dataset.row_length(row)));
            batch.bounds.push(batch.input_ids.len());
        }
        batch
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.bounds.len().saturating_sub(1)
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Which positions predict a counted label of their own sequence: position `t` predicts `labels[t + 1]`, or `labels[t]`
    /// for a class head.
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
