//! LoRA in the files of mlx-lm, torchtune and kohya is PEFT's under other names. `interop/foreign.py` holds the same against HF PEFT.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::testing::{close, randn};
use peft_core::{Adapter, write_safetensors};
use peft_lora::foreign::Layout;
use peft_models::Decoder;
use peft_models::config::DecoderConfig;
use peft_models::source::{Placement, RandomSource};
use peft_train::{adapter_files, methods};
use serde_json::{Value, json};

const PREFIX: &str = "base_model.model.";

fn base() -> Decoder {
    let config = json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 24,
        "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_act": "silu"});
    let config = DecoderConfig::from_hf_map(config.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
    let placement = Placement::cpu(None);
    let source = RandomSource { seed: 0, std: 0.3, untied_head: true, placement: placement.clone() };
    Decoder::load(config, &source, &placement).unwrap()
}

/// A LoRA with values, and its tensors without PEFT's prefix.
fn lora(base: &Decoder, method: Value) -> (Adapter, BTreeMap<String, Tensor>) {
    let adapter = methods::create(method.as_object().unwrap(), base, 1).unwrap().adapter;
    for (i, p) in adapter.parameters().into_iter().enumerate() {
        p.set(&randn(i as u64, p.value().shape(), 0.3).unwrap()).unwrap();
    }
    let tensors = adapter.tensors().into_iter().map(|(key, t)| (key.strip_prefix(PREFIX).unwrap().to_owned(), t));
    let tensors = tensors.collect();
    (adapter, tensors)
}

fn write(dir: &Path, file: &str, tensors: &BTreeMap<String, Tensor>, config: Option<Value>) {
    let tensors = tensors.iter().map(|(key, t)| (key.as_str(), t));
    write_safetensors(dir.join(file), tensors, &BTreeMap::new()).unwrap();
    if let Some(config) = config {
        std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    }
}

/// The folder opens as the adapter, to the bit, with the same scale at every layer.
fn is_the_same(dir: &Path, layout: Layout, base: &Decoder, adapter: &Adapter) {
    assert_eq!(Layout::of(dir).unwrap(), Some(layout));
    let opened = methods::open(dir, base).unwrap().adapter;
    let (ours, theirs) = (adapter.tensors(), opened.tensors());
    assert_eq!(ours.len(), theirs.len());
    for ((name, a), (other, b)) in ours.iter().zip(&theirs) {
        assert_eq!(name, other);
        close(name, b, a, 0.0).unwrap();
    }
    let delta = |adapter: &Adapter, site| {
        let peft_core::SiteModule::Linear(module) = adapter.at(site).unwrap().module.clone().unwrap() else { panic!() };
        let peft_core::BaseLayer::Linear(layer) = peft_core::BaseModel::layer(base, site).unwrap() else { panic!() };
        match module.delta(layer).unwrap() {
            peft_core::Delta::Add { weight, .. } | peft_core::Delta::Replace { weight, .. } => weight,
            other => panic!("{other:?}"),
        }
    };
    for (site, _) in adapter.touched() {
        close("change", &delta(&opened, site), &delta(adapter, site), 1e-6).unwrap();
    }
}

fn kohya_names(tensors: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let mut out = BTreeMap::new();
    for (key, tensor) in tensors {
        let (path, part) = key.split_once(".lora_").unwrap();
        let module = format!("lora_te_{}", path.strip_prefix("model.").unwrap().replace('.', "_"));
        let part = if part == "A.weight" { "lora_down.weight" } else { "lora_up.weight" };
        out.insert(format!("{module}.{part}"), tensor.clone());
        let alpha = if path.contains("v_proj") { 9f32 } else { 6.0 };
        out.insert(format!("{module}.alpha"), Tensor::new(alpha, &Device::Cpu).unwrap());
    }
    out
}

