//! An operation forward, and backward through a record as a training step runs it.

use std::hint::black_box;

use candle_core::{Result, Tensor, Var};
use criterion::measurement::Measurement;
use criterion::{BatchSize, BenchmarkGroup, Throughput};
use peft_core::kernels::record;
use peft_core::kernels::testing::randn;

/// What an operation has to do at least, forward and backward.
#[derive(Debug, Clone)]
pub(crate) struct Work {
    /// Of the forward pass.
    pub(crate) forward: Throughput,
    /// Of the backward pass, without what it makes again.
    pub(crate) backward: Throughput,
}

impl Work {
    /// `flop` floating-point operations each way.
    pub(crate) fn flop(forward: usize, backward: usize) -> Self {
        Self { forward: Throughput::Elements(forward as u64), backward: Throughput::Elements(backward as u64) }
    }

    /// `f32` elements that are read or written each way.
    pub(crate) fn elements(forward: usize, backward: usize) -> Self {
        let bytes = |n: usize| Throughput::Bytes(4 * n as u64);
        Self { forward: bytes(forward), backward: bytes(backward) }
    }
}

/// Measures `op` at `args`, all of which get a gradient: `NAME/forward` without a record, `NAME/backward` from a random gradient of
/// its result.
pub(crate) fn both<M: Measurement>(
    group: &mut BenchmarkGroup<'_, M>,
    name: &str,
    work: &Work,
    args: &[Tensor],
    op: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    group.throughput(work.forward.clone());
    group.bench_function(format!("{name}/forward"), |b| b.iter(|| black_box(op(args).unwrap())));
    let vars: Vec<Tensor> = args.iter().map(|t| Var::from_tensor(t).unwrap().into_inner()).collect();
    let grad = randn(9, op(args).unwrap().dims(), 1.0).unwrap();
    group.throughput(work.backward.clone());
    group.bench_function(format!("{name}/backward"), |b| {
        b.iter_batched(
            || record(|| op(&vars)).unwrap().1,
            |record| black_box(record.backward(&grad).unwrap()),
            BatchSize::PerIteration,
        );
    });
}
