//! One operation on a device, compared with the CPU and timed.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var};
use peft_kernels::seed;
use peft_kernels::testing::randn;

/// Where an operation runs, and the type of its activations.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) device: Device,
    pub(crate) dtype: DType,
}

impl Place {
    /// The reference of this place: the CPU in `f32`, whose fused kernels are compared with `f64` when they are what is
    /// checked.
    pub(crate) fn reference(&self) -> Self {
        let itself = self.device.is_cpu() && self.dtype == DType::F32;
        Self { device: Device::Cpu, dtype: if itself { DType::F64 } else { DType::F32 } }
    }
}

/// The largest relative error that rounding explains.
pub(crate) fn limit(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 2e-2,
        DType::F16 => 3e-3,
        _ => 5e-5,
    }
}

/// An operation with its frozen parts in place.
pub(crate) type Op = Box<dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>>;

/// Type of an input where it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The activations' type.
    Activation,
    /// `f32` wherever activations are narrower, as adapters are in training.
    Wide,
}

/// Makes an operation with its captured tensors on a device.
pub(crate) type Make = Box<dyn Fn(&Place) -> Result<Op>>;

/// An operation on given inputs.
pub(crate) struct Case {
    pub(crate) name: String,
    /// In `f32` on the CPU.
    pub(crate) inputs: Vec<(Tensor, Kind)>,
    /// Whether the first output is differentiated for every input.
    pub(crate) gradients: bool,
    /// Puts the frozen parts in place.
    pub(crate) make: Make,
}

/// What a check found.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub(crate) name: String,
    pub(crate) good: bool,
}

/// All verdicts.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) checked: usize,
    pub(crate) bad: Vec<String>,
}

impl Tally {
    pub(crate) fn add(&mut self, verdict: Verdict) {
        self.checked += 1;
        if !verdict.good {
            self.bad.push(verdict.name);
        }
    }
}

struct Evaluated {
    outputs: Vec<Tensor>,
    gradients: Vec<Tensor>,
}

struct Measured {
    forward: f64,
    backward: Option<f64>,
    forward_us: f64,
    both_us: Option<f64>,
}

impl Case {
    /// Runs the operation at `place` and on the CPU, and prints a line.
    pub(crate) fn check(&self, place: &Place, repeat: u32) -> Verdict {
        let name = format!("{} {}", place.dtype.as_str(), self.name);
        let limit = limit(place.dtype);
        match self.measure(place, repeat) {
            Ok(m) => {
                let good = [Some(m.forward), m.backward].into_iter().flatten().all(|e| e <= limit);
                let number = |v: Option<f64>| v.map_or("-".to_string(), |v| format!("{v:.1e}"));
                let time = |v: Option<f64>| v.map_or("-".to_string(), |v| format!("{v:.0}"));
                println!(
                    "{:<52} {:>10} {:>10} {limit:>8.0e} {:<4} {:>10} {:>10}",
                    self.name,
                    number(Some(m.forward)),
                    number(m.backward),
                    if good { "ok" } else { "BAD" },
                    time(Some(m.forward_us)),
                    time(m.both_us),
                );
                Verdict { name, good }
            }
            Err(e) => {
                let e = e.to_string();
                println!("{:<52} BAD  {}", self.name, e.lines().next().unwrap_or_default());
                Verdict { name, good: false }
            }
        }
    }

    fn measure(&self, place: &Place, repeat: u32) -> Result<Measured> {
        let reference = place.reference();
        let expected = self.evaluate(&(self.make)(&reference)?, &self.inputs(place, &reference)?)?;
        let op = (self.make)(place)?;
        let inputs = self.inputs(place, place)?;
        let got = self.evaluate(&op, &inputs)?;
        let forward = worst(&got.outputs, &expected.outputs)?;
        let backward = if self.gradients { Some(worst(&got.gradients, &expected.gradients)?) } else { None };
        let plain: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().detach()).collect();
        let forward_us = time(&place.device, repeat, || op(&plain).map(drop))?;
        let both = || time(&place.device, repeat, || self.evaluate(&op, &inputs).map(drop));
        let both_us = if self.gradients { Some(both()?) } else { None };
        Ok(Measured { forward, backward, forward_us, both_us })
    }

    /// The inputs at `to`, with the values that they have in `rounded`'s type.
    fn inputs(&self, rounded: &Place, to: &Place) -> Result<Vec<Var>> {
        self.inputs
            .iter()
            .map(|(t, kind)| {
                let (t, dtype) = match kind {
                    Kind::Activation => (t.to_dtype(rounded.dtype)?, to.dtype),
                    Kind::Wide if to.dtype == DType::F64 => (t.clone(), DType::F64),
                    Kind::Wide => (t.clone(), DType::F32),
                };
                Var::from_tensor(&t.to_dtype(dtype)?.to_device(&to.device)?)
            })
            .collect()
    }

    fn evaluate(&self, op: &Op, inputs: &[Var]) -> Result<Evaluated> {
        let inputs: Vec<Tensor> = inputs
            .iter()
            .map(|v| if self.gradients { v.as_tensor().clone() } else { v.as_tensor().detach() })
            .collect();
        let outputs = op(&inputs)?;
        let Some(y) = outputs.first().filter(|_| self.gradients) else {
            return Ok(Evaluated { outputs, gradients: Vec::new() });
        };
        // Rounded as bf16 rounds it, so that it is the same in every type.
        let dy = randn(99, y.shape(), 1.0)?.to_dtype(DType::BF16)?.to_dtype(y.dtype())?.to_device(y.device())?;
        let store = seed(y, &dy)?.backward()?;
        let gradients = inputs
            .iter()
            .enumerate()
            .map(|(i, x)| {
                let missing = || candle_core::Error::Msg(format!("input {i} got no gradient"));
                store.get(x).map(Tensor::detach).ok_or_else(missing)
            })
            .collect::<Result<_>>()?;
        Ok(Evaluated { outputs: outputs.iter().map(Tensor::detach).collect(), gradients })
    }
}

/// The largest relative error among pairs; NaN counts as infinite.
fn worst(got: &[Tensor], expected: &[Tensor]) -> Result<f64> {
    got.iter().zip(expected).try_fold(0f64, |worst, (a, b)| Ok(worst.max(relative(a, b)?)))
}

fn relative(a: &Tensor, b: &Tensor) -> Result<f64> {
    if a.shape() != b.shape() {
        candle_core::bail!("the shape is {:?} but on the CPU {:?}", a.shape(), b.shape());
    }
    let flat = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (a, b) = (flat(a)?, flat(b)?);
    let norm = b.iter().map(|b| b * b).sum::<f64>().sqrt();
    let error = a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
    let relative = if norm > 0.0 { error / norm } else { error };
    Ok(if relative.is_finite() { relative } else { f64::INFINITY })
}

/// Microseconds a call, after one to warm up.
fn time(device: &Device, repeat: u32, f: impl Fn() -> Result<()>) -> Result<f64> {
    f()?;
    device.synchronize()?;
    let started = Instant::now();
    for _ in 0..repeat {
        f()?;
    }
    device.synchronize()?;
    Ok(started.elapsed().as_secs_f64() * 1e6 / f64::from(repeat))
}
