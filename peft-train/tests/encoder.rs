//! Encoders with a class head: what the block-wise step, the head and the files must keep, on tiny random models. Equality
//! with transformers is the matter of `interop/`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod model_support;

use std::sync::Arc;

use candle_core::Tensor;
use peft_core::kernels::testing::{close, max_difference, randn};
use peft_core::{AdapterSet, BaseModel, Ctx, Result, Route, Segmented, TokenBatch};
use peft_models::Encoder;
use peft_models::source::{Placement, RandomSource, WeightSource};
use peft_train::data::Batch;
use peft_train::{Checkpointing, checkpoint, methods, predict};
use serde_json::{Value, json};

use self::model_support::encoders::{FAMILIES, LENGTHS, batch, encoder, row};
use self::model_support::{adapter, gradients, moved};

fn loss(model: &Encoder, set: &AdapterSet, batch: &Batch) -> f64 {
    predict(model, batch, &Ctx::eval(set, &Route::Uniform(0))).unwrap().0.nll
}

/// LoRA on every linear layer of the body. DistilBERT's `pre_classifier` is trained whole, as PEFT's rule by the end of a
/// name has it, so it is no target.
fn all_linear(family: &str, more: Value) -> Value {
    let mut method = json!({"r": 2, "target_modules": "all-linear"});
    if family == "distilbert" {
        method["exclude_modules"] = json!(["pre_classifier"]);
    }
    method.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    method
}

fn query_only(family: &str) -> Value {
    json!({"r": 2, "target_modules": [if family == "distilbert" { "q_lin" } else { "query" }]})
}

/// A prefix and LoRA, each with gates.
fn gated(family: &str) -> Value {
    let layers = if family == "distilbert" { ["q_lin", "lin1"] } else { ["query", "intermediate.dense"] };
    json!({"type": "union", "methods": [
        {"type": "prefix", "num_virtual_tokens": 2, "use_gating": true, "shared_gating": false, "moves_positions": false},
        {"r": 2, "target_modules": layers, "use_gating": true}]})
}

/// A prefix needs a place in the model, which DistilBERT has not.
fn soft_prompts(family: &str) -> Vec<Value> {
    let prefix = json!({"type": "prefix", "num_virtual_tokens": 3, "modules_to_save": ["LayerNorm"]});
    let prompt = json!({"type": "prompt", "num_virtual_tokens": 2});
    let p_tuning = json!({"type": "p_tuning", "num_virtual_tokens": 2, "encoder_hidden_size": 5,
        "encoder_reparameterization_type": "LSTM"});
    if family == "distilbert" {
        vec![prompt, p_tuning, gated(family)]
    } else {
        vec![prefix, prompt, p_tuning, gated(family)]
    }
}

fn bottleneck() -> Value {
    json!({"type": "bottleneck", "preset": "double_seq_bn", "reduction_factor": 4})
}

fn all_methods(family: &str) -> Vec<Value> {
    let others = vec![
        all_linear(family, json!({})),
        all_linear(family, json!({"bias": "all"})),
        all_linear(family, json!({"use_dora": true})),
        json!({"r": 2, "target_modules": ".*_embeddings", "modules_to_save": ["LayerNorm"]}),
        json!({"type": "full"}),
        json!({"type": "bitfit"}),
        json!({"type": "last_layers", "num_layers": 1}),
        bottleneck(),
    ];
    [others, soft_prompts(family)].concat()
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    for family in FAMILIES {
        let model = encoder(family, "-");
        for method in [vec![all_linear(family, json!({}))], soft_prompts(family)].concat() {
            let set = AdapterSet::one("a", moved(&model, &method));
            let whole = loss(&model, &set, &batch());
            let apart: f64 = (0..LENGTHS.len()).map(|i| loss(&model, &set, &row(&batch(), i))).sum();
            assert!((whole - apart).abs() < 1e-4, "{family} {method}: {whole} and {apart}");
        }
    }
}

#[test]
fn every_token_reaches_the_first() {
    let model = encoder("bert", "-");
    let set = AdapterSet::empty();
    let nll = |batch: &Batch| predict(&model, batch, &Ctx::eval(&set, &Route::Base)).unwrap().0.nll;
    let plain = row(&batch(), 2);
    for t in 0..7 {
        let mut other = plain.clone();
        other.input_ids[t] = (other.input_ids[t] + 1) % 37;
        assert!((nll(&other) - nll(&plain)).abs() > 1e-6, "token {t}");
    }
    let typed = Batch { types: vec![0, 0, 0, 1, 1, 1, 1], ..plain.clone() };
    assert!((nll(&typed) - nll(&plain)).abs() > 1e-6, "token types");
}

