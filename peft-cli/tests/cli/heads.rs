//! Heads for numbers, tokens and answers: from rows to scores, and what does not fit.

use serde_json::{Value, json};

use crate::byte_tokenizer::write_tokenizer;
use crate::harness::{Dir, Ran};

/// An encoder's config, without weights.
fn blank(dir: &Dir, architecture: &str, more: Value) {
    let mut config = json!({
        "architectures": [architecture], "model_type": "bert", "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    dir.write("blank/config.json", &config.to_string());
    write_tokenizer(&dir.path("blank"));
}

fn lines(rows: impl IntoIterator<Item = Value>) -> String {
    rows.into_iter().map(|row| format!("{row}\n")).collect()
}

/// Trains all of the encoder on these rows, which are evaluated too.
fn train(dir: &Dir, rows: &str, settings: &[&str]) -> Ran {
    dir.write("rows.jsonl", rows);
    let mut args = vec!["train", "--model", "blank", "--data", "rows.jsonl", "--method", "full", "--output", "out"];
    for setting in [
        "model.init=random",
        "data.eval=rows.jsonl",
        "train.max_steps=12",
        "train.learning_rate=1e-2",
        "output.eval_every=4",
    ]
    .iter()
    .chain(settings)
    {
        args.extend(["--set", setting]);
    }
    dir.run(&args)
}

fn numbers() -> String {
    lines((0..16).map(|i| json!({"text": "ab".repeat(1 + i % 4), "label": (i % 4) as f64 * 0.5 + 0.25})))
}

fn tagged() -> String {
    lines((0..12).map(|i| json!({"tokens": ["ab", "cd", "e"], "ner_tags": [i % 3, -100, 1]})))
}

fn asked() -> String {
    let row = |i: usize| {
        let (word, at) = [("one", 0), ("two", 4), ("three", 8)][i % 3];
        json!({"question": word, "context": "one two three", "answers": {"text": [word], "answer_start": [at]}})
    };
    lines((0..12).map(row))
}

#[test]
fn each_head_is_trained_and_measured_by_its_scores() {
    for (head, class, rows, metric, scores) in [
        ("regression", "BertForSequenceClassification", numbers(), "eval_spearman", vec!["mse", "pearson", "spearman"]),
        (
            "token_classification",
            "BertForTokenClassification",
            tagged(),
            "eval_mcc",
            vec!["accuracy", "f1", "mcc", "perplexity"],
        ),
        ("question_answering", "BertForQuestionAnswering", asked(), "eval_exact_match", vec!["exact_match", "f1"]),
    ] {
        let dir = Dir::new();
        blank(&dir, "BertModel", json!({}));
        train(&dir, &rows, &[&format!("model.head={head}"), &format!("train.metric={metric}")]).ok();
        let config: Value = serde_json::from_slice(&dir.read("out/model/config.json")).unwrap();
        assert_eq!(config["architectures"], json!([class]));
        assert!(dir.path("out/best").is_dir(), "{head}");
        let eval = |more: &[&str]| {
            let args = [&["eval", "--model", "out/model", "--data", "rows.jsonl", "--json"], more].concat();
            dir.run(&args).json()
        };
        let found = eval(&[]);
        for name in scores.iter().chain(&["loss", "tokens", "examples"]) {
            assert!(found[name].is_number(), "{name} in {found}");
        }
        assert_eq!(found.get("perplexity").is_some(), head == "token_classification", "{found}");
        // The metric of the log is that of eval.
        let log = String::from_utf8(dir.read("out/metrics.jsonl")).unwrap();
        let last: Value =
            log.lines().rev().find(|l| l.contains(metric)).map(|l| serde_json::from_str(l).unwrap()).unwrap();
        let name = metric.trim_start_matches("eval_");
        assert!((last[metric].as_f64().unwrap() - found[name].as_f64().unwrap()).abs() < 1e-3, "{last} {found}");
        // An adapter on it, alone and beside another.
        for out in ["one", "two"] {
            let args =
                ["train", "--model", "out/model", "--data", "rows.jsonl", "--output", out, "--set", "method.r=2"];
            dir.run(
                &[&args[..], &["--set", "train.max_steps=3", "--set", &format!("train.seed={}", out.len())]].concat(),
            )
            .ok();
        }
        let alone = eval(&["--adapter", "one"]);
        let both = eval(&["--adapter", "one", "--adapter", "two"]);
        for name in scores.iter().chain(&["loss"]) {
            let (a, b) = (alone[name].as_f64().unwrap(), both["results"][0][name].as_f64().unwrap());
            assert!((a - b).abs() < 1e-3, "{head}: {name} {a} and {b}");
        }
        let text = dir.run(&["eval", "--model", "out/model", "--data", "rows.jsonl"]).ok().stdout;
        assert!(scores.iter().filter(|s| **s != "perplexity").all(|s| text.contains(s)), "{text}");
    }
}

#[test]
fn mezo_raises_a_correlation() {
    let dir = Dir::new();
    blank(&dir, "BertForSequenceClassification", json!({"num_labels": 1}));
    train(&dir, &numbers(), &["train.optimizer=mezo", "train.objective=pearson", "train.mezo_eps=1e-2"]).ok();
    let log = String::from_utf8(dir.read("out/metrics.jsonl")).unwrap();
    assert!(log.lines().filter(|l| l.contains("objective")).count() == 12 && log.contains("eval_pearson"), "{log}");
    let wrong = |setting: &str| train(&dir, &numbers(), &["train.optimizer=mezo", setting]);
    wrong("train.objective=f1").fails(&["`f1` is not a score of this model's head", "loss, pearson, spearman"]);
    wrong("train.metric=eval_f1").fails(&["`eval_f1` is not measured here", "eval_pearson"]);
}

#[test]
fn what_does_not_fit_the_head_is_said() {
    let dir = Dir::new();
    let one = |row: Value| lines([row]);
    let nothing_written = |ran: Ran, says: &[&str]| {
        ran.fails(says);
        assert!(!dir.path("out").exists());
    };
    blank(&dir, "BertForSequenceClassification", json!({"num_labels": 1}));
    nothing_written(
        train(&dir, &one(json!({"text": "a", "label": "good"})), &[]),
        &["rows.jsonl:1", "\"good\" is not a number"],
    );
    nothing_written(
        train(&dir, &one(json!({"text": "a", "label": [1, 2]})), &["data.labels=[\"score\"]"]),
        &["rows.jsonl:1", "2 numbers"],
    );
    nothing_written(train(&dir, &tagged(), &[]), &["rows.jsonl:1"]);
    nothing_written(
        train(&dir, &numbers(), &["model.head=token_classification"]),
        &["has the head of a `*ForSequenceClassification`", "`*ForTokenClassification`"],
    );
    nothing_written(train(&dir, &numbers(), &["model.head=regresion"]), &["model.head", "did you mean `regression`"]);
    blank(&dir, "BertForSequenceClassification", json!({"id2label": {"0": "no", "1": "yes"}}));
    nothing_written(
        train(&dir, &numbers(), &["data.labels=[\"no\", \"yes\"]"]),
        &["rows.jsonl:1", "0.25 is not a class"],
    );
    nothing_written(
        train(&dir, &one(json!({"text": "a", "label": 2})), &["data.labels=[\"no\", \"yes\"]"]),
        &["rows.jsonl:1", "outside the head"],
    );
    nothing_written(train(&dir, &numbers(), &[]), &["rows.jsonl:1", "model.head = \"regression\""]);
    blank(&dir, "BertForTokenClassification", json!({}));
    let unequal = one(json!({"tokens": ["a", "b"], "labels": [1]}));
    nothing_written(train(&dir, &unequal, &[]), &["rows.jsonl:1", "`labels` has 1 entries, `tokens` 2"]);
    let outside = one(json!({"tokens": ["a", "b"], "labels": [1, 5]}));
    nothing_written(
        train(&dir, &outside, &["data.labels=[\"O\", \"B\"]"]),
        &["rows.jsonl:1", "`labels[1]`", "outside the head"],
    );
    blank(&dir, "BertForQuestionAnswering", json!({}));
    let absent = one(json!({"question": "a", "context": "b c", "answers": {"text": ["c"], "answer_start": [0]}}));
    nothing_written(train(&dir, &absent, &[]), &["rows.jsonl:1", "answer `c` is not in its context at character 0"]);
    nothing_written(
        train(&dir, &numbers(), &[]),
        &["a head for question_answering", "`question`, `context`, `answers`"],
    );
    let model = crate::harness::base().display().to_string();
    dir.write("rows.jsonl", &tagged());
    let args =
        ["train", "--model", &model, "--data", "rows.jsonl", "--output", "out", "--format", "token_classification"];
    nothing_written(dir.run(&args), &["format token_classification", "model.head"]);
    nothing_written(
        dir.run(&[&args[..], &["--set", "model.head=token_classification"]].concat()),
        &["has no head for token_classification", "encoder"],
    );
}
