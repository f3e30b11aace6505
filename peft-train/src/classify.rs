//! Measuring a head: its loss and scores over a data set. Classes: accuracy, F1 and Matthews correlation.

use peft_core::{Ctx, Error, Result, Segmented, Task};

use crate::data::{Batch, Choices, Dataset};
use crate::driver::{Measured, outputs_above, token_losses};
use crate::objective::Chosen;
use crate::scores::Scores;
use crate::trainer::sum_over;

/// How often each class was predicted for each class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    /// `[class, prediction]`.
    counts: Vec<u64>,
}

impl Confusion {
    /// No row yet.
    #[must_use]
    pub fn new(classes: usize) -> Self {
        Self { classes, counts: vec![0; classes.saturating_mul(classes)] }
    }

    /// Counts a row of `class` for which `predicted` was the likeliest.
    pub fn add(&mut self, class: u32, predicted: u32) {
        let at = class as usize * self.classes + predicted as usize;
        if let Some(count) = self.counts.get_mut(at) {
            *count += 1;
        }
    }

    fn count(&self, class: usize, predicted: usize) -> u64 {
        self.counts.get(class * self.classes + predicted).copied().unwrap_or(0)
    }

    /// Share of rows whose class was predicted.
    #[must_use]
    pub fn accuracy(&self) -> f64 {
        let right: u64 = (0..self.classes).map(|c| self.count(c, c)).sum();
        right as f64 / self.counts.iter().sum::<u64>().max(1) as f64
    }

    /// Matthews correlation of class and prediction, for any number of classes (Gorodkin 2004, scikit-learn's `matthews_corrcoef`);
    /// 0 where all rows are of one class or predicted as one.
    #[must_use]
    pub fn mcc(&self) -> f64 {
        let of = |c: usize| -> (u64, u64) {
            ((0..self.classes).map(|p| self.count(c, p)).sum(), (0..self.classes).map(|t| self.count(t, c)).sum())
        };
        let all = self.counts.iter().sum::<u64>() as f64;
        let right: u64 = (0..self.classes).map(|c| self.count(c, c)).sum();
        let (mut both, mut rows, mut columns) = (0.0, 0.0, 0.0);
        for (row, column) in (0..self.classes).map(of) {
            both += row as f64 * column as f64;
            rows += (row as f64).powi(2);
            columns += (column as f64).powi(2);
        }
        let spread = (all * all - rows) * (all * all - columns);
        if spread > 0.0 { (right as f64 * all - both) / spread.sqrt() } else { 0.0 }
    }

    /// Mean over the classes of the harmonic mean of precision and recall; a class that neither occurs nor is predicted
    /// is left out (scikit-learn's `f1_score(average="macro")`).
    #[must_use]
    pub fn macro_f1(&self) -> f64 {
        let scores: Vec<f64> = (0..self.classes)
            .filter_map(|c| {
                let row: u64 = (0..self.classes).map(|p| self.count(c, p)).sum();
                let column: u64 = (0..self.classes).map(|t| self.count(t, c)).sum();
                (row + column > 0).then(|| 2.0 * self.count(c, c) as f64 / (row + column) as f64)
            })
            .collect();
        scores.iter().sum::<f64>() / scores.len().max(1) as f64
    }
}

/// Loss and scores of a model with a head of its own over a whole data set, whatever the batch size. `progress` is told the rows done.
///
/// # Errors
/// When the model has no such head, a tensor operation fails, or the loss is not finite.
pub fn evaluate_head<M: Segmented>(
    model: &M,
    data: &Dataset,
    ctx: &Ctx<'_>,
    batch_size: usize,
    progress: impl FnMut(usize),
) -> Result<(Measured, Scores)> {
    let mut scores = scores_of(model)?;
    let one = |batch: &Batch| {
        let found = outputs_above(model, batch, None, ctx)?;
        scores.add(batch, Some(data), &found.outputs)?;
        Ok(found.measured())
    };
    let measured = sum_over(model, data, batch_size, one, progress)?;
    Ok((measured, scores))
}

