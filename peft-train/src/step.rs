//! One optimiser step: by gradients of its micro-batches, or by differences of losses.

use std::cell::Cell;

use candle_core::Tensor;
use peft_core::{Adapter, AdapterSet, Ctx, Error, Parameter, Result, Role, Route, Segmented, StepRng, TrainingHook};

use crate::audit::{AuditEntry, audit_gradients};
use crate::bbt::{self, Bbt, Depth};
use crate::checkpoint::TrainerState;
use crate::driver::{Below, LossOf, Measured};
use crate::grads::Grads;
use crate::mezo::{Estimate, Mezo};
use crate::objective::{Chosen, MicroBatch, Objective, measure_above};
use crate::optim::{OptParam, Optimizer, clip_grad_norm};
use crate::preference::{PreferenceStep, Rewards, Scored};
use crate::reference::step_of;
use crate::room::{self, Room, Rows};
use crate::t_few::Counts;
use crate::trainer::Plan;

/// What a step works on.
pub(crate) struct Step<'a, M> {
    pub(crate) model: &'a M,
    pub(crate) adapter: &'a Adapter,
    pub(crate) set: &'a AdapterSet,
    pub(crate) plan: &'a Plan,
    pub(crate) state: &'a TrainerState,
    pub(crate) parameters: &'a [Parameter],
    pub(crate) opt_params: &'a [OptParam],
    /// The lowest segment with a parameter.
    pub(crate) lowest: usize,
    /// What may be in memory at a time.
    pub(crate) room: &'a Cell<Room>,
}

/// What a step measured. Where a value is not finite, nothing was updated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Made {
    /// Mean negative log-likelihood of the rows' own targets.
    pub(crate) loss: f64,
    /// What is lowered, where it is something else.
    pub(crate) objective: Option<f64>,
    pub(crate) grad_norm: f64,
    /// With a preference objective.
    pub(crate) rewards: Option<Rewards>,
}

/// What the backward passes of a step measured.
#[derive(Default)]
struct Passed {
    measured: Measured,
    objective: Option<f64>,
    rewards: Option<Rewards>,
}

impl Made {
    pub(crate) fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.grad_norm.is_finite() && self.objective.is_none_or(f64::is_finite)
    }
}

