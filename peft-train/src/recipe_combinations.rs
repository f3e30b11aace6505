//! Settings of a recipe that do not go together.

use crate::objective::Objective;
use crate::optim::OptimizerKind;
use crate::recipe::{EndpointTable, Recipe, TrainTable};
use crate::recipe_preferences;
use crate::t_few::TFew;

/// The objective that a recipe names, with its weights.
pub(crate) fn objective(recipe: &Recipe) -> Result<Objective, String> {
    let t = &recipe.train;
    let objective: Objective = t.objective.parse().map_err(|e: peft_core::Error| e.to_string())?;
    let given = [("train.unlikelihood", t.unlikelihood), ("train.length_normalised", t.length_normalised)];
    if let Some((key, Some(v))) = given.iter().find(|(_, v)| v.is_some_and(|v| !(v.is_finite() && v >= 0.0))) {
        return Err(format!("`{key}` is {v}; it must be a number from 0"));
    }
    let preference = recipe_preferences::settings(objective.preference(), &t.objective, t)?;
    let objective = preference.map_or(objective, Objective::Preference);
    match objective {
        Objective::TFew(TFew { unlikelihood, length_normalised }) => Ok(Objective::TFew(TFew {
            unlikelihood: t.unlikelihood.unwrap_or(unlikelihood),
            length_normalised: t.length_normalised.unwrap_or(length_normalised),
        })),
        other => match given.iter().find(|(_, v)| v.is_some()) {
            Some((key, _)) => {
                Err(format!("`{key}` weighs a loss of train.objective = \"t_few\", and it is \"{other}\""))
            }
            None => Ok(other),
        },
    }
}

/// Refuses settings that do not go together.
pub(crate) fn check(recipe: &Recipe) -> Result<(), String> {
    let t = &recipe.train;
    let objective = objective(recipe)?;
    let kind: OptimizerKind = t.optimizer.parse().map_err(|e: crate::optim::OptimError| e.to_string())?;
    if let Some(preference) = objective.preference() {
        recipe_preferences::check(recipe, preference, kind)?;
    }
    if !objective.has_gradient() && !kind.is_forward_only() {
        return Err(format!(
            "`train.objective` = \"{objective}\" has no gradient: train it with train.optimizer = \"mezo\", \"bbt\" or \"bdpl\", or \
             use \"loss\""
        ));
    }
    let compares = !recipe.data.choices.is_empty() || objective != Objective::Loss;
    if recipe.data.packing && compares {
        return Err(
            "`data.packing` fills batches by the tokens of rows, and rows with several answers are as long as all of them; leave \
             packing off"
                .into(),
        );
    }
    if recipe.data.fill_in_the_middle.is_some() && recipe.data.span_corruption.is_some() {
        return Err(
            "`data.fill_in_the_middle` is for causal language models and `data.span_corruption` for encoder-decoders; \
                    give one of them"
                .into(),
        );
    }
    if recipe.data.choices.len() == 1 {
        return Err("`data.choices` needs two or more answers".into());
    }
    check_owner(t, kind)?;
    if recipe.endpoint.url.is_none() && recipe.endpoint != EndpointTable::default() {
        return Err("`endpoint.url` is not given, and other keys of [endpoint] are; it is an address such as \
                    http://localhost:8000/v1"
            .into());
    }
    if !kind.is_forward_only() {
        return Ok(());
    }
    let defaults = TrainTable::default();
    let search = kind == OptimizerKind::Bbt;
    let refused = [
        // 1 is what a recipe has without saying so.
        (
            kind != OptimizerKind::Bdpl && t.max_grad_norm != 0.0 && t.max_grad_norm != defaults.max_grad_norm,
            "max_grad_norm",
            "clips gradients",
        ),
        (t.gradient_checkpointing == toml::Value::Boolean(true), "gradient_checkpointing", "is for a backward pass"),
        (t.memory_budget.is_some(), "memory_budget", "fits what waits for a backward pass"),
        (
            search && t.learning_rate != defaults.learning_rate,
            "learning_rate",
            "scales updates (bbt_sigma is the first step size)",
        ),
        (kind != OptimizerKind::Mezo && t.weight_decay != 0.0, "weight_decay", "shrinks parameters"),
    ];
    match refused.iter().find(|(given, ..)| *given) {
        Some((_, key, why)) => Err(format!("`train.{key}` {why}, and {kind} has none; leave it out")),
        None => Ok(()),
    }
}

/// Refuses keys that are named after another optimiser than the recipe's.
fn check_owner(t: &TrainTable, kind: OptimizerKind) -> Result<(), String> {
    let all = serde_json::to_value(t).unwrap_or_default();
    let given = all.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()).map(|(key, _)| key);
    for owner in [OptimizerKind::Bbt, OptimizerKind::Bdpl].into_iter().filter(|owner| *owner != kind) {
        let mut given = given.clone();
        if let Some(key) = given.find(|key| key.starts_with(&format!("{owner}_"))) {
            return Err(format!(
                "`train.{key}` is a setting of {owner}, and train.optimizer is \"{kind}\"; leave it out"
            ));
        }
    }
    Ok(())
}