/// Of every parameter, along a random direction.
#[test]
fn gradients_are_those_of_the_loss() {
    for family in FAMILIES {
        for method in all_methods(family) {
            let model = encoder(family, "-");
            let adapter = moved(&model, &method);
            let set = AdapterSet::one("a", adapter.clone());
            let grads = gradients(&model, &adapter, &batch(), Checkpointing::Off);
            for (i, (p, grad)) in adapter.parameters().into_iter().zip(&grads).enumerate() {
                let grad = grad.as_ref().unwrap_or_else(|| panic!("{family} {method}: no gradient of {}", p.name()));
                let direction = randn(100 + i as u64, p.value().dims().to_vec(), 1.0).unwrap();
                let start = p.value().copy().unwrap();
                let at = |step: f64| {
                    p.set(&(&start + (&direction * step).unwrap()).unwrap()).unwrap();
                    loss(&model, &set, &batch())
                };
                // A kink of the ReLU in DistilBERT's head inside a large step moves the difference, rounding that of a small
                // one; a gradient that is wrong differs from them all.
                let numeric = [1.0e-3, 1.0e-4, 3.0e-5].map(|step| (at(step) - at(-step)) / (2.0 * step));
                p.set(&start).unwrap();
                let exact = f64::from((grad * &direction).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
                // DoRA takes the norm in its denominator for a constant, so its gradient is not that of the loss.
                let detached =
                    method.get("use_dora").is_some() && (p.name().contains("lora_A") || p.name().contains("lora_B"));
                assert!(
                    detached || numeric.iter().any(|n| (n - exact).abs() <= 2e-2 * exact.abs().max(1.0)),
                    "{family} {method}: {}: {exact}, numerically {numeric:?}",
                    p.name()
                );
            }
        }
    }
}

#[test]
fn gradients_do_not_depend_on_what_is_run_again() {
    for family in FAMILIES {
        let model = encoder(family, "-");
        for method in [vec![all_linear(family, json!({"bias": "all"}))], soft_prompts(family)].concat() {
            let adapter = moved(&model, &method);
            let kept = gradients(&model, &adapter, &batch(), Checkpointing::Off);
            for policy in [Checkpointing::Full, Checkpointing::KeepTop(1)] {
                let again = gradients(&model, &adapter, &batch(), policy);
                for ((p, a), b) in adapter.parameters().iter().zip(&kept).zip(again) {
                    close(p.name(), &b.unwrap(), a.as_ref().unwrap(), 1e-6).unwrap();
                }
            }
        }
    }
}

#[test]
fn the_head_is_trained_and_stored_whole() {
    for (family, layers) in [
        ("bert", vec!["classifier.weight"]),
        ("roberta", vec!["classifier.dense.weight", "classifier.out_proj.weight"]),
        ("distilbert", vec!["pre_classifier.weight", "classifier.weight"]),
    ] {
        let model = encoder(family, "-");
        for method in [query_only(family), bottleneck()] {
            let adapter = adapter(&model, &method);
            assert_eq!(adapter.config["task_type"], "SEQ_CLS");
            assert_eq!(adapter.config["modules_to_save"], json!(["classifier", "score"]));
            for layer in &layers {
                let key = format!("base_model.model.{layer}");
                assert!(adapter.parameters().iter().any(|p| p.name() == key), "{family}: {key}");
            }
        }
    }
    let wrong = methods::create(json!({"task_type": "CAUSAL_LM"}).as_object().unwrap(), &encoder("bert", "-"), 0);
    let message = wrong.unwrap_err().to_string();
    assert!(message.contains("task_type") && message.contains("SEQ_CLS"), "{message}");
}

/// A layer of the head without weights starts from the seed and goes with the adapter.
#[test]
fn what_the_checkpoint_lacks_is_stored_with_the_adapter() {
    for (family, absent, fresh) in [
        ("bert", "classifier", "classifier"),
        ("distilbert", "pre_classifier", "pre_classifier"),
        ("roberta", "classifier.dense", "classifier.dense"),
    ] {
        let model = encoder(family, absent);
        assert_eq!(model.fresh_layers(), [fresh]);
        for method in [vec![query_only(family), bottleneck()], soft_prompts(family)].concat() {
            let adapter = moved(&model, &method);
            let dir = tempfile::tempdir().unwrap();
            checkpoint::write_adapter_files(dir.path(), &adapter).unwrap();
            let loaded = Arc::new(methods::open(dir.path(), &model).unwrap().adapter);
            let (a, b) = (AdapterSet::one("a", adapter), AdapterSet::one("b", loaded));
            assert!((loss(&model, &a, &batch()) - loss(&model, &b, &batch())).abs() < 1e-6);
        }
    }
}

/// A pooler is no part of what PEFT saves, so it has to be named, and an adapter without it is refused.
#[test]
fn a_fresh_pooler_is_named_and_missed() {
    let config = encoder("bert", "-").config().clone();
    let placement = Placement::cpu(None);
    let random = || RandomSource { seed: 3, std: 0.3, untied_head: true, placement: placement.clone() };
    /// Has no pooler under either of its names.
    #[derive(Debug)]
    struct NoPooler(RandomSource);
    impl WeightSource for NoPooler {
        fn contains(&self, name: &str) -> bool {
            !name.contains("pooler")
        }
        fn weight(&self, name: &str, dims: (usize, usize)) -> Result<peft_core::kernels::FrozenWeight> {
            self.0.weight(name, dims)
        }
        fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
            self.0.vector(name, len)
        }
        fn describe(&self) -> String {
            self.0.describe()
        }
    }
    let bare = Encoder::load(config, &NoPooler(random()), &placement, 5).unwrap();
    assert_eq!(bare.fresh_layers(), ["bert.pooler.dense"]);
    let saved = adapter(&bare, &json!({"r": 2})).config["modules_to_save"].clone();
    assert_eq!(saved, json!(["classifier", "score", "bert.pooler.dense"]));
    let dir = tempfile::tempdir().unwrap();
    checkpoint::write_adapter_files(dir.path(), &adapter(&encoder("bert", "-"), &json!({"r": 2}))).unwrap();
    let message = methods::open(dir.path(), &bare).unwrap_err().to_string();
    assert!(message.contains("bert.pooler.dense") && message.contains("modules_to_save"), "{message}");
}

