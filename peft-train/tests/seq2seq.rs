//! Encoder–decoders: what the block-wise step, soft prompts, generation and the files must keep, on tiny random models.
//! Equality with transformers is the matter of `interop/`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod model_support;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use peft_core::kernels::FrozenWeight;
use peft_core::kernels::testing::{close, randn};
use peft_core::{AdapterSet, BaseModel, Ctx, Result, Route, Segmented, TokenBatch};
use peft_models::EncoderDecoder;
use peft_models::config::Seq2SeqConfig;
use peft_models::generate::{GenerateOptions, Request, generate_targets};
use peft_models::merge::Merged;
use peft_models::source::{Placement, RandomSource, WeightSource};
use peft_train::data::{Batch, Predictor};
use peft_train::{Checkpointing, checkpoint, evaluate, methods};
use serde_json::{Value, json};

use self::model_support::{gradients, moved};

fn config(changes: &Value) -> Seq2SeqConfig {
    let mut map = json!({
        "model_type": "t5", "vocab_size": 37, "d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 3, "num_heads": 3,
        "relative_attention_num_buckets": 6, "relative_attention_max_distance": 9,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0
    });
    map.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    Seq2SeqConfig::from_hf_map(map.as_object().unwrap().clone(), Path::new("config.json")).unwrap()
}

fn model_with(changes: &Value) -> EncoderDecoder {
    let (config, placement) = (config(changes), Placement::cpu(None));
    let untied_head = !config.tie_word_embeddings;
    let source = RandomSource { seed: 3, std: 0.3, untied_head, placement: placement.clone() };
    EncoderDecoder::load(config, &source, &placement).unwrap()
}

fn model() -> EncoderDecoder {
    model_with(&json!({}))
}

