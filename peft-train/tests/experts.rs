//! Mixtures of experts: both layouts of checkpoints, what PEFT calls their adapters' tensors, and what is refused.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::testing::{close, randn};
use peft_core::{
    Adapter, AdapterSet, BaseModel, Checkpoint, Ctx, Route, Segmented, SiteKind, TokenBatch, write_safetensors,
};
use peft_models::Decoder;
use peft_models::config::DecoderConfig;
use peft_models::merge::Merged;
use peft_models::source::{DeferredSource, Placement, RandomSource, SafetensorsSource};
use peft_train::checkpoint::write_adapter_files;
use peft_train::methods;
use serde_json::{Value, json};

const LAYERS: usize = 2;

fn config(model_type: &str) -> DecoderConfig {
    let config = json!({"model_type": model_type, "vocab_size": 32, "hidden_size": 16, "intermediate_size": 12,
        "moe_intermediate_size": 10, "shared_expert_intermediate_size": 14, "num_hidden_layers": LAYERS, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "silu", "num_local_experts": 4,
        "num_experts_per_tok": 2, "mlp_only_layers": [1]});
    DecoderConfig::from_hf_map(config.as_object().unwrap().clone(), Path::new("config.json")).unwrap()
}

fn model(model_type: &str) -> Decoder {
    let placement = Placement::cpu(None);
    let source = RandomSource { seed: 3, std: 0.3, untied_head: true, placement: placement.clone() };
    Decoder::load(config(model_type), &source, &placement).unwrap()
}

fn create(base: &Decoder, method: &Value) -> peft_core::Result<Adapter> {
    Ok(methods::create(method.as_object().unwrap(), base, 1)?.adapter)
}

fn refusal(base: &Decoder, method: &Value) -> String {
    create(base, method).err().map(|e| e.to_string()).unwrap_or_else(|| panic!("{method} was taken"))
}

fn logits(model: &Decoder, adapters: &AdapterSet, route: &Route) -> Tensor {
    let (ids, positions) = ([3u32, 9, 1, 30, 7, 2], [0u32, 1, 2, 3, 4, 5]);
    let tokens = TokenBatch { ids: &ids, positions: &positions, bounds: &[0, 6], types: &[] };
    let ctx = Ctx::eval(adapters, route);
    let input = model.prepare(tokens, &ctx).unwrap();
    let embedded = model.embed(tokens, &ctx).unwrap();
    let hidden = (0..LAYERS).fold(embedded, |h, i| model.block(i, &h, &input, &ctx).unwrap());
    model.logits(&model.final_norm(&hidden, &ctx).unwrap(), &ctx).unwrap()
}

fn plain(model: &Decoder) -> Tensor {
    logits(model, &AdapterSet::empty(), &Route::Base)
}

/// The tensors of a checkpoint of `model`, expert by expert.
fn tensors(model: &Decoder) -> BTreeMap<String, Tensor> {
    let merged = Merged::new(model, Vec::new()).unwrap();
    merged.tensors().into_iter().map(|(name, _)| (name.clone(), merged.tensor(&name).unwrap())).collect()
}

fn write(folder: &Path, tensors: &BTreeMap<String, Tensor>) -> Arc<Checkpoint> {
    let path = folder.join("model.safetensors");
    write_safetensors(&path, tensors.iter().map(|(name, t)| (name.as_str(), t)), &BTreeMap::new()).unwrap();
    Arc::new(Checkpoint::open(folder).unwrap())
}

/// As transformers has it in memory: the experts of a layer in one tensor each for gate and up, and for down.
fn fused(model: &Decoder, apart: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let mut all = apart.clone();
    for site in model.sites().iter() {
        if site.is_router {
            let router = all.remove(&format!("{}.weight", site.stored_name())).unwrap();
            all.insert(format!("{}.weight", site.path), router);
        }
        let SiteKind::Experts { experts, .. } = site.kind else { continue };
        let weight = |e: usize| {
            let parts = site.stored.parts.iter().map(|part| apart[&site.stored_part(e, part)].clone());
            Tensor::cat(&parts.collect::<Vec<_>>(), 0).unwrap()
        };
        all.retain(|name, _| !site.stored.parts.iter().any(|p| (0..experts).any(|e| *name == site.stored_part(e, p))));
        all.insert(site.path.clone(), Tensor::stack(&(0..experts).map(weight).collect::<Vec<_>>(), 0).unwrap());
    }
    all
}

