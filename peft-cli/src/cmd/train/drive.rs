//! What every run has, whatever a step does: its length, its folder, its logs, the way it is stopped and gone on with.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use peft_train::data::Sampler;
use peft_train::early_stop::{EarlyStop, EarlyStopConfig};
use peft_train::fnv::Fnv;
use peft_train::log::{Progress, RunLogger};
use peft_train::recipe::{EndpointTable, Recipe};
use peft_train::schedule::{Schedule, ScheduleKind, ScheduleOptions, warmup_steps_from_ratio};
use peft_train::{Ended, Outcome, Resumable, checkpoint};

/// The output folder that a recipe names.
pub(super) fn output(recipe: &Recipe) -> PathBuf {
    PathBuf::from(recipe.output.dir.as_deref().unwrap_or_default())
}

/// Makes the output folder and writes the recipe as it was resolved into it.
pub(super) fn begin(recipe: &Recipe) -> Result<PathBuf> {
    peft_alloc::keep_pages();
    let output = output(recipe);
    std::fs::create_dir_all(&output).with_context(|| format!("cannot make the output folder {}", output.display()))?;
    let resolved = recipe.with_absolute_paths();
    peft_core::atomic::write_file(output.join("recipe.toml"), resolved.to_toml().as_bytes())?;
    Ok(output)
}

/// The steps that a recipe asks for.
pub(super) fn planned(recipe: &Recipe, sampler: &Sampler) -> u64 {
    let t = &recipe.train;
    t.max_steps.unwrap_or_else(|| {
        let batches: f64 = if t.epochs.fract() == 0.0 && t.epochs < 10_000.0 {
            (0..t.epochs as u64).map(|e| sampler.batches_in_epoch(e) as f64).sum()
        } else {
            t.epochs * sampler.batches_in_epoch(0) as f64
        };
        ((batches / t.gradient_accumulation as f64).ceil() as u64).max(1)
    })
}

/// The learning rates of a run of so many steps.
pub(super) fn schedule(recipe: &Recipe, steps: u64) -> Result<Schedule> {
    let t = &recipe.train;
    let warmup = t.warmup_steps.unwrap_or_else(|| warmup_steps_from_ratio(t.warmup_ratio, steps));
    let kind: ScheduleKind = t.scheduler.parse()?;
    Ok(Schedule::new(kind, t.learning_rate, warmup, steps, &ScheduleOptions::default())?)
}

/// What watches the evaluations.
pub(super) fn early_stop(recipe: &Recipe) -> EarlyStop {
    let t = &recipe.train;
    EarlyStop::new(EarlyStopConfig {
        metric: t.metric.clone(),
        patience: t.early_stopping_patience,
        min_delta: t.early_stopping_min_delta,
        ..EarlyStopConfig::default()
    })
}

/// What must not change between the parts of a run, in one line. `size` is that of the training rows, in three numbers.
pub(super) fn fingerprint(recipe: &Recipe, size: (usize, usize, usize), steps: u64) -> String {
    let mut recipe = recipe.clone();
    // Where results go, how memory is spent and how a server is waited for do not change them.
    recipe.output = Default::default();
    recipe.sample = Default::default();
    recipe.train.memory_budget = None;
    recipe.train.gradient_checkpointing = toml::Value::Boolean(false);
    let EndpointTable { timeout, retries, .. } = EndpointTable::default();
    recipe.endpoint = EndpointTable { timeout, retries, api_key_env: None, ..recipe.endpoint };
    let (rows, tokens, counted) = size;
    let text = format!("{}|{rows}|{tokens}|{counted}|{steps}", recipe.to_toml());
    let mut hash = Fnv::default();
    hash.text(&text);
    hash.to_string()
}

/// Runs to the end, from the newest checkpoint with `resume`.
pub(super) fn drive(run: &mut impl Resumable, output: &Path, resume: bool, planned: u64) -> Result<Outcome> {
    let resumed = if resume { run.resume()? } else { clear_old_run(output)? };
    let mut logger = match resumed {
        Some(step) => {
            eprintln!("resuming after step {step}");
            RunLogger::resume(output, step)?
        }
        None => RunLogger::create(output)?,
    };
    let mut progress = Progress::stderr(resumed.unwrap_or(0), planned);
    let outcome = run.run(&mut logger, &mut progress, stop_flag()?)?;
    let state = &outcome.state;
    progress.finish(&format!("{} steps, last loss {:.4}", state.step, state.last_loss.unwrap_or(f64::NAN)));
    if let Ended::Interrupted(dir) = &outcome.ended {
        bail!("interrupted after step {}; go on with --resume (checkpoint {})", state.step, dir.display());
    }
    Ok(outcome)
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
