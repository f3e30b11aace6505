//! Preference objectives: their rows, and their losses and gradients beside a plain reference and finite differences.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod data_support;
mod model_support;

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_core::kernels::testing::randn;
use peft_core::{Adapter, AdapterSet, BaseModel, Ctx, Parameter, Route, Segmented, StepRng, TokenBatch};
use peft_models::Decoder;
use peft_models::config::DecoderConfig;
use peft_models::source::{Placement, RandomSource};
use peft_train::data::{
    Batch, DataSpec, Dataset, EncodeOptions, Format, Mismatched, PreferenceBatch, Preferences, Preferred,
};
use peft_train::{
    Checkpointing, DpoLoss, Grads, Keep, LossOf, MicroBatch, Objective, Preference, PreferenceLoss, PreferenceStep,
    Reference, evaluate_preferences, forward_backward, measure, token_losses,
};
use serde_json::json;

use self::data_support::{CHATML, Folder, tokenizer};
use self::model_support::moved;

fn decoder(vocab: usize) -> Decoder {
    let config = json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": 12,
        "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3, "hidden_act": "silu"});
    let config = DecoderConfig::from_hf_map(config.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
    let source = RandomSource { seed: 3, std: 0.4, untied_head: true, placement: Placement::cpu(None) };
    Decoder::load(config, &source, &Placement::cpu(None)).unwrap()
}

/// Prompts and answers of three rows, of unlike lengths.
const PAIRS: &str = "{\"prompt_ids\": [3, 9, 4], \"chosen_ids\": [5, 8], \"rejected_ids\": [30, 2, 7, 1]}
{\"prompt_ids\": [11, 2], \"chosen_ids\": [6, 6, 20], \"rejected_ids\": [14]}
{\"prompt_ids\": [1, 35, 2, 2, 19], \"chosen_ids\": [7], \"rejected_ids\": [9, 3]}
";
const SINGLES: &str = "{\"prompt_ids\": [3, 9, 4], \"completion_ids\": [5, 8], \"label\": true}
{\"prompt_ids\": [11, 2], \"completion_ids\": [14, 3, 3], \"label\": false}
{\"prompt_ids\": [1, 35, 2, 2, 19], \"completion_ids\": [9], \"label\": 0}
";

fn rows(text: &str, objective: &Preference) -> Preferences {
    let folder = Folder::new();
    let path = folder.write("rows.jsonl", text);
    Preferences::load(&DataSpec::from(path.as_path()), None, &EncodeOptions::new(Format::Preference), objective)
        .unwrap()
}

fn named(name: &str) -> Preference {
    Preference::named(name).unwrap()
}

/// Log-likelihoods in `f64` of each sequence's counted tokens, from the logits of the whole batch.
fn log_likelihoods(model: &Decoder, batch: &Batch, ctx: &Ctx<'_>) -> Vec<Vec<f64>> {
    let tokens =
        TokenBatch { ids: &batch.input_ids, positions: &batch.position_ids, bounds: &batch.bounds, types: &[] };
    let input = model.prepare(tokens, ctx).unwrap();
    let mut hidden = model.embed(tokens, ctx).unwrap();
    for i in 0..model.num_blocks() {
        hidden = model.block(i, &hidden, &input, ctx).unwrap();
    }
    let logits = model.logits(&model.final_norm(&hidden, ctx).unwrap(), ctx).unwrap();
    let logits = logits.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let of_sequence = |s: usize| {
        let counted = (batch.bounds[s] + 1..batch.bounds[s + 1]).filter(|&t| batch.labels[t] >= 0);
        let one = |t: usize| {
            let row = &logits[t - 1];
            row[batch.labels[t] as usize] - row.iter().map(|x| x.exp()).sum::<f64>().ln()
        };
        counted.map(one).collect::<Vec<f64>>()
    };
    (0..batch.sequences()).map(of_sequence).collect()
}

fn base(model: &Decoder, batch: &Batch) -> Vec<f64> {
    let set = AdapterSet::empty();
    let found = log_likelihoods(model, batch, &Ctx::eval(&set, &Route::Base));
    found.iter().map(|tokens| tokens.iter().sum()).collect()
}

/// Rows with what they are compared with, written down without the library's help.
fn with_reference(model: &Decoder, of: &Preferences, rows: &[usize], objective: &Preference) -> PreferenceBatch {
    let mut batch = of.batch(rows, objective.counts_prompts());
    if objective.has_reference() {
        batch.reference = base(model, &batch.batch);
    }
    if objective.takes_single_answers() {
        let b = &batch.batch;
        let sequence = |s: usize| (&b.input_ids[b.bounds[s]..b.bounds[s + 1]], &b.labels[b.bounds[s]..b.bounds[s + 1]]);
        let (mut ids, mut labels, mut bounds) = (Vec::new(), Vec::new(), vec![0]);
        for s in 0..b.sequences() {
            let (prompt, of_prompt) = sequence(s);
            let (answer, of_answer) = sequence(if s == 0 { b.sequences() - 1 } else { s - 1 });
            let prompt_tokens = of_prompt.iter().position(|l| *l >= 0).unwrap();
            let skip = of_answer.iter().position(|l| *l >= 0).unwrap();
            ids.extend(prompt[..prompt_tokens].iter().chain(&answer[skip..]).copied());
            labels.extend(std::iter::repeat_n(-100, prompt_tokens).chain(of_answer[skip..].iter().copied()));
            bounds.push(ids.len());
        }
        let position_ids = bounds.windows(2).flat_map(|b| 0..(b[1] - b[0]) as u32).collect();
        let mixed = Batch { input_ids: ids, labels, bounds, position_ids, ..Batch::default() };
        let reference = base(model, &mixed);
        batch.mismatched = Some(Box::new(Mismatched { batch: mixed, reference }));
    }
    batch
}

fn sigma(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The papers' losses of all rows together, written down plainly; `kl` is a constant.
fn plain(objective: &Preference, batches: &[PreferenceBatch], likelihoods: &[Vec<Vec<f64>>], kl: f64) -> f64 {
    let beta = objective.beta;
    let (mut losses, mut prompt_and_chosen) = (Vec::new(), Vec::new());
    for (batch, likelihoods) in batches.iter().zip(likelihoods) {
        let answer = |s: usize| -> (f64, f64, f64) {
            // The answer is what stands behind the prompt, which only ORPO counts, in the two or one rows of a part.
            let of_answer = match (objective.counts_prompts(), batch.rows.len(), s) {
                (true, 2, 0) => 2,
                (true, 2, 1) => 3,
                (true, 1, 0) => 1,
                _ => likelihoods[s].len(),
            };
            let tokens = &likelihoods[s][likelihoods[s].len() - of_answer..];
            let sum: f64 = tokens.iter().sum();
            (sum, batch.reference.get(s).copied().unwrap_or(0.0), tokens.len() as f64)
        };
        for row in &batch.rows {
            let one = |(pi, rho, _): (f64, f64, f64), desirable: bool| {
                let PreferenceLoss::Kto { desirable_weight: d, undesirable_weight: u } = objective.loss else {
                    panic!()
                };
                let h = pi - rho;
                if desirable { d * (1.0 - sigma(beta * (h - kl))) } else { u * (1.0 - sigma(beta * (kl - h))) }
            };
            let (c, r) = match *row {
                Preferred::One { answer: a, desirable } => {
                    losses.push(one(answer(a), desirable));
                    continue;
                }
                Preferred::Pair { chosen, rejected } => {
                    prompt_and_chosen.extend(likelihoods[chosen].iter().map(|l| -l));
                    (answer(chosen), answer(rejected))
                }
            };
            let h = (c.0 - c.1) - (r.0 - r.1);
            let (m_c, m_r) = (c.0 / c.2, r.0 / r.2);
            match objective.loss {
                PreferenceLoss::Dpo { loss: DpoLoss::Sigmoid, label_smoothing: e } => {
                    losses.push(-(1.0 - e) * sigma(beta * h).ln() - e * sigma(-beta * h).ln());
                }
                PreferenceLoss::Dpo { loss: DpoLoss::Hinge, .. } => losses.push((1.0 - beta * h).max(0.0)),
                PreferenceLoss::Dpo { loss: DpoLoss::Robust, label_smoothing: e } => {
                    let (clean, flipped) = (-(1.0 - e) * sigma(beta * h).ln(), -e * sigma(-beta * h).ln());
                    losses.push((clean - flipped) / (1.0 - 2.0 * e));
                }
                PreferenceLoss::Ipo => {
                    losses.push(((c.0 - c.1) / c.2 - (r.0 - r.1) / r.2 - 0.5 / beta).powi(2));
                }
                PreferenceLoss::Kto { .. } => losses.extend([one(c, true), one(r, false)]),
                PreferenceLoss::Orpo => {
                    let odds = |m: f64| m.exp() / (1.0 - m.exp());
                    losses.push(-beta * sigma((odds(m_c) / odds(m_r)).ln()).ln());
                }
                PreferenceLoss::Simpo { gamma, label_smoothing: e } => {
                    let x = beta * (m_c - m_r) - gamma;
                    losses.push(-(1.0 - e) * sigma(x).ln() - e * sigma(-x).ln());
                }
            }
        }
    }
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    mean(&losses) + if objective.counts_prompts() { mean(&prompt_and_chosen) } else { 0.0 }
}

/// Loss and gradients through the driver, for a `kl` that was made before.
fn by_driver(
    model: &Decoder,
    adapter: &Arc<Adapter>,
    objective: &Preference,
    parts: &[PreferenceBatch],
    kl: f64,
    checkpointing: Checkpointing,
) -> (f64, Vec<Tensor>) {
    let set = AdapterSet::one("a", adapter.clone());
    let ctx = Ctx::train(&set, &Route::Uniform(0), StepRng::default());
    let parameters: Vec<Parameter> = adapter.parameters().into_iter().cloned().collect();
    let mut grads = Grads::new(&parameters.iter().collect::<Vec<_>>());
    let step = PreferenceStep { kl, ..PreferenceStep::of(objective, parts) };
    let total = Cell::new(0.0);
    for part in parts {
        let weigh = |nll: &[f32]| {
            let weighed = objective.weigh(nll, part, &step);
            total.set(total.get() + weighed.value);
            weighed.weights
        };
        let lowest = adapter.lowest_segment(model.sites()).unwrap();
        let keep = Keep::from(checkpointing);
        forward_backward(model, &part.batch, &ctx, lowest, keep, LossOf::Weighed(&weigh), &mut grads).unwrap();
    }
    (total.get(), grads.into_vec().into_iter().map(Option::unwrap).collect())
}

fn objectives() -> Vec<Preference> {
    let dpo = |loss, label_smoothing| Preference { loss: PreferenceLoss::Dpo { loss, label_smoothing }, beta: 0.3 };
    vec![
        named("dpo"),
        dpo(DpoLoss::Sigmoid, 0.2),
        dpo(DpoLoss::Hinge, 0.0),
        dpo(DpoLoss::Robust, 0.1),
        Preference { beta: 0.5, ..named("ipo") },
        Preference { loss: PreferenceLoss::Kto { desirable_weight: 1.5, undesirable_weight: 0.5 }, beta: 0.4 },
        Preference { beta: 0.8, ..named("orpo") },
        Preference { loss: PreferenceLoss::Simpo { gamma: 0.7, label_smoothing: 0.1 }, beta: 2.0 },
    ]
}

#[test]
fn losses_and_gradients_are_the_papers() {
    let model = decoder(37);
    // A head that is trained itself, and parameters below it.
    let with_head =
        json!({"type": "lora", "r": 2, "target_modules": ["v_proj", "down_proj"], "modules_to_save": ["lm_head"]});
    let methods = [json!({"type": "lora", "r": 2, "target_modules": "all-linear"}), with_head];
    let singles =
        Preference { loss: PreferenceLoss::Kto { desirable_weight: 1.5, undesirable_weight: 0.5 }, beta: 0.4 };
    let cases = objectives().into_iter().map(|objective| (objective, PAIRS)).chain([(singles, SINGLES)]);
    for ((objective, text), method) in cases.flat_map(|case| methods.iter().map(move |m| (case, m))) {
        let adapter = moved(&model, method);
        let set = AdapterSet::one("a", adapter.clone());
        let ctx = Ctx::eval(&set, &Route::Uniform(0));
        let of = rows(text, &objective);
        let parts = [with_reference(&model, &of, &[0, 1], &objective), with_reference(&model, &of, &[2], &objective)];
        let kl = {
            let mixed = parts.iter().filter_map(|part| part.mismatched.as_deref());
            let differences = mixed.flat_map(|mixed| {
                let own = log_likelihoods(&model, &mixed.batch, &ctx);
                own.iter().zip(&mixed.reference).map(|(own, rho)| own.iter().sum::<f64>() - rho).collect::<Vec<_>>()
            });
            let differences: Vec<f64> = differences.collect();
            (differences.iter().sum::<f64>() / differences.len().max(1) as f64).max(0.0)
        };
        let value = || {
            let likelihoods: Vec<_> = parts.iter().map(|part| log_likelihoods(&model, &part.batch, &ctx)).collect();
            plain(&objective, &parts, &likelihoods, kl)
        };
        let (loss, grads) = by_driver(&model, &adapter, &objective, &parts, kl, Checkpointing::Off);
        assert!((loss - value()).abs() < 3e-5 * loss.abs(), "{objective:?} {method}: {loss}, not {}", value());
        let micro_batches = parts.clone().map(MicroBatch::Preferences);
        let (own, measured) = measure(Objective::Preference(objective), None, &model, &micro_batches, &ctx).unwrap();
        assert!((loss - measured).abs() < 1e-5 * loss.abs(), "{objective:?}: {loss} and {measured}");
        assert_eq!(own.counted, 2 + 3 + 1, "{objective:?}");
        let again = by_driver(&model, &adapter, &objective, &parts, kl, Checkpointing::Full).1;
        for (i, (p, grad)) in adapter.parameters().into_iter().zip(&grads).enumerate() {
            let difference = (grad - &again[i]).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(difference <= 1e-5, "{} recomputed: {difference}", p.name());
            let start = p.value().copy().unwrap();
            let d = randn(50 + i as u64, start.dims().to_vec(), 1.0).unwrap();
            let norm = d.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            let d = (d / f64::from(norm)).unwrap();
            let at = |h: f64| {
                p.set(&(&start + (&d * h).unwrap()).unwrap()).unwrap();
                value()
            };
            let numeric = (at(2e-3) - at(-2e-3)) / 4e-3;
            p.set(&start).unwrap();
            let analytic = f64::from((grad * d).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
            let size = numeric.abs().max(analytic.abs()).max(0.02);
            let close = (numeric - analytic).abs() < 2e-2 * size;
            assert!(close, "{method} {objective:?} {}: {analytic}, not {numeric}", p.name());
        }
    }
}

/// Whatever the batch size, evaluation is the objective over all rows; of an adapter that does nothing, it is known.
#[test]
fn evaluation_does_not_depend_on_the_batch_size() {
    let model = decoder(37);
    let adapter = moved(&model, &json!({"type": "lora", "r": 2, "target_modules": "all-linear"}));
    let set = AdapterSet::one("a", adapter);
    let ctx = Ctx::eval(&set, &Route::Uniform(0));
    for (objective, text) in objectives().into_iter().map(|o| (o, PAIRS)).chain([(named("kto"), SINGLES)]) {
        let of = rows(text, &objective);
        let at = |batch_size: usize| {
            let mut reference = Reference::new(None, &of);
            evaluate_preferences(&model, &of, &objective, &mut reference, &ctx, batch_size, |_| {}).unwrap()
        };
        let (one, all) = (at(1), at(3));
        assert!(
            (one.objective - all.objective).abs() < 1e-5 * (1.0 + all.objective.abs()),
            "{objective:?} {one:?} {all:?}"
        );
        // What a whole batch gives by the driver's weights.
        let batch = with_reference(&model, &of, &[0, 1, 2], &objective);
        let micro_batches = [MicroBatch::Preferences(batch.clone())];
        let (own, value) = measure(Objective::Preference(objective), None, &model, &micro_batches, &ctx).unwrap();
        assert!((value - all.objective).abs() < 1e-5 * (1.0 + value.abs()), "{objective:?} {value} {all:?}");
        assert_eq!(own.counted, all.scored.own.counted);
        let (names, again): (Vec<_>, Vec<_>) = all.scored.rewards.named().unzip();
        assert!(
            names.contains(&"rewards_margin") && names.contains(&"rewards_accuracy") == (text == PAIRS),
            "{names:?}"
        );
        for (a, b) in again.iter().zip(one.scored.rewards.named()) {
            assert!((a - b.1).abs() < 1e-4, "{names:?} {a} {b:?}");
        }
        // The base against itself.
        let (none, route) = (AdapterSet::empty(), Route::Base);
        let mut reference = Reference::new(None, &of);
        let itself =
            evaluate_preferences(&model, &of, &objective, &mut reference, &Ctx::eval(&none, &route), 2, |_| {});
        let margin = itself.unwrap().scored.rewards.named().find(|(name, _)| *name == "rewards_margin").unwrap().1;
        assert_eq!(margin.abs() < 1e-5, objective.has_reference(), "{objective:?} {margin}");
    }
}

/// An adapter as the reference: against itself nothing is gained.
#[test]
fn an_adapter_may_be_the_reference() {
    let model = decoder(37);
    let adapter = moved(&model, &json!({"type": "lora", "r": 2, "target_modules": "all-linear"}));
    let set = AdapterSet::one("a", adapter.clone());
    let ctx = Ctx::eval(&set, &Route::Uniform(0));
    let of = rows(PAIRS, &named("dpo"));
    let value = |reference: Option<Arc<Adapter>>| {
        let mut reference = Reference::new(reference, &of);
        evaluate_preferences(&model, &of, &named("dpo"), &mut reference, &ctx, 2, |_| {}).unwrap().objective
    };
    assert!((value(Some(adapter)) - std::f64::consts::LN_2).abs() < 1e-6);
    assert!((value(None) - std::f64::consts::LN_2).abs() > 1e-3);
}

fn load(text: &str, objective: &str, set: impl FnOnce(&mut EncodeOptions)) -> Result<Preferences, String> {
    let folder = Folder::new();
    let path = folder.write("rows.jsonl", text);
    let mut options = EncodeOptions::new(Format::Preference);
    set(&mut options);
    let tokenizer = tokenizer(Some(CHATML));
    let spec = DataSpec::from(path.as_path());
    Preferences::load(&spec, Some(&tokenizer), &options, &named(objective)).map_err(|e| e.to_string())
}

/// Text of the tokens of each sequence that count, and of the others.
fn texts(batch: &PreferenceBatch) -> Vec<(String, String)> {
    let tokenizer = tokenizer(None);
    let decode = |ids: Vec<u32>| tokenizer.inner().decode(&ids, false).unwrap();
    let b = &batch.batch;
    let of = |s: usize, counted: bool| {
        let span = b.bounds[s]..b.bounds[s + 1];
        decode(span.filter(|&t| (b.labels[t] >= 0) == counted).map(|t| b.input_ids[t]).collect())
    };
    (0..b.sequences()).map(|s| (of(s, true), of(s, false))).collect()
}

#[test]
fn rows_are_texts_messages_or_tokens() {
    let text = "{\"prompt\": \"a b\", \"chosen\": \" yes\", \"rejected\": \" no\"}\n";
    let of = load(text, "dpo", |_| {}).unwrap();
    assert_eq!((of.len(), of.sequences(), of.most_answers()), (1, 2, 2));
    let [chosen, rejected] = [0, 1].map(|s| texts(&of.batch(&[0], false))[s].clone());
    assert_eq!(chosen, (" yes</s>".into(), "<s>a b".into()));
    assert_eq!(rejected, (" no</s>".into(), "<s>a b".into()));
    // The tokens are those of a completion row.
    let folder = Folder::new();
    let path = folder.write("c.jsonl", "{\"prompt\": \"a b\", \"completion\": \" yes\"}\n");
    let options = EncodeOptions::new(Format::Completion);
    let (completion, _) =
        Dataset::load(&DataSpec::from(path.as_path()), None, Some(&tokenizer(None)), &options).unwrap();
    let batch = of.batch(&[0], false).batch;
    assert_eq!(&batch.input_ids[..batch.bounds[1]], completion.input_ids(0));
    assert_eq!(&batch.labels[..batch.bounds[1]], completion.labels(0));
    // ORPO counts the chosen row's prompt, and knows which tokens are the answer.
    let whole = of.batch(&[0], true);
    assert_eq!(texts(&whole)[0], ("<s>a b yes</s>".into(), String::new()));
    assert_eq!(texts(&whole)[1].0, " no</s>");
    let answer = whole.in_answer.iter().filter(|counts| **counts).count();
    assert_eq!(answer, batch.targets().ids.len());

    let chat = "{\"prompt\": [{\"role\": \"user\", \"content\": \"hi\"}, {\"role\": \"assistant\", \"content\": \"hey\"}, \
                {\"role\": \"user\", \"content\": \"well?\"}], \"chosen\": [{\"role\": \"assistant\", \"content\": \"yes\"}], \
                \"rejected\": [{\"role\": \"assistant\", \"content\": \"no\"}]}\n";
    let whole = "{\"prompt\": \"well?\", \"chosen\": [{\"role\": \"user\", \"content\": \"hi\"}, {\"role\": \"assistant\", \
                 \"content\": \"hey\"}, {\"role\": \"user\", \"content\": \"well?\"}, {\"role\": \"assistant\", \"content\": \"yes\"}], \
                 \"rejected\": [{\"role\": \"user\", \"content\": \"hi\"}, {\"role\": \"assistant\", \"content\": \"hey\"}, \
                 {\"role\": \"user\", \"content\": \"well?\"}, {\"role\": \"assistant\", \"content\": \"no\"}]}\n";
    let one = "{\"prompt\": \"hi\", \"completion\": [{\"role\": \"assistant\", \"content\": \"yes\"}], \"label\": \"True\"}\n\
               {\"prompt\": \"hi\", \"completion\": \"no\", \"label\": false}\n";
    for text in [chat, whole] {
        let of = load(text, "ipo", |_| {}).unwrap();
        let found = texts(&of.batch(&[0], false));
        assert_eq!((found[0].0.as_str(), found[1].0.as_str()), ("yes<|im_end|>", "no<|im_end|>"), "{text}");
        assert!(found[0].1.contains("hey") && found[0].1.contains("well?"), "{found:?}");
    }
    let of = load(one, "kto", |_| {}).unwrap();
    assert_eq!(
        texts(&of.batch(&[0, 1], false)).iter().map(|t| t.0.as_str()).collect::<Vec<_>>(),
        ["yes<|im_end|>", "no</s>"]
    );
    let kinds = [Preferred::One { answer: 0, desirable: true }, Preferred::One { answer: 1, desirable: false }];
    assert_eq!(of.batch(&[0, 1], false).rows, kinds);

    // Chosen answers of all rows come first; rows keep their answers.
    let of = rows(PAIRS, &named("dpo"));
    let batch = of.batch(&[2, 0], false);
    assert_eq!(batch.batch.rows, [4, 0, 5, 1]);
    assert_eq!(batch.rows, [Preferred::Pair { chosen: 0, rejected: 2 }, Preferred::Pair { chosen: 1, rejected: 3 }]);
    let templated = load("{\"q\": \"a\", \"chosen\": \"y\", \"rejected\": \"n\"}\n", "dpo", |options| {
        options.template = Some("Q: {{ q }} A: ".into());
    });
    assert_eq!(texts(&templated.unwrap().batch(&[0], false))[1], ("n</s>".into(), "<s>Q: a A: ".into()));
}

#[test]
fn rows_that_will_not_do_are_named() {
    let pair = |chosen: &str, rejected: &str| {
        format!("{{\"prompt\": \"a\", \"chosen\": {chosen}, \"rejected\": {rejected}}}\n")
    };
    let message = |role: &str, text: &str| format!("[{{\"role\": \"{role}\", \"content\": \"{text}\"}}]");
    let one = |label: &str| format!("{{\"prompt\": \"a\", \"completion\": \"b\", \"label\": {label}}}\n");
    for (text, objective, says) in [
        (pair("\"b\"", "\"b\""), "dpo", "rows.jsonl:1: `chosen` and `rejected` are the same"),
        (pair("\"\"", "\"b\""), "dpo", "rows.jsonl:1: `chosen` is empty"),
        (pair("\"b\"", "[]"), "dpo", "`rejected` is empty"),
        (pair("\"b\"", "3"), "dpo", "column `rejected`: expected a text or a list of messages, found a number"),
        ("{\"prompt\": \"a\", \"chosen\": \"b\"}\n".into(), "dpo", "column `rejected` is missing"),
        ("{\"prompt\": \"a\", \"rejected\": \"b\"}\n".into(), "simpo", "column `chosen` is missing"),
        ("{\"chosen\": \"a\", \"rejected\": \"b\"}\n".into(), "orpo", "column `prompt` is missing"),
        ("{\"text\": \"a\"}\n".into(), "dpo", "column `chosen` is missing, the row has `text`"),
        (one("true"), "dpo", "dpo compares two answers, and this row has one"),
        (one("true") + &one("true"), "kto", "every row has `label` true; add undesirable ones"),
        (one("false"), "kto", "every row has `label` false; add desirable ones"),
        (one("\"good\""), "kto", "`label` is \"good\"; it is true"),
        (one("2"), "kto", "`label` is 2; it is true"),
        ("{\"prompt\": \"a\", \"completion\": \"b\"}\n".into(), "kto", "column `label` is missing"),
        ("{\"prompt\": \"a\", \"completion\": \"b\", \"chosen\": \"c\"}\n".into(), "kto", "leave one or the other out"),
        (pair(&message("user", "b"), &message("user", "c")), "dpo", "`chosen` has no turn of the assistant"),
        (pair(&message("assistant", "b"), &message("assistant", "b")), "dpo", "are the same"),
        ("{\"prompt_ids\": [1], \"chosen_ids\": [2], \"rejected_ids\": []}\n".into(), "dpo", "`rejected_ids` is empty"),
        ("{\"prompt_ids\": [1], \"chosen_ids\": [2], \"rejected_ids\": [2]}\n".into(), "dpo", "are the same"),
        ("{\"prompt_ids\": [1], \"chosen_ids\": [2], \"rejected_ids\": [-2]}\n".into(), "dpo", "rejected_ids[0] is -2"),
        (
            "{\"prompt_ids\": [], \"chosen_ids\": [2], \"rejected_ids\": [3]}\n".into(),
            "dpo",
            "no token of this row counts",
        ),
    ] {
        let e = load(&text, objective, |_| {}).unwrap_err();
        assert!(e.contains(says), "{text}{e}\nlacks {says}");
    }
    let e = load(&pair("\"b c d e f\"", "\"b c d e g\""), "dpo", |options| options.max_length = Some(4)).unwrap_err();
    assert!(e.contains("are the same, once they are cut to data.max_length"), "{e}");
    let e = load(&pair("\"b\"", "\"c\""), "dpo", |options| options.template = Some("{{ chosen }}".into())).unwrap_err();
    assert!(e.contains("data.template reads column `chosen`"), "{e}");
    let folder = Folder::new();
    let path = folder.write("rows.jsonl", pair("\"b\"", "\"c\""));
    let options = EncodeOptions::new(Format::Preference);
    let spec = DataSpec::from(path.as_path());
    let e = Preferences::load(&spec, None, &options, &named("dpo")).unwrap_err().to_string();
    assert!(e.contains("needs a tokenizer"), "{e}");
    let e = Preferences::load(&spec, Some(&tokenizer(None)), &options, &named("dpo"));
    assert!(e.is_ok());
    let path = folder.write("chat.jsonl", pair(&message("assistant", "b"), &message("assistant", "c")));
    let e = Preferences::load(&DataSpec::from(path.as_path()), Some(&tokenizer(None)), &options, &named("dpo"));
    assert!(e.unwrap_err().to_string().contains("need a chat template"));
}

/// The likelihoods that evaluation keeps are those of single passes.
#[test]
fn likelihoods_are_those_of_the_tokens() {
    let model = decoder(37);
    let of = rows(PAIRS, &named("dpo"));
    let batch = of.batch(&[0, 1, 2], false);
    let set = AdapterSet::empty();
    let nll = token_losses(&model, &batch.batch, &Ctx::eval(&set, &Route::Base)).unwrap();
    for (answer, expected) in batch.answers(&nll).iter().zip(base(&model, &batch.batch)) {
        assert!((answer.log_likelihood - expected).abs() < 1e-4, "{answer:?} {expected}");
    }
}