#[test]
fn both_layouts_of_checkpoints_are_one_model() {
    for model_type in ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe"] {
        let model = model(model_type);
        let want = plain(&model);
        let apart = tensors(&model);
        let together = fused(&model, &apart);
        assert!(together.len() < apart.len());
        for tensors in [apart, together] {
            let folder = tempfile::tempdir().unwrap();
            let source = SafetensorsSource::new(write(folder.path(), &tensors), Placement::cpu(None));
            let again = Decoder::load(config(model_type), &source, &Placement::cpu(None)).unwrap();
            close(model_type, &plain(&again), &want, 0.0).unwrap();
            assert_eq!((again.parameter_count(), again.nbytes()), (model.parameter_count(), model.nbytes()));
            let deferred = DeferredSource { source, device: Device::Cpu };
            let deferred = Decoder::load(config(model_type), &deferred, &Placement::cpu(None)).unwrap();
            close(model_type, &plain(&deferred), &want, 0.0).unwrap();
        }
    }
}

#[test]
fn tensors_of_experts_that_are_missing_or_misshapen_are_named() {
    let model = model("mixtral");
    let apart = tensors(&model);
    let together = fused(&model, &apart);
    let gone = "model.layers.0.block_sparse_moe.experts.3.w3.weight";
    let load = |tensors: &BTreeMap<String, Tensor>| {
        let folder = tempfile::tempdir().unwrap();
        let source = SafetensorsSource::new(write(folder.path(), tensors), Placement::cpu(None));
        Decoder::load(config("mixtral"), &source, &Placement::cpu(None)).map(|_| ()).unwrap_err().to_string()
    };
    let with = |tensors: &BTreeMap<String, Tensor>, name: &str, value: Option<Tensor>| {
        let mut tensors = tensors.clone();
        assert!(tensors.remove(name).is_some(), "{name}");
        tensors.extend(value.map(|value| (name.to_owned(), value)));
        load(&tensors)
    };
    let text = with(&apart, gone, None);
    assert!(text.contains(gone), "{text}");
    let text = with(&apart, gone, Some(randn(1, (16, 12), 1.0).unwrap()));
    assert!(text.contains(gone) && text.contains("[16, 12]") && text.contains("[12, 16]"), "{text}");
    let whole = "model.layers.1.mlp.experts.down_proj";
    let text = with(&together, whole, Some(randn(1, (3, 16, 12), 1.0).unwrap()));
    assert!(text.contains(whole) && text.contains("[3, 16, 12]") && text.contains("[4, 16, 12]"), "{text}");
    let text = with(&together, whole, None);
    assert!(text.contains("model.layers.1.block_sparse_moe.experts.0.w2.weight"), "{text}");
    let router = "model.layers.0.block_sparse_moe.gate.weight";
    let text = with(&apart, router, None);
    assert!(text.contains("model.layers.0.mlp.gate.weight"), "{text}");
    let text = with(&apart, router, Some(randn(1, (5, 16), 1.0).unwrap()));
    assert!(text.contains("[5, 16]") && text.contains("[4, 16]"), "{text}");
}

/// As PEFT writes them with transformers 5 (`peft/utils/transformers_weight_conversion.py`).
#[test]
fn adapters_have_the_names_and_shapes_of_peft() {
    let shapes = |base: &Decoder, method: Value| -> BTreeMap<String, Vec<usize>> {
        let adapter = create(base, &method).unwrap();
        let named = adapter.parameters().into_iter().map(|p| (p.name().to_owned(), p.value().dims().to_vec()));
        let first = named
            .filter_map(|(name, dims)| Some((name.strip_prefix("base_model.model.model.layers.0.")?.to_owned(), dims)));
        first.collect()
    };
    let owned = |list: &[(&str, [usize; 2])]| -> BTreeMap<String, Vec<usize>> {
        list.iter().map(|(name, dims)| ((*name).to_owned(), dims.to_vec())).collect()
    };
    let mixtral = model("mixtral");
    let both = [
        ("mlp.experts.base_layer.lora_A.weight", [4 * 4, 16]),
        ("mlp.experts.base_layer.lora_B.weight", [24, 4 * 4]),
        ("mlp.experts.lora_A.weight", [2 * 4, 12]),
        ("mlp.experts.lora_B.weight", [16, 2 * 4]),
    ];
    let old = json!({"r": 2, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]});
    assert_eq!(shapes(&mixtral, old.clone()), owned(&both));
    let written = create(&mixtral, &old).unwrap().config;
    assert_eq!(written["target_modules"], json!([]));
    assert_eq!(written["target_parameters"], json!(["down_proj", "gate_up_proj"]));
    assert_eq!(
        (&written["rank_pattern"], &written["alpha_pattern"]),
        (&json!({r".*\.gate_up_proj": 4}), &json!({r".*\.gate_up_proj": 12}))
    );
    let all = shapes(&mixtral, json!({"r": 2, "target_modules": "all-linear"}));
    let mut want = owned(&both);
    want.extend(owned(&[("mlp.gate.lora_A.weight", [2, 16]), ("mlp.gate.lora_B.weight", [4, 2])]));
    assert!(want.iter().all(|(name, dims)| all.get(name) == Some(dims)), "{all:?}");
    assert_eq!(all.len(), want.len() + 2 * 4);
    let one = json!({"r": 2, "target_parameters": ["experts.gate_up_proj"]});
    let want = owned(&[("mlp.experts.lora_A.weight", [2 * 4, 16]), ("mlp.experts.lora_B.weight", [24, 2 * 4])]);
    assert_eq!(shapes(&mixtral, one), want);
    // PEFT's table has a default for Mixtral, and none for Qwen's.
    assert!(shapes(&mixtral, json!({})).keys().all(|name| name.starts_with("self_attn.")));

    let qwen = model("qwen3_moe");
    let names = shapes(&qwen, json!({"r": 2, "target_modules": r".*\.(up_proj|gate_proj|gate)"}));
    let want =
        ["mlp.experts.lora_A.weight", "mlp.experts.lora_B.weight", "mlp.gate.lora_A.weight", "mlp.gate.lora_B.weight"];
    assert_eq!(names.keys().map(String::as_str).collect::<Vec<_>>(), want);
    let dense = create(&qwen, &json!({"r": 2, "target_modules": "all-linear"})).unwrap();
    assert!(!dense.parameters().iter().any(|p| p.name().contains("layers.1.mlp")), "PEFT leaves the dense layers out");
}

