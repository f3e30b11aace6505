#![allow(clippy::unwrap_used)]
use std::cell::Cell;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::FrozenWeight;
use peft_core::kernels::testing::randn;
use peft_core::{
    Adapter, BaseLayer, BaseModel, Parameter, PromptDims, SiteId, SiteTable, SublayerSite, Task, TokenBatch,
};
use peft_models::config::DecoderConfig;
use peft_models::source::{Placement, RandomSource};
use peft_models::{Decoder, DecoderInput};
use serde_json::json;

use super::*;
use crate::data::{Example, Location};

/// A decoder on a card that refuses memory: to some calls of a block, counted from 0, and to all with more tokens than it takes.
struct Card {
    model: Decoder,
    calls: AtomicUsize,
    refuses: Mutex<Vec<usize>>,
    most_tokens: usize,
    says: &'static str,
}

impl BaseModel for Card {
    fn sites(&self) -> &Arc<SiteTable> {
        self.model.sites()
    }
    fn layer(&self, site: SiteId) -> Result<BaseLayer<'_>> {
        self.model.layer(site)
    }
    fn model_type(&self) -> &str {
        self.model.model_type()
    }
    fn device(&self) -> &Device {
        self.model.device()
    }
    fn dtype(&self) -> DType {
        self.model.dtype()
    }
    fn tied_embedding(&self) -> Option<&str> {
        self.model.tied_embedding()
    }
    fn prompt_dims(&self) -> Option<PromptDims> {
        self.model.prompt_dims()
    }
    fn sublayers(&self) -> Vec<SublayerSite> {
        self.model.sublayers()
    }
    fn task(&self) -> Task {
        self.model.task()
    }
}

impl Segmented for Card {
    type Input = DecoderInput;

    fn prepare(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<DecoderInput> {
        self.model.prepare(batch, ctx)
    }
    fn embed(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        self.model.embed(batch, ctx)
    }
    fn num_blocks(&self) -> usize {
        self.model.num_blocks()
    }
    fn block(&self, i: usize, hidden: &Tensor, input: &DecoderInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        if hidden.dim(0)? > self.most_tokens || self.refuses.lock().unwrap().contains(&call) {
            return Err(Error::msg(self.says));
        }
        self.model.block(i, hidden, input, ctx)
    }
    fn final_norm(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        self.model.final_norm(hidden, ctx)
    }
    fn logits(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        self.model.logits(hidden, ctx)
    }
    fn plain_head(&self, ctx: &Ctx<'_>) -> Option<(&FrozenWeight, Option<f32>)> {
        self.model.plain_head(ctx)
    }
    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }
}

fn card(refuses: &[usize], most_tokens: usize) -> Card {
    let config = json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 31, "hidden_size": 12,
        "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 3, "hidden_act": "silu"});
    let config = DecoderConfig::from_hf_map(config.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
    let source = RandomSource { seed: 3, std: 0.4, untied_head: true, placement: Placement::cpu(None) };
    Card {
        model: Decoder::load(config, &source, &Placement::cpu(None)).unwrap(),
        calls: AtomicUsize::new(0),
        refuses: Mutex::new(refuses.to_vec()),
        most_tokens,
        // What candle makes of the driver's refusal.
        says: "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")",
    }
}

fn all(checkpointing: Checkpointing) -> Room {
    Room { keep: checkpointing.into(), rows: 5 }
}

/// Five rows of 3 to 7 tokens.
fn dataset() -> Dataset {
    let rows: Vec<Example> = (0..5usize)
        .map(|row| {
            let ids: Vec<u32> = (0..row + 3).map(|i| ((row * 11 + i * 7) % 31) as u32).collect();
            let labels = ids.iter().map(|&id| id as i32).collect();
            let source = Location::line(&Arc::from(Path::new("rows")), row as u64 + 1);
            let (predictor, head, truncation) = Default::default();
            Example {
                input_ids: ids,
                labels,
                types: Vec::new(),
                source_tokens: 0,
                task: None,
                predictor,
                head,
                source,
                truncation,
            }
        })
        .collect();
    Dataset::from_examples(&rows)
}

