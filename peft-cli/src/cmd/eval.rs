//! `peft-cli eval`: loss over a file of rows and the scores of a head, or the accuracy of choosing among completions.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use peft_core::{AdapterSet, BaseModel, Ctx, HeadKind, Labels, Route, Segmented, Task};
use peft_models::{AnyModel, Decoder, ModelFiles};
use peft_train::data::{Choices, DataSpec, Dataset, EncodeOptions, Format, TextTokenizer};
use peft_train::{
    Measured, OfAdapter, Scores, class_labels, evaluate_choices, evaluate_dataset, evaluate_each, evaluate_head,
    methods,
};
use serde_json::{Map, Value, json};

use crate::args::EvalArgs;
use crate::open;

mod preferences;

pub(crate) fn run(args: &EvalArgs) -> Result<()> {
    let mut files = open::model(&args.model.model)?;
    let folders = args.adapter.iter().map(|spec| open::adapter(spec)).collect::<Result<Vec<_>>>()?;
    settle_classes(args, &mut files, &folders)?;
    if folders.is_empty() && files.lacks_class_head() {
        bail!("{} has no class head: give --adapter with one that was trained", args.model.model);
    }
    let placement = open::placement(&args.model.device, &args.model.dtype)?;
    let model = files.load(&placement, 0)?;
    if folders.is_empty() && args.task_id.is_some() {
        bail!("--task-id goes with --adapter");
    }
    let several = folders.len() > 1;
    if several && !args.choices.is_empty() {
        bail!("--choice goes with one --adapter");
    }
    let mut set = AdapterSet::empty();
    for (spec, folder) in args.adapter.iter().zip(&folders) {
        let adapter = open::for_task(methods::open(folder, &model)?.adapter, args.task_id)?;
        let adapter = if several { adapter.settled().context("--task-id")? } else { adapter };
        set = set.with(spec, Arc::new(adapter));
    }
    let route = if folders.is_empty() { Route::Base } else { Route::Uniform(0) };
    let ctx = Ctx::eval(&set, &route);
    let virtual_tokens =
        set.adapters().filter_map(|a| a.virtual_tokens()).map(|tokens| tokens.count).max().unwrap_or(0);
    peft_alloc::keep_pages();

    let format = match args.format.as_deref() {
        Some(name) => Some(name.parse::<Format>()?),
        None => preferences::asked(args).then_some(Format::Preference),
    };
    // Rows of tokens need no tokenizer, so a base without one will do.
    let tokenizer = match format {
        Some(Format::Tokens) => None,
        Some(Format::Preference) => files.tokenizer().ok().as_ref().map(open::text_tokenizer).transpose()?,
        _ => Some(open::text_tokenizer(&files.tokenizer()?)?),
    };
    let tokenizer = tokenizer.as_ref().map(|t| t as &dyn TextTokenizer);
    let options = EncodeOptions {
        template: args.template.clone(),
        max_length: Some(open::max_length(&files, args.max_length, virtual_tokens)),
        vocab_size: Some(model.vocab_size()),
        class_head: open::class_head(&files),
        keep_answers: true,
        decoder: open::decoder_inputs(&files),
        tasks: set.adapter(0).and_then(|a| a.tasks()),
        ..EncodeOptions::new(format.unwrap_or(Format::Text))
    };
    if args.batch_size == 0 {
        bail!("--batch-size must be at least 1");
    }
    if !args.choices.is_empty() {
        let model = model.as_language_model().context("--choice")?;
        return choices(args, model, &ctx, format, tokenizer, &options);
    }
    if preferences::are_these(args, format, &options)? {
        let model = model.as_language_model().context("rows of format preference")?;
        return preferences::measure(args, model, &ctx, tokenizer, &options);
    }
    let (data, _) = Dataset::load(&DataSpec::from(args.data.as_path()), format, tokenizer, &options)?;
    if several {
        return side_by_side(args, &model, &data, &set);
    }
    if let Task::Head { kind, .. } = model.task() {
        return headed(args, &model, &data, kind, &ctx);
    }
    let measured = evaluate_dataset(&model, &data, &ctx, args.batch_size, |_| {})?;
    let loss = measured.nll / measured.counted as f64;
    let accuracy = measured.hits as f64 / measured.counted as f64;
    if args.json {
        out!("{}", json!(result(&measured, None, data.len())));
    } else {
        out!("loss            {loss:.6}");
        out!("perplexity      {:.4}", loss.exp());
        out!("token accuracy  {:.2} %", 100.0 * accuracy);
        out!("tokens          {} counted, in {} examples", measured.counted, data.len());
    }
    Ok(())
}

/// The classes of the adapters' heads, which with several have to be the same.
fn settle_classes(args: &EvalArgs, files: &mut ModelFiles, folders: &[PathBuf]) -> Result<()> {
    open::settle_classes(files, &args.labels, folders.first().map(PathBuf::as_path))?;
    if files.config().labels().is_none() || !args.labels.is_empty() {
        return Ok(());
    }
    let of = |folder: &PathBuf| class_labels::read(folder);
    let says = |head: &Labels| format!("{:?} ({})", head.names, head.kind);
    for (spec, folder) in args.adapter.iter().zip(folders).skip(1) {
        if let (Some(own), Some(first)) = (of(folder)?, folders.first().map(of).transpose()?.flatten())
            && own != first
        {
            bail!(
                "{spec} has the classes {}, and {} has {}: evaluate it by itself",
                says(&own),
                args.adapter.first().map_or("", |s| s),
                says(&first)
            );
        }
    }
    Ok(())
}

