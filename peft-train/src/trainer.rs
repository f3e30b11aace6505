//! The training loop: batches, steps, evaluations, checkpoints.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::Tensor;
use peft_core::{Adapter, AdapterSet, BaseLayer, Ctx, Error, Parameter, Result, Role, Route, Segmented, Task};
use std::sync::Arc;

use crate::checkpoint::{self, TrainerState};
use crate::classify::{evaluate_choices, evaluate_head};
use crate::data::{Batch, Choices, Dataset, Preferences, Sampler};
use crate::driver::{Measured, evaluate};
use crate::early_stop::{Best, EarlyStop};
use crate::keep::Keep;
use crate::log::{Progress, RunLogger};
use crate::objective::{MicroBatch, Objective};
use crate::optim::OptParam;
use crate::preference_eval::evaluate_preferences;
use crate::reference::{Reference, rows_of_run};
use crate::room::Room;
use crate::run_loop::{self, Readings, Resumable, Rhythm, Stages};
use crate::schedule::Schedule;
use crate::step::Step;
use crate::update_rule::UpdateRule;

/// What a run is made of, every part checked.
#[derive(Debug)]
pub struct Plan {
    /// Training rows.
    pub train: Arc<Dataset>,
    /// Evaluation rows.
    pub eval: Option<Arc<Dataset>>,
    /// What training lowers.
    pub objective: Objective,
    /// The training rows with all of their answers, where the objective compares these.
    pub choices: Option<Arc<Choices>>,
    /// The evaluation rows with all of their answers, of which accuracy and F1 are then made.
    pub eval_choices: Option<Arc<Choices>>,
    /// The rows with a preferred answer, where the objective is one of these.
    pub preferences: Option<PreferenceRows>,
    /// Order of the rows.
    pub sampler: Sampler,
    /// Rows an evaluation batch.
    pub eval_batch_size: usize,
    /// Micro-batches an optimiser step.
    pub accumulation: usize,
    /// Optimiser steps.
    pub steps: u64,
    /// Learning rates.
    pub schedule: Schedule,
    /// Largest gradient norm; 0 is off.
    pub max_grad_norm: f64,
    /// What waits for the backward pass.
    pub keep: Keep,
    /// Rows of a micro-batch in one pass, at most, where its loss is a sum over rows.
    pub rows_at_a_time: usize,
    /// Weight decay.
    pub weight_decay: f64,
    /// LoRA+'s ratio.
    pub loraplus_lr_ratio: f64,
    /// Seed of dropout.
    pub seed: u64,
    /// The output folder.
    pub output: PathBuf,
    /// Optimiser steps between checkpoints; 0 writes none.
    pub save_every: u64,
    /// Optimiser steps between evaluations; 0 evaluates at the end.
    pub eval_every: u64,
    /// Checkpoints that are kept.
    pub keep_checkpoints: usize,
    /// What must be the same when a run is resumed.
    pub fingerprint: String,
}

/// What a preference objective trains on.
#[derive(Debug, Clone)]
pub struct PreferenceRows {
    /// Training rows, in the order of [`Plan::train`].
    pub train: Arc<Preferences>,
    /// Evaluation rows.
    pub eval: Option<Arc<Preferences>>,
    /// An adapter to compare with; the base where there is none.
    pub reference: Option<Arc<Adapter>>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ended {
    /// All steps were made.
    Done,
    /// Evaluation stopped improving.
    EarlyStop,
    /// The stop flag was raised; a checkpoint was written.
    Interrupted(PathBuf),
}

/// What a run did.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// How it ended.
    pub ended: Ended,
    /// The state after the last step.
    pub state: TrainerState,
    /// The last evaluation.
    pub eval: Option<Measured>,
    /// Its further metrics.
    pub metrics: BTreeMap<String, f64>,
    /// The best evaluation.
    pub best: Option<Best>,
}

