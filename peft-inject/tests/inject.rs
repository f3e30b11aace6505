//! A Llama of candle-transformers with adapters injected, beside our own decoder with the same adapters unmerged.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaConfig};
use peft_core::kernels::testing::randn;
use peft_core::{Adapter, AdapterSet, Ctx, Route, Segmented, TokenBatch};
use peft_inject::{Base, Injected, inject};
use peft_models::source::Placement;
use peft_models::{Decoder, ModelFiles};
use peft_train::checkpoint::write_adapter_files;
use peft_train::methods;
use serde_json::{Value, json};

const IDS: [u32; 7] = [5, 900, 33, 7, 1200, 64, 2000];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart/base")
}

fn ours() -> Decoder {
    ModelFiles::open(&folder()).unwrap().load_decoder(&Placement::cpu(Some(DType::F32)), 0).unwrap()
}

/// An adapter whose parameters have been moved, as training would.
fn trained(method: &Value, model: &Decoder, seed: u64) -> Adapter {
    let adapter = methods::create(method.as_object().unwrap(), model, seed).unwrap().adapter;
    for (i, p) in adapter.parameters().into_iter().enumerate() {
        let noise: Tensor = randn(seed * 1000 + i as u64, p.value().shape(), 0.05).unwrap();
        p.set(&(p.value() + noise).unwrap()).unwrap();
    }
    adapter
}

