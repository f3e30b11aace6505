//! `combine`, and `convert --to lora`.

use candle_core::{Device, Tensor};
use peft_core::SafetensorsFile;
use peft_models::gguf::Gguf;
use serde_json::{Value, json};

use crate::harness::{Dir, base, copy, eval_loss, rows};

/// Trains a LoRA with these keys of `[method]` into `name`.
fn train(dir: &Dir, name: &str, method: &str, seed: u64) {
    dir.write("rows.jsonl", &rows());
    let recipe = format!(
        "[model]\npath = {:?}\n[method]\n{method}\n[data]\ntrain = \"rows.jsonl\"\nformat = \"completion\"\n[train]\n\
         batch_size = 4\nlearning_rate = 3e-2\nmax_steps = 8\nseed = {seed}\n[output]\ndir = {name:?}\n",
        base().display().to_string()
    );
    dir.write("recipe.toml", &recipe);
    dir.run(&["train", "recipe.toml"]).ok();
}

fn config(dir: &Dir, name: &str) -> Value {
    serde_json::from_slice(&dir.read(&format!("{name}/adapter_config.json"))).unwrap()
}

#[test]
fn halves_of_an_adapter_are_the_adapter() {
    let dir = Dir::new();
    let model = base().display().to_string();
    train(&dir, "a", "r = 4\nlora_alpha = 6\nuse_rslora = true\ntarget_modules = [\"q_proj\", \"down_proj\"]", 1);
    let wanted = eval_loss(&dir, &model, Some("a"));
    for (kind, rank) in [("cat", 12), ("linear", 4), ("svd", 4), ("magnitude_prune", 4)] {
        let mut args =
            vec!["combine", "--adapter", "a=0.75", "--adapter", "a=0.5", "--adapter", "a=-0.25", "--type", kind];
        args.extend(["--density", "1", "--output", kind, "--json"]);
        let facts = dir.run(&args).json();
        assert_eq!((&facts["type"], &facts["rank"]), (&json!(kind), &json!(rank)), "{facts}");
        assert!(facts["relative_error"].as_f64().unwrap() < 1e-5, "{facts}");
        assert_eq!(facts["sites"].as_array().unwrap().len(), 4);
        let loss = eval_loss(&dir, &model, Some(kind));
        assert!((loss - wanted).abs() < 1e-4, "{kind}: {loss} and {wanted}");
        let written = config(&dir, kind);
        assert_eq!(
            (&written["r"], &written["use_rslora"], &written["inference_mode"]),
            (&json!(rank), &json!(false), &json!(true))
        );
        assert_eq!(written["target_modules"], json!(["down_proj", "q_proj"]));
    }
    // Taken away from itself, nothing is left; the default is PEFT's svd.
    let gone = dir.run(&["combine", "--adapter", "a", "--adapter", "a=-1", "--output", "gone", "--json"]).json();
    assert_eq!(gone["type"], "svd");
    let (without, loss) = (eval_loss(&dir, &model, None), eval_loss(&dir, &model, Some("gone")));
    assert!((loss - without).abs() < 1e-6, "{loss} and {without}");
}

#[test]
fn sums_are_those_of_merging_one_after_another() {
    let dir = Dir::new();
    let model = base().display().to_string();
    train(&dir, "a", "r = 4\ntarget_modules = [\"q_proj\", \"v_proj\"]\nmodules_to_save = [\"lm_head\"]", 1);
    train(&dir, "b", "r = 2\ntarget_modules = \"all-linear\"\nuse_dora = true", 2);
    dir.run(&["combine", "--adapter", "a", "--adapter", "b", "--output", "c"]).fails(&["b", "use_dora", "--model"]);
    assert!(!dir.path("c").exists());
    for kind in ["cat", "linear"] {
        let mut args = vec!["combine", "--adapter", "a", "--adapter", "b", "--type", kind, "--model", &model];
        args.extend(["--output", kind]);
        dir.run(&args).ok();
        assert_eq!(config(&dir, kind)["use_dora"], true);
    }
    let (cat, linear) = (eval_loss(&dir, &model, Some("cat")), eval_loss(&dir, &model, Some("linear")));
    assert!((cat - linear).abs() < 1e-5, "{cat} and {linear}");
    // Where both touch a weight, the second's norms are those of what the first left: so they are compared on sites apart.
    train(&dir, "d", "r = 2\ntarget_modules = [\"o_proj\", \"up_proj\"]\nuse_dora = true", 3);
    dir.run(&["combine", "--adapter", "a", "--adapter", "d", "--model", &model, "--output", "e"]).ok();
    dir.run(&["merge", "--model", &model, "--adapter", "a", "--adapter", "d", "--output", "merged", "--dtype", "f32"])
        .ok();
    let (combined, merged) = (eval_loss(&dir, &model, Some("e")), eval_loss(&dir, "merged", None));
    assert!((combined - merged).abs() < 1e-5, "{combined} and {merged}");
}