impl Outcome {
    pub(crate) fn new(ended: Ended, state: TrainerState, eval: Option<Readings>, best: Option<Best>) -> Self {
        let (eval, metrics) = eval.map_or_else(Default::default, |eval| (Some(eval.measured), eval.metrics));
        Self { ended, state, eval, metrics, best }
    }
}

/// Trains `adapter` on `model`.
#[derive(Debug)]
pub struct Trainer<'a, M: Segmented> {
    model: &'a M,
    adapter: Arc<Adapter>,
    set: AdapterSet,
    /// The adapter's, and the same as the optimiser sees them.
    parameters: Vec<Parameter>,
    opt_params: Vec<OptParam>,
    /// The lowest segment with a parameter.
    lowest: usize,
    rule: UpdateRule,
    early_stop: EarlyStop,
    plan: Plan,
    state: TrainerState,
    /// What preference objectives compare with, on the training and on the evaluation rows.
    references: [Option<Reference>; 2],
    /// What may be in memory at a time; less where the device had no room.
    room: Cell<Room>,
}

impl<'a, M: Segmented> Trainer<'a, M> {
    /// A run at its beginning.
    #[must_use]
    pub fn new(
        model: &'a M,
        adapter: Arc<Adapter>,
        rule: impl Into<UpdateRule>,
        early_stop: EarlyStop,
        plan: Plan,
    ) -> Self {
        let set = AdapterSet::one("default", adapter.clone());
        let state = TrainerState { fingerprint: plan.fingerprint.clone(), ..TrainerState::default() };
        let parameters: Vec<Parameter> = adapter.parameters().into_iter().cloned().collect();
        let opt_params = opt_params(&parameters, plan.weight_decay, plan.loraplus_lr_ratio);
        let lowest = adapter.lowest_segment(model.sites()).unwrap_or(0);
        let reference = |rows: &PreferenceRows, of: Option<&Arc<Preferences>>| {
            of.map(|of| Reference::new(rows.reference.clone(), of))
        };
        let references = match &plan.preferences {
            Some(rows) => [reference(rows, Some(&rows.train)), reference(rows, rows.eval.as_ref())],
            None => [None, None],
        };
        let rule = rule.into();
        let room = Cell::new(Room { keep: plan.keep, rows: plan.rows_at_a_time });
        Self { model, adapter, set, parameters, opt_params, lowest, rule, early_stop, plan, state, references, room }
    }

    /// Makes what the run's steps will compare with, until `stop` is raised.
    fn learn_reference(&mut self, progress: &mut Progress, stop: &AtomicBool) -> Result<()> {
        let plan = &self.plan;
        let ([Some(reference), _], Some(rows)) = (&mut self.references, &plan.preferences) else { return Ok(()) };
        let compares = plan.objective.preference().is_some_and(|objective| objective.has_reference());
        if !compares || self.state.step >= plan.steps {
            return Ok(());
        }
        let batches = plan.steps.saturating_mul(plan.accumulation as u64);
        let of_run = rows_of_run(&plan.sampler, batches);
        progress.message(&format!("reference: the likelihoods of {} rows, once", of_run.len()));
        let answers = plan.eval_batch_size.saturating_mul(rows.train.most_answers());
        reference.learn(self.model, &rows.train, &of_run, answers, || stop.load(Ordering::Relaxed))
    }

    /// What changes the parameters, with its state.
    #[must_use]
    pub fn rule(&self) -> &UpdateRule {
        &self.rule
    }

    /// The state now.
    #[must_use]
    pub fn state(&self) -> &TrainerState {
        &self.state
    }

    /// The micro-batches of the coming step.
    fn micro_batches(&mut self) -> Result<Vec<MicroBatch>> {
        let plan = &mut self.plan;
        if let (Some(objective), Some(of), [Some(reference), _]) =
            (plan.objective.preference(), &plan.preferences, &self.references)
        {
            let rows: Vec<Vec<usize>> = (0..plan.accumulation).map(|_| plan.sampler.next_batch()).collect();
            let batches = reference.micro_batches(self.model, &of.train, &rows, &objective)?;
            return Ok(batches.into_iter().map(MicroBatch::Preferences).collect());
        }
        let next = |_| {
            let rows = plan.sampler.next_batch();
            match &plan.choices {
                Some(choices) => MicroBatch::Choices(choices.batch(&rows)),
                None => MicroBatch::Rows(Batch::new(&plan.train, &rows)),
            }
        };
        Ok((0..plan.accumulation).map(next).collect())
    }

