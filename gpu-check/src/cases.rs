//! Every operation of peft-kernels on random inputs of odd and of usual shapes.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use peft_kernels::testing::randn;
use peft_kernels::{
    Activation, AttentionPlan, Dropout, FrozenWeight, LossSpec, RotaryLayout, RotaryPlan, RoutedSpan, SequenceSpan,
    ServingForm, Stream, activation, add_bias, attention, cross_entropy, cross_entropy_rows, dropout, embedding,
    frozen_linear, gated_activation, layer_norm, linear_cross_entropy, lora_delta, lora_linear, replace_columns,
    replace_rows, rms_norm, rotary, routed_linear, scale_columns, trainable_linear,
};

use crate::measure::{Case, Kind, Op, Place};

const STREAM: Stream = Stream { seed: 5, step: 2, site: 3 };

/// How a frozen weight lies in memory.
#[derive(Debug, Clone, Copy)]
enum Storage {
    Dense(DType),
    Gguf(GgmlDType),
}

impl Storage {
    fn name(self) -> String {
        match self {
            Self::Dense(d) => d.as_str().to_string(),
            Self::Gguf(q) => format!("{q:?}").to_lowercase(),
        }
    }

    /// The weight `[out, in]` on a device, the same numbers on each.
    fn weight(self, (out, inp): (usize, usize), device: &Device) -> Result<FrozenWeight> {
        let w = randn(41, (out, inp), 1.0 / (inp as f32).sqrt())?;
        match self {
            Self::Dense(dtype) => FrozenWeight::dense(&w.to_dtype(dtype)?.to_device(device)?),
            Self::Gguf(dtype) => {
                let blocks = QTensor::quantize(&w, dtype)?;
                let bytes = blocks.data()?.into_owned();
                let storage = QStorage::from_data(Cow::Owned(bytes), device, dtype)?;
                FrozenWeight::gguf(Arc::new(QTensor::new(storage, (out, inp))?))
            }
        }
    }
}

/// The weight of the operations whose storage is not what is checked.
const BF16: Storage = Storage::Dense(DType::BF16);

#[derive(Default)]
struct Cases {
    all: Vec<Case>,
}

