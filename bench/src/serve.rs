//! Serving: what many adapters in one batch cost beside one, and what it takes to switch and to load.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use candle_core::Tensor;
use peft_core::kernels::{Stream, on_pool};
use peft_core::{Adapter, BaseModel};
use peft_models::source::Placement;
use peft_models::{Decoder, ModelFiles};
use peft_serve::{Engine, EngineOptions, Generation, Registry, Request};
use peft_train::checkpoint::write_adapter_files;
use peft_train::methods;
use serde_json::{Value, json};

/// Rows of the batches that are compared.
const ROWS: usize = 8;
/// Tokens of each prompt.
const PROMPT: usize = 8;

/// Measures everything `rounds` times in turn, after once that does not count. Weights stay as they lie in the file.
///
/// # Errors
/// When the model cannot be loaded or a request fails.
pub fn run(model: &Path, new_tokens: usize, rounds: usize) -> Result<Value> {
    let files = ModelFiles::open(model)?;
    let model = Arc::new(on_pool(|| files.load_decoder(&Placement::cpu(None), 0))?);
    let dir = tempfile::tempdir()?;
    let lora = |r: usize| json!({"type": "lora", "r": r, "target_modules": "all-linear"});
    let opener = model.clone();
    let registry = Registry::new(move |folder: &Path| Ok(methods::open(folder, &*opener)?.adapter), None);
    let mut same = Vec::new();
    for i in 0..ROWS {
        let (name, folder) = (format!("lora{i}"), dir.path().join(format!("lora{i}")));
        write_adapter_files(&folder, &on_pool(|| adapter(&lora(16), &model, i as u64))?)?;
        same.push(registry.load(&name, &folder)?);
    }
    let mut mixed = Vec::new();
    for (i, method) in kinds().iter().enumerate() {
        let made = on_pool(|| adapter(method, &model, 100 + i as u64)).with_context(|| method.to_string())?;
        mixed.push(Arc::new(Generation::of("mixed", Arc::new(made))?));
    }
    let options = EngineOptions { max_rows: ROWS, ..EngineOptions::default() };
    let engine = Engine::start(model.clone(), None, options)?;
    let vocabulary = peft_core::Segmented::vocab_size(&*model);
    let seconds = |adapters: [Option<&Arc<Generation>>; ROWS]| -> Result<f64> {
        let began = Instant::now();
        let answers = adapters.iter().enumerate().map(|(i, adapter)| {
            let prompt = (0..PROMPT).map(|t| ((i * 7919 + t * 104_729 + 11) % vocabulary) as u32).collect();
            engine.submit(Request { adapter: adapter.cloned(), ..Request::new(prompt, new_tokens) })
        });
        for answer in answers.collect::<Result<Vec<_>, _>>()? {
            answer.complete_blocking().map_err(|e| anyhow!(e))?;
        }
        Ok(began.elapsed().as_secs_f64())
    };
    let batches: [(&str, [Option<&Arc<Generation>>; ROWS]); 4] = [
        ("base", [None; ROWS]),
        ("one", std::array::from_fn(|_| same.first())),
        ("eight", std::array::from_fn(|i| same.get(i))),
        ("mixed", std::array::from_fn(|i| mixed.get(i))),
    ];
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); batches.len()];
    for round in 0..=rounds {
        for ((_, adapters), times) in batches.iter().zip(&mut times) {
            let took = seconds(*adapters)?;
            if round > 0 {
                times.push(took);
            }
        }
    }
    let [base, one, eight, mixed] = [0, 1, 2, 3].map(|i| times.get(i).cloned().unwrap_or_default());
    let tokens = (ROWS * new_tokens) as f64;
    let ratio = |a: &[f64], b: &[f64]| median(a.iter().zip(b).map(|(a, b)| a / b).collect());
    let (switch, load, bytes) = switching(&registry, &model, dir.path(), rounds)?;
    Ok(json!({
        "rows": ROWS,
        "base_tokens_per_second": tokens / median(base.clone()),
        "one_adapter_tokens_per_second": tokens / median(one.clone()),
        "eight_adapters_beside_one": ratio(&one, &eight),
        "eight_methods_beside_one": ratio(&one, &mixed),
        "one_adapter_beside_base": ratio(&base, &one),
        "switch_microseconds": switch * 1e6,
        "load_milliseconds": load * 1e3,
        "load_bytes": bytes,
    }))
}

/// Methods and ranks of the mixed batch.
fn kinds() -> [Value; ROWS] {
    let lora = |r: usize| json!({"type": "lora", "r": r, "target_modules": "all-linear"});
    [
        lora(4),
        lora(64),
        lora(128),
        json!({"type": "lora", "r": 16, "target_modules": "all-linear", "use_dora": true}),
        json!({"type": "ia3"}),
        json!({"type": "vera", "r": 64}),
        json!({"type": "bottleneck", "preset": "seq_bn"}),
        json!({"type": "prefix", "num_virtual_tokens": 16}),
    ]
}

/// Seconds to lease another adapter that is in memory, seconds to open one whose files are in the page cache, and its bytes.
fn switching(registry: &Registry, model: &Arc<Decoder>, dir: &Path, rounds: usize) -> Result<(f64, f64, u64)> {
    let (mut switches, mut loads, mut bytes) = (Vec::new(), Vec::new(), 0);
    for _ in 0..rounds.max(1) {
        let began = Instant::now();
        const TIMES: usize = 1000;
        for i in 0..TIMES {
            std::hint::black_box(registry.lease(["lora0", "lora1", "lora2"][i % 3])?);
        }
        switches.push(began.elapsed().as_secs_f64() / TIMES as f64);
        let opener = model.clone();
        let fresh = Registry::new(move |folder: &Path| Ok(methods::open(folder, &*opener)?.adapter), None);
        let began = Instant::now();
        bytes = fresh.load("lora", &dir.join("lora3"))?.bytes();
        loads.push(began.elapsed().as_secs_f64());
    }
    Ok((median(switches), median(loads), bytes))
}

/// An adapter whose parameters are not where they start.
fn adapter(method: &Value, model: &Decoder, seed: u64) -> Result<Adapter> {
    let table = method.as_object().context("a method is a table")?;
    let adapter = methods::create(table, model, seed)?.adapter;
    for (site, p) in adapter.parameters().into_iter().enumerate() {
        let stream = Stream { seed, step: 0, site: site as u32 };
        let values: Vec<f32> = (0..p.elem_count()).map(|i| 0.02 * (stream.uniform(i as u64) - 0.5)).collect();
        let noise = Tensor::from_vec(values, p.value().shape(), model.device())?;
        p.set(&(p.value() + noise.to_dtype(p.value().dtype())?)?)?;
    }
    Ok(adapter)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