    fn not_finite(&self, loss: f64, batches: &[MicroBatch], logger: &mut RunLogger) -> Error {
        let rows: Vec<String> = batches
            .iter()
            .flat_map(|b| match b {
                MicroBatch::Rows(batch) => batch.rows.iter().filter_map(|&r| self.plan.train.source(r)).collect(),
                MicroBatch::Choices(choices) => choices.sources.clone(),
                MicroBatch::Preferences(preferences) => preferences.sources.clone(),
            })
            .take(4)
            .map(|l| l.to_string())
            .collect();
        if let Some(weight) = broken_weight(self.model) {
            return Error::msg(format!("{weight}; the base model is damaged: fetch or convert it again"));
        }
        let what = if loss.is_finite() { "the gradient" } else { "the loss" };
        let kept = match self.checkpoint(logger) {
            Ok(dir) => format!("the state before it is in {}", dir.display()),
            Err(e) => format!("and the state before it could not be saved: {e}"),
        };
        Error::msg(format!(
            "{what} is not finite at step {} (rows {} …): lower train.learning_rate, check these rows, or use f32; {kept}",
            self.state.step + 1,
            rows.join(", ")
        ))
    }
}

impl<M: Segmented> Resumable for Trainer<'_, M> {
    fn resume(&mut self) -> Result<Option<u64>> {
        let Some((step, dir)) = checkpoint::list(&self.plan.output)?.pop() else { return Ok(None) };
        self.state = checkpoint::load(&dir, &self.adapter, &mut self.rule, &self.plan.fingerprint)?;
        self.plan.sampler.seek(self.state.sampler).map_err(|e| Error::file(&dir, e.to_string()))?;
        self.early_stop = EarlyStop::resume(self.early_stop.config().clone(), self.state.early_stop);
        Ok(Some(step))
    }

    fn run(&mut self, logger: &mut RunLogger, progress: &mut Progress, stop: &AtomicBool) -> Result<Outcome> {
        self.learn_reference(progress, stop)?;
        let (ended, eval) = run_loop::run(self, logger, progress, stop)?;
        Ok(Outcome::new(ended, self.state.clone(), eval, self.early_stop.best()))
    }
}

