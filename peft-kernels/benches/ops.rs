//! Memory-bound operations beside a copy of their largest argument, and the head's loss.
//!
//! `cargo bench -p peft-kernels --bench ops`. Shapes are SmolLM2-135M's with 1,024 tokens. The allocator is the one of
//! `peft-cli`, which keeps large buffers instead of giving them back to the kernel.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use candle_core::{Device, Tensor, Var};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use peft_kernels::testing::randn;
use peft_kernels::{
    Activation, FrozenWeight, LossSpec, Stream, cross_entropy_rows, dropout, gated_activation, layer_norm,
    linear_cross_entropy, rms_norm, seed,
};

#[global_allocator]
static ALLOCATOR: peft_alloc::MiMalloc = peft_alloc::MiMalloc;

const TOKENS: usize = 1024;
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const VOCAB: usize = 49_152;

fn copies(c: &mut Criterion) {
    peft_alloc::keep_pages();
    let mut group = c.benchmark_group("copy");
    for width in [HIDDEN, INTERMEDIATE, VOCAB] {
        let x = vec![1f32; TOKENS * width];
        group.throughput(Throughput::Bytes(4 * x.len() as u64));
        group.bench_function(BenchmarkId::from_parameter(width), |b| b.iter(|| black_box(&x).to_vec()));
    }
}

/// Forward and backward of `f` at `x`, from a given upstream gradient.
fn both_ways(f: impl Fn(&Tensor) -> Tensor, x: &Tensor, dy: &Tensor) {
    let x = Var::from_tensor(x).unwrap();
    let grads = seed(&f(x.as_tensor()), dy).unwrap().backward().unwrap();
    black_box(grads.get(x.as_tensor()).unwrap());
}

fn elementwise(c: &mut Criterion) {
    let x = randn(1, (TOKENS, HIDDEN), 1.0).unwrap();
    let w = randn(2, HIDDEN, 1.0).unwrap();
    let mut group = c.benchmark_group("norm");
    group.throughput(Throughput::Bytes(4 * x.elem_count() as u64));
    group.bench_function("rms_norm", |b| b.iter(|| rms_norm(&x, &w, 1e-5, 0.0).unwrap()));
    group.bench_function("rms_norm both ways", |b| {
        b.iter(|| both_ways(|x| rms_norm(x, &w, 1e-5, 0.0).unwrap(), &x, &x));
    });
    group.bench_function("layer_norm", |b| b.iter(|| layer_norm(&x, &w, Some(&w), 1e-5).unwrap()));
    group.finish();

    let (gate, up) = (randn(3, (TOKENS, INTERMEDIATE), 1.0).unwrap(), randn(4, (TOKENS, INTERMEDIATE), 1.0).unwrap());
    let mut group = c.benchmark_group("mlp");
    group.throughput(Throughput::Bytes(4 * gate.elem_count() as u64));
    for act in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        group.bench_function(format!("{act:?} gated"), |b| b.iter(|| gated_activation(&gate, &up, act).unwrap()));
        group.bench_function(format!("{act:?} gated both ways"), |b| {
            b.iter(|| both_ways(|g| gated_activation(g, &up, act).unwrap(), &gate, &up));
        });
    }
    let stream = Stream { seed: 1, step: 2, site: 3 };
    group.bench_function("dropout", |b| b.iter(|| dropout(&gate, 0.1, stream).unwrap()));
    group.finish();
}

fn loss(c: &mut Criterion) {
    let row = randn(5, (1, VOCAB), 3.0).unwrap();
    let logits = row.broadcast_as((TOKENS, VOCAB)).unwrap().contiguous().unwrap();
    let targets: Vec<u32> = (0..TOKENS as u32).map(|i| i * 41).collect();
    let mut group = c.benchmark_group("cross_entropy");
    group.sample_size(10).throughput(Throughput::Bytes(4 * logits.elem_count() as u64));
    group.bench_function("loss", |b| b.iter(|| cross_entropy_rows(&logits, &targets, 1.0, None, false).unwrap()));
    group.bench_function("loss and gradient in a copy", |b| {
        b.iter(|| cross_entropy_rows(&logits, &targets, 1.0, None, true).unwrap());
    });
    drop(logits);
    let hidden = Var::from_tensor(&randn(6, (TOKENS, HIDDEN), 1.0).unwrap()).unwrap();
    let weight = Tensor::randn(0f32, 0.05, (VOCAB, HIDDEN), &Device::Cpu).unwrap();
    let weight = FrozenWeight::dense(&weight).unwrap();
    let spec = LossSpec { scale: 1.0 / TOKENS as f64, softcap: None, chunk_rows: 256 };
    for (name, h) in [("linear", hidden.as_tensor().detach()), ("linear with gradient", hidden.as_tensor().clone())] {
        group.bench_function(name, |b| b.iter(|| linear_cross_entropy(&h, &weight, &targets, &spec).unwrap()));
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(500))
        .measurement_time(std::time::Duration::from_secs(2));
    targets = copies, elementwise, loss
}
criterion_main!(benches);
