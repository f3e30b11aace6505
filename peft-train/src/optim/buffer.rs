//! f32 state that belongs to one parameter, on the host or on the parameter's device.

use candle_core::{CpuStorage, DType, Device, Layout, Shape, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::{OptimError, Result};

/// Below this many elements a parallel pass costs more than it saves.
const PARALLEL_FROM: usize = 1 << 16;
/// Elements a rayon task takes.
const CHUNK: usize = 1 << 14;

/// One state tensor. CPU parameters keep a plain vector that the fused pass writes in place.
#[derive(Debug)]
pub(super) struct Buffer {
    shape: Shape,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Host(Vec<f32>),
    Device(Tensor),
}

impl Buffer {
    pub(super) fn zeros(shape: &Shape) -> Self {
        Self { shape: shape.clone(), data: Data::Host(vec![0.0; shape.elem_count()]) }
    }

    /// From a saved f32 tensor.
    pub(super) fn load(key: &str, t: &Tensor) -> Result<Self> {
        if t.dtype() != DType::F32 {
            return Err(OptimError::State { key: key.to_owned(), why: format!("is {:?}, not F32", t.dtype()) });
        }
        let host = t.flatten_all()?.to_vec1::<f32>()?;
        Ok(Self { shape: t.shape().clone(), data: Data::Host(host) })
    }

    pub(super) fn check(&self, name: &str, what: &'static str, want: &Shape) -> Result<()> {
        if &self.shape == want {
            return Ok(());
        }
        Err(OptimError::Shape { name: name.to_owned(), what, got: self.shape.clone(), want: want.clone() })
    }

    pub(super) fn save(&self) -> Result<Tensor> {
        Ok(match &self.data {
            Data::Host(v) => Tensor::from_slice(v, self.shape.clone(), &Device::Cpu)?,
            Data::Device(t) => t.to_device(&Device::Cpu)?,
        })
    }

    /// The values as a host slice; moves them there if a device held them.
    pub(super) fn host(&mut self) -> Result<&mut [f32]> {
        if let Data::Device(t) = &self.data {
            self.data = Data::Host(t.flatten_all()?.to_vec1::<f32>()?);
        }
        match &mut self.data {
            Data::Host(v) => Ok(v),
            Data::Device(_) => Err(candle_core::Error::msg("optimizer state is not on the host").into()),
        }
    }

    /// The values as a tensor on `device`.
    pub(super) fn tensor(&self, device: &Device) -> Result<Tensor> {
        Ok(match &self.data {
            Data::Host(v) => Tensor::from_slice(v, self.shape.clone(), device)?,
            Data::Device(t) => t.to_device(device)?,
        })
    }

    pub(super) fn put(&mut self, t: Tensor) {
        self.data = Data::Device(t.detach());
    }
}

/// A number as a parameter may store it.
pub(super) trait Stored: Copy + Send + Sync {
    fn load(self) -> f32;
    fn store(v: f32) -> Self;
}

impl Stored for f32 {
    #[inline(always)]
    fn load(self) -> f32 {
        self
    }
    #[inline(always)]
    fn store(v: f32) -> Self {
        v
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn load(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn store(v: f32) -> Self {
        bf16::from_f32(v)
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn load(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn store(v: f32) -> Self {
        f16::from_f32(v)
    }
}

/// An elementwise update of a parameter from its gradient and up to two state vectors. Elements do not depend on each
/// other, so the result is the same on any number of threads.
pub(super) trait Kernel: Sync {
    fn run<P: Stored>(&self, p: &mut [P], g: &[f32], s1: &mut [f32], s2: &mut [f32]);
}

/// Runs `kernel` over a contiguous CPU parameter (`p`, any float dtype) and its f32 gradient. A state vector that the
/// rule does not use is empty.
pub(super) fn run_cpu(
    kernel: &impl Kernel,
    p: &mut CpuStorage,
    p_layout: &Layout,
    g: &CpuStorage,
    g_layout: &Layout,
    s1: &mut [f32],
    s2: &mut [f32],
) -> candle_core::Result<()> {
    let CpuStorage::F32(g) = g else {
        return Err(candle_core::Error::msg("optimizer kernel takes an f32 gradient"));
    };
    let g = contiguous(g_layout).and_then(|(a, b)| g.get(a..b));
    let range = contiguous(p_layout);
    let (Some(g), Some((a, b))) = (g, range) else {
        return Err(candle_core::Error::msg("optimizer kernel takes contiguous tensors"));
    };
    match p {
        CpuStorage::F32(p) => run_slices(kernel, p.get_mut(a..b), g, s1, s2),
        CpuStorage::BF16(p) => run_slices(kernel, p.get_mut(a..b), g, s1, s2),
        CpuStorage::F16(p) => run_slices(kernel, p.get_mut(a..b), g, s1, s2),
        _ => Err(candle_core::Error::msg("optimizer kernel takes f32, bf16 or f16 parameters")),
    }
}

fn contiguous(l: &Layout) -> Option<(usize, usize)> {
    l.contiguous_offsets()
}

fn run_slices<P: Stored>(
    kernel: &impl Kernel,
    p: Option<&mut [P]>,
    g: &[f32],
    s1: &mut [f32],
    s2: &mut [f32],
) -> candle_core::Result<()> {
    let fits = |s: &[f32]| s.is_empty() || s.len() == g.len();
    let p = p.filter(|p| p.len() == g.len() && fits(s1) && fits(s2));
    let Some(p) = p else {
        return Err(candle_core::Error::msg("optimizer kernel: parameter, gradient and state differ in length"));
    };
    if p.len() < PARALLEL_FROM {
        kernel.run(p, g, s1, s2);
        return Ok(());
    }
    let n = p.len().div_ceil(CHUNK);
    let states = chunks(s1, n).into_par_iter().zip(chunks(s2, n));
    p.par_chunks_mut(CHUNK)
        .zip(g.par_chunks(CHUNK))
        .zip(states)
        .for_each(|((p, g), (s1, s2))| kernel.run(p, g, s1, s2));
    Ok(())
}

fn chunks(s: &mut [f32], n: usize) -> Vec<&mut [f32]> {
    let mut out: Vec<&mut [f32]> = s.chunks_mut(CHUNK).collect();
    out.resize_with(n, Default::default);
    out
}
