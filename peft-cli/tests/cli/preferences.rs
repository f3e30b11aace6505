//! Preference objectives from rows to an adapter: they train, resume, evaluate, and refuse what will not do.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::harness::{Dir, Ran, base, config, steps};

const OBJECTIVES: [&str; 5] = ["dpo", "ipo", "kto", "orpo", "simpo"];

/// A rule that the base has not seen, and a wrong answer to each row.
fn pairs() -> String {
    let mut text = String::new();
    for i in 0..24u8 {
        let letter = |n: u8| char::from(b'a' + (i + n) % 8);
        let (prompt, chosen) = (format!("say {} ", letter(0)), letter(3).to_string().repeat(3) + "!");
        let rejected = letter(5).to_string().repeat(1 + usize::from(i % 4)) + "?";
        writeln!(text, "{}", json!({"prompt": prompt, "chosen": chosen, "rejected": rejected})).unwrap();
    }
    text
}

/// The same answers one by one.
fn singles() -> String {
    let rows = pairs();
    let rows = rows.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let one = |row: &Value, column: &str, label: bool| {
        json!({"prompt": row["prompt"], "completion": row[column], "label": label}).to_string() + "\n"
    };
    rows.map(|row| one(&row, "chosen", true) + &one(&row, "rejected", false)).collect()
}

fn train(dir: &Dir, objective: &str, more: &[&str]) -> Ran {
    let (base, objective) = (base().display().to_string(), format!("train.objective={objective}"));
    let mut args = vec!["train", "--model", &base, "--data", "pairs.jsonl", "--output", "out", "--json"];
    let settings = [
        &objective,
        "data.eval=pairs.jsonl",
        "method.r=4",
        "method.target_modules=all-linear",
        "train.batch_size=4",
        "train.learning_rate=1e-2",
        "train.max_steps=24",
    ];
    args.extend(settings.iter().flat_map(|setting| ["--set", *setting]));
    args.extend(more);
    dir.run(&args)
}

fn evals(dir: &Dir) -> Vec<Value> {
    let text = String::from_utf8(dir.read("out/metrics.jsonl")).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).filter(|v: &Value| v.get("eval_loss").is_some()).collect()
}

#[test]
fn every_objective_learns_what_is_preferred() {
    let dir = Dir::new();
    dir.write("pairs.jsonl", &pairs());
    for objective in OBJECTIVES {
        let result = train(&dir, objective, &["--set", "output.eval_every=8"]).json();
        let rows = steps(&dir, "out");
        assert!(rows.len() == 24 && rows.iter().all(|r| r["objective"].is_number() && r["loss"].is_number()));
        let evals = evals(&dir);
        let (first, last) = (&evals[0], &evals[2]);
        for key in ["eval_objective", "eval_rewards_chosen", "eval_rewards_rejected", "eval_rewards_margin"] {
            assert!(last[key].is_number(), "{key} in {last}");
            assert_eq!(result[key], last[key], "{result}");
        }
        assert!(last["eval_rewards_margin"].as_f64() > first["eval_rewards_margin"].as_f64(), "{objective} {evals:?}");
        assert!(last["eval_objective"].as_f64() < first["eval_objective"].as_f64(), "{objective} {evals:?}");
        assert!(last["eval_rewards_accuracy"].as_f64() > Some(0.9), "{objective} {last}");
        assert_eq!(rows[0].get("kl").is_some(), objective == "kto");
        // The best is the one of the least loss.
        assert_eq!(result["best"]["value"], last["eval_objective"], "{objective} {result}");
        // `eval` finds the same.
        let model = base().display().to_string();
        let args = ["eval", "--model", &model, "--adapter", "out", "--data", "pairs.jsonl", "--objective", objective];
        let found = dir.run(&[&args[..], &["--json"]].concat()).json();
        for (key, logged) in
            [("rewards_margin", "eval_rewards_margin"), ("objective", "eval_objective"), ("loss", "eval_loss")]
        {
            let (found, logged) = (found[key].as_f64().unwrap(), last[logged].as_f64().unwrap());
            assert!((found - logged).abs() < 1e-4 * (1.0 + logged.abs()), "{objective} {key}: {found} and {logged}");
        }
        assert!(dir.run(&args).ok().stdout.contains("rewards accuracy"));
    }
}

