//! The loop of a run, whatever a step does: steps, evaluations, checkpoints, the stop flag.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use peft_core::{Error, Result};

use crate::checkpoint::TrainerState;
use crate::data::Sampler;
use crate::driver::Measured;
use crate::early_stop::{EarlyStop, Verdict};
use crate::log::{EvalRow, Progress, RunLogger, StepRow};
use crate::preference::Rewards;
use crate::step::Made;
use crate::trainer::{Ended, Outcome};

/// What an evaluation measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Readings {
    /// The likelihood of the rows' own targets.
    pub measured: Measured,
    /// Accuracy, and F1 where there are classes.
    pub metrics: BTreeMap<String, f64>,
}

/// Where a run stands, and what is due when.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rhythm {
    /// Steps done.
    pub(crate) done: u64,
    /// Steps of the run.
    pub(crate) steps: u64,
    /// Steps between evaluations; 0 evaluates at the end.
    pub(crate) eval_every: u64,
    /// Steps between checkpoints; 0 writes none.
    pub(crate) save_every: u64,
}

/// A run that can be gone on with.
pub trait Resumable {
    /// Goes on from the newest complete checkpoint of the output folder, if there is one; gives its step.
    ///
    /// # Errors
    /// A damaged checkpoint, or one of another run.
    fn resume(&mut self) -> Result<Option<u64>>;

    /// Trains to the end, or until `stop` is raised.
    ///
    /// # Errors
    /// A failed audit, a loss or gradient that is not finite, a judge that fails (the state before it is kept in a checkpoint), a
    /// full disk.
    fn run(&mut self, logger: &mut RunLogger, progress: &mut Progress, stop: &AtomicBool) -> Result<Outcome>;
}

/// What a run is made of.
pub(crate) trait Stages {
    fn rhythm(&self) -> Rhythm;
    /// One step, logged.
    fn step(&mut self, logger: &mut RunLogger, progress: &mut Progress) -> Result<()>;
    /// An evaluation, logged, and whether to stop; the best is kept.
    fn evaluate(&mut self, logger: &mut RunLogger, progress: &mut Progress) -> Result<(Option<Readings>, bool)>;
    /// Writes all that going on needs.
    fn checkpoint(&self, logger: &mut RunLogger) -> Result<PathBuf>;
}

/// Runs to the end, or until `stop` is raised; gives the last evaluation.
///
/// # Errors
/// Those of the stages.
pub(crate) fn run(
    stages: &mut impl Stages,
    logger: &mut RunLogger,
    progress: &mut Progress,
    stop: &AtomicBool,
) -> Result<(Ended, Option<Readings>)> {
    let (mut eval, mut ended) = (None, Ended::Done);
    while stages.rhythm().done < stages.rhythm().steps {
        if stop.load(Ordering::Relaxed) {
            ended = Ended::Interrupted(stages.checkpoint(logger)?);
            break;
        }
        stages.step(logger, progress)?;
        let Rhythm { done, steps, eval_every, save_every } = stages.rhythm();
        let due = |every: u64| every > 0 && done.is_multiple_of(every) && done < steps;
        if due(eval_every) {
            let (readings, stop_now) = stages.evaluate(logger, progress)?;
            eval = readings;
            if stop_now {
                ended = Ended::EarlyStop;
                break;
            }
        }
        if due(save_every) {
            stages.checkpoint(logger)?;
        }
    }
    if ended == Ended::Done {
        eval = stages.evaluate(logger, progress)?.0;
    }
    logger.sync().map_err(message)?;
    Ok((ended, eval))
}

/// Logs an evaluation and says whether it is the best and whether to stop.
///
/// # Errors
/// A watched metric that is not among the readings, a full disk.
pub(crate) fn observe(
    early_stop: &mut EarlyStop,
    step: u64,
    readings: Readings,
    logger: &mut RunLogger,
    progress: &mut Progress,
) -> Result<Verdict> {
    let Readings { measured, metrics } = readings;
    let row = EvalRow { step, eval_loss: measured.nll / measured.counted as f64, metrics };
    let metric = early_stop.metric().to_string();
    let names: Vec<String> = row.values().map(|(name, _)| in_file(name)).collect();
    let value = row.get(&metric).ok_or_else(|| {
        Error::config("train.metric", format!("`{metric}` is not measured here; there are {}", names.join(", ")))
    })?;
    let verdict = early_stop.observe(step, value);
    progress.eval(&row, verdict.is_best);
    logger.eval(&row).map_err(message)?;
    Ok(verdict)
}

impl TrainerState {
    /// Counts a step that was made; gives its row of the log.
    pub(crate) fn advance(
        &mut self,
        made: &Made,
        learning_rate: f64,
        micro_batches: usize,
        tokens: u64,
        started: Instant,
        sampler: &Sampler,
    ) -> StepRow {
        let seconds = started.elapsed().as_secs_f64();
        self.step += 1;
        self.micro_batches = self.micro_batches.wrapping_add(micro_batches as u32);
        self.sampler = sampler.state();
        self.epochs = epochs(sampler);
        self.tokens += tokens;
        self.seconds += seconds;
        self.last_loss = Some(made.loss);
        StepRow {
            step: self.step,
            loss: made.loss,
            objective: made.objective,
            learning_rate,
            grad_norm: made.grad_norm,
            tokens,
            seconds,
            epoch: Some(self.epochs),
            metrics: made.rewards.iter().flat_map(Rewards::named).map(|(k, v)| (k.to_owned(), v)).collect(),
        }
    }
}

/// A metric's name in the log.
fn in_file(name: &str) -> String {
    if name.starts_with("eval_") { name.to_owned() } else { format!("eval_{name}") }
}

/// Passes over the data so far.
fn epochs(sampler: &Sampler) -> f64 {
    let state = sampler.state();
    state.epoch as f64 + state.batch as f64 / sampler.batches_in_epoch(state.epoch).max(1) as f64
}

fn message(e: impl std::fmt::Display) -> Error {
    Error::msg(e.to_string())
}
