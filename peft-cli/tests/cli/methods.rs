//! Methods other than LoRA on the whole road.

use crate::harness::{Dir, base, eval_loss, rows, steps};

/// Trains `method` on the tiny base into `out`.
fn train(dir: &Dir, method: &str) {
    dir.write("rows.jsonl", &rows());
    let recipe = format!(
        "[model]\npath = {:?}\n[method]\n{method}\n[data]\ntrain = \"rows.jsonl\"\nformat = \"completion\"\n[train]\n\
         batch_size = 4\nlearning_rate = 3e-2\nmax_steps = 30\n[output]\ndir = \"out\"\n",
        base().display().to_string()
    );
    dir.write("recipe.toml", &recipe);
    dir.run(&["train", "recipe.toml"]).ok();
}

#[test]
fn every_method_learns_and_writes() {
    for method in [
        "type = \"ia3\"",
        "type = \"ln\"",
        "type = \"prefix\"\nnum_virtual_tokens = 6\nprefix_projection = true",
        "type = \"prompt\"\nnum_virtual_tokens = 6\nprompt_tuning_init = \"TEXT\"\nprompt_tuning_init_text = \"the\"",
        "type = \"p_tuning\"\nnum_virtual_tokens = 6",
    ] {
        let dir = Dir::new();
        train(&dir, method);
        let losses: Vec<f64> = steps(&dir, "out").iter().filter_map(|step| step["loss"].as_f64()).collect();
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        assert!(mean(&losses[24..]) < mean(&losses[..6]), "{method}: {losses:?}");
        let model = base().display().to_string();
        let generate = ["generate", "--model", &model, "--adapter", "out", "--prompt", "the", "--max-new-tokens", "3"];
        dir.run(&generate).ok();
        dir.run(&["inspect", "out"]).ok();
    }
}

#[test]
fn virtual_tokens_are_not_merged_and_factors_are() {
    let dir = Dir::new();
    let model = base().display().to_string();
    train(&dir, "type = \"prefix\"\nnum_virtual_tokens = 4");
    let merge = ["merge", "--model", &model, "--adapter", "out", "--output", "merged", "--dtype", "f32"];
    dir.run(&merge).fails(&["PREFIX_TUNING cannot be merged"]);
    assert!(!dir.path("merged").exists());

    train(&dir, "type = \"ia3\"");
    dir.run(&merge).ok();
    let (adapted, merged) = (eval_loss(&dir, &model, Some("out")), eval_loss(&dir, "merged", None));
    assert!((adapted - merged).abs() < 1e-4, "{adapted} and {merged}");
}

#[test]
fn bottlenecks_go_to_adapterhub_and_back() {
    let dir = Dir::new();
    let model = base().display().to_string();
    train(&dir, "type = \"bottleneck\"\npreset = \"compacter++\"\nreduction_factor = 4");
    let convert = |to: &str, adapter: &str, output: &str| {
        dir.run(&["convert", "--adapter", adapter, "--to", to, "--output", output, "--name", "style"])
    };
    convert("adapterhub", "out", "theirs").ok();
    assert_eq!(eval_loss(&dir, &model, Some("theirs")), eval_loss(&dir, &model, Some("out")));
    let facts = dir.run(&["inspect", "theirs", "--json"]).ok().json();
    assert_eq!(facts["method"], "BOTTLENECK");
    convert("peft", "theirs", "back").ok();
    assert_eq!(dir.read("back/adapter_model.safetensors"), dir.read("out/adapter_model.safetensors"));

    convert("adapterhub", "back", "out").fails(&["out", "--output"]);
    assert!(dir.path("out/adapter_model.safetensors").is_file());
    let before = eval_loss(&dir, &model, Some("theirs"));
    train(&dir, "init_from = \"theirs\"");
    assert!(eval_loss(&dir, &model, Some("out")) < before);
    train(&dir, "r = 2");
    convert("adapterhub", "out", "lora").fails(&["LORA"]);
    assert!(!dir.path("lora").exists());
}
