//! Settings of a recipe that do not go together.

use crate::objective::Objective;
use crate::optim::OptimizerKind;
use crate::recipe::Recipe;
use crate::t_few::TFew;

/// The objective that a recipe names, with its weights.
pub(crate) fn objective(recipe: &Recipe) -> Result<Objective, String> {
    let t = &recipe.train;
    let objective: Objective = t.objective.parse().map_err(|e: peft_core::Error| e.to_string())?;
    let given = [("train.unlikelihood", t.unlikelihood), ("train.length_normalised", t.length_normalised)];
    if let Some((key, Some(v))) = given.iter().find(|(_, v)| v.is_some_and(|v| !(v.is_finite() && v >= 0.0))) {
        return Err(format!("`{key}` is {v}; it must be a number from 0"));
    }
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
    let mezo = kind == OptimizerKind::Mezo;
    if !objective.has_gradient() && !mezo {
        return Err(format!(
            "`train.objective` = \"{objective}\" has no gradient: train it with train.optimizer = \"mezo\", or use \"loss\""
        ));
    }
    let compares = !recipe.data.choices.is_empty() || objective != Objective::Loss;
    if recipe.data.packing && compares {
        return Err(
            "`data.packing` fills batches by the tokens of rows, and rows with choices are as long as all of their \
                    answers; leave packing off"
                .into(),
        );
    }
    if recipe.data.choices.len() == 1 {
        return Err("`data.choices` needs two or more answers".into());
    }
    if !mezo {
        return Ok(());
    }
    let refused = [
        // 1 is what a recipe has without saying so.
        (t.max_grad_norm != 0.0 && t.max_grad_norm != 1.0, "max_grad_norm", "clips gradients, and mezo has none"),
        (
            t.gradient_checkpointing == toml::Value::Boolean(true),
            "gradient_checkpointing",
            "is for a backward pass, and mezo has none",
        ),
        (t.memory_budget.is_some(), "memory_budget", "fits what waits for a backward pass, and mezo has none"),
    ];
    match refused.iter().find(|(given, ..)| *given) {
        Some((_, key, why)) => Err(format!("`train.{key}` {why}; leave it out")),
        None => Ok(()),
    }
}