/// T5 v1.1.
fn gated() -> EncoderDecoder {
    model_with(&json!({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": false, "num_decoder_layers": 2}))
}

/// Lengths of sources and targets.
const LENGTHS: [(usize, usize); 4] = [(5, 3), (1, 6), (12, 1), (3, 2)];

fn batch_of(rows: &[usize]) -> Batch {
    let mut batch = Batch { bounds: vec![0], predictor: Predictor::Own, rows: rows.to_vec(), ..Batch::default() };
    let token = |row: usize, i: usize| ((row * 11 + i * 4 + 3) % 37) as u32;
    let mut push = |ids: Vec<u32>, labels: Vec<i32>| {
        batch.position_ids.extend(0..ids.len() as u32);
        batch.input_ids.extend(ids);
        batch.labels.extend(labels);
        batch.bounds.push(batch.input_ids.len());
    };
    for &row in rows {
        let labels: Vec<i32> = (0..LENGTHS[row].1).map(|i| token(row, i + 20) as i32).collect();
        let read = std::iter::once(0).chain(labels.iter().map(|&l| l as u32)).take(labels.len()).collect();
        push(read, labels);
    }
    for &row in rows {
        push((0..LENGTHS[row].0).map(|i| token(row, i)).collect(), vec![-100; LENGTHS[row].0]);
    }
    batch
}

fn batch() -> Batch {
    batch_of(&[0, 1, 2, 3])
}

fn loss(model: &EncoderDecoder, set: &AdapterSet, batch: &Batch, route: &Route) -> f64 {
    evaluate(model, batch, &Ctx::eval(set, route)).unwrap().nll
}

/// A prefix and LoRA with gates of targets and, where attention reads these, of sources.
fn gated_methods() -> Value {
    json!({"type": "union", "methods": [{"type": "prefix", "num_virtual_tokens": 2, "use_gating": true},
        {"r": 2, "target_modules": "all-linear", "use_gating": true}]})
}

/// Methods at every place that training can reach: linear layers of one stack and of both, the shared table, the tables of
/// biases, norms, prompts in front of sources, prefixes of the decoder, everything.
fn places() -> Vec<Value> {
    vec![
        json!({"type": "lora", "r": 2}),
        json!({"type": "lora", "r": 2, "target_modules": "all-linear"}),
        json!({"type": "lora", "r": 2, "target_modules": r"decoder.*EncDecAttention\.(k|v)"}),
        json!({"type": "lora", "r": 2, "target_modules": ["shared", "relative_attention_bias"]}),
        json!({"type": "ia3"}),
        json!({"type": "ln"}),
        json!({"type": "prompt", "num_virtual_tokens": 3}),
        json!({"type": "p_tuning", "num_virtual_tokens": 2, "encoder_hidden_size": 6}),
        json!({"type": "prefix", "num_virtual_tokens": 3}),
        gated_methods(),
        json!({"type": "bitfit", "add_biases": true}),
        json!({"type": "last_layers", "num_layers": 4, "final_norm": true}),
        json!({"type": "full"}),
    ]
}

#[test]
fn gradients_are_those_of_finite_differences_however_blocks_are_kept() {
    // Without the kinks of ReLU.
    let model = model_with(&json!({"feed_forward_proj": "gelu"}));
    for method in places() {
        let adapter = moved(&model, &method);
        let whole = gradients(&model, &adapter, &batch(), Checkpointing::Off);
        for again in [Checkpointing::Full, Checkpointing::KeepTop(2)] {
            for (a, b) in whole.iter().zip(gradients(&model, &adapter, &batch(), again)) {
                close("recomputed", a.as_ref().unwrap(), &b.unwrap(), 1e-6).unwrap();
            }
        }
        let set = AdapterSet::one("a", adapter.clone());
        for (i, (p, grad)) in adapter.parameters().into_iter().zip(whole).enumerate() {
            let (value, grad) =
                (p.value().copy().unwrap(), grad.unwrap_or_else(|| panic!("{method}: no gradient of {}", p.name())));
            let d = randn(900 + i as u64, value.dims().to_vec(), 1.0).unwrap();
            let norm = d.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            let d = (d / f64::from(norm)).unwrap();
            let at = |h: f64| {
                p.set(&(&value + (&d * h).unwrap()).unwrap()).unwrap();
                loss(&model, &set, &batch(), &Route::Uniform(0))
            };
            let numeric = (at(2e-3) - at(-2e-3)) / 4e-3;
            at(0.0);
            let analytic = f64::from((grad * d).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
            let size = numeric.abs().max(analytic.abs()).max(0.2);
            assert!((numeric - analytic).abs() < 5e-2 * size, "{method} {}: {analytic}, not {numeric}", p.name());
        }
    }
}

#[test]
fn rows_of_a_batch_do_not_see_each_other() {
    for model in [model(), gated()] {
        let base = AdapterSet::empty();
        let alone: f64 = (0..LENGTHS.len()).map(|i| loss(&model, &base, &batch_of(&[i]), &Route::Base)).sum();
        assert!((loss(&model, &base, &batch(), &Route::Base) - alone).abs() < 1e-4);
    }
}

/// Each row through another adapter, soft prompts among them, against each alone.
#[test]
fn rows_of_a_batch_go_through_their_own_adapters() {
    let model = model();
    let methods = [
        json!({"type": "lora", "r": 2, "target_modules": "all-linear"}),
        json!({"type": "prompt", "num_virtual_tokens": 3}),
        json!({"type": "prefix", "num_virtual_tokens": 2}),
        gated_methods(),
    ];
    let mut set = AdapterSet::empty();
    for (i, method) in methods.iter().enumerate() {
        set = set.with(i.to_string(), moved(&model, method));
    }
    let route = |slots: [Option<usize>; 4], rows: &[usize], batch: &Batch| {
        let slots: Vec<_> = rows.iter().chain(rows).map(|&row| slots[row]).collect();
        Route::rows(&batch.bounds, &slots)
    };
    for slots in [[Some(0), Some(2), Some(1), None], [Some(3), None, Some(3), Some(2)]] {
        let one = |row: usize| {
            let batch = batch_of(&[row]);
            loss(&model, &set, &batch, &route(slots, &[row], &batch))
        };
        let together = loss(&model, &set, &batch(), &route(slots, &[0, 1, 2, 3], &batch()));
        assert!((together - (0..4).map(one).sum::<f64>()).abs() < 1e-4);
    }
    // An adapter that changes biases of distances has them for all rows of a pass.
    let biased = json!({"type": "lora", "r": 1, "target_modules": ["relative_attention_bias"]});
    let set = set.with("biased", moved(&model, &biased));
    let mixed = Route::rows(&batch().bounds, &[Some(4), None, None, None, Some(4), None, None, None]);
    let e = evaluate(&model, &batch(), &Ctx::eval(&set, &mixed)).unwrap_err().to_string();
    assert!(e.contains("relative_attention_bias") && e.contains("whole batches"), "{e}");
}

/// The likeliest next token by a pass over the whole target, without a cache.
fn next_by_definition(
    model: &EncoderDecoder,
    set: &AdapterSet,
    source: &[u32],
    read: &[u32],
    slot: Option<usize>,
) -> u32 {
    let ids: Vec<u32> = read.iter().chain(source).copied().collect();
    let positions = vec![0; ids.len()];
    let bounds = [0, read.len(), ids.len()];
    let route = slot.map_or(Route::Base, Route::Uniform);
    let (ctx, batch) =
        (Ctx::eval(set, &route), TokenBatch { ids: &ids, positions: &positions, bounds: &bounds, types: &[] });
    let input = model.prepare(batch, &ctx).unwrap();
    let mut hidden = model.embed(batch, &ctx).unwrap();
    for i in 0..model.num_blocks() {
        hidden = model.block(i, &hidden, &input, &ctx).unwrap();
    }
    let last = hidden.narrow(0, read.len() - 1, 1).unwrap();
    let logits = model.logits(&model.final_norm(&last, &ctx).unwrap(), &ctx).unwrap();
    logits.argmax(1).unwrap().to_vec1::<u32>().unwrap()[0]
}

#[test]
fn a_batch_writes_what_each_source_gets_alone_and_by_definition() {
    let model = model();
    let mut set = AdapterSet::empty();
    for method in [
        json!({"type": "lora", "r": 2, "target_modules": "all-linear"}),
        json!({"type": "prompt", "num_virtual_tokens": 3}),
        json!({"type": "prefix", "num_virtual_tokens": 2}),
    ] {
        set = set.with(method["type"].to_string(), moved(&model, &method));
    }
    let requests: Vec<Request> = [(1, None), (9, Some(0)), (4, Some(1)), (6, Some(2)), (2, Some(1))]
        .map(|(n, slot)| Request { prompt: (0..n).map(|i| (i * 13 + n) % 37).collect(), slot })
        .to_vec();
    let options = GenerateOptions { max_new_tokens: 12, ..GenerateOptions::default() };
    let run = |requests: &[Request]| generate_targets(&model, &set, requests, &options, |_, _| true).unwrap();
    let together = run(&requests);
    for (request, written) in requests.iter().zip(&together) {
        assert_eq!(&run(std::slice::from_ref(request))[0], written);
        assert_eq!(written.len(), 12);
        let mut read = vec![0];
        for token in written {
            assert_eq!(next_by_definition(&model, &set, &request.prompt, &read, request.slot), *token);
            read.push(*token);
        }
    }
    let none = GenerateOptions { max_new_tokens: 0, ..options };
    assert_eq!(generate_targets(&model, &set, &requests, &none, |_, _| true).unwrap(), vec![Vec::<u32>::new(); 5]);
}

/// Given weights.
#[derive(Debug)]
struct Given(HashMap<String, Tensor>);

impl WeightSource for Given {
    fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
    fn weight(&self, name: &str, _: (usize, usize)) -> Result<FrozenWeight> {
        Ok(FrozenWeight::dense(&self.0[name])?)
    }
    fn vector(&self, name: &str, _: usize) -> Result<Tensor> {
        Ok(self.0[name].clone())
    }
    fn describe(&self) -> String {
        "given".into()
    }
}

#[test]
fn a_merged_model_is_the_adapted_one_and_keeps_its_head() {
    for (model, method) in [
        (model(), json!({"type": "lora", "r": 2, "target_modules": "all-linear"})),
        (gated(), json!({"type": "lora", "r": 2, "target_modules": ["relative_attention_bias", "wi_0", "wo"]})),
        // The head is parted from the table, and still gets scaled hidden states.
        (model(), json!({"type": "lora", "r": 2, "target_modules": ["q"], "modules_to_save": ["lm_head"]})),
    ] {
        let adapter = moved(&model, &method);
        let merged = Merged::new(&model, vec![adapter.clone()]).unwrap();
        let tensors =
            merged.tensors().into_iter().map(|(name, _)| (name.clone(), merged.tensor(&name).unwrap())).collect();
        let config = model.config().to_hf_json(merged.tied());
        let config = Seq2SeqConfig::from_hf_map(config, Path::new("config.json")).unwrap();
        let alone = EncoderDecoder::load(config, &Given(tensors), &Placement::cpu(None)).unwrap();
        let set = AdapterSet::one("a", adapter);
        let adapted = loss(&model, &set, &batch(), &Route::Uniform(0));
        let merged_loss = loss(&alone, &AdapterSet::empty(), &batch(), &Route::Base);
        assert!((adapted - merged_loss).abs() < 1e-4, "{method}: {adapted} and {merged_loss}");
    }
}

/// What transformers 5 decides: a head of its own is one that differs from the table, whatever the file says.
#[test]
fn a_head_is_tied_by_what_the_checkpoint_holds() {
    let model = model();
    let merged = Merged::new(&model, Vec::new()).unwrap();
    let mut tensors: HashMap<String, Tensor> =
        merged.tensors().into_iter().map(|(name, _)| (name.clone(), merged.tensor(&name).unwrap())).collect();
    let load = |tensors: &HashMap<String, Tensor>, tie: bool| {
        let config = config(&json!({"tie_word_embeddings": tie}));
        EncoderDecoder::load(config, &Given(tensors.clone()), &Placement::cpu(None)).unwrap()
    };
    assert_eq!(load(&tensors, false).tied_embedding(), Some("shared"));
    tensors.insert("lm_head.weight".into(), tensors["shared.weight"].clone());
    assert_eq!(load(&tensors, true).tied_embedding(), Some("shared"));
    assert_eq!(load(&tensors, false).tied_embedding(), None);
    tensors.insert("lm_head.weight".into(), randn(1, (37, 12), 1.0).unwrap());
    assert_eq!(load(&tensors, true).tied_embedding(), None);
}

#[test]
fn adapters_are_read_as_they_were_written() {
    let model = model();
    let dir = tempfile::tempdir().unwrap();
    for (i, method) in places().into_iter().enumerate().filter(|(_, m)| m["type"] != "full") {
        let adapter = moved(&model, &method);
        let folder = dir.path().join(i.to_string());
        checkpoint::write_adapter_files(&folder, &adapter).unwrap();
        let again = methods::open(&folder, &model).unwrap().adapter;
        assert_eq!(again.config["task_type"], "SEQ_2_SEQ_LM", "{method}");
        let (a, b) = (AdapterSet::one("a", adapter), AdapterSet::one("a", Arc::new(again)));
        let route = Route::Uniform(0);
        let difference = loss(&model, &a, &batch(), &route) - loss(&model, &b, &batch(), &route);
        assert!(difference.abs() < 1e-5, "{method}: {difference}");
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let model = model();
    let set = AdapterSet::empty();
    let ctx = Ctx::eval(&set, &Route::Base);
    let odd = TokenBatch { ids: &[1, 2, 3], positions: &[0; 3], bounds: &[0, 1, 2, 3], types: &[] };
    assert!(model.prepare(odd, &ctx).unwrap_err().to_string().contains("as many targets as sources"));
    let create =
        |method: Value| methods::create(method.as_object().unwrap(), &model, 1).map(|_| ()).unwrap_err().to_string();
    assert!(create(json!({"type": "lora", "task_type": "CAUSAL_LM"})).contains("SEQ_2_SEQ_LM"));
    assert!(create(json!({"type": "lora", "target_modules": ["q_proj"]})).contains("q_proj"));
    let e = methods::create(json!({"type": "prefix", "num_virtual_tokens": 2}).as_object().unwrap(), &gated(), 1);
    assert!(e.map(|_| ()).unwrap_err().to_string().contains("virtual tokens"));
}
