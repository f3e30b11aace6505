//! `peft-cli train`: recipe → plan → run → results.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::DType;
use peft_core::{AdapterSet, BaseModel, HeadKind, Task};
use peft_models::tokenizer::Tokenizer;
use peft_models::{AnyModel, ModelFiles};
use peft_train::data::{
    Choices, Corruption, DataSpec, Dataset, EncodeOptions, Format, Preferences, Sampler, SamplerOptions, TextTokenizer,
    labels_in, preview,
};
use peft_train::methods::{self, Prepared};
use peft_train::optim::OptimizerKind;
use peft_train::recipe::{Recipe, parse_value};
use peft_train::{Checkpointing, Keep, Plan, PreferenceRows, Trainer, UpdateRule};
use serde_json::json;

use crate::args::TrainArgs;
use crate::memory::LongestBatch;
use crate::{memory, open, sample};
use drive::{begin, drive, early_stop, fingerprint, output, planned, schedule};
use results::{Finished, facts};
use start::prepare_adapter;

mod bdpl;
mod drive;
mod mezo;
mod preferences;
mod results;
mod rule;
mod start;

pub(crate) use results::write_result;
pub(crate) use start::start;

pub(crate) fn run(args: &TrainArgs) -> Result<()> {
    let mut recipe = load_recipe(args)?;
    if recipe.endpoint.url.is_some() {
        return bdpl::run_endpoint(&recipe, args);
    }
    bdpl::settle(&mut recipe)?;
    let run = Run::open(recipe, args.resume)?;
    match rule::kind(&run.recipe)? {
        _ if args.dry_run => run.describe(args.json),
        OptimizerKind::Bdpl => run.train_bdpl(args),
        _ => run.train(args),
    }
}

fn load_recipe(args: &TrainArgs) -> Result<Recipe> {
    let mut overrides: Vec<(String, toml::Value)> = Vec::new();
    for (key, value) in [
        ("model.path", &args.model),
        ("method.init_from", &args.adapter),
        ("data.train", &args.data),
        ("data.format", &args.format),
        ("method.type", &args.method),
        ("output.dir", &args.output),
    ] {
        overrides.extend(value.iter().map(|v| (key.to_string(), toml::Value::String(v.clone()))));
    }
    for setting in &args.set {
        let (key, value) =
            setting.split_once('=').with_context(|| format!("--set {setting}: write table.key=value"))?;
        overrides.push((key.trim().to_string(), parse_value(value.trim())));
    }
    let recipe = Recipe::load(args.recipe.as_deref(), &overrides)?;
    for (what, there, flag) in [
        ("a base model", recipe.model.path.is_some() || recipe.endpoint.url.is_some(), "--model or model.path"),
        ("training data", recipe.data.train.is_some(), "--data or data.train"),
        ("an output folder", recipe.output.dir.is_some(), "--output or output.dir"),
    ] {
        if !there {
            bail!("{what} is missing: give {flag}");
        }
    }
    Ok(recipe)
}

/// A run with everything loaded and checked, before its first step.
struct Run {
    recipe: Recipe,
    files: ModelFiles,
    model: AnyModel,
    tokenizer: Option<Tokenizer>,
    prepared: Prepared,
    train: Arc<Dataset>,
    eval: Option<Arc<Dataset>>,
    choices: Option<Arc<Choices>>,
    eval_choices: Option<Arc<Choices>>,
    preferences: Option<PreferenceRows>,
    format: Format,
    options: EncodeOptions,
}

