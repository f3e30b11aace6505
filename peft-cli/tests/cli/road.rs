//! Recipe → adapter → evaluation, merge, generation.

use crate::harness::{Dir, base, eval_loss, rows, steps};

#[test]
fn from_rows_to_a_merged_model() {
    let dir = Dir::new();
    let model = base().to_str().unwrap();
    let result = dir
        .train(&[
            "--json",
            "--set",
            "train.max_steps=40",
            "--set",
            "output.save_every=20",
            "--set",
            "method.target_modules=all-linear",
        ])
        .json();
    assert_eq!(result["steps"], 40);

    for file in ["adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.toml", "report.html"] {
        assert!(!dir.read(&format!("out/{file}")).is_empty(), "{file}");
    }
    assert!(dir.path("out/checkpoints/step-20").is_dir());
    let events = std::fs::read_dir(dir.path("out/runs")).unwrap().flatten();
    assert!(events.into_iter().any(|e| e.file_name().to_string_lossy().starts_with("events.out.tfevents")));
    let steps = steps(&dir, "out");
    let numbers: Vec<u64> = steps.iter().map(|s| s["step"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=40).collect::<Vec<_>>());
    for key in ["loss", "learning_rate", "grad_norm", "tokens", "seconds"] {
        assert!(steps.iter().all(|s| s[key].is_number()), "{key}");
    }
    let mean =
        |part: &[serde_json::Value]| part.iter().map(|s| s["loss"].as_f64().unwrap()).sum::<f64>() / part.len() as f64;
    assert!(mean(&steps[35..]) < 0.8 * mean(&steps[..5]), "{} then {}", mean(&steps[..5]), mean(&steps[35..]));

    let (before, after) = (eval_loss(&dir, model, None), eval_loss(&dir, model, Some("out")));
    assert!(after < 0.8 * before, "{before} then {after}");

    dir.run(&["merge", "--model", model, "--adapter", "out", "--output", "merged"]).ok();
    let merged = eval_loss(&dir, "merged", None);
    assert!((merged - after).abs() < 1e-4, "{after} with the adapter, {merged} merged");

    let generate =
        ["generate", "--model", model, "--adapter", "out", "--prompt", "say a ", "--max-new-tokens", "8", "--json"];
    let (first, second) = (dir.run(&generate).json(), dir.run(&generate).json());
    assert_eq!(first["text"], second["text"]);
    assert_eq!(first["prompt_tokens"], 6);
    assert!(first["tokens"].as_u64().unwrap() <= 8 && first["tokens_per_second"].is_number());
    let merged = dir.run(&["generate", "--model", "merged", "--prompt", "say a ", "--max-new-tokens", "8", "--json"]);
    assert_eq!(merged.json()["text"], first["text"]);

    let adapter = dir.run(&["inspect", "out", "--json"]).json();
    assert_eq!((adapter["kind"].as_str(), adapter["r"].as_u64()), (Some("adapter"), Some(4)));
    assert_eq!(adapter["sites"].as_array().unwrap().len(), 2 * 7);
    let of_base = dir.run(&["inspect", model, "--json"]).json();
    assert_eq!((of_base["kind"].as_str(), of_base["hidden_size"].as_u64()), (Some("model"), Some(32)));
    dir.run(&["inspect", "merged"]).ok();

    // A second run starts from the first one's adapter; its loss goes on from there.
    let again = dir.train(&["--adapter", "out", "--output", "again", "--set", "train.max_steps=1", "--json"]).json();
    assert!(again["loss"].as_f64().unwrap() < 0.8 * before, "{again}");
}

