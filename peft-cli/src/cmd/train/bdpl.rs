//! Black-Box Prompt Learning: against a model here, or one behind an API.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use peft_core::AdapterSet;
use peft_train::bdpl::{
    Bdpl, BdplConfig, BdplPlan, BdplTrainer, Endpoint, EndpointJudge, EndpointOptions, LocalJudge, PROMPT_FILE,
    VocabularyConfig, ngrams,
};
use peft_train::data::{DataSpec, EncodeOptions, Format, TextRows, contexts};
use peft_train::optim::OptimizerKind;
use peft_train::recipe::{Recipe, TrainTable};
use peft_train::{Outcome, methods};
use serde_json::{Map, json};

use super::results::{Finished, facts};
use super::{Run, answers, drive, fingerprint, planned, rule, schedule, text_options};
use crate::args::TrainArgs;

/// The settings that a recipe gives.
fn config(t: &TrainTable) -> BdplConfig {
    BdplConfig {
        length: t.bdpl_length.unwrap_or(10),
        samples: t.bdpl_samples.unwrap_or(20),
        max_grad_norm: t.max_grad_norm,
        seed: t.seed,
    }
}

/// Prompts that a step draws.
pub(super) fn samples(t: &TrainTable) -> usize {
    config(t).samples
}

fn bdpl(t: &TrainTable, texts: &[String]) -> Result<Bdpl> {
    let vocabulary = VocabularyConfig {
        size: t.bdpl_vocabulary.unwrap_or(100),
        longest: t.bdpl_ngram.unwrap_or(3),
        pmi: t.bdpl_pmi.unwrap_or(2.0),
    };
    if vocabulary.pmi.is_nan() {
        bail!("`train.bdpl_pmi` is not a number");
    }
    Ok(Bdpl::new(config(t), ngrams(texts, vocabulary))?)
}

/// A `[method]` table for a run whose prompt is made, not trained: prompt tuning with nothing to be said about it.
pub(super) fn settle(recipe: &mut Recipe) -> Result<()> {
    if rule::kind(recipe)? != OptimizerKind::Bdpl {
        return Ok(());
    }
    let length = config(&recipe.train).length as i64;
    let given = toml::Value::Integer(length);
    let table = &mut recipe.method;
    if let Some(kind) = table.get("type").filter(|kind| kind.as_str() != Some("prompt")) {
        bail!("`method.type` is {kind}, and train.optimizer = \"bdpl\" writes a prompt of words: leave it out");
    }
    let own = |key: &str, value: &toml::Value| key == "type" || (key == "num_virtual_tokens" && *value == given);
    if let Some((key, _)) = table.iter().find(|(key, value)| !own(key, value)) {
        bail!(
            "`method.{key}` says how a prompt is trained, and train.optimizer = \"bdpl\" finds its words (train.bdpl_length of \
             them): leave it out"
        );
    }
    table.insert("type".into(), "prompt".into());
    table.insert("num_virtual_tokens".into(), given);
    Ok(())
}

fn plan(recipe: &Recipe, sampler: peft_train::data::Sampler, steps: u64, fingerprint: String) -> Result<BdplPlan> {
    let (t, o) = (&recipe.train, &recipe.output);
    Ok(BdplPlan {
        objective: recipe.objective()?,
        schedule: schedule(recipe, steps)?,
        sampler,
        accumulation: t.gradient_accumulation,
        steps,
        output: PathBuf::from(o.dir.as_deref().unwrap_or_default()),
        save_every: o.save_every,
        eval_every: o.eval_every,
        keep_checkpoints: o.keep_checkpoints,
        fingerprint,
    })
}

impl Run {
    /// The distributions at the beginning, over n-grams of the training texts.
    pub(super) fn bdpl(&self) -> Result<Bdpl> {
        let spec: DataSpec = self.recipe.data.train.clone().context("data.train is missing")?.try_into()?;
        bdpl(&self.recipe.train, &contexts(&spec, self.format, &self.options)?)
    }

    /// Finds a prompt, and writes it as a text and as an adapter.
    pub(super) fn train_bdpl(self, args: &TrainArgs) -> Result<()> {
        let bdpl = self.bdpl()?;
        let before = self.samples(&AdapterSet::empty())?;
        let sampler = super::sampler(&self.recipe, &self.train)?;
        let steps = planned(&self.recipe, &sampler);
        let plan = plan(&self.recipe, sampler, steps, self.fingerprint(steps))?;
        let output = super::begin(&self.recipe)?;
        let tokenizer = self.tokenizer.as_ref().context("bdpl needs a tokenizer, and the model has none")?;
        let mut keys = Map::new();
        if let Some(path) = &self.recipe.model.path {
            keys.insert("base_model_name_or_path".into(), path.clone().into());
            keys.insert("tokenizer_name_or_path".into(), path.clone().into());
        }
        let judge = LocalJudge {
            model: &self.model,
            encode: Box::new(|text| tokenizer.encode(text, false).map_err(|e| peft_core::Error::msg(e.to_string()))),
            keys,
            labels: self.files.config().head().unwrap_or_default(),
            objective: plan.objective,
            train: &self.train,
            choices: self.choices.as_deref(),
            eval: self.eval.as_deref(),
            eval_choices: self.eval_choices.as_deref(),
            eval_batch_size: self.recipe.train.eval_batch_size.unwrap_or(self.recipe.train.batch_size),
        };
        let mut trainer = BdplTrainer::new(bdpl, judge, super::early_stop(&self.recipe), plan);
        let outcome = drive(&mut trainer, &output, args.resume, steps)?;
        let prompt = trainer.prompt();
        trainer.write(&output)?;
        let adapter = Arc::new(trainer.judge().adapter(&prompt)?);
        drop(trainer);
        let info =
            methods::METHODS.iter().find(|m| m.name == "prompt").context("prompt tuning is not in the catalogue")?;
        let facts = facts(&self.recipe, &self.model, &adapter, info.name, &self.train, &outcome, steps);
        let finished = Finished {
            recipe: &self.recipe,
            files: &self.files,
            model: &self.model,
            tokenizer: self.tokenizer.as_ref(),
            adapter,
            before,
            facts,
        };
        let samples = finished.samples()?;
        finished.write(&output, &samples)?;
        eprintln!("prompt: {}", prompt.trim_end());
        finished.say(&output, &samples, args, &outcome)
    }
}