#[test]
fn heads_that_differ_need_the_base() {
    let dir = Dir::new();
    let model = base().display().to_string();
    for (name, seed) in [("a", 1), ("b", 2)] {
        train(&dir, name, "r = 2\ntarget_modules = [\"q_proj\"]\nmodules_to_save = [\"lm_head\"]", seed);
    }
    let combine = |output: &str, more: &[&str]| {
        let mut args =
            vec!["combine", "--adapter", "a=0.5", "--adapter", "b=0.5", "--type", "linear", "--output", output];
        args.extend(more);
        dir.run(&args)
    };
    combine("c", &[]).fails(&["lm_head", "--model"]);
    assert!(!dir.path("c").exists());
    combine("c", &["--model", &model]).ok();
    assert_eq!(config(&dir, "c")["modules_to_save"], json!(["lm_head"]));
    dir.run(&["eval", "--model", &model, "--adapter", "c", "--data", "rows.jsonl"]).ok();
}

#[test]
fn factors_of_ia3_are_combined() {
    let dir = Dir::new();
    let model = base().display().to_string();
    train(&dir, "a", "type = \"ia3\"", 1);
    let facts = dir.run(&["combine", "--adapter", "a=1.5", "--adapter", "a=-0.5", "--output", "c", "--json"]).json();
    assert_eq!(facts["type"], "linear");
    let (one, other) = (eval_loss(&dir, &model, Some("a")), eval_loss(&dir, &model, Some("c")));
    assert!((one - other).abs() < 1e-6, "{one} and {other}");
    dir.run(&["combine", "--adapter", "a", "--type", "ties", "--output", "d"]).fails(&["IA3", "--model"]);
    // with a LoRA, as a LoRA
    train(&dir, "b", "r = 2", 2);
    let args = ["combine", "--adapter", "a", "--adapter", "b", "--model", &model, "--svd-rank", "32", "--output", "e"];
    dir.run(&args).ok();
    assert_eq!(config(&dir, "e")["peft_type"], "LORA");
    dir.run(&["eval", "--model", &model, "--adapter", "e", "--data", "rows.jsonl"]).ok();
}

#[test]
fn any_change_of_weights_becomes_a_lora() {
    let dir = Dir::new();
    let model = base().display().to_string();
    for method in [
        "type = \"loha\"\nr = 4",
        "type = \"ia3\"",
        "type = \"oft\"\noft_block_size = 4",
        "r = 3\nuse_dora = true",
        "r = 4\ninit_lora_weights = \"pissa\"",
    ] {
        train(&dir, "out", method, 1);
        let wanted = eval_loss(&dir, &model, Some("out"));
        let to = |output: &str, more: &[&str]| {
            let mut args = vec!["convert", "--adapter", "out", "--to", "lora", "--output", output, "--json"];
            args.extend(more);
            dir.run(&args)
        };
        let exact = to("exact", &["--model", &model, "--max-error", "1e-6"]).json();
        let loss = eval_loss(&dir, &model, Some("exact"));
        assert!((loss - wanted).abs() < 1e-4, "{method}: {loss} and {wanted}");
        assert!(exact["relative_error"].as_f64().unwrap() <= 1e-6);
        let error = |rank: &str| {
            let facts = to(&format!("rank{rank}"), &["--model", &model, "--rank", rank]).json();
            assert_eq!(config(&dir, &format!("rank{rank}"))["r"].to_string(), rank);
            facts["relative_error"].as_f64().unwrap()
        };
        let (one, two) = (error("1"), error("2"));
        assert!(one > two && two < 1.0, "{method}: {one} and {two}");
        // A hundredth, where nothing is said.
        assert!(to("plain", &["--model", &model]).json()["relative_error"].as_f64().unwrap() <= 0.01);
        if !method.contains("pissa") {
            to("none", &[]).fails(&["out", "--model"]);
        }
        assert!(!dir.path("none").exists());
        for name in ["out", "exact", "rank1", "rank2", "plain"] {
            std::fs::remove_dir_all(dir.path(name)).unwrap();
        }
    }
    train(&dir, "out", "type = \"prefix\"\nnum_virtual_tokens = 4", 1);
    let convert = ["convert", "--adapter", "out", "--to", "lora", "--model", &model, "--output", "lora"];
    dir.run(&convert).fails(&["PREFIX_TUNING", "virtual tokens"]);
    dir.run(&["convert", "--adapter", "out", "--to", "peft", "--rank", "3", "--output", "lora"]).fails(&["--to lora"]);
    std::fs::remove_dir_all(dir.path("out")).unwrap();
    train(&dir, "out", "type = \"ln\"", 1);
    dir.run(&convert).fails(&["norm"]);
    assert!(!dir.path("lora").exists());
}

