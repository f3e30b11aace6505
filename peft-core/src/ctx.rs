//! What a forward pass is given besides its input: the adapters, which rows use which, and whether it trains.

use std::ops::Range;

use candle_core::Tensor;
use peft_kernels::{Dropout, SequenceSpan, Stream};

use crate::error::Result;
use crate::set::AdapterSet;
use crate::site::SiteId;

/// Whether a forward pass trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// No dropout, no graph.
    Eval,
    /// Dropout acts. With `track`, parameters are tracked; without, the same values flow and no graph is built, which
    /// is how a block is run before it is recomputed in the backward pass.
    Train {
        /// Whether operations on parameters are recorded.
        track: bool,
    },
}

impl Mode {
    /// Whether parameters are tracked.
    #[must_use]
    pub fn tracks(self) -> bool {
        self == Mode::Train { track: true }
    }
}

/// Which adapter each token of a batch goes through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// None: the base model alone.
    Base,
    /// All tokens through one slot of the set.
    Uniform(usize),
    /// Runs of tokens through different slots, `None` for the base alone. The runs cover the batch in order.
    Rows(Vec<(Range<usize>, Option<usize>)>),
}

impl Route {
    /// The route of a packed batch whose sequence `i` holds tokens `bounds[i]..bounds[i + 1]` and uses `slots[i]`.
    /// Neighbours with the same slot become one run.
    #[must_use]
    pub fn rows(bounds: &[usize], slots: &[Option<usize>]) -> Self {
        let mut runs: Vec<(Range<usize>, Option<usize>)> = Vec::new();
        for (span, slot) in bounds.windows(2).zip(slots) {
            match runs.last_mut() {
                Some((run, last)) if last == slot && run.end == span[0] => run.end = span[1],
                _ => runs.push((span[0]..span[1], *slot)),
            }
        }
        match runs.as_slice() {
            [(_, None)] => Route::Base,
            [(_, Some(slot))] => Route::Uniform(*slot),
            _ => Route::Rows(runs),
        }
    }

    /// Whether any tokens go through a slot of which `is` is true.
    pub fn any_slot(&self, is: impl Fn(usize) -> bool) -> bool {
        match self {
            Route::Base => false,
            Route::Uniform(slot) => is(*slot),
            Route::Rows(runs) => runs.iter().any(|(_, slot)| slot.is_some_and(&is)),
        }
    }

    /// The slots that the tokens of a range go through, run by run.
    pub fn slots_of(&self, tokens: Range<usize>) -> impl Iterator<Item = Option<usize>> {
        let no_runs: &[(Range<usize>, Option<usize>)] = &[];
        let (whole, runs) = match self {
            Route::Base => (Some(None), no_runs),
            Route::Uniform(slot) => (Some(Some(*slot)), no_runs),
            Route::Rows(runs) => (None, runs.as_slice()),
        };
        let meets = move |run: &Range<usize>| run.start < tokens.end && tokens.start < run.end;
        whole.into_iter().chain(runs.iter().filter(move |(run, _)| meets(run)).map(|(_, slot)| *slot))
    }

    /// This route with further tokens behind it, `(how many, slot)` after `(how many, slot)`.
    #[must_use]
    pub fn followed_by(&self, tokens: usize, more: impl Iterator<Item = (usize, usize)>) -> Self {
        let Route::Rows(runs) = self else { return self.clone() };
        let mut end = tokens;
        let more = more.map(|(n, slot)| {
            end += n;
            (end - n..end, Some(slot))
        });
        Route::Rows(runs.iter().cloned().chain(more).collect())
    }

    /// The route of a selection of tokens: `rows`, ascending, become tokens `0..rows.len()`.
    #[must_use]
    pub fn select(&self, rows: &[usize]) -> Self {
        let Route::Rows(runs) = self else { return self.clone() };
        let selected = runs.iter().filter_map(|(run, slot)| {
            let (start, end) = (rows.partition_point(|&r| r < run.start), rows.partition_point(|&r| r < run.end));
            (start < end).then_some((start..end, *slot))
        });
        Route::Rows(selected.collect())
    }
}

/// Where random numbers of one step come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepRng {
    /// The run's seed.
    pub seed: u64,
    /// The micro-batch, counted over the whole run.
    pub step: u32,
    /// Which run of tokens of a [`Route::Rows`], where each goes through its adapter apart.
    pub run: u32,
}