#[test]
fn accuracy_over_choices() {
    let dir = Dir::new();
    // LoRA on a base of random features does not learn the rule; every weight does.
    let settings = ["train.max_steps=150", "train.batch_size=8"].iter().flat_map(|s| ["--set", s]);
    let recipe = ["train", "--model", base().to_str().unwrap(), "--data", "rows.jsonl", "--format", "completion"];
    let rest = ["--method", "full", "--output", "out", "--set", "train.learning_rate=1e-2"];
    dir.write("rows.jsonl", &rows());
    dir.run(&recipe.into_iter().chain(rest).chain(settings).collect::<Vec<_>>()).ok();
    let model = "out/model";
    let choose = |choices: &[String]| {
        let mut args = vec!["eval", "--model", model, "--data", "rows.jsonl", "--json"];
        args.extend(choices.iter().flat_map(|c| ["--choice", c.as_str()]));
        dir.run(&args).json()
    };
    let all: Vec<String> = (b'a'..=b'k').map(|c| format!("{}!", char::from(c).to_string().repeat(3))).collect();
    let chosen = choose(&all);
    assert!(chosen["accuracy"].as_f64().unwrap() > 0.9, "{chosen}");
    let loss = eval_loss(&dir, model, None);
    assert!((chosen["loss"].as_f64().unwrap() - loss).abs() < 1e-5, "{loss} and {chosen}");
    // The beginning of a completion is likelier than the whole but for the end token, which then counts.
    let mut with_beginnings = all.clone();
    with_beginnings.extend(all.iter().map(|c| c[..2].to_string()));
    let chosen = choose(&with_beginnings);
    assert!(chosen["accuracy"].as_f64().unwrap() > 0.9, "{chosen}");
    let unknown = ["eval", "--model", model, "--data", "rows.jsonl", "--choice", "never"];
    dir.run(&unknown).fails(&["rows.jsonl:1", "never"]);
}

