//! What training lowers: the loss, T-Few's three losses, a preference objective, or a score that has no gradient.

use std::fmt;
use std::str::FromStr;

use peft_core::suggest::did_you_mean;
use peft_core::{Ctx, Error, Result, Segmented, Task};

use crate::classify::{Confusion, scores_of};
use crate::data::{Batch, ChoiceBatch, PreferenceBatch};
use crate::driver::{Below, Measured, evaluate_above, outputs_above, token_losses_above};
use crate::preference::{Preference, PreferenceStep};
use crate::reference::step_of;
use crate::scores::Scores;
use crate::t_few::{Counts, TFew};

/// What training lowers.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Objective {
    /// Mean negative log-likelihood of the counted tokens (of the rows, with a class head).
    #[default]
    Loss,
    /// Minus the share of rows whose class, or right answer, is the likeliest.
    Accuracy,
    /// Minus the macro F1 of the classes.
    F1,
    /// Minus the Matthews correlation of the classes.
    Mcc,
    /// Minus Pearson's correlation of a regression.
    Pearson,
    /// Minus Spearman's correlation of a regression.
    Spearman,
    /// T-Few's losses on rows with choices.
    TFew(TFew),
    /// A loss of answers of which one is preferred.
    Preference(Preference),
}

impl Objective {
    const NAMES: [&str; 12] =
        ["loss", "accuracy", "f1", "mcc", "pearson", "spearman", "t_few", "dpo", "ipo", "kto", "orpo", "simpo"];

    /// Whether it has a gradient.
    #[must_use]
    pub fn has_gradient(self) -> bool {
        matches!(self, Self::Loss | Self::TFew(_) | Self::Preference(_))
    }

    /// The preference objective that it is.
    #[must_use]
    pub fn preference(self) -> Option<Preference> {
        match self {
            Self::Preference(preference) => Some(preference),
            _ => None,
        }
    }

    /// Whether it compares the answers of rows, on a model with this task.
    #[must_use]
    pub fn compares_choices(self, task: Task) -> bool {
        match self {
            Self::Loss | Self::Preference(_) => false,
            Self::TFew(_) => true,
            _ => !matches!(task, Task::Head { .. }),
        }
    }

    /// The score that it is minus of.
    pub(crate) fn score(self) -> Option<&'static str> {
        match self {
            Self::Loss | Self::TFew(_) | Self::Preference(_) => None,
            Self::Accuracy => Some("accuracy"),
            Self::F1 => Some("f1"),
            Self::Mcc => Some("mcc"),
            Self::Pearson => Some("pearson"),
            Self::Spearman => Some("spearman"),
        }
    }

    /// Refuses a score that a model with this task does not have.
    ///
    /// # Errors
    /// One, naming those that there are.
    pub fn check(self, task: Task) -> Result<()> {
        let names = match task {
            Task::Head { kind, .. } => Scores::names(kind),
            Task::CausalLm | Task::Seq2SeqLm => vec!["accuracy", "f1", "mcc"],
        };
        match self.score() {
            Some(name) if !names.contains(&name) => {
                let known: Vec<_> = Self::NAMES.into_iter().filter(|known| names.contains(known)).collect();
                let message = format!(
                    "`{name}` is not a score of this model's head; use loss{}{}",
                    if known.is_empty() { "" } else { ", " },
                    known.join(", ")
                );
                Err(Error::config("train.objective", message))
            }
            _ => Ok(()),
        }
    }
}

impl FromStr for Objective {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "loss" => Self::Loss,
            "accuracy" => Self::Accuracy,
            "f1" => Self::F1,
            "mcc" => Self::Mcc,
            "pearson" => Self::Pearson,
            "spearman" => Self::Spearman,
            "t_few" => Self::TFew(TFew::default()),
            _ => {
                if let Some(preference) = Preference::named(name) {
                    return Ok(Self::Preference(preference));
                }
                let near = did_you_mean(name, Self::NAMES);
                let message = format!("`{name}` is not an objective{near}; known: {}", Self::NAMES.join(", "));
                return Err(Error::config("train.objective", message));
            }
        })
    }
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loss => "loss",
            Self::TFew(_) => "t_few",
            Self::Preference(preference) => preference.name(),
            score => score.score().unwrap_or_default(),
        })
    }
}