impl Run {
    fn open(recipe: Recipe, resume: bool) -> Result<Self> {
        let started = Instant::now();
        let path = recipe.model.path.as_deref().unwrap_or_default();
        let random = recipe.model.init == "random";
        let mut files = if random { ModelFiles::open_random(Path::new(path))? } else { open::model(path)? };
        let mut placement = open::placement(&recipe.model.device, &recipe.model.dtype)?;
        // Where bf16 was asked for, not only found.
        placement.narrow_products = placement.weights == Some(DType::BF16);
        let preference = preferences::check(&recipe, &files)?;
        let format = match preference {
            Some(_) => Some(Format::Preference),
            None => recipe.data.format.as_deref().map(str::parse::<Format>).transpose()?,
        };
        let tokenizer = match format {
            // Rows of tokens need none, so a base without one will do.
            Some(Format::Tokens | Format::Preference) => files.tokenizer().ok(),
            _ => Some(files.tokenizer()?),
        };
        let text = tokenizer.as_ref().map(open::text_tokenizer).transpose()?;
        let spec = |v: &toml::Value| -> Result<DataSpec> { v.clone().try_into().context("data.train and data.eval") };
        let train_spec = spec(recipe.data.train.as_ref().context("data.train is missing")?)?;
        settle_classes(&mut files, &recipe, &train_spec)?;
        let options = EncodeOptions {
            max_length: Some(open::max_length(&files, recipe.data.max_length, open::virtual_tokens(&recipe.method)?)),
            vocab_size: Some(files.config().vocab_size()),
            class_head: open::class_head(&files),
            decoder: open::decoder_inputs(&files),
            tasks: open::tasks(&recipe.method)?,
            preferences: preference.is_some(),
            ..text_options(&recipe, format)
        };
        let text = text.as_ref().map(|t| t as &dyn TextTokenizer);
        let (train, format) = Dataset::load(&train_spec, format, text, &options)?;
        let eval = match &recipe.data.eval {
            Some(v) => {
                let options = EncodeOptions { keep_answers: true, ..options.clone() };
                Some(Arc::new(Dataset::load(&spec(v)?, Some(format), text, &options)?.0))
            }
            None => None,
        };
        let task = files.config().task();
        recipe.objective()?.check(task)?;
        let compares = recipe.objective()?.compares_choices(task);
        if !recipe.data.choices.is_empty() && matches!(task, Task::Head { .. }) {
            bail!(
                "`data.choices` are answers of a language model; a class head has `data.labels`, the names of its classes"
            );
        }
        let answers = answers(&recipe, &options);
        let with_answers = |spec: &DataSpec| Choices::load(spec, format, text, &options, &answers).map(Arc::new);
        let choices = if compares { Some(with_answers(&train_spec)?) } else { None };
        let eval_choices = match &recipe.data.eval {
            Some(v) if compares || !recipe.data.choices.is_empty() => Some(with_answers(&spec(v)?)?),
            _ => None,
        };
        let preferences = preference
            .map(|objective| -> Result<_> {
                let load = |v: &toml::Value| -> Result<_> {
                    Ok(Arc::new(Preferences::load(&spec(v)?, text, &options, &objective)?))
                };
                Ok((
                    load(recipe.data.train.as_ref().context("data.train is missing")?)?,
                    recipe.data.eval.as_ref().map(load).transpose()?,
                ))
            })
            .transpose()?;
        // Full fine-tuning trains copies of all weights and reads the base's own once, so they need not stay in memory.
        let full = recipe.method.get("type").and_then(toml::Value::as_str) == Some("full");
        let read_again = preference.is_some_and(|objective| objective.has_reference());
        let model = match full && !read_again && recipe.sample.prompts.is_empty() {
            true => files.load_deferred(&placement, recipe.train.seed)?,
            false => files.load(&placement, recipe.train.seed)?,
        };
        if !model.fresh_layers().is_empty() && !random {
            eprintln!(
                "{path} has no weights for {}: they start at random (seed {}) and are trained and stored with the adapter",
                model.fresh_layers().join(", "),
                recipe.train.seed
            );
        }
        let mut prepared = prepare_adapter(&recipe, &files, &model, &train, resume)?;
        if rule::kind(&recipe)?.is_forward_only() {
            mezo::check(&prepared.adapter, prepared.method, rule::kind(&recipe)?)?;
        }
        let preferences = match preferences {
            Some((train, eval)) => {
                Some(PreferenceRows { train, eval, reference: preferences::reference(&recipe, &model)? })
            }
            None => None,
        };
        prepared.adapter.labels = files.config().head().unwrap_or_default();
        for note in &prepared.notes {
            eprintln!("{note}");
        }
        eprintln!(
            "base {} ({}, {} parameters), data {} rows, loaded in {:.1} s",
            path,
            files.config().model_type(),
            model.parameter_count(),
            train.len(),
            started.elapsed().as_secs_f64()
        );
        let train = Arc::new(train);
        Ok(Self {
            recipe,
            files,
            model,
            tokenizer,
            prepared,
            train,
            eval,
            choices,
            eval_choices,
            preferences,
            format,
            options,
        })
    }

