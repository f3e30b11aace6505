//! `peft-cli replay`: a run of MeZO made again from its record, without data and without a forward pass.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use peft_core::Parameter;
use peft_train::mezo::{Mezo, Record, checksum};
use peft_train::{methods, opt_params};
use serde_json::json;

use crate::args::ReplayArgs;
use crate::cmd::train;
use crate::open;

pub(crate) fn run(args: &ReplayArgs) -> Result<()> {
    let path = if args.record.is_dir() { args.record.join(Record::FILE) } else { args.record.clone() };
    let record = Record::read(&path)?;
    let all = record.taken.len();
    let steps = args.steps.unwrap_or(all);
    if steps > all {
        bail!("--steps {steps}: {} holds {all} steps", path.display());
    }
    let mut files = open::model(args.model.as_deref().unwrap_or(&record.base_model))?;
    if files.config().labels().is_some() {
        if !record.head.is_empty() {
            files.set_head(record.head.parse()?)?;
        }
        files.set_labels(record.labels.clone())?;
    }
    let placement = open::placement("cpu", &record.dtype)?;
    let model = files.load_deferred(&placement, record.seed)?;
    let prepared = match &args.adapter {
        Some(from) => methods::open(&open::adapter(from)?, &model)?,
        None => train::start(record.method.clone(), &files, &model, record.seed)
            .context("the start of the run; --adapter names another")?,
    };
    let mut adapter = prepared.adapter;
    adapter.labels = files.config().head().unwrap_or_default();
    adapter.config.insert("base_model_name_or_path".into(), record.base_model.clone().into());
    let parameters: Vec<Parameter> = adapter.parameters().into_iter().cloned().collect();
    if checksum(&adapter.parameters())? != record.start {
        bail!(
            "{}: the run did not start from these parameters: give the base model that it was trained on (--model), and the \
             adapter that it went on from, if any (--adapter)",
            path.display()
        );
    }
    let opt_params = opt_params(&parameters, record.weight_decay, record.loraplus_lr_ratio);
    let mut mezo = Mezo::new(record.config())?;
    for taken in record.taken.iter().take(steps) {
        mezo.replay(&opt_params, taken)?;
    }
    if steps == all && checksum(&adapter.parameters())? != record.end {
        bail!("{}: its steps do not lead to the parameters that the run ended with; it is damaged", path.display());
    }
    train::write_result(&files, &model, &Arc::new(adapter), prepared.method, &args.output)?;
    if args.json {
        out!("{}", json!({"output": args.output, "steps": steps, "of": all, "method": prepared.method}));
    } else {
        eprintln!("{steps} of {all} steps of {} made again in {}", path.display(), args.output.display());
    }
    Ok(())
}