/// What `--json` says of a data set of so many rows, `examples`.
fn result(measured: &Measured, head: Option<(HeadKind, &Scores)>, examples: usize) -> Map<String, Value> {
    let loss = measured.nll / measured.counted as f64;
    let mut result = Map::new();
    let mut set = |key: &str, value: Value| result.insert(key.to_owned(), value);
    set("loss", json!(loss));
    // Other losses are no likelihoods of one thing.
    if head.is_none_or(|(kind, _)| matches!(kind, HeadKind::Classification | HeadKind::TokenClassification)) {
        set("perplexity", json!(loss.exp()));
    }
    set("tokens", json!(measured.counted));
    set("examples", json!(examples));
    match head {
        Some((_, scores)) => scores.all().into_iter().for_each(|(name, value)| drop(set(name, json!(value)))),
        None => {
            set("token_accuracy", json!(measured.hits as f64 / measured.counted as f64));
        }
    }
    result
}

/// What each of several adapters gives on the same rows.
fn side_by_side(args: &EvalArgs, model: &AnyModel, data: &Dataset, set: &AdapterSet) -> Result<()> {
    let kind = match model.task() {
        Task::Head { kind, .. } => kind,
        _ => HeadKind::default(),
    };
    let found = evaluate_each(model, data, set, args.batch_size, |_| {})?;
    let mut results = Vec::new();
    for (name, OfAdapter { measured, scores }) in set.names().zip(&found) {
        let (counted, hits) = (measured.counted, measured.hits);
        let loss = measured.nll / counted as f64;
        let line = match scores {
            Some(scores) => {
                let said = |(name, value)| format!("{name} {value:.4}");
                format!(
                    "{}, {counted} {}",
                    scores.all().into_iter().map(said).collect::<Vec<_>>().join(", "),
                    counted_of(kind)
                )
            }
            None => {
                let accuracy = hits as f64 / counted as f64;
                format!("perplexity {:.4}, token accuracy {:.2} %", loss.exp(), 100.0 * accuracy)
            }
        };
        if !args.json {
            out!("{name}: loss {loss:.6}, {line}");
        }
        let mut of_adapter = Map::from_iter([("adapter".into(), name.into())]);
        of_adapter.extend(result(measured, scores.as_ref().map(|scores| (kind, scores)), data.len()));
        results.push(of_adapter);
    }
    if args.json {
        out!("{}", json!({"results": results}));
    }
    Ok(())
}

/// What the loss of a head is a mean over.
fn counted_of(kind: HeadKind) -> &'static str {
    match kind {
        HeadKind::TokenClassification => "tokens",
        HeadKind::QuestionAnswering => "questions",
        _ => "rows",
    }
}

/// Loss and scores of a head of its own.
fn headed(args: &EvalArgs, model: &AnyModel, data: &Dataset, kind: HeadKind, ctx: &Ctx<'_>) -> Result<()> {
    let (measured, scores) = evaluate_head(model, data, ctx, args.batch_size, |_| {})?;
    if args.json {
        out!("{}", json!(result(&measured, Some((kind, &scores)), data.len())));
        return Ok(());
    }
    let loss = measured.nll / measured.counted as f64;
    out!("loss         {loss:.6}, mean over {} {}", measured.counted, counted_of(kind));
    for (name, value) in scores.all() {
        match name {
            "accuracy" | "exact_match" => out!("{name:<12} {:.2} %", 100.0 * value),
            _ => out!("{name:<12} {value:.4}"),
        }
    }
    Ok(())
}

/// For every row, which of the choices is the likeliest completion of its prompt.
fn choices(
    args: &EvalArgs,
    model: &Decoder,
    ctx: &Ctx<'_>,
    format: Option<Format>,
    tokenizer: Option<&dyn TextTokenizer>,
    options: &EncodeOptions,
) -> Result<()> {
    match format {
        None | Some(Format::Completion) => {}
        Some(other) => bail!("--choice goes with completion rows, not {}", other.name()),
    }
    let spec = DataSpec::from(args.data.as_path());
    let choices = Choices::load(&spec, Format::Completion, tokenizer, options, &args.choices)?;
    let measured = evaluate_choices(model, &choices, ctx, args.batch_size, |_| {})?;
    let (own, rows, right) = (measured.own, measured.rows, measured.right);
    let (accuracy, loss) = (measured.accuracy(), own.nll / own.counted.max(1) as f64);
    if args.json {
        let result = json!({
            "accuracy": accuracy, "f1": measured.f1(), "mcc": measured.mcc(), "loss": loss, "perplexity": loss.exp(), "tokens": own.counted,
            "examples": rows
        });
        out!("{result}");
    } else {
        out!("accuracy  {:.2} % ({right} of {rows})", 100.0 * accuracy);
        out!("loss      {loss:.6} on the rows' own completions");
    }
    Ok(())
}