impl<M: Segmented> Step<'_, M> {
    /// Backward through every micro-batch, one update by `optimizer`.
    pub(crate) fn by_gradients(
        &self,
        micro_batches: &[MicroBatch],
        optimizer: &mut dyn Optimizer,
        learning_rate: f64,
    ) -> Result<Made> {
        let refs: Vec<&Parameter> = self.parameters.iter().collect();
        let mut grads = Grads::new(&refs);
        let Passed { measured, objective, rewards } = self.backward(micro_batches, &mut grads)?;
        // What is logged is the data's loss alone, so that runs and methods compare.
        let loss = measured.nll / measured.counted.max(1) as f64;
        let mut grads = grads.into_vec();
        let penalty = match self.adapter.training_hook() {
            Some(hook) => add_penalty(hook, self.parameters, &mut grads)?,
            None => 0.0,
        };
        let norm = clip_grad_norm(&mut grads, self.plan.max_grad_norm).map_err(message)?;
        let made = Made { loss, objective, grad_norm: norm.norm, rewards };
        if !(made.is_finite() && norm.is_finite() && penalty.is_finite()) {
            let loss = if penalty.is_finite() { loss } else { penalty };
            return Ok(Made { loss, grad_norm: f64::NAN, ..made });
        }
        if self.state.step == 0 {
            audit(self.parameters, &grads)?;
        }
        optimizer.step(self.opt_params, &grads, learning_rate).map_err(message)?;
        if let Some(hook) = self.adapter.training_hook() {
            let named = self.parameters.iter().zip(&grads).filter_map(|(p, g)| Some((p.name(), g.as_ref()?)));
            hook.after_step(self.state.step, &named.collect())?;
        }
        Ok(made)
    }

    /// What the micro-batches of a preference objective share.
    fn preferences(&self, micro_batches: &[MicroBatch]) -> Result<PreferenceStep> {
        let Some(objective) = self.plan.objective.preference() else { return Ok(PreferenceStep::default()) };
        let batches: Vec<_> = micro_batches.iter().filter_map(MicroBatch::preferences).collect();
        step_of(&objective, self.model, &batches, &Ctx::eval(self.set, &Route::Uniform(0)))
    }

    /// Gradients of all micro-batches; the likelihood of the rows' own targets, and the objective where it is another.
    fn backward(&self, micro_batches: &[MicroBatch], grads: &mut Grads) -> Result<Passed> {
        let counted: usize = micro_batches.iter().map(|b| b.batch().counted()).sum();
        let (counts, route) = (Counts::of(micro_batches), Route::Uniform(0));
        let of_step = self.preferences(micro_batches)?;
        let (mut measured, mut objective, mut rewards) = (Measured::default(), None, None);
        // A prompt's own targets count once for each row.
        let of_prompt = self.adapter.training_hook().map_or(&[][..], |hook| hook.prompt_targets());
        let rows: usize = micro_batches.iter().map(|b| b.batch().sequences()).sum();
        let mut room = self.room.get();
        for (i, micro_batch) in micro_batches.iter().enumerate() {
            let batch = micro_batch.batch();
            if batch.targets().ids.is_empty() {
                continue;
            }
            let rng = StepRng { seed: self.plan.seed, step: self.state.micro_batches.wrapping_add(i as u32), run: 0 };
            let ctx = Ctx::train(self.set, &route, rng);
            match (self.plan.objective, micro_batch) {
                (Objective::TFew(_) | Objective::Preference(_), _) if !of_prompt.is_empty() => {
                    let message = format!("{} is not the loss of this method; use loss", self.plan.objective);
                    return Err(Error::config("train.objective", message));
                }
                (Objective::TFew(losses), MicroBatch::Choices(choices)) => {
                    let found = Cell::new((0.0, Measured::default()));
                    let weigh = |nll: &[f32]| {
                        let (value, weights) = losses.weigh(nll, choices, &counts);
                        found.set((value, Chosen::of(choices, nll).own));
                        weights
                    };
                    room::pass(self.model, batch, &ctx, self.lowest, &mut room, || LossOf::Weighed(&weigh), grads)?;
                    let (value, own) = found.get();
                    measured += own;
                    objective = Some(objective.unwrap_or(0.0) + value);
                }
                (Objective::Preference(preference), MicroBatch::Preferences(preferences)) => {
                    let found = Cell::new((0.0, Scored::default()));
                    let weigh = |nll: &[f32]| {
                        let weighed = preference.weigh(nll, preferences, &of_step);
                        found.set((weighed.value, weighed.scored));
                        weighed.weights
                    };
                    room::pass(self.model, batch, &ctx, self.lowest, &mut room, || LossOf::Weighed(&weigh), grads)?;
                    let (value, scored) = found.get();
                    measured += scored.own;
                    objective = Some(objective.unwrap_or(0.0) + value);
                    let sum: &mut Rewards = rewards.get_or_insert_default();
                    *sum += scored.rewards;
                    if preference.takes_single_answers() {
                        *sum = sum.with_kl(of_step.kl);
                    }
                }
                (Objective::Loss, MicroBatch::Rows(_)) => {
                    let scale = 1.0 / (counted + rows * of_prompt.len()) as f64;
                    let rows = Rows { batch, dataset: &self.plan.train, scale, of_prompt, rng };
                    measured += rows.pass(self.model, self.set, self.lowest, &mut room, grads)?;
                }
                (objective, _) => {
                    return Err(Error::msg(format!("objective {objective} has no gradient on these rows")));
                }
            }
        }
        self.room.set(room);
        Ok(Passed { measured, objective, rewards })
    }

    /// Losses at two points for each sample, one update along the samples' directions. Dropout is off.
    pub(crate) fn by_differences(
        &self,
        micro_batches: &[MicroBatch],
        mezo: &mut Mezo,
        learning_rate: f64,
    ) -> Result<Made> {
        let why = "either nothing of the model reads them, or train.mezo_eps is too small";
        self.forward_only(micro_batches, self.lowest, why, |loss| mezo.step(self.opt_params, learning_rate, loss))
    }

    /// The losses of a generation's candidates, one step of the search. Dropout is off.
    pub(crate) fn by_search(&self, micro_batches: &[MicroBatch], search: &mut Bbt) -> Result<Made> {
        let prompt = bbt::prompt_of(self.adapter)?;
        let lowest = match search.depth() {
            Depth::Embeddings => self.lowest,
            // Blocks below the one whose prompt is searched are the same for all candidates.
            Depth::EveryBlock => search.turn() + 1,
        };
        let write = |block: usize, rows: &Tensor| match self.depth_of_prompt() {
            Depth::Embeddings => prompt.set(rows),
            Depth::EveryBlock => bbt::write_block(self.model, prompt, block, rows),
        };
        let why = "either nothing of the model reads them, or train.bbt_alpha is too small";
        self.forward_only(micro_batches, lowest, why, |loss| search.step(write, loss))
    }

    fn depth_of_prompt(&self) -> Depth {
        match self.adapter.virtual_tokens() {
            Some(tokens) if !tokens.is_prompt() => Depth::EveryBlock,
            _ => Depth::Embeddings,
        }
    }

    /// What `update` makes of the objective of the micro-batches, which it is given as a function of the parameters as they are
    /// when it calls. `lowest` is the lowest segment that it changes; `why` ends the message where it changes nothing.
    fn forward_only(
        &self,
        micro_batches: &[MicroBatch],
        lowest: usize,
        why: &str,
        update: impl FnOnce(&mut dyn FnMut() -> Result<f64>) -> Result<Estimate>,
    ) -> Result<Made> {
        let route = Route::Uniform(0);
        let ctx = Ctx::eval(self.set, &route);
        let classes = self.plan.choices.as_ref().and_then(|c| c.classes());
        // What lies below the lowest parameter is the same at all points of a step.
        let below = micro_batches.iter().map(|b| Below::run(self.model, b.batch(), lowest, &ctx));
        let below = below.collect::<Result<Vec<_>>>()?;
        let mut measured = Measured::default();
        let estimate = update(&mut || {
            let (found, value) = measure_above(self.plan.objective, classes, self.model, micro_batches, &below, &ctx)?;
            measured += found;
            Ok(value)
        })?;
        let plain = self.plan.objective == Objective::Loss;
        if plain && self.state.step == 0 && estimate.norm == 0.0 && estimate.loss.is_finite() {
            return Err(Error::msg(format!("moving all trainable parameters does not move the loss: {why}")));
        }
        let loss = measured.nll / measured.counted.max(1) as f64;
        let loss = if estimate.loss.is_finite() { loss } else { estimate.loss };
        Ok(Made { loss, objective: (!plain).then_some(estimate.loss), grad_norm: estimate.norm, rewards: None })
    }
}

