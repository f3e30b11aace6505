//! Training by forward passes alone: it learns, stops and goes on bit for bit, and is made again from its record.

use serde_json::{Value, json};

use crate::harness::{Dir, base, eval_loss, steps};

const MEZO: [&str; 12] = [
    "--set",
    "train.optimizer=mezo",
    "--set",
    "method.lora_dropout=0",
    "--set",
    "train.mezo_eps=1e-2",
    "--set",
    "train.scheduler=constant",
    "--set",
    "method.target_modules=all-linear",
    "--set",
    "method.lora_alpha=16",
];

fn train(dir: &Dir, more: &[&str]) -> crate::harness::Ran {
    dir.train(&[&MEZO[..], more].concat())
}

fn adapter(dir: &Dir, folder: &str) -> Vec<u8> {
    dir.read(&format!("{folder}/adapter_model.safetensors"))
}

fn mean(values: &[Value], key: &str) -> f64 {
    values.iter().map(|row| row[key].as_f64().unwrap()).sum::<f64>() / values.len() as f64
}

#[test]
fn it_learns_and_its_record_makes_the_adapter_again() {
    let dir = Dir::new();
    let more = ["train.max_steps=300", "train.learning_rate=2e-3", "train.mezo_samples=2", "train.weight_decay=0.01"];
    train(&dir, &more.map(|setting| ["--set", setting]).concat()).ok();
    let rows = steps(&dir, "out");
    assert_eq!(rows.len(), 300);
    let (first, last) = (mean(&rows[..30], "loss"), mean(&rows[270..], "loss"));
    assert!(last < first - 0.3, "{first} and {last}");

    let model = base().display().to_string();
    let size = std::fs::metadata(dir.path("out/mezo.safetensors")).unwrap().len();
    assert!(size < 6000, "{size}");
    let replay = |record: &str, output: &str, more: &[&str]| {
        dir.run(&[&["replay", record, "--output", output][..], more].concat())
    };
    assert_eq!(replay("out", "again", &["--json"]).json()["steps"], 300);
    assert!(adapter(&dir, "again") == adapter(&dir, "out"), "the adapter differs");
    assert_eq!(eval_loss(&dir, &model, Some("again")), eval_loss(&dir, &model, Some("out")));
    // A part of it is the adapter as it was then.
    replay("out/mezo.safetensors", "half", &["--steps", "150"]).ok();
    assert!(adapter(&dir, "half") != adapter(&dir, "out"));

    replay("out", "no", &["--steps", "301"]).fails(&["300 steps"]);
    replay("out", "no", &["--adapter", "again"]).fails(&["did not start from these parameters", "--adapter"]);
    replay("out/adapter_model.safetensors", "no", &[]).fails(&["no record of a mezo run"]);
    replay("nowhere", "no", &[]).fails(&["nowhere"]);
    let mut damaged = dir.read("out/mezo.safetensors");
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    std::fs::write(dir.path("damaged.safetensors"), damaged).unwrap();
    replay("damaged.safetensors", "no", &[]).fails(&["damaged.safetensors", "damaged"]);
    assert!(!dir.path("no").exists());
}

#[test]
fn a_resumed_run_ends_as_if_it_had_not_stopped() {
    ends_as_if_it_had_not_stopped(&[]);
    ends_as_if_it_had_not_stopped(&["--set", "train.momentum=0.8"]);
}

fn ends_as_if_it_had_not_stopped(settings: &[&str]) {
    let (whole, dir) = (Dir::new(), Dir::new());
    let more = ["--set", "train.max_steps=9", "--set", "output.save_every=4", "--set", "train.gradient_accumulation=2"];
    let more = [&more[..], settings].concat();
    train(&whole, &more).ok();
    train(&dir, &more).ok();
    std::fs::remove_file(dir.path("out/adapter_model.safetensors")).unwrap();
    train(&dir, &[&more[..], &["--resume"]].concat()).ok();
    assert!(adapter(&dir, "out") == adapter(&whole, "out"));
    assert_eq!(dir.read("out/mezo.safetensors").len(), whole.read("out/mezo.safetensors").len());
    dir.run(&["replay", "out", "--output", "again"]).ok();
    assert!(adapter(&dir, "again") == adapter(&whole, "out"));
    // Another number of samples is another run.
    train(&dir, &[&more[..], &["--set", "train.mezo_samples=2", "--resume"]].concat()).fails(&["another run"]);
}

