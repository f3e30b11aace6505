use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_cuda::Element;
use peft_cuda::attention::{Gradients, Inputs, Plan, Span, TableAddresses, Upstream};
use peft_cuda_emulation::{Buffer, Order};
use peft_kernels::{AttentionPlan, SequenceSpan};

use super::harness::*;

/// A plan with the numbers of tokens of its queries and keys, and how many distances its bias has on each side.
struct Case {
    plan: Plan,
    tokens: usize,
    key_rows: usize,
    bias: Option<usize>,
}

fn span(queries: Range<usize>, keys: Range<usize>, prefix: Range<usize>) -> Span {
    Span { queries, keys, prefix }
}

fn plan(heads: usize, kv_heads: usize, head_dim: usize, causal: bool, sequences: Vec<Span>) -> Plan {
    let scale = 1.0 / (head_dim as f32).sqrt();
    Plan { heads, kv_heads, head_dim, scale, causal, window: None, softcap: None, sequences }
}

/// Sequences of the given lengths, one after another.
fn packed(lengths: &[usize]) -> (Vec<Span>, usize) {
    let mut end = 0;
    let of = |n: &usize| {
        end += n;
        span(end - n..end, end - n..end, 0..0)
    };
    let spans = lengths.iter().map(of).collect();
    (spans, lengths.iter().sum())
}

fn case(plan: Plan, tokens: usize, key_rows: usize) -> Case {
    Case { plan, tokens, key_rows, bias: None }
}

/// In `f64` by the book: the result, log-sum-exps in base 2, and gradients of q, k, v and the bias.
struct Reference {
    out: Vec<f64>,
    lse: Vec<f64>,
    grads: [Vec<f64>; 4],
}

fn reference(c: &Case, [q, k, v, bias, dout]: [&[f64]; 5]) -> Reference {
    let Plan { heads, kv_heads, head_dim: d, scale, causal, window, softcap, ref sequences } = c.plan;
    let zero = c.bias.unwrap_or(0);
    let mut r = Reference {
        out: vec![0.0; q.len()],
        lse: vec![f64::INFINITY; heads * c.tokens],
        grads: [q, k, v, bias].map(|t| vec![0.0; t.len()]),
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for s in sequences {
        let keys: Vec<usize> = s.prefix.clone().chain(s.keys.clone()).collect();
        for (i, token) in s.queries.clone().enumerate() {
            let p = (i + keys.len()) as i64 - s.queries.len() as i64;
            let sees = |j: i64| match (causal, window.map(|w| w.min(1 << 40) as i64)) {
                (true, Some(w)) => j <= p && j > p - w,
                (true, None) => j <= p,
                (false, Some(w)) => (j - p).abs() <= w,
                (false, None) => true,
            };
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let at = |row: usize| (row * kv_heads + kv) * d..(row * kv_heads + kv + 1) * d;
                let mine = (token * heads + head) * d..(token * heads + head + 1) * d;
                let seen: Vec<(usize, usize)> = (0..keys.len())
                    .filter(|j| sees(*j as i64))
                    .map(|j| {
                        (keys[j], if c.bias.is_some() { ((zero + j) as i64 - p) as usize * heads + head } else { 0 })
                    })
                    .collect();
                let mut slopes = Vec::new();
                let logits: Vec<f64> = seen
                    .iter()
                    .map(|(row, bias_at)| {
                        let x = f64::from(scale) * dot(&q[mine.clone()], &k[at(*row)]);
                        let t = softcap.map_or(0.0, |c| (x / f64::from(c)).tanh());
                        slopes.push(1.0 - t * t);
                        softcap.map_or(x, |c| f64::from(c) * t) + if c.bias.is_some() { bias[*bias_at] } else { 0.0 }
                    })
                    .collect();
                if logits.is_empty() {
                    continue;
                }
                let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
                r.lse[head * c.tokens + token] = (max + sum.ln()) * std::f64::consts::LOG2_E;
                let probabilities: Vec<f64> = logits.iter().map(|x| (x - max).exp() / sum).collect();
                for ((row, _), p) in seen.iter().zip(&probabilities) {
                    r.out[mine.clone()].iter_mut().zip(&v[at(*row)]).for_each(|(o, v)| *o += p * v);
                }
                let delta = dot(&dout[mine.clone()], &r.out[mine.clone()]);
                let [dq, dk, dv, d_bias] = &mut r.grads;
                for (n, (row, bias_at)) in seen.iter().enumerate() {
                    let p = probabilities[n];
                    let ds = p * (dot(&dout[mine.clone()], &v[at(*row)]) - delta) * slopes[n];
                    if c.bias.is_some() {
                        d_bias[*bias_at] += ds;
                    }
                    let ds = ds * f64::from(scale);
                    dv[at(*row)].iter_mut().zip(&dout[mine.clone()]).for_each(|(x, g)| *x += p * g);
                    dk[at(*row)].iter_mut().zip(&q[mine.clone()]).for_each(|(x, q)| *x += ds * q);
                    dq[mine.clone()].iter_mut().zip(&k[at(*row)]).for_each(|(x, k)| *x += ds * k);
                }
            }
        }
    }
    r
}