    fn plan(&self) -> Result<Plan> {
        let t = &self.recipe.train;
        let sampler = sampler(&self.recipe, &self.train)?;
        let steps = planned(&self.recipe, &sampler);
        methods::check_training(&self.prepared.adapter, steps)?;
        let (keep, rows_at_a_time) = self.room()?;
        Ok(Plan {
            train: Arc::clone(&self.train),
            eval: self.eval.clone(),
            objective: self.recipe.objective()?,
            choices: self.choices.clone(),
            eval_choices: self.eval_choices.clone(),
            preferences: self.preferences.clone(),
            schedule: schedule(&self.recipe, steps)?,
            sampler,
            eval_batch_size: t.eval_batch_size.unwrap_or(t.batch_size),
            accumulation: t.gradient_accumulation,
            steps,
            max_grad_norm: t.max_grad_norm,
            keep,
            rows_at_a_time,
            weight_decay: t.weight_decay,
            loraplus_lr_ratio: t.loraplus_lr_ratio.unwrap_or(1.0),
            seed: t.seed,
            output: output(&self.recipe),
            save_every: self.recipe.output.save_every,
            eval_every: self.recipe.output.eval_every,
            keep_checkpoints: self.recipe.output.keep_checkpoints,
            fingerprint: self.fingerprint(steps),
        })
    }

    /// What is kept of a step at a time, and of how many rows.
    fn room(&self) -> Result<(Keep, usize)> {
        let (t, records) = (&self.recipe.train, self.activation_dtype()?);
        if rule::kind(&self.recipe)?.is_forward_only() {
            return Ok((Keep { checkpointing: Checkpointing::Full, records }, t.batch_size));
        }
        let checkpointing = match &t.gradient_checkpointing {
            toml::Value::Boolean(true) => Some(Checkpointing::Full),
            toml::Value::Boolean(false) => Some(Checkpointing::Off),
            toml::Value::String(s) if s == "auto" => None,
            other => bail!("`train.gradient_checkpointing` is {other}; use \"auto\", true or false"),
        };
        let wanted = memory::Wanted {
            checkpointing,
            records,
            budget: t.memory_budget.as_deref(),
            rows: t.batch_size,
            in_parts: self.choices.is_none() && self.preferences.is_none(),
        };
        memory::fit(&self.model, &self.prepared.adapter, &wanted, |rows| self.longest_batch(rows))
    }

    /// A base asked for in `bf16` holds kept activations in it too, as PyTorch does; a CPU computes them in `f32` all the same.
    fn activation_dtype(&self) -> Result<DType> {
        match self.recipe.train.activation_dtype.as_str() {
            "f32" => Ok(DType::F32),
            "bf16" => Ok(DType::BF16),
            "auto" => Ok(match open::parse_dtype(&self.recipe.model.dtype)? {
                Some(DType::BF16) => DType::BF16,
                _ => DType::F32,
            }),
            other => bail!("`train.activation_dtype` is \"{other}\"; use \"auto\", \"f32\" or \"bf16\""),
        }
    }

    /// The largest batch of so many rows that the data can give.
    fn longest_batch(&self, rows: usize) -> LongestBatch {
        if let Some(PreferenceRows { train, .. }) = &self.preferences {
            let sequences = rows.saturating_mul(train.most_answers());
            return LongestBatch { tokens: rows.saturating_mul(train.longest_row()), sequences };
        }
        if let Some(choices) = &self.choices {
            let sequences = rows.saturating_mul(choices.most_answers());
            return LongestBatch { tokens: rows.saturating_mul(choices.longest_row()), sequences };
        }
        let longest = self.train.stats().max_length;
        let tokens = rows.saturating_mul(if self.recipe.data.packing { self.recipe.data.max_length } else { longest });
        LongestBatch { tokens, sequences: rows }
    }

    fn fingerprint(&self, steps: u64) -> String {
        let stats = self.train.stats();
        fingerprint(&self.recipe, (stats.rows, stats.tokens, stats.counted_tokens), steps)
    }