/// A micro-batch of a step.
#[derive(Debug, Clone)]
pub enum MicroBatch {
    /// Rows as they are.
    Rows(Batch),
    /// Rows with all of their answers.
    Choices(ChoiceBatch),
    /// Rows with a preferred answer.
    Preferences(PreferenceBatch),
}

impl MicroBatch {
    /// What the model is given.
    #[must_use]
    pub fn batch(&self) -> &Batch {
        match self {
            Self::Rows(batch) => batch,
            Self::Choices(choices) => &choices.batch,
            Self::Preferences(preferences) => &preferences.batch,
        }
    }

    /// Rows with a preferred answer, if these are.
    pub(crate) fn preferences(&self) -> Option<&PreferenceBatch> {
        match self {
            Self::Preferences(preferences) => Some(preferences),
            Self::Rows(_) | Self::Choices(_) => None,
        }
    }
}

/// The objective over the micro-batches of a step, by forward passes alone, and the likelihood of the rows' own targets.
///
/// # Errors
/// When a tensor operation fails, or the rows are not of the objective's kind.
pub fn measure<M: Segmented>(
    objective: Objective,
    classes: Option<usize>,
    model: &M,
    micro_batches: &[MicroBatch],
    ctx: &Ctx<'_>,
) -> Result<(Measured, f64)> {
    measure_above(objective, classes, model, micro_batches, &[], ctx)
}

/// As [`measure`], each micro-batch from what no parameter reaches, where that is at hand.
pub(crate) fn measure_above<M: Segmented>(
    objective: Objective,
    classes: Option<usize>,
    model: &M,
    micro_batches: &[MicroBatch],
    below: &[Below],
    ctx: &Ctx<'_>,
) -> Result<(Measured, f64)> {
    let (mut tally, mut scores) = (Tally::new(classes), None::<Scores>);
    let (mut of_t_few, mut of_preference) = (0.0, 0.0);
    let of_step = match objective {
        Objective::Preference(objective) => {
            let batches: Vec<_> = micro_batches.iter().filter_map(MicroBatch::preferences).collect();
            step_of(&objective, model, &batches, ctx)?
        }
        _ => PreferenceStep::default(),
    };
    let counts = Counts::of(micro_batches);
    for (i, micro_batch) in micro_batches.iter().enumerate() {
        let below = below.get(i);
        match (micro_batch, objective) {
            (MicroBatch::Rows(batch), _) if batch.targets().ids.is_empty() => {}
            (MicroBatch::Rows(batch), Objective::Loss) => tally.add(evaluate_above(model, batch, below, ctx)?, &[]),
            (MicroBatch::Rows(_), Objective::TFew(_)) => return Err(Error::msg("t_few needs rows with choices")),
            (MicroBatch::Preferences(batch), Objective::Preference(objective)) => {
                let nll = token_losses_above(model, &batch.batch, below, ctx)?;
                let weighed = objective.weigh(&nll, batch, &of_step);
                of_preference += weighed.value;
                tally.add(weighed.scored.own, &[]);
            }
            (MicroBatch::Preferences(_), _) | (_, Objective::Preference(_)) => {
                return Err(Error::msg(format!("{objective} and rows with a preferred answer do not go together")));
            }
            (MicroBatch::Rows(batch), _) => {
                let found = outputs_above(model, batch, below, ctx)?;
                let scores = match &mut scores {
                    Some(scores) => scores,
                    none => none.insert(scores_of(model)?),
                };
                scores.add(batch, None, &found.outputs)?;
                tally.measured += found.measured();
            }
            (MicroBatch::Choices(choices), _) => {
                let nll = token_losses_above(model, &choices.batch, below, ctx)?;
                if let Objective::TFew(losses) = objective {
                    of_t_few += losses.weigh(&nll, choices, &counts).0;
                }
                let found = Chosen::of(choices, &nll);
                tally.add(found.own, &found.pairs);
            }
        }
    }
    let value = match objective {
        Objective::TFew(_) => of_t_few,
        Objective::Preference(_) => of_preference,
        Objective::Loss => tally.loss(),
        score => {
            let name = score.score().unwrap_or_default();
            let value = match &scores {
                Some(scores) => scores.get(name),
                None => tally.get(name),
            };
            -value.ok_or_else(|| Error::msg(format!("rows have no `{name}`")))?
        }
    };
    Ok((tally.measured, value))
}

