//! The operations of a training step at the shapes of SmolLM2-135M with 1,024 tokens, each in per cent of its bound
//! (`bound/mod.rs`): `cargo bench -p peft-bench --bench ops`, with a part of a name behind `--` for some of them.

#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code)] // Each program uses a part of it.
mod bound;

use bound::Bound;
use bound::passes::{Work, both};
use candle_core::{DType, Tensor, Var};
use criterion::{Criterion, Throughput};
use peft_core::kernels::testing::randn;
use peft_core::kernels::{
    self, Activation, Dropout, FrozenWeight, LossSpec, RotaryLayout, RotaryPlan, Stream, cross_entropy_rows, dropout,
    frozen_linear, gated_activation, layer_norm, linear_cross_entropy, lora_linear, rms_norm, rotary,
};
use peft_train::optim::{AdamW, AdamWConfig, OptParam, Optimizer};

#[global_allocator]
static ALLOCATOR: peft_alloc::MiMalloc = peft_alloc::MiMalloc;

const TOKENS: usize = 1024;
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const KEY: usize = 192;
const HEAD_DIM: usize = 64;
const VOCAB: usize = 49_152;
const RANK: usize = 16;

/// `(name, in, out)` of the four kinds of linear layers.
const LINEARS: [(&str, usize, usize); 4] = [
    ("q_proj", HIDDEN, HIDDEN),
    ("k_proj", HIDDEN, KEY),
    ("up_proj", HIDDEN, INTERMEDIATE),
    ("down_proj", INTERMEDIATE, HIDDEN),
];

fn weight(out: usize, inp: usize, dtype: DType) -> FrozenWeight {
    FrozenWeight::dense(&randn(7, (out, inp), 0.05).unwrap().to_dtype(dtype).unwrap()).unwrap()
}

/// The large layers of a Llama 3.2 1B, whose step has a quarter of the tokens.
const LARGE: [(&str, usize, usize, usize); 2] =
    [("large up_proj", 2048, 8192, TOKENS / 4), ("large down_proj", 8192, 2048, TOKENS / 4)];

fn linears(c: &mut Criterion<Bound>) {
    let mut group = c.benchmark_group("frozen_linear");
    for (name, inp, out, tokens) in LINEARS.map(|(name, inp, out)| (name, inp, out, TOKENS)).into_iter().chain(LARGE) {
        let x = randn(1, (tokens, inp), 1.0).unwrap();
        let flop = 2 * tokens * inp * out;
        let narrow = weight(out, inp, DType::BF16).with_narrow_products();
        for (how, w) in
            [("f32", weight(out, inp, DType::F32)), ("bf16", weight(out, inp, DType::BF16)), ("bf16 in bf16", narrow)]
        {
            let name = format!("{name} {how}");
            both(&mut group, &name, &Work::flop(flop, flop), std::slice::from_ref(&x), |a| {
                frozen_linear(&a[0], &w, None)
            });
        }
    }
    group.finish();

    let mut group = c.benchmark_group("lora_linear");
    for (name, inp, out) in LINEARS {
        let args = [(TOKENS, inp), (RANK, inp), (out, RANK)].map(|shape| randn(2, shape, 0.3).unwrap());
        let w = weight(out, inp, DType::F32);
        let (large, thin) = (2 * TOKENS * inp * out, 2 * TOKENS * RANK);
        // Backward: g = dy·B, dx = dy·W + g·A, dA = gᵀ·x, dB = dyᵀ·(x·Aᵀ), of which the last product was kept.
        let work = Work::flop(large + thin * (inp + out), large + 2 * thin * (inp + out));
        for (how, p) in [("", 0.0), (" with dropout", 0.1)] {
            let drop = Some(Dropout { p, stream: Stream { seed: 1, step: 2, site: 3 } });
            both(&mut group, &format!("{name}{how}"), &work, &args, |a| {
                lora_linear(&a[0], &w, None, &a[1], &a[2], 2.0, drop)
            });
        }
    }
    group.finish();
}

