//! What evaluation says of a head beside its loss: scores of what it predicts.

use peft_core::{Error, HeadKind, Result};

use crate::classify::Confusion;
use crate::correlation::{pearson, spearman};
use crate::data::{Batch, Dataset};
use crate::spans::SpanScores;

/// A score, by the name that `eval` and `train.metric` have for it.
pub type Named = (&'static str, f64);

/// The scores of one kind of head over rows.
#[derive(Debug, Clone, PartialEq)]
pub enum Scores {
    /// Of classes, of rows or tokens.
    Classes(Confusion),
    /// Of several classes a row.
    Several(Several),
    /// Of numbers.
    Numbers(Numbers),
    /// Of answers.
    Spans(SpanScores),
}

impl Scores {
    /// Nothing yet, for a head of so many outputs.
    #[must_use]
    pub fn new(kind: HeadKind, outputs: usize) -> Self {
        match kind {
            HeadKind::Classification | HeadKind::TokenClassification => Self::Classes(Confusion::new(outputs)),
            HeadKind::MultiLabel => Self::Several(Several { counts: vec![[0; 3]; outputs], rows: 0, right: 0 }),
            HeadKind::Regression => Self::Numbers(Numbers { columns: vec![(Vec::new(), Vec::new()); outputs] }),
            HeadKind::QuestionAnswering => Self::Spans(SpanScores::default()),
        }
    }

    /// Adds a batch with what the head gave for the rows that count, `[counted, outputs]`. `data` is what it is made of, if there is more
    /// to it than its tokens.
    ///
    /// # Errors
    /// Outputs that do not line up with the batch.
    pub fn add(&mut self, batch: &Batch, data: Option<&Dataset>, outputs: &[f32]) -> Result<()> {
        let targets = batch.targets();
        let rows = targets.ids.len();
        let width = outputs.len().checked_div(rows).unwrap_or(0);
        let has_values = matches!(self, Self::Several(_) | Self::Numbers(_));
        if width * rows != outputs.len() || width == 0 || (has_values && batch.values.len() != outputs.len()) {
            return Err(Error::msg("predictions do not line up with the batch"));
        }
        match self {
            Self::Classes(confusion) => {
                for (class, row) in targets.ids.into_iter().zip(outputs.chunks_exact(width)) {
                    confusion.add(class, likeliest(row));
                }
            }
            Self::Several(several) => {
                let rows = outputs.chunks_exact(width).zip(batch.values.chunks_exact(width));
                rows.for_each(|(row, values)| several.add(row, values));
            }
            Self::Numbers(numbers) => {
                let rows = outputs.chunks_exact(width).zip(batch.values.chunks_exact(width));
                rows.for_each(|(row, values)| numbers.add(row, values));
            }
            Self::Spans(spans) => spans.add(batch, &targets.ids, data, outputs)?,
        }
        Ok(())
    }

    /// All scores.
    #[must_use]
    pub fn all(&self) -> Vec<Named> {
        match self {
            Self::Classes(c) => vec![("accuracy", c.accuracy()), ("f1", c.macro_f1()), ("mcc", c.mcc())],
            Self::Several(s) => vec![("accuracy", s.accuracy()), ("f1", s.macro_f1())],
            Self::Numbers(n) => vec![("mse", n.mse()), ("pearson", n.pearson()), ("spearman", n.spearman())],
            Self::Spans(s) => vec![("exact_match", s.exact_match()), ("f1", s.f1())],
        }
    }

    /// The score of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        self.all().into_iter().find(|(of, _)| *of == name).map(|(_, value)| value)
    }

    /// The names of the scores of a kind of head.
    #[must_use]
    pub fn names(kind: HeadKind) -> Vec<&'static str> {
        Self::new(kind, 1).all().into_iter().map(|(name, _)| name).collect()
    }
}

/// The number of the largest output, the first of equal ones.
pub(crate) fn likeliest(row: &[f32]) -> u32 {
    let best =
        row.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, &x)| if x > best.1 { (i, x) } else { best });
    best.0 as u32
}

/// Several classes a row, each predicted where its output is above 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Several {
    /// Of each class: rows that have it, rows that it is predicted for, rows of both.
    counts: Vec<[u64; 3]>,
    rows: u64,
    right: u64,
}

impl Several {
    fn add(&mut self, outputs: &[f32], values: &[f32]) {
        let mut right = true;
        for ((count, &x), &value) in self.counts.iter_mut().zip(outputs).zip(values) {
            let (has, says) = (value > 0.5, x > 0.0);
            right &= has == says;
            for (count, counts) in count.iter_mut().zip([has, says, has && says]) {
                *count += u64::from(counts);
            }
        }
        self.rows += 1;
        self.right += u64::from(right);
    }