/// The bounds: results and lse, gradients.
fn limits(element: Element, tf32: bool) -> [f64; 2] {
    match (element, tf32) {
        (Element::F32, true) => [1e-3, 2e-3],
        (Element::F32, false) => [3e-6, 3e-6],
        (other, _) => [limit(other), 2.0 * limit(other)],
    }
}

fn check(name: &str, c: &Case, element: Element, tf32: bool, orders: &[Order]) {
    let Plan { heads, kv_heads, head_dim, .. } = c.plan;
    let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
    let distances = c.bias.map_or(0, |n| 2 * n + 1);
    let tensors = [
        randn(1, (c.tokens, wide), 1.0),
        randn(2, (c.key_rows, narrow), 1.0),
        randn(3, (c.key_rows, narrow), 1.0),
        randn(4, (distances.max(1), heads), 1.0),
        randn(5, (c.tokens, wide), 1.0),
    ];
    let exact = tensors.each_ref().map(|t| values(&rounded(t, element)));
    let want = reference(c, exact.each_ref().map(Vec::as_slice));
    let mut bits: Option<Vec<Vec<u8>>> = None;
    for &order in orders {
        let what = format!("{name} {element:?} tf32 {tf32} {order:?}");
        let [mut q, mut k, mut v, mut bias, mut dout] = tensors.each_ref().map(|t| upload(t, element));
        let tables = c.plan.tables(element, c.tokens, c.key_rows);
        let [mut spans, mut query_tiles, mut key_tiles, mut users] =
            [&tables.spans, &tables.query_tiles, &tables.key_tiles, &tables.users].map(|t| Buffer::of_ints(t));
        let at = TableAddresses {
            spans: spans.address(),
            query_tiles: query_tiles.address(),
            key_tiles: key_tiles.address(),
            users: users.address(),
        };
        let inputs = Inputs {
            q: q.operand(element),
            k: k.address(),
            v: v.address(),
            bias: if c.bias.is_some() { bias.address() } else { 0 },
            zero: c.bias.unwrap_or(0),
            distances,
            tf32,
        };
        let (mut out, mut lse) = (room(c.tokens * wide, element), room(heads * c.tokens, Element::F32));
        launch(&c.plan.forward(&inputs, out.address(), lse.address(), &tables, at), order);
        let [limit, grad_limit] = limits(element, tf32);
        close(&format!("{what} out"), &download(&out, element), &want.out, limit);
        for (got, want) in download(&lse, Element::F32).iter().zip(&want.lse) {
            assert!(got == want || (got - want).abs() <= limit * want.abs().max(4.0), "{what}: lse {got}, not {want}");
        }
        let mut delta = room(heads * c.tokens, Element::F32);
        let mut grads =
            [c.tokens * wide, c.key_rows * narrow, c.key_rows * narrow, distances * heads].map(|n| room(n, element));
        let [dq, dk, dv, d_bias] = grads.each_mut().map(Buffer::address);
        let up = Upstream { out: out.address(), grad: dout.address(), lse: lse.address(), delta: delta.address() };
        let to = Gradients { q: dq, k: dk, v: dv, bias: if c.bias.is_some() { d_bias } else { 0 } };
        let launches = c.plan.backward(&inputs, up, to, &tables, at);
        assert_eq!(launches.len(), 3 + usize::from(c.bias.is_some()));
        launches.iter().for_each(|l| launch(l, order));
        assert!(launches.iter().all(|l| l.shared <= 99 << 10), "more shared memory than 8.6 and 8.9 have");
        let results = [&out, &lse].into_iter().chain(&grads[..launches.len()]).map(|b| b.bytes().to_vec()).collect();
        if let Some(before) = bits.replace(results) {
            assert!(bits.as_ref() == Some(&before), "{what}: the order of blocks shows");
        }
        for ((got, want), name) in grads.iter().zip(&want.grads).zip(["dq", "dk", "dv", "d_bias"]) {
            if name == "d_bias" && c.bias.is_none() {
                continue;
            }
            let got = download(got, element);
            if want.iter().all(|w| *w == 0.0) {
                // Of queries that see one key: what is left where numbers of about 1 cancel.
                assert!(got.iter().all(|g| g.abs() <= grad_limit), "{what} {name}: not zero");
            } else {
                close(&format!("{what} {name}"), &got, want, grad_limit);
            }
        }
    }
}

