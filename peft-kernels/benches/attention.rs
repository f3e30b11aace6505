//! Attention forward and backward at the shapes of SmolLM2-135M (9 heads, 3 key heads, 64 elements).
//!
//! The throughput is in multiply-add FLOP that the mask leaves: `Gelem/s` reads as GFLOP/s. The last group is the serial
//! GEMM that the same FLOP could be done with.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::Arc;

use candle_core::{Tensor, Var};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use peft_kernels::testing::randn;
use peft_kernels::{AttentionPlan, attention, seed};

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;

fn attention_bench(c: &mut Criterion) {
    for (sequences, length) in [(4, 256), (1, 1024), (1, 2048)] {
        let plan = Arc::new(AttentionPlan::causal(HEADS, KV_HEADS, HEAD_DIM, &vec![length; sequences]));
        let tokens = sequences * length;
        let make = |seed, heads: usize| randn(seed, (tokens, heads * HEAD_DIM), 1.0).unwrap();
        let (q, k, v, dy) = (make(1, HEADS), make(2, KV_HEADS), make(3, KV_HEADS), make(4, HEADS));
        let pairs = sequences * HEADS * length * (length + 1) / 2;
        let product = (2 * pairs * HEAD_DIM) as u64;
        let mut group = c.benchmark_group(format!("{sequences}x{length}"));
        group.sample_size(30);
        group.throughput(Throughput::Elements(2 * product));
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        group.bench_function("forward", |b| b.iter(|| black_box(attention(&q, &k, &v, &plan).unwrap())));
        group.bench_function("forward, one thread", |b| {
            alone.install(|| b.iter(|| black_box(attention(&q, &k, &v, &plan).unwrap())))
        });
        let [q, k, v] = [&q, &k, &v].map(|t| Var::from_tensor(t).unwrap());
        let y = attention(&q, &k, &v, &plan).unwrap();
        group.throughput(Throughput::Elements(5 * product));
        let backward = || black_box(seed(&y, &dy).unwrap().backward().unwrap());
        group.bench_function("backward", |b| b.iter(backward));
        group.bench_function("backward, one thread", |b| alone.install(|| b.iter(backward)));
        group.finish();
    }

    let cache = 4096;
    let mut plan = AttentionPlan::causal(HEADS, KV_HEADS, HEAD_DIM, &[1]);
    plan.sequences[0].keys = 0..cache;
    let plan = Arc::new(plan);
    let (q, k, v) = (
        randn(1, (1, HEADS * HEAD_DIM), 1.0).unwrap(),
        randn(2, (cache, KV_HEADS * HEAD_DIM), 1.0).unwrap(),
        randn(3, (cache, KV_HEADS * HEAD_DIM), 1.0).unwrap(),
    );
    let mut group = c.benchmark_group("decode 1x4096");
    group.throughput(Throughput::Bytes((2 * cache * KV_HEADS * HEAD_DIM * 4) as u64));
    group.bench_function("forward", |b| b.iter(|| black_box(attention(&q, &k, &v, &plan).unwrap())));
    group.finish();

    let mut group = c.benchmark_group("gemm, one thread");
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for (m, k, n) in [(1024, 64, 1024), (1024, 1024, 64), (1024, 576, 1536)] {
        let (a, b): (Tensor, Tensor) = (randn(1, (m, k), 1.0).unwrap(), randn(2, (k, n), 1.0).unwrap());
        let (a, b) =
            (a.flatten_all().unwrap().to_vec1::<f32>().unwrap(), b.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        let mut out = vec![0f32; m * n];
        group.throughput(Throughput::Elements((2 * m * k * n) as u64));
        group.bench_function(format!("{m}x{k}x{n}"), |bench| {
            alone.install(|| bench.iter(|| gemm_serial(m, k, n, &a, &b, black_box(&mut out))))
        });
    }
    group.finish();
}

#[allow(unsafe_code)]
fn gemm_serial(m: usize, k: usize, n: usize, a: &[f32], b: &[f32], out: &mut [f32]) {
    assert!(a.len() >= m * k && b.len() >= k * n && out.len() >= m * n);
    let (rk, rn) = (k as isize, n as isize);
    let none = gemm::Parallelism::None;
    // SAFETY: the slices hold the three row-major matrices.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            rn,
            false,
            a.as_ptr(),
            1,
            rk,
            b.as_ptr(),
            1,
            rn,
            0f32,
            1f32,
            false,
            false,
            false,
            none,
        );
    }
}

criterion_group!(benches, attention_bench);
criterion_main!(benches);
