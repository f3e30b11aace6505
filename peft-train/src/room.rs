//! How much of a step is in memory at a time, and less of it where the device has no room.
//!
//! A step that a device refuses memory for is made again with fewer blocks that keep their record, then with each micro-batch in
//! parts. Records that are made again are those that were kept, and gradients of parts add up to those of the whole, so the run goes
//! on with the result that it would have had (but for the masks of dropout, which parts have of their own).

use peft_core::{AdapterSet, Ctx, Error, PromptTarget, Result, Route, Segmented, StepRng};

use crate::data::{Batch, Dataset};
use crate::driver::{LossOf, Measured, forward_backward};
use crate::grads::Grads;
use crate::keep::{Checkpointing, Keep};

/// What a step may hold at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) keep: Keep,
    /// Rows of data in one pass, at most.
    pub(crate) rows: usize,
}

impl Room {
    /// The same with half of the records that are kept, where some are.
    fn with_fewer_records(self, blocks: usize) -> Option<Self> {
        let kept = match self.keep.checkpointing {
            Checkpointing::Off => blocks,
            Checkpointing::KeepTop(n) => n.min(blocks),
            Checkpointing::Full => 0,
        };
        let checkpointing = match kept {
            0 => return None,
            1 => Checkpointing::Full,
            n => Checkpointing::KeepTop(n / 2),
        };
        Some(Self { keep: Keep { checkpointing, ..self.keep }, ..self })
    }

    /// What it is, for who reads along.
    pub(crate) fn describe(self, blocks: usize) -> String {
        let kept = match self.keep.checkpointing {
            Checkpointing::Off => "all blocks keep their record".to_owned(),
            Checkpointing::KeepTop(n) => format!("{n} of {blocks} blocks keep their record"),
            Checkpointing::Full => "all blocks run again".to_owned(),
        };
        match self.rows {
            1 => format!("{kept}, one row at a time"),
            rows => format!("{kept}, {rows} rows at a time"),
        }
    }
}

/// Whether an operation failed because the device has no memory left. candle has the driver's words alone.
pub(crate) fn is_out_of_memory(e: &Error) -> bool {
    let text = e.to_string().to_lowercase();
    ["out of memory", "out_of_memory", "alloc_failed"].iter().any(|words| text.contains(words))
}

/// One forward and backward pass, again with fewer records where the device has no room; `grads` holds nothing of passes that failed.
pub(crate) fn pass<'a, M: Segmented>(
    model: &M,
    batch: &Batch,
    ctx: &Ctx<'_>,
    lowest: usize,
    room: &mut Room,
    loss: impl Fn() -> LossOf<'a>,
    grads: &mut Grads,
) -> Result<Measured> {
    loop {
        let before = grads.clone();
        match forward_backward(model, batch, ctx, lowest, room.keep, loss(), grads) {
            Err(e) if is_out_of_memory(&e) => {
                *grads = before;
                *room = room.with_fewer_records(model.num_blocks()).ok_or_else(|| no_room(&e))?;
            }
            done => return done,
        }
    }
}

/// A micro-batch whose loss is a sum over its rows.
pub(crate) struct Rows<'a> {
    pub(crate) batch: &'a Batch,
    /// Where its rows are from.
    pub(crate) dataset: &'a Dataset,
    /// What each counted token's negative log-likelihood is multiplied by.
    pub(crate) scale: f64,
    /// A prompt's own targets, which count once for each sequence.
    pub(crate) of_prompt: &'a [PromptTarget],
    pub(crate) rng: StepRng,
}

impl Rows<'_> {
    /// Forward and backward passes over all rows, in as many parts as there have to be.
    pub(crate) fn pass<M: Segmented>(
        &self,
        model: &M,
        set: &AdapterSet,
        lowest: usize,
        room: &mut Room,
        grads: &mut Grads,
    ) -> Result<Measured> {
        let (mut measured, route) = (Measured::default(), Route::Uniform(0));
        let (mut waiting, mut run) = (vec![self.batch.rows.clone()], 0);
        while let Some(rows) = waiting.pop() {
            if rows.len() > room.rows {
                let (first, rest) = rows.split_at(room.rows.max(1));
                waiting.extend([rest.to_vec(), first.to_vec()]);
                continue;
            }
            let part = (rows.len() < self.batch.rows.len()).then(|| Batch::new(self.dataset, &rows));
            let part = part.as_ref().unwrap_or(self.batch);
            if part.targets().ids.is_empty() {
                continue;
            }
            let once =
                |target: &PromptTarget| PromptTarget { weight: target.weight * part.sequences() as f64, ..*target };
            let of_prompt: Vec<PromptTarget> = self.of_prompt.iter().map(once).collect();
            let loss = || match of_prompt.as_slice() {
                [] => LossOf::Sum(self.scale),
                targets => LossOf::WithPrompt(self.scale, targets),
            };
            let ctx = Ctx::train(set, &route, StepRng { run, ..self.rng });
            match pass(model, part, &ctx, lowest, room, loss, grads) {
                Err(e) if is_out_of_memory(&e) && rows.len() > 1 => {
                    room.rows = rows.len().div_ceil(2);
                    waiting.push(rows);
                }
                made => {
                    measured += made?;
                    run += 1;
                }
            }
        }
        Ok(measured)
    }
}

fn no_room(cause: &Error) -> Error {
    Error::msg(format!(
        "the device is out of memory even with every block run again: lower train.batch_size (and raise \
         train.gradient_accumulation), data.max_length or the adapter's size, use model.dtype = \"bf16\", or give the device to this \
         process alone ({cause})"
    ))
}

#[cfg(test)]
#[path = "room_tests.rs"]
mod tests;