fn passes_over_memory(c: &mut Criterion<Bound>) {
    let mut group = c.benchmark_group("memory");
    let x = [randn(1, (TOKENS, HIDDEN), 1.0).unwrap()];
    let w = randn(2, HIDDEN, 1.0).unwrap();
    let n = TOKENS * HIDDEN;
    both(&mut group, "rms_norm", &Work::elements(2 * n, 3 * n), &x, |a| rms_norm(&a[0], &w, 1e-5, 0.0));
    both(&mut group, "layer_norm", &Work::elements(2 * n, 3 * n), &x, |a| layer_norm(&a[0], &w, Some(&w), 1e-5));

    let angles = randn(3, (TOKENS, HEAD_DIM / 2), 3.0).unwrap();
    let positions: Vec<u32> = (0..TOKENS as u32).collect();
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    let plan = RotaryPlan::new(&cos, &sin, &positions, HEAD_DIM, RotaryLayout::Half).unwrap();
    both(&mut group, "rotary", &Work::elements(2 * n, 2 * n), &x, |a| rotary(&a[0], &plan));

    let gates = [4, 5].map(|seed| randn(seed, (TOKENS, INTERMEDIATE), 1.0).unwrap());
    let n = TOKENS * INTERMEDIATE;
    for act in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        both(&mut group, &format!("gated {act:?}"), &Work::elements(3 * n, 5 * n), &gates, |a| {
            gated_activation(&a[0], &a[1], act)
        });
    }
    let stream = Stream { seed: 1, step: 2, site: 3 };
    both(&mut group, "dropout", &Work::elements(2 * n, 2 * n), &gates[..1], |a| dropout(&a[0], 0.1, stream));
    group.finish();
}

fn loss(c: &mut Criterion<Bound>) {
    let targets: Vec<u32> = (0..TOKENS as u32).map(|i| i * 41).collect();
    let mut group = c.benchmark_group("cross_entropy");
    group.sample_size(10);
    let logits = randn(5, (1, VOCAB), 3.0).unwrap().broadcast_as((256, VOCAB)).unwrap().contiguous().unwrap();
    let bytes = |passes: usize| Throughput::Bytes((4 * passes * logits.elem_count()) as u64);
    let rows = |gradient| cross_entropy_rows(&logits, &targets[..256], 1.0, None, gradient).unwrap();
    group.throughput(bytes(1)).bench_function("rows/loss", |b| b.iter(|| rows(false)));
    group.throughput(bytes(2)).bench_function("rows/loss and gradient", |b| b.iter(|| rows(true)));

    let hidden = Var::from_tensor(&randn(6, (TOKENS, HIDDEN), 1.0).unwrap()).unwrap();
    let head = weight(VOCAB, HIDDEN, DType::F32);
    let spec = LossSpec { scale: 1.0 / TOKENS as f64, softcap: None, chunk_rows: 256 };
    let product = (2 * TOKENS * HIDDEN * VOCAB) as u64;
    for (name, h, products) in
        [("head/loss", hidden.detach(), 1), ("head/loss and gradient", hidden.as_tensor().clone(), 2)]
    {
        group.throughput(Throughput::Elements(products * product));
        group.bench_function(name, |b| b.iter(|| linear_cross_entropy(&h, &head, &targets, &spec).unwrap()));
    }
    group.finish();
}

/// The adapter of rank 16 on all linear layers of SmolLM2-135M: 30 blocks, 4.9 M elements.
fn optimizer(c: &mut Criterion<Bound>) {
    let mut shapes: Vec<(usize, usize)> = Vec::new();
    for (_, inp, out) in LINEARS.iter().chain(&LINEARS[..3]) {
        shapes.extend([(RANK, *inp), (*out, RANK)]);
    }
    let tensors = || (0..30).flat_map(|_| &shapes).map(|&shape| randn(8, shape, 0.1).unwrap());
    let params: Vec<OptParam> =
        tensors().enumerate().map(|(i, t)| OptParam::new(i.to_string(), Var::from_tensor(&t).unwrap())).collect();
    let grads: Vec<Option<Tensor>> = tensors().map(Some).collect();
    let elements: usize = grads.iter().flatten().map(Tensor::elem_count).sum();
    let mut adamw = AdamW::new(AdamWConfig::default()).unwrap();
    let mut group = c.benchmark_group("optimizer");
    // Parameter and two moments are read and written, the gradient is read.
    group.throughput(Throughput::Bytes(4 * 7 * elements as u64));
    group.bench_function("adamw", |b| b.iter(|| adamw.step(&params, &grads, 1e-4).unwrap()));
    group.finish();
}

fn main() {
    peft_alloc::keep_pages();
    kernels::on_pool(|| {
        let mut c = bound::criterion();
        linears(&mut c);
        passes_over_memory(&mut c);
        loss(&mut c);
        optimizer(&mut c);
        c.final_summary();
    });
}