#[test]
fn answers_one_by_one_train_with_kto() {
    let dir = Dir::new();
    dir.write("pairs.jsonl", &singles());
    let result = train(&dir, "kto", &["--set", "train.desirable_weight=1.2"]).json();
    assert!(result["eval_rewards_margin"].as_f64() > Some(0.05), "{result}");
    assert!(result.get("eval_rewards_accuracy").is_none());
    let model = base().display().to_string();
    let args =
        ["eval", "--model", &model, "--adapter", "out", "--data", "pairs.jsonl", "--format", "preference", "--json"];
    let found = dir.run(&args).json();
    assert!((found["rewards_margin"].as_f64().unwrap() - result["eval_rewards_margin"].as_f64().unwrap()).abs() < 1e-4);
    train(&dir, "dpo", &[]).fails(&["pairs.jsonl:1", "dpo compares two answers", "kto"]);
    train(&dir, "kto", &["--set", "train.metric=eval_rewards_accuracy"]).fails(&[
        "eval_rewards_accuracy",
        "is not measured here",
        "eval_rewards_margin",
    ]);
}

/// What was made of the reference does not depend on where a run stopped.
#[test]
fn a_resumed_run_is_the_same_to_the_bit() {
    for objective in ["dpo", "kto"] {
        let settings = ["--set", "output.save_every=10", "--set", "train.gradient_accumulation=2"];
        let (whole, dir) = (Dir::new(), Dir::new());
        for dir in [&whole, &dir] {
            dir.write("pairs.jsonl", &pairs());
            train(dir, objective, &settings).ok();
        }
        std::fs::remove_file(dir.path("out/adapter_model.safetensors")).unwrap();
        train(&dir, objective, &[&settings[..], &["--resume"]].concat()).ok();
        let file = "out/adapter_model.safetensors";
        assert!(dir.read(file) == whole.read(file), "{objective}");
        let of = |dir: &Dir| steps(dir, "out").last().unwrap()["objective"].clone();
        assert_eq!(of(&dir), of(&whole));
    }
}

/// Continued from an adapter, the reference is the base, or that adapter where it is asked for: then the first loss is log 2.
#[test]
fn the_reference_of_a_continued_run() {
    let dir = Dir::new();
    dir.write("pairs.jsonl", &pairs());
    train(&dir, "dpo", &[]).ok();
    std::fs::rename(dir.path("out"), dir.path("first")).unwrap();
    let args = |reference: &str| {
        let model = base().display().to_string();
        let more = ["train.objective=dpo", "train.max_steps=2", reference].map(str::to_string);
        let mut args: Vec<String> =
            ["train", "--model", &model, "--data", "pairs.jsonl", "--output", "out", "--adapter", "first"]
                .map(String::from)
                .into();
        args.extend(more.into_iter().flat_map(|setting| ["--set".to_string(), setting]));
        args
    };
    let run = |reference: &str| {
        let args = args(reference);
        dir.run(&args.iter().map(String::as_str).collect::<Vec<_>>()).ok();
        steps(&dir, "out")[0]["objective"].as_f64().unwrap()
    };
    assert!((run("train.reference=init_from") - std::f64::consts::LN_2).abs() < 1e-6);
    assert!(run("train.reference=base") < 0.6);
}

#[test]
fn forward_passes_alone_lower_them_too() {
    let dir = Dir::new();
    dir.write("pairs.jsonl", &pairs());
    let mezo = ["--set", "train.optimizer=mezo", "--set", "train.mezo_samples=4", "--set", "train.mezo_eps=1e-2"];
    for objective in ["dpo", "kto", "orpo"] {
        train(&dir, objective, &[&mezo[..], &["--set", "train.max_steps=3"]].concat()).ok();
        let rows = steps(&dir, "out");
        assert!(rows.iter().all(|r| r["objective"].as_f64().is_some_and(f64::is_finite)), "{rows:?}");
    }
    train(
        &dir,
        "simpo",
        &[
            &mezo[..],
            &["--set", "train.max_steps=60", "--set", "train.learning_rate=2e-3", "--set", "train.scheduler=constant"],
        ]
        .concat(),
    )
    .ok();
    let rows = steps(&dir, "out");
    let mean = |rows: &[Value]| rows.iter().map(|r| r["objective"].as_f64().unwrap()).sum::<f64>() / rows.len() as f64;
    assert!(mean(&rows[48..]) < mean(&rows[..12]), "{} {}", mean(&rows[..12]), mean(&rows[48..]));
    train(&dir, "dpo", &["--set", "train.optimizer=bdpl"]).fails(&["dpo", "bdpl", "mezo"]);
}