impl Cases {
    /// Adds an operation that is differentiated for every input.
    fn op<F>(&mut self, name: String, inputs: Vec<(Tensor, Kind)>, make: impl Fn(&Place) -> Result<F> + 'static)
    where
        F: Fn(&[Tensor]) -> Result<Tensor> + 'static,
    {
        let make = move |place: &Place| -> Result<Op> {
            let f = make(place)?;
            Ok(Box::new(move |x: &[Tensor]| Ok(vec![f(x)?])))
        };
        self.all.push(Case { name, inputs, gradients: true, make: Box::new(make) });
    }

    /// Adds an operation without a gradient.
    fn untracked<F>(&mut self, name: String, inputs: Vec<(Tensor, Kind)>, make: impl Fn(&Place) -> Result<F> + 'static)
    where
        F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + 'static,
    {
        let make = move |place: &Place| -> Result<Op> { Ok(Box::new(make(place)?)) };
        self.all.push(Case { name, inputs, gradients: false, make: Box::new(make) });
    }
}

/// A random input in the activations' type.
fn x(seed: u64, shape: (usize, usize)) -> Result<(Tensor, Kind)> {
    Ok((randn(seed, shape, 1.0)?, Kind::Activation))
}

fn vector(seed: u64, n: usize) -> Result<(Tensor, Kind)> {
    Ok((randn(seed, n, 1.0)?, Kind::Activation))
}

/// A random adapter matrix.
fn wide(seed: u64, (rows, columns): (usize, usize)) -> Result<(Tensor, Kind)> {
    Ok((randn(seed, (rows, columns), 1.0 / (columns as f32).sqrt())?, Kind::Wide))
}

fn ids(n: usize, below: usize) -> Vec<u32> {
    (0..n as u64).map(|i| STREAM.word(i) % below.max(1) as u32).collect()
}

/// All cases, of small shapes alone or of usual ones too.
pub(crate) fn all(small: bool) -> Result<Vec<Case>> {
    let mut cases = Cases::default();
    let mut shapes = vec![(1, 32), (17, 96), (65, 160)];
    if !small {
        shapes.extend([(257, 1000), (512, 2048)]);
    }
    linears(&mut cases, small)?;
    for &(tokens, width) in &shapes {
        norms(&mut cases, tokens, width)?;
        elementwise(&mut cases, tokens, width)?;
        rows(&mut cases, tokens, width)?;
        losses(&mut cases, tokens, width)?;
    }
    rotaries(&mut cases, small)?;
    attentions(&mut cases, small)?;
    Ok(cases.all)
}

fn linears(cases: &mut Cases, small: bool) -> Result<()> {
    let blocks: &[GgmlDType] = &[
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
        GgmlDType::F16,
    ];
    let dense = [DType::F32, DType::F16, DType::BF16].map(Storage::Dense);
    let storages: Vec<Storage> = dense.into_iter().chain(blocks.iter().map(|b| Storage::Gguf(*b))).collect();
    let mut shapes = vec![(5, 256, 33)];
    if !small {
        shapes.push((512, 2048, 2048));
    }
    for &(tokens, inp, out) in &shapes {
        for &storage in &storages {
            let gguf = if matches!(storage, Storage::Gguf(_)) { "gguf " } else { "" };
            let name = format!("frozen_linear {gguf}{} {tokens}×{inp}→{out}", storage.name());
            cases.op(name, vec![x(1, (tokens, inp))?], move |p| {
                let weight = storage.weight((out, inp), &p.device)?;
                let bias = randn(2, out, 1.0)?.to_device(&p.device)?;
                Ok(move |a: &[Tensor]| frozen_linear(&a[0], &weight, Some(&bias)))
            });
        }
    }
    shapes.extend([(1, 7, 5), (65, 33, 129)]);
    for (tokens, inp, out) in shapes {
        let shape = format!("{tokens}×{inp}→{out}");
        let inputs = vec![x(1, (tokens, inp))?, wide(2, (out, inp))?];
        cases.op(format!("trainable_linear {shape}"), inputs, |_| Ok(|a: &[Tensor]| trainable_linear(&a[0], &a[1])));
        for (what, dropout) in [("", None), (" dropout", Some(Dropout { p: 0.3, stream: STREAM }))] {
            let inputs = vec![x(1, (tokens, inp))?, wide(2, (8, inp))?, wide(3, (out, 8))?];
            cases.op(format!("lora_linear{what} {shape}"), inputs.clone(), move |p| {
                let weight = BF16.weight((out, inp), &p.device)?;
                Ok(move |a: &[Tensor]| lora_linear(&a[0], &weight, None, &a[1], &a[2], 2.0, dropout))
            });
            cases.op(format!("lora_delta{what} {shape}"), inputs, move |_| {
                Ok(move |a: &[Tensor]| lora_delta(&a[0], &a[1], &a[2], 2.0, dropout))
            });
        }
        cases.untracked(format!("routed_linear {shape}"), vec![x(1, (tokens, inp))?], move |p| {
            let weight = BF16.weight((out, inp), &p.device)?;
            let at = |seed, shape: &[usize], scale| randn(seed, shape, scale)?.to_device(&p.device);
            let low_rank = ServingForm {
                low_rank: Some((at(2, &[8, inp], 1.0 / (inp as f32).sqrt())?, at(3, &[out, 8], 0.5)?)),
                ..ServingForm::default()
            };
            let scales = ServingForm {
                scale_input: Some(at(4, &[inp], 1.0)?),
                scale_output: Some(at(5, &[out], 1.0)?),
                shift: Some(at(6, &[out], 1.0)?),
                ..ServingForm::default()
            };
            let bias = at(7, &[out], 1.0)?;
            Ok(move |a: &[Tensor]| {
                // Rows of the base alone lie between the two adapters.
                let spans = [
                    RoutedSpan { tokens: 0..tokens.div_ceil(3), form: &low_rank },
                    RoutedSpan { tokens: tokens * 2 / 3..tokens, form: &scales },
                ];
                let spans = if tokens > 1 { &spans[..] } else { &spans[..1] };
                Ok(vec![routed_linear(&a[0], &weight, Some(&bias), spans)?])
            })
        });
    }
    Ok(())
}

fn norms(cases: &mut Cases, tokens: usize, width: usize) -> Result<()> {
    let shape = (tokens, width);
    for offset in [0f32, 1.0] {
        let name = format!("rms_norm offset {offset} {tokens}×{width}");
        cases.op(name, vec![x(1, shape)?, vector(2, width)?], move |_| {
            Ok(move |a: &[Tensor]| rms_norm(&a[0], &a[1], 1e-5, offset))
        });
    }
    cases.op(format!("layer_norm {tokens}×{width}"), vec![x(1, shape)?, vector(2, width)?], |_| {
        Ok(|a: &[Tensor]| layer_norm(&a[0], &a[1], None, 1e-5))
    });
    let inputs = vec![x(1, shape)?, vector(2, width)?, vector(3, width)?];
    cases.op(format!("layer_norm bias {tokens}×{width}"), inputs, |_| {
        Ok(|a: &[Tensor]| layer_norm(&a[0], &a[1], Some(&a[2]), 1e-5))
    });
    Ok(())
}

fn elementwise(cases: &mut Cases, tokens: usize, width: usize) -> Result<()> {
    use Activation::{Gelu, GeluTanh, QuickGelu, Relu, ReluSquared, Sigmoid, Silu, Tanh};
    let shape = (tokens, width);
    for act in [Silu, Gelu, GeluTanh, QuickGelu, Relu, ReluSquared, Sigmoid, Tanh] {
        cases.op(format!("activation {act:?} {tokens}×{width}"), vec![x(1, shape)?], move |_| {
            Ok(move |a: &[Tensor]| activation(&a[0], act))
        });
        let inputs = vec![x(1, shape)?, x(2, shape)?];
        cases.op(format!("gated_activation {act:?} {tokens}×{width}"), inputs, move |_| {
            Ok(move |a: &[Tensor]| gated_activation(&a[0], &a[1], act))
        });
    }
    cases.op(format!("dropout {tokens}×{width}"), vec![x(1, shape)?], |_| {
        Ok(|a: &[Tensor]| dropout(&a[0], 0.3, STREAM))
    });
    let inputs = vec![x(1, shape)?, vector(2, width)?];
    cases.op(format!("add_bias {tokens}×{width}"), inputs.clone(), |_| Ok(|a: &[Tensor]| add_bias(&a[0], &a[1])));
    cases.op(format!("scale_columns {tokens}×{width}"), inputs, |_| Ok(|a: &[Tensor]| scale_columns(&a[0], &a[1])));
    Ok(())
}

fn rows(cases: &mut Cases, tokens: usize, width: usize) -> Result<()> {
    let vocab = 61;
    cases.op(format!("embedding {tokens} of {vocab}×{width}"), vec![x(1, (vocab, width))?], move |_| {
        let ids = ids(tokens, vocab);
        Ok(move |a: &[Tensor]| embedding(&ids, &a[0]))
    });
    let inputs = vec![x(1, (tokens, width))?, x(2, (2, width))?];
    cases.op(format!("replace_rows {tokens}×{width}"), inputs, move |_| {
        let which: Vec<(usize, usize)> = (0..tokens).step_by(3).map(|t| (t, t / 3 % 2)).collect();
        Ok(move |a: &[Tensor]| replace_rows(&a[0], &a[1], &which))
    });
    let inputs = vec![x(1, (tokens, width))?, x(2, (tokens, 2))?];
    cases.op(format!("replace_columns {tokens}×{width}"), inputs, move |_| {
        Ok(move |a: &[Tensor]| replace_columns(&a[0], &a[1], &[width - 1, 0]))
    });
    Ok(())
}

fn losses(cases: &mut Cases, tokens: usize, width: usize) -> Result<()> {
    let scale = 1.0 / tokens as f64;
    for softcap in [None, Some(2.5)] {
        let what = if softcap.is_some() { " softcap" } else { "" };
        let name = |op: &str| format!("{op}{what} {tokens}×{width}");
        cases.untracked(name("cross_entropy_rows"), vec![x(1, (tokens, width))?], move |_| {
            let targets = ids(tokens, width);
            Ok(move |a: &[Tensor]| {
                let rows = cross_entropy_rows(&a[0], &targets, scale, softcap, true)?;
                let nll = Tensor::new(rows.nll, &Device::Cpu)?;
                let grad = rows.grad.ok_or_else(|| candle_core::Error::Msg("there is no gradient".into()))?;
                Ok(vec![nll, grad])
            })
        });
        cases.op(name("cross_entropy"), vec![x(1, (tokens, width))?], move |_| {
            let targets = ids(tokens, width);
            Ok(move |a: &[Tensor]| Ok(cross_entropy(&a[0], &targets, scale, softcap)?.loss))
        });
        let vocab = 131;
        cases.op(name("linear_cross_entropy"), vec![x(1, (tokens, width))?], move |p| {
            let weight = BF16.weight((vocab, width), &p.device)?;
            let (targets, spec) = (ids(tokens, vocab), LossSpec { scale, softcap, chunk_rows: 16 });
            Ok(move |a: &[Tensor]| Ok(linear_cross_entropy(&a[0], &weight, &targets, &spec)?.loss))
        });
    }
    Ok(())
}

fn rotaries(cases: &mut Cases, small: bool) -> Result<()> {
    let mut shapes = vec![(1, 1, 8, 4), (19, 3, 10, 3), (33, 4, 16, 8)];
    if !small {
        shapes.push((512, 32, 64, 32));
    }
    for (tokens, heads, head_dim, half) in shapes {
        for layout in [RotaryLayout::Half, RotaryLayout::Interleaved] {
            let name = format!("rotary {layout:?} {tokens}×{heads}×{head_dim}, {} turn", 2 * half);
            cases.op(name, vec![x(1, (tokens, heads * head_dim))?], move |p| {
                let angles = randn(2, (tokens + 3, half), 3.0)?;
                let (cos, sin) = (angles.cos()?.to_device(&p.device)?, angles.sin()?.to_device(&p.device)?);
                let positions: Vec<u32> = (0..tokens as u32).map(|t| t + 3).collect();
                let plan = RotaryPlan::new(&cos, &sin, &positions, head_dim, layout)?;
                Ok(move |a: &[Tensor]| rotary(&a[0], &plan))
            });
        }
    }
    Ok(())
}

fn attentions(cases: &mut Cases, small: bool) -> Result<()> {
    let span = |queries: Range<usize>, keys: Range<usize>, prefix: Range<usize>| SequenceSpan { queries, keys, prefix };
    let packed = |heads, kv_heads, head_dim| AttentionPlan::causal(heads, kv_heads, head_dim, &[7, 1, 19]);
    let base = packed(4, 4, 8);
    let mut plans = vec![
        ("causal", base.clone()),
        ("bidirectional", AttentionPlan { causal: false, ..base.clone() }),
        ("window", AttentionPlan { window: Some(5), ..base.clone() }),
        ("bidirectional window", AttentionPlan { causal: false, window: Some(3), ..base.clone() }),
        ("softcap", AttentionPlan { softcap: Some(3.0), ..base.clone() }),
        ("GQA", packed(6, 2, 16)),
        ("one key head, odd head_dim", packed(3, 1, 5)),
        // Two sequences share a prefix, which lies first.
        (
            "prefix",
            AttentionPlan { sequences: vec![span(0..7, 4..11, 0..4), span(7..20, 11..24, 0..4)], ..base.clone() },
        ),
        // A step of generation: earlier keys come from a cache.
        ("cached", AttentionPlan { sequences: vec![span(0..1, 0..23, 0..0), span(1..4, 23..40, 0..0)], ..base }),
    ];
    if !small {
        plans.push(("GQA", AttentionPlan::causal(32, 8, 64, &[300, 212])));
        plans.push(("GQA", AttentionPlan::causal(9, 3, 64, &[1024])));
    }
    for (what, plan) in plans {
        let queries = plan.sequences.iter().map(|s| s.queries.end).max().unwrap_or(0);
        let keys = plan.sequences.iter().map(|s| s.keys.end).max().unwrap_or(0);
        let (wide, narrow) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
        let name = format!("attention {what} {queries}·{keys}, {}/{}×{}", plan.heads, plan.kv_heads, plan.head_dim);
        let inputs = vec![x(1, (queries, wide))?, x(2, (keys, narrow))?, x(3, (keys, narrow))?];
        let plan = Arc::new(plan);
        cases.op(name, inputs, move |_| {
            let plan = plan.clone();
            Ok(move |a: &[Tensor]| attention(&a[0], &a[1], &a[2], &plan))
        });
    }
    Ok(())
}