#[test]
fn wrong_input_is_named_and_nothing_is_written() {
    let dir = Dir::new();
    train(&dir, "a", "r = 2\ntarget_modules = [\"q_proj\"]", 1);
    let combine = |adapters: &[&str], more: &[&str]| {
        let mut args = vec!["combine", "--output", "c"];
        adapters.iter().for_each(|a| args.extend(["--adapter", a]));
        args.extend(more);
        dir.run(&args)
    };
    combine(&["a=x"], &[]).misused(&["`x`", "PATH=WEIGHT"]);
    combine(&["a=nan"], &[]).misused(&["`nan`"]);
    combine(&["a=1"], &["--type", "tie"]).misused(&["`tie`", "ties"]);
    combine(&["a=1"], &["--density", "0"]).misused(&["--density"]);
    combine(&["a=1"], &["--density", "1.5"]).misused(&["--density"]);
    combine(&["a=1"], &["--svd-rank", "0"]).misused(&["--svd-rank"]);
    combine(&[], &[]).misused(&["--adapter"]);
    combine(&["a=1"], &["--type", "cat", "--svd-rank", "2"]).fails(&["cat"]);
    combine(&["nowhere=1"], &[]).fails(&["nowhere"]);

    copy(&dir.path("a"), &dir.path("broken"));
    let weights = dir.path("broken/adapter_model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, &bytes).unwrap();
    combine(&["a=1", "broken=0"], &[]).fails(&["broken", "lora_", "not finite"]);
    copy(&dir.path("a"), &dir.path("other"));
    let other = dir.path("other/adapter_config.json");
    let edited = std::fs::read_to_string(&other).unwrap().replace("\"r\": 2", "\"r\": 3");
    std::fs::write(&other, edited).unwrap();
    combine(&["a=1", "other=1"], &[]).fails(&["other", "q_proj", "rank 2"]);
    assert!(!dir.path("c").exists());

    // What is there stays.
    dir.write("c/mine.txt", "mine");
    combine(&["a=1"], &[]).fails(&["c holds files already"]);
    assert_eq!(dir.read("c/mine.txt"), b"mine");
}

/// What the file adds to a matrix of a merged GGUF model is what llama.cpp is to add: `alpha / r · B·A`, in its order of rows.
#[test]
fn a_gguf_adapter_is_the_difference_of_merged_models() {
    let dir = Dir::new();
    let model = base().display().to_string();
    train(
        &dir,
        "a",
        "r = 4\nlora_alpha = 6\ntarget_modules = \"all-linear\"\nrank_pattern = { q_proj = 2, up_proj = 3 }",
        1,
    );
    let convert = |adapter: &str, output: &str, more: &[&str]| {
        let mut args = vec!["convert", "--adapter", adapter, "--to", "gguf", "--output", output, "--json"];
        args.extend(more);
        dir.run(&args)
    };
    convert("a", "a.gguf", &[]).fails(&["--model"]);
    assert_eq!(convert("a", "a.gguf", &["--model", &model]).json()["tensors"], 2 * 2 * 7);
    convert("a", "a.gguf", &["--model", &model]).fails(&["a.gguf"]);
    dir.run(&["combine", "--adapter", "a", "--adapter", "a=-1", "--output", "nothing"]).ok();
    for (adapter, output) in [("a", "merged.gguf"), ("nothing", "base.gguf")] {
        let args = ["merge", "--model", &model, "--adapter", adapter, "--format", "gguf", "--quantize", "f32"];
        dir.run(&[&args[..], &["--output", output]].concat()).ok();
    }
    let open = |name: &str| Gguf::open(dir.path(name)).unwrap();
    let (adapter, merged, before) = (open("a.gguf"), open("merged.gguf"), open("base.gguf"));
    for (key, value) in [("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", "llama")] {
        assert_eq!(adapter.text(key).unwrap(), Some(value));
    }
    let alpha = adapter.number("adapter.lora.alpha").unwrap().unwrap();
    // As they lie in the file: a reader by Hugging Face's names would put the rows back.
    let raw = |gguf: &Gguf, file: &str, name: &str| {
        let info = gguf.tensor(name).unwrap_or_else(|| panic!("no {name}"));
        let bytes = dir.read(file);
        let values: Vec<f32> =
            bytes[info.bytes()].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        Tensor::from_vec(values, info.shape.clone(), &Device::Cpu).unwrap()
    };
    let mut largest = 0f32;
    for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
        let name = format!("blk.1.{name}.weight");
        let a = raw(&adapter, "a.gguf", &format!("{name}.lora_a"));
        let b = raw(&adapter, "a.gguf", &format!("{name}.lora_b"));
        let added = (b.matmul(&a).unwrap() * (alpha / a.dim(0).unwrap() as f64)).unwrap();
        let wanted = (raw(&merged, "merged.gguf", &name) - raw(&before, "base.gguf", &name)).unwrap();
        let most = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        let apart = most(&(added - &wanted).unwrap());
        assert!(apart < 1e-5, "{name}: {apart}");
        largest = largest.max(most(&wanted));
    }
    assert!(largest > 1e-3);

    train(&dir, "d", "r = 2\nuse_dora = true", 2);
    convert("d", "d.gguf", &["--model", &model]).fails(&["lora_magnitude_vector", "convert --to lora"]);
    train(&dir, "e", "r = 2\ntarget_modules = [\"embed_tokens\", \"q_proj\"]", 2);
    convert("e", "e.gguf", &["--model", &model]).fails(&["embed_tokens", "llama.cpp"]);
    assert!(!dir.path("d.gguf").exists() && !dir.path("e.gguf").exists());
}