impl<M: Segmented> Stages for Trainer<'_, M> {
    fn rhythm(&self) -> Rhythm {
        let Plan { steps, eval_every, save_every, .. } = self.plan;
        Rhythm { done: self.state.step, steps, eval_every, save_every }
    }

    fn step(&mut self, logger: &mut RunLogger, progress: &mut Progress) -> Result<()> {
        let started = Instant::now();
        let batches = self.micro_batches()?;
        if batches.iter().all(|b| b.batch().targets().ids.is_empty()) {
            return Err(Error::msg("a batch has no counted token"));
        }
        let lr = match &self.rule {
            UpdateRule::Bbt(search) => search.sigma(),
            UpdateRule::Gradient(_) | UpdateRule::Mezo(_) => self.plan.schedule.lr(self.state.step),
        };
        let step = Step {
            model: self.model,
            adapter: &self.adapter,
            set: &self.set,
            plan: &self.plan,
            state: &self.state,
            parameters: &self.parameters,
            opt_params: &self.opt_params,
            lowest: self.lowest,
            room: &self.room,
        };
        let before = self.room.get();
        let made = match &mut self.rule {
            UpdateRule::Gradient(optimizer) => step.by_gradients(&batches, optimizer.as_mut(), lr)?,
            UpdateRule::Mezo(mezo) => step.by_differences(&batches, mezo, lr)?,
            UpdateRule::Bbt(search) => step.by_search(&batches, search)?,
        };
        if self.room.get() != before {
            let now = self.room.get().describe(self.model.num_blocks());
            progress.message(&format!("the device had no room for step {}: from here on {now}", self.state.step + 1));
        }
        if !made.is_finite() {
            return Err(self.not_finite(made.loss, &batches, logger));
        }

        let tokens: usize = batches.iter().map(|b| b.batch().tokens()).sum();
        let row = self.state.advance(&made, lr, batches.len(), tokens as u64, started, &self.plan.sampler);
        progress.step(&row);
        logger.step(&row).map_err(message)
    }

    fn checkpoint(&self, logger: &mut RunLogger) -> Result<PathBuf> {
        logger.sync().map_err(message)?;
        let state = TrainerState { early_stop: self.early_stop.state(), ..self.state.clone() };
        checkpoint::save(&self.plan.output, &state, &self.adapter, &self.rule, self.plan.keep_checkpoints)
    }

    fn evaluate(&mut self, logger: &mut RunLogger, progress: &mut Progress) -> Result<(Option<Readings>, bool)> {
        let preferred = self.preferred_readings()?;
        let readings = match preferred {
            Some(readings) => Some(readings),
            None => readings(self.model, &self.set, &self.plan)?,
        };
        let Some(readings) = readings else { return Ok((None, false)) };
        let verdict = run_loop::observe(&mut self.early_stop, self.state.step, readings.clone(), logger, progress)?;
        if verdict.is_best {
            checkpoint::write_adapter_files(&self.plan.output.join("best"), &self.adapter)?;
        }
        Ok((Some(readings), verdict.stop))
    }
}

impl<M: Segmented> Trainer<'_, M> {
    /// What the evaluation rows give, with a preference objective.
    fn preferred_readings(&mut self) -> Result<Option<Readings>> {
        let plan = &self.plan;
        let eval = plan.preferences.as_ref().and_then(|rows| rows.eval.as_deref());
        let (Some(objective), Some(eval), [_, Some(reference)]) =
            (plan.objective.preference(), eval, &mut self.references)
        else {
            return Ok(None);
        };
        let (route, batch_size) = (Route::Uniform(0), plan.eval_batch_size);
        let ctx = Ctx::eval(&self.set, &route);
        let found = evaluate_preferences(self.model, eval, &objective, reference, &ctx, batch_size, |_| {})?;
        let rewards = found.scored.rewards.named().map(|(k, v)| (k.to_owned(), v));
        let metrics = rewards.chain([("objective".to_owned(), found.objective)]).collect();
        Ok(Some(Readings { measured: found.scored.own, metrics }))
    }
}

/// What the evaluation rows give, where there are any.
fn readings<M: Segmented>(model: &M, set: &AdapterSet, plan: &Plan) -> Result<Option<Readings>> {
    match &plan.eval {
        Some(data) => evaluate_rows(model, set, data, plan.eval_choices.as_deref(), plan.eval_batch_size).map(Some),
        None => Ok(None),
    }
}

/// Loss and scores of rows through the one adapter of `set`.
pub(crate) fn evaluate_rows<M: Segmented>(
    model: &M,
    set: &AdapterSet,
    data: &Dataset,
    choices: Option<&Choices>,
    batch_size: usize,
) -> Result<Readings> {
    let route = Route::Uniform(0);
    let ctx = Ctx::eval(set, &route);
    let mut metrics = BTreeMap::new();
    let measured = match (model.task(), choices) {
        (Task::Head { .. }, _) => {
            let (measured, scores) = evaluate_head(model, data, &ctx, batch_size, |_| {})?;
            metrics.extend(scores.all().into_iter().map(|(name, value)| (name.to_string(), value)));
            return Ok(Readings { measured, metrics });
        }
        (_, Some(choices)) => {
            let found = evaluate_choices(model, choices, &ctx, batch_size, |_| {})?;
            metrics.insert("accuracy".to_string(), found.accuracy());
            metrics.extend(found.f1().map(|f1| ("f1".to_string(), f1)));
            metrics.extend(found.mcc().map(|mcc| ("mcc".to_string(), mcc)));
            found.own
        }
        (_, None) => evaluate_dataset(model, data, &ctx, batch_size, |_| {})?,
    };
    metrics.entry("accuracy".to_string()).or_insert(measured.hits as f64 / measured.counted as f64);
    Ok(Readings { measured, metrics })
}