    /// Share of rows all of whose classes were predicted and no other (scikit-learn's `accuracy_score`).
    #[must_use]
    pub fn accuracy(&self) -> f64 {
        self.right as f64 / self.rows.max(1) as f64
    }

    /// Mean over all classes of their F1, 0 of one that neither occurs nor is predicted (scikit-learn's
    /// `f1_score(average="macro", zero_division=0)`).
    #[must_use]
    pub fn macro_f1(&self) -> f64 {
        let f1 = |[has, says, both]: &[u64; 3]| 2.0 * *both as f64 / (has + says).max(1) as f64;
        self.counts.iter().map(f1).sum::<f64>() / self.counts.len().max(1) as f64
    }
}

/// Numbers and what was predicted for them. Scores of several outputs are means over them.
#[derive(Debug, Clone, PartialEq)]
pub struct Numbers {
    /// Of each output: predictions, and values.
    columns: Vec<(Vec<f64>, Vec<f64>)>,
}

impl Numbers {
    fn add(&mut self, outputs: &[f32], values: &[f32]) {
        for ((column, &x), &value) in self.columns.iter_mut().zip(outputs).zip(values) {
            column.0.push(f64::from(x));
            column.1.push(f64::from(value));
        }
    }

    fn mean(&self, of: impl Fn(&[f64], &[f64]) -> f64) -> f64 {
        self.columns.iter().map(|(x, y)| of(x, y)).sum::<f64>() / self.columns.len().max(1) as f64
    }

    /// Mean square of the differences.
    #[must_use]
    pub fn mse(&self) -> f64 {
        let of =
            |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - y) * (x - y)).sum::<f64>() / x.len().max(1) as f64;
        self.mean(of)
    }

    /// Pearson's correlation; 0 where predictions or values do not differ.
    #[must_use]
    pub fn pearson(&self) -> f64 {
        self.mean(pearson)
    }

    /// Spearman's rank correlation; 0 where predictions or values do not differ.
    #[must_use]
    pub fn spearman(&self) -> f64 {
        self.mean(spearman)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Against scikit-learn: `accuracy_score`, `f1_score(average="macro", zero_division=0)`.
    #[test]
    fn several_classes_a_row() {
        let mut scores = Scores::new(HeadKind::MultiLabel, 4);
        let Scores::Several(several) = &mut scores else { return };
        for (outputs, values) in [
            ([1.0, -1.0, 0.5, -2.0], [1.0, 0.0, 1.0, 0.0]),
            ([1.0, 2.0, -0.5, -2.0], [1.0, 0.0, 1.0, 0.0]),
            ([-1.0, 2.0, -0.5, -2.0], [0.0, 1.0, 0.0, 0.0]),
            ([0.0, 2.0, 0.5, -2.0], [1.0, 1.0, 0.0, 0.0]),
            ([-3.0, -2.0, -0.5, -2.0], [0.0, 0.0, 0.0, 0.0]),
        ] {
            several.add(&outputs, &values);
        }
        assert!((scores.get("accuracy").unwrap() - 0.6).abs() < 1e-12);
        assert!((scores.get("f1").unwrap() - 0.525).abs() < 1e-12);
        assert_eq!(scores.get("mcc"), None);
    }

    #[test]
    fn numbers_of_two_outputs() {
        let mut scores = Scores::new(HeadKind::Regression, 2);
        let batch = Batch {
            kind: HeadKind::Regression,
            predictor: crate::data::Predictor::Own,
            bounds: vec![0, 1, 2, 3],
            labels: vec![0; 3],
            values: vec![1.0, 5.0, 2.0, 5.0, 4.0, 5.0],
            ..Batch::default()
        };
        scores.add(&batch, None, &[1.0, 4.0, 3.0, 5.0, 3.0, 6.0]).unwrap();
        // Squares 0, 1, 1 and 1, 0, 1; the second output's values do not differ.
        assert!((scores.get("mse").unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert!((scores.get("pearson").unwrap() - 0.755_928_946_018_454_5 / 2.0).abs() < 1e-12);
        assert!((scores.get("spearman").unwrap() - 0.866_025_403_784_438_6 / 2.0).abs() < 1e-12);
        assert!(scores.add(&batch, None, &[1.0; 5]).is_err());
    }
}
