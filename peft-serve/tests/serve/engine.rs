//! Batches whose rows come and go.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use peft_core::Adapter;
use peft_models::Decoder;
use peft_models::generate::GenerateOptions;
use peft_models::sampling::Sampling;
use peft_serve::{ContentHash, Engine, EngineOptions, Event, FinishReason, Generation, Refused, Request};
use serde_json::json;

use crate::base::{Numbers, alone, base, base_with, kinds, registry, trained, write};

fn options() -> EngineOptions {
    EngineOptions { max_rows: 7, cache_tokens: 512, prefill_tokens: 24, queue: 1000, context: None }
}

fn generation(model: &Decoder, kind: &str, seed: u64) -> Arc<Generation> {
    let method = kinds().into_iter().find(|(name, _)| *name == kind).unwrap().1;
    Arc::new(Generation::of(kind, Arc::new(trained(&method, model, seed))).unwrap())
}

/// Every answer of random mixed batches, while another thread replaces, unloads and opens adapters, is what the leased
/// generation gives the request alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_row_is_what_its_request_is_alone_while_adapters_come_and_go() {
    let (model, dir) = (base(), tempfile::tempdir().unwrap());
    // Two generations of each name.
    let mut by_hash: HashMap<ContentHash, Arc<Adapter>> = HashMap::new();
    let sized = registry(&model, None);
    let mut folders: HashMap<(&str, usize), PathBuf> = HashMap::new();
    let mut bytes = 0;
    for (name, method) in kinds() {
        for version in 0..2 {
            let folder = dir.path().join(format!("{name}-{version}"));
            write(&folder, &method, &model, 10 + version as u64);
            let opened = sized.load(name, &folder).unwrap_or_else(|e| panic!("{name}: {e}"));
            bytes = bytes.max(opened.bytes());
            by_hash.insert(opened.hash(), opened.adapter().clone());
            folders.insert((name, version), folder);
        }
    }
    assert_eq!(by_hash.len(), 2 * kinds().len());
    let registry = Arc::new(registry(&model, Some(6 * bytes)));
    let names: Vec<&str> = kinds().into_iter().map(|(name, _)| name).collect();
    registry.register(names.iter().map(|name| (name.to_string(), folders[&(*name, 0)].clone()))).unwrap();

    let engine = Engine::start(model.clone(), None, options()).unwrap();
    let done = AtomicBool::new(false);
    let (mut checked, mut generations) = (0, std::collections::HashSet::new());
    let rounds: usize = std::env::var("SERVE_ROUNDS").ok().map_or(12, |n| n.parse().unwrap());
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let mut numbers = Numbers(99);
            while !done.load(Ordering::Relaxed) {
                let name = names[numbers.below(names.len())];
                if numbers.below(4) == 0 {
                    registry.unload(name);
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                registry.load(name, &folders[&(name, numbers.below(2))]).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(numbers.below(3) as u64));
            }
        });
        tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                let mut numbers = Numbers(1);
                let mut expected: HashMap<(Option<ContentHash>, Vec<u32>, u64), Vec<u32>> = HashMap::new();
                for round in 0..rounds {
                    let mut running = Vec::new();
                    for _ in 0..30 {
                        let name = (numbers.below(9) > 0).then(|| names[numbers.below(names.len())]);
                        // A name that is unloaded at this moment is unknown.
                        let adapter = match name {
                            Some(name) => match registry.lease(name) {
                                Ok(adapter) => Some(adapter),
                                Err(_) => continue,
                            },
                            None => None,
                        };
                        // Prompts shorter and longer than a step reads.
                        let longest = if numbers.below(3) == 0 { 60 } else { 9 };
                        let prompt = numbers.prompt(longest);
                        let mut request = Request::new(prompt, 1 + numbers.below(12));
                        // A third is drawn, the rest greedy.
                        let seed = if numbers.below(3) == 0 { 1 + numbers.below(5) as u64 } else { 0 };
                        if seed > 0 {
                            request.sampling = Sampling { temperature: 0.8, top_p: 0.95, seed, ..Sampling::default() };
                        }
                        request.adapter = adapter.clone();
                        let answer = engine.submit(request.clone()).unwrap();
                        if numbers.below(10) == 0 {
                            continue; // the reader goes away
                        }
                        running.push((request, seed, answer));
                        if numbers.below(4) == 0 {
                            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
                        }
                    }
                    for (request, seed, answer) in running {
                        let got = answer.complete().await.unwrap();
                        let hash = request.adapter.as_ref().map(|a| a.hash());
                        generations.extend(hash);
                        let adapter = hash.map(|hash| &by_hash[&hash]);
                        let key = (hash, request.prompt.clone(), seed + 100 * request.max_tokens as u64);
                        let want = expected.entry(key).or_insert_with(|| {
                            let sampling = &request.sampling;
                            let options = GenerateOptions {
                                max_new_tokens: request.max_tokens,
                                temperature: sampling.temperature,
                                top_p: sampling.top_p,
                                seed,
                                ..GenerateOptions::default()
                            };
                            alone(&model, adapter, &request.prompt, &options)
                        });
                        let name = request.adapter.as_ref().map(|a| a.name().to_owned());
                        assert_eq!(&got.ids, want, "round {round}: {name:?}, {} tokens", request.prompt.len());
                        assert_eq!(got.reason, FinishReason::Length);
                        checked += 1;
                    }
                }
            });
        });
        done.store(true, Ordering::Relaxed);
    });
    assert!(
        checked > rounds * 15 && generations.len() > kinds().len(),
        "{checked} rows, {} generations",
        generations.len()
    );
    // The last of those whose readers went away are noticed at the next step.
    engine.submit(Request::new(vec![1], 1)).unwrap().complete().await.unwrap();
    engine.shutdown();
    engine.stopped().await;
    let stats = engine.stats();
    assert_eq!((stats.waiting, stats.running, stats.cache_used, stats.failed), (0, 0, 0, 0), "{stats:?}");
    assert!(stats.cancelled > 0, "{stats:?}");
}

