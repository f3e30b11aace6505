//! One data set through several adapters in one pass: every row once for each of them, in a batch that mixes them.

use peft_core::{AdapterSet, Ctx, Error, HeadKind, Result, Route, Segmented, Task};

use crate::classify::scores_of;
use crate::data::{Batch, Dataset};
use crate::driver::{Measured, Outputs, outputs_above, token_scores};
use crate::head_loss::HeadLoss;
use crate::scores::{Scores, likeliest};
use crate::trainer::sum_over;

/// What one of the adapters gave.
#[derive(Debug, Clone)]
pub struct OfAdapter {
    /// Loss over the whole data set.
    pub measured: Measured,
    /// Of a head of its own.
    pub scores: Option<Scores>,
}

/// Loss, and scores of a model's own head, over a whole data set for each of `adapters`, by slot; none of them may be one
/// of several tasks. `batch_size` is in rows of the data set, and `progress` is told the rows done.
///
/// # Errors
/// When a tensor operation fails, or a loss is not finite.
pub fn evaluate_each<M: Segmented>(
    model: &M,
    data: &Dataset,
    adapters: &AdapterSet,
    batch_size: usize,
    progress: impl FnMut(usize),
) -> Result<Vec<OfAdapter>> {
    let scores = matches!(model.task(), Task::Head { .. }).then(|| scores_of(model)).transpose()?;
    let start = OfAdapter { measured: Measured::default(), scores };
    let mut found = vec![start; adapters.names().count()];
    let one = |batch: &Batch| {
        let (own, rows, each) = (batch, batch.rows.len(), batch.targets().ids.len());
        let batch = Batch::new(data, &batch.rows.repeat(found.len()));
        let slots = (0..found.len()).flat_map(|slot| std::iter::repeat_n(Some(slot), rows));
        // Of an encoder–decoder, the sources come behind all targets in the same order.
        let slots: Vec<_> = slots.cycle().take(batch.sequences()).collect();
        let route = Route::rows(&batch.bounds, &slots);
        if own.kind != HeadKind::default() || found.iter().any(|of| of.scores.is_some()) {
            let outputs = outputs_above(model, &batch, None, &Ctx::eval(adapters, &route))?;
            return add_outputs(&mut found, own, data, &outputs);
        }
        let (losses, likeliest) = token_scores(model, &batch, &Ctx::eval(adapters, &route))?;
        let targets = batch.targets().ids;
        if each == 0 || [losses.len(), likeliest.len()] != [targets.len(); 2] || targets.len() != each * found.len() {
            return Err(Error::msg("the losses of several adapters do not line up with the batch"));
        }
        let mut total = Measured::default();
        let parts = losses.chunks_exact(each).zip(targets.chunks_exact(each)).zip(likeliest.chunks_exact(each));
        for (of, ((losses, targets), likeliest)) in found.iter_mut().zip(parts) {
            let pairs = targets.iter().zip(likeliest);
            let measured = Measured {
                nll: losses.iter().map(|&x| f64::from(x)).sum(),
                counted: each,
                hits: pairs.filter(|(target, likeliest)| target == likeliest).count(),
            };
            of.measured += measured;
            total += measured;
        }
        Ok(total)
    };
    sum_over(model, data, batch_size, one, progress)?;
    Ok(found)
}

/// Adds what a head made of a batch's rows for one adapter after another.
fn add_outputs(found: &mut [OfAdapter], batch: &Batch, data: &Dataset, of_all: &Outputs) -> Result<Measured> {
    let unequal = || Error::msg("the outputs of several adapters do not line up with the batch");
    let (items, width) = (batch.counted(), of_all.outputs.len() / found.len().max(1));
    if items == 0
        || width == 0
        || of_all.losses.len() != items * found.len()
        || of_all.outputs.len() != width * found.len()
    {
        return Err(unequal());
    }
    let has_classes = HeadLoss::of(batch).is_cross_entropy();
    let mut total = Measured::default();
    let parts = of_all.losses.chunks_exact(items).zip(of_all.outputs.chunks_exact(width));
    for (of, (losses, outputs)) in found.iter_mut().zip(parts) {
        let targets = batch.targets().ids;
        let rows = outputs.chunks_exact((width / targets.len().max(1)).max(1));
        let is_hit = |(row, class): &(&[f32], &u32)| has_classes && likeliest(row) == **class;
        let hits = rows.zip(&targets).filter(is_hit).count();
        let measured = Outputs { losses: losses.to_vec(), hits, outputs: Vec::new() }.measured();
        if let Some(scores) = &mut of.scores {
            scores.add(batch, Some(data), outputs)?;
        }
        of.measured += measured;
        total += measured;
    }
    Ok(total)
}
