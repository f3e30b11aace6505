//! `peft-cli eval`: loss over a file of rows, or the accuracy of choosing among completions.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use peft_core::{AdapterSet, BaseModel, Ctx, Route, Segmented, Task};
use peft_models::{AnyModel, Decoder};
use peft_train::data::{Batch, DataSpec, Dataset, EncodeOptions, Encoder, Example, Format, Row, TextTokenizer};
use peft_train::{evaluate_classes, evaluate_dataset, methods, token_losses};
use serde_json::json;

use crate::args::EvalArgs;
use crate::open;

pub(crate) fn run(args: &EvalArgs) -> Result<()> {
    let mut files = open::model(&args.model.model)?;
    let adapter = args.adapter.as_deref().map(open::adapter).transpose()?;
    open::settle_classes(&mut files, &args.labels, adapter.as_deref())?;
    if adapter.is_none() && files.lacks_class_head() {
        bail!("{} has no class head: give --adapter with one that was trained", args.model.model);
    }
    let placement = open::placement(&args.model.device, &args.model.dtype)?;
    let model = files.load(&placement, 0)?;
    let (set, route) = match &adapter {
        None => (AdapterSet::empty(), Route::Base),
        Some(folder) => {
            let prepared = methods::open(folder, &model)?;
            (AdapterSet::one("adapter", Arc::new(prepared.adapter)), Route::Uniform(0))
        }
    };
    let ctx = Ctx::eval(&set, &route);
    let virtual_tokens = set.adapter(0).and_then(|a| a.virtual_tokens()).map_or(0, |tokens| tokens.count);
    peft_alloc::keep_pages();

    let format = args.format.as_deref().map(str::parse::<Format>).transpose()?;
    // Rows of tokens need no tokenizer, so a base without one will do.
    let tokenizer = match format {
        Some(Format::Tokens) => None,
        _ => Some(open::text_tokenizer(&files.tokenizer()?)?),
    };
    let tokenizer = tokenizer.as_ref().map(|t| t as &dyn TextTokenizer);
    let options = EncodeOptions {
        template: args.template.clone(),
        max_length: Some(open::max_length(&files, args.max_length, virtual_tokens)),
        vocab_size: Some(model.vocab_size()),
        class_head: open::class_head(&files),
        decoder: open::decoder_inputs(&files),
        ..EncodeOptions::new(format.unwrap_or(Format::Text))
    };
    if args.batch_size == 0 {
        bail!("--batch-size must be at least 1");
    }
    if !args.choices.is_empty() {
        let model = model.as_language_model().context("--choice")?;
        return choices(args, model, &ctx, format, tokenizer, options);
    }
    let (data, _) = Dataset::load(&DataSpec::from(args.data.as_path()), format, tokenizer, &options)?;
    if let Task::Classification { classes, .. } = model.task() {
        return classified(args, &model, &data, classes, &ctx);
    }
    let measured = evaluate_dataset(&model, &data, &ctx, args.batch_size, |_| {})?;
    let loss = measured.nll / measured.counted as f64;
    let accuracy = measured.hits as f64 / measured.counted as f64;
    if args.json {
        let result = json!({
            "loss": loss, "perplexity": loss.exp(), "tokens": measured.counted, "examples": data.len(),
            "token_accuracy": accuracy
        });
        out!("{result}");
    } else {
        out!("loss            {loss:.6}");
        out!("perplexity      {:.4}", loss.exp());
        out!("token accuracy  {:.2} %", 100.0 * accuracy);
        out!("tokens          {} counted, in {} examples", measured.counted, data.len());
    }
    Ok(())
}

