//! What a preference objective asks of a model, and what it compares with.

use std::sync::Arc;

use anyhow::{Result, bail};
use peft_core::{Adapter, Task};
use peft_models::{AnyModel, ModelFiles};
use peft_train::Preference;
use peft_train::methods;
use peft_train::recipe::Recipe;

use crate::open;

/// The preference objective of a recipe, where it has one and the model can be trained on it.
pub(super) fn check(recipe: &Recipe, files: &ModelFiles) -> Result<Option<Preference>> {
    let Some(objective) = recipe.objective()?.preference() else { return Ok(None) };
    let name = objective.name();
    match files.config().task() {
        Task::CausalLm => Ok(Some(objective)),
        Task::Seq2SeqLm => bail!(
            "`train.objective` = \"{name}\" trains causal language models, and this model ({}) is an encoder-decoder",
            files.config().model_type()
        ),
        _ => bail!(
            "`train.objective` = \"{name}\" compares answers of a language model, and this model ({}) writes none: use a causal \
             language model, or train.objective = \"loss\"",
            files.config().model_type()
        ),
    }
}

/// The adapter that answers are compared with, where it is not the base alone.
pub(super) fn reference(recipe: &Recipe, model: &AnyModel) -> Result<Option<Arc<Adapter>>> {
    let from = recipe.method.get("init_from").and_then(toml::Value::as_str);
    match (recipe.train.reference.as_deref(), from) {
        (Some("init_from"), Some(from)) => Ok(Some(Arc::new(methods::open(&open::adapter(from)?, model)?.adapter))),
        _ => Ok(None),
    }
}
