//! Wrong input: status 1 (2 for usage) and one line that names the file, key or site.

use std::collections::HashMap;

use candle_core::{Device, Tensor};

use crate::harness::{Dir, base, pretrain};

/// Changes the tensors of a safetensors file.
fn edit(path: &std::path::Path, change: impl Fn(&str, Tensor) -> Tensor) {
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let changed: HashMap<String, Tensor> = tensors
        .into_iter()
        .map(|(name, t)| {
            let t = change(&name, t);
            (name, t)
        })
        .collect();
    candle_core::safetensors::save(&changed, path).unwrap();
}

fn with_nan(t: &Tensor) -> Tensor {
    (t.zeros_like().unwrap() * f64::NAN).unwrap()
}

#[test]
fn usage() {
    let dir = Dir::new();
    dir.run(&["trian"]).misused(&["train"]);
    dir.run(&["eval", "--data", "rows.jsonl"]).misused(&["--model"]);
    dir.run(&["merge", "--model", "m", "--output", "o"]).misused(&["--adapter"]);
    dir.run(&["generate", "--model", "m", "--prompt", "p", "--temperature", "warm"])
        .misused(&["warm", "--temperature"]);
    dir.run(&["train", "--no-such-flag"]).misused(&["--no-such-flag"]);
    assert_eq!(dir.run(&[]).code, Some(2));
}

#[test]
fn models() {
    let dir = Dir::new();
    dir.train(&["--model", "./nowhere"]).fails(&["nowhere"]);
    dir.run(&["generate", "--model", "./nowhere", "--prompt", "a"]).fails(&["nowhere"]);
    dir.run(&["inspect", "./nowhere"]).fails(&["nowhere"]);

    let cut = dir.copy_of_base("cut");
    let weights = cut.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    for length in [0, 4, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&weights, &bytes[..length]).unwrap();
        dir.train(&["--model", "cut"]).fails(&["model.safetensors"]);
    }
    std::fs::remove_file(&weights).unwrap();
    dir.train(&["--model", "cut"]).fails(&["cut", "safetensors"]);

    let model = dir.copy_of_base("unknown");
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    for (key, value, names) in [
        ("model_type", "llamma".into(), vec!["llamma"]),
        ("num_attention_heads", 0.into(), vec!["num_attention_heads"]),
        ("hidden_size", (1u64 << 40).into(), vec!["hidden_size"]),
        ("num_hidden_layers", 3.into(), vec!["layers.2."]),
        ("vocab_size", (-1).into(), vec!["vocab_size"]),
    ] {
        let mut config = config.clone();
        config[key] = value;
        std::fs::write(model.join("config.json"), config.to_string()).unwrap();
        dir.train(&["--model", "unknown"]).fails(&names);
    }
    std::fs::write(model.join("config.json"), "{").unwrap();
    dir.train(&["--model", "unknown"]).fails(&["config.json"]);

    std::fs::write(dir.path("x.gguf"), b"GGUFnot really").unwrap();
    dir.train(&["--model", "x.gguf"]).fails(&["x.gguf"]);

    let bare = dir.copy_of_base("bare");
    std::fs::remove_file(bare.join("tokenizer.json")).unwrap();
    dir.train(&["--model", "bare"]).fails(&["tokenizer.json"]);
}

#[test]
fn weights_that_are_not_numbers() {
    let dir = Dir::new();
    let sick = dir.copy_of_base("sick");
    edit(
        &sick.join("model.safetensors"),
        |name, t| if name.contains("layers.1.mlp.up_proj") { with_nan(&t) } else { t },
    );
    dir.train(&["--model", "sick"]).fails(&[]);
    assert!(!dir.path("out/adapter_model.safetensors").exists());
}

