//! `peft-cli train`: recipe → plan → run → results.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::DType;
use peft_core::{AdapterSet, BaseModel, Task};
use peft_models::tokenizer::Tokenizer;
use peft_models::{AnyModel, ModelFiles};
use peft_train::data::{
    Choices, DataSpec, Dataset, EncodeOptions, Format, Sampler, SamplerOptions, TextTokenizer, labels_in, preview,
};
use peft_train::early_stop::{EarlyStop, EarlyStopConfig};
use peft_train::fnv::Fnv;
use peft_train::log::{Progress, RunLogger};
use peft_train::methods::{self, Prepared};
use peft_train::mezo::Mezo;
use peft_train::optim::{self, OptimizerKind, OptimizerOptions};
use peft_train::recipe::{Recipe, parse_value};
use peft_train::schedule::{Schedule, ScheduleKind, ScheduleOptions, warmup_steps_from_ratio};
use peft_train::{Checkpointing, Ended, Keep, Plan, Trainer, UpdateRule, checkpoint};
use serde_json::json;

use crate::args::TrainArgs;
use crate::memory::LongestBatch;
use crate::{memory, open, sample};
use results::{Finished, facts};
use start::prepare_adapter;

mod mezo;
mod results;
mod start;

pub(crate) use results::write_result;
pub(crate) use start::start;

