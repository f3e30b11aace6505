//! Which rows form which batch: a function of the seed and the epoch alone, so that a run resumes from two numbers.
//!
//! - Without `shuffle`: file order, `batch_size` rows a batch.
//! - With it: every epoch has an order of its own.
//! - `group_by_length`: rows of one batch have similar lengths. The order is cut into windows of 50 batches, each window is
//!   sorted by length (longest first) and cut into batches; with `shuffle`, all batches are then shuffled.
//! - `packing`: a batch takes rows until a token budget is full, instead of a fixed number of rows. Rows stay apart (a batch
//!   carries sequence bounds and attention keeps to them), so packing changes only how many rows share a step.
//! - A mixture draws each part by its weight, as many rows in sum as the parts have. A part that has more rows than its
//!   share goes on in the next epoch where it stopped; one that has fewer begins again. So all rows of a part are seen
//!   equally often, give or take one.
//!
//! No row is dropped: a last batch may be smaller.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::dataset::Dataset;
use super::error::DataError;
use super::rng::Rng;

/// Batches in a window of `group_by_length`.
const WINDOW: usize = 50;

/// Purposes of random streams.
const STREAM_ROWS: u64 = 1;
const STREAM_MIX: u64 = 2;
const STREAM_BATCHES: u64 = 3;

/// How rows are put into batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SamplerOptions {
    /// Rows a batch.
    pub batch_size: usize,
    /// A new order every epoch; file order otherwise.
    pub shuffle: bool,
    /// Key of all orders.
    pub seed: u64,
    /// Similar lengths together.
    pub group_by_length: bool,
    /// Tokens a batch instead of rows: `batch_size · max_length` fills what `batch_size` full rows would.
    pub packing: Option<usize>,
}

impl Default for SamplerOptions {
    /// Batches of 8 shuffled rows, seed 0.
    fn default() -> Self {
        Self { batch_size: 8, shuffle: true, seed: 0, group_by_length: false, packing: None }
    }
}

/// Where a run stands: the next batch to be drawn. All that resume needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplerState {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Batch within the epoch, from 0.
    pub batch: usize,
}

/// Endless sequence of batches of rows, epoch after epoch.
#[derive(Clone, Debug)]
pub struct Sampler {
    lengths: Vec<u32>,
    parts: Vec<(Range<usize>, usize)>,
    options: SamplerOptions,
    state: SamplerState,
    plan: Plan,
}

/// The batches of one epoch.
#[derive(Clone, Debug, Default)]
struct Plan {
    rows: Vec<u32>,
    bounds: Vec<usize>,
}

impl Plan {
    fn len(&self) -> usize {
        self.bounds.len().saturating_sub(1)
    }

    fn batch(&self, i: usize) -> Option<&[u32]> {
        self.rows.get(*self.bounds.get(i)?..*self.bounds.get(i + 1)?)
    }
}

impl Sampler {
    /// A sampler at the first batch of epoch 0.
    ///
    /// # Errors
    /// An empty data set, `batch_size = 0`, both `packing` and `group_by_length`, a row longer than the packing budget.
    pub fn new(dataset: &Dataset, options: SamplerOptions) -> Result<Self, DataError> {
        let config = |message: String| Err(DataError::Config(message));
        if dataset.is_empty() {
            return config("the data has no rows".into());
        }
        if u32::try_from(dataset.len()).is_err() {
            return config("the data has more than 4,294,967,295 rows".into());
        }
        if options.batch_size == 0 {
            return config("train.batch_size must be 1 or more".into());
        }
        if options.packing.is_some() && options.group_by_length {
            return config(
                "packing fills batches by tokens, group_by_length by rows of similar length; choose one of them".into(),
            );
        }
        if let Some(budget) = options.packing
            && let Some(row) = (0..dataset.len()).find(|&r| dataset.row_length(r) > budget)
        {
            let at = dataset.source(row).map(|s| s.to_string()).unwrap_or_default();
            return config(format!(
                "{at}: the row has {} tokens, a packed batch {budget}; set data.max_length or a larger batch_size",
                dataset.row_length(row)
            ));
        }
        let mut sampler = Self {
            lengths: (0..dataset.len()).map(|r| u32::try_from(dataset.row_length(r)).unwrap_or(u32::MAX)).collect(),
            parts: shares(dataset.parts(), dataset.weights()),
            options,
            state: SamplerState::default(),
            plan: Plan::default(),
        };
        sampler.plan = sampler.plan_epoch(0);
        Ok(sampler)
    }

    /// Rows of the next batch; moves on, into the next epoch after the last batch.
    pub fn next_batch(&mut self) -> Vec<usize> {
        let rows = self.plan.batch(self.state.batch).unwrap_or_default().iter().map(|&r| r as usize).collect();
        self.state.batch += 1;
        if self.state.batch >= self.plan.len() {
            self.state = SamplerState { epoch: self.state.epoch + 1, batch: 0 };
            self.plan = self.plan_epoch(self.state.epoch);
        }
        rows
    }

    /// The same at the first batch of epoch 0.
    pub(crate) fn restarted(&self) -> Self {
        Self { state: SamplerState::default(), plan: self.plan_epoch(0), ..self.clone() }
    }

    /// Rows of the data.
    pub(crate) fn rows(&self) -> usize {
        self.lengths.len()
    }

    /// The next batch to be drawn.
    pub fn state(&self) -> SamplerState {
        self.state
    }