#[test]
fn names_of_older_and_barer_checkpoints() {
    /// Knows tensors by the names of a TensorFlow checkpoint of the body alone.
    #[derive(Debug)]
    struct Old(RandomSource);
    impl WeightSource for Old {
        fn contains(&self, name: &str) -> bool {
            let norm = name.contains("LayerNorm");
            !name.starts_with("bert.") && (!norm || name.ends_with("gamma") || name.ends_with("beta"))
        }
        fn weight(&self, name: &str, dims: (usize, usize)) -> Result<peft_core::kernels::FrozenWeight> {
            assert!(self.contains(name), "{name}");
            self.0.weight(name, dims)
        }
        fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
            assert!(self.contains(name), "{name}");
            self.0.vector(name, len)
        }
        fn describe(&self) -> String {
            self.0.describe()
        }
    }
    let config = encoder("bert", "-").config().clone();
    let placement = Placement::cpu(None);
    let source = Old(RandomSource { seed: 3, std: 0.3, untied_head: true, placement: placement.clone() });
    let model = Encoder::load(config, &source, &placement, 0).unwrap();
    assert!(model.sites().find("bert.encoder.layer.1.attention.self.query").is_some());
}

#[test]
fn rows_longer_than_the_positions_are_refused() {
    let (set, route) = (AdapterSet::empty(), Route::Base);
    let ctx = Ctx::eval(&set, &route);
    for (family, most) in [("bert", 16), ("roberta", 14)] {
        let model = encoder(family, "-");
        let ids = vec![3; most + 1];
        let positions: Vec<u32> = (0..=most as u32).collect();
        let tokens = |n: usize, bounds| TokenBatch { ids: &ids[..n], positions: &positions[..n], bounds, types: &[] };
        let short = [0, most];
        let fits = tokens(most, &short);
        model.prepare(fits, &ctx).unwrap();
        model.embed(fits, &Ctx::eval(&AdapterSet::empty(), &Route::Base)).unwrap();
        let long = [0, most + 1];
        let message = model.prepare(tokens(most + 1, &long), &ctx).unwrap_err().to_string();
        assert!(message.contains(&most.to_string()) && message.contains("data.max_length"), "{message}");
    }
}

/// RoBERTa's padding tokens stand at their own position and do not advance the others'.
#[test]
fn padding_tokens_have_their_own_position() {
    let model = encoder("roberta", "-");
    let set = AdapterSet::empty();
    let ctx = Ctx::eval(&set, &Route::Base);
    let embed = |ids: &[u32]| {
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        model.embed(TokenBatch { ids, positions: &positions, bounds: &[0, ids.len()], types: &[] }, &ctx).unwrap()
    };
    let (with, without) = (embed(&[7, 1, 8]), embed(&[7, 8]));
    let last = |t: &Tensor| t.narrow(0, t.dims()[0] - 1, 1).unwrap();
    close("the token after padding", &last(&with), &last(&without), 1e-6).unwrap();
    assert!(max_difference(&last(&embed(&[7, 9, 8])), &last(&without)).unwrap() > 1e-3);
}