#[test]
fn mlx_has_transposed_factors_and_a_raw_scale() {
    let dir = Dir::new();
    train(&dir, "a", "r = 2\nlora_alpha = 7\nuse_rslora = true\ntarget_modules = [\"q_proj\", \"down_proj\"]", 1);
    dir.run(&["convert", "--adapter", "a", "--to", "mlx", "--output", "m"]).ok();
    let (ours, theirs) = (
        SafetensorsFile::open(dir.path("a/adapter_model.safetensors")).unwrap(),
        SafetensorsFile::open(dir.path("m/adapters.safetensors")).unwrap(),
    );
    assert_eq!(theirs.names().len(), 8);
    let get = |file: &SafetensorsFile, name: &str| file.tensor(name, &Device::Cpu).unwrap();
    let site = "model.layers.1.mlp.down_proj";
    let product = get(&theirs, &format!("{site}.lora_a")).matmul(&get(&theirs, &format!("{site}.lora_b"))).unwrap();
    let of = |part: &str| get(&ours, &format!("base_model.model.{site}.lora_{part}.weight"));
    let wanted = (of("B").matmul(&of("A")).unwrap() * (7.0 / 2f64.sqrt())).unwrap().t().unwrap();
    let apart = (product - &wanted).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
    assert!(apart.to_scalar::<f32>().unwrap() < 1e-5);
    let written = config(&dir, "m");
    assert_eq!(written["lora_parameters"]["keys"], json!(["mlp.down_proj", "self_attn.q_proj"]));
    assert_eq!(written["lora_parameters"]["scale"], 1.0);
}