    /// Goes to a batch; what follows is what followed when [`Sampler::state`] gave this state.
    ///
    /// # Errors
    /// A batch that the epoch does not have: the data or the settings are not those of the saved run.
    pub fn seek(&mut self, state: SamplerState) -> Result<(), DataError> {
        let plan = self.plan_epoch(state.epoch);
        if state.batch >= plan.len() {
            return Err(DataError::Config(format!(
                "can't resume at batch {} of epoch {}: the epoch has {} batches; data, batch_size, packing or mixture have \
                 changed since the checkpoint",
                state.batch,
                state.epoch,
                plan.len()
            )));
        }
        self.plan = plan;
        self.state = state;
        Ok(())
    }

    /// Batches of an epoch. The same for all epochs, except with packing of shuffled rows and with mixtures.
    pub fn batches_in_epoch(&self, epoch: u64) -> usize {
        if epoch == self.state.epoch {
            return self.plan.len();
        }
        if self.options.packing.is_none() {
            let rows: usize = self.parts.iter().map(|(_, count)| count).sum();
            return rows.div_ceil(self.options.batch_size);
        }
        self.plan_epoch(epoch).len()
    }

    fn plan_epoch(&self, epoch: u64) -> Plan {
        let seed = self.options.seed;
        let mut rows = Vec::new();
        for (part, (range, count)) in self.parts.iter().enumerate() {
            self.draw(part as u64, range, *count, epoch, &mut rows);
        }
        if self.options.shuffle && self.parts.len() > 1 {
            Rng::new(&[seed, STREAM_MIX, epoch]).shuffle(&mut rows);
        }
        let size = self.options.batch_size;
        if self.options.group_by_length {
            for window in rows.chunks_mut(size.saturating_mul(WINDOW)) {
                window.sort_by_key(|&r| std::cmp::Reverse(self.length(r)));
            }
        }
        let mut bounds = vec![0];
        match self.options.packing {
            Some(budget) => {
                let mut tokens = 0usize;
                for (i, &row) in rows.iter().enumerate() {
                    let length = self.length(row);
                    if tokens + length > budget && tokens > 0 {
                        bounds.push(i);
                        tokens = 0;
                    }
                    tokens += length;
                }
                bounds.push(rows.len());
            }
            None => bounds.extend((1..=rows.len().div_ceil(size)).map(|b| b.saturating_mul(size).min(rows.len()))),
        }
        let plan = Plan { rows, bounds };
        if !(self.options.group_by_length && self.options.shuffle) {
            return plan;
        }
        let mut order: Vec<usize> = (0..plan.len()).collect();
        Rng::new(&[seed, STREAM_BATCHES, epoch]).shuffle(&mut order);
        let mut shuffled = Plan { rows: Vec::with_capacity(plan.rows.len()), bounds: vec![0] };
        for b in order {
            shuffled.rows.extend_from_slice(plan.batch(b).unwrap_or_default());
            shuffled.bounds.push(shuffled.rows.len());
        }
        shuffled
    }

    fn length(&self, row: u32) -> usize {
        self.lengths.get(row as usize).copied().unwrap_or_default() as usize
    }

    /// `count` rows of a part for an epoch: the part's rows stand in an endless line, one permutation after another, and
    /// each epoch takes the next `count`.
    fn draw(&self, part: u64, range: &Range<usize>, count: usize, epoch: u64, rows: &mut Vec<u32>) {
        let size = range.len() as u64;
        if size == 0 {
            return;
        }
        let from = u128::from(epoch) * count as u128;
        let mut turn = (from / u128::from(size)) as u64;
        let mut at = (from % u128::from(size)) as usize;
        let mut left = count;
        while left > 0 {
            let mut line: Vec<u32> = range.clone().map(|r| r as u32).collect();
            if self.options.shuffle {
                Rng::new(&[self.options.seed, STREAM_ROWS, part, turn]).shuffle(&mut line);
            }
            let taken = left.min(line.len() - at);
            rows.extend_from_slice(line.get(at..at + taken).unwrap_or_default());
            left -= taken;
            at = 0;
            turn += 1;
        }
    }
}

/// How many rows of an epoch each part gets: all of them without weights; otherwise the total split by weight, largest
/// remainders first.
fn shares(parts: &[Range<usize>], weights: Option<&[f64]>) -> Vec<(Range<usize>, usize)> {
    let Some(weights) = weights else {
        return parts.iter().map(|p| (p.clone(), p.len())).collect();
    };
    let total: usize = parts.iter().map(Range::len).sum();
    let sum: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|w| w / sum * total as f64).collect();
    let mut counts: Vec<usize> = exact.iter().map(|x| x.floor() as usize).collect();
    let mut order: Vec<usize> = (0..exact.len()).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    let missing = total.saturating_sub(counts.iter().sum());
    for &i in order.iter().cycle().take(missing) {
        counts[i] += 1;
    }
    parts.iter().cloned().zip(counts).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_weights_and_add_up() {
        let parts = [0..10, 10..13, 13..20];
        let counts = |w: &[f64]| shares(&parts, Some(w)).into_iter().map(|(_, n)| n).collect::<Vec<_>>();
        assert_eq!(counts(&[1.0, 1.0, 2.0]), [5, 5, 10]);
        assert_eq!(counts(&[1.0, 1.0, 1.0]), [7, 7, 6]);
        assert_eq!(counts(&[1e-9, 1.0, 1e-9]), [0, 20, 0]);
    }
}