/// Loss a row, accuracy and F1 of a class head.
fn classified(args: &EvalArgs, model: &AnyModel, data: &Dataset, classes: usize, ctx: &Ctx<'_>) -> Result<()> {
    let (measured, confusion) = evaluate_classes(model, data, classes, ctx, args.batch_size, |_| {})?;
    let loss = measured.nll / measured.counted as f64;
    let (accuracy, f1) = (confusion.accuracy(), confusion.macro_f1());
    if args.json {
        let result = json!({
            "loss": loss, "perplexity": loss.exp(), "tokens": measured.counted, "examples": data.len(),
            "accuracy": accuracy, "f1": f1
        });
        out!("{result}");
    } else {
        out!("loss      {loss:.6} a row");
        out!("accuracy  {:.2} % ({} of {} rows)", 100.0 * accuracy, measured.hits, measured.counted);
        out!("f1        {f1:.4}, mean over {classes} classes");
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
    options: EncodeOptions,
) -> Result<()> {
    match format {
        None | Some(Format::Completion) => {}
        Some(other) => bail!("--choice goes with completion rows, not {}", other.name()),
    }
    let options = EncodeOptions { format: Format::Completion, ..options };
    let encoder = Encoder::new(tokenizer, &options)?;
    // The end token is no part of a choice's text; but only with it can a choice be likelier than its own beginning.
    let with_end = args.choices.iter().any(|a| args.choices.iter().any(|b| a != b && b.starts_with(a.as_str())));
    let compared = |score: &Score| if with_end { score.nll } else { score.nll_of_text };
    let (mut right, mut rows, mut nll, mut tokens) = (0usize, 0usize, 0f64, 0usize);
    for file in peft_train::data::source::data_files(&args.data)? {
        let parsed = peft_train::data::source::read_rows(&file)?.collect::<Result<Vec<Row>, _>>()?;
        for row in parsed.chunks(args.batch_size) {
            let scored = score_rows(row, &args.choices, &encoder, model, ctx)?;
            for (row, scores) in row.iter().zip(scored) {
                let own = row.fields.get("completion").and_then(|v| v.as_str()).unwrap_or_default();
                let Some(own) = args.choices.iter().position(|c| c == own) else {
                    bail!("{}: its completion {own:?} is none of the choices {:?}", row.at, args.choices);
                };
                let ranked = scores.iter().map(compared).enumerate();
                let best = ranked.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(i, _)| i);
                right += usize::from(best == own);
                rows += 1;
                if let Some(score) = scores.get(own) {
                    nll += score.nll;
                    tokens += score.tokens;
                }
            }
        }
    }
    if rows == 0 {
        bail!("{}: has no rows", args.data.display());
    }
    let (accuracy, loss) = (right as f64 / rows as f64, nll / tokens.max(1) as f64);
    if args.json {
        let result = json!({
            "accuracy": accuracy, "loss": loss, "perplexity": loss.exp(), "tokens": tokens, "examples": rows
        });
        out!("{result}");
    } else {
        out!("accuracy  {:.2} % ({right} of {rows})", 100.0 * accuracy);
        out!("loss      {loss:.6} on the rows' own completions");
    }
    Ok(())
}

/// How likely a choice is.
struct Score {
    /// Sum of negative log-likelihoods, the end token included.
    nll: f64,
    /// The same without the end token.
    nll_of_text: f64,
    /// Tokens, the end token included.
    tokens: usize,
}

/// The score of each choice of each row.
fn score_rows(
    rows: &[Row],
    choices: &[String],
    encoder: &Encoder<'_>,
    model: &Decoder,
    ctx: &Ctx<'_>,
) -> Result<Vec<Vec<Score>>> {
    let mut examples: Vec<Example> = Vec::with_capacity(rows.len() * choices.len());
    for row in rows {
        for choice in choices {
            let mut row = row.clone();
            row.fields.insert("completion".into(), choice.clone().into());
            examples.push(encoder.encode(&row)?);
        }
    }
    let data = Dataset::from_examples(&examples);
    let all: Vec<usize> = (0..data.len()).collect();
    let batch = Batch::new(&data, &all);
    let losses = token_losses(model, &batch, ctx)?;
    let positions = batch.targets().positions;
    let mut scored = Vec::with_capacity(rows.len());
    let mut next = 0;
    for (i, end) in batch.bounds.iter().skip(1).enumerate() {
        let upto = positions.partition_point(|&p| (p as usize) < *end);
        let own = losses.get(next..upto).context("losses do not line up with the batch")?;
        next = upto;
        let sum = |losses: &[f32]| losses.iter().map(|&x| f64::from(x)).sum::<f64>();
        // Completion rows are closed with the end token.
        let text = own.get(..own.len().saturating_sub(1)).unwrap_or_default();
        let score = Score { nll: sum(own), nll_of_text: sum(text), tokens: own.len() };
        if i % choices.len() == 0 {
            scored.push(Vec::with_capacity(choices.len()));
        }
        if let Some(row) = scored.last_mut() {
            row.push(score);
        }
    }
    Ok(scored)
}
