//! One data set through several adapters in one pass: every row once for each of them, in a batch that mixes them.

use peft_core::{AdapterSet, Ctx, Error, Result, Route, Segmented};

use crate::classify::Confusion;
use crate::data::{Batch, Dataset};
use crate::driver::{Measured, token_scores};
use crate::trainer::sum_over;

/// What one of the adapters gave.
#[derive(Debug, Clone)]
pub struct OfAdapter {
    /// Loss over the whole data set.
    pub measured: Measured,
    /// Of a class head.
    pub confusion: Option<Confusion>,
}

/// Loss, and confusion of a head of so many `classes`, over a whole data set for each of `adapters`, by slot; none of them may be one
/// of several tasks. `batch_size` is in rows of the data set, and `progress` is told the rows done.
///
/// # Errors
/// When a tensor operation fails, or a loss is not finite.
pub fn evaluate_each<M: Segmented>(
    model: &M,
    data: &Dataset,
    adapters: &AdapterSet,
    classes: Option<usize>,
    batch_size: usize,
    progress: impl FnMut(usize),
) -> Result<Vec<OfAdapter>> {
    let start = OfAdapter { measured: Measured::default(), confusion: classes.map(Confusion::new) };
    let mut found = vec![start; adapters.names().count()];
    let one = |batch: &Batch| {
        let (rows, each) = (batch.rows.len(), batch.targets().ids.len());
        let batch = Batch::new(data, &batch.rows.repeat(found.len()));
        let slots = (0..found.len()).flat_map(|slot| std::iter::repeat_n(Some(slot), rows));
        // Of an encoder–decoder, the sources come behind all targets in the same order.
        let slots: Vec<_> = slots.cycle().take(batch.sequences()).collect();
        let route = Route::rows(&batch.bounds, &slots);
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
                hits: pairs.clone().filter(|(target, likeliest)| target == likeliest).count(),
            };
            if let Some(confusion) = &mut of.confusion {
                pairs.for_each(|(class, predicted)| confusion.add(*class, *predicted));
            }
            of.measured += measured;
            total += measured;
        }
        Ok(total)
    };
    sum_over(model, data, batch_size, one, progress)?;
    Ok(found)
}
