//! What training without gradients asks of a method, and the record of its run.

use std::path::Path;

use anyhow::{Result, bail};
use peft_core::{Adapter, Labels};
use peft_train::methods;
use peft_train::mezo::{Mezo, MezoConfig, Record, checksum};
use peft_train::optim::OptimizerKind;
use peft_train::recipe::{Recipe, TrainTable};
use serde_json::{Map, Value};

use super::start::method_table;

/// The settings that a recipe gives MeZO.
pub(super) fn config(t: &TrainTable) -> MezoConfig {
    MezoConfig {
        eps: t.mezo_eps.unwrap_or(1e-3),
        samples: t.mezo_samples.unwrap_or(1),
        momentum: t.momentum.unwrap_or(0.0),
        seed: t.seed,
    }
}

/// Refuses methods that need a gradient, and dropout, which losses that are compared do not have.
pub(super) fn check(adapter: &Adapter, method: &str, kind: OptimizerKind) -> Result<()> {
    if adapter.training_hook().is_some() {
        bail!(
            "method {method} acts on gradients, and train.optimizer = \"{kind}\" has none: use adamw, or another method"
        );
    }
    if let Some((key, value)) = dropout(&adapter.config) {
        bail!(
            "`method.{key}` is {value}, and train.optimizer = \"{kind}\" compares losses without dropout: set it to 0"
        );
    }
    Ok(())
}

/// A dropout that is not 0 in a config or in those of its parts.
fn dropout(config: &Map<String, Value>) -> Option<(&str, &Value)> {
    let on = |v: &Value| v.as_f64().is_some_and(|p| p > 0.0);
    // X-LoRA's is between the layers of its classifier.
    let deep = config.get("xlora_depth").and_then(Value::as_u64).is_some_and(|depth| depth > 1);
    let drops = |key: &str| {
        key.ends_with("dropout")
            || ["stochastic_depth", "dropout_prob"].contains(&key)
            || (key == "xlora_dropout_p" && deep)
    };
    config.iter().find_map(|(key, value)| match value {
        Value::Object(part) => dropout(part),
        Value::Array(parts) => parts.iter().filter_map(Value::as_object).find_map(dropout),
        value => (drops(key) && on(value)).then_some((key.as_str(), value)),
    })
}

/// The record of a run about to begin, where its start can be made again: one that was found in the training data, or at random
/// weights of the base, cannot.
pub(super) fn record(recipe: &Recipe, head: Option<Labels>, adapter: &Adapter) -> Result<Option<Record>> {
    let method = method_table(&recipe.with_absolute_paths())?;
    let from = method.contains_key("init_from");
    let is_mezo = super::rule::kind(recipe)? == OptimizerKind::Mezo;
    if !is_mezo || recipe.model.init == "random" || (!from && methods::looks_at_data(&method)?) {
        return Ok(None);
    }
    let (t, MezoConfig { eps, samples, momentum, seed }) = (&recipe.train, config(&recipe.train));
    Ok(Some(Record {
        version: Record::VERSION,
        base_model: recipe.with_absolute_paths().model.path.unwrap_or_default(),
        method,
        dtype: recipe.model.dtype.clone(),
        head: head.as_ref().map_or_else(String::new, |head| head.kind.name().into()),
        labels: head.unwrap_or_default().names,
        seed,
        eps,
        samples,
        momentum,
        weight_decay: t.weight_decay,
        loraplus_lr_ratio: t.loraplus_lr_ratio.unwrap_or(1.0),
        start: checksum(&adapter.parameters())?,
        end: String::new(),
        taken: Vec::new(),
    }))
}

/// Writes the record of a run that has ended.
pub(super) fn write(record: Record, mezo: &Mezo, adapter: &Adapter, output: &Path) -> Result<()> {
    let end = checksum(&adapter.parameters())?;
    Ok(Record { end, taken: mezo.taken().to_vec(), ..record }.write(&output.join(Record::FILE))?)
}
