//! What a recipe says of preference objectives.

use crate::optim::OptimizerKind;
use crate::preference::{DpoLoss, Preference, PreferenceLoss};
use crate::recipe::{Recipe, TrainTable};

/// The metric that picks the best adapter where a recipe names none.
pub(crate) const METRIC: &str = "eval_objective";

/// The settings that a recipe gives `objective`, an objective of this name.
pub(crate) fn settings(
    objective: Option<Preference>,
    name: &str,
    t: &TrainTable,
) -> Result<Option<Preference>, String> {
    let of = |names: &[&'static str]| objective.is_some_and(|objective| names.contains(&objective.name()));
    let all = ["dpo", "ipo", "kto", "orpo", "simpo"];
    let given: [(&str, bool, &[&'static str]); 7] = [
        ("beta", t.beta.is_some(), &all),
        ("loss_type", t.loss_type.is_some(), &["dpo"]),
        ("label_smoothing", t.label_smoothing.is_some(), &["dpo", "simpo"]),
        ("desirable_weight", t.desirable_weight.is_some(), &["kto"]),
        ("undesirable_weight", t.undesirable_weight.is_some(), &["kto"]),
        ("simpo_gamma", t.simpo_gamma.is_some(), &["simpo"]),
        ("reference", t.reference.is_some(), &["dpo", "ipo", "kto"]),
    ];
    if let Some((key, _, owners)) = given.iter().find(|(_, given, owners)| *given && !of(owners)) {
        return Err(format!(
            "`train.{key}` is a setting of {}, and train.objective is \"{name}\"; leave it out",
            owners.join(", ")
        ));
    }
    let Some(Preference { loss, beta }) = objective else { return Ok(None) };
    let beta = t.beta.unwrap_or(beta);
    if !(beta.is_finite() && beta > 0.0) {
        return Err(format!("`train.beta` is {beta}; it must be a number above 0"));
    }
    let smoothing = t.label_smoothing.unwrap_or(0.0);
    if !(0.0..0.5).contains(&smoothing) {
        return Err(format!("`train.label_smoothing` is {smoothing}; it must be a number from 0 and below 0.5"));
    }
    let weights = [
        ("desirable_weight", t.desirable_weight),
        ("undesirable_weight", t.undesirable_weight),
        ("simpo_gamma", t.simpo_gamma),
    ];
    if let Some((key, Some(v))) = weights.iter().find(|(_, v)| v.is_some_and(|v| !(v.is_finite() && v >= 0.0))) {
        return Err(format!("`train.{key}` is {v}; it must be a number from 0"));
    }
    let loss = match loss {
        PreferenceLoss::Dpo { .. } => {
            let loss = match t.loss_type.as_deref() {
                None | Some("sigmoid") => DpoLoss::Sigmoid,
                Some("hinge") if smoothing > 0.0 => {
                    return Err(
                        "`train.label_smoothing` is for loss_type \"sigmoid\" and \"robust\", not \"hinge\"".into()
                    );
                }
                Some("hinge") => DpoLoss::Hinge,
                Some("robust") => DpoLoss::Robust,
                Some(other) => {
                    return Err(format!(
                        "`train.loss_type` is \"{other}\"; use \"sigmoid\", \"hinge\" or \"robust\" (IPO is train.objective = \"ipo\")"
                    ));
                }
            };
            PreferenceLoss::Dpo { loss, label_smoothing: smoothing }
        }
        PreferenceLoss::Kto { desirable_weight, undesirable_weight } => PreferenceLoss::Kto {
            desirable_weight: t.desirable_weight.unwrap_or(desirable_weight),
            undesirable_weight: t.undesirable_weight.unwrap_or(undesirable_weight),
        },
        PreferenceLoss::Simpo { gamma, .. } => {
            PreferenceLoss::Simpo { gamma: t.simpo_gamma.unwrap_or(gamma), label_smoothing: smoothing }
        }
        other @ (PreferenceLoss::Ipo | PreferenceLoss::Orpo) => other,
    };
    Ok(Some(Preference { loss, beta }))
}

/// Refuses what does not go with a preference objective.
pub(crate) fn check(recipe: &Recipe, objective: Preference, kind: OptimizerKind) -> Result<(), String> {
    let (t, name) = (&recipe.train, objective.name());
    match t.reference.as_deref() {
        None | Some("base") => {}
        Some("init_from") if recipe.method.contains_key("init_from") => {}
        Some("init_from") => {
            return Err("`train.reference` is \"init_from\", and method.init_from names no adapter".into());
        }
        Some(other) => return Err(format!("`train.reference` is \"{other}\"; use \"base\" or \"init_from\"")),
    }
    if kind == OptimizerKind::Bdpl {
        return Err(format!(
            "`train.objective` = \"{name}\" needs the likelihood of answers with and without the prompt, which bdpl does not \
             ask for; use \"loss\", \"accuracy\" or \"f1\", or train.optimizer = \"adamw\", \"mezo\" or \"bbt\""
        ));
    }
    if objective.takes_single_answers() && t.batch_size.saturating_mul(t.gradient_accumulation) < 2 {
        return Err(format!(
            "`train.objective` = \"{name}\" puts the answers of a step behind each other's prompts, and a step has one row; set \
             train.batch_size or train.gradient_accumulation to 2 or more"
        ));
    }
    if !recipe.data.choices.is_empty() {
        return Err(format!(
            "`data.choices` are answers of which a row's own is one, and train.objective = \"{name}\" has its own in `chosen` \
             and `rejected`; leave data.choices out"
        ));
    }
    let format = recipe.data.format.as_deref();
    if format.is_some_and(|format| format != "preference") {
        return Err(format!(
            "`train.objective` = \"{name}\" trains on rows of format preference (`prompt`, `chosen`, `rejected`), and data.format \
             is \"{}\"",
            format.unwrap_or_default()
        ));
    }
    Ok(())
}