#[test]
fn recipe_keys_and_values() {
    let dir = Dir::new();
    let set = |setting: &str, names: &[&str]| dir.train(&["--set", setting]).fails(names);
    set("train.learning_rat=1", &["learning_rat", "learning_rate"]);
    set("trian.epochs=1", &["trian", "train"]);
    set("method.lora_alhpa=1", &["lora_alhpa", "lora_alpha"]);
    set("method.target_modules=[\"q_prj\"]", &["q_prj", "q_proj"]);
    set("method.target_modules=\"nothing.*\"", &["nothing.*"]);
    set("method.type=lroa", &["lroa", "lora"]);
    set("method.r=0", &["r"]);
    set("method.r=\"eight\"", &["r"]);
    set("model.dtype=f33", &["f33", "bf16"]);
    set("model.device=gpu9", &["gpu9", "cpu"]);
    set("model.device=cuda:x", &["cuda:x"]);
    set("data.format=completoin", &["completoin", "completion"]);
    set("train.optimizer=adamv", &["adamv", "adamw"]);
    set("train.scheduler=cosin", &["cosin", "cosine"]);
    set("train.activation_dtype=f16", &["activation_dtype", "f16", "bf16"]);
    set("train.batch_size=0", &["batch_size"]);
    set("train.learning_rate=-1", &["learning_rate"]);
    set("train.learning_rate=nan", &["learning_rate"]);
    set("train.gradient_accumulation=0", &["gradient_accumulation"]);
    set("data.max_length=0", &["max_length"]);
    set("no-equals-sign", &["no-equals-sign", "table.key=value"]);
    dir.run(&["train", "nowhere.toml"]).fails(&["nowhere.toml"]);
    dir.write("broken.toml", "[model\n");
    dir.run(&["train", "broken.toml"]).fails(&["broken.toml"]);
    dir.run(&["train"]).fails(&["--model"]);
}

#[test]
fn rows_of_data() {
    let dir = Dir::new();
    let good = r#"{"prompt": "a", "completion": "b"}"#;
    let data = |text: &str, names: &[&str]| {
        dir.write("bad.jsonl", text);
        dir.train(&["--data", "bad.jsonl"]).fails(names);
    };
    data(&format!("{good}\n{good}\n{{\"prompt\": \n"), &["bad.jsonl:3"]);
    data(&format!("{good}\n{{\"prompt\": \"a\"}}\n"), &["bad.jsonl:2", "completion"]);
    data(&format!("{good}\n{{\"prompt\": \"a\", \"completion\": 7}}\n"), &["bad.jsonl:2", "completion"]);
    data(&format!("{good}\n[1, 2]\n"), &["bad.jsonl:2"]);
    data("", &["bad.jsonl"]);
    data("\n\n", &["bad.jsonl"]);
    dir.train(&["--data", "nowhere.jsonl"]).fails(&["nowhere.jsonl"]);
    dir.train(&["--data", "rows.xls"]).fails(&["rows.xls"]);
    std::fs::write(dir.path("latin1.jsonl"), b"{\"prompt\": \"\xe9\", \"completion\": \"b\"}\n").unwrap();
    dir.train(&["--data", "latin1.jsonl"]).fails(&["latin1.jsonl"]);

    let tokens = |text: &str, names: &[&str]| {
        dir.write("ids.jsonl", text);
        dir.train(&["--data", "ids.jsonl", "--format", "tokens"]).fails(names);
    };
    tokens("{\"input_ids\": [1, 2, 99999], \"labels\": [1, 2, 3]}\n", &["ids.jsonl:1", "99999"]);
    tokens("{\"input_ids\": [1, 2, 3], \"labels\": [1, 2, 99999]}\n", &["ids.jsonl:1", "99999"]);
    tokens("{\"input_ids\": [1, 2, 3], \"labels\": [-100, -100, -100]}\n", &["ids.jsonl"]);
    tokens("{\"input_ids\": [1, 2, 3], \"labels\": [1, 2]}\n", &["ids.jsonl:1"]);
    tokens("{\"input_ids\": [], \"labels\": []}\n", &["ids.jsonl"]);

    dir.write(
        "chat.jsonl",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n",
    );
    dir.train(&["--data", "chat.jsonl", "--format", "chat"]).fails(&["chat template"]);
    let model = base().to_str().unwrap();
    dir.run(&["generate", "--model", model, "--chat", "--prompt", "a"]).fails(&["chat template"]);
    dir.run(&["generate", "--model", model, "--prompt", ""]).fails(&["prompt"]);
    dir.run(&["eval", "--model", model, "--data", "bad.jsonl"]).fails(&["bad.jsonl"]);
    dir.run(&["eval", "--model", model, "--data", "rows.jsonl", "--batch-size", "0"]).fails(&["batch"]);
}