/// A run against the API that the recipe names.
pub(super) fn run_endpoint(recipe: &Recipe, args: &TrainArgs) -> Result<()> {
    match rule::kind(recipe)? {
        OptimizerKind::Bdpl => {}
        OptimizerKind::Bbt => bail!(
            "train.optimizer = \"bbt\" searches embeddings, and an endpoint takes text alone: use train.optimizer = \"bdpl\" there, \
             or name a model on this machine (model.path) in place of [endpoint]"
        ),
        other => bail!(
            "train.optimizer = \"{other}\" changes parameters, and a model behind an endpoint has none to change: use \
             train.optimizer = \"bdpl\" there, or name a model on this machine (model.path) in place of [endpoint]"
        ),
    }
    if recipe.model.path.is_some() {
        bail!("both model.path and endpoint.url are given; a run has one model");
    }
    let options = EndpointOptions::of_table(&recipe.endpoint, |name| std::env::var(name).ok())?;
    let (url, model) = (options.url.clone(), options.model.clone());
    let format = recipe.data.format.as_deref().map(str::parse::<Format>).transpose()?;
    let texts = EncodeOptions { max_length: None, ..text_options(recipe, format) };
    let answers = answers(recipe, &texts);
    let load = |value: &toml::Value, format| -> Result<(TextRows, Format)> {
        let spec: DataSpec = value.clone().try_into().context("data.train and data.eval")?;
        Ok(TextRows::load(&spec, format, &texts, &answers)?)
    };
    let (train, format) = load(recipe.data.train.as_ref().context("data.train is missing")?, format)?;
    let eval = recipe.data.eval.as_ref().map(|value| load(value, Some(format))).transpose()?.map(|(rows, _)| rows);
    let words: Vec<String> = train.rows.iter().map(|row| row.prompt.clone()).collect();
    let bdpl = bdpl(&recipe.train, &words)?;
    let order = train.placeholders();
    let sampler = super::sampler(recipe, &order)?;
    let steps = planned(recipe, &sampler);
    let characters: usize = words.iter().map(|text| text.chars().count()).sum();
    let fingerprint = fingerprint(recipe, (train.rows.len(), characters, 0), steps);
    let plan = plan(recipe, sampler, steps, fingerprint)?;
    let rows = train.rows.len();
    let judge = EndpointJudge::new(Endpoint::new(options), plan.objective, train, eval)?;
    if args.dry_run {
        let calls = steps * (samples(&recipe.train) * recipe.train.gradient_accumulation) as u64;
        if args.json {
            let result = json!({"method": "bdpl", "endpoint": url, "model": model, "steps": steps, "rows": rows,
                "forward_calls": calls, "optimizer": "bdpl", "objective": recipe.train.objective,
                "candidates": bdpl.candidates()});
            out!("{result}");
            return Ok(());
        }
        out!("model       {model} at {url}");
        out!("data        {rows} rows ({format})");
        out!("steps       {steps} of {} rows × {}", recipe.train.batch_size, recipe.train.gradient_accumulation);
        out!("calls       {calls} questions of {} rows, lowering {}", recipe.train.batch_size, plan.objective);
        out!("candidates  {}: {} …", bdpl.candidates().len(), shown(&bdpl));
        return Ok(());
    }
    let output = super::begin(recipe)?;
    let mut trainer = BdplTrainer::new(bdpl, judge, super::early_stop(recipe), plan);
    let outcome = drive(&mut trainer, &output, args.resume, steps)?;
    trainer.write(&output)?;
    let prompt = trainer.prompt();
    eprintln!("prompt: {}\nit is in {}", prompt.trim_end(), output.join(PROMPT_FILE).display());
    if args.json {
        out!("{}", said(&output, &prompt, &outcome));
    }
    Ok(())
}

/// Some of the candidates.
pub(super) fn shown(bdpl: &Bdpl) -> String {
    bdpl.candidates().iter().take(8).map(|c| format!("{c:?}")).collect::<Vec<_>>().join(", ")
}

fn said(output: &std::path::Path, prompt: &str, outcome: &Outcome) -> serde_json::Value {
    let eval = outcome.eval.map(|m| m.nll / m.counted.max(1) as f64);
    json!({"output": output, "prompt": prompt, "steps": outcome.state.step, "loss": outcome.state.last_loss, "eval_loss": eval,
        "best": outcome.best, "seconds": outcome.state.seconds})
}
