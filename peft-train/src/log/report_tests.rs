#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use crate::early_stop::Best;
use std::collections::BTreeMap;

fn rows(n: u64) -> Vec<StepRow> {
    let noise = |i: u64| ((i * 7919 % 101) as f64 / 101.0 - 0.5) * 0.35;
    (1..=n)
        .map(|step| {
            let t = step as f64 / n as f64;
            StepRow {
                step,
                loss: 0.9 + 2.4 * (-4.0 * t).exp() + noise(step),
                objective: None,
                learning_rate: 2e-4 * (t * 20.0).min(1.0) * (1.0 + (t * std::f64::consts::PI).cos()) / 2.0,
                grad_norm: 0.6 + 2.0 * (-9.0 * t).exp() + noise(step + 50).abs(),
                tokens: 4096,
                seconds: 9.0 + noise(step + 9),
                epoch: Some(t),
                metrics: BTreeMap::new(),
            }
        })
        .collect()
}

fn evals(n: u64) -> Vec<EvalRow> {
    let metrics = |s: u64| BTreeMap::from([("eval_accuracy".to_owned(), 0.796 + 0.1 * s as f64 / n as f64)]);
    (1..=6)
        .map(|i| i * n / 6)
        .map(|s| EvalRow { step: s, eval_loss: 0.95 + 2.0 * (-5.0 * s as f64 / n as f64).exp(), metrics: metrics(s) })
        .collect()
}

fn facts() -> RunFacts {
    RunFacts {
        base_model: "HuggingFaceTB/SmolLM2-135M".into(),
        method: "lora".into(),
        task_type: Some("CAUSAL_LM".into()),
        trainable_parameters: 4_884_480,
        total_parameters: 139_399_488,
        steps: 300,
        planned_steps: 300,
        epochs: 1.0,
        train_examples: 2000,
        tokens: 1_228_800,
        final_loss: Some(0.912),
        best_metric: Some("eval_loss".into()),
        best: Some(Best { step: 300, value: 0.9635 }),
        seconds: 2713.4,
        peak_memory: Some(1_130_000_000),
        device: "cpu".into(),
        dtype: "f32".into(),
        ..Default::default()
    }
}

/// The page for the fixed run above; `PEFT_REPORT_OUT=file` keeps it for the eye.
#[test]
fn a_whole_page() {
    let (steps, evals, facts) = (rows(300), evals(300), facts());
    let samples = [Sample {
        prompt: "Review: A quiet, exact film that trusts its audience.\nSentiment:".into(),
        before: " The film is a great film for the audience. The film is a great".into(),
        after: " positive".into(),
    }];
    let next = ["peft-cli eval --model HuggingFaceTB/SmolLM2-135M --adapter out --data test.jsonl".to_owned()];
    let recipe = "[model]\npath = \"HuggingFaceTB/SmolLM2-135M\"\n\n[method]\ntype = \"lora\"\nr = 16\n";
    let report = Report {
        title: "movies-lora",
        facts: &facts,
        recipe,
        steps: &steps,
        evals: &evals,
        samples: &samples,
        next: &next,
    };
    let html = report.to_html().unwrap();
    assert_eq!(html.matches("<svg ").count(), 4);
    assert_eq!(html.matches("<svg ").count(), html.matches("</svg>").count());
    for text in ["4,884,480 of 139,399,488 (3.5 %)", "300 · best", "45:13", "With the adapter", "r = 16"] {
        assert!(html.contains(text), "{text}");
    }
    // Nothing is fetched; the only address is the SVG namespace.
    assert!(!html.replace("http://www.w3.org/2000/svg", "").contains("http:"));
    assert!(!html.contains("https:") && !html.contains("<script") && !html.contains("<link"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.html");
    report.write(&path).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), html);
    if let Ok(out) = std::env::var("PEFT_REPORT_OUT") {
        report.write(Path::new(&out)).unwrap();
    }
}

#[test]
fn hostile_text_stays_text() {
    let evil = "</pre><script>alert('x')</script>\"&\u{0}";
    let facts = RunFacts { base_model: evil.into(), method: evil.into(), ended: Some(evil.into()), ..facts() };
    let samples = [Sample { prompt: evil.into(), before: evil.into(), after: evil.into() }];
    let evals = [EvalRow { step: 1, eval_loss: f64::NAN, metrics: BTreeMap::from([(evil.to_owned(), 1.0)]) }];
    let next = [evil.to_owned()];
    let report = Report {
        title: evil,
        facts: &facts,
        recipe: evil,
        steps: &rows(3),
        evals: &evals,
        samples: &samples,
        next: &next,
    };
    let html = report.to_html().unwrap();
    assert!(!html.contains("<script") && !html.contains('\u{0}'));
    assert!(html.matches("&lt;script&gt;").count() >= 9);
}

#[test]
fn an_empty_run_still_has_a_page() {
    let facts = RunFacts::default();
    let report = Report { title: "", facts: &facts, recipe: "", steps: &[], evals: &[], samples: &[], next: &[] };
    let html = report.to_html().unwrap();
    assert_eq!(html.matches("no values").count(), 4);
    let nan = StepRow { loss: f64::NAN, grad_norm: f64::INFINITY, seconds: 0.0, ..rows(1)[0].clone() };
    let steps = vec![nan; 40];
    let html = Report { steps: &steps, ..report }.to_html().unwrap();
    assert_eq!(html.matches("no values").count(), 3);
}