/// Rotary frequencies that depend on the longest sequence of a pass: a long row must not turn a short one otherwise.
#[tokio::test]
async fn rows_are_turned_as_each_is_alone() {
    let model = base_with(json!({
        "max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}
    }));
    let adapters = [None, Some(generation(&model, "prompt", 1)), Some(generation(&model, "lora", 2))];
    let engine =
        Engine::start(model.clone(), None, EngineOptions { prefill_tokens: 16, context: Some(256), ..options() })
            .unwrap();
    let mut numbers = Numbers(4);
    let mut running = Vec::new();
    for (i, n) in [3, 50, 20, 40, 5, 33].into_iter().enumerate() {
        let prompt: Vec<u32> = (0..n).map(|_| numbers.below(71) as u32).collect();
        let request = Request { adapter: adapters[i % 3].clone(), ..Request::new(prompt, 10) };
        let answer = engine.submit(request.clone()).unwrap();
        running.push((request, answer));
    }
    for (request, answer) in running {
        let options = GenerateOptions { max_new_tokens: 10, ..GenerateOptions::default() };
        let want = alone(&model, request.adapter.as_ref().map(|a| a.adapter()), &request.prompt, &options);
        assert_eq!(answer.complete().await.unwrap().ids, want, "{} tokens", request.prompt.len());
    }
}

#[tokio::test]
async fn a_broken_adapter_fails_its_own_row_alone() {
    let model = base();
    let adapter = trained(&kinds()[0].1, &model, 1);
    for p in adapter.parameters() {
        p.set(&(p.value() * f64::NAN).unwrap()).unwrap();
    }
    let nan = Arc::new(Generation::of("nan", Arc::new(adapter)).unwrap());
    // Made for a model with other widths: its products do not fit.
    let wider = base_with(json!({"hidden_size": 48, "num_attention_heads": 6}));
    let foreign = generation(&wider, "lora", 1);
    let engine = Engine::start(model.clone(), None, options()).unwrap();
    let request =
        |adapter: Option<&Arc<Generation>>| Request { adapter: adapter.cloned(), ..Request::new((1..9).collect(), 6) };
    let answers: Vec<_> =
        [None, Some(&nan), None, Some(&foreign)].map(|a| engine.submit(request(a)).unwrap()).into_iter().collect();
    let mut results = Vec::new();
    for answer in answers {
        results.push(answer.complete().await.map(|c| c.ids));
    }
    let want = alone(
        &model,
        None,
        &(1..9).collect::<Vec<_>>(),
        &GenerateOptions { max_new_tokens: 6, ..GenerateOptions::default() },
    );
    assert_eq!((&results[0], &results[2]), (&Ok(want.clone()), &Ok(want)));
    assert!(results[1].as_ref().unwrap_err().contains("not numbers"), "{:?}", results[1]);
    assert!(results[3].is_err());
    assert_eq!(engine.stats().failed, 2);
}

