//! What a run leaves behind: the adapter, the model card, the report, and what to run next.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use peft_core::{Adapter, AdapterSet, BaseModel, Task};
use peft_models::merge::{MAX_SHARD_BYTES, Merged, write_folder};
use peft_models::tokenizer::Tokenizer;
use peft_models::{AnyModel, ModelFiles};
use peft_train::data::Dataset;
use peft_train::log::{ModelCard, Report, RunFacts, RunLogger, Sample, read_metrics};
use peft_train::methods::METHODS;
use peft_train::recipe::Recipe;
use peft_train::{Ended, Outcome, checkpoint};
use serde_json::{Value, json};

use crate::args::TrainArgs;
use crate::{open, sample};

pub(super) fn facts(
    recipe: &Recipe,
    model: &AnyModel,
    adapter: &Adapter,
    method: &str,
    train: &Dataset,
    outcome: &Outcome,
    planned: u64,
) -> RunFacts {
    let trainable = adapter.trainable_elements() as u64;
    let full = if method == "full" { 0 } else { trainable };
    RunFacts {
        base_model: recipe.model.path.clone().unwrap_or_default(),
        method: method.to_string(),
        task_type: adapter.config.get("task_type").and_then(Value::as_str).map(str::to_string),
        trainable_parameters: trainable,
        total_parameters: model.parameter_count() as u64 + full,
        steps: outcome.state.step,
        planned_steps: planned,
        epochs: outcome.state.epochs,
        train_examples: train.len() as u64,
        tokens: outcome.state.tokens,
        final_loss: outcome.state.last_loss,
        best_metric: Some(recipe.train.metric.clone()),
        best: outcome.best,
        seconds: outcome.state.seconds,
        peak_memory: sample::peak_memory(),
        device: recipe.model.device.clone(),
        dtype: recipe.model.dtype.clone(),
        seed: recipe.train.seed,
        ended: (outcome.ended == Ended::EarlyStop).then(|| format!("early stop after step {}", outcome.state.step)),
    }
}

/// Writes what was trained: an adapter, or the model that full fine-tuning makes.
pub(crate) fn write_result(
    files: &ModelFiles,
    model: &AnyModel,
    adapter: &Arc<Adapter>,
    method: &str,
    output: &Path,
) -> Result<()> {
    if method != "full" {
        return Ok(checkpoint::write_adapter_files(output, adapter)?);
    }
    let merged = Merged::new(model, vec![adapter.clone()])?;
    let dtype = files.config().dtype().unwrap_or(candle_core::DType::F32);
    Ok(write_folder(files, &merged, &output.join("model"), dtype, MAX_SHARD_BYTES)?)
}

/// A run that reached its end, with what its results are made of.
pub(super) struct Finished<'a> {
    pub(super) recipe: &'a Recipe,
    pub(super) files: &'a ModelFiles,
    pub(super) model: &'a AnyModel,
    pub(super) tokenizer: Option<&'a Tokenizer>,
    pub(super) adapter: Arc<Adapter>,
    pub(super) before: Vec<String>,
    pub(super) facts: RunFacts,
}

impl Finished<'_> {
    pub(super) fn write(&self, output: &Path, samples: &[Sample]) -> Result<()> {
        write_result(self.files, self.model, &self.adapter, &self.facts.method, output)?;
        let (title, recipe) = (open::title(output), self.recipe.to_toml());
        // PEFT's X-LoRA has no place for layers that are trained whole.
        let has_whole = self.adapter.config.get("modules_to_save").is_some_and(|names| !names.is_null());
        let card = ModelCard {
            title: &title,
            facts: &self.facts,
            recipe: &recipe,
            samples,
            loads_in_peft: METHODS.iter().any(|m| m.name == self.facts.method && m.is_in_peft())
                && !(has_whole && self.facts.method == "xlora"),
        };
        card.write(&output.join("README.md"))?;
        let metrics = read_metrics(&output.join(RunLogger::METRICS))?;
        let next = self.next(output);
        let report = Report {
            title: &title,
            facts: &self.facts,
            recipe: &recipe,
            steps: &metrics.steps,
            evals: &metrics.evals,
            samples,
            next: &next,
        };
        Ok(report.write(&output.join("report.html"))?)
    }

    pub(super) fn samples(&self) -> Result<Vec<Sample>> {
        let prompts = &self.recipe.sample.prompts;
        let (false, Some(tokenizer)) = (prompts.is_empty(), self.tokenizer) else { return Ok(Vec::new()) };
        let set = AdapterSet::one("trained", self.adapter.clone());
        let after = sample::continuations(self.model, tokenizer, &set, prompts, self.recipe.sample.max_new_tokens)?;
        let both = prompts.iter().zip(&self.before).zip(after);
        Ok(both
            .map(|((prompt, before), after)| Sample { prompt: prompt.clone(), before: before.clone(), after })
            .collect())
    }

    fn next(&self, output: &Path) -> Vec<String> {
        let out = output.display();
        let writes = !matches!(self.model.task(), Task::Head { .. });
        if self.facts.method == "full" && !writes {
            return vec![format!("peft-cli inspect {out}/model")];
        }
        if self.facts.method == "full" {
            return vec![format!("peft-cli generate --model {out}/model --prompt \"…\"")];
        }
        let model = &self.facts.base_model;
        let mut next = Vec::new();
        if let Some(eval) = self.recipe.data.eval.as_ref().and_then(toml::Value::as_str) {
            next.push(format!("peft-cli eval --model {model} --adapter {out} --data {eval}"));
        }
        if writes {
            let prompt = self.recipe.sample.prompts.first();
            let prompt = prompt.map_or_else(|| "…".to_string(), |p| p.replace('\n', "\\n"));
            next.push(format!(
                "peft-cli generate --model {model} --adapter {out} --prompt $'{}'",
                prompt.replace('\'', "\\'")
            ));
        }
        if METHODS.iter().any(|m| m.name == self.facts.method && m.mergeable) {
            next.push(format!("peft-cli merge --model {model} --adapter {out} --output {out}-merged"));
        }
        if next.is_empty() {
            next.push(format!("peft-cli inspect {out}"));
        }
        next
    }

    pub(super) fn say(&self, output: &Path, samples: &[Sample], args: &TrainArgs, outcome: &Outcome) -> Result<()> {
        for s in samples {
            eprintln!("\nprompt  {}\nbefore  {}\nafter   {}", s.prompt.trim_end(), s.before.trim(), s.after.trim());
        }
        eprintln!("\nresults in {} (report.html shows the curves); next:", output.display());
        for line in self.next(output) {
            eprintln!("  {line}");
        }
        if args.json {
            let eval = outcome.eval.map(|m| m.nll / m.counted as f64);
            let mut result = json!({
                "output": output, "steps": outcome.state.step, "loss": outcome.state.last_loss, "eval_loss": eval,
                "best": outcome.best, "tokens": outcome.state.tokens, "seconds": outcome.state.seconds,
                "trainable_parameters": self.facts.trainable_parameters, "peak_memory": self.facts.peak_memory,
                "early_stop": outcome.ended == Ended::EarlyStop
            });
            if let Some(result) = result.as_object_mut() {
                result.extend(outcome.metrics.iter().map(|(k, v)| (format!("eval_{k}"), json!(v))));
            }
            out!("{result}");
        }
        Ok(())
    }
}
