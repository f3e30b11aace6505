//! Objectives on rows with choices: T-Few's losses beside a plain reference and finite differences, and scores of choices.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod data_support;
mod model_support;

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_core::kernels::testing::randn;
use peft_core::{Adapter, AdapterSet, Ctx, Parameter, Route, Segmented, StepRng, TokenBatch};
use peft_models::config::{DecoderConfig, Seq2SeqConfig};
use peft_models::source::{Placement, RandomSource};
use peft_models::{Decoder, EncoderDecoder};
use peft_train::data::{Batch, ChoiceBatch, ChoiceRow, Choices, DataSpec, EncodeOptions, Format, Predictor};
use peft_train::{
    Checkpointing, Counts, Grads, Keep, LossOf, MicroBatch, Objective, TFew, evaluate_choices, forward_backward,
    measure,
};
use serde_json::json;

use self::data_support::{Folder, tokenizer};
use self::model_support::moved;

fn source() -> RandomSource {
    RandomSource { seed: 3, std: 0.4, untied_head: true, placement: Placement::cpu(None) }
}

fn decoder(vocab: usize) -> Decoder {
    let config = json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": 12,
        "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3, "hidden_act": "silu"});
    let config = DecoderConfig::from_hf_map(config.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
    Decoder::load(config, &source(), &Placement::cpu(None)).unwrap()
}

fn t5() -> EncoderDecoder {
    let config = json!({"model_type": "t5", "vocab_size": 37, "d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 2,
        "num_heads": 3, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": false, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0});
    let config = Seq2SeqConfig::from_hf_map(config.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
    EncoderDecoder::load(config, &source(), &Placement::cpu(None)).unwrap()
}

/// Lengths of answers, of rows with three, two and one of them wrong twice as long.
const ANSWERS: [(&[usize], usize); 3] = [(&[2, 1, 3], 1), (&[1, 4], 0), (&[2, 2], 1)];

fn token(i: usize) -> u32 {
    (i * 7 % 34 + 3) as u32
}

/// Rows on a decoder: a prompt of three tokens and each answer behind it.
fn causal(rows: &[usize]) -> ChoiceBatch {
    let mut batch = Batch { bounds: vec![0], ..Batch::default() };
    let rows_of = rows.iter().map(|&row| {
        let (lengths, right) = ANSWERS[row];
        let first = batch.bounds.len() - 1;
        for (answer, &n) in lengths.iter().enumerate() {
            let ids: Vec<u32> =
                (0..3).map(|i| token(row + i)).chain((0..n).map(|i| token(row * 5 + answer * 3 + i + 9))).collect();
            batch.labels.extend(ids.iter().enumerate().map(|(i, &id)| if i < 3 { -100 } else { id as i32 }));
            batch.position_ids.extend(0..ids.len() as u32);
            batch.input_ids.extend(ids);
            batch.bounds.push(batch.input_ids.len());
        }
        ChoiceRow { sequences: first..batch.bounds.len() - 1, right }
    });
    let rows = rows_of.collect();
    ChoiceBatch { batch, rows, sources: Vec::new(), with_end: true }
}

/// The same on an encoder–decoder, with the prompt as the source.
fn paired(rows: &[usize]) -> ChoiceBatch {
    let mut batch = Batch { bounds: vec![0], predictor: Predictor::Own, ..Batch::default() };
    let (mut of_rows, mut sources) = (Vec::new(), Vec::new());
    let mut push = |ids: &[u32], labels: &[i32]| {
        batch.input_ids.extend(ids);
        batch.position_ids.extend(0..ids.len() as u32);
        batch.labels.extend(labels);
        batch.bounds.push(batch.input_ids.len());
    };
    for &row in rows {
        let (lengths, right) = ANSWERS[row];
        let first = sources.len();
        for (answer, &n) in lengths.iter().enumerate() {
            let labels: Vec<i32> = (0..n).map(|i| token(row * 5 + answer * 3 + i + 9) as i32).collect();
            let read: Vec<u32> = std::iter::once(0).chain(labels.iter().map(|&l| l as u32)).take(n).collect();
            push(&read, &labels);
            sources.push((0..4).map(|i| token(row + i)).collect::<Vec<_>>());
        }
        of_rows.push(ChoiceRow { sequences: first..sources.len(), right });
    }
    for source in &sources {
        push(source, &vec![-100; source.len()]);
    }
    ChoiceBatch { batch, rows: of_rows, sources: Vec::new(), with_end: true }
}

/// Log-likelihoods in `f64` of each answer's tokens, from the logits of the whole batch.
fn log_likelihoods<M: Segmented>(model: &M, choices: &ChoiceBatch, ctx: &Ctx<'_>) -> Vec<Vec<Vec<f64>>> {
    let batch = &choices.batch;
    let tokens =
        TokenBatch { ids: &batch.input_ids, positions: &batch.position_ids, bounds: &batch.bounds, types: &[] };
    let input = model.prepare(tokens, ctx).unwrap();
    let mut hidden = model.embed(tokens, ctx).unwrap();
    for i in 0..model.num_blocks() {
        hidden = model.block(i, &hidden, &input, ctx).unwrap();
    }
    let logits = model.logits(&model.final_norm(&hidden, ctx).unwrap(), ctx).unwrap();
    let logits = logits.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let distance = usize::from(batch.predictor == Predictor::Previous);
    let of_sequence = |s: usize| {
        let span = batch.bounds[s]..batch.bounds[s + 1];
        let counted = span.filter(|&t| batch.labels[t] >= 0);
        let one = |t: usize| {
            let row = &logits[t - distance];
            let sum: f64 = row.iter().map(|x| x.exp()).sum();
            row[batch.labels[t] as usize] - sum.ln()
        };
        counted.map(one).collect::<Vec<f64>>()
    };
    choices.rows.iter().map(|row| row.sequences.clone().map(of_sequence).collect()).collect()
}

/// The paper's three means, written down plainly.
fn reference(losses: TFew, rows: &[ChoiceRow], likelihoods: &[Vec<Vec<f64>>]) -> f64 {
    let (mut right, mut wrong, mut softmax) = (Vec::new(), Vec::new(), Vec::new());
    for (row, answers) in rows.iter().zip(likelihoods) {
        let means: Vec<f64> = answers.iter().map(|a| a.iter().sum::<f64>() / a.len() as f64).collect();
        let sum: f64 = means.iter().map(|m| m.exp()).sum();
        softmax.push(-(means[row.right].exp() / sum).ln());
        for (i, answer) in answers.iter().enumerate() {
            match i == row.right {
                true => right.extend(answer.iter().map(|l| -l)),
                false => wrong.extend(answer.iter().map(|l| -(1.0 - l.exp() + 0.01).ln())),
            }
        }
    }
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    mean(&right) + losses.unlikelihood * mean(&wrong) + losses.length_normalised * mean(&softmax)
}

/// Loss and gradients through the driver, the rows in two micro-batches.
fn by_driver<M: Segmented>(
    model: &M,
    adapter: &Arc<Adapter>,
    losses: TFew,
    parts: &[ChoiceBatch],
    checkpointing: Checkpointing,
) -> (f64, Vec<Tensor>) {
    let set = AdapterSet::one("a", adapter.clone());
    let rng = StepRng::default();
    let ctx = Ctx::train(&set, &Route::Uniform(0), rng);
    let parameters: Vec<Parameter> = adapter.parameters().into_iter().cloned().collect();
    let mut grads = Grads::new(&parameters.iter().collect::<Vec<_>>());
    let counts = Counts::of(&parts.iter().cloned().map(MicroBatch::Choices).collect::<Vec<_>>());
    let total = std::cell::Cell::new(0.0);
    for part in parts {
        let weigh = |nll: &[f32]| {
            let (value, weights) = losses.weigh(nll, part, &counts);
            total.set(total.get() + value);
            weights
        };
        let lowest = adapter.lowest_segment(model.sites()).unwrap();
        let keep = Keep::from(checkpointing);
        forward_backward(model, &part.batch, &ctx, lowest, keep, LossOf::Weighed(&weigh), &mut grads).unwrap();
    }
    (total.get(), grads.into_vec().into_iter().map(Option::unwrap).collect())
}

fn t_few_is_the_papers<M: Segmented>(model: &M, of: impl Fn(&[usize]) -> ChoiceBatch, methods: &[serde_json::Value]) {
    let weights = [(1.0, 1.0), (0.0, 0.0), (2.0, 0.0), (0.0, 0.5)];
    for (method, (unlikelihood, length_normalised)) in methods.iter().flat_map(|m| weights.map(|w| (m, w))) {
        let losses = TFew { unlikelihood, length_normalised };
        let adapter = moved(model, method);
        let set = AdapterSet::one("a", adapter.clone());
        let ctx = Ctx::eval(&set, &Route::Uniform(0));
        let whole = of(&[0, 1, 2]);
        let value = || reference(losses, &whole.rows, &log_likelihoods(model, &whole, &ctx));
        let parts = [of(&[0, 1]), of(&[2])];
        let (loss, grads) = by_driver(model, &adapter, losses, &parts, Checkpointing::Off);
        assert!((loss - value()).abs() < 2e-5 * loss.abs(), "{method} {losses:?}: {loss}, not {}", value());
        let micro_batches = parts.clone().map(MicroBatch::Choices);
        let (_, measured) = measure(Objective::TFew(losses), None, model, &micro_batches, &ctx).unwrap();
        assert!((loss - measured).abs() < 1e-6 * loss.abs(), "{loss} and {measured}");
        let again = by_driver(model, &adapter, losses, &parts, Checkpointing::Full).1;
        for (i, (p, grad)) in adapter.parameters().into_iter().zip(&grads).enumerate() {
            let difference = (grad - &again[i]).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(difference <= 1e-6, "{} recomputed", p.name());
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
            assert!(
                (numeric - analytic).abs() < 2e-2 * size,
                "{method} {losses:?} {}: {analytic}, not {numeric}",
                p.name()
            );
        }
    }
}

#[test]
fn t_few_on_a_decoder() {
    let methods = [
        json!({"type": "ia3", "target_modules": "paper"}),
        // A head that is trained itself, and parameters below it.
        json!({"type": "ia3", "target_modules": ["v_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]}),
    ];
    t_few_is_the_papers(&decoder(37), causal, &methods);
}

#[test]
fn t_few_on_an_encoder_decoder() {
    t_few_is_the_papers(&t5(), paired, &[json!({"type": "ia3", "target_modules": "paper"})]);
}

#[test]
fn a_certain_wrong_token_has_a_finite_loss() {
    let choices = causal(&[1]);
    let counts = Counts::of(&[MicroBatch::Choices(choices.clone())]);
    assert_eq!(counts, Counts { right: 1, wrong: 4, rows: 1 });
    let losses = TFew { unlikelihood: 1.0, length_normalised: 0.0 };
    let (loss, weights) = losses.weigh(&[0.0; 5], &choices, &counts);
    assert!((loss - 100f64.ln()).abs() < 1e-9, "{loss}");
    assert_eq!(weights[0], 1.0);
    assert!(weights[1..].iter().all(|w| (w + 25.0).abs() < 1e-9), "{weights:?}");
}

/// What is compared, counted and refused, on rows of a file.
#[test]
fn choices_of_rows() {
    let folder = Folder::new();
    let tokenizer = tokenizer(None);
    let options = EncodeOptions::new(Format::Completion);
    let load = |rows: &str, given: &[&str]| {
        let path = folder.write("rows.jsonl", rows);
        let given: Vec<String> = given.iter().map(ToString::to_string).collect();
        Choices::load(&DataSpec::from(path.as_path()), Format::Completion, Some(&tokenizer), &options, &given)
            .map_err(|e| e.to_string())
    };
    let rows = "{\"prompt\": \"a \", \"completion\": \"yes\"}\n{\"prompt\": \"b c \", \"completion\": \"no\"}\n";
    let choices = load(rows, &["yes", "no"]).unwrap();
    assert_eq!((choices.len(), choices.classes(), choices.most_answers()), (2, Some(2), 2));
    let batch = choices.batch(&[1, 0]);
    assert_eq!(batch.rows.iter().map(|r| (r.sequences.clone(), r.right)).collect::<Vec<_>>(), [(0..2, 1), (2..4, 0)]);
    let counted: usize = batch.spans().iter().map(ExactSizeIterator::len).sum();
    assert_eq!(counted, batch.batch.targets().ids.len());
    // The end token of "yes" is dear, and counts only where an answer begins with another.
    let nll: Vec<f32> =
        batch.spans().iter().flat_map(|s| (0..s.len()).map(|i| if i + 1 == s.len() { 9.0 } else { 0.5 })).collect();
    let scores = batch.scores(&nll);
    assert!(scores.iter().flatten().all(|s| (s.nll - s.nll_of_text - 9.0).abs() < 1e-6 && s.tokens > 1));
    assert!(!batch.with_end && load(rows, &["yes", "no", "no!"]).unwrap().batch(&[0]).with_end);

    let own = "{\"prompt\": \"a\", \"completion\": \"yes\", \"choices\": [\"yes\", \"perhaps\", \"no\"]}\n";
    assert_eq!(load(own, &[]).unwrap().classes(), None);
    assert_eq!(load(own, &["yes", "no"]).unwrap().most_answers(), 3);
    for (rows, given, says) in [
        (rows, &[][..], "rows.jsonl:1: has no choices"),
        (rows, &["yes", "nope"], "rows.jsonl:2: its completion \"no\" is none of the choices"),
        (rows, &["yes"], "rows.jsonl:2: its completion"),
        (rows, &["yes", "no", "yes"], "\"yes\" twice"),
        ("{\"prompt\": \"a\", \"completion\": \"yes\", \"choices\": \"yes\"}\n", &["yes", "no"], "list of texts"),
        ("{\"prompt\": \"a\", \"completion\": \"yes\", \"choices\": [\"yes\"]}\n", &[], "two or more"),
    ] {
        let e = load(rows, given).unwrap_err();
        assert!(e.contains(says), "{e}\nlacks {says}");
    }
    let path = folder.write("text.jsonl", "{\"text\": \"a\"}\n");
    let e = Choices::load(&DataSpec::from(path.as_path()), Format::Text, Some(&tokenizer), &options, &[]).unwrap_err();
    assert!(e.to_string().contains("completion, alpaca, classification, seq2seq"), "{e}");
}

/// Accuracy and F1 of choices: those of evaluation, and with their sign turned those of an objective.
#[test]
fn scores_are_objectives() {
    let model = decoder(37);
    let set = AdapterSet::one("a", moved(&model, &json!({"type": "ia3"})));
    let ctx = Ctx::eval(&set, &Route::Uniform(0));
    let choices = causal(&[0, 1, 2]);
    let likelihoods = log_likelihoods(&model, &choices, &ctx);
    let best = |answers: &Vec<Vec<f64>>| {
        let sums = answers.iter().map(|a| a.iter().sum::<f64>()).enumerate();
        sums.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0
    };
    let right = choices.rows.iter().zip(&likelihoods).filter(|(row, a)| best(a) == row.right).count();
    let micro_batches = [MicroBatch::Choices(choices)];
    let (own, value) = measure(Objective::Accuracy, Some(3), &model, &micro_batches, &ctx).unwrap();
    assert!((value + right as f64 / 3.0).abs() < 1e-12, "{value} {right}");
    assert_eq!(own.counted, 1 + 1 + 2);
    let (_, f1) = measure(Objective::F1, Some(3), &model, &micro_batches, &ctx).unwrap();
    assert!((-1.0..=0.0).contains(&f1));

    let folder = Folder::new();
    let path = folder
        .write("r.jsonl", "{\"prompt\": \"a \", \"completion\": \"b\"}\n{\"prompt\": \"c\", \"completion\": \"d\"}\n");
    let tokenizer = tokenizer(None);
    let options = EncodeOptions::new(Format::Completion);
    let answers = ["b".to_string(), "d".to_string()];
    let spec = DataSpec::from(path.as_path());
    let choices = Choices::load(&spec, Format::Completion, Some(&tokenizer), &options, &answers).unwrap();
    let model = decoder(400);
    let (set, route) = (AdapterSet::empty(), Route::Base);
    let ctx = Ctx::eval(&set, &route);
    let one = evaluate_choices(&model, &choices, &ctx, 1, |_| {}).unwrap();
    let two = evaluate_choices(&model, &choices, &ctx, 2, |_| {}).unwrap();
    assert_eq!((one.rows, one.right, one.f1()), (two.rows, two.right, two.f1()));
    assert!((one.own.nll - two.own.nll).abs() < 1e-5);
    let (_, value) =
        measure(Objective::F1, choices.classes(), &model, &[MicroBatch::Choices(choices.batch(&[0, 1]))], &ctx)
            .unwrap();
    assert!((value + one.f1().unwrap()).abs() < 1e-12);
}
