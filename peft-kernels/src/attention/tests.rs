#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;

use super::{AttentionPlan, SequenceSpan, attention, backward, biased_attention, cpu, forward, neutral};
use crate::seed;
use crate::testing::{check_gradients_with, close, randn};

/// The definition, in f64 and one logit at a time: the result and the gradients of q, k, v and the bias, whose row `zero` is
/// for distance 0.
fn reference(plan: &AttentionPlan, args: &[Vec<f64>; 5], zero: usize) -> [Vec<f64>; 5] {
    let [q, k, v, d_out, bias] = args;
    let (d, qw, kw) = (plan.head_dim, plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
    let mut result = [q, q, k, v, bias].map(|x| vec![0f64; x.len()]);
    let [out, dq, dk, dv, d_bias] = &mut result;
    for s in &plan.sequences {
        for h in 0..plan.heads {
            let kv = h / (plan.heads / plan.kv_heads);
            for (i, token) in s.queries.clone().enumerate() {
                let p = i as i64 + s.keys.len() as i64 - s.queries.len() as i64;
                let seen = |j: i64| {
                    let w = plan.window.map(|w| i64::try_from(w).unwrap_or(i64::MAX / 2));
                    match plan.causal {
                        true => j <= p && w.is_none_or(|w| j > p - w),
                        false => w.is_none_or(|w| (j - p).abs() <= w),
                    }
                };
                // The prefix stands before the own keys.
                let prefix = s.prefix.clone().filter(|j| seen(*j as i64 - s.prefix.end as i64));
                let keys: Vec<usize> =
                    prefix.chain(s.keys.clone().filter(|j| seen((j - s.keys.start) as i64))).collect();
                let place = |j: usize| {
                    if s.prefix.contains(&j) { j as i64 - s.prefix.end as i64 } else { (j - s.keys.start) as i64 }
                };
                let of_bias = |j: usize| (zero as i64 + place(j) - p) as usize * plan.heads + h;
                let qi = &q[token * qw + h * d..][..d];
                let head = |t: &[f64], j: usize| t[j * kw + kv * d..][..d].to_vec();
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let scale = f64::from(plan.scale);
                let added = |j: usize| if bias.is_empty() { 0.0 } else { bias[of_bias(j)] };
                let raw: Vec<f64> = keys.iter().map(|j| dot(qi, &head(k, *j)) * scale + added(*j)).collect();
                let cap = plan.softcap.map(f64::from);
                let logits: Vec<f64> = raw.iter().map(|x| cap.map_or(*x, |c| c * (x / c).tanh())).collect();
                let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
                let probs: Vec<f64> = logits.iter().map(|x| (x - max).exp() / sum).collect();
                let g = &d_out[token * qw + h * d..][..d];
                let dp: Vec<f64> = keys.iter().map(|j| dot(g, &head(v, *j))).collect();
                let delta = dot(&probs, &dp);
                for (n, j) in keys.iter().enumerate() {
                    let d_cap = cap.map_or(1.0, |c| 1.0 - (raw[n] / c).tanh().powi(2));
                    let d_logit = probs[n] * (dp[n] - delta) * d_cap;
                    if !bias.is_empty() {
                        d_bias[of_bias(*j)] += d_logit;
                    }
                    let ds = d_logit * scale;
                    for e in 0..d {
                        let (at, to) = (token * qw + h * d + e, *j * kw + kv * d + e);
                        out[at] += probs[n] * v[to];
                        dq[at] += ds * k[to];
                        dk[to] += ds * q[at];
                        dv[to] += probs[n] * d_out[at];
                    }
                }
            }
        }
    }
    result
}

/// q, k, v and the gradient of the result.
fn tensors(plan: &AttentionPlan, q_tokens: usize, k_tokens: usize) -> [Tensor; 4] {
    let (qw, kw) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
    let make = |seed, rows, width| randn(seed, (rows, width), 1.0).unwrap();
    [make(1, q_tokens, qw), make(2, k_tokens, kw), make(3, k_tokens, kw), make(4, q_tokens, qw)]
}

fn to_f64(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// [`reference`] without a bias.
fn unbiased(plan: &AttentionPlan, args: &[Tensor; 4]) -> [Vec<f64>; 5] {
    let [q, k, v, d_out] = args.each_ref().map(to_f64);
    reference(plan, &[q, k, v, d_out, Vec::new()], 0)
}

/// Result and gradients through the graph.
fn run(plan: &Arc<AttentionPlan>, args: &[Tensor; 4]) -> [Tensor; 4] {
    let [q, k, v] = [0, 1, 2].map(|i| Var::from_tensor(&args[i]).unwrap());
    let y = attention(&q, &k, &v, plan).unwrap();
    let grads = seed(&y, &args[3]).unwrap().backward().unwrap();
    let grad = |v: &Var| grads.get(v).unwrap().clone();
    [y.detach(), grad(&q), grad(&k), grad(&v)]
}

/// Result and gradients, those of the bias too, through a recording.
fn recorded(plan: &Arc<AttentionPlan>, args: &[Tensor; 4], bias: &Tensor, zero: usize) -> Vec<Tensor> {
    let [q, k, v, bias] = [&args[0], &args[1], &args[2], bias].map(|t| Var::from_tensor(t).unwrap());
    let (y, record) = crate::record(|| biased_attention([&q, &k, &v], &bias, zero, plan)).unwrap();
    let grads: std::collections::HashMap<_, _> = record.backward(&args[3]).unwrap().into_iter().collect();
    std::iter::once(y.detach()).chain([&q, &k, &v, &bias].map(|v| grads[&v.as_tensor().id()].clone())).collect()
}

/// Tokens that a plan's ranges reach.
fn tokens(plan: &AttentionPlan) -> (usize, usize) {
    let of = |f: fn(&SequenceSpan) -> usize| plan.sequences.iter().map(f).max().unwrap_or(0);
    (of(|s| s.queries.end), of(|s| s.keys.end.max(s.prefix.end)))
}

const NAMES: [&str; 5] = ["result", "dq", "dk", "dv", "d_bias"];

/// Holds the fused form on every instruction set, and the neutral form, against the definition.
fn check(plan: AttentionPlan) {
    let (q_tokens, k_tokens) = tokens(&plan);
    if plan.softcap.is_none() {
        // Rows for distances that no pair has must get no gradient.
        let (before, after) = (2 * k_tokens + 3, q_tokens + k_tokens + 2);
        check_with(plan.clone(), Some((randn(5, (before + after, plan.heads), 1.0).unwrap(), before)));
    }
    check_with(plan, None);
}

fn check_with(plan: AttentionPlan, bias: Option<(Tensor, usize)>) {
    let (q_tokens, k_tokens) = tokens(&plan);
    let plan = Arc::new(plan);
    // Rows that belong to no sequence must give zeros.
    let args = tensors(&plan, q_tokens + 1, k_tokens + 1);
    let neutral_bias = bias.as_ref().map(|(bias, zero)| (bias, *zero));
    let want = match &bias {
        None => unbiased(&plan, &args),
        Some((bias, zero)) => {
            let [q, k, v, d_out] = args.each_ref().map(to_f64);
            reference(&plan, &[q, k, v, d_out, to_f64(bias)], *zero)
        }
    };
    let needs = [true, true, true, bias.is_some()];
    let compare = |what: &str, got: &[f64], i: usize| {
        let tolerance = 2e-5 * (1.0 + (k_tokens as f64).sqrt() / 4.0);
        for (at, (x, y)) in got.iter().zip(&want[i]).enumerate() {
            let d = (x - y).abs() / y.abs().max(1.0);
            assert!(d <= tolerance, "{what} {}: element {at} is {x}, not {y}, with {plan:?}", NAMES[i]);
        }
        assert_eq!(got.len(), want[i].len());
    };
    let fused = match &bias {
        None => run(&plan, &args).to_vec(),
        Some((bias, zero)) => recorded(&plan, &args, bias, *zero),
    };
    for (i, t) in fused.iter().enumerate() {
        compare("fused", &to_f64(t), i);
    }
    let [q, k, v, g] = &args;
    let y = neutral::forward(&plan, q, k, v, neutral_bias).unwrap();
    compare("neutral", &to_f64(&y), 0);
    let grads = neutral::backward(&plan, [q, k, v], neutral_bias, &y, g, needs).unwrap();
    for (i, t) in grads.iter().flatten().enumerate() {
        compare("neutral", &to_f64(t), i + 1);
    }
    let flat = args.each_ref().map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    let mut machines = vec![("scalar", pulp::Arch::Scalar)];
    #[cfg(target_arch = "x86_64")]
    machines.extend(pulp::x86::V3::try_new().map(|v3| ("AVX2", pulp::Arch::V3(v3))));
    let flat_bias = bias.as_ref().map(|(b, zero)| (b.flatten_all().unwrap().to_vec1::<f32>().unwrap(), *zero));
    let table = flat_bias.map(|(bias, zero)| super::bias::Table::new(&bias, plan.heads, zero));
    for (name, arch) in machines {
        let mut problem = cpu::Problem::new(&plan, &flat[0], &flat[1], &flat[2]).unwrap();
        problem.arch = arch;
        problem.bias = table.as_ref();
        let (out, lse) = forward::forward(&problem);
        compare(name, &wide(&out), 0);
        let up = backward::Upstream { out: &out, grad: &flat[3], lse: &lse };
        for (i, g) in backward::backward(&problem, up, needs).iter().flatten().enumerate() {
            compare(name, &wide(g), i + 1);
        }
    }
}

fn span(queries: std::ops::Range<usize>, keys: std::ops::Range<usize>, prefix: std::ops::Range<usize>) -> SequenceSpan {
    SequenceSpan { queries, keys, prefix }
}

#[test]
fn head_dims_and_lengths() {
    for d in [8, 12, 64, 80, 128] {
        check(AttentionPlan::causal(2, 1, d, &[1, 2, 7, 33]));
    }
    for n in [1, 2, 4, 5, 7, 33, 64, 65, 130] {
        check(AttentionPlan::causal(2, 2, 16, &[n]));
        check(AttentionPlan { causal: false, ..AttentionPlan::causal(2, 2, 16, &[n]) });
    }
}

#[test]
fn grouped_queries_over_unequal_sequences() {
    for (heads, kv_heads) in [(6, 2), (4, 1), (3, 3)] {
        let plan = AttentionPlan::causal(heads, kv_heads, 20, &[65, 1, 130, 33, 0, 2, 70]);
        check(AttentionPlan { causal: false, ..plan.clone() });
        check(plan);
    }
}

#[test]
fn one_long_sequence_in_several_runs() {
    check(AttentionPlan::causal(2, 1, 16, &[400]));
    check(AttentionPlan { causal: false, window: Some(90), ..AttentionPlan::causal(2, 1, 16, &[400]) });
}

#[test]
fn windows() {
    for window in [1, 4, 16, 63, 64, 100, usize::MAX] {
        for causal in [true, false] {
            let plan = AttentionPlan::causal(2, 1, 12, &[130, 33, 3]);
            check(AttentionPlan { window: Some(window), causal, ..plan });
        }
    }
}

#[test]
fn softcap_and_scale() {
    for scale in [0.0, 0.7, -0.3] {
        for softcap in [None, Some(0.5), Some(30.0)] {
            check(AttentionPlan { softcap, scale, ..AttentionPlan::causal(3, 1, 16, &[70, 2, 9]) });
        }
    }
}

#[test]
fn a_cache_of_more_keys_than_queries() {
    let sequences = vec![span(0..1, 0..130, 0..0), span(1..40, 130..300, 0..0), span(40..43, 300..1400, 0..0)];
    for window in [None, Some(16)] {
        let plan = AttentionPlan { sequences: sequences.clone(), window, ..AttentionPlan::causal(4, 2, 24, &[]) };
        check(AttentionPlan { causal: false, ..plan.clone() });
        check(plan);
    }
}

#[test]
fn more_queries_than_keys_leave_some_blind() {
    let sequences = vec![span(0..70, 0..5, 0..0), span(70..73, 5..6, 0..0), span(73..75, 6..6, 0..0)];
    let plan = AttentionPlan { sequences, ..AttentionPlan::causal(2, 1, 8, &[]) };
    let args = tensors(&plan, 75, 6);
    let y = attention(&args[0], &args[1], &args[2], &Arc::new(plan.clone())).unwrap();
    let blind = y.narrow(0, 0, 65).unwrap().abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(blind, 0.0);
    check(plan);
}

#[test]
fn prefixes_shared_and_not() {
    // Keys 0..10 are a prefix of two sequences, 10..80 of one, and the last sequence sees nothing but a prefix.
    let sequences = vec![
        span(0..33, 80..113, 0..10),
        span(33..100, 113..180, 0..10),
        span(100..102, 180..182, 10..80),
        span(102..170, 182..250, 10..80),
        span(170..175, 250..250, 3..5),
    ];
    for window in [None, Some(4)] {
        for causal in [true, false] {
            let plan =
                AttentionPlan { sequences: sequences.clone(), window, causal, ..AttentionPlan::causal(4, 2, 16, &[]) };
            check(AttentionPlan { softcap: Some(20.0), ..plan.clone() });
            check(plan);
        }
    }
}

#[test]
fn nothing_at_all() {
    check(AttentionPlan::causal(2, 1, 8, &[]));
    check(AttentionPlan::causal(2, 1, 8, &[0, 0]));
    let plan = Arc::new(AttentionPlan::causal(2, 1, 8, &[]));
    let none = |w: usize| Tensor::zeros((0, w), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(attention(&none(16), &none(8), &none(8), &plan).unwrap().dims(), &[0, 16]);
}

#[test]
fn gradients_match_finite_differences() {
    let sequences = vec![span(0..9, 4..13, 0..4), span(9..12, 13..20, 0..4)];
    let plan = AttentionPlan { sequences, softcap: Some(5.0), window: Some(6), ..AttentionPlan::causal(4, 2, 8, &[]) };
    let plan = Arc::new(plan);
    let [q, k, v, _] = tensors(&plan, 12, 20);
    check_gradients_with(&[q, k, v], 3e-3, 1e-2, |a| attention(&a[0], &a[1], &a[2], &plan)).unwrap();
}

#[test]
fn gradients_under_a_bias_match_finite_differences() {
    let sequences = vec![span(0..9, 4..13, 0..4), span(9..12, 13..20, 0..4)];
    for causal in [true, false] {
        let plan = AttentionPlan { sequences: sequences.clone(), causal, ..AttentionPlan::causal(4, 2, 8, &[]) };
        let plan = Arc::new(plan);
        let [q, k, v, _] = tensors(&plan, 12, 20);
        let bias = randn(6, (24, 4), 1.0).unwrap();
        check_gradients_with(&[q, k, v], 3e-3, 1e-2, |a| biased_attention([&a[0], &a[1], &a[2]], &bias, 14, &plan))
            .unwrap();
    }
}

#[test]
fn biases_that_do_not_fit_are_errors() {
    let plan = AttentionPlan { causal: false, ..AttentionPlan::causal(4, 2, 8, &[5, 3]) };
    let [q, k, v, _] = tensors(&plan, 8, 8);
    let run = |plan: &AttentionPlan, bias: &Tensor, zero| {
        biased_attention([&q, &k, &v], bias, zero, &Arc::new(plan.clone())).map_err(|e| e.to_string())
    };
    let bias = |rows: usize, heads: usize| randn(7, (rows, heads), 1.0).unwrap();
    assert!(run(&plan, &bias(9, 4), 4).is_ok());
    for (rows, heads, zero, says) in
        [(9, 2, 4, "4 heads"), (8, 4, 4, "too short"), (9, 4, 3, "too short"), (9, 4, usize::MAX, "too short")]
    {
        let e = run(&plan, &bias(rows, heads), zero).unwrap_err();
        assert!(e.contains(says), "{e}");
    }
    let causal = AttentionPlan { causal: true, ..plan.clone() };
    assert!(run(&causal, &bias(5, 4), 4).is_ok());
    assert!(
        run(&AttentionPlan { softcap: Some(2.0), ..plan.clone() }, &bias(9, 4), 4).unwrap_err().contains("soft cap")
    );
    let tracked = Var::from_tensor(&bias(9, 4)).unwrap();
    assert!(run(&plan, &tracked, 4).unwrap_err().contains("recording"));
    assert!(run(&plan, &bias(9, 4).to_dtype(DType::BF16).unwrap(), 4).unwrap_err().contains("BF16"));
}

#[test]
fn only_tracked_arguments_get_gradients() {
    let plan = Arc::new(AttentionPlan::causal(4, 2, 16, &[70, 9]));
    let args = tensors(&plan, 79, 79);
    let want = run(&plan, &args);
    for tracked in 1..8 {
        let vars: Vec<Var> = args[..3].iter().map(|t| Var::from_tensor(t).unwrap()).collect();
        let arg = |i: usize| match tracked >> i & 1 {
            1 => vars[i].as_tensor().clone(),
            _ => args[i].clone(),
        };
        let y = attention(&arg(0), &arg(1), &arg(2), &plan).unwrap();
        let grads = seed(&y, &args[3]).unwrap().backward().unwrap();
        for i in 0..3 {
            assert_eq!(grads.get(&arg(i)).is_some(), tracked >> i & 1 == 1);
            if let Some(g) = grads.get(&arg(i)) {
                close(NAMES[i + 1], g, &want[i + 1], 0.0).unwrap();
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let mut plan = AttentionPlan::causal(6, 2, 64, &[300, 130, 1, 65]);
    // A shared prefix in front, and a decoding step with a long cache behind.
    plan.sequences.iter_mut().for_each(|s| {
        s.keys = s.keys.start + 20..s.keys.end + 20;
        s.prefix = 0..20;
    });
    plan.sequences.push(span(496..497, 516..3000, 0..20));
    let plan = Arc::new(plan);
    let args = tensors(&plan, 497, 3000);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&plan, &args)).map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap())
    };
    let one = on(1);
    for threads in [2, 3, 8] {
        assert!(one == on(threads), "{threads} threads give other bits than one");
    }
}

#[test]
fn half_precision_goes_through_the_neutral_form() {
    for dtype in [DType::BF16, DType::F16] {
        let plan = Arc::new(AttentionPlan::causal(4, 2, 16, &[33, 9]));
        let args = tensors(&plan, 42, 42);
        let low = args.each_ref().map(|t| t.to_dtype(dtype).unwrap());
        let back = low.each_ref().map(|t| t.to_dtype(DType::F32).unwrap());
        for (i, (got, want)) in run(&plan, &low).iter().zip(run(&plan, &back)).enumerate() {
            assert_eq!(got.dtype(), dtype);
            close(NAMES[i], &got.to_dtype(DType::F32).unwrap(), &want, 3e-2).unwrap();
        }
    }
}

#[test]
fn a_nan_is_not_hidden() {
    for n in [3usize, 70] {
        let plan = Arc::new(AttentionPlan::causal(2, 1, 16, &[n]));
        let [q, k, v, _] = tensors(&plan, n, n);
        let mut row = k.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        row[(n - 2) * 16 + 3] = f32::NAN;
        let k = Tensor::from_vec(row, (n, 16), &Device::Cpu).unwrap();
        let y = attention(&q, &k, &v, &plan).unwrap().to_vec2::<f32>().unwrap();
        for (i, row) in y.iter().enumerate() {
            assert_eq!(row.iter().all(|x| x.is_nan()), i >= n - 2, "row {i} of {n}");
            assert_eq!(row.iter().any(|x| x.is_nan()), i >= n - 2, "row {i} of {n}");
        }
    }
}

#[test]
fn large_logits_do_not_overflow() {
    let plan = Arc::new(AttentionPlan { scale: 50.0, ..AttentionPlan::causal(2, 1, 64, &[90]) });
    let args = tensors(&plan, 90, 90);
    let want = unbiased(&plan, &args);
    for (got, want) in run(&plan, &args).iter().zip(&want).take(1) {
        for (x, y) in to_f64(got).iter().zip(want) {
            // Logits of ±2000 in f32 are right to 1e-4.
            assert!((x - y).abs() < 5e-3, "{x} {y}");
        }
    }
}

#[test]
fn plans_that_do_not_fit_are_errors() {
    let good = AttentionPlan::causal(4, 2, 8, &[5, 3]);
    let [q, k, v, _] = tensors(&good, 8, 8);
    let message = |plan: AttentionPlan| attention(&q, &k, &v, &Arc::new(plan)).unwrap_err().to_string();
    let with = |sequences: Vec<SequenceSpan>| AttentionPlan { sequences, ..good.clone() };
    assert!(attention(&q, &k, &v, &Arc::new(good.clone())).is_ok());
    assert!(message(AttentionPlan { kv_heads: 3, ..good.clone() }).contains("num_key_value_heads"));
    assert!(message(AttentionPlan { kv_heads: 0, ..good.clone() }).contains("num_key_value_heads"));
    assert!(message(AttentionPlan { heads: 2, kv_heads: 2, ..good.clone() }).contains("shape"));
    assert!(message(AttentionPlan { head_dim: usize::MAX, ..good.clone() }).contains("shape"));
    assert!(message(AttentionPlan { head_dim: 0, ..good.clone() }).contains("heads"));
    assert!(message(AttentionPlan { window: Some(0), ..good.clone() }).contains("window"));
    assert!(message(AttentionPlan { softcap: Some(0.0), ..good.clone() }).contains("softcap"));
    assert!(message(AttentionPlan { softcap: Some(f32::NAN), ..good.clone() }).contains("softcap"));
    assert!(message(AttentionPlan { scale: f32::INFINITY, ..good.clone() }).contains("scale"));
    assert!(message(AttentionPlan::causal(4, 2, 8, &[5, 4])).contains("leave"));
    assert!(message(with(vec![span(0..4, 0..4, 0..9)])).contains("prefix"));
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = 4..2;
    assert!(message(with(vec![span(backwards, 0..4, 0..0)])).contains("leave"));
    assert!(message(with(vec![span(0..4, 0..4, 0..0), span(3..8, 4..8, 0..0)])).contains("share queries"));
    assert!(message(with(vec![span(0..4, 0..4, 0..0), span(4..8, 3..8, 0..0)])).contains("share keys"));
    assert!(message(with(vec![span(0..4, 0..4, 3..5)])).contains("overlaps"));
    let short = v.narrow(0, 0, 7).unwrap();
    assert!(attention(&q, &k, &short, &Arc::new(good.clone())).unwrap_err().to_string().contains("values"));
    let low = v.to_dtype(DType::BF16).unwrap();
    assert!(attention(&q, &k, &low, &Arc::new(good.clone())).is_err());
    assert!(attention(&q.unsqueeze(0).unwrap(), &k, &v, &Arc::new(good)).is_err());
}

prop_compose! {
    fn plans()(
        kv_heads in 1usize..3,
        group in 1usize..4,
        head_dim in prop_oneof![1usize..20, Just(32), Just(48)],
        causal: bool,
        window in proptest::option::of(1usize..90),
        softcap in proptest::option::of(0.3f32..20.0),
        prefix in prop_oneof![Just(0usize), 1usize..90],
        lengths in proptest::collection::vec((0usize..100, 0usize..100, 0usize..5, 0usize..3), 1..5),
    ) -> AttentionPlan {
        let (mut query, mut key) = (0, prefix);
        let sequences = lengths.iter().map(|(nq, nk, gap, kind)| {
            query += gap;
            key += gap;
            let nk = if *kind == 0 { *nq } else { *nk };
            let s = span(query..query + nq, key..key + nk, match kind {
                0 => 0..0,
                1 => 0..prefix,
                _ => prefix / 2..prefix,
            });
            (query, key) = (query + nq, key + nk);
            s
        }).collect();
        AttentionPlan {
            causal, window, softcap, sequences,
            ..AttentionPlan::causal(kv_heads * group, kv_heads, head_dim, &[])
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn random_plans(plan in plans()) {
        check(plan);
    }
}
