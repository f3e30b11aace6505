//! Methods other than LoRA on the whole road.

use serde_json::{Value, json};

use crate::harness::{Dir, Ran, base, eval_loss, rows, steps};

/// Trains `method` on the tiny base into `out`.
fn train(dir: &Dir, method: &str) {
    dir.write("rows.jsonl", &rows());
    train_on_rows(dir, method).ok();
}

fn train_on_rows(dir: &Dir, method: &str) -> Ran {
    let recipe = format!(
        "[model]\npath = {:?}\n[method]\n{method}\n[data]\ntrain = \"rows.jsonl\"\nformat = \"completion\"\n[train]\n\
         batch_size = 4\nlearning_rate = 3e-2\nmax_steps = 30\n[output]\ndir = \"out\"\n",
        base().display().to_string()
    );
    dir.write("recipe.toml", &recipe);
    dir.run(&["train", "recipe.toml"])
}

/// The same rows, each of a task.
fn rows_of_tasks(task: impl Fn(usize) -> Value) -> String {
    let with_task = |(i, line): (usize, &str)| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row["task_id"] = task(i);
        format!("{row}\n")
    };
    rows().lines().enumerate().map(with_task).collect()
}

#[test]
fn rows_name_their_tasks() {
    let model = base().display().to_string();
    for method in [
        "type = \"poly\"\nr = 2\nn_tasks = 3\ntarget_modules = [\"q_proj\", \"v_proj\", \"up_proj\"]",
        "type = \"multitask_prompt\"\nnum_virtual_tokens = 5\nnum_tasks = 3\nnum_ranks = 2",
    ] {
        let dir = Dir::new();
        dir.write("rows.jsonl", &rows());
        train_on_rows(&dir, method).fails(&["rows.jsonl:1", "`task_id`", "0 to 2"]);
        dir.write("rows.jsonl", &rows_of_tasks(|i| json!(if i == 5 { 3 } else { 1 })));
        train_on_rows(&dir, method).fails(&["rows.jsonl:6", "task_id is 3"]);
        assert!(!dir.path("out/adapter_model.safetensors").exists());
        dir.write("rows.jsonl", &rows_of_tasks(|i| json!(i % 3)));
        train_on_rows(&dir, method).ok();
        let losses: Vec<f64> = steps(&dir, "out").iter().filter_map(|step| step["loss"].as_f64()).collect();
        assert!(losses[24..].iter().sum::<f64>() < losses[..6].iter().sum::<f64>(), "{method}: {losses:?}");

        let of_task = |task: &str| {
            let args =
                ["eval", "--model", &model, "--adapter", "out", "--data", "rows.jsonl", "--json", "--task-id", task];
            dir.run(&args)
        };
        let loss = |ran: Ran| ran.json()["loss"].as_f64().unwrap();
        let (mixed, first, last) = (eval_loss(&dir, &model, Some("out")), loss(of_task("0")), loss(of_task("2")));
        assert!(first != last && mixed != first, "{mixed}, {first}, {last}");
        dir.write("rows.jsonl", &rows_of_tasks(|_| json!(2)));
        assert!((eval_loss(&dir, &model, Some("out")) - last).abs() < 1e-6);
        of_task("3").fails(&["--task-id", "0 to 2"]);

        let generate = ["generate", "--model", &model, "--adapter", "out", "--prompt", "the", "--max-new-tokens", "3"];
        dir.run(&generate).fails(&["--task-id", "3 tasks"]);
        dir.run(&[&generate[..], &["--task-id", "1"]].concat()).ok();
        let merge = ["merge", "--model", &model, "--adapter", "out", "--output", "merged", "--dtype", "f32"];
        dir.run(&merge).fails(&["cannot be merged"]);
        assert!(!dir.path("merged").exists());
        if method.contains("poly") {
            dir.run(&[&merge[..], &["--task-id", "2"]].concat()).ok();
            let merged = eval_loss(&dir, "merged", None);
            assert!((merged - last).abs() < 1e-4, "{merged} and {last}");
            let convert = ["convert", "--adapter", "out", "--to", "lora", "--model", &model, "--output", "plain"];
            dir.run(&convert).fails(&["task"]);
            dir.run(&[&convert[..], &["--task-id", "2"]].concat()).ok();
            let plain = eval_loss(&dir, &model, Some("plain"));
            assert!((plain - last).abs() < 1e-3, "{plain} and {last}");
        }
    }
    let dir = Dir::new();
    train(&dir, "r = 2");
    let eval = ["eval", "--model", &model, "--data", "rows.jsonl", "--adapter", "out", "--task-id", "0"];
    dir.run(&eval).fails(&["--task-id", "every task"]);
    train_on_rows(&dir, "type = \"xlora\"").fails(&["adapters", "folders of LoRA adapters"]);
}

#[test]
fn every_method_learns_and_writes() {
    for method in [
        "type = \"ia3\"",
        "type = \"ln\"",
        "type = \"prefix\"\nnum_virtual_tokens = 6\nprefix_projection = true",
        "type = \"prompt\"\nnum_virtual_tokens = 6\nprompt_tuning_init = \"TEXT\"\nprompt_tuning_init_text = \"the\"",
        "type = \"p_tuning\"\nnum_virtual_tokens = 6",
        "type = \"adaption_prompt\"\nadapter_len = 6\nadapter_layers = 2",
        "type = \"poly\"\nr = 4\ntarget_modules = \"all-linear\"",
        "type = \"cpt\"\ncpt_token_ids = [9, 20, 31, 42]\ncpt_tokens_type_mask = [1, 2, 3, 4]\nopt_projection_epsilon = 20\nopt_projection_format_epsilon = 20",
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

/// The keys and values of a text are what the base makes of its embeddings, so a prompt of the same text begins with the same loss.
#[test]
fn a_prefix_starts_from_a_text() {
    let dir = Dir::new();
    let text = "the cat sat on the mat and the dog";
    let first = |method: String| {
        train(&dir, &method);
        steps(&dir, "out")[0]["loss"].as_f64().unwrap()
    };
    let prefix = |count: usize| format!("type = \"prefix\"\nnum_virtual_tokens = {count}\ninit_text = {text:?}");
    let prompt = format!(
        "type = \"prompt\"\nnum_virtual_tokens = 5\nprompt_tuning_init = \"TEXT\"\nprompt_tuning_init_text = {text:?}"
    );
    let (as_prefix, as_prompt) = (first(prefix(5)), first(prompt));
    assert!((as_prefix - as_prompt).abs() < 1e-4, "{as_prefix} and {as_prompt}");
    let config: Value = serde_json::from_slice(&dir.read("out/adapter_config.json")).unwrap();
    assert_eq!(config.get("init_text"), None);

    train_on_rows(&dir, &prefix(100)).fails(&["init_text", "num_virtual_tokens"]);
    let projected = format!("{}\nprefix_projection = true", prefix(5));
    train_on_rows(&dir, &projected).fails(&["init_text", "prefix_projection"]);
    train_on_rows(&dir, "r = 2\ninit_text = \"the\"").fails(&["init_text"]);
    train_on_rows(&dir, "init_from = \"out\"\ninit_text = \"the\"").fails(&["init_text", "init_from"]);
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
    train(&dir, "type = \"vera\"\nr = 2");
    convert("adapterhub", "out", "vera").fails(&["VERA"]);
    assert!(!dir.path("vera").exists());
}