/// What our decoder says after the last token, the adapter unmerged.
fn expected(model: &Decoder, adapter: Option<Arc<Adapter>>) -> Vec<f32> {
    let route = if adapter.is_some() { Route::Uniform(0) } else { Route::Base };
    let set = adapter.map_or_else(AdapterSet::empty, |a| AdapterSet::one("a", a));
    let ctx = Ctx::eval(&set, &route);
    let positions: Vec<u32> = (0..IDS.len() as u32).collect();
    let batch = TokenBatch { ids: &IDS, positions: &positions, bounds: &[0, IDS.len()], types: &[] };
    let input = model.prepare(batch, &ctx).unwrap();
    let embedded = model.embed(batch, &ctx).unwrap();
    let hidden = (0..model.num_blocks()).fold(embedded, |h, i| model.block(i, &h, &input, &ctx).unwrap());
    let last = model.final_norm(&hidden.narrow(0, IDS.len() - 1, 1).unwrap(), &ctx).unwrap();
    model.logits(&last, &ctx).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn config() -> Config {
    let text = std::fs::read_to_string(folder().join("config.json")).unwrap();
    serde_json::from_str::<LlamaConfig>(&text).unwrap().into_config(false)
}

fn said(model: &Llama) -> candle_core::Result<Tensor> {
    let ids = Tensor::new(&IDS, &Device::Cpu)?.unsqueeze(0)?;
    model.forward(&ids, 0, &mut Cache::new(false, DType::F32, &config(), &Device::Cpu)?)
}

fn logits(model: &Llama) -> Vec<f32> {
    said(model).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn built(base: &Arc<Base>, adapters: Vec<Arc<Adapter>>) -> peft_core::Result<(Llama, Injected)> {
    inject(base, adapters, DType::F32, &Device::Cpu, |vb| Llama::load(vb, &config()))
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn mergeable() -> Vec<(&'static str, Value)> {
    vec![
        ("lora", json!({"type": "lora", "r": 4, "target_modules": "all-linear"})),
        ("dora", json!({"type": "lora", "r": 4, "target_modules": ["q_proj", "up_proj"], "use_dora": true})),
        ("saved", json!({"type": "lora", "r": 4, "target_modules": ["k_proj"], "modules_to_save": ["norm"]})),
        ("ia3", json!({"type": "ia3"})),
        ("oft", json!({"type": "oft", "oft_block_size": 8, "target_modules": ["q_proj"]})),
        ("lokr", json!({"type": "lokr", "r": 2, "target_modules": ["v_proj", "down_proj"]})),
        ("ln", json!({"type": "ln"})),
        ("layers", json!({"type": "last_layers", "num_layers": 1})),
    ]
}

/// An adapter's folder, opened on the checkpoint alone.
fn opened(dir: &Path, name: &str, adapter: &Adapter, base: &Base) -> Arc<Adapter> {
    let folder = dir.join(name);
    write_adapter_files(&folder, adapter).unwrap();
    Arc::new(methods::open(&folder, base).unwrap().adapter)
}

#[test]
fn every_mergeable_method_says_what_our_decoder_says() {
    let (decoder, base) = (ours(), Arc::new(Base::open(folder()).unwrap()));
    let dir = tempfile::tempdir().unwrap();
    let plain = expected(&decoder, None);
    assert!(furthest(&plain, &logits(&built(&base, Vec::new()).unwrap().0)) < 1e-4);
    for (seed, (name, method)) in mergeable().into_iter().enumerate() {
        let adapter = trained(&method, &decoder, seed as u64);
        let injected = built(&base, vec![opened(dir.path(), name, &adapter, &base)]).unwrap().0;
        let (expected, actual) = (expected(&decoder, Some(Arc::new(adapter))), logits(&injected));
        assert!(furthest(&expected, &plain) > 1e-2, "{name} does nothing");
        assert!(furthest(&expected, &actual) < 2e-4, "{name}: {}", furthest(&expected, &actual));
    }
}

#[test]
fn a_swapped_model_is_a_model_built_anew_to_the_bit() {
    let (decoder, base) = (ours(), Arc::new(Base::open(folder()).unwrap()));
    let dir = tempfile::tempdir().unwrap();
    let adapters: Vec<_> = mergeable()
        .into_iter()
        .enumerate()
        .map(|(seed, (name, method))| opened(dir.path(), name, &trained(&method, &decoder, seed as u64), &base))
        .collect();
    let (model, mut injected) = built(&base, vec![adapters[0].clone()]).unwrap();
    let early = injected.swap(vec![adapters[1].clone()]).unwrap_err().to_string();
    assert!(early.contains("call `probe` first"), "{early}");
    let first = logits(&model);
    assert_eq!(injected.probe(|| said(&model)).unwrap(), Vec::<String>::new());
    assert_eq!(logits(&model), first, "the probe leaves the tensors as they were");
    for adapter in adapters.iter().rev() {
        injected.swap(vec![adapter.clone()]).unwrap();
        assert_eq!(logits(&model), logits(&built(&base, vec![adapter.clone()]).unwrap().0));
    }
    injected.swap(adapters[..2].to_vec()).unwrap();
    assert_eq!(logits(&model), logits(&built(&base, adapters[..2].to_vec()).unwrap().0));
    injected.swap(Vec::new()).unwrap();
    assert_eq!(logits(&model), logits(&built(&base, Vec::new()).unwrap().0));
}

#[test]
fn a_swap_that_fails_leaves_the_model_as_it_was() {
    let (decoder, base) = (ours(), Arc::new(Base::open(folder()).unwrap()));
    let dir = tempfile::tempdir().unwrap();
    let lora = json!({"type": "lora", "r": 4, "target_modules": ["q_proj", "down_proj"]});
    let good = opened(dir.path(), "good", &trained(&lora, &decoder, 1), &base);
    let (model, mut injected) = built(&base, vec![good]).unwrap();
    injected.probe(|| said(&model)).unwrap();
    let before = logits(&model);
    // Each factor is finite and so are the files; the product of the last layer is not.
    let far = trained(&lora, &decoder, 2);
    for p in far.parameters().into_iter().filter(|p| p.name().contains("layers.3") && p.name().contains("down_proj")) {
        p.set(&p.value().affine(0.0, 1e25).unwrap()).unwrap();
    }
    let far = opened(dir.path(), "far", &far, &base);
    let message = injected.swap(vec![far]).unwrap_err().to_string();
    assert!(message.contains("down_proj"), "{message}");
    assert_eq!(logits(&model), before);
}

/// A model that stacks what it was given, as many do with queries, keys and values.
struct Stacked(Tensor);

#[test]
fn a_copy_is_found_out_and_refused() {
    let (decoder, base) = (ours(), Arc::new(Base::open(folder()).unwrap()));
    let dir = tempfile::tempdir().unwrap();
    let build = |vb: candle_nn::VarBuilder<'_>| {
        let vb = vb.pp("model.layers.0.self_attn");
        let (q, k) = (vb.get((256, 256), "q_proj.weight")?, vb.get((128, 256), "k_proj.weight")?);
        Ok((Stacked(Tensor::cat(&[&q], 0)?.copy()?), k))
    };
    let ((q, k), mut injected) = inject(&base, Vec::new(), DType::F32, &Device::Cpu, build).unwrap();
    let copied = injected.probe(|| q.0.sum_all()? + k.sum_all()?).unwrap();
    assert_eq!(copied, ["model.layers.0.self_attn.q_proj.weight"]);
    let method = |site: &str| {
        let pattern = format!(r"model\.layers\.0\.self_attn\.{site}");
        trained(&json!({"type": "lora", "r": 4, "target_modules": pattern}), &decoder, 1)
    };
    injected.swap(vec![opened(dir.path(), "k", &method("k_proj"), &base)]).unwrap();
    let message = injected.swap(vec![opened(dir.path(), "q", &method("q_proj"), &base)]).unwrap_err().to_string();
    assert!(message.contains("q_proj") && message.contains("copy"), "{message}");
    let message = injected.swap(vec![opened(dir.path(), "v", &method("v_proj"), &base)]).unwrap_err().to_string();
    assert!(message.contains("v_proj.weight") && message.contains("never asked"), "{message}");
}

#[test]
fn what_no_weight_can_hold_is_refused() {
    let (decoder, base) = (ours(), Arc::new(Base::open(folder()).unwrap()));
    let dir = tempfile::tempdir().unwrap();
    let refused = |name: &str, method: Value| {
        let folder = dir.path().join(name);
        write_adapter_files(&folder, &trained(&method, &decoder, 1)).unwrap();
        let adapter = methods::open(&folder, &*base).map(|made| Arc::new(made.adapter));
        adapter.and_then(|adapter| Ok(built(&base, vec![adapter])?.0)).err().map(|e| e.to_string()).unwrap()
    };
    let prefix = refused("prefix", json!({"type": "prefix", "num_virtual_tokens": 3}));
    assert!(prefix.contains("virtual tokens"), "{prefix}");
    let bottleneck = refused("bottleneck", json!({"type": "bottleneck", "preset": "seq_bn"}));
    assert!(bottleneck.contains("bottleneck adapters"), "{bottleneck}");
    let tied = refused("tied", json!({"type": "lora", "r": 2, "target_modules": ["embed_tokens", "q_proj"]}));
    assert!(tied.contains("model.embed_tokens") && tied.contains("output head"), "{tied}");
}

/// GPT-2's `Conv1D` has `[in, out]`, and a bare model's file lacks the prefix that adapters know.
#[test]
fn conv1d_and_names_below_a_prefix() {
    let dir = tempfile::tempdir().unwrap();
    let stored = randn(1, (4, 12), 1.0).unwrap();
    std::fs::write(dir.path().join("config.json"), r#"{"model_type": "gpt2"}"#).unwrap();
    let path = dir.path().join("model.safetensors");
    peft_core::write_safetensors(path, [("h.0.attn.c_attn.weight", &stored)], &Default::default()).unwrap();
    let base = Arc::new(Base::open_below(dir.path(), "transformer").unwrap());

    let table = json!({"type": "lora", "r": 2, "lora_alpha": 6, "target_modules": ["c_attn"]});
    let adapter = methods::create(table.as_object().unwrap(), &*base, 0).unwrap().adapter;
    let factor = |which: &str| {
        let name = format!("base_model.model.transformer.h.0.attn.c_attn.lora_{which}.weight");
        let p = *adapter.parameters().iter().find(|p| p.name() == name).unwrap();
        p.set(&randn(which.len() as u64 + 2, p.value().shape(), 1.0).unwrap()).unwrap();
        p.value()
    };
    let delta = (factor("B").matmul(&factor("A")).unwrap() * 3.0).unwrap();
    let expected = (stored + delta.t().unwrap()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let build = |vb: candle_nn::VarBuilder<'_>| vb.get((4, 12), "h.0.attn.c_attn.weight");
    let (weight, _) = inject(&base, vec![Arc::new(adapter)], DType::F32, &Device::Cpu, build).unwrap();
    assert!(furthest(&weight.flatten_all().unwrap().to_vec1::<f32>().unwrap(), &expected) < 1e-5);

    let wrong = |vb: candle_nn::VarBuilder<'_>| vb.get((12, 4), "h.0.attn.c_attn.weight");
    let message = inject(&base, Vec::new(), DType::F32, &Device::Cpu, wrong).unwrap_err().to_string();
    assert!(message.contains("h.0.attn.c_attn.weight") && message.contains("[4, 12]"), "{message}");
    let absent = |vb: candle_nn::VarBuilder<'_>| vb.get((4, 12), "h.0.attn.c_atn.weight");
    let message = inject(&base, Vec::new(), DType::F32, &Device::Cpu, absent).unwrap_err().to_string();
    assert!(message.contains("c_atn") && message.contains("h.0.attn.c_attn.weight"), "{message}");
}

#[test]
fn a_probe_wants_the_same_answer_twice() {
    let base = Arc::new(Base::open(folder()).unwrap());
    let (_, mut injected) = built(&base, Vec::new()).unwrap();
    let mut calls = 0.0f32;
    let message = injected.probe(|| {
        calls += 1.0;
        Tensor::new(&[calls], &Device::Cpu)
    });
    assert!(message.unwrap_err().to_string().contains("empty cache"));
}
