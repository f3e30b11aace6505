//! Attention forward and backward at the shapes of SmolLM2-135M (9 heads, 3 key heads, 64 elements), in per cent of its bound
//! (`bound/mod.rs`): `cargo bench -p peft-bench --bench attention`. Only what the mask leaves counts as work.

#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code)] // Each program uses a part of it.
mod bound;

use std::hint::black_box;
use std::sync::Arc;

use bound::Bound;
use bound::passes::{Work, both};
use criterion::{Criterion, Throughput};
use peft_core::kernels::testing::randn;
use peft_core::kernels::{self, AttentionPlan, attention};

#[global_allocator]
static ALLOCATOR: peft_alloc::MiMalloc = peft_alloc::MiMalloc;

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;

fn training(c: &mut Criterion<Bound>) {
    let mut group = c.benchmark_group("attention");
    for (sequences, length) in [(4, 256), (1, 1024), (1, 2048)] {
        let plan = Arc::new(AttentionPlan::causal(HEADS, KV_HEADS, HEAD_DIM, &vec![length; sequences]));
        let args =
            [HEADS, KV_HEADS, KV_HEADS].map(|heads| randn(1, (sequences * length, heads * HEAD_DIM), 1.0).unwrap());
        let product = 2 * sequences * HEADS * length * (length + 1) / 2 * HEAD_DIM;
        // Scores and their sum over values; backward makes the scores again, and dV, dP, dQ and dK.
        both(&mut group, &format!("{sequences}x{length}"), &Work::flop(2 * product, 5 * product), &args, |a| {
            attention(&a[0], &a[1], &a[2], &plan)
        });
    }
    group.finish();
}

/// One new token of one sequence: the cache is read once.
fn decode(c: &mut Criterion<Bound>) {
    let cache = 4096;
    let mut plan = AttentionPlan::causal(HEADS, KV_HEADS, HEAD_DIM, &[1]);
    plan.sequences[0].keys = 0..cache;
    let plan = Arc::new(plan);
    let make = |seed, tokens: usize, heads: usize| randn(seed, (tokens, heads * HEAD_DIM), 1.0).unwrap();
    let (q, k, v) = (make(1, 1, HEADS), make(2, cache, KV_HEADS), make(3, cache, KV_HEADS));
    let mut group = c.benchmark_group("attention");
    group.throughput(Throughput::Bytes((2 * cache * KV_HEADS * HEAD_DIM * 4) as u64));
    group.bench_function("decode 1x4096", |b| b.iter(|| black_box(attention(&q, &k, &v, &plan).unwrap())));
    group.finish();
}

fn main() {
    peft_alloc::keep_pages();
    kernels::on_pool(|| {
        let mut c = bound::criterion();
        training(&mut c);
        decode(&mut c);
        c.final_summary();
    });
}