    fn describe(&self, as_json: bool) -> Result<()> {
        let plan = self.plan()?;
        let candidates = match rule::kind(&self.recipe)? {
            OptimizerKind::Bdpl => Some(self.bdpl()?),
            _ => self.rule().map(|_| None)?,
        };
        let calls = self.forward_calls(&plan)?;
        let adapter = &self.prepared.adapter;
        // Words have no parameters.
        let trainable = if candidates.is_some() { 0 } else { adapter.trainable_elements() };
        let total = self.model.parameter_count() + trainable;
        let share = 100.0 * trainable as f64 / total as f64;
        let forward_only = calls.is_some();
        let peak = match forward_only {
            true => memory::estimate_forward(&self.model, adapter, &self.longest_batch(plan.rows_at_a_time)),
            false => memory::estimate(&self.model, adapter, &self.longest_batch(plan.rows_at_a_time), plan.keep),
        };
        let recomputed = match forward_only {
            true => "none: forward passes only".to_string(),
            false if plan.rows_at_a_time < self.recipe.train.batch_size => {
                format!("blocks recomputed: {:?}, {} rows at a time", plan.keep.checkpointing, plan.rows_at_a_time)
            }
            false => format!("blocks recomputed: {:?}", plan.keep.checkpointing),
        };
        let tokenizer = self.tokenizer.as_ref();
        let decode =
            |ids: &[u32]| tokenizer.and_then(|t| t.decode(ids, false).ok()).unwrap_or_else(|| format!("{ids:?}"));
        let rows: Vec<String> = preview(&self.train, 3, &decode).iter().map(ToString::to_string).collect();
        let hits: Vec<(String, String, usize)> = self
            .prepared
            .selection
            .iter()
            .flat_map(|s| &s.hits)
            .map(|h| (h.key.to_string(), h.pattern.clone(), h.hits))
            .collect();
        let sites: Vec<&str> =
            adapter.touched().filter_map(|(id, _)| self.model.sites().get(id)).map(|s| s.path.as_str()).collect();
        if as_json {
            let result = json!({
                "method": self.prepared.method, "sites": sites,
                "virtual_tokens": adapter.virtual_tokens().map_or(0, |tokens| tokens.count), "patterns": hits.iter().map(|(k, p, n)| json!({"key": k, "pattern": p, "sites": n})).collect::<Vec<_>>(),
                "trainable_parameters": trainable, "parameters": total, "steps": plan.steps,
                "rows": self.train.len(), "tokens": self.train.stats().tokens, "counted_tokens": self.train.stats().counted_tokens,
                "estimated_peak_bytes": peak, "rows_at_a_time": plan.rows_at_a_time, "gradient_checkpointing": if forward_only { "None".to_string() } else { format!("{:?}", plan.keep.checkpointing) },
                "optimizer": self.recipe.train.optimizer, "objective": self.recipe.train.objective, "forward_calls": calls, "preview": rows
            });
            out!("{result}");
            return Ok(());
        }
        match adapter.virtual_tokens() {
            Some(tokens) => out!("method      {}, {} virtual tokens", self.prepared.method, tokens.count),
            None => out!("method      {} on {} sites", self.prepared.method, sites.len()),
        }
        for (key, pattern, n) in &hits {
            out!("  {key:<18} {pattern:<24} {n} sites");
        }
        out!("trainable   {trainable} of {total} parameters ({share:.3} %)");
        out!("data        {} ({})", self.train.stats(), self.format.name());
        out!("steps       {} of {} rows × {}", plan.steps, self.recipe.train.batch_size, plan.accumulation);
        out!("updates     {}, lowering {}", self.recipe.train.optimizer, plan.objective);
        if let Some(calls) = calls {
            out!("calls       {calls} forward passes of {} rows", self.recipe.train.batch_size);
        }
        if let Some(bdpl) = candidates {
            out!("candidates  {}: {} …", bdpl.candidates().len(), bdpl::shown(&bdpl));
        }
        out!("memory      about {:.0} MB at the peak, {recomputed}", peak as f64 / 1e6);
        out!("first rows, counted tokens in ⟦ ⟧:");
        for row in rows {
            out!("{row}");
        }
        Ok(())
    }

