//! Black-Box Tuning and Black-Box Prompt Learning: they learn, stop and go on bit for bit, and ask endpoints that may misbehave.

use serde_json::{Value, json};

use crate::endpoint::{Faults, Server};
use crate::harness::{Dir, Ran, base, eval_loss, rows, steps};

fn recipe(dir: &Dir, method: &str, train: &str) {
    dir.write("rows.jsonl", &rows());
    let model = base().display().to_string();
    let text = format!(
        "[model]\npath = {model:?}\n[method]\n{method}\n[data]\ntrain = \"rows.jsonl\"\neval = \"rows.jsonl\"\nformat = \"completion\"\n\
         [train]\nbatch_size = 8\n{train}\n[output]\ndir = \"out\"\nsave_every = 4\n"
    );
    dir.write("recipe.toml", &text);
}

fn mean(values: &[Value], key: &str) -> f64 {
    values.iter().map(|row| row[key].as_f64().unwrap()).sum::<f64>() / values.len() as f64
}

const SEARCH: &str = "optimizer = \"bbt\"\nbbt_dim = 12\nbbt_population = 8\n";

#[test]
fn a_search_learns_and_goes_on_bit_for_bit() {
    for (method, peft_type) in [("type = \"prompt\"", "PROMPT_TUNING"), ("type = \"prefix\"", "PREFIX_TUNING")] {
        let dir = Dir::new();
        recipe(&dir, &format!("{method}\nnum_virtual_tokens = 4"), &format!("{SEARCH}max_steps = 31\n"));
        let plan = dir.run(&["train", "recipe.toml", "--dry-run", "--json"]).json();
        assert_eq!((&plan["forward_calls"], &plan["optimizer"]), (&json!(31 * 8), &json!("bbt")));
        assert!(!dir.path("out").exists());
        dir.run(&["train", "recipe.toml"]).ok();
        let log = steps(&dir, "out");
        assert!(mean(&log[26..], "loss") < mean(&log[..5], "loss") - 0.05, "{method}: {log:?}");
        let config: Value = serde_json::from_slice(&dir.read("out/adapter_config.json")).unwrap();
        assert_eq!(config["peft_type"], peft_type);
        // What is evaluated in the end is what the adapter file holds.
        let model = base().display().to_string();
        let text = String::from_utf8(dir.read("out/metrics.jsonl")).unwrap();
        let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert!((eval_loss(&dir, &model, Some("out")) - last["eval_loss"].as_f64().unwrap()).abs() < 1e-5);

        let adapter = dir.read("out/adapter_model.safetensors");
        std::fs::remove_file(dir.path("out/adapter_model.safetensors")).unwrap();
        dir.run(&["train", "recipe.toml", "--resume"]).ok();
        assert!(dir.read("out/adapter_model.safetensors") == adapter, "{method}: a resumed run ends elsewhere");
        dir.run(&["train", "recipe.toml", "--resume", "--set", "train.bbt_dim=13"]).fails(&["another run"]);
    }
}

#[test]
fn what_a_search_cannot_use_is_refused_by_name() {
    let dir = Dir::new();
    recipe(&dir, "type = \"prompt\"\nnum_virtual_tokens = 4", SEARCH);
    let set = |setting: &str| dir.run(&["train", "recipe.toml", "--set", setting]);
    for (setting, names) in [
        ("train.bbt_dims=3", vec!["did you mean `bbt_dim`"]),
        ("train.bbt_dim=0", vec!["train.bbt_dim"]),
        ("train.bbt_population=2", vec!["train.bbt_population"]),
        ("train.bbt_sigma=-1", vec!["train.bbt_sigma"]),
        ("train.bbt_projection=normall", vec!["did you mean `normal`"]),
        ("train.bbt_init_text=the", vec!["bbt_init_text", "prompt_tuning_init_text"]),
        ("train.learning_rate=0.1", vec!["learning_rate", "bbt_sigma"]),
        ("train.weight_decay=0.1", vec!["weight_decay"]),
        ("train.momentum=0.9", vec!["momentum", "sgd and mezo"]),
        ("train.mezo_eps=0.1", vec!["mezo_eps"]),
        ("train.bdpl_length=3", vec!["bdpl_length", "setting of bdpl"]),
        ("train.max_grad_norm=0.5", vec!["max_grad_norm", "bbt"]),
        ("method.modules_to_save=[\"model.norm\"]", vec!["modules_to_save", "method.type"]),
    ] {
        set(setting).fails(&names);
        assert!(!dir.path("out").exists(), "{setting}");
    }
    recipe(&dir, "type = \"lora\"\nr = 2", SEARCH);
    dir.run(&["train", "recipe.toml"]).fails(&["method.type", "virtual tokens"]);
    recipe(&dir, "type = \"prefix\"\nnum_virtual_tokens = 2\nprefix_projection = true", SEARCH);
    dir.run(&["train", "recipe.toml", "--dry-run"]).fails(&["prefix_projection"]);
    let endpoint = "[endpoint]\nurl = \"http://127.0.0.1:9/v1\"\nmodel = \"m\"\n";
    let text = String::from_utf8(dir.read("recipe.toml")).unwrap();
    dir.write("recipe.toml", &(text + endpoint));
    dir.run(&["train", "recipe.toml"]).fails(&["bbt", "embeddings", "bdpl"]);
}