/// Masks, packed documents of odd lengths, caches of keys, prefixes of their own and shared, grouped heads, caps and biases.
fn cases() -> Vec<(&'static str, Case)> {
    let mut all = Vec::new();
    for lengths in [&[1usize][..], &[5, 1, 19], &[70, 3]] {
        for causal in [true, false] {
            let (spans, n) = packed(lengths);
            all.push(("packed", case(plan(2, 1, 20, causal, spans), n, n)));
        }
    }
    for (causal, window) in [(true, 1), (true, 9), (false, 5), (true, usize::MAX)] {
        let (spans, n) = packed(&[77, 20]);
        all.push(("window", case(Plan { window: Some(window), ..plan(2, 2, 16, causal, spans) }, n, n)));
    }
    for causal in [true, false] {
        // Two documents that share a prefix, one with a prefix of its own, one without; gaps of queries and of keys.
        let spans = vec![
            span(2..11, 20..29, 0..5),
            span(11..30, 30..49, 0..5),
            span(30..33, 50..53, 6..9),
            span(33..40, 53..60, 0..0),
        ];
        all.push(("prefix", case(plan(4, 2, 16, causal, spans.clone()), 43, 64)));
        all.push(("prefix, window", case(Plan { window: Some(6), ..plan(2, 1, 16, causal, spans) }, 43, 64)));
        // More keys than queries, more queries than keys, no keys at all, prefixes that overlap with what others own.
        let spans = vec![span(0..3, 10..40, 2..8), span(3..20, 40..45, 4..12), span(20..24, 0..0, 0..0)];
        all.push(("cache", case(plan(2, 1, 8, causal, spans), 24, 45)));
    }
    let (spans, n) = packed(&[40, 9]);
    all.push(("cap", case(Plan { softcap: Some(1.5), ..plan(2, 1, 24, true, spans) }, n, n)));
    for causal in [true, false] {
        let (spans, n) = packed(&[73, 9]);
        all.push(("bias", Case { bias: Some(75), ..case(plan(2, 1, 16, causal, spans), n, n) }));
        let spans = vec![span(0..9, 5..30, 0..4), span(9..12, 30..33, 0..4)];
        all.push(("bias, prefix", Case { bias: Some(40), ..case(plan(2, 2, 12, causal, spans), 12, 33) }));
    }
    all
}

#[test]
fn every_mask_in_every_type() {
    for (name, c) in cases() {
        for element in ELEMENTS {
            check(name, &c, element, false, &Order::ALL);
        }
    }
}

#[test]
fn heads_of_all_sizes() {
    for head_dim in [1usize, 16, 37, 64, 80, 96, 128, 160, 256] {
        let (spans, n) = packed(&[35, 40]);
        let c = case(plan(2, 1, head_dim, true, spans), n, n);
        for element in ELEMENTS {
            check(&format!("head of {head_dim}"), &c, element, false, &[Order::Backwards]);
        }
    }
}

#[test]
fn tf32_is_less_exact() {
    let (spans, n) = packed(&[66, 5]);
    let c = case(plan(2, 1, 40, true, spans), n, n);
    check("tf32", &c, Element::F32, true, &[Order::Forwards]);
    let tensors = [1u64, 2, 3].map(|seed| randn(seed, (n, if seed == 1 { 80 } else { 40 }), 1.0));
    let [exact, tf32] = forward_error(&c, &tensors);
    assert!(exact < 1e-6 && tf32 > 1e-5, "{exact:e} {tf32:e}");
}

