//! Heads for numbers, several classes, tokens and answers: what the block-wise step must keep, on tiny random encoders. Equality with
//! transformers is the matter of `interop/heads.py`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod model_support;

use peft_core::kernels::testing::{close, randn};
use peft_core::{AdapterSet, BaseModel, Ctx, HeadKind, Route};
use peft_models::Encoder;
use peft_train::data::{Batch, Predictor};
use peft_train::{Checkpointing, MicroBatch, Objective, evaluate, measure, methods, predict};
use serde_json::{Value, json};

use self::model_support::encoders::{LENGTHS, batch, batch_for, encoder_for, row};
use self::model_support::{gradients, moved};

fn loss(model: &Encoder, set: &AdapterSet, batch: &Batch) -> f64 {
    evaluate(model, batch, &Ctx::eval(set, &Route::Uniform(0))).unwrap().nll
}

fn lora(family: &str) -> Value {
    json!({"r": 2, "target_modules": [if family == "distilbert" { "q_lin" } else { "query" }], "bias": "all"})
}

fn all() -> impl Iterator<Item = (&'static str, HeadKind)> {
    ["bert", "roberta", "distilbert"].into_iter().flat_map(|family| HeadKind::ALL.map(|kind| (family, kind)))
}

#[test]
fn a_batch_is_its_sequences() {
    for (family, kind) in all() {
        let (model, whole) = (encoder_for(family, "-", kind), batch_for(kind));
        let set = AdapterSet::one("a", moved(&model, &lora(family)));
        let apart: f64 = (0..LENGTHS.len()).map(|i| loss(&model, &set, &row(&whole, i))).sum();
        let sum = loss(&model, &set, &whole);
        assert!((sum - apart).abs() < 1e-4 && sum > 0.1, "{family} {kind}: {sum} and {apart}");
        let (measured, _) = predict(&model, &whole, &Ctx::eval(&set, &Route::Uniform(0))).unwrap();
        let counted = if kind == HeadKind::TokenClassification { 11 } else { LENGTHS.len() };
        assert_eq!((measured.counted, whole.counted()), (counted, counted), "{kind}");
        assert!((measured.nll - sum).abs() < 1e-4);
    }
}