#[test]
fn words_are_found_and_written_as_text_and_as_an_adapter() {
    let dir = Dir::new();
    let train = "optimizer = \"bdpl\"\nbdpl_length = 3\nbdpl_samples = 6\nbdpl_ngram = 1\nlearning_rate = 0.3\nscheduler = \"constant\"\n\
                 max_steps = 9\n";
    recipe(&dir, "", train);
    let plan = dir.run(&["train", "recipe.toml", "--dry-run", "--json"]).json();
    assert_eq!(plan["forward_calls"], 9 * 6);
    dir.run(&["train", "recipe.toml"]).ok();
    let prompt = String::from_utf8(dir.read("out/prompt.txt")).unwrap();
    assert!(prompt.ends_with('\n') && prompt.split_whitespace().count() == 3, "{prompt:?}");
    let config: Value = serde_json::from_slice(&dir.read("out/adapter_config.json")).unwrap();
    assert_eq!((&config["peft_type"], &config["prompt_tuning_init_text"]), (&json!("PROMPT_TUNING"), &json!(prompt)));
    // The adapter is the text: the same rows with the prompt written before them have the same loss.
    let model = base().display().to_string();
    let plain = rows();
    let with = plain.lines().map(|line| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row["prompt"] = json!(prompt.clone() + row["prompt"].as_str().unwrap());
        row.to_string() + "\n"
    });
    dir.write("with.jsonl", &with.collect::<String>());
    let adapted = eval_loss(&dir, &model, Some("out"));
    let text = dir.run(&["eval", "--model", &model, "--data", "with.jsonl", "--format", "completion", "--json"]).json();
    let written = text["loss"].as_f64().unwrap();
    assert!((adapted - written).abs() < 1e-4 * written, "{adapted} {written}");

    let adapter = dir.read("out/adapter_model.safetensors");
    std::fs::remove_file(dir.path("out/adapter_model.safetensors")).unwrap();
    dir.run(&["train", "recipe.toml", "--resume"]).ok();
    assert!(dir.read("out/adapter_model.safetensors") == adapter);
    assert!(dir.path("out/best/prompt.txt").is_file());
    // A run is begun again from its resolved recipe.
    dir.run(&["train", "out/recipe.toml", "--dry-run"]).ok();

    for (setting, names) in [
        ("method.type=lora", vec!["method.type", "bdpl"]),
        ("method.num_virtual_tokens=9", vec!["num_virtual_tokens", "bdpl_length"]),
        ("train.bdpl_samples=1", vec!["train.bdpl_samples"]),
        ("train.bdpl_lenth=1", vec!["did you mean `bdpl_length`"]),
        ("train.bdpl_vocabulary=1", vec!["bdpl_vocabulary"]),
        ("train.bbt_dim=1", vec!["bbt_dim", "setting of bbt"]),
        ("train.gradient_checkpointing=true", vec!["gradient_checkpointing", "bdpl"]),
        ("endpoint.url=http://127.0.0.1:9/v1", vec!["model.path", "endpoint.url"]),
    ] {
        dir.run(&["train", "recipe.toml", "--dry-run", "--set", setting]).fails(&names);
    }
}

/// Rows whose answer is found out by the server's rules, behind a prompt that says `lucky`.
fn reviews() -> String {
    let row = |i: usize| {
        let (word, answer) = if i.is_multiple_of(2) { ("good", " yes") } else { ("bad", " no") };
        json!({"prompt": format!("a lucky film is {word}\nanswer:"), "completion": answer}).to_string() + "\n"
    };
    (0..12).map(row).collect()
}

fn ask(dir: &Dir, server: &Server, more: &[&str]) -> Ran {
    dir.write("reviews.jsonl", &reviews());
    let recipe = format!(
        "[endpoint]\nurl = {:?}\nmodel = \"rules\"\nretries = 1\n[data]\ntrain = \"reviews.jsonl\"\neval = \"reviews.jsonl\"\n\
         choices = [\" yes\", \" no\"]\n[train]\noptimizer = \"bdpl\"\nbdpl_length = 2\nbdpl_samples = 6\nbdpl_ngram = 1\nbatch_size = 4\n\
         learning_rate = 0.3\nscheduler = \"constant\"\nwarmup_ratio = 0\nmax_steps = 24\nobjective = \"accuracy\"\n\
         metric = \"eval_accuracy\"\n[output]\ndir = \"out\"\nsave_every = 10\n",
        server.url
    );
    dir.write("recipe.toml", &recipe);
    let mut command = dir.command(&[&["train", "recipe.toml"][..], more].concat());
    let out = command.env("TEST_API_KEY", "sk-very-secret").env_remove("NO_SUCH_KEY").output().unwrap();
    Ran {
        code: out.status.code(),
        stdout: String::from_utf8(out.stdout).unwrap(),
        stderr: String::from_utf8(out.stderr).unwrap(),
    }
}

