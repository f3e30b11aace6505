//! The step through this project's library.

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::DType;
use peft_core::{AdapterSet, BaseModel, ClassToken, Ctx, Parameter, Route, StepRng, Task};
use peft_models::ModelFiles;
use peft_models::source::Placement;
use peft_train::data::{Batch, IGNORE_INDEX, Predictor};
use peft_train::optim::{AdamW, AdamWConfig, OptParam, Optimizer};
use peft_train::{Checkpointing, Grads, forward_backward, methods};
use serde_json::{Value, json};

use crate::{LEARNING_RATE, SCALE, Settings, measure, random_tokens, start_a};

/// Loads `files` and trains `settings.steps` steps.
///
/// # Errors
/// When the model cannot be loaded or a step fails.
pub fn run(files: &ModelFiles, settings: &Settings) -> Result<(Vec<f64>, Value)> {
    let weights = if settings.stored { None } else { Some(DType::F32) };
    let model = files.load(&Placement::cpu(weights), 0)?;
    let keys = json!({
        "type": "lora",
        "r": settings.rank,
        "lora_alpha": SCALE * settings.rank as f64,
        "target_modules": "all-linear",
    });
    let adapter = methods::create(keys.as_object().context("a table")?, &model, 0)?.adapter;
    let parameters: Vec<Parameter> = adapter.parameters().into_iter().cloned().collect();
    for p in &parameters {
        let path = p.name().strip_prefix("base_model.model.").unwrap_or(p.name());
        if let Some(path) = path.strip_suffix(".lora_A.weight") {
            p.set(&start_a(path, settings.rank, p.value().dim(1)?)?)?;
        }
    }
    let lowest = adapter.lowest_segment(model.sites()).unwrap_or(0);
    let set = AdapterSet::one("default", Arc::new(adapter));
    let batch = packed(settings, files.config().vocab_size(), model.task());
    let counted = batch.targets().ids.len() as f64;
    let checkpointing = Checkpointing::KeepTop(settings.keep);
    let opt_params: Vec<OptParam> = parameters.iter().map(|p| OptParam::new(p.name(), p.var().clone())).collect();
    let mut optimizer = AdamW::new(AdamWConfig::default())?;
    let route = Route::Uniform(0);
    measure(settings, || {
        let ctx = Ctx::train(&set, &route, StepRng::default());
        let mut grads = Grads::new(&parameters.iter().collect::<Vec<_>>());
        let measured = forward_backward(&model, &batch, &ctx, lowest, checkpointing, 1.0 / counted, &mut grads)?;
        optimizer.step(&opt_params, &grads.into_vec(), LEARNING_RATE)?;
        Ok(measured.nll / counted)
    })
}

/// Every token but the first of each sequence counts; with a class head, sequence `i` is of class `i` modulo their number.
fn packed(settings: &Settings, vocab: usize, task: Task) -> Batch {
    let input_ids = random_tokens(settings.batch * settings.seq, vocab);
    let (labels, predictor) = match task {
        Task::CausalLm | Task::Seq2SeqLm => (input_ids.iter().map(|&id| id as i32).collect(), Predictor::Previous),
        Task::Head { outputs: classes, reads, .. } => {
            let last = settings.seq - 1;
            let counts = |t| match reads {
                ClassToken::First => t == 0,
                ClassToken::Last => t == last,
                ClassToken::Every => true,
            };
            let label = |row, t| if counts(t) { (row % classes) as i32 } else { IGNORE_INDEX };
            let rows = (0..settings.batch).flat_map(|row| (0..settings.seq).map(move |t| label(row, t)));
            (rows.collect(), Predictor::Own)
        }
    };
    Batch {
        labels,
        predictor,
        position_ids: (0..settings.batch).flat_map(|_| 0..settings.seq as u32).collect(),
        bounds: (0..=settings.batch).map(|i| i * settings.seq).collect(),
        rows: (0..settings.batch).collect(),
        input_ids,
        ..Batch::default()
    }
}