#[test]
fn a_dry_run_shows_the_plan_and_writes_nothing() {
    let dir = Dir::new();
    let plan = dir.train(&["--dry-run", "--set", r#"method.target_modules=["q_proj", "v_proj"]"#]).ok();
    for part in ["4 sites", "q_proj", "trainable", "⟦", "memory"] {
        assert!(plan.stdout.contains(part), "{part} in {}", plan.stdout);
    }
    assert!(!dir.path("out").exists());
    let plan = dir.train(&["--dry-run", "--json"]).json();
    assert_eq!(plan["rows"], 24);
    assert!(plan["trainable_parameters"].as_u64().unwrap() > 0 && plan["estimated_peak_bytes"].is_number());
    assert!(!dir.path("out").exists());
}

#[test]
fn activations_wait_in_the_type_that_the_recipe_says() {
    let dir = Dir::new();
    let in_type = |dtype: &str| {
        let set = format!("train.activation_dtype={dtype}");
        let settings = ["--set", &set, "--output", dtype];
        let peak =
            dir.train(&[&settings[..], &["--dry-run", "--json"]].concat()).json()["estimated_peak_bytes"].clone();
        dir.train(&settings).ok();
        (
            peak.as_f64().unwrap(),
            steps(&dir, dtype).iter().map(|step| step["loss"].as_f64().unwrap()).collect::<Vec<_>>(),
        )
    };
    let ((auto, _), (wide, in_f32), (narrow, in_bf16)) = (in_type("auto"), in_type("f32"), in_type("bf16"));
    assert!(narrow < wide && auto == wide, "{narrow} {wide} {auto}");
    // Eight significant bits of what is kept: the first loss is off by less, the next ones by what the updates are.
    for (f32, bf16) in in_f32.iter().zip(&in_bf16) {
        assert!((f32 - bf16).abs() < 2e-2 * f32, "{in_f32:?} {in_bf16:?}");
    }
    assert_ne!(in_f32, in_bf16);
}

/// A budget below what a whole batch takes with every block run again: rows go in parts, and the run is the same.
#[test]
fn a_batch_goes_in_parts_where_the_budget_asks_for_it() {
    let dir = Dir::new();
    // Parts have masks of their own.
    let fixed = ["train.batch_size=6", "data.shuffle=false", "train.max_steps=5", "method.lora_dropout=0"];
    let fixed: Vec<&str> = fixed.into_iter().flat_map(|setting| ["--set", setting]).collect();
    let plan = |more: &[&str]| dir.train(&[&fixed[..], &["--dry-run", "--json"], more].concat()).json();
    let again = "train.gradient_checkpointing=true";
    let peak = |rows: &str| plan(&["--set", again, "--set", rows])["estimated_peak_bytes"].as_f64().unwrap();
    let (least, whole) = (peak("train.batch_size=1"), peak("train.batch_size=6"));
    assert!(least < whole, "{least} {whole}");

    // A budget has a seventh for what the allocator holds besides.
    let budget = format!("train.memory_budget={:.6}MB", 1.0001 * 7.0 / 6.0 * least / 1e6);
    let in_parts = plan(&["--set", &budget]);
    let rows = in_parts["rows_at_a_time"].as_u64().unwrap();
    assert!(rows == 1 && in_parts["estimated_peak_bytes"].as_f64().unwrap() < whole, "{in_parts}");
    assert_eq!(plan(&[])["rows_at_a_time"], 6);
    assert!(dir.train(&[&fixed[..], &["--dry-run", "--set", &budget]].concat()).ok().stdout.contains("rows at a time"));

    let losses = |output: &str, more: &[&str]| {
        dir.train(&[&fixed[..], &["--output", output], more].concat()).ok();
        steps(&dir, output).iter().map(|step| step["loss"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let (one, parts) = (losses("whole", &[]), losses("parts", &["--set", &budget]));
    assert_eq!((one.len(), parts.len()), (5, 5));
    assert!((one[0] - parts[0]).abs() < 1e-6 * one[0], "{one:?} {parts:?}");
    // Later AdamW divides small gradients by themselves, and rounding with them; in the same order the sums are the same.
    let single = ["--set", "train.batch_size=1", "--set", "train.gradient_accumulation=6"];
    assert_eq!(losses("single", &single), parts);

    let too_small = format!("train.memory_budget={:.6}MB", 0.9 * 7.0 / 6.0 * least / 1e6);
    let refused = dir.train(&[&fixed[..], &["--set", &too_small, "--output", "none"]].concat());
    refused.fails(&["train.memory_budget", "one row at a time", "data.max_length"]);
    assert!(!dir.path("none").exists());
}

#[test]
fn a_recipe_file_counts_its_paths_from_its_own_folder() {
    let dir = Dir::new();
    dir.write("recipes/data/rows.jsonl", &rows());
    let recipe = format!(
        "[model]\npath = {:?}\n[method]\ntype = \"lora\"\nr = 2\n[data]\ntrain = \"data/rows.jsonl\"\n\
         [train]\nmax_steps = 1\n[output]\ndir = \"../there\"\n",
        base()
    );
    dir.write("recipes/r.toml", &recipe);
    dir.run(&["train", "recipes/r.toml"]).ok();
    assert!(dir.path("there/adapter_model.safetensors").is_file());
    // The recipe that the run leaves is a recipe.
    dir.run(&["train", "there/recipe.toml", "--dry-run"]).ok();
}

#[test]
fn help_catalogue_and_completions() {
    let dir = Dir::new();
    let verbs =
        ["train", "eval", "generate", "merge", "combine", "convert", "inspect", "methods", "doctor", "completions"];
    dir.run(&["--version"]).ok();
    let help = dir.run(&["--help"]).ok();
    for verb in verbs {
        assert!(help.stdout.contains(verb), "{verb}");
        assert!(dir.run(&[verb, "--help"]).ok().stdout.contains("Usage:"), "{verb}");
    }
    let methods = dir.run(&["methods", "--json"]).json();
    let lora = methods.as_array().unwrap().iter().find(|m| m["name"] == "lora").unwrap();
    assert_eq!(lora["peft_type"], "LORA");
    for key in ["trainable", "mergeable", "servable"] {
        assert!(lora[key].is_boolean(), "{key}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(dir.run(&["completions", shell]).ok().stdout.contains("peft-cli"), "{shell}");
    }
    let found = dir.run(&["doctor", "--json"]).json();
    let cpu = &found["devices"][0];
    assert!(cpu["name"] == "cpu" && cpu["speed"]["f32_flops"].as_f64().unwrap() > 1e8, "{found}");
    assert!(cpu["speed"]["bandwidth"].as_f64().unwrap() > 1e7, "{found}");
    assert!(
        dir.run(&["doctor", "--quick"])
            .ok()
            .stdout
            .lines()
            .any(|line| line.starts_with("device ") && line.ends_with("cpu"))
    );
}