#[test]
fn every_kind_of_parameter_is_trained_and_made_again() {
    for method in [
        "type = \"full\"",
        "type = \"last_layers\"\nnum_layers = 1",
        "type = \"bitfit\"\nadd_biases = true",
        "type = \"prefix\"\nnum_virtual_tokens = 3",
        "type = \"prompt\"\nnum_virtual_tokens = 3\nprompt_tuning_init = \"TEXT\"\nprompt_tuning_init_text = \"the\"",
        "type = \"ia3\"",
    ] {
        let dir = Dir::new();
        dir.write("rows.jsonl", &crate::harness::rows());
        let recipe = format!(
            "[model]\npath = {:?}\n[method]\n{method}\n[data]\ntrain = \"rows.jsonl\"\nformat = \"completion\"\n[train]\n\
             batch_size = 4\nlearning_rate = 1e-4\nmax_steps = 5\noptimizer = \"mezo\"\n[output]\ndir = \"out\"\n",
            base().display().to_string()
        );
        dir.write("recipe.toml", &recipe);
        dir.run(&["train", "recipe.toml"]).ok();
        dir.run(&["replay", "out", "--output", "again"]).ok();
        let file = if method.contains("full") { "model/model.safetensors" } else { "adapter_model.safetensors" };
        assert!(dir.read(&format!("out/{file}")) == dir.read(&format!("again/{file}")), "{method}");
        let plan = dir.run(&["train", "recipe.toml", "--dry-run", "--json"]).json();
        assert_eq!((&plan["optimizer"], &plan["gradient_checkpointing"]), (&json!("mezo"), &json!("None")));
    }
}

/// Rows whose answer is one of two, on a causal model through a template and words.
fn verbalised() -> String {
    let row =
        |i: usize| json!({"text": if i.is_multiple_of(2) { "up" } else { "down" }, "label": i % 2}).to_string() + "\n";
    (0..24).map(row).collect()
}

#[test]
fn scores_without_a_gradient_are_raised() {
    let dir = Dir::new();
    dir.write("classes.jsonl", &verbalised());
    let model = base().display().to_string();
    let recipe = |objective: &str, optimizer: &str| {
        format!(
            "[model]\npath = {model:?}\n[method]\nr = 4\n[data]\ntrain = \"classes.jsonl\"\neval = \"classes.jsonl\"\n\
             format = \"classification\"\ntemplate = \"{{{{ text }}}} is\"\nlabel_words = {{ 0 = \" good\", 1 = \" bad\" }}\n\
             [train]\nbatch_size = 8\nlearning_rate = 1e-3\nmezo_eps = 5e-2\nmax_steps = 12\noptimizer = {optimizer:?}\n\
             objective = {objective:?}\nmetric = \"eval_accuracy\"\n[output]\ndir = \"out\"\neval_every = 4\n"
        )
    };
    for objective in ["accuracy", "f1"] {
        dir.write("recipe.toml", &recipe(objective, "mezo"));
        dir.run(&["train", "recipe.toml"]).ok();
        let rows = steps(&dir, "out");
        assert!(rows.iter().all(|row| (-1.0..=0.0).contains(&row["objective"].as_f64().unwrap())), "{rows:?}");
        let text = String::from_utf8(dir.read("out/metrics.jsonl")).unwrap();
        let evals: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let evals: Vec<&Value> = evals.iter().filter(|row| row.get("eval_loss").is_some()).collect();
        assert!(evals.len() == 3 && evals.iter().all(|e| e["eval_f1"].is_number()), "{evals:?}");
        assert!(dir.path("out/best/adapter_config.json").is_file());
    }
    dir.write("recipe.toml", &recipe("accuracy", "adamw").replace("mezo_eps = 5e-2\n", ""));
    dir.run(&["train", "recipe.toml"]).fails(&["no gradient", "mezo"]);
    dir.write("recipe.toml", &recipe("acuracy", "mezo"));
    dir.run(&["train", "recipe.toml"]).fails(&["did you mean `accuracy`"]);
}