#[test]
fn kohya_has_no_dots_and_an_alpha_of_each_layer() {
    let base = base();
    let (adapter, tensors) = lora(
        &base,
        json!({"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"v_proj": 9}}),
    );
    let dir = tempfile::tempdir().unwrap();
    let names = kohya_names(&tensors);
    write(dir.path(), "trained.safetensors", &names, None);
    is_the_same(dir.path(), Layout::Kohya, &base, &adapter);
    let e = adapter_files::open(dir.path(), None).unwrap_err().to_string();
    assert!(e.contains("--model"), "{e}");

    let first = "lora_te_layers_0_mlp_down_proj.lora_down.weight";
    let spoil = |change: &dyn Fn(&mut BTreeMap<String, Tensor>), says: &str| {
        let mut names = names.clone();
        change(&mut names);
        write(dir.path(), "trained.safetensors", &names, None);
        let e = methods::open(dir.path(), &base).unwrap_err().to_string();
        assert!(e.contains(says) && e.contains("trained.safetensors"), "{e}");
    };
    spoil(&|t| drop(t.remove(first)), "one of the two factors");
    spoil(&|t| drop(t.insert(first.into(), randn(1, (5, 20), 1.0).unwrap())), "do not fit");
    spoil(&|t| drop(t.insert(first.into(), randn(1, (3, 20, 1), 1.0).unwrap())), "dimensions");
    spoil(&|t| drop(t.insert(first.into(), Tensor::full(f32::NAN, (3, 20), &Device::Cpu).unwrap())), first);
    spoil(&|t| drop(t.insert(first.replace("down_proj", "dwn_proj"), t[first].clone())), "down_proj");
    spoil(&|t| drop(t.insert(first.replace("lora_down.weight", "dora_scale"), t[first].clone())), "DoRA");
    spoil(&|t| drop(t.insert(first.replace("lora_down", "lora_dwn"), t[first].clone())), "lora_down.weight");
    spoil(
        &|t| drop(t.insert("lora_te_layers_0_mlp_down_proj.alpha".into(), randn(1, 3, 1.0).unwrap())),
        "not one number",
    );
    spoil(&|t| drop(t.insert(first.replace("lora_te_", "lycoris_model_"), t[first].clone())), "second tensor");
}

#[test]
fn mlx_transposes_and_its_scale_is_no_alpha() {
    let base = base();
    for dora in [false, true] {
        let method = json!({"r": 3, "lora_alpha": 5, "target_modules": ["k_proj", "up_proj"], "use_dora": dora});
        let (adapter, tensors) = lora(&base, method);
        let mut theirs = BTreeMap::new();
        for (key, tensor) in &tensors {
            let (path, part) = key.split_once(".lora_").unwrap();
            let (name, tensor) = match part {
                "A.weight" => ("lora_a", tensor.t().unwrap().contiguous().unwrap()),
                "B.weight" => ("lora_b", tensor.t().unwrap().contiguous().unwrap()),
                _ => ("m", tensor.clone()),
            };
            theirs.insert(format!("{path}.{name}"), tensor);
        }
        let dir = tempfile::tempdir().unwrap();
        // All arguments of mlx-lm's command, with its `config`, which AdapterHub's files have too.
        let config = json!({"config": "recipe.yaml", "fine_tune_type": if dora { "dora" } else { "lora" }, "num_layers": 2,
            "lora_parameters": {"rank": 3, "scale": 5.0 / 3.0, "dropout": 0.0}});
        write(dir.path(), "adapters.safetensors", &theirs, Some(config.clone()));
        is_the_same(dir.path(), Layout::Mlx, &base, &adapter);
        assert_eq!(adapter_files::open(dir.path(), None).unwrap().config().get("lora_alpha"), Some(&json!(5)));

        for (key, value, says) in [
            ("fine_tune_type", json!("full"), "fuse"),
            ("lora_parameters", json!({"rank": 3}), "lora_parameters.scale"),
            ("lora_parameters", json!(null), "lora_parameters"),
        ] {
            let mut config = config.clone();
            config[key] = value;
            write(dir.path(), "adapters.safetensors", &theirs, Some(config));
            let e = methods::open(dir.path(), &base).unwrap_err().to_string();
            assert!(e.contains(says) && e.contains("adapter_config.json"), "{e}");
        }
        theirs.insert("model.layers.0.mlp.up_proj.lora_c".into(), randn(1, 3, 1.0).unwrap());
        write(dir.path(), "adapters.safetensors", &theirs, Some(config));
        let e = methods::open(dir.path(), &base).unwrap_err().to_string();
        assert!(e.contains("lora_c"), "{e}");
    }
}

/// Row `2i` of a head in Meta's order is row `i` in transformers', and row `2i + 1` is row `half + i`.
fn in_meta_order(t: &Tensor, heads: usize) -> Tensor {
    let (rows, half) = (t.dim(0).unwrap(), t.dim(0).unwrap() / heads / 2);
    let from = (0..rows).map(|row| {
        let (head, place) = (row / (2 * half), row % (2 * half));
        (head * 2 * half + place % 2 * half + place / 2) as u32
    });
    let from = Tensor::new(from.collect::<Vec<_>>(), &Device::Cpu).unwrap();
    t.index_select(&from, 0).unwrap().to_dtype(DType::F32).unwrap()
}

#[test]
fn torchtune_has_names_of_its_own_and_rows_in_metas_order() {
    let base = base();
    for dora in [false, true] {
        let targets = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"];
        let (adapter, tensors) =
            lora(&base, json!({"r": 4, "lora_alpha": 6, "target_modules": targets, "use_dora": dora}));
        let mut theirs = BTreeMap::new();
        for (key, tensor) in &tensors {
            let (path, part) = key.split_once(".lora_").unwrap();
            let mut module = path.strip_prefix("model.").unwrap().replace("self_attn", "attn");
            for (own, name) in [("o_proj", "output_proj"), ("mlp.gate_proj", "mlp.w1"), ("mlp.down_proj", "mlp.w2")] {
                module = module.replace(own, name);
            }
            let heads = if path.ends_with("q_proj") { Some(3) } else { path.ends_with("k_proj").then_some(1) };
            let (name, of_rows) = match part {
                "A.weight" => ("lora_a.weight", false),
                "B.weight" => ("lora_b.weight", true),
                _ => ("magnitude", true),
            };
            let tensor = match heads.filter(|_| of_rows) {
                Some(heads) => in_meta_order(tensor, heads),
                None => tensor.clone(),
            };
            theirs.insert(format!("{module}.{name}"), tensor);
        }
        let dir = tempfile::tempdir().unwrap();
        let config = json!({"r": 4, "lora_alpha": 6, "peft_type": "LORA", "target_modules": ["q_proj", "w1"]});
        write(dir.path(), "adapter_model.safetensors", &theirs, Some(config));
        is_the_same(dir.path(), Layout::Torchtune, &base, &adapter);
        let e = adapter_files::open(dir.path(), None).unwrap_err().to_string();
        assert!(e.contains("--model"), "{e}");

        for (name, says) in [
            ("layers.0.attn.q_prj.lora_a.weight", "attn.q_proj"),
            ("layers.7.attn.q_proj.lora_a.weight", "layers.7"),
            ("layers.0.attn.q_proj.lora_c.weight", "lora_c"),
            ("tok_embeddings.lora_a.weight", "tok_embeddings"),
        ] {
            let mut theirs = theirs.clone();
            theirs.insert(name.into(), randn(1, (4, 24), 1.0).unwrap());
            write(dir.path(), "adapter_model.safetensors", &theirs, None);
            let e = methods::open(dir.path(), &base).unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        }
        theirs.insert("layers.0.attn.k_proj.lora_b.weight".into(), randn(1, (24, 4), 1.0).unwrap());
        write(dir.path(), "adapter_model.safetensors", &theirs, Some(json!({"r": 4, "peft_type": "LORA"})));
        let e = methods::open(dir.path(), &base).unwrap_err().to_string();
        assert!(e.contains("lora_alpha"), "{e}");
        write(
            dir.path(),
            "adapter_model.safetensors",
            &theirs,
            Some(json!({"r": 4, "lora_alpha": 6, "peft_type": "LORA"})),
        );
        let e = methods::open(dir.path(), &base).unwrap_err().to_string();
        assert!(e.contains("24 rows") && e.contains("1 heads of 8"), "{e}");
    }
}
