//! A preference objective over a whole data set.

use peft_core::{Ctx, Error, Result, Segmented};

use crate::data::Preferences;
use crate::driver::token_losses;
use crate::preference::{Preference, PreferenceStep, Scored};
use crate::reference::{Reference, log_likelihoods};

/// What a data set of preferences gave.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PreferencesMeasured {
    /// The objective.
    pub objective: f64,
    /// The likelihood of chosen answers, and the rewards.
    pub scored: Scored,
}

/// The objective and the rewards over all rows, whatever the batch size: KTO's `z` is that of all answers, each behind the prompt
/// next to its own. What is not known of the reference is made, and kept. `progress` is told the rows done.
///
/// # Errors
/// When a tensor operation fails, or the objective is not finite.
pub fn evaluate_preferences<M: Segmented>(
    model: &M,
    preferences: &Preferences,
    objective: &Preference,
    reference: &mut Reference,
    ctx: &Ctx<'_>,
    batch_size: usize,
    mut progress: impl FnMut(usize),
) -> Result<PreferencesMeasured> {
    let rows: Vec<usize> = (0..preferences.len()).collect();
    let batch_size = batch_size.max(1);
    let answers = batch_size * preferences.most_answers();
    if objective.has_reference() {
        reference.learn(model, preferences, &rows, answers, || false)?;
    }
    let mut step =
        PreferenceStep { kl: kl(model, preferences, objective, reference, ctx, answers)?, ..PreferenceStep::default() };
    for rows in rows.chunks(batch_size) {
        let of = PreferenceStep::of(objective, [&preferences.batch(rows, objective.counts_prompts())]);
        step.losses += of.losses;
        step.tokens += of.tokens;
    }
    let mut found = PreferencesMeasured { objective: 0.0, scored: Scored::default() };
    for rows in rows.chunks(batch_size) {
        let batch = reference.batch(preferences, rows, objective)?;
        let weighed = objective.weigh(&token_losses(model, &batch.batch, ctx)?, &batch, &step);
        found.objective += weighed.value;
        found.scored += weighed.scored;
        progress(rows.len());
    }
    if objective.takes_single_answers() {
        found.scored.rewards = found.scored.rewards.with_kl(step.kl);
    }
    if !found.objective.is_finite() {
        return Err(Error::msg(format!("{} of the evaluation rows is not finite; try f32", objective.name())));
    }
    Ok(found)
}

/// KTO's `z` of all rows; 0 with other objectives.
fn kl<M: Segmented>(
    model: &M,
    preferences: &Preferences,
    objective: &Preference,
    reference: &mut Reference,
    ctx: &Ctx<'_>,
    answers: usize,
) -> Result<f64> {
    if !objective.takes_single_answers() {
        return Ok(0.0);
    }
    let rows: Vec<usize> = (0..preferences.len()).collect();
    let pairs = preferences.mismatched(&preferences.chosen_first(&rows));
    let known = reference.mismatched;
    let (mut of_model, mut of_reference) = (0.0, 0.0);
    for pairs in pairs.chunks(answers) {
        let batch = preferences.pack_mismatched(pairs);
        of_model += log_likelihoods(model, &batch, ctx)?.iter().sum::<f64>();
        if known.is_none() {
            of_reference += reference.log_likelihoods(model, &batch)?.iter().sum::<f64>();
        }
    }
    let of_reference = *reference.mismatched.get_or_insert(of_reference);
    Ok(((of_model - of_reference) / pairs.len().max(1) as f64).max(0.0))
}
