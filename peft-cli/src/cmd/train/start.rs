//! The adapter that a run starts from.

use std::path::Path;

use anyhow::{Result, bail};
use peft_models::{AnyModel, ModelFiles};
use peft_train::data::{Batch, Dataset};
use peft_train::methods::{self, Prepared};
use peft_train::recipe::Recipe;
use peft_train::{checkpoint, start_prefix};
use serde_json::{Map, Value};

use super::sampler;
use crate::open;

/// Whether a prompt starts from the embeddings of a text.
fn starts_from_text(method: &Map<String, Value>) -> bool {
    method.get("prompt_tuning_init").and_then(Value::as_str) == Some("TEXT")
}

/// `method` with the base's own tokenizer where it names none.
fn with_tokenizer(mut method: Map<String, Value>, files: &ModelFiles) -> Map<String, Value> {
    let path = files.path().display().to_string();
    method.entry("tokenizer_name_or_path").or_insert_with(|| path.into());
    method
}

/// `method` with folders for the hub ids among its `adapters`.
fn with_parts(mut method: Map<String, Value>) -> Result<Map<String, Value>> {
    fn located(part: &mut Value) -> Result<()> {
        match part {
            Value::String(spec) => *spec = open::adapter(spec)?.display().to_string(),
            Value::Array(stack) => stack.iter_mut().try_for_each(located)?,
            _ => {}
        }
        Ok(())
    }
    match method.get_mut("adapters") {
        Some(Value::Object(table)) => table.values_mut().try_for_each(located)?,
        Some(list) => located(list)?,
        None => {}
    }
    Ok(method)
}

/// The `[method]` table as JSON.
pub(super) fn method_table(recipe: &Recipe) -> Result<Map<String, Value>> {
    Ok(match serde_json::to_value(&recipe.method)? {
        Value::Object(map) => map,
        _ => Map::new(),
    })
}

/// The adapter that a `[method]` table starts from, where it does not look at the training data.
pub(crate) fn start(
    mut table: Map<String, Value>,
    files: &ModelFiles,
    model: &AnyModel,
    seed: u64,
) -> Result<Prepared> {
    let text = match table.remove("init_text") {
        None => None,
        Some(Value::String(text)) => Some(text),
        Some(other) => bail!("`method.init_text` is {other}; it is a text whose keys and values a prefix starts from"),
    };
    let prepared = match table.remove("init_from") {
        Some(Value::String(_)) if text.is_some() => {
            bail!("`method.init_text` cannot be given with method.init_from: the adapter there is the start")
        }
        Some(Value::String(from)) => {
            if let Some(key) = table.keys().find(|k| *k != "type") {
                bail!(
                    "`method.{key}` cannot be given with method.init_from: type and keys come from its adapter_config.json"
                );
            }
            methods::open(&open::adapter(&from)?, model)?
        }
        Some(other) => bail!("`method.init_from` is {other}; it is a folder or a hub id"),
        None if table.contains_key("adapters") => methods::create(&with_parts(table)?, model, seed)?,
        None if starts_from_text(&table) => methods::create(&with_tokenizer(table, files), model, seed)?,
        None => methods::create(&table, model, seed)?,
    };
    if let Some(text) = text {
        let ids = files.tokenizer()?.encode(&text, true).map_err(|e| anyhow::anyhow!("method.init_text: {e}"))?;
        start_prefix(model, &prepared.adapter, &ids)?;
    }
    Ok(prepared)
}

pub(super) fn prepare_adapter(
    recipe: &Recipe,
    files: &ModelFiles,
    model: &AnyModel,
    train: &Dataset,
    resume: bool,
) -> Result<Prepared> {
    let table = method_table(recipe)?;
    let output = Path::new(recipe.output.dir.as_deref().unwrap_or_default());
    let seed = recipe.train.seed;
    let mut prepared = if !table.contains_key("init_from") && methods::looks_at_data(&table)? {
        match if resume { checkpoint::list(output)?.pop() } else { None } {
            // What was found in the data is in the checkpoint, ranks included.
            Some((_, dir)) => methods::open(&dir, model)?,
            None => {
                let mut batches = sampler(recipe, train)?;
                methods::create_on(&table, model, seed, || Batch::new(train, &batches.next_batch()))?
            }
        }
    } else {
        start(table, files, model, seed)?
    };
    if let Some(path) = &recipe.model.path {
        prepared.adapter.config.insert("base_model_name_or_path".into(), path.clone().into());
    }
    Ok(prepared)
}