#[test]
fn adapters() {
    let dir = Dir::new();
    dir.train(&["--set", "train.max_steps=1"]).ok();
    let model = base().to_str().unwrap();
    let eval = |adapter: &str| dir.run(&["eval", "--model", model, "--adapter", adapter, "--data", "rows.jsonl"]);
    eval("./nowhere").fails(&["nowhere"]);

    let other = pretrain(&dir, 64);
    let other = other.to_str().unwrap();
    dir.run(&["eval", "--model", other, "--adapter", "out", "--data", "rows.jsonl"]).fails(&["q_proj", "32", "64"]);
    dir.run(&["merge", "--model", other, "--adapter", "out", "--output", "merged"]).fails(&["q_proj"]);
    assert!(!dir.path("merged").exists());
    dir.train(&["--model", other, "--adapter", "out", "--output", "again"]).fails(&["q_proj"]);

    let damaged = |name: &str| {
        crate::harness::copy(&dir.path("out"), &dir.path(name));
        dir.path(name).join("adapter_model.safetensors")
    };
    edit(&damaged("sick"), |name, t| if name.contains("layers.1.self_attn.v_proj.lora_B") { with_nan(&t) } else { t });
    eval("sick").fails(&["layers.1.self_attn.v_proj.lora_B", "NaN"]);

    let file = damaged("cut");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 10]).unwrap();
    eval("cut").fails(&["adapter_model.safetensors"]);

    damaged("config");
    dir.write("config/adapter_config.json", r#"{"peft_type": "LORRA"}"#);
    eval("config").fails(&["LORRA"]);
    dir.write("config/adapter_config.json", "not json");
    eval("config").fails(&["adapter_config.json"]);
    dir.run(&["inspect", "config"]).fails(&["adapter_config.json"]);

    // Keys of [method] and an adapter's own config cannot both hold.
    dir.train(&["--adapter", "out", "--output", "again", "--set", "method.r=8"]).fails(&["method.r", "init_from"]);
}

#[test]
fn outputs() {
    let dir = Dir::new();
    dir.write("file", "kept");
    dir.train(&["--output", "file"]).fails(&["file"]);
    dir.train(&["--output", "file/below"]).fails(&["file/below"]);
    assert_eq!(dir.read("file"), b"kept");
    dir.train(&["--set", "train.max_steps=1"]).ok();
    let model = base().to_str().unwrap();
    let merge = |more: &[&str]| dir.run(&[&["merge", "--model", model, "--adapter", "out"], more].concat());
    merge(&["--output", "file"]).fails(&["file"]);
    assert_eq!(dir.read("file"), b"kept");
    merge(&["--output", "m", "--format", "onnx"]).fails(&["onnx", "safetensors"]);
    merge(&["--output", "m", "--dtype", "f33"]).fails(&["f33"]);
    merge(&["--output", "m", "--format", "gguf", "--quantize", "q9"]).fails(&["q9", "q8_0"]);
    merge(&["--output", "m", "--quantize", "q8_0"]).fails(&["--format gguf"]);
    assert!(!dir.path("m").exists());
}

#[cfg(unix)]
#[test]
fn a_folder_that_cannot_be_written() {
    use std::os::unix::fs::PermissionsExt;
    let dir = Dir::new();
    std::fs::create_dir(dir.path("locked")).unwrap();
    std::fs::set_permissions(dir.path("locked"), std::fs::Permissions::from_mode(0o555)).unwrap();
    if std::fs::write(dir.path("locked/probe"), "").is_ok() {
        eprintln!("skipped: this user may write everywhere");
        return;
    }
    dir.train(&["--output", "locked"]).fails(&["locked"]);
    dir.train(&["--output", "locked/out"]).fails(&["locked/out"]);
}

/// A disk that fills up while a run writes to it, where the system has one to offer.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_full() {
    let dir = Dir::new();
    std::fs::create_dir(dir.path("out")).unwrap();
    std::os::unix::fs::symlink("/dev/full", dir.path("out/metrics.jsonl")).unwrap();
    let ran = dir.train(&[]);
    // A logger that replaces the link by a file of its own has room and may finish.
    if ran.code != Some(0) {
        ran.fails(&["metrics.jsonl"]);
    }
}
