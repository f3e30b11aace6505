#![allow(clippy::unwrap_used)]

use super::*;
use crate::testing::{close, randn};
use crate::{Activation, FrozenWeight, gated_activation, lora_linear, rms_norm};

fn var(seed: u64, shape: (usize, usize)) -> Tensor {
    Var::from_tensor(&randn(seed, shape, 0.5).unwrap()).unwrap().into_inner()
}

/// Every kind of entry: own operations, a tensor with several readers, candle's operations between them, a parameter
/// that only candle sees, and one that nothing reads.
fn block(x: &Tensor, a: &Tensor, b: &Tensor, s: &Tensor) -> Result<Tensor> {
    let norm = rms_norm(x, &randn(1, 8, 1.0)?, 1e-5, 0.0)?;
    let weight = |seed| FrozenWeight::dense(&randn(seed, (8, 8), 0.4)?);
    let gate = lora_linear(&norm, &weight(2)?, None, a, b, 0.7, None)?;
    let up = lora_linear(&norm, &weight(3)?, None, a, b, 0.3, None)?;
    let inner = gated_activation(&gate, &up, Activation::Silu)?;
    let scaled = inner.broadcast_mul(&s.exp()?)?;
    let down = lora_linear(&scaled, &weight(4)?, None, a, b, 1.0, None)?;
    crate::add(&crate::add(x, &down)?, &(inner * 0.5)?)
}

#[test]
fn gradients_are_candles() {
    let (x, a, b, s) = (var(11, (5, 8)), var(12, (2, 8)), var(13, (8, 2)), var(14, (1, 8)));
    let unused = var(15, (1, 1));
    let dy = randn(16, (5, 8), 1.0).unwrap();
    let y = block(&x, &a, &b, &s).unwrap();
    let want = seed(&y, &dy).unwrap().backward().unwrap();
    let (out, record) = record(|| block(&x, &a, &b, &s)).unwrap();
    close("value", &out, &y, 0.0).unwrap();
    assert!(out.is_variable() && record.is_tracked());
    let got = record.backward(&dy).unwrap();
    for (name, v) in [("x", &x), ("a", &a), ("b", &b), ("s", &s)] {
        let grad = &got.iter().find(|(id, _)| *id == v.id()).unwrap().1;
        close(name, grad, want.get(v).unwrap(), 1e-6).unwrap();
    }
    assert!(got.iter().all(|(id, _)| *id != unused.id()));
    // The gradient that was handed in is as it was.
    close("dy", &dy, &randn(16, (5, 8), 1.0).unwrap(), 0.0).unwrap();
}

#[test]
fn what_is_not_read_is_dropped() {
    let (x, a, b, s) = (var(11, (5, 8)), var(12, (2, 8)), var(13, (8, 2)), var(14, (1, 8)));
    let (_, record) = record(|| block(&x, &a, &b, &s)).unwrap();
    let kept = |name: &str| {
        let outs = record.entries.iter().filter_map(|e| match e {
            Entry::Op { op, outs, .. } if op.name() == name => Some(record.slots[outs[0]].value.is_some()),
            _ => None,
        });
        outs.collect::<Vec<_>>()
    };
    assert_eq!(kept("rms_norm"), [false]);
    assert_eq!(kept("gated_activation"), [false]);
    assert_eq!(kept("add"), [false, false]);
    assert_eq!(kept("lora_linear"), [true, true, false]);
}

#[test]
fn held_in_bf16_the_gradients_are_close_and_parameters_exact() {
    let (x, a, b, s) = (var(11, (5, 8)), var(12, (2, 8)), var(13, (8, 2)), var(14, (1, 8)));
    let dy = randn(16, (5, 8), 1.0).unwrap();
    let recorded = || record(|| block(&x, &a, &b, &s)).unwrap().1;
    let want = recorded().backward(&dy).unwrap();
    let mut held = recorded();
    held.hold_in(DType::BF16, x.id()).unwrap();
    let dtype_of = |t: &Tensor| held.slots[held.index[&t.id()]].value.as_ref().unwrap().dtype();
    assert_eq!((dtype_of(&x), dtype_of(&a), dtype_of(&b)), (DType::BF16, DType::F32, DType::F32));
    assert!(
        held.slots.iter().filter(|s| s.value.as_ref().is_some_and(|v| v.dtype() == DType::BF16)).count() == 3,
        "x, gate, up"
    );
    let got = held.backward(&dy).unwrap();
    let of = |grads: &[(TensorId, Tensor)], v: &Tensor| grads.iter().find(|(id, _)| *id == v.id()).unwrap().1.clone();
    for (name, v) in [("x", &x), ("a", &a), ("b", &b), ("s", &s)] {
        let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let (got, want) = (of(&got, v), of(&want, v));
        let relative = norm(&(&got - &want).unwrap()) / norm(&want);
        assert!(relative < 1e-2, "{name}: {relative}");
        // What was made of s stays in candle's graph as it is; the others would be exact had nothing been rounded.
        assert_eq!(relative > 1e-6, name != "s", "{name}: {relative}");
    }
}