/// What a step finds on this card, beginning with `keep`: loss, gradients, and what it held in the end.
fn step(card: &Card, keep: Checkpointing) -> Result<(Measured, Vec<Vec<f32>>, Room)> {
    let table = json!({"type": "lora", "r": 2, "target_modules": ["q_proj", "down_proj"]});
    let adapter: Adapter = crate::methods::create(table.as_object().unwrap(), card, 0)?.adapter;
    for (i, p) in adapter.parameters().into_iter().enumerate() {
        p.set(&randn(i as u64, p.value().shape(), 0.3)?)?;
    }
    let adapter = Arc::new(adapter);
    let parameters: Vec<&Parameter> = adapter.parameters();
    let (set, dataset, mut grads) = (AdapterSet::one("a", adapter.clone()), dataset(), Grads::new(&parameters));
    let batch = Batch::new(&dataset, &[4, 1, 0, 2, 3]);
    let rng = StepRng { seed: 0, step: 0, run: 0 };
    let rows = Rows { batch: &batch, dataset: &dataset, scale: 0.1, of_prompt: &[], rng };
    let room = Cell::new(all(keep));
    let mut now = room.get();
    let measured = rows.pass(card, &set, 1, &mut now, &mut grads)?;
    room.set(now);
    let grads = grads.into_vec().into_iter().map(|g| g.unwrap().flatten_all()?.to_vec1());
    Ok((measured, grads.collect::<candle_core::Result<_>>()?, room.get()))
}

/// The length of the difference, as a share of the length.
fn apart(found: &[Vec<f32>], wanted: &[Vec<f32>]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let pairs = found.iter().flatten().zip(wanted.iter().flatten());
    length(&mut pairs.map(|(a, b)| f64::from(a - b))) / length(&mut wanted.iter().flatten().map(|&x| f64::from(x)))
}

#[test]
fn with_fewer_records_the_result_is_the_same_to_the_bit() {
    let (measured, grads, room) = step(&card(&[], usize::MAX), Checkpointing::Off).unwrap();
    assert_eq!(room, all(Checkpointing::Off));
    // Four blocks forward; then what is run again. Each of these calls is refused once, wherever the step is by then.
    for (refuses, kept) in [
        (&[2][..], Checkpointing::KeepTop(2)),
        (&[3, 6], Checkpointing::KeepTop(1)),
        // The second is in the backward pass, when the upper blocks' gradients have been added.
        (&[0, 6], Checkpointing::KeepTop(1)),
        (&[1, 3, 8], Checkpointing::Full),
    ] {
        let (again, same, room) = step(&card(refuses, usize::MAX), Checkpointing::Off).unwrap();
        assert_eq!((again.nll, again.counted), (measured.nll, measured.counted), "{refuses:?}");
        assert_eq!(same, grads, "{refuses:?}");
        assert_eq!(room, all(kept), "{refuses:?}");
    }
}

#[test]
fn in_parts_the_gradients_add_up() {
    let (measured, grads, _) = step(&card(&[], usize::MAX), Checkpointing::Off).unwrap();
    for (most, rows) in [(20, 3), (12, 2), (7, 1)] {
        let (again, same, room) = step(&card(&[], most), Checkpointing::Off).unwrap();
        assert_eq!(again.counted, measured.counted);
        assert!((again.nll - measured.nll).abs() < 1e-4, "{} {}", again.nll, measured.nll);
        assert!(apart(&same, &grads) < 1e-5, "{}", apart(&same, &grads));
        assert_eq!((room.keep.checkpointing, room.rows), (Checkpointing::Full, rows), "{most}");
        assert!(room.describe(4).contains("all blocks run again"));
    }
}

#[test]
fn where_one_row_is_too_much_the_error_says_what_to_change() {
    let message = step(&card(&[], 6), Checkpointing::Off).unwrap_err().to_string();
    assert!(message.contains("train.batch_size") && message.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{message}");
    let other = Card { says: "the card has fallen off the bus", ..card(&[2], usize::MAX) };
    let message = step(&other, Checkpointing::Off).unwrap_err().to_string();
    assert!(message.contains("off the bus") && !message.contains("batch_size"), "{message}");
}
