//! Runs training data through a model for [`peft_lora::eva`].

use peft_core::{Built, Context, Ctx, Error, Result, Route, Segmented};
use peft_lora::LoraConfig;
use peft_lora::eva::EvaObserver;

use crate::data::{Batch, IGNORE_INDEX};
use crate::driver::last_hidden;

/// Batches after which the components are taken as they are. They usually settle within some dozens.
const MOST_BATCHES: usize = 1000;

/// An adapter, and how it was found.
#[derive(Debug)]
pub struct Found {
    /// The adapter at its start.
    pub built: Built,
    /// Batches that were looked at.
    pub batches: usize,
    /// Inputs that were decomposed: layers that share one count once.
    pub inputs: usize,
    /// Those of them whose components settled.
    pub settled: usize,
}

/// An adapter that starts from the principal components of its layers' inputs. `next_batch` gives training data without
/// end.
///
/// # Errors
/// A pattern that matches nothing, batches without counted tokens, or inputs that are not finite.
pub fn start<M: Segmented>(
    config: LoraConfig,
    model: &M,
    seed: u64,
    mut next_batch: impl FnMut() -> Batch,
) -> Result<Found> {
    let observer = EvaObserver::new(config, model, seed)?;
    let route = Route::Uniform(0);
    let pass = |batch: &Batch| {
        let ctx = Ctx::eval(observer.adapters(), &route);
        last_hidden(model, batch, &ctx).map(drop).context("eva")
    };
    pass(&next_batch())?;
    let (mut batches, mut empty) = (0, 0);
    let (inputs, settled) = loop {
        let batch = next_batch();
        let rows = rows(&batch, observer.counted_only());
        if rows.is_empty() {
            empty += 1;
            if empty > MOST_BATCHES {
                return Err(Error::config("eva_config.use_label_mask", "no batch has a counted token"));
            }
            continue;
        }
        observer.begin(rows);
        let (inputs, settled) = observer.converged();
        if settled == inputs || batches == MOST_BATCHES {
            break (inputs, settled);
        }
        pass(&batch)?;
        batches += 1;
    };
    Ok(Found { built: observer.finish(model, seed)?, batches, inputs, settled })
}

/// The tokens to look at: all, or those that are themselves counted (PEFT masks by a token's own label, without the
/// shift of the loss).
fn rows(batch: &Batch, counted_only: bool) -> Vec<u32> {
    let counted = |t: usize| !counted_only || batch.labels.get(t).is_some_and(|&l| l != IGNORE_INDEX);
    (0..batch.tokens()).filter(|&t| counted(t)).filter_map(|t| u32::try_from(t).ok()).collect()
}