/// The parameters as optimisers see them: LoRA+'s ratio on LoRA's B, no decay of biases, norms and magnitudes.
#[must_use]
pub fn opt_params(parameters: &[Parameter], weight_decay: f64, loraplus_lr_ratio: f64) -> Vec<OptParam> {
    let of = |p: &Parameter| {
        let lr_scale = if p.role() == Role::LoraB { loraplus_lr_ratio } else { 1.0 };
        let weight_decay = if p.role() == Role::NoDecay { 0.0 } else { weight_decay };
        OptParam { lr_scale, weight_decay, ..OptParam::new(p.name(), p.var().clone()) }
    };
    parameters.iter().map(of).collect()
}

/// The first base weight that holds NaN or infinity, in words. Looked for only when a loss is not finite.
fn broken_weight<M: Segmented>(model: &M) -> Option<String> {
    let f32 = candle_core::DType::F32;
    let checked = |path: &str, t: candle_core::Result<Tensor>| {
        t.ok().and_then(|t| peft_core::check_finite(&format!("{path}.weight"), &t).err()).map(|e| e.to_string())
    };
    model.sites().iter().find_map(|site| match model.layer(site.id).ok()? {
        BaseLayer::Linear(l) => checked(&site.path, l.weight().to_dense(f32)),
        BaseLayer::Embedding(e) => checked(&site.path, e.weight().to_dense(f32)),
        BaseLayer::Norm(n) => checked(&site.path, n.weight().to_dtype(f32)),
        BaseLayer::Experts(e) => e.weights().iter().find_map(|w| checked(&site.path, w.to_dense(f32))),
    })
}

fn message(e: impl std::fmt::Display) -> Error {
    Error::msg(e.to_string())
}

/// Loss over a whole data set, whatever the batch size. `progress` is told the rows done.
///
/// # Errors
/// When a tensor operation fails, or the loss is not finite.
pub fn evaluate_dataset<M: Segmented>(
    model: &M,
    data: &Dataset,
    ctx: &Ctx<'_>,
    batch_size: usize,
    progress: impl FnMut(usize),
) -> Result<Measured> {
    sum_over(model, data, batch_size, |batch| evaluate(model, batch, ctx), progress)
}

/// Sums what `measure` finds over all rows, in batches of similar lengths.
pub(crate) fn sum_over<M: Segmented>(
    model: &M,
    data: &Dataset,
    batch_size: usize,
    mut measure: impl FnMut(&Batch) -> Result<Measured>,
    mut progress: impl FnMut(usize),
) -> Result<Measured> {
    let mut total = Measured::default();
    // By length, so that batches are of even work; the sum does not depend on the order but for rounding in f64.
    let mut rows: Vec<usize> = (0..data.len()).collect();
    rows.sort_by_key(|&r| (data.row_length(r), r));
    for chunk in rows.chunks(batch_size) {
        let batch = Batch::new(data, chunk);
        if !batch.targets().ids.is_empty() {
            total += measure(&batch)?;
        }
        progress(chunk.len());
    }
    if total.counted == 0 {
        return Err(Error::msg("the evaluation data has no counted token"));
    }
    if !total.nll.is_finite() {
        let cause = broken_weight(model).unwrap_or_else(|| "some rows have a probability of zero; try f32".into());
        return Err(Error::msg(format!("the evaluation loss is not finite: {cause}")));
    }
    Ok(total)
}