pub(crate) fn run(args: &TrainArgs) -> Result<()> {
    let recipe = load_recipe(args)?;
    let run = Run::open(recipe, args.resume)?;
    if args.dry_run {
        return run.describe(args.json);
    }
    run.train(args)
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
        ("a base model", recipe.model.path.is_some(), "--model or model.path"),
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
    train: Dataset,
    eval: Option<Dataset>,
    choices: Option<Choices>,
    eval_choices: Option<Choices>,
    format: Format,
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
        let format = recipe.data.format.as_deref().map(str::parse::<Format>).transpose()?;
        let tokenizer = match format {
            // Rows of tokens need none, so a base without one will do.
            Some(Format::Tokens) => files.tokenizer().ok(),
            _ => Some(files.tokenizer()?),
        };
        let text = tokenizer.as_ref().map(open::text_tokenizer).transpose()?;
        let spec = |v: &toml::Value| -> Result<DataSpec> { v.clone().try_into().context("data.train and data.eval") };
        let train_spec = spec(recipe.data.train.as_ref().context("data.train is missing")?)?;
        settle_classes(&mut files, &recipe, &train_spec)?;
        let options = EncodeOptions {
            template: recipe.data.template.clone(),
            chat_template: recipe.data.chat_template.clone(),
            label_words: recipe.data.label_words.iter().map(|(k, v)| (k.clone(), plain_text(v))).collect(),
            max_length: Some(open::max_length(&files, recipe.data.max_length, open::virtual_tokens(&recipe.method)?)),
            text_eos: recipe.data.text_eos,
            vocab_size: Some(files.config().vocab_size()),
            class_head: open::class_head(&files),
            decoder: open::decoder_inputs(&files),
            tasks: open::tasks(&recipe.method)?,
            ..EncodeOptions::new(format.unwrap_or(Format::Text))
        };
        let text = text.as_ref().map(|t| t as &dyn TextTokenizer);
        let (train, format) = Dataset::load(&train_spec, format, text, &options)?;
        let eval = match &recipe.data.eval {
            Some(v) => Some(Dataset::load(&spec(v)?, Some(format), text, &options)?.0),
            None => None,
        };
        let task = files.config().task();
        let compares = recipe.objective()?.compares_choices(task);
        if !recipe.data.choices.is_empty() && matches!(task, Task::Classification { .. }) {
            bail!(
                "`data.choices` are answers of a language model; a class head has `data.labels`, the names of its classes"
            );
        }
        let answers = match recipe.data.choices.as_slice() {
            [] => options.label_words.keys().cloned().collect(),
            given => given.to_vec(),
        };
        let with_answers = |spec: &DataSpec| Choices::load(spec, format, text, &options, &answers);
        let choices = if compares { Some(with_answers(&train_spec)?) } else { None };
        let eval_choices = match &recipe.data.eval {
            Some(v) if compares || !recipe.data.choices.is_empty() => Some(with_answers(&spec(v)?)?),
            _ => None,
        };
        // Full fine-tuning trains copies of all weights and reads the base's own once, so they need not stay in memory.
        let full = recipe.method.get("type").and_then(toml::Value::as_str) == Some("full");
        let model = match full && recipe.sample.prompts.is_empty() {
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
        if is_mezo(&recipe)? {
            mezo::check(&prepared.adapter, prepared.method)?;
        }
        prepared.adapter.labels = files.config().labels().unwrap_or_default().to_vec();
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
        Ok(Self { recipe, files, model, tokenizer, prepared, train, eval, choices, eval_choices, format })
    }

    fn output(&self) -> PathBuf {
        PathBuf::from(self.recipe.output.dir.as_deref().unwrap_or_default())
    }

    fn steps(&self, sampler: &Sampler) -> u64 {
        let t = &self.recipe.train;
        t.max_steps.unwrap_or_else(|| {
            let batches: f64 = if t.epochs.fract() == 0.0 && t.epochs < 10_000.0 {
                (0..t.epochs as u64).map(|e| sampler.batches_in_epoch(e) as f64).sum()
            } else {
                t.epochs * sampler.batches_in_epoch(0) as f64
            };
            ((batches / t.gradient_accumulation as f64).ceil() as u64).max(1)
        })
    }

    fn plan(&self) -> Result<Plan> {
        let t = &self.recipe.train;
        let sampler = sampler(&self.recipe, &self.train)?;
        let steps = self.steps(&sampler);
        methods::check_training(&self.prepared.adapter, steps)?;
        let warmup = t.warmup_steps.unwrap_or_else(|| warmup_steps_from_ratio(t.warmup_ratio, steps));
        let kind: ScheduleKind = t.scheduler.parse()?;
        Ok(Plan {
            train: self.train.clone(),
            eval: self.eval.clone(),
            objective: self.recipe.objective()?,
            choices: self.choices.clone(),
            eval_choices: self.eval_choices.clone(),
            schedule: Schedule::new(kind, t.learning_rate, warmup, steps, &ScheduleOptions::default())?,
            sampler,
            eval_batch_size: t.eval_batch_size.unwrap_or(t.batch_size),
            accumulation: t.gradient_accumulation,
            steps,
            max_grad_norm: t.max_grad_norm,
            keep: self.keep()?,
            weight_decay: t.weight_decay,
            loraplus_lr_ratio: t.loraplus_lr_ratio.unwrap_or(1.0),
            seed: t.seed,
            output: self.output(),
            save_every: self.recipe.output.save_every,
            eval_every: self.recipe.output.eval_every,
            keep_checkpoints: self.recipe.output.keep_checkpoints,
            fingerprint: self.fingerprint(steps),
        })
    }

    fn keep(&self) -> Result<Keep> {
        let records = self.activation_dtype()?;
        if is_mezo(&self.recipe)? {
            return Ok(Keep { checkpointing: Checkpointing::Full, records });
        }
        let checkpointing = match &self.recipe.train.gradient_checkpointing {
            toml::Value::Boolean(true) => Checkpointing::Full,
            toml::Value::Boolean(false) => Checkpointing::Off,
            toml::Value::String(s) if s == "auto" => {
                let (adapter, budget) = (&self.prepared.adapter, self.recipe.train.memory_budget.as_deref());
                memory::auto_checkpointing(&self.model, adapter, &self.longest_batch(), records, budget)?
            }
            other => bail!("`train.gradient_checkpointing` is {other}; use \"auto\", true or false"),
        };
        Ok(Keep { checkpointing, records })
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

    /// The largest micro-batch that the data can give.
    fn longest_batch(&self) -> LongestBatch {
        if let Some(choices) = &self.choices {
            let rows = self.recipe.train.batch_size;
            let sequences = rows.saturating_mul(choices.most_answers());
            return LongestBatch { tokens: rows.saturating_mul(choices.longest_row()), sequences };
        }
        let sequences = self.recipe.train.batch_size;
        let longest = self.train.stats().max_length;
        let tokens =
            sequences.saturating_mul(if self.recipe.data.packing { self.recipe.data.max_length } else { longest });
        LongestBatch { tokens, sequences }
    }

    /// What must not change between the parts of a run, in one line.
    fn fingerprint(&self, steps: u64) -> String {
        let stats = self.train.stats();
        let mut recipe = self.recipe.clone();
        // Where results go and how memory is spent do not change them.
        recipe.output = Default::default();
        recipe.sample = Default::default();
        recipe.train.memory_budget = None;
        recipe.train.gradient_checkpointing = toml::Value::Boolean(false);
        let text = format!("{}|{}|{}|{}|{}", recipe.to_toml(), stats.rows, stats.tokens, stats.counted_tokens, steps);
        let mut hash = Fnv::default();
        hash.text(&text);
        hash.to_string()
    }

    fn describe(&self, as_json: bool) -> Result<()> {
        let plan = self.plan()?;
        let adapter = &self.prepared.adapter;
        let trainable = adapter.trainable_elements();
        let total = self.model.parameter_count() + trainable;
        let share = 100.0 * trainable as f64 / total as f64;
        let forward_only = is_mezo(&self.recipe)?;
        let peak = match forward_only {
            true => memory::estimate_forward(&self.model, adapter, &self.longest_batch()),
            false => memory::estimate(&self.model, adapter, &self.longest_batch(), plan.keep),
        };
        let recomputed = match forward_only {
            true => "none: forward passes only".to_string(),
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
                "estimated_peak_bytes": peak, "gradient_checkpointing": if forward_only { "None".to_string() } else { format!("{:?}", plan.keep.checkpointing) },
                "optimizer": self.recipe.train.optimizer, "objective": self.recipe.train.objective, "preview": rows
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
        out!("memory      about {:.0} MB at the peak, {recomputed}", peak as f64 / 1e6);
        out!("first rows, counted tokens in ⟦ ⟧:");
        for row in rows {
            out!("{row}");
        }
        Ok(())
    }

    fn train(self, args: &TrainArgs) -> Result<()> {
        peft_alloc::keep_pages();
        let output = self.output();
        std::fs::create_dir_all(&output)
            .with_context(|| format!("cannot make the output folder {}", output.display()))?;
        let plan = self.plan()?;
        let rule = self.rule()?;
        let t = &self.recipe.train;
        let early_stop = EarlyStop::new(EarlyStopConfig {
            metric: t.metric.clone(),
            patience: t.early_stopping_patience,
            min_delta: t.early_stopping_min_delta,
            ..EarlyStopConfig::default()
        });
        let planned = plan.steps;
        let before = self.samples(&AdapterSet::empty())?;
        let Run { recipe, files, model, tokenizer, prepared, train, .. } = self;
        let method = prepared.method;
        let adapter = Arc::new(prepared.adapter);
        let resolved = recipe.with_absolute_paths();
        peft_core::atomic::write_file(output.join("recipe.toml"), resolved.to_toml().as_bytes())?;

        let record = mezo::record(&recipe, files.config().labels(), &adapter)?;
        let mut trainer = Trainer::new(&model, adapter.clone(), rule, early_stop, plan);
        let resumed = if args.resume { trainer.resume()? } else { clear_old_run(&output)? };
        let mut logger = match resumed {
            Some(step) => {
                eprintln!("resuming after step {step}");
                RunLogger::resume(&output, step)?
            }
            None => RunLogger::create(&output)?,
        };
        let mut progress = Progress::stderr(resumed.unwrap_or(0), planned);
        let outcome = trainer.run(&mut logger, &mut progress, stop_flag()?)?;
        let state = &outcome.state;
        progress.finish(&format!("{} steps, last loss {:.4}", state.step, state.last_loss.unwrap_or(f64::NAN)));
        if let Ended::Interrupted(dir) = &outcome.ended {
            bail!("interrupted after step {}; go on with --resume (checkpoint {})", state.step, dir.display());
        }
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

    fn rule(&self) -> Result<UpdateRule> {
        let t = &self.recipe.train;
        let options = OptimizerOptions {
            beta1: t.beta1,
            beta2: t.beta2,
            eps: t.eps,
            momentum: t.momentum,
            mezo_eps: t.mezo_eps,
            mezo_samples: t.mezo_samples,
            ..OptimizerOptions::default()
        };
        let kind = t.optimizer.parse::<OptimizerKind>()?;
        optim::check_options(kind, &options)?;
        Ok(match kind {
            OptimizerKind::Mezo => Mezo::new(mezo::config(t))?.into(),
            _ => optim::build(kind, &options)?.into(),
        })
    }

    fn samples(&self, adapters: &AdapterSet) -> Result<Vec<String>> {
        let prompts = &self.recipe.sample.prompts;
        let (false, Some(tokenizer)) = (prompts.is_empty(), &self.tokenizer) else { return Ok(Vec::new()) };
        let most = self.recipe.sample.max_new_tokens;
        sample::continuations(&self.model, tokenizer, adapters, prompts, most).context("sample.prompts")
    }
}

/// Whether the run is trained by forward passes alone.
fn is_mezo(recipe: &Recipe) -> Result<bool> {
    Ok(recipe.train.optimizer.parse::<OptimizerKind>()? == OptimizerKind::Mezo)
}

/// The classes of a class head: those that the recipe names, those of the adapter to start from, those of the checkpoint, or
/// those that occur in the training rows.
fn settle_classes(files: &mut ModelFiles, recipe: &Recipe, train: &DataSpec) -> Result<()> {
    let from = recipe.method.get("init_from").and_then(toml::Value::as_str).map(open::adapter).transpose()?;
    open::settle_classes(files, &recipe.data.labels, from.as_deref())?;
    if recipe.data.labels.is_empty() && from.is_none() && files.lacks_class_head() {
        let labels = labels_in(train)?;
        eprintln!("classes in the training rows: {}", labels.join(", "));
        files.set_labels(labels)?;
    }
    Ok(())
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

/// A new run in the folder of an old one starts without the old checkpoints, so that a later --resume cannot mix them.
fn clear_old_run(output: &Path) -> Result<Option<u64>> {
    let folder = checkpoint::folder(output);
    if folder.is_dir() {
        std::fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot remove the old run's {}", folder.display()))?;
    }
    Ok(None)
}

/// Raised by Ctrl-C; a second one ends the process at once.
fn stop_flag() -> Result<&'static AtomicBool> {
    static STOP: AtomicBool = AtomicBool::new(false);
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nstopping after this step; press Ctrl-C again to stop at once");
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(&STOP)
}

fn plain_text(value: &toml::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}
