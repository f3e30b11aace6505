//! A run of Black-Box Prompt Learning: the same loop, records and checkpoints as other training has.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use peft_core::{Error, Result, atomic};

use super::Bdpl;
use crate::checkpoint::{self, TrainerState};
use crate::data::Sampler;
use crate::driver::Measured;
use crate::early_stop::EarlyStop;
use crate::log::{Progress, RunLogger};
use crate::objective::Objective;
pub use crate::run_loop::Readings;
use crate::run_loop::{self, Resumable, Rhythm, Stages};
use crate::schedule::Schedule;
use crate::step::Made;
use crate::trainer::Outcome;

/// Name of the prompt's file in an output folder.
pub const PROMPT_FILE: &str = "prompt.txt";

/// What reads prompts and says how good they are.
pub trait Judge {
    /// The likelihood of the rows' own answers behind a prompt and the value of the objective, for each prompt. `rows` are the
    /// numbers of training rows, a list a micro-batch.
    ///
    /// # Errors
    /// When the model, or its server, fails.
    fn judge(&mut self, prompts: &[String], rows: &[Vec<usize>]) -> Result<Vec<(Measured, f64)>>;

    /// What the evaluation rows give behind a prompt, where there are any.
    ///
    /// # Errors
    /// As [`Judge::judge`].
    fn evaluate(&mut self, prompt: &str) -> Result<Option<Readings>>;

    /// Tokens of training rows, as far as they are known here.
    fn tokens(&self, rows: &[Vec<usize>]) -> u64;

    /// Writes what a prompt is besides a text: an adapter, where there is a model here.
    ///
    /// # Errors
    /// When the disk refuses.
    fn write(&self, prompt: &str, folder: &Path) -> Result<()>;
}

/// What a run is made of, every part checked.
#[derive(Debug)]
pub struct BdplPlan {
    /// What training lowers.
    pub objective: Objective,
    /// Order of the rows.
    pub sampler: Sampler,
    /// Micro-batches a step.
    pub accumulation: usize,
    /// Steps.
    pub steps: u64,
    /// Learning rates.
    pub schedule: Schedule,
    /// The output folder.
    pub output: PathBuf,
    /// Steps between checkpoints; 0 writes none.
    pub save_every: u64,
    /// Steps between evaluations; 0 evaluates at the end.
    pub eval_every: u64,
    /// Checkpoints that are kept.
    pub keep_checkpoints: usize,
    /// What must be the same when a run is resumed.
    pub fingerprint: String,
}

/// Finds a prompt that `judge` finds good.
#[derive(Debug)]
pub struct BdplTrainer<J> {
    bdpl: Bdpl,
    judge: J,
    early_stop: EarlyStop,
    plan: BdplPlan,
    state: TrainerState,
}

impl<J: Judge> BdplTrainer<J> {
    /// A run at its beginning.
    #[must_use]
    pub fn new(bdpl: Bdpl, judge: J, early_stop: EarlyStop, plan: BdplPlan) -> Self {
        let state = TrainerState { fingerprint: plan.fingerprint.clone(), ..TrainerState::default() };
        Self { bdpl, judge, early_stop, plan, state }
    }

    /// The likeliest prompt.
    #[must_use]
    pub fn prompt(&self) -> String {
        self.bdpl.text(&self.bdpl.likeliest())
    }

    /// What judged it.
    #[must_use]
    pub fn judge(&self) -> &J {
        &self.judge
    }

    /// Writes the likeliest prompt, as a text and as whatever else the judge makes of it.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let prompt = self.prompt();
        std::fs::create_dir_all(folder).map_err(|e| Error::write(folder, e))?;
        self.judge.write(&prompt, folder)?;
        atomic::write_file(folder.join(PROMPT_FILE), prompt.as_bytes())
    }

    /// Keeps the state, and says where in the error that ends the run.
    fn ended_by(&self, why: impl std::fmt::Display, logger: &mut RunLogger) -> Error {
        Error::msg(match self.checkpoint(logger) {
            Ok(dir) => format!("{why}; the state before it is in {}, go on with --resume", dir.display()),
            Err(e) => format!("{why}; and the state before it could not be saved: {e}"),
        })
    }
}