/// Errors of the result in f32 and in TF32.
fn forward_error(c: &Case, tensors: &[Tensor; 3]) -> [f64; 2] {
    let exact = tensors.each_ref().map(values);
    let dout = vec![0.0; exact[0].len()];
    let want = reference(c, [&exact[0], &exact[1], &exact[2], &[], &dout]);
    [false, true].map(|tf32| {
        let [mut q, mut k, mut v] = tensors.each_ref().map(|t| upload(t, Element::F32));
        let tables = c.plan.tables(Element::F32, c.tokens, c.key_rows);
        let (mut spans, mut tiles) = (Buffer::of_ints(&tables.spans), Buffer::of_ints(&tables.query_tiles));
        let at = TableAddresses { spans: spans.address(), query_tiles: tiles.address(), key_tiles: 0, users: 0 };
        let (k, v) = (k.address(), v.address());
        let inputs = Inputs { q: q.operand(Element::F32), k, v, bias: 0, zero: 0, distances: 0, tf32 };
        let (mut out, mut lse) = (room(want.out.len(), Element::F32), room(want.lse.len(), Element::F32));
        launch(&c.plan.forward(&inputs, out.address(), lse.address(), &tables, at), Order::Forwards);
        error(&download(&out, Element::F32), &want.out)
    })
}

/// The reference of these tests means by a plan what `peft-kernels` means by it.
#[test]
fn the_reference_is_that_of_the_cpu() {
    for (name, c) in cases().into_iter().filter(|(_, c)| c.bias.is_none()) {
        let Plan { heads, kv_heads, head_dim, scale, causal, window, softcap, .. } = c.plan;
        let of = |s: &Span| SequenceSpan { queries: s.queries.clone(), keys: s.keys.clone(), prefix: s.prefix.clone() };
        let sequences = c.plan.sequences.iter().map(of).collect();
        let cpu = AttentionPlan { heads, kv_heads, head_dim, scale, causal, window, softcap, sequences };
        let q = randn(1, (c.tokens, heads * head_dim), 1.0);
        let (k, v) =
            (randn(2, (c.key_rows, kv_heads * head_dim), 1.0), randn(3, (c.key_rows, kv_heads * head_dim), 1.0));
        let dout = randn(5, (c.tokens, heads * head_dim), 1.0);
        let plan = Arc::new(cpu);
        let (got, grads) = super::harness::reference(&[q.clone(), k.clone(), v.clone()], &dout, |a| {
            peft_kernels::attention(&a[0], &a[1], &a[2], &plan)
        });
        let [q, k, v, dout] = [q, k, v, dout].map(|t| values(&t));
        let want = reference(&c, [&q, &k, &v, &[], &dout]);
        close(name, &got, &want.out, 1e-5);
        for (got, want) in grads.iter().zip(&want.grads) {
            close(name, got, want, 1e-5);
        }
    }
}

/// NaN in one document stays in it.
#[test]
fn documents_do_not_see_each_other() {
    let (spans, n) = packed(&[10, 12]);
    let c = case(plan(1, 1, 16, true, spans), n, n);
    for element in ELEMENTS {
        let tensors = [1u64, 2, 3].map(|seed| {
            let mut t = randn(seed, (n, 16), 1.0).to_vec2::<f32>().unwrap();
            t[..10].iter_mut().for_each(|row| row.fill(f32::NAN));
            Tensor::new(t, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
        });
        let [mut q, mut k, mut v] = tensors.each_ref().map(|t| upload(t, element));
        let tables = c.plan.tables(element, n, n);
        let (mut spans, mut tiles) = (Buffer::of_ints(&tables.spans), Buffer::of_ints(&tables.query_tiles));
        let at = TableAddresses { spans: spans.address(), query_tiles: tiles.address(), key_tiles: 0, users: 0 };
        let (k, v) = (k.address(), v.address());
        let inputs = Inputs { q: q.operand(element), k, v, bias: 0, zero: 0, distances: 0, tf32: false };
        let (mut out, mut lse) = (room(n * 16, element), room(n, Element::F32));
        launch(&c.plan.forward(&inputs, out.address(), lse.address(), &tables, at), Order::Forwards);
        let out = download(&out, element);
        assert!(out[..160].iter().all(|v| v.is_nan()) && out[160..].iter().all(|v| v.is_finite()));
    }
}