/// What scores of rows are made of.
#[derive(Debug)]
pub(crate) struct Tally {
    /// The likelihood of the rows' own targets.
    pub(crate) measured: Measured,
    confusion: Confusion,
    right: usize,
    rows: usize,
}

impl Tally {
    /// No row yet; `classes` where all rows choose among the same.
    pub(crate) fn new(classes: Option<usize>) -> Self {
        Self { measured: Measured::default(), confusion: Confusion::new(classes.unwrap_or(0)), right: 0, rows: 0 }
    }

    /// Adds rows, each with its own class or answer and the likeliest.
    pub(crate) fn add(&mut self, own: Measured, pairs: &[(u32, u32)]) {
        self.measured += own;
        self.rows += pairs.len();
        self.right += pairs.iter().filter(|(own, likeliest)| own == likeliest).count();
        pairs.iter().for_each(|&(own, likeliest)| self.confusion.add(own, likeliest));
    }

    /// Mean negative log-likelihood of the rows' own targets, a counted token.
    pub(crate) fn loss(&self) -> f64 {
        self.measured.nll / self.measured.counted.max(1) as f64
    }

    /// Share of rows whose own is the likeliest.
    pub(crate) fn accuracy(&self) -> f64 {
        self.right as f64 / self.rows.max(1) as f64
    }

    /// Macro F1 of the classes.
    pub(crate) fn f1(&self) -> f64 {
        self.confusion.macro_f1()
    }

    /// The score of this name.
    pub(crate) fn get(&self, name: &str) -> Option<f64> {
        match name {
            "accuracy" => Some(self.accuracy()),
            "f1" => Some(self.f1()),
            "mcc" => Some(self.confusion.mcc()),
            _ => None,
        }
    }
}

/// What was chosen in a batch of rows with choices.
pub(crate) struct Chosen {
    /// The likelihood of the rows' own answers.
    pub(crate) own: Measured,
    /// Of each row, its own answer and the likeliest.
    pub(crate) pairs: Vec<(u32, u32)>,
}

impl Chosen {
    pub(crate) fn of(choices: &ChoiceBatch, nll: &[f32]) -> Self {
        let (mut own, mut pairs) = (Measured::default(), Vec::new());
        for (row, scores) in choices.rows.iter().zip(choices.scores(nll)) {
            if let Some(score) = scores.get(row.right) {
                own += Measured { nll: score.nll, counted: score.tokens, hits: 0 };
            }
            pairs.push((row.right as u32, choices.likeliest(&scores) as u32));
        }
        Self { own, pairs }
    }

    pub(crate) fn own_is_likeliest(&self) -> usize {
        self.pairs.iter().filter(|(own, likeliest)| own == likeliest).count()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use peft_core::{AdapterSet, Route};
    use peft_models::Decoder;
    use peft_models::config::DecoderConfig;
    use peft_models::source::{Placement, RandomSource};
    use serde_json::json;

    use super::*;

    /// What lies below the lowest parameter may be run once for all points of a step: not a bit differs.
    #[test]
    fn a_pass_from_what_no_parameter_reaches_is_the_whole_pass() {
        let config = json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 12,
            "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 3, "hidden_act": "silu"});
        let config = DecoderConfig::from_hf_map(config.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
        let placement = Placement::cpu(None);
        let source = RandomSource { seed: 0, std: 0.3, untied_head: true, placement: placement.clone() };
        let model = Decoder::load(config, &source, &placement).unwrap();
        let ids: Vec<u32> = (0..9).map(|i| i * 5 % 32).collect();
        let batch = Batch {
            labels: ids.iter().map(|&id| id as i32).collect(),
            position_ids: vec![0, 1, 2, 3, 0, 1, 2, 3, 4],
            input_ids: ids,
            bounds: vec![0, 4, 9],
            ..Batch::default()
        };
        let set = AdapterSet::empty();
        let ctx = Ctx::eval(&set, &Route::Base);
        let whole = measure(Objective::Loss, None, &model, &[MicroBatch::Rows(batch.clone())], &ctx).unwrap();
        for (lowest, runs) in [(0, false), (1, false), (2, true), (3, true), (4, true)] {
            let below = [Below::run(&model, &batch, lowest, &ctx).unwrap()];
            assert_eq!(below[0].runs(), runs, "segment {lowest}");
            let rows = [MicroBatch::Rows(batch.clone())];
            assert_eq!(measure_above(Objective::Loss, None, &model, &rows, &below, &ctx).unwrap(), whole);
        }
    }
}
