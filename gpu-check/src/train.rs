//! Ten LoRA steps of a small random Llama on a device beside the CPU.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use peft_core::{AdapterSet, BaseModel, Ctx, Parameter, Route, StepRng};
use peft_kernels::Stream;
use peft_models::Decoder;
use peft_models::config::DecoderConfig;
use peft_models::source::{Placement, RandomSource};
use peft_train::data::Batch;
use peft_train::optim::{AdamW, AdamWConfig, OptParam, Optimizer};
use peft_train::{Checkpointing, Grads, forward_backward, methods};
use serde_json::json;

use crate::measure::{Place, Verdict};

const STEPS: u32 = 10;
const LEARNING_RATE: f64 = 5e-3;
const VOCAB: usize = 67;

/// Trains at `place` and on the CPU with `f32` activations, on weights of `place`'s type, and prints both losses.
pub(crate) fn check(place: &Place) -> Verdict {
    let name = format!("{} training", place.dtype.as_str());
    // The largest relative difference of a loss.
    let limit = match place.dtype {
        DType::BF16 => 2e-2,
        DType::F16 => 3e-3,
        _ => 1e-4,
    };
    println!("training, {STEPS} steps of LoRA r=8:  loss on the device, on the CPU");
    match run(place) {
        Ok((ours, cpu, ms)) => {
            for (step, (a, b)) in ours.iter().zip(&cpu).enumerate() {
                println!("  step {:>2}  {a:.5}  {b:.5}", step + 1);
            }
            let error = ours.iter().zip(&cpu).map(|(a, b)| ((a - b) / b).abs());
            let error = error.fold(0.0, |w: f64, e| if e.is_finite() { w.max(e) } else { f64::INFINITY });
            let learns = ours.last() < ours.first();
            let good = error <= limit && learns && ours.len() == cpu.len();
            let why = if learns { "" } else { " (the loss does not fall)" };
            let verdict = if good { "ok" } else { "BAD" };
            println!(
                "training: worst relative difference {error:.1e}, limit {limit:.0e} {verdict}{why}; {ms:.1} ms a step"
            );
            Verdict { name, good }
        }
        Err(e) => {
            println!("training: BAD  {}", format!("{e:#}").lines().next().unwrap_or_default());
            Verdict { name, good: false }
        }
    }
}

fn run(place: &Place) -> Result<(Vec<f64>, Vec<f64>, f64)> {
    let at = |device: &Device, activations| Placement {
        device: device.clone(),
        activations,
        weights: Some(place.dtype),
        narrow_products: false,
    };
    let (ours, ms) = train(at(&place.device, place.dtype))?;
    let (cpu, _) = train(at(&Device::Cpu, DType::F32))?;
    Ok((ours, cpu, ms))
}

/// The losses of the steps, and the milliseconds of one after the first.
fn train(placement: Placement) -> Result<(Vec<f64>, f64)> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "bos_token_id": 0,
        "eos_token_id": 1, "tie_word_embeddings": false,
    });
    let config = DecoderConfig::from_hf_map(config.as_object().context("a table")?.clone(), Path::new("config.json"))?;
    let device = placement.device.clone();
    let source = RandomSource { seed: 7, std: 0.1, untied_head: true, placement: placement.clone() };
    let model = Decoder::load(config, &source, &placement)?;
    let method = json!({"type": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"});
    let adapter = methods::create(method.as_object().context("a table")?, &model, 3)?.adapter;
    let parameters: Vec<Parameter> = adapter.parameters().into_iter().cloned().collect();
    let opt_params: Vec<OptParam> = parameters.iter().map(|p| OptParam::new(p.name(), p.var().clone())).collect();
    let lowest = adapter.lowest_segment(model.sites()).unwrap_or(0);
    let set = AdapterSet::one("default", Arc::new(adapter));
    let (batch, route) = (batch(), Route::Uniform(0));
    let counted = batch.targets().ids.len() as f64;
    let mut optimizer = AdamW::new(AdamWConfig::default())?;
    let mut losses = Vec::new();
    let mut started = Instant::now();
    for step in 0..STEPS {
        if step == 1 {
            device.synchronize()?;
            started = Instant::now();
        }
        let rng = StepRng { seed: 1, step, run: 0 };
        let ctx = Ctx::train(&set, &route, rng);
        let mut grads = Grads::new(&parameters.iter().collect::<Vec<_>>());
        // One block keeps its graph and one is recomputed.
        let kept = Checkpointing::KeepTop(1);
        let measured = forward_backward(&model, &batch, &ctx, lowest, kept, 1.0 / counted, &mut grads)?;
        optimizer.step(&opt_params, &grads.into_vec(), LEARNING_RATE)?;
        losses.push(measured.nll / counted);
    }
    device.synchronize()?;
    Ok((losses, started.elapsed().as_secs_f64() * 1e3 / f64::from(STEPS - 1)))
}

/// Three sequences of odd lengths.
fn batch() -> Batch {
    let mut batch = Batch { bounds: vec![0], ..Batch::default() };
    let random = Stream { seed: 11, step: 0, site: 0 };
    for (row, length) in [17u32, 5, 26].into_iter().enumerate() {
        for i in 0..length {
            let id = random.word(batch.input_ids.len() as u64) % VOCAB as u32;
            batch.input_ids.push(id);
            batch.labels.push(if i < 2 { -100 } else { id as i32 });
            batch.position_ids.push(i);
        }
        batch.bounds.push(batch.input_ids.len());
        batch.rows.push(row);
    }
    batch
}
