//! A tiny random Llama over several kinds of weight storage, and what is done with it in all tests.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use peft_core::kernels::FrozenWeight;
use peft_core::kernels::testing::randn;
use peft_core::{Adapter, AdapterSet, ByTask, Ctx, Result, Route, Segmented, TokenBatch, first_pass};
use peft_models::Decoder;
use peft_models::config::DecoderConfig;
use peft_models::merge::Merged;
use peft_models::source::{Placement, WeightSource};
use peft_train::data::batch::Batch;
use serde_json::{Value, json};

/// How the base keeps its matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    Bf16,
    Q8,
}

pub(crate) const KINDS: [Kind; 3] = [Kind::F32, Kind::Bf16, Kind::Q8];

/// What varies between the models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Shape {
    pub(crate) tied: bool,
    pub(crate) attention_bias: bool,
    /// To how many of four experts each token goes, where mixtures stand in the place of MLPs.
    pub(crate) experts: usize,
}

/// Random weights as a function of their names, or given ones.
#[derive(Debug)]
struct Weights {
    kind: Kind,
    given: HashMap<String, Tensor>,
}

impl Weights {
    fn get(&self, name: &str, shape: Vec<usize>) -> Result<Tensor> {
        if let Some(t) = self.given.get(name) {
            assert_eq!(t.dims(), shape, "{name}");
            return Ok(t.clone());
        }
        assert!(self.given.is_empty(), "a merged model has no `{name}`");
        Ok(match shape.as_slice() {
            [_, inp] => randn(hash(name), shape.clone(), 1.0 / (*inp as f32).sqrt())?,
            _ if name.ends_with("norm.weight") => (randn(hash(name), shape, 0.2)? + 1.0)?,
            _ => randn(hash(name), shape, 0.2)?,
        })
    }
}

pub(crate) fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

impl WeightSource for Weights {
    fn contains(&self, name: &str) -> bool {
        self.given.is_empty() || self.given.contains_key(name)
    }

    fn weight(&self, name: &str, (out, inp): (usize, usize)) -> Result<FrozenWeight> {
        let w = self.get(name, vec![out, inp])?;
        Ok(match self.kind {
            Kind::F32 => FrozenWeight::dense(&w)?,
            Kind::Bf16 => FrozenWeight::dense(&w.to_dtype(DType::BF16)?)?,
            Kind::Q8 => FrozenWeight::gguf(Arc::new(QTensor::quantize(&w, GgmlDType::Q8_0)?))?,
        })
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        self.get(name, vec![len])
    }

    fn describe(&self) -> String {
        format!("{:?}", self.kind)
    }
}

pub(crate) fn config(shape: Shape) -> DecoderConfig {
    let Value::Object(mut map) = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 48, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": shape.tied, "attention_bias": shape.attention_bias
    }) else {
        unreachable!()
    };
    if shape.experts > 0 {
        map.insert("model_type".into(), "qwen3_moe".into());
        map.insert("moe_intermediate_size".into(), 32.into());
        map.insert("num_experts".into(), 4.into());
        map.insert("num_experts_per_tok".into(), shape.experts.into());
    }
    DecoderConfig::from_hf_map(map, Path::new("config.json")).unwrap()
}

pub(crate) fn base(shape: Shape, kind: Kind) -> Decoder {
    Decoder::load(config(shape), &Weights { kind, given: HashMap::new() }, &Placement::cpu(None)).unwrap()
}

/// A new model of the weights that `base` and `adapter` make together.
pub(crate) fn merged(base: &Decoder, adapter: &Arc<Adapter>) -> Result<Decoder> {
    let merged = Merged::new(base, vec![adapter.clone()])?;
    let given = merged.tensors().into_iter().map(|(name, _)| Ok((name.clone(), merged.tensor(&name)?)));
    let given = given.collect::<Result<HashMap<_, _>>>()?;
    let mut config = base.config().clone();
    config.tie_word_embeddings = merged.tied();
    Decoder::load(config, &Weights { kind: Kind::F32, given }, &Placement::cpu(None))
}

const LENGTHS: [usize; 5] = [5, 3, 7, 2, 4];

/// Five sequences of three tasks; tokens 3 and 7 are among them, 40 is not. The first two labels do not count.
pub(crate) fn batch() -> Batch {
    let mut batch = Batch { bounds: vec![0], ..Batch::default() };
    for (row, &n) in LENGTHS.iter().enumerate() {
        for i in 0..n {
            batch.input_ids.push(((row * 11 + i * 4 + 3) % 37) as u32);
            batch.position_ids.push(i as u32);
        }
        batch.bounds.push(batch.input_ids.len());
        batch.rows.push(row);
        batch.tasks.push(row % 3);
    }
    batch.input_ids[6] = 7;
    batch.labels = batch.input_ids.iter().map(|&id| id as i32).collect();
    batch.labels[..2].fill(-100);
    batch
}

/// One sequence of a batch, as a batch.
pub(crate) fn sequence(batch: &Batch, i: usize) -> Batch {
    let span = batch.bounds[i]..batch.bounds[i + 1];
    Batch {
        input_ids: batch.input_ids[span.clone()].to_vec(),
        position_ids: batch.position_ids[span.clone()].to_vec(),
        bounds: vec![0, span.len()],
        labels: batch.labels[span].to_vec(),
        rows: vec![i],
        tasks: batch.tasks.get(i).copied().into_iter().collect(),
        ..Batch::default()
    }
}

/// Logits `[tokens, vocab]` of a batch, without those of virtual tokens.
pub(crate) fn logits(model: &Decoder, batch: &Batch, ctx: &Ctx<'_>) -> Result<Tensor> {
    let tokens =
        TokenBatch { ids: &batch.input_ids, positions: &batch.position_ids, bounds: &batch.bounds, types: &[] };
    let first = first_pass(model, tokens, ctx)?;
    let ctx = &Ctx { first: first.as_ref(), ..*ctx };
    let by_task = ByTask::of(&batch.bounds, &batch.tasks, ctx)?;
    let ctx = &by_task.as_ref().map_or(*ctx, |by_task| by_task.ctx(ctx));
    let input = model.prepare(tokens, ctx)?;
    let mut hidden = model.embed(tokens, ctx)?;
    for i in 0..model.num_blocks() {
        hidden = model.block(i, &hidden, &input, ctx)?;
    }
    let hidden = hidden.narrow(0, 0, batch.input_ids.len())?.contiguous()?;
    model.logits(&model.final_norm(&hidden, ctx)?, ctx)
}

/// Logits of [`batch`] through one adapter, or none.
pub(crate) fn eval(model: &Decoder, adapter: Option<&Arc<Adapter>>) -> Result<Tensor> {
    match adapter {
        None => logits(model, &batch(), &Ctx::eval(&AdapterSet::empty(), &Route::Base)),
        Some(a) => logits(model, &batch(), &Ctx::eval(&AdapterSet::one("a", a.clone()), &Route::Uniform(0))),
    }
}

/// What an adapter is for one task, where it depends on the task.
pub(crate) fn one_task(adapter: Arc<Adapter>) -> Result<Arc<Adapter>> {
    Ok(if adapter.tasks().is_some() { Arc::new(adapter.for_task(1)?) } else { adapter })
}

/// Moves every parameter, as training would.
pub(crate) fn trained(adapter: Adapter, seed: u64) -> Result<Arc<Adapter>> {
    for p in adapter.parameters() {
        let noise = randn(hash(p.name()) ^ seed, p.value().shape(), 0.1)?.to_device(&Device::Cpu)?;
        p.set(&(p.value() + noise)?)?;
    }
    Ok(Arc::new(adapter))
}
