//! Soft prompts on models with a class head: where they stand, whose row the class is read from, and what goes into the file.
//! Equality with PEFT is the matter of `interop/`, gradients on encoders that of `encoder.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod model_support;

use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use peft_core::{Adapter, AdapterFolder, AdapterSet, BaseLayer, BaseModel, Ctx, Route, Segmented};
use peft_models::Decoder;
use peft_models::config::DecoderConfig;
use peft_models::source::{Placement, RandomSource};
use peft_train::data::Batch;
use peft_train::{checkpoint, methods, token_losses};
use serde_json::{Value, json};

use self::model_support::encoders::{FAMILIES, LENGTHS, batch, encoder, row};
use self::model_support::{adapter, mixture, moved};

/// A decoder with a class head; GPT-2's has a table of positions.
fn decoder(model_type: &str) -> Decoder {
    let map = match model_type {
        "gpt2" => json!({"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"], "vocab_size": 37,
            "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 16, "num_labels": 3}),
        _ => json!({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "vocab_size": 37,
            "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
            "num_key_value_heads": 1, "max_position_embeddings": 16, "num_labels": 3}),
    };
    let config = DecoderConfig::from_hf_map(map.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
    let placement = Placement::cpu(None);
    let source = RandomSource { seed: 3, std: 0.3, untied_head: true, placement: placement.clone() };
    Decoder::load(config, &source, &placement).unwrap()
}

/// The batch of the encoders with the class on the last token of each sequence.
fn at_the_end(mut batch: Batch) -> Batch {
    for ends in batch.bounds.clone().windows(2) {
        batch.labels.swap(ends[0], ends[1] - 1);
    }
    batch
}

fn losses(model: &impl Segmented, set: &AdapterSet, route: &Route, batch: &Batch) -> Vec<f32> {
    token_losses(model, batch, &Ctx::eval(set, route)).unwrap()
}

fn near(what: &str, got: &[f32], want: &[f32]) {
    let apart = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(got.len() == want.len() && apart < 1e-5, "{what}: {got:?}, should be {want:?}");
}

/// A sequence with `front` before its tokens, of type 0.
fn behind(front: &[u32], batch: &Batch) -> Batch {
    let zeros = vec![0; front.len()];
    Batch {
        input_ids: [front, &batch.input_ids].concat(),
        position_ids: (0..(front.len() + batch.tokens()) as u32).collect(),
        bounds: vec![0, front.len() + batch.tokens()],
        types: if batch.types.is_empty() { Vec::new() } else { [&zeros, batch.types.as_slice()].concat() },
        ..batch.clone()
    }
}

/// The rows of the model's word embedding.
fn words(model: &dyn BaseModel, ids: &[u32]) -> Tensor {
    let BaseLayer::Embedding(table) = model.layer(model.sites().iter().next().unwrap().id).unwrap() else {
        panic!("the first site is the word embedding");
    };
    table.base(ids).unwrap()
}

/// A prompt of the embeddings of tokens is those tokens: the same positions, and the class from the same row.
fn a_prompt_is_tokens(name: &str, model: &impl Segmented, reads_first: bool) {
    let front = [7, 30, 12];
    let prompt = Arc::new(adapter(model, &json!({"type": "prompt", "num_virtual_tokens": 3})));
    let embeddings = prompt.parameters().into_iter().find(|p| p.name() == "prompt_embeddings").unwrap();
    embeddings.set(&words(model, &front)).unwrap();
    let set = AdapterSet::one("a", prompt.clone());
    for i in 0..LENGTHS.len() {
        let plain = if reads_first { row(&batch(), i) } else { at_the_end(row(&batch(), i)) };
        let types = if reads_first { (0..plain.tokens()).map(|t| (t % 2) as u32).collect() } else { Vec::new() };
        let plain = Batch { types, ..plain };
        let mut labels = vec![-100; front.len() + plain.tokens()];
        let read = if reads_first { 0 } else { labels.len() - 1 };
        labels[read] = i as i32 % 3;
        let written = Batch { labels, ..behind(&front, &plain) };
        let got = losses(model, &set, &Route::Uniform(0), &plain);
        near(&format!("{name}, sequence {i}"), &got, &losses(model, &set, &Route::Base, &written));
    }
}

#[test]
fn a_prompt_of_the_embeddings_of_tokens_is_those_tokens() {
    for family in FAMILIES {
        a_prompt_is_tokens(family, &encoder(family, "-"), true);
    }
    for family in ["llama", "gpt2"] {
        a_prompt_is_tokens(family, &decoder(family), false);
    }
}

/// These adapters, and experts that are made of the last, which is a LoRA.
fn mixed_is_single(name: &str, model: &impl Segmented, batch: &Batch, adapters: &[Value]) {
    let dir = tempfile::tempdir().unwrap();
    let mut other = adapters.last().unwrap().clone();
    other["r"] = json!(3);
    let experts = [adapters.last().unwrap().clone(), other];
    let adapters = &[adapters, &[mixture(model, &experts, dir.path())]].concat();
    let named = adapters.iter().enumerate();
    let set = named.fold(AdapterSet::empty(), |set, (i, m)| set.with(i.to_string(), moved(model, m)));
    for shift in 0..=adapters.len() {
        let slots: Vec<Option<usize>> =
            (0..LENGTHS.len()).map(|i| ((i + shift) % (adapters.len() + 1)).checked_sub(1)).collect();
        let mixed = losses(model, &set, &Route::rows(&batch.bounds, &slots), batch);
        for (i, slot) in slots.iter().enumerate() {
            let single = losses(model, &set, &slot.map_or(Route::Base, Route::Uniform), &row(batch, i));
            near(&format!("{name}, sequence {i} through {slot:?}"), &mixed[i..=i], &single);
        }
    }
}

#[test]
fn a_batch_that_mixes_prompts_prefixes_and_lora_equals_single_runs() {
    let prompt = || json!({"type": "prompt", "num_virtual_tokens": 2});
    let prefix = |norms: &str| json!({"type": "prefix", "num_virtual_tokens": 3, "modules_to_save": [norms]});
    let lora = |layer: &str| json!({"r": 2, "target_modules": [layer]});
    for family in FAMILIES {
        let methods = match family {
            "distilbert" => vec![prompt(), lora("q_lin")],
            _ => vec![prompt(), prefix("LayerNorm"), lora("query")],
        };
        mixed_is_single(family, &encoder(family, "-"), &batch(), &methods);
    }
    let methods = [prompt(), prefix("norm"), lora("q_proj")];
    mixed_is_single("llama", &decoder("llama"), &at_the_end(batch()), &methods);
}

/// PEFT's names for a soft prompt's file, and the head in it.
fn file_holds(model: &impl Segmented, batch: &Batch, method: &Value, head: &[&str]) {
    let written: Arc<Adapter> = moved(model, method);
    assert_eq!(written.config["task_type"], "SEQ_CLS");
    assert_eq!(written.config["modules_to_save"], json!(["classifier", "score"]));
    let dir = tempfile::tempdir().unwrap();
    checkpoint::write_adapter_files(dir.path(), &written).unwrap();
    let files = AdapterFolder::open(dir.path()).unwrap();
    let mut expected: Vec<String> = head.iter().map(|layer| format!("base_model.{layer}")).collect();
    expected.push("prompt_embeddings".into());
    expected.sort();
    assert_eq!(files.keys().collect::<Vec<_>>(), expected, "{method}");
    let opened = Arc::new(methods::open(dir.path(), model).unwrap().adapter);
    let loss =
        |adapter: &Arc<Adapter>| losses(model, &AdapterSet::one("a", adapter.clone()), &Route::Uniform(0), batch);
    near("opened", &loss(&opened), &loss(&written));
}

#[test]
fn the_head_is_stored_under_the_names_that_peft_gives_it_beside_a_prompt() {
    let prompt = json!({"type": "prompt", "num_virtual_tokens": 2});
    let prefix = json!({"type": "prefix", "num_virtual_tokens": 2, "prefix_projection": true});
    let bert = ["classifier.weight", "classifier.bias"];
    let roberta =
        ["classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias"];
    let distilbert = ["pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"];
    for method in [&prompt, &prefix] {
        file_holds(&encoder("bert", "-"), &batch(), method, &bert);
        file_holds(&encoder("roberta", "-"), &batch(), method, &roberta);
        file_holds(&decoder("llama"), &at_the_end(batch()), method, &["score.weight"]);
    }
    file_holds(&encoder("distilbert", "-"), &batch(), &prompt, &distilbert);
}

#[test]
fn what_a_model_has_no_place_for_is_refused_by_name() {
    let refused = |family: &str, method: Value| {
        let made = methods::create(method.as_object().unwrap(), &encoder(family, "-"), 1);
        made.unwrap_err().to_string()
    };
    let text = refused("distilbert", json!({"type": "prefix", "num_virtual_tokens": 2}));
    assert!(text.contains("distilbert") && text.contains("p_tuning"), "{text}");
    let text = refused("roberta", json!({"type": "prefix", "num_virtual_tokens": 14}));
    assert!(text.contains("num_virtual_tokens") && text.contains("14 positions"), "{text}");
    let saved = json!({"type": "prompt", "num_virtual_tokens": 2, "modules_to_save": ["embeddings"]});
    let text = refused("bert", saved);
    assert!(text.contains("modules_to_save") && text.contains("bert.embeddings"), "{text}");

    let model = encoder("bert", "-");
    let set = AdapterSet::one("a", moved(&model, &json!({"type": "prompt", "num_virtual_tokens": 10})));
    let error = token_losses(&model, &batch(), &Ctx::eval(&set, &Route::Uniform(0))).unwrap_err().to_string();
    assert!(error.contains("17 tokens (10 virtual") && error.contains("data.max_length = 6"), "{error}");
}