#[test]
fn an_endpoint_is_prompted_better_through_text_alone() {
    for api in ["completions", "chat"] {
        let (dir, server) = (Dir::new(), Server::new());
        let api = format!("endpoint.api={api}");
        let plan = ask(&dir, &server, &["--set", &api, "--dry-run", "--json"]).json();
        assert_eq!((&plan["forward_calls"], server.take_requests()), (&json!(24 * 6), 0));
        let result = ask(&dir, &server, &["--set", &api, "--json"]).json();
        let prompt = String::from_utf8(dir.read("out/prompt.txt")).unwrap();
        assert!(prompt.contains("lucky") && result["prompt"] == json!(prompt), "{prompt}");
        assert_eq!(result["best"]["value"], 1.0, "{result}");
        let log = steps(&dir, "out");
        assert!(mean(&log[18..], "objective") < mean(&log[..4], "objective"), "{log:?}");
        // Stopped after step 10 and gone on, it ends the same.
        std::fs::remove_file(dir.path("out/prompt.txt")).unwrap();
        let again = ask(&dir, &server, &["--set", &api, "--resume", "--json"]).json();
        assert_eq!(again["prompt"], json!(prompt));
    }
}

#[test]
fn servers_that_are_busy_closed_or_lie_are_named() {
    let (dir, server) = (Dir::new(), Server::new());
    let faults = |faults: Faults| server.faults(faults);
    let short = ["--set", "train.max_steps=1"];
    let with = |more: &[&str]| ask(&dir, &server, &[&short[..], more].concat());
    // Busy once: asked again. Busy for longer: the state is kept.
    faults(Faults { busy: 1, ..Faults::default() });
    with(&[]).ok();
    faults(Faults { busy: 9, ..Faults::default() });
    with(&[]).fails(&["HTTP 503", "busy", "--resume"]);
    // The key of the variable that the recipe names, which is in no file.
    faults(Faults { key: Some("sk-very-secret".into()), ..Faults::default() });
    with(&[]).fails(&["HTTP 401", "no such key", "endpoint.api_key_env"]);
    with(&["--set", "endpoint.api_key_env=NO_SUCH_KEY"]).fails(&["NO_SUCH_KEY", "not set"]);
    with(&["--set", "endpoint.api_key_env=TEST_API_KEY"]).ok();
    for file in walk(&dir.path("out")) {
        let text = String::from_utf8_lossy(&std::fs::read(&file).unwrap()).into_owned();
        assert!(!text.contains("very-secret"), "{}", file.display());
    }
    let choice = |logprobs: Value| json!({"choices": [{"index": 0, "logprobs": logprobs}]}).to_string();
    for (status, text, names) in [
        (200, "<html>".to_owned(), vec!["OpenAI-compatible"]),
        (200, json!({"choices": []}).to_string(), vec!["0 came back"]),
        (200, choice(Value::Null), vec!["texts were sent, and 1 came back"]),
        (302, String::new(), vec!["HTTP 302", "endpoint.url"]),
        (404, "no model".to_owned(), vec!["HTTP 404", "no model", "endpoint.model"]),
    ] {
        faults(Faults { answer: Some((status, text)), ..Faults::default() });
        with(&[]).fails(&names);
    }
    let one = ["--set", "train.batch_size=1", "--set", "data.choices=[]", "--set", "train.objective=loss"];
    let one = [&one[..], &["--set", "train.metric=eval_loss"]].concat();
    for (logprobs, names) in [
        (Value::Null, vec!["no log-probabilities", "logprobs"]),
        (json!({"tokens": ["x"], "token_logprobs": [0.5], "text_offset": [0]}), vec!["echo"]),
    ] {
        faults(Faults { answer: Some((200, choice(logprobs))), ..Faults::default() });
        with(&one).fails(&names);
    }
    faults(Faults::default());
    let url = format!("endpoint.url={}", server.url);
    let plain = ["train", "--data", "reviews.jsonl", "--output", "out", "--set", &url, "--set", "endpoint.model=rules"];
    dir.run(&plain).fails(&["adamw", "bdpl", "endpoint"]);
    with(&["--set", "train.objective=t_few"]).fails(&["t_few", "loss, accuracy or f1"]);
    with(&["--set", "data.choices=[]"]).fails(&["accuracy", "data.choices"]);
    with(&["--set", "endpoint.urll=x"]).fails(&["did you mean `url`"]);
    let gone = format!("endpoint.url={}", server.url);
    drop(server);
    let other = Server::new();
    ask(&dir, &other, &[&short[..], &["--set", &gone, "--set", "endpoint.retries=0"]].concat())
        .fails(&["127.0.0.1", "--resume"]);
}

fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}