/// Of every parameter, along a random direction, and the same whatever is run again.
#[test]
fn gradients_are_those_of_the_loss() {
    for (family, kind) in all() {
        let (model, batch) = (encoder_for(family, "-", kind), batch_for(kind));
        let adapter = moved(&model, &lora(family));
        let set = AdapterSet::one("a", adapter.clone());
        let grads = gradients(&model, &adapter, &batch, Checkpointing::Off);
        let again = gradients(&model, &adapter, &batch, Checkpointing::Full);
        for (i, ((p, grad), again)) in adapter.parameters().into_iter().zip(&grads).zip(&again).enumerate() {
            let grad = grad.as_ref().unwrap_or_else(|| panic!("{family} {kind}: no gradient of {}", p.name()));
            close(p.name(), again.as_ref().unwrap(), grad, 1e-6).unwrap();
            let direction = randn(100 + i as u64, p.value().dims().to_vec(), 1.0).unwrap();
            let start = p.value().copy().unwrap();
            let at = |step: f64| {
                p.set(&(&start + (&direction * step).unwrap()).unwrap()).unwrap();
                loss(&model, &set, &batch)
            };
            // A kink of the ReLU in DistilBERT's head inside a large step moves the difference, rounding that of a small one.
            let numeric = [1.0e-3, 1.0e-4, 3.0e-5].map(|step| (at(step) - at(-step)) / (2.0 * step));
            p.set(&start).unwrap();
            let exact = f64::from((grad * &direction).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
            assert!(
                numeric.iter().any(|n| (n - exact).abs() <= 2e-2 * exact.abs().max(1.0)),
                "{family} {kind}: {}: {exact}, numerically {numeric:?}",
                p.name()
            );
        }
    }
}

#[test]
fn a_head_that_is_missing_is_made_and_stored() {
    for (kind, layers) in [
        (HeadKind::Regression, vec!["bert.pooler.dense", "classifier"]),
        (HeadKind::TokenClassification, vec!["classifier"]),
        (HeadKind::QuestionAnswering, vec!["qa_outputs"]),
    ] {
        let absent = if kind == HeadKind::QuestionAnswering { "qa_" } else { "classifier" };
        let model = encoder_for("bert", absent, kind);
        let adapter = moved(&model, &lora("bert"));
        assert_eq!(adapter.config["task_type"], kind.peft_name());
        let saved = adapter.config["modules_to_save"].as_array().unwrap().clone();
        assert!(kind.saved_modules().iter().all(|name| saved.contains(&json!(name))), "{saved:?}");
        let last = layers.last().unwrap();
        assert_eq!(model.fresh_layers(), [*last]);
        assert!(adapter.parameters().iter().any(|p| p.name().contains(&format!("{last}.weight"))));
    }
}

/// What PEFT cannot line up with labels is refused with the reason.
#[test]
fn a_prompt_is_not_in_front_of_tokens_with_labels() {
    for kind in [HeadKind::TokenClassification, HeadKind::QuestionAnswering] {
        let model = encoder_for("bert", "-", kind);
        let prompt =
            methods::create(json!({"type": "prompt", "num_virtual_tokens": 2}).as_object().unwrap(), &model, 1);
        let set = AdapterSet::one("a", std::sync::Arc::new(prompt.unwrap().adapter));
        let e = evaluate(&model, &batch_for(kind), &Ctx::eval(&set, &Route::Uniform(0))).unwrap_err().to_string();
        assert!(e.contains(kind.name()) && e.contains("prefix"), "{e}");
        let prefix = moved(&model, &json!({"type": "prefix", "num_virtual_tokens": 2}));
        loss(&model, &AdapterSet::one("a", prefix), &batch_for(kind));
    }
}

#[test]
fn scores_are_objectives_of_the_heads_that_have_them() {
    for (kind, objective, fits) in [
        (HeadKind::Regression, Objective::Pearson, true),
        (HeadKind::Regression, Objective::Spearman, true),
        (HeadKind::Regression, Objective::Accuracy, false),
        (HeadKind::Classification, Objective::Mcc, true),
        (HeadKind::Classification, Objective::Pearson, false),
        (HeadKind::TokenClassification, Objective::F1, true),
        (HeadKind::MultiLabel, Objective::Mcc, false),
        (HeadKind::QuestionAnswering, Objective::F1, true),
    ] {
        let model = encoder_for("bert", "-", kind);
        assert_eq!(objective.check(model.task()).is_ok(), fits, "{kind} {objective}");
        if !fits {
            continue;
        }
        let set = AdapterSet::one("a", moved(&model, &lora("bert")));
        let ctx = Ctx::eval(&set, &Route::Uniform(0));
        let whole = batch_for(kind);
        // In two micro-batches or one, a score is that of all rows.
        let parts: Vec<_> = (0..LENGTHS.len()).map(|i| MicroBatch::Rows(row(&whole, i))).collect();
        let (one, score) = measure(objective, None, &model, &[MicroBatch::Rows(whole)], &ctx).unwrap();
        let (two, same) = measure(objective, None, &model, &parts, &ctx).unwrap();
        assert!((one.nll - two.nll).abs() < 1e-4 && (score - same).abs() < 1e-4, "{kind} {objective}: {score} {same}");
        assert!((-1.0..=1.0).contains(&score));
    }
}

#[test]
fn numbers_that_are_not_there_are_an_error() {
    let model = encoder_for("bert", "-", HeadKind::Regression);
    let set = AdapterSet::empty();
    let bare = Batch { kind: HeadKind::Regression, predictor: Predictor::Own, ..batch() };
    let e = evaluate(&model, &bare, &Ctx::eval(&set, &Route::Base)).unwrap_err().to_string();
    assert!(e.contains("12 outputs"), "{e}");
}