#[tokio::test]
async fn a_reader_that_goes_away_frees_its_place() {
    let model = base();
    let engine = Engine::start(model, None, EngineOptions { max_rows: 1, queue: 2, ..options() }).unwrap();
    let long = || Request::new(vec![1, 2, 3], 200);
    let mut first = engine.submit(long()).unwrap();
    assert!(matches!(first.next().await, Some(Event::Token(_))));
    let second = engine.submit(Request::new(vec![4], 3)).unwrap();
    let third = engine.submit(long()).unwrap();
    assert_eq!(engine.submit(long()).unwrap_err(), Refused::Busy { waiting: 2 });
    drop((first, third));
    assert_eq!(second.complete().await.unwrap().ids.len(), 3);
    let after = engine.submit(Request::new(vec![5], 2)).unwrap();
    assert_eq!(after.complete().await.unwrap().ids.len(), 2);
    assert_eq!(engine.stats().cancelled, 2);
    // What is there is finished after a shutdown, and nothing is taken.
    let last = engine.submit(Request::new(vec![6], 40)).unwrap();
    engine.shutdown();
    assert_eq!(last.complete().await.unwrap().ids.len(), 40);
    engine.stopped().await;
    assert_eq!(engine.submit(long()).unwrap_err(), Refused::Stopping);
    assert!(!engine.is_running());
}

#[tokio::test]
async fn a_text_ends_where_it_was_asked_to_and_says_how_likely_it_was() {
    let model = base();
    let engine = Engine::start(model.clone(), None, options()).unwrap();
    let options = GenerateOptions { max_new_tokens: 20, ..GenerateOptions::default() };
    let all = alone(&model, None, &[1, 2, 3], &options);
    let stop = all[4];
    let first = all.iter().position(|t| *t == stop).unwrap();
    let request = Request { stop_tokens: vec![stop], logprobs: Some(3), ..Request::new(vec![1, 2, 3], 20) };
    let got = engine.submit(request).unwrap().complete().await.unwrap();
    assert_eq!((&got.ids[..], got.reason), (&all[..first], FinishReason::Stop));
    for (id, logprobs) in got.ids.iter().zip(&got.logprobs) {
        assert_eq!((logprobs.top.len(), logprobs.top[0]), (3, (*id, logprobs.chosen)));
        assert!(logprobs.chosen < 0.0 && logprobs.top[1].1 <= logprobs.chosen);
    }
    assert_eq!(got.logprobs.len(), got.ids.len());
    // A token that may not come does not.
    let sampling = Sampling { logit_bias: vec![(all[0], -1e9)], ..Sampling::default() };
    let got = engine.submit(Request { sampling, ..Request::new(vec![1, 2, 3], 20) }).unwrap().complete().await.unwrap();
    assert!(!got.ids.contains(&all[0]));
    let sampling = Sampling { frequency_penalty: 1e9, ..Sampling::default() };
    let got = engine.submit(Request { sampling, ..Request::new(vec![1, 2, 3], 20) }).unwrap().complete().await.unwrap();
    let distinct: std::collections::HashSet<_> = got.ids.iter().collect();
    assert_eq!(distinct.len(), 20, "a token came twice: {:?}", got.ids);
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_its_field() {
    let (model, dir) = (base(), tempfile::tempdir().unwrap());
    let engine = Engine::start(model.clone(), None, options()).unwrap();
    let good = || Request::new(vec![1, 2], 5);
    let expert = write(dir.path(), &kinds()[0].1, &model, 1);
    let mixture = trained(&json!({"type": "xlora", "adapters": [&expert, &expert]}), &model, 1);
    let mixture = Arc::new(Generation::of("mixture", Arc::new(mixture)).unwrap());
    let wrong = [
        ("prompt", Request { prompt: vec![], ..good() }),
        ("prompt", Request { prompt: vec![71], ..good() }),
        ("max_tokens", Request { max_tokens: 0, ..good() }),
        ("max_tokens", Request { max_tokens: 255, ..good() }),
        ("max_tokens", Request { max_tokens: usize::MAX, ..good() }),
        ("model", Request { adapter: Some(mixture), ..good() }),
        ("stop", Request { stop: vec!["x".into()], ..good() }),
        ("stop", Request { stop: vec![String::new()], ..good() }),
        ("temperature", Request { sampling: Sampling { temperature: f32::NAN, ..Sampling::default() }, ..good() }),
        ("top_p", Request { sampling: Sampling { top_p: 2.0, ..Sampling::default() }, ..good() }),
    ];
    for (field, request) in wrong {
        match engine.submit(request) {
            Err(Refused::Invalid { field: named, .. }) => assert_eq!(named, field),
            other => panic!("{field}: {other:?}"),
        }
    }
    assert_eq!(engine.submit(good()).unwrap().complete().await.unwrap().ids.len(), 5);
    let none = EngineOptions { max_rows: 0, ..options() };
    assert!(Engine::start(base(), None, none).unwrap_err().to_string().contains("max_rows"));
}