/// The scores of a model's head, of nothing yet.
pub(crate) fn scores_of<M: Segmented>(model: &M) -> Result<Scores> {
    match model.task() {
        Task::Head { kind, outputs, .. } => Ok(Scores::new(kind, outputs)),
        _ => Err(Error::msg("this model has no head but that of a language model")),
    }
}

/// What rows with several possible answers gave.
#[derive(Debug, Clone, PartialEq)]
pub struct ChoicesMeasured {
    /// The likelihood of the rows' own answers.
    pub own: Measured,
    /// Rows.
    pub rows: usize,
    /// Rows whose own answer is the likeliest.
    pub right: usize,
    confusion: Option<Confusion>,
}

impl ChoicesMeasured {
    /// Share of rows whose own answer is the likeliest.
    #[must_use]
    pub fn accuracy(&self) -> f64 {
        self.right as f64 / self.rows.max(1) as f64
    }

    /// Matthews correlation, where the answers are the same for all rows.
    #[must_use]
    pub fn mcc(&self) -> Option<f64> {
        self.confusion.as_ref().map(Confusion::mcc)
    }

    /// Macro F1, where the answers are the same for all rows.
    #[must_use]
    pub fn f1(&self) -> Option<f64> {
        self.confusion.as_ref().map(Confusion::macro_f1)
    }
}

/// For every row, which of its answers is the likeliest. `progress` is told the rows done.
///
/// # Errors
/// When a tensor operation fails.
pub fn evaluate_choices<M: Segmented>(
    model: &M,
    choices: &Choices,
    ctx: &Ctx<'_>,
    batch_size: usize,
    mut progress: impl FnMut(usize),
) -> Result<ChoicesMeasured> {
    let mut measured = ChoicesMeasured {
        own: Measured::default(),
        rows: 0,
        right: 0,
        confusion: choices.classes().map(Confusion::new),
    };
    let rows: Vec<usize> = (0..choices.len()).collect();
    for rows in rows.chunks(batch_size.max(1)) {
        let batch = choices.batch(rows);
        let found = Chosen::of(&batch, &token_losses(model, &batch.batch, ctx)?);
        measured.own += found.own;
        measured.rows += found.pairs.len();
        measured.right += found.own_is_likeliest();
        if let Some(confusion) = &mut measured.confusion {
            found.pairs.iter().for_each(|&(own, likeliest)| confusion.add(own, likeliest));
        }
        progress(rows.len());
    }
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against scikit-learn: `accuracy_score`, `f1_score(average="macro")`, `matthews_corrcoef`.
    #[test]
    fn scores_of_three_classes() {
        let mut c = Confusion::new(3);
        for (class, predicted) in [(0, 0), (0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 2), (2, 0)] {
            c.add(class, predicted);
        }
        assert!((c.accuracy() - 0.625).abs() < 1e-12);
        // Precision and recall: 2/3 and 2/3; 1/2 and 1/2; 2/3 and 2/3.
        assert!((c.macro_f1() - (2.0 / 3.0 + 0.5 + 2.0 / 3.0) / 3.0).abs() < 1e-12);
        assert!((c.mcc() - 0.428_571_428_571_428_55).abs() < 1e-12);
        assert_eq!((Confusion::new(2).accuracy(), Confusion::new(2).mcc()), (0.0, 0.0));
        let mut two = Confusion::new(2);
        for (class, predicted) in [(1, 1), (1, 0), (1, 1), (0, 1), (0, 0), (1, 1), (0, 0)] {
            two.add(class, predicted);
        }
        assert!((two.mcc() - 0.416_666_666_666_666_6).abs() < 1e-12);
        let mut one_sided = Confusion::new(2);
        [(0, 1), (1, 1), (0, 1)].into_iter().for_each(|(class, predicted)| one_sided.add(class, predicted));
        assert_eq!(one_sided.mcc(), 0.0);
    }

    #[test]
    fn a_class_that_does_not_occur_is_left_out() {
        let mut c = Confusion::new(4);
        c.add(0, 0);
        c.add(1, 0);
        // F1 of class 0 is 2/3, of class 1 it is 0; the others neither occur nor are predicted.
        assert!((c.macro_f1() - 1.0 / 3.0).abs() < 1e-12);
        c.add(9, 0);
        assert!((c.accuracy() - 0.5).abs() < 1e-12);
    }
}
