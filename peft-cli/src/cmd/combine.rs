//! `peft-cli combine`: one adapter of several; and `convert --to lora`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use peft_core::BaseModel;
use peft_core::combine::Combined;
use peft_lora::combine::{CombineOptions, MajoritySign, RankRule};
use peft_train::combine::{self, Input};
use serde_json::{Value, json};

use crate::args::{CombineArgs, ConvertArgs, MajoritySignMethod};
use crate::open;

/// Error of a conversion to LoRA where neither a rank nor an error is asked for.
const MAX_ERROR: f64 = 0.01;
/// Sites that the table shows where they are more: those with the largest errors.
const SHOWN: usize = 12;

pub(crate) fn run(args: &CombineArgs) -> Result<()> {
    open::refuse_filled(&args.output)?;
    let folders = args.adapter.iter().map(|a| open::adapter(&a.adapter)).collect::<Result<Vec<PathBuf>>>()?;
    let inputs: Vec<Input<'_>> = args
        .adapter
        .iter()
        .zip(&folders)
        .map(|(a, folder)| Input { name: &a.adapter, weight: a.weight, folder, task: None })
        .collect();
    let paths = || folders.iter().map(PathBuf::as_path);
    let kind = args.kind.map_or_else(|| combine::default_type(paths()), Ok)?;
    let options = CombineOptions {
        rank: args.svd_rank.map(|rank| RankRule::Fixed(rank.into())),
        density: args.density,
        majority_sign: match args.majority_sign_method {
            MajoritySignMethod::Total => MajoritySign::Total,
            MajoritySignMethod::Frequency => MajoritySign::Frequency,
        },
        seed: args.seed,
        peft_compatible: args.peft_compatible,
        ..CombineOptions::new(kind)
    };
    let labels = combine::labels(&inputs)?;
    let base = args.model.as_deref().map(|spec| open::base(spec, paths())).transpose()?;
    let combined = combine::combine(&inputs, &options, base.as_ref().map(|model| model as &dyn BaseModel))?;
    combine::write(&args.output, &combined, &labels)?;
    let weights: Vec<Value> = args.adapter.iter().map(|a| json!({"adapter": a.adapter, "weight": a.weight})).collect();
    report(&combined, &args.output, args.json, json!({"type": kind.name(), "adapters": weights}))
}

/// `convert --to lora`.
pub(crate) fn to_lora(args: &ConvertArgs, folder: &Path) -> Result<()> {
    let rule = match args.rank {
        Some(rank) => RankRule::Fixed(rank.into()),
        None => RankRule::WithinError(args.max_error.unwrap_or(MAX_ERROR)),
    };
    let input = Input { name: &args.adapter, weight: 1.0, folder, task: args.task_id };
    let labels = combine::labels(&[input])?;
    let base = args.model.as_deref().map(|spec| open::base(spec, [folder])).transpose()?;
    let converted = combine::to_lora(input, rule, base.as_ref().map(|model| model as &dyn BaseModel))?;
    combine::write(&args.output, &converted, &labels).with_context(|| format!("adapter {}", args.adapter))?;
    report(&converted, &args.output, args.json, json!({"method": converted.config.get("peft_type")}))
}

/// The table on stderr, and the facts as JSON.
fn report(combined: &Combined, output: &Path, as_json: bool, more: Value) -> Result<()> {
    for note in &combined.notes {
        eprintln!("note: {note}");
    }
    let mut sites: Vec<_> = combined.sites.iter().collect();
    let width = sites.iter().map(|s| s.path.len()).max().unwrap_or(0).max(4);
    if sites.len() > SHOWN {
        sites.sort_by(|a, b| b.relative_error().total_cmp(&a.relative_error()));
    }
    eprintln!("{:<width$}  {:>5}  {:>10}  relative error", "site", "rank", "norm");
    for s in sites.iter().take(SHOWN) {
        eprintln!("{:<width$}  {:>5}  {:>10.4}  {:.2e}", s.path, s.rank, s.norm, s.relative_error());
    }
    if sites.len() > SHOWN {
        eprintln!("… and {} sites with smaller errors", sites.len() - SHOWN);
    }
    let error = combined.relative_error();
    let (elements, count) = (combined.elements(), sites.len());
    eprintln!(
        "{count} sites, {elements} parameters, relative error {error:.2e} over all; written to {}",
        output.display()
    );
    if as_json {
        let sites: Vec<Value> = combined
            .sites
            .iter()
            .map(|s| json!({"site": s.path, "rank": s.rank, "norm": s.norm, "relative_error": s.relative_error()}))
            .collect();
        let ranks = combined.sites.iter().map(|s| s.rank).max();
        let mut facts = json!({
            "output": output, "rank": ranks, "parameters": elements, "relative_error": error, "sites": sites
        });
        if let (Value::Object(facts), Value::Object(more)) = (&mut facts, more) {
            facts.extend(more);
        }
        out!("{facts}");
    }
    Ok(())
}
