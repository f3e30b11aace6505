//! Tensors in and out of emulated memory, and what is asked of a kernel's result.

use candle_core::{DType, Device, Tensor, Var};
use half::{bf16, f16};
use peft_cuda::{Element, Launch};
use peft_cuda_emulation::{Buffer, Order, run};

pub(crate) const ELEMENTS: [Element; 3] = [Element::F32, Element::Bf16, Element::F16];

pub(crate) fn dtype(element: Element) -> DType {
    match element {
        Element::F32 => DType::F32,
        Element::Bf16 => DType::BF16,
        Element::F16 => DType::F16,
    }
}

/// The largest relative error (in the norm of the whole) that rounding explains.
pub(crate) fn limit(element: Element) -> f64 {
    match element {
        Element::F32 => 3e-6,
        Element::Bf16 => 6e-3,
        Element::F16 => 1e-3,
    }
}

/// A copy of a tensor, rounded to `element`.
pub(crate) fn upload(t: &Tensor, element: Element) -> Buffer {
    let t = t.flatten_all().unwrap();
    let bytes: Vec<u8> = match element {
        Element::F32 => t.to_vec1::<f32>().unwrap().iter().flat_map(|v| v.to_ne_bytes()).collect(),
        Element::Bf16 => {
            t.to_dtype(DType::BF16).unwrap().to_vec1::<bf16>().unwrap().iter().flat_map(|v| v.to_ne_bytes()).collect()
        }
        Element::F16 => {
            t.to_dtype(DType::F16).unwrap().to_vec1::<f16>().unwrap().iter().flat_map(|v| v.to_ne_bytes()).collect()
        }
    };
    Buffer::of_bytes(&bytes)
}

/// Room for a tensor.
pub(crate) fn room(elements: usize, element: Element) -> Buffer {
    Buffer::poisoned(elements * element.size())
}

/// The elements of a buffer in `f64`.
pub(crate) fn download(buffer: &Buffer, element: Element) -> Vec<f64> {
    assert!(buffer.is_intact(), "a kernel wrote outside of its result");
    match element {
        Element::F32 => buffer.floats().into_iter().map(f64::from).collect(),
        Element::Bf16 => buffer.bytes().as_chunks().0.iter().map(|b| bf16::from_ne_bytes(*b).to_f64()).collect(),
        Element::F16 => buffer.bytes().as_chunks().0.iter().map(|b| f16::from_ne_bytes(*b).to_f64()).collect(),
    }
}

/// Runs a launch on buffers that outlive the call.
#[allow(unsafe_code)]
pub(crate) fn launch(launch: &Launch, order: Order) {
    // SAFETY: tests pass addresses of buffers that they hold.
    unsafe { run(launch, order) }.unwrap();
}

/// `‖got − want‖ / ‖want‖`; infinite where a value is not a number.
pub(crate) fn error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = want.iter().map(|w| w * w).sum::<f64>().sqrt();
    let off = got.iter().zip(want).map(|(g, w)| (g - w) * (g - w)).sum::<f64>().sqrt();
    let relative = if norm > 0.0 { off / norm } else { off };
    if relative.is_finite() { relative } else { f64::INFINITY }
}

pub(crate) fn close(what: &str, got: &[f64], want: &[f64], limit: f64) {
    let error = error(got, want);
    assert!(error <= limit, "{what}: off by {error:.2e}, limit {limit:.0e}");
}

/// A tensor's elements in `f64`.
pub(crate) fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The tensor as `element` stores it, in `f64`.
pub(crate) fn rounded(t: &Tensor, element: Element) -> Tensor {
    t.to_dtype(dtype(element)).unwrap().to_dtype(DType::F64).unwrap()
}

/// The value of `f` in `f64`, and the gradients of all `inputs` for the gradient `dy`.
pub(crate) fn reference(
    inputs: &[Tensor],
    dy: &Tensor,
    f: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
) -> (Vec<f64>, Vec<Vec<f64>>) {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&tracked).unwrap();
    let grads = peft_kernels::seed(&y, dy).unwrap().backward().unwrap();
    let gradients = vars.iter().map(|v| values(grads.get(v.as_tensor()).unwrap())).collect();
    (values(&y), gradients)
}

/// Random numbers.
pub(crate) fn randn(seed: u64, shape: impl Into<candle_core::Shape>, scale: f32) -> Tensor {
    peft_kernels::testing::randn(seed, shape, scale).unwrap().to_device(&Device::Cpu).unwrap()
}