#[test]
fn t_few_trains_on_rows_with_choices() {
    let dir = Dir::new();
    let rows: String = crate::harness::rows();
    let with_choices = rows.lines().map(|line| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        let own = row["completion"].as_str().unwrap().to_string();
        row["choices"] = json!([own, "zzz!", "qq!"]);
        row.to_string() + "\n"
    });
    dir.write("rows.jsonl", &with_choices.collect::<String>());
    let recipe = format!(
        "[model]\npath = {:?}\n[method]\ntype = \"ia3\"\ntarget_modules = \"paper\"\n[data]\ntrain = \"rows.jsonl\"\n\
         eval = \"rows.jsonl\"\nformat = \"completion\"\n[train]\nbatch_size = 4\nlearning_rate = 3e-2\nmax_steps = 30\n\
         objective = \"t_few\"\n[output]\ndir = \"out\"\nsave_every = 10\n",
        base().display().to_string()
    );
    dir.write("recipe.toml", &recipe);
    dir.run(&["train", "recipe.toml"]).ok();
    let rows = steps(&dir, "out");
    assert!(mean(&rows[24..], "objective") < mean(&rows[..6], "objective"), "{rows:?}");
    let first = adapter(&dir, "out");
    dir.run(&["train", "recipe.toml", "--resume"]).ok();
    assert!(adapter(&dir, "out") == first);
    let set = |key: &str| dir.run(&["train", "recipe.toml", "--dry-run", "--set", key]);
    set("train.unlikelihood=0.5").ok();
    set("train.unlikelihood=-1").fails(&["train.unlikelihood"]);
    set("data.packing=true").fails(&["packing"]);
    set("train.objective=loss").ok();
    set("data.choices=[\"a\"]").fails(&["data.choices", "two or more"]);
    dir.write("recipe.toml", &recipe.replace("\"t_few\"", "\"loss\"\nunlikelihood = 1"));
    dir.run(&["train", "recipe.toml", "--dry-run"]).fails(&["train.unlikelihood", "t_few"]);
}

#[test]
fn what_has_no_sense_without_gradients_is_refused_by_name() {
    let dir = Dir::new();
    for (setting, names) in [
        ("train.momentum=1", vec!["train.momentum", "below 1"]),
        ("train.beta1=0.9", vec!["beta1", "adamw"]),
        ("train.max_grad_norm=0.5", vec!["max_grad_norm", "mezo"]),
        ("train.gradient_checkpointing=true", vec!["gradient_checkpointing"]),
        ("train.memory_budget=1GiB", vec!["memory_budget"]),
        ("train.mezo_eps=0", vec!["train.mezo_eps"]),
        ("train.mezo_samples=0", vec!["train.mezo_samples"]),
        ("train.mezo_sample=2", vec!["did you mean `mezo_samples`"]),
        ("method.lora_dropout=0.1", vec!["lora_dropout", "without dropout"]),
    ] {
        train(&dir, &["--set", setting]).fails(&names);
        assert!(!dir.path("out/adapter_model.safetensors").exists(), "{setting}");
    }
    dir.train(&["--set", "train.mezo_eps=0.1"]).fails(&["mezo_eps", "setting of mezo"]);
    let recipe = format!(
        "[model]\npath = {:?}\n[method]\ntype = \"adalora\"\ntotal_step = 200\n[data]\ntrain = \"rows.jsonl\"\nformat = \"completion\"\n\
         [train]\nmax_steps = 200\noptimizer = \"mezo\"\n[output]\ndir = \"out\"\n",
        base().display().to_string()
    );
    dir.write("recipe.toml", &recipe);
    dir.run(&["train", "recipe.toml"]).fails(&["adalora", "gradients"]);
}