/// Tokens that go through several adapters of the experts, in one batch.
#[test]
fn a_batch_mixes_adapters_of_experts() {
    let model = model("qwen2_moe");
    let adapter = |seed: u64| {
        let method = json!({"r": 2, "target_modules": ["q_proj", "shared_expert_gate"],
            "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"]});
        let adapter = create(&model, &method).unwrap();
        for (i, p) in adapter.parameters().into_iter().enumerate() {
            p.set(&(p.value() + randn(seed + i as u64, p.value().shape(), 0.2).unwrap()).unwrap()).unwrap();
        }
        Arc::new(adapter)
    };
    let set = AdapterSet::one("a", adapter(10)).with("b", adapter(90));
    // Tokens see those before them alone, so what the first adapter makes of the first three is the same in any batch.
    let mixed = logits(&model, &set, &Route::Rows(vec![(0..3, Some(0)), (3..6, None)]));
    let first = logits(&model, &set, &Route::Uniform(0));
    close("first", &mixed.narrow(0, 0, 3).unwrap(), &first.narrow(0, 0, 3).unwrap(), 1e-5).unwrap();
    let other = logits(&model, &set, &Route::Uniform(1));
    assert!(close("other", &first, &other, 1e-2).is_err());
}

#[test]
fn recipes_for_experts_that_cannot_be_followed_name_the_key() {
    let mixtral = model("mixtral");
    for (method, expect) in [
        (json!({"target_parameters": ["gate_up_prj"]}), "`gate_up_proj`"),
        (json!({"target_parameters": ["mlp.experts.w1"]}), "matches no weight of the model"),
        (json!({"target_parameters": "gate_up_proj"}), "target_parameters"),
        (json!({"target_parameters": ["input_layernorm.weight"]}), "is a norm"),
        (json!({"target_parameters": ["down_proj"], "lora_dropout": 0.1}), "lora_dropout"),
        (json!({"target_modules": "all-linear", "lora_dropout": 0.1}), "lora_dropout"),
        (json!({"target_modules": "all-linear", "use_dora": true}), "use_dora"),
        (json!({"target_parameters": ["down_proj"], "lora_bias": true}), "lora_bias"),
        (json!({"target_parameters": ["down_proj"], "init_lora_weights": "pissa"}), "init_lora_weights"),
        (json!({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}), "target_modules its layer"),
        (json!({"target_modules": ["w1", "w2"]}), "with `w3` in this model"),
        (json!({"target_modules": ["q_proj"], "modules_to_save": ["experts"]}), "target_parameters"),
        (json!({"type": "vera", "target_modules": ["gate"]}), "a router of experts"),
        (json!({"type": "oft", "target_modules": ["down_proj"]}), "the weights of experts"),
        (json!({"type": "ia3", "target_modules": ["w2"], "feedforward_modules": []}), "matches no module"),
        (json!({"type": "full"}), "adapted by LoRA alone"),
        (json!({"type": "last_layers", "num_layers": 1}), "experts"),
        (json!({"type": "bottleneck"}), "not supported on model type `mixtral`"),
        (json!({"type": "reft"}), "not supported on model type `mixtral`"),
        (json!({"type": "vera", "target_parameters": ["down_proj"]}), "target_parameters"),
    ] {
        let text = refusal(&mixtral, &method);
        assert!(text.contains(expect), "{method}: {text}\nlacks {expect}");
    }
    let text = refusal(&model("qwen3_moe"), &json!({"target_modules": ["gate_proj", "q_proj"]}));
    assert!(text.contains("`gate_proj` is one parameter, `gate_up_proj`, with `up_proj`"), "{text}");
}