/// The explicit context of a forward pass.
#[derive(Debug, Clone, Copy)]
pub struct Ctx<'a> {
    /// The adapters that are loaded.
    pub adapters: &'a AdapterSet,
    /// Which tokens use which of them.
    pub route: &'a Route,
    /// Whether this pass trains.
    pub mode: Mode,
    /// Random numbers of this step.
    pub rng: StepRng,
    /// Which rows each sequence has (`queries`) of how many of its tokens so far (`keys`): fewer where earlier ones are in a cache.
    /// Blocks set it. For modules that ask for it (`reads_sequences`) they cover the rows in order; others may be given none.
    pub sequences: &'a [SequenceSpan],
    /// What a first pass over the base alone made of these tokens, `[tokens, hidden]`, untracked, where an adapter of the route
    /// reads it ([`crate::first_pass`]).
    pub first: Option<&'a Tensor>,
}

impl<'a> Ctx<'a> {
    /// A context for inference.
    #[must_use]
    pub fn eval(adapters: &'a AdapterSet, route: &'a Route) -> Self {
        Self { adapters, route, mode: Mode::Eval, rng: StepRng::default(), sequences: &[], first: None }
    }

    /// A context for training: parameters tracked, dropout of the step `rng`.
    #[must_use]
    pub fn train(adapters: &'a AdapterSet, route: &'a Route, rng: StepRng) -> Self {
        Self { mode: Mode::Train { track: true }, rng, ..Self::eval(adapters, route) }
    }

    /// Whether tokens go through an adapter that reads a first pass ([`crate::Adapter::set_first_pass`]).
    #[must_use]
    pub fn reads_first_pass(&self) -> bool {
        self.route.any_slot(|slot| self.adapters.adapter(slot).is_some_and(|adapter| adapter.first_pass()))
    }

    /// The first pass of a run of these tokens. Rows behind the batch's own, such as those of prompts, have none.
    pub(crate) fn first_of(&self, run: &Range<usize>) -> Result<Option<Tensor>> {
        match self.first {
            Some(first) if run.end <= first.dim(0)? => Ok(Some(first.narrow(0, run.start, run.len())?)),
            _ => Ok(None),
        }
    }

    /// The same context without a graph: parameters untracked, dropout as before.
    #[must_use]
    pub fn untracked(self) -> Self {
        let mode = match self.mode {
            Mode::Eval => Mode::Eval,
            Mode::Train { .. } => Mode::Train { track: false },
        };
        Self { mode, ..self }
    }

    /// Dropout with probability `p` at a site: `None` in evaluation and for `p = 0`. Every site, step and micro-batch
    /// draws its own mask, and the same one when a block is recomputed.
    #[must_use]
    pub fn dropout(&self, site: SiteId, p: f32) -> Option<Dropout> {
        if self.mode == Mode::Eval || p == 0.0 {
            return None;
        }
        Some(Dropout { p, stream: Stream { seed: self.rng.seed, step: self.rng.step, site: site.0 } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_with_one_slot_become_one_run() {
        let bounds = [0, 2, 5, 9, 10];
        assert_eq!(Route::rows(&bounds, &[None; 4]), Route::Base);
        assert_eq!(Route::rows(&bounds, &[Some(1); 4]), Route::Uniform(1));
        let mixed = Route::rows(&bounds, &[Some(0), Some(0), None, Some(1)]);
        assert_eq!(mixed, Route::Rows(vec![(0..5, Some(0)), (5..9, None), (9..10, Some(1))]));
        let slots = |route: &Route, tokens| route.slots_of(tokens).collect::<Vec<_>>();
        assert_eq!(slots(&mixed, 0..5), [Some(0)]);
        assert_eq!(slots(&mixed, 4..10), [Some(0), None, Some(1)]);
        assert_eq!((slots(&Route::Base, 0..5), slots(&Route::Uniform(2), 0..5)), (vec![None], vec![Some(2)]));
        let longer = mixed.followed_by(10, [(3, 1), (2, 0)].into_iter());
        assert_eq!(slots(&longer, 9..15), [Some(1), Some(1), Some(0)]);
        assert_eq!(slots(&longer, 13..15), [Some(0)]);
        assert_eq!(Route::Uniform(2).followed_by(10, [(3, 1)].into_iter()), Route::Uniform(2));
        assert_eq!(mixed.select(&[1, 4, 9]), Route::Rows(vec![(0..2, Some(0)), (2..3, Some(1))]));
    }
}
