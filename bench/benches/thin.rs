//! Products of a few rows with a large weight, as decoding makes them, beside reading the weight.
//!
//! `cargo bench -p peft-bench --bench thin`. The weight has the shape of SmolLM2-135M's head. Throughput is in bytes of
//! the stored weight: `read` is the bound.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::Arc;

use candle_core::DType;
use candle_core::quantized::{GgmlDType, QTensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use peft_core::kernels::testing::randn;
use peft_core::kernels::{FrozenWeight, threads};
use rayon::prelude::*;

#[global_allocator]
static ALLOCATOR: peft_alloc::MiMalloc = peft_alloc::MiMalloc;

const VOCAB: usize = 49_152;
const HIDDEN: usize = 576;

fn read(c: &mut Criterion) {
    peft_alloc::keep_pages();
    let data = vec![1_u64; 128 << 17];
    let sum = |data: &[u64]| {
        data.as_chunks::<32>().0.iter().fold([0_u64; 32], |mut sum, chunk| {
            sum.iter_mut().zip(chunk).for_each(|(sum, x)| *sum ^= x);
            sum
        })
    };
    let mut group = c.benchmark_group("read");
    group.sample_size(20).throughput(Throughput::Bytes(8 * data.len() as u64));
    group.bench_function("1 thread", |b| b.iter(|| black_box(sum(&data))));
    group.bench_function(format!("{} threads", threads()), |b| {
        b.iter(|| data.par_chunks(data.len() / threads()).for_each(|part| _ = black_box(sum(part))));
    });
}

fn products(c: &mut Criterion) {
    let dense = randn(1, (VOCAB, HIDDEN), 0.1).unwrap();
    let float = |dtype| FrozenWeight::dense(&dense.to_dtype(dtype).unwrap()).unwrap();
    let blocks = |dtype| FrozenWeight::gguf(Arc::new(QTensor::quantize(&dense, dtype).unwrap())).unwrap();
    let weights =
        [float(DType::F32), float(DType::BF16), float(DType::F16), blocks(GgmlDType::Q8_0), blocks(GgmlDType::Q4_1)];
    for weight in weights {
        let mut group = c.benchmark_group(weight.dtype_name());
        group.sample_size(10).throughput(Throughput::Bytes(weight.nbytes() as u64));
        for tokens in [1, 4, 8, 16, 17] {
            let x = randn(2, (tokens, HIDDEN), 1.0).unwrap();
            group.bench_function(BenchmarkId::from_parameter(tokens), |b| b.iter(|| weight.matmul_t(&x).unwrap()));
        }
    }
}

criterion_group!(benches, read, products);
criterion_main!(benches);