    fn train(self, args: &TrainArgs) -> Result<()> {
        let plan = self.plan()?;
        let rule = self.rule()?;
        let early_stop = early_stop(&self.recipe);
        let output = begin(&self.recipe)?;
        let planned = plan.steps;
        let before = self.samples(&AdapterSet::empty())?;
        let Run { recipe, files, model, tokenizer, prepared, train, .. } = self;
        let method = prepared.method;
        let adapter = Arc::new(prepared.adapter);
        let record = mezo::record(&recipe, files.config().head(), &adapter)?;
        let mut trainer = Trainer::new(&model, adapter.clone(), rule, early_stop, plan);
        let outcome = drive(&mut trainer, &output, args.resume, planned)?;
        if let (UpdateRule::Mezo(mezo), Some(record)) = (trainer.rule(), record) {
            mezo::write(record, mezo, &adapter, &output)?;
        }
        drop(trainer);

        let facts = facts(&recipe, &model, &adapter, method, &train, &outcome, planned);
        let finished = Finished {
            recipe: &recipe,
            files: &files,
            model: &model,
            tokenizer: tokenizer.as_ref(),
            adapter,
            before,
            facts,
        };
        let samples = finished.samples()?;
        finished.write(&output, &samples)?;
        finished.say(&output, &samples, args, &outcome)
    }

    fn samples(&self, adapters: &AdapterSet) -> Result<Vec<String>> {
        let prompts = &self.recipe.sample.prompts;
        let (false, Some(tokenizer)) = (prompts.is_empty(), &self.tokenizer) else { return Ok(Vec::new()) };
        let most = self.recipe.sample.max_new_tokens;
        sample::continuations(&self.model, tokenizer, adapters, prompts, most).context("sample.prompts")
    }
}

/// The head, and its classes: those that the recipe names, those of the adapter to start from, those of the checkpoint, or
/// those that occur in the training rows.
fn settle_classes(files: &mut ModelFiles, recipe: &Recipe, train: &DataSpec) -> Result<()> {
    let from = recipe.method.get("init_from").and_then(toml::Value::as_str).map(open::adapter).transpose()?;
    if let Some(head) = &recipe.model.head {
        files.set_head(head.parse()?).context("model.head")?;
    }
    open::settle_classes(files, &recipe.data.labels, from.as_deref())?;
    if let (Some(wanted), Task::Head { kind, .. }) = (&recipe.model.head, files.config().task())
        && wanted != kind.name()
    {
        bail!("`model.head` is \"{wanted}\", and the adapter to start from has a head for {kind}");
    }
    if let Task::Head { kind, .. } = files.config().task()
        && recipe.data.labels.is_empty()
        && from.is_none()
        && files.lacks_class_head()
    {
        let labels = labels_in(train, kind)?;
        if kind == HeadKind::QuestionAnswering {
            return Ok(files.set_labels(labels)?);
        }
        let what = if kind == HeadKind::Regression { "numbers" } else { "classes" };
        eprintln!("{what} in the training rows: {}", labels.join(", "));
        files.set_labels(labels)?;
    }
    Ok(())
}

/// How rows are read, as far as the recipe alone says it.
fn text_options(recipe: &Recipe, format: Option<Format>) -> EncodeOptions {
    let (middle, spans) = (&recipe.data.fill_in_the_middle, recipe.data.span_corruption);
    EncodeOptions {
        corruption: middle.clone().map(Corruption::Middle).or(spans.map(Corruption::Spans)),
        seed: recipe.train.seed,
        template: recipe.data.template.clone(),
        chat_template: recipe.data.chat_template.clone(),
        label_words: recipe.data.label_words.iter().map(|(k, v)| (k.clone(), plain_text(v))).collect(),
        text_eos: recipe.data.text_eos,
        ..EncodeOptions::new(format.unwrap_or(Format::Text))
    }
}

/// The answers that all rows choose from, where the recipe names them.
fn answers(recipe: &Recipe, options: &EncodeOptions) -> Vec<String> {
    match recipe.data.choices.as_slice() {
        [] => options.label_words.keys().cloned().collect(),
        given => given.to_vec(),
    }
}

fn sampler(recipe: &Recipe, train: &Dataset) -> Result<Sampler> {
    let (t, d) = (&recipe.train, &recipe.data);
    let options = SamplerOptions {
        batch_size: t.batch_size,
        shuffle: d.shuffle,
        seed: t.seed,
        group_by_length: d.group_by_length,
        packing: d.packing.then_some(t.batch_size.saturating_mul(d.max_length)),
    };
    Ok(Sampler::new(train, options)?)
}

fn plain_text(value: &toml::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}