/// A variable that reaches operations through candle's alone, in two ways.
#[test]
fn parts_of_a_variable_add_up() {
    let x = Var::from_tensor(&randn(1, (5, 4), 1.0).unwrap()).unwrap();
    let (_, record) = record(|| {
        let [first, last] = [(0, 2), (2, 3)].map(|(start, n)| x.narrow(0, start, n));
        let (first, last) = (first?, last?);
        Tensor::cat(&[&first, &crate::add(&last, &last)?], 0)
    })
    .unwrap();
    let ones = Tensor::ones((5, 4), DType::F32, &Device::Cpu).unwrap();
    let found = record.backward(&ones).unwrap();
    assert_eq!(found.len(), 1);
    let rows = found[0].1.to_vec2::<f32>().unwrap();
    assert_eq!(rows.iter().map(|row| row[0]).collect::<Vec<_>>(), [1.0, 1.0, 2.0, 2.0, 2.0]);
}

#[test]
fn a_result_of_candle_and_one_of_nothing_tracked() {
    let x = var(1, (3, 4));
    let (y, recorded) = record(|| x.sqr()).unwrap();
    assert!(y.is_variable());
    let got = recorded.backward(&y.ones_like().unwrap()).unwrap();
    close("2x", &got[0].1, &(&x * 2.0).unwrap(), 1e-6).unwrap();

    let constant = x.detach();
    let (y, recorded) = record(|| crate::add(&constant, &constant)).unwrap();
    assert!(!y.track_op() && !recorded.is_tracked());
    assert!(recorded.backward(&y).unwrap().is_empty());
}

#[test]
fn a_failing_block_leaves_no_recording() {
    let x = var(1, (3, 4));
    assert!(record(|| crate::add(&x, &x.narrow(0, 0, 1)?)).is_err());
    // Outside, operations are candle's again: tracked and no variables.
    let y = crate::add(&x, &x).unwrap();
    assert!(y.track_op() && !y.is_variable());
    let (y, recorded) = record(|| crate::add(&x, &x)).unwrap();
    assert!(recorded.backward(&y.narrow(0, 0, 1).unwrap()).is_err());
}

/// What a record says need not run again.
fn unread_of(record: &Record) -> Vec<&'static str> {
    let unread = record.unread();
    let names = record.entries.iter().enumerate().filter(|(i, _)| unread.skips(*i)).map(|(_, entry)| match entry {
        Entry::Op { op, .. } => op.name(),
        Entry::Foreign(_) => "candle",
    });
    names.collect()
}

/// The second half of a decoder's block.
fn mlp(x: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let weight = |seed| FrozenWeight::dense(&randn(seed, (8, 8), 0.4)?);
    let norm = rms_norm(x, &randn(1, 8, 1.0)?, 1e-5, 0.0)?;
    let gate = lora_linear(&norm, &weight(2)?, None, a, b, 0.7, None)?;
    let up = lora_linear(&norm, &weight(3)?, None, a, b, 0.3, None)?;
    let down = lora_linear(&gated_activation(&gate, &up, Activation::Silu)?, &weight(4)?, None, a, b, 1.0, None)?;
    crate::add(x, &down)
}

#[test]
fn a_block_runs_again_without_its_end() {
    let (x, a, b) = (var(11, (5, 8)), var(12, (2, 8)), var(13, (8, 2)));
    let dy = randn(16, (5, 8), 1.0).unwrap();
    let recorded = || record(|| mlp(&x, &a, &b)).unwrap().1;
    // The activation is what the last layer's `x·Aᵀ` is made of, which its gradient needs.
    assert_eq!(unread_of(&recorded()), ["lora_linear", "add"]);
    let again = record_again(recorded().unread(), || {
        let out = mlp(&x, &a, &b)?;
        // It was not made.
        close("stands in", &out, &out.zeros_like()?, 0.0)?;
        Ok::<_, candle_core::Error>(out)
    });
    let (want, got) = (recorded().backward(&dy).unwrap(), again.unwrap().backward(&dy).unwrap());
    assert_eq!(want.len(), 3);
    for ((id, want), (got_id, got)) in want.iter().zip(&got) {
        assert_eq!(id, got_id);
        close("gradient", got, want, 0.0).unwrap();
    }
}

#[test]
fn what_is_read_runs_again() {
    let (x, a, b, s) = (var(11, (5, 8)), var(12, (2, 8)), var(13, (8, 2)), var(14, (1, 8)));
    // The norm at the end reads the sum, which reads all below.
    let norm = |x: &Tensor| rms_norm(x, &randn(1, 8, 1.0)?, 1e-5, 0.0);
    let (_, normed) = record(|| norm(&mlp(&x, &a, &b)?)).unwrap();
    assert_eq!(unread_of(&normed), ["rms_norm"]);
    // Of what candle's operations read nothing is known.
    let (_, mixed) = record(|| block(&x, &a, &b, &s)).unwrap();
    assert!(mixed.unread().is_empty() && unread_of(&mixed).is_empty());
    // A result that no operation reads may have been looked at.
    let (_, looked_at) = record(|| crate::add(&x, &x).and_then(|_| crate::add(&x, &x))).unwrap();
    assert!(!looked_at.unread().skips(0) && looked_at.unread().skips(1));
    let (_, nothing) = record(|| norm(&x.detach())).unwrap();
    assert!(nothing.unread().is_empty());
}