fn audit(parameters: &[Parameter], grads: &[Option<Tensor>]) -> Result<()> {
    // LoRA's A has an exactly zero gradient only while its B is zero; an adapter that was resumed has a gradient.
    let fresh = parameters.iter().filter(|p| p.role() == Role::LoraB).all(|p| is_zero(&p.value()).unwrap_or(false));
    // A layer whose ranks were all taken away has parameters without an element.
    let trained = parameters.iter().zip(grads).filter(|(p, _)| p.elem_count() > 0);
    let entries = trained.map(|(p, g)| AuditEntry {
        name: p.name(),
        grad: g.as_ref(),
        allow_zero: p.role() == Role::Rows || (p.role() == Role::ZeroAtStart && fresh),
    });
    audit_gradients(entries).map_err(message)
}

/// Adds the gradients of the method's own term of the loss, and gives the term.
fn add_penalty(hook: &dyn TrainingHook, parameters: &[Parameter], grads: &mut [Option<Tensor>]) -> Result<f64> {
    let (value, gradients) = hook.penalty()?;
    for (name, gradient) in gradients {
        let Some((_, sum)) = parameters.iter().zip(&mut *grads).find(|(p, _)| p.name() == name) else { continue };
        *sum = Some(match sum.take() {
            Some(sum) => (&sum + gradient.to_dtype(sum.dtype())?)?,
            None => gradient,
        });
    }
    Ok(value)
}

fn is_zero(t: &Tensor) -> candle_core::Result<bool> {
    Ok(t.abs()?.max_all()?.to_dtype(candle_core::DType::F32)?.to_scalar::<f32>()? == 0.0)
}

fn message(e: impl std::fmt::Display) -> Error {
    Error::msg(e.to_string())
}
