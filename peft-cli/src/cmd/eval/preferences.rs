//! `eval` on rows with a preferred answer: the objective and the rewards, against the base.

use anyhow::{Result, bail};
use peft_core::Ctx;
use peft_models::Decoder;
use peft_train::data::{DataSpec, EncodeOptions, Format, Preferences, TextTokenizer, format_of, single_answers_in};
use peft_train::{Objective, Preference, PreferencesMeasured, Reference, evaluate_preferences};
use serde_json::{Map, Value, json};

use crate::args::EvalArgs;

/// Whether a preference objective is asked for.
pub(super) fn asked(args: &EvalArgs) -> bool {
    args.objective.is_some() || args.beta.is_some()
}

/// Whether the rows are measured by a preference objective.
pub(super) fn are_these(args: &EvalArgs, format: Option<Format>, options: &EncodeOptions) -> Result<bool> {
    let preference = match format {
        Some(format) => format == Format::Preference,
        None => format_of(&DataSpec::from(args.data.as_path()), options)? == Format::Preference,
    };
    if asked(args) && !preference {
        bail!("--objective and --beta go with rows of format preference");
    }
    if preference && args.adapter.len() > 1 {
        bail!("rows of format preference go with one --adapter");
    }
    Ok(preference)
}

fn objective(args: &EvalArgs) -> Result<Preference> {
    // A row has `completion` or `completion_ids` where it has one answer.
    let single = || single_answers_in(&DataSpec::from(args.data.as_path()));
    let name = match &args.objective {
        Some(name) => name.as_str(),
        None if single()? => "kto",
        None => "dpo",
    };
    let objective: Objective = name.parse()?;
    let Some(objective) = objective.preference() else {
        bail!("--objective {name} is none of rows with a preferred answer; use dpo, ipo, kto, orpo or simpo");
    };
    let beta = args.beta.unwrap_or(objective.beta);
    if !(beta.is_finite() && beta > 0.0) {
        bail!("--beta is {beta}; it must be a number above 0");
    }
    Ok(Preference { beta, ..objective })
}

/// The objective, and rewards with the base as the reference.
pub(super) fn measure(
    args: &EvalArgs,
    model: &Decoder,
    ctx: &Ctx<'_>,
    tokenizer: Option<&dyn TextTokenizer>,
    options: &EncodeOptions,
) -> Result<()> {
    let objective = objective(args)?;
    let spec = DataSpec::from(args.data.as_path());
    let rows = Preferences::load(&spec, tokenizer, options, &objective)?;
    let mut reference = Reference::new(None, &rows);
    let found = evaluate_preferences(model, &rows, &objective, &mut reference, ctx, args.batch_size, |_| {})?;
    let PreferencesMeasured { objective: value, scored } = found;
    let loss = scored.own.nll / scored.own.counted.max(1) as f64;
    if args.json {
        let mut result = Map::from_iter([
            ("loss".to_string(), json!(loss)),
            ("perplexity".into(), json!(loss.exp())),
            ("tokens".into(), json!(scored.own.counted)),
            ("examples".into(), json!(rows.len())),
            ("objective".into(), json!(value)),
        ]);
        result.extend(scored.rewards.named().map(|(k, v)| (k.to_string(), json!(v))));
        out!("{}", Value::Object(result));
        return Ok(());
    }
    out!("{:<18}{value:.6}, beta {}", objective.name(), objective.beta);
    for (name, value) in scored.rewards.named() {
        let name = name.replace('_', " ");
        match name.as_str() {
            "rewards accuracy" => out!("{name:<18}{:.2} % of {} pairs", 100.0 * value, rows.len()),
            _ => out!("{name:<18}{value:.6}"),
        }
    }
    out!("{:<18}{loss:.6} on chosen answers, {} tokens", "loss", scored.own.counted);
    Ok(())
}