#[test]
fn files_for_other_experts_are_refused() {
    let mixtral = model("mixtral");
    let folder = tempfile::tempdir().unwrap();
    let adapter = create(&mixtral, &json!({"r": 2, "target_parameters": ["gate_up_proj", "down_proj"]})).unwrap();
    write_adapter_files(folder.path(), &adapter).unwrap();
    methods::open(folder.path(), &mixtral).unwrap();
    let text = methods::open(folder.path(), &model("qwen3_moe")).unwrap_err().to_string();
    assert!(text.contains("mlp.experts.base_layer.lora_B.weight") && text.contains("[24, 8]"), "{text}");
    let path = folder.path().join("adapter_config.json");
    let mut file: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    file["target_parameters"] = json!(["gate_up_proj"]);
    std::fs::write(&path, serde_json::to_vec(&file).unwrap()).unwrap();
    let text = methods::open(folder.path(), &mixtral).unwrap_err().to_string();
    assert!(text.contains("mlp.experts.base_layer.lora_A.weight"), "{text}");
    assert_eq!(adapter.parameters().first().unwrap().value().dtype(), DType::F32);
}

/// An adapter of PEFT's before transformers 5: layers of each expert, under Mixtral's old names.
#[test]
fn adapters_on_layers_of_single_experts_are_read() {
    let mixtral = model("mixtral");
    for (rslora, parts) in [(false, vec!["w1", "w2", "w3"]), (true, vec!["w1", "w3"]), (false, vec!["w2"])] {
        let (r, alpha) = (2usize, 6.0f64);
        let scale = if rslora { alpha / (r as f64).sqrt() } else { alpha / r as f64 };
        let mut old = BTreeMap::new();
        let mut changed = tensors(&mixtral);
        for (seed, name) in tensors(&mixtral).keys().enumerate().map(|(i, name)| (i as u64, name.clone())) {
            let Some(path) = name.strip_suffix(".weight").filter(|p| parts.iter().any(|part| p.ends_with(part))) else {
                continue;
            };
            let (out, inp) = changed[&name].dims2().unwrap();
            let (a, b) = (randn(seed, (r, inp), 0.3).unwrap(), randn(500 + seed, (out, r), 0.3).unwrap());
            let whole = (&changed[&name] + (b.matmul(&a).unwrap() * scale).unwrap()).unwrap();
            changed.insert(name.clone(), whole);
            old.insert(format!("base_model.model.{path}.lora_A.weight"), a);
            old.insert(format!("base_model.model.{path}.lora_B.weight"), b);
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("adapter_model.safetensors");
        let save = |tensors: &BTreeMap<String, Tensor>| {
            write_safetensors(&file, tensors.iter().map(|(name, t)| (name.as_str(), t)), &BTreeMap::new()).unwrap();
        };
        save(&old);
        let mut config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha,
            "use_rslora": rslora, "target_modules": parts, "base_model_name_or_path": "mixtral"});
        let write_config = |config: &Value| {
            std::fs::write(folder.path().join("adapter_config.json"), serde_json::to_vec(config).unwrap()).unwrap();
        };
        write_config(&config);
        let adapter = Arc::new(methods::open(folder.path(), &mixtral).unwrap().adapter);
        let got = logits(&mixtral, &AdapterSet::one("a", adapter), &Route::Uniform(0));
        let dir = tempfile::tempdir().unwrap();
        let source = SafetensorsSource::new(write(dir.path(), &changed), Placement::cpu(None));
        let want = plain(&Decoder::load(mixtral.config().clone(), &source, &Placement::cpu(None)).unwrap());
        close(&format!("{parts:?}"), &got, &want, 1e-4).unwrap();
        assert!(close("base", &got, &plain(&mixtral), 1e-2).is_err());

        let fails = |says: &str| {
            let text = methods::open(folder.path(), &mixtral).unwrap_err().to_string();
            assert!(text.contains(says), "{text}\nlacks {says}");
        };
        let last = old.keys().last().unwrap().clone();
        let mut spoiled = old.clone();
        spoiled.remove(&last);
        save(&spoiled);
        fails("factor of expert 3 is missing");
        spoiled.retain(|name, _| !name.contains(".experts.1."));
        save(&spoiled);
        fails("expert");
        spoiled = old.clone();
        spoiled.insert(last.replace("lora_B.weight", "lora_magnitude_vector"), randn(1, 3, 1.0).unwrap());
        save(&spoiled);
        fails("plain factors");
        save(&old);
        config["alpha_pattern"] = json!({"w1": 3});
        write_config(&config);
        fails("alpha_pattern");
    }
}