#[test]
fn what_will_not_do_is_refused_by_name() {
    let dir = Dir::new();
    dir.write("pairs.jsonl", &pairs());
    for (objective, setting, names) in [
        ("dop", "train.seed=1", vec!["`dop` is not an objective", "did you mean `dpo`"]),
        ("dpo", "train.beta=0", vec!["train.beta", "above 0"]),
        ("dpo", "train.simpo_gamma=1", vec!["train.simpo_gamma", "a setting of simpo", "dpo"]),
        ("loss", "train.beta=0.1", vec!["train.beta", "a setting of dpo, ipo, kto, orpo, simpo"]),
        ("ipo", "train.label_smoothing=0.1", vec!["train.label_smoothing", "a setting of dpo, simpo"]),
        ("dpo", "train.label_smoothing=0.5", vec!["train.label_smoothing", "below 0.5"]),
        ("kto", "train.desirable_weight=-1", vec!["train.desirable_weight", "from 0"]),
        ("dpo", "train.loss_type=hinged", vec!["train.loss_type", "hinge"]),
        ("orpo", "train.reference=base", vec!["train.reference", "a setting of dpo, ipo, kto"]),
        ("dpo", "train.reference=init_from", vec!["train.reference", "method.init_from names no adapter"]),
        ("dpo", "train.reference=start", vec!["train.reference", "init_from"]),
        ("kto", "train.batch_size=1", vec!["kto", "train.batch_size", "2 or more"]),
        ("dpo", "data.packing=true", vec!["data.packing"]),
        ("dpo", "data.choices=[\"a\", \"b\"]", vec!["data.choices", "leave data.choices out"]),
        ("dpo", "data.format=completion", vec!["data.format", "preference"]),
        ("loss", "data.format=preference", vec!["format preference comes with preference objectives"]),
        ("dpo", "train.metric=eval_f1", vec!["eval_f1", "eval_objective", "eval_rewards_margin"]),
    ] {
        train(&dir, objective, &["--set", setting]).fails(&names);
        assert!(!dir.path("out/adapter_model.safetensors").exists(), "{objective} {setting}");
    }
    for (rows, objective, names) in [
        ("{\"prompt\": \"a\", \"chosen\": \"b\"}\n", "dpo", vec!["pairs.jsonl:1", "column `rejected` is missing"]),
        ("{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"b\"}\n", "ipo", vec!["pairs.jsonl:1", "the same"]),
        (
            "{\"prompt\": \"a\", \"chosen\": \"\", \"rejected\": \"b\"}\n",
            "simpo",
            vec!["pairs.jsonl:1", "`chosen` is empty"],
        ),
        ("{\"prompt\": \"a\", \"completion\": \"b\", \"label\": true}\n", "kto", vec!["pairs.jsonl", "undesirable"]),
    ] {
        dir.write("pairs.jsonl", rows);
        train(&dir, objective, &[]).fails(&names);
    }
    // A model that writes nothing.
    let classes = config(32).replace("LlamaForCausalLM", "LlamaForSequenceClassification");
    dir.write("classes/config.json", &classes);
    dir.write("pairs.jsonl", &pairs());
    let args =
        ["train", "--model", "classes", "--data", "pairs.jsonl", "--output", "out", "--set", "model.init=random"];
    dir.run(&[&args[..], &["--set", "train.objective=dpo"]].concat()).fails(&["dpo", "language model"]);

    let model = base().display().to_string();
    let eval = |more: &[&str]| dir.run(&[&["eval", "--model", &model, "--data", "pairs.jsonl"], more].concat());
    eval(&["--objective", "accuracy"]).fails(&["--objective accuracy", "dpo, ipo"]);
    eval(&["--objective", "dp"]).fails(&["did you mean `dpo`"]);
    eval(&["--beta", "0"]).fails(&["--beta", "above 0"]);
    eval(&["--format", "completion", "--beta", "1"]).fails(&["--beta", "preference"]);
    dir.run(&["eval", "--model", &model, "--data", "pairs.jsonl", "--json"]).ok();
    dir.run(&["train", "--help"]).ok();
    assert!(dir.run(&["eval", "--help"]).ok().stdout.contains("--objective"));
}

#[test]
fn a_dry_run_says_what_is_lowered() {
    let dir = Dir::new();
    dir.write("pairs.jsonl", &pairs());
    let plan = train(&dir, "orpo", &["--dry-run"]).json();
    assert_eq!((plan["objective"].as_str(), plan["rows"].as_u64()), (Some("orpo"), Some(24)));
    assert!(!dir.path("out").exists());
}
