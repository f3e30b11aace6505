//! AdapterHub's files: what is written reads back, and what cannot be read is refused by name. That its own package agrees is
//! the matter of `interop/adapterhub.py`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod model_support;

use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use peft_adapters::adapterhub::{self, HubModel};
use peft_core::kernels::testing::close;
use peft_core::write_safetensors;
use peft_models::Encoder;
use peft_models::config::EncoderConfig;
use peft_models::source::{Placement, RandomSource};
use peft_train::{adapter_files, checkpoint, class_labels, methods};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use self::model_support::moved;

fn bert() -> Encoder {
    let config = json!({"model_type": "bert", "vocab_size": 37, "hidden_size": 12, "intermediate_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 16, "id2label": {"0": "no", "1": "yes"}});
    let config = EncoderConfig::from_hf_map(config.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
    let placement = Placement::cpu(None);
    let random = RandomSource { seed: 3, std: 0.3, untied_head: true, placement: placement.clone() };
    Encoder::load(config, &random, &placement, 5).unwrap()
}

/// A folder of AdapterHub's with the adapter of `method`, and the adapter.
fn folder(method: &Value) -> (TempDir, Arc<peft_core::Adapter>) {
    let (model, dir) = (bert(), tempfile::tempdir().unwrap());
    let adapter = moved(&model, method);
    let ours = dir.path().join("ours");
    checkpoint::write_adapter_files(&ours, &adapter).unwrap();
    let files = adapter_files::open(&ours, None).unwrap();
    let base = HubModel { model_type: "bert".to_owned(), name: "some/bert".to_owned() };
    adapterhub::write(&dir.path().join("hub"), &files, "task", &["no".to_owned(), "yes".to_owned()], &base).unwrap();
    (dir, adapter)
}

fn method() -> Value {
    json!({"type": "bottleneck", "preset": "double_seq_bn", "reduction_factor": 4, "ln_before": true, "scaling": 2})
}

fn edit(file: &Path, change: impl Fn(&mut Map<String, Value>)) {
    let mut keys: Map<String, Value> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    change(&mut keys);
    std::fs::write(file, serde_json::to_vec(&keys).unwrap()).unwrap();
}

#[test]
fn what_is_written_reads_back() {
    let (dir, adapter) = folder(&method());
    let hub = dir.path().join("hub");
    assert!(adapterhub::is_adapterhub(&hub).unwrap() && !adapterhub::is_adapterhub(&dir.path().join("ours")).unwrap());
    assert_eq!(class_labels::read(&hub).unwrap().unwrap().names, ["no", "yes"]);
    let config = std::fs::read_to_string(hub.join("adapter_config.json")).unwrap();
    // A constant that is no float is no constant to AdapterHub's package.
    for line in
        ["\"scaling\": 2.0,", "\"hidden_size\": 12,", "\"name\": \"task\",", "\"BertForSequenceClassification\""]
    {
        assert!(config.contains(line), "{config}\nlacks {line}");
    }
    let opened = methods::open(&hub, &bert()).unwrap().adapter;
    assert_eq!(opened.config["base_model_name_or_path"], "some/bert");
    let (ours, theirs) = (adapter.tensors(), opened.tensors());
    assert_eq!(ours.len(), theirs.len());
    for ((name, a), (other, b)) in ours.iter().zip(&theirs) {
        assert_eq!(name, other);
        close(name, a, b, 0.0).unwrap();
    }
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let (dir, _) = folder(&method());
    let (hub, model) = (dir.path().join("hub"), bert());
    let config = hub.join("adapter_config.json");
    let start = std::fs::read(&config).unwrap();
    for (own, key, value, expect) in [
        (true, "architecture", json!("prefix_tuning"), "prefix_tuning"),
        (true, "inv_adapter", json!("nice"), "inv_adapter"),
        (true, "mh_adaptr", json!(true), "did you mean `mh_adapter`"),
        (true, "reduction_factor", json!(3), "of another shape"),
        (false, "model_type", json!("deberta"), "deberta"),
        (false, "name", json!("other"), "no tensor of the adapter `other`"),
    ] {
        edit(&config, |keys| match own {
            true => keys["config"][key] = value.clone(),
            false => keys[key] = value.clone(),
        });
        let text = methods::open(&hub, &model).unwrap_err().to_string();
        assert!(text.contains(expect), "{text}\nlacks {expect}");
        std::fs::write(&config, &start).unwrap();
    }

    let head = hub.join("head_config.json");
    for (own, expect) in [
        (json!({"head_type": "tagging"}), "`tagging` is not supported"),
        (json!({"head_type": "classification", "layers": 3, "activation_function": "tanh"}), "3 layers"),
    ] {
        edit(&head, |keys| keys["config"] = own.clone());
        let text = methods::open(&hub, &model).unwrap_err().to_string();
        assert!(text.contains(expect) && text.contains("head_config.json"), "{text}\nlacks {expect}");
    }
    std::fs::remove_file(&head).unwrap();
    let text = methods::open(&hub, &model).unwrap_err().to_string();
    assert!(text.contains("model_head.safetensors and no head_config.json"), "{text}");
    std::fs::remove_file(hub.join("model_head.safetensors")).unwrap();

    std::fs::rename(hub.join("adapter.safetensors"), hub.join("pytorch_adapter.bin")).unwrap();
    let text = methods::open(&hub, &model).unwrap_err().to_string();
    assert!(text.contains("pytorch_adapter.bin") && text.contains("save_file"), "{text}");
}

/// A file of before `adapters`: other module names, `gelu` for its approximation, two names for the norm in front.
#[test]
fn old_files_are_read() {
    let (dir, adapter) =
        folder(&json!({"type": "bottleneck", "non_linearity": "gelu_new", "ln_before": true, "reduction_factor": 3}));
    let hub = dir.path().join("hub");
    for file in ["head_config.json", "model_head.safetensors"] {
        std::fs::remove_file(hub.join(file)).unwrap();
    }
    edit(&hub.join("adapter_config.json"), |keys| {
        keys.remove("version");
        keys.insert("type".to_owned(), json!("text_task"));
        keys["config"]["non_linearity"] = json!("gelu");
        keys["config"]["init_weights_seed"] = json!(42);
        keys["config"]["attention_type"] = json!("sent-lvl-dynamic");
        keys["config"]["invertible_adapter"] = json!({"block_type": "nice", "reduction_factor": 2});
    });
    let files = adapter_files::open(&dir.path().join("ours"), None).unwrap();
    let of_adapter = files.keys().filter(|key| key.contains("adapter_"));
    let tensors: Vec<(String, Tensor)> = of_adapter
        .map(|key| {
            let layer = key
                .trim_start_matches("base_model.model.")
                .replace("output.dense.", "output.layer_text_task_adapters.task.");
            (layer, files.tensor(key, &candle_core::Device::Cpu).unwrap())
        })
        .collect();
    let both = tensors.iter().map(|(name, t)| (name.as_str(), t));
    write_safetensors(hub.join("adapter.safetensors"), both, &Default::default()).unwrap();
    let opened = methods::open(&hub, &bert()).unwrap().adapter;
    assert_eq!(opened.config["non_linearity"], "gelu_new");
    let mine = adapter.parameters().into_iter().filter(|p| p.name().contains("adapter_"));
    for (a, b) in mine.zip(opened.parameters()) {
        close(a.name(), &a.value(), &b.value(), 0.0).unwrap();
    }
    edit(&hub.join("adapter_config.json"), |keys| keys["type"] = json!("text_lang"));
    assert!(methods::open(&hub, &bert()).unwrap_err().to_string().contains("inv_adapter"));
}

#[test]
fn what_the_format_has_no_place_for_is_refused() {
    let model = bert();
    let base = HubModel { model_type: "bert".to_owned(), name: String::new() };
    for (method, expect) in [
        (json!({"type": "vera", "target_modules": ["query"]}), "VERA"),
        (json!({"r": 2, "target_modules": ["query"], "use_dora": true}), "use_dora"),
        (
            json!({"r": 2, "target_modules": ["query"], "rank_pattern": {"layer.1.attention.self.query": 1}}),
            "rank_pattern",
        ),
        (json!({"r": 2, "target_modules": ["attention.output.dense"]}), "attention.output.dense"),
        (json!({"r": 2, "target_modules": ["query", "layer.1.attention.self.key"]}), "block 0"),
        (
            json!({"type": "ia3", "target_modules": ["0.output.dense", "1.output.dense"],
                "feedforward_modules": ["0.output.dense", "1.output.dense"]}),
            "what a layer makes",
        ),
        (json!({"type": "prefix", "num_virtual_tokens": 2}), "moves_positions"),
        (json!({"type": "bottleneck", "modules_to_save": ["LayerNorm"]}), "LayerNorm"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        checkpoint::write_adapter_files(dir.path(), &moved(&model, &method)).unwrap();
        let files = adapter_files::open(dir.path(), None).unwrap();
        let out = dir.path().join("out");
        let text = adapterhub::write(&out, &files, "a", &[], &base).unwrap_err().to_string();
        assert!(text.contains(expect) && !out.exists(), "{text}");
    }
}

/// UniPELT with a class head, whose tensors are under other names beside a prefix, and a LoRA and (IA)³ by themselves.
#[test]
fn other_methods_and_unions_are_written_and_read_back() {
    let prefix = json!({"type": "prefix", "num_virtual_tokens": 2, "prefix_projection": true, "encoder_hidden_size": 4,
        "use_gating": true, "shared_gating": false, "moves_positions": false});
    let lora = json!({"r": 2, "lora_alpha": 3, "target_modules": ["query", "layer.1.output.dense", "layer.0.output.dense"],
        "exclude_modules": ["attention.output.dense"]});
    let gated = json!({"r": 2, "target_modules": ["query"], "use_gating": true});
    let bottleneck = json!({"type": "bottleneck", "use_gating": true, "reduction_factor": 3, "ln_before": true});
    let ia3 = json!({"type": "ia3", "target_modules": ["key", "intermediate.dense"], "feedforward_modules": []});
    for (method, peft_type) in [
        (json!({"type": "union", "methods": [prefix.clone(), bottleneck, gated.clone()]}), "UNION"),
        (json!({"type": "union", "methods": [prefix]}), "UNION"),
        (json!({"type": "union", "methods": [gated]}), "UNION"),
        (lora, "LORA"),
        (ia3, "IA3"),
    ] {
        let (dir, adapter) = folder(&method);
        let opened = methods::open(&dir.path().join("hub"), &bert()).unwrap().adapter;
        assert_eq!(opened.config["peft_type"], peft_type);
        let sorted = |(_, mut tensors): peft_core::Exported| {
            // With a prefix alone a head has another name.
            tensors.iter_mut().for_each(|(name, _)| *name = name.replace("base_model.model.", "base_model."));
            tensors.sort_by(|a, b| a.0.cmp(&b.0));
            tensors
        };
        let (ours, theirs) = (sorted(adapter.exported().unwrap()), sorted(opened.exported().unwrap()));
        assert_eq!(ours.len(), theirs.len(), "{method}");
        for ((name, a), (other, b)) in ours.iter().zip(&theirs) {
            assert_eq!(name, other);
            close(name, a, b, 0.0).unwrap();
        }
    }
}

#[test]
fn other_methods_that_cannot_be_read_are_refused_by_name() {
    let union = json!({"type": "union", "methods": [
        {"type": "prefix", "num_virtual_tokens": 2, "moves_positions": false}, {"r": 2, "target_modules": ["query"]}]});
    let (dir, _) = folder(&union);
    let (hub, model) = (dir.path().join("hub"), bert());
    let config = hub.join("adapter_config.json");
    let start = std::fs::read(&config).unwrap();
    for (part, key, value, expect) in [
        (0, "leave_out", json!([1]), "of number 1: `leave_out`"),
        (0, "dropout", json!(0.1), "dropout"),
        (0, "prefix_length", json!(5), "prefix_length"),
        (0, "flat", json!(false), "wte.weight"),
        (0, "flt", json!(false), "flat"),
        (1, "use_dora", json!(true), "DoRA"),
        (1, "vera_d", json!(0.1), "VeRA"),
        (1, "composition_mode", json!("multiply"), "multiply"),
        (1, "r", json!(3), "of another shape"),
        (1, "architecture", json!("mtl_lora"), "mtl_lora"),
        (1, "architecture", json!("union"), "union"),
    ] {
        edit(&config, |keys| keys["config"]["configs"][part][key] = value.clone());
        let text = methods::open(&hub, &model).unwrap_err().to_string();
        assert!(text.contains(expect), "{text}\nlacks {expect}");
        std::fs::write(&config, &start).unwrap();
    }
    edit(&config, |keys| keys["config"]["configs"] = json!([]));
    assert!(methods::open(&hub, &model).unwrap_err().to_string().contains("configs"));
    std::fs::write(&config, &start).unwrap();
    // One of the names of a tensor stands for another value.
    let weights = peft_core::SafetensorsFile::open(hub.join("adapter.safetensors")).unwrap();
    let tensors: Vec<(String, Tensor)> = weights
        .names()
        .map(|name| {
            let value = weights.tensor(name, &candle_core::Device::Cpu).unwrap();
            (
                name.to_owned(),
                if name.contains("layer.1.attention.self.prefix") { (value + 1.0).unwrap() } else { value },
            )
        })
        .collect();
    let both = tensors.iter().map(|(name, t)| (name.as_str(), t));
    write_safetensors(hub.join("adapter.safetensors"), both, &Default::default()).unwrap();
    assert!(methods::open(&hub, &model).unwrap_err().to_string().contains("stand for one tensor"));
}

/// A fusion of two new adapters with a class head, as AdapterHub's folder of folders.
fn setup_folder() -> (TempDir, Arc<peft_core::Adapter>) {
    let part = |name: &str| json!({"name": name, "reduction_factor": 3, "ln_before": name == "two"});
    folder(&json!({"type": "fusion", "adapters": [part("one"), part("two")]}))
}

#[test]
fn a_setup_is_written_and_read_back() {
    let (dir, adapter) = setup_folder();
    let hub = dir.path().join("hub");
    assert!(adapterhub::is_adapterhub(&hub).unwrap());
    assert_eq!(class_labels::read(&hub).unwrap().unwrap().names, ["no", "yes"]);
    let setup: Value = serde_json::from_slice(&std::fs::read(hub.join("adapter_setup.json")).unwrap()).unwrap();
    let single = |name: &str| json!({"type": "single", "children": [name]});
    assert_eq!(setup["adapter_setup"], json!({"type": "Fuse", "children": [single("one"), single("two")]}));
    assert_eq!(setup["head_setup"], true);
    let opened = Arc::new(methods::open(&hub, &bert()).unwrap().adapter);
    let sorted = |adapter: &peft_core::Adapter| {
        let mut tensors = adapter.tensors();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        tensors
    };
    let (ours, theirs) = (sorted(&adapter), sorted(&opened));
    assert_eq!(ours.len(), theirs.len());
    for ((name, a), (other, b)) in ours.iter().zip(&theirs) {
        assert_eq!(name, other);
        close(name, a, b, 0.0).unwrap();
    }
    // What AdapterHub's files do not say: that the parts of this one were trained with it.
    let names =
        |adapter: &peft_core::Adapter| adapter.parameters().iter().map(|p| p.name().to_owned()).collect::<Vec<_>>();
    assert!(names(&adapter).iter().any(|name| name.contains(".adapters.")));
    assert!(names(&opened).iter().all(|name| name.contains(".fusion.") || !name.contains(".encoder.")));
}

#[test]
fn a_setup_that_cannot_be_read_is_refused_by_name() {
    let (dir, _) = setup_folder();
    let (hub, model) = (dir.path().join("hub"), bert());
    let refused = |expect: &str| {
        let text = methods::open(&hub, &model).unwrap_err().to_string();
        assert!(text.contains(expect), "{text}\nlacks {expect}");
    };
    let single = |name: &str| json!({"type": "single", "children": [name]});
    for (file, change, expect) in [
        (
            "adapter_setup.json",
            json!({"type": "Parallel", "children": [single("one"), single("two")]}),
            "give each its own",
        ),
        (
            "adapter_setup.json",
            json!({"type": "Stack", "children": [single("../one")]}),
            "cannot be the name of a folder",
        ),
        ("adapter_setup.json", json!({"type": "Stack", "children": [single("three")]}), "`three` is missing"),
        ("one,two/adapter_fusion_config.json", json!({"temperature": true}), "temperature"),
        ("one,two/adapter_fusion_config.json", json!({"heads": 2}), "heads"),
    ] {
        let path = hub.join(file);
        let start = std::fs::read(&path).unwrap();
        edit(&path, |keys| match change.get("type") {
            Some(_) => keys["adapter_setup"] = change.clone(),
            None => keys["config"].as_object_mut().unwrap().extend(change.as_object().unwrap().clone()),
        });
        refused(expect);
        std::fs::write(&path, start).unwrap();
    }
    let weights = hub.join("one,two/model_adapter_fusion.safetensors");
    std::fs::rename(&weights, hub.join("one,two/pytorch_model_adapter_fusion.bin")).unwrap();
    refused("pytorch_model_adapter_fusion.bin");
    std::fs::remove_dir_all(hub.join("one,two")).unwrap();
    refused("adapter_fusion_config.json");
}