impl<J: Judge> Resumable for BdplTrainer<J> {
    fn resume(&mut self) -> Result<Option<u64>> {
        let Some((step, dir)) = checkpoint::list(&self.plan.output)?.pop() else { return Ok(None) };
        let state = checkpoint::read_trainer_state(&dir, &self.plan.fingerprint)?;
        checkpoint::read_rule_state(&dir, |tensors| self.bdpl.load_state(tensors))?;
        self.plan.sampler.seek(state.sampler).map_err(|e| Error::file(&dir, e.to_string()))?;
        self.early_stop = EarlyStop::resume(self.early_stop.config().clone(), state.early_stop);
        self.state = state;
        Ok(Some(step))
    }

    fn run(&mut self, logger: &mut RunLogger, progress: &mut Progress, stop: &AtomicBool) -> Result<Outcome> {
        let (ended, eval) = run_loop::run(self, logger, progress, stop)?;
        Ok(Outcome::new(ended, self.state.clone(), eval, self.early_stop.best()))
    }
}

impl<J: Judge> Stages for BdplTrainer<J> {
    fn rhythm(&self) -> Rhythm {
        let BdplPlan { steps, eval_every, save_every, .. } = self.plan;
        Rhythm { done: self.state.step, steps, eval_every, save_every }
    }

    fn step(&mut self, logger: &mut RunLogger, progress: &mut Progress) -> Result<()> {
        let started = Instant::now();
        // A step that fails leaves the order of rows where it was.
        let mut sampler = self.plan.sampler.clone();
        let rows: Vec<Vec<usize>> = (0..self.plan.accumulation).map(|_| sampler.next_batch()).collect();
        let drawn = self.bdpl.draw(self.state.step)?;
        let prompts: Vec<String> = drawn.iter().map(|chosen| self.bdpl.text(chosen)).collect();
        let judged = match self.judge.judge(&prompts, &rows) {
            Ok(judged) => judged,
            Err(e) => return Err(self.ended_by(e, logger)),
        };
        let mut measured = Measured::default();
        judged.iter().for_each(|(own, _)| measured += *own);
        let losses: Vec<f64> = judged.iter().map(|(_, value)| *value).collect();
        let lr = self.plan.schedule.lr(self.state.step);
        let mean = losses.iter().sum::<f64>() / losses.len().max(1) as f64;
        let loss = measured.nll / measured.counted.max(1) as f64;
        let made = Made {
            loss: if mean.is_finite() { loss } else { mean },
            objective: (self.plan.objective != Objective::Loss).then_some(mean),
            grad_norm: self.bdpl.update(&drawn, &losses, lr)?,
            rewards: None,
        };
        if !made.is_finite() {
            let why = format!("the loss is not finite at step {}: check the rows, or use f32", self.state.step + 1);
            return Err(self.ended_by(why, logger));
        }
        self.plan.sampler = sampler;
        let tokens = self.judge.tokens(&rows);
        let row = self.state.advance(&made, lr, rows.len(), tokens, started, &self.plan.sampler);
        progress.step(&row);
        logger.step(&row).map_err(|e| Error::msg(e.to_string()))
    }

    fn checkpoint(&self, logger: &mut RunLogger) -> Result<PathBuf> {
        logger.sync().map_err(|e| Error::msg(e.to_string()))?;
        let state = TrainerState { early_stop: self.early_stop.state(), ..self.state.clone() };
        let rule = self.bdpl.state()?;
        checkpoint::save_with(&self.plan.output, &state, &rule, self.plan.keep_checkpoints, |folder| self.write(folder))
    }

    fn evaluate(&mut self, logger: &mut RunLogger, progress: &mut Progress) -> Result<(Option<Readings>, bool)> {
        let prompt = self.prompt();
        let readings = match self.judge.evaluate(&prompt) {
            Ok(Some(readings)) => readings,
            Ok(None) => return Ok((None, false)),
            Err(e) => return Err(self.ended_by(e, logger)),
        };
        let verdict = run_loop::observe(&mut self.early_stop, self.state.step, readings.clone(), logger, progress)?;
        if verdict.is_best {
            self.write(&self.plan.output.join("best"))?;
        }
        Ok((Some(readings), verdict.stop))
    }
}
