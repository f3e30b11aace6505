//! The fused loops: one read of the arguments, one write of the results.

use rayon::prelude::*;

use super::Activation;
use crate::cpu::{PARALLEL_ELEMENTS, new_rows, threads};
use crate::simd::{self, exp, normal, sigmoid, tanh};

/// An activation as code that a loop inlines.
trait Function {
    fn value(x: f32) -> f32;
    /// Value and derivative.
    fn both(x: f32) -> (f32, f32);
}

struct Silu;
struct Gelu;
struct GeluTanh;
struct QuickGelu;
struct Relu;
struct ReluSquared;
struct Sigmoid;
struct Tanh;

impl Function for Silu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x / (1.0 + exp(-x))
    }
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        let s = sigmoid(x);
        (x * s, s + x * (s * (1.0 - s)))
    }
}

impl Function for Gelu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * normal(x).0
    }
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        let (cdf, density) = normal(x);
        (x * cdf, cdf + x * density)
    }
}

/// √(2/π)
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

impl Function for GeluTanh {
    // (1 + tanh u)/2 = σ(2u), which is also accurate where tanh u is near −1.
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(2.0 * SQRT_2_OVER_PI * x * (1.0 + CUBIC * (x * x)))
    }
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        let s = sigmoid(2.0 * SQRT_2_OVER_PI * x * (1.0 + CUBIC * (x * x)));
        let du = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * (x * x));
        (x * s, s + x * (s * (1.0 - s)) * du)
    }
}

impl Function for QuickGelu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(1.702 * x)
    }
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        let s = sigmoid(1.702 * x);
        (x * s, s + 1.702 * x * (s * (1.0 - s)))
    }
}

impl Function for Relu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        if x < 0.0 { 0.0 } else { x }
    }
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        (Self::value(x), if x <= 0.0 { 0.0 } else { 1.0 })
    }
}

impl Function for ReluSquared {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        let r = Relu::value(x);
        r * r
    }
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        let r = Relu::value(x);
        (r * r, 2.0 * r)
    }
}

impl Function for Sigmoid {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        sigmoid(x)
    }
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        let s = sigmoid(x);
        (s, s * (1.0 - s))
    }
}

impl Function for Tanh {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        tanh(x)
    }
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        let t = tanh(x);
        (t, (1.0 - t) * (1.0 + t))
    }
}

/// Evaluates an expression with `$f` the [`Function`] of an [`Activation`].
macro_rules! monomorphic {
    ($act:expr, $f:ident => $body:expr) => {
        monomorphic!(@ $act, $f, $body; Silu Gelu GeluTanh QuickGelu Relu ReluSquared Sigmoid Tanh)
    };
    (@ $act:expr, $f:ident, $body:expr; $($name:ident)*) => {
        match $act {
            $(Activation::$name => {
                type $f = $name;
                $body
            })*
        }
    };
}

pub(super) fn forward(act: Activation, x: &[f32]) -> Vec<f32> {
    monomorphic!(act, F => generate(x.len(), #[inline(always)] |first, out| {
        let n = out.len();
        for (o, &x) in out.iter_mut().zip(&x[first..first + n]) {
            *o = F::value(x);
        }
    }))
}

pub(super) fn backward(act: Activation, x: &[f32], dy: &[f32]) -> Vec<f32> {
    monomorphic!(act, F => generate(x.len(), #[inline(always)] |first, out| {
        let n = out.len();
        for ((o, &x), &d) in out.iter_mut().zip(&x[first..first + n]).zip(&dy[first..first + n]) {
            *o = d * F::both(x).1;
        }
    }))
}

pub(super) fn gated_forward(act: Activation, gate: &[f32], up: &[f32]) -> Vec<f32> {
    monomorphic!(act, F => generate(gate.len(), #[inline(always)] |first, out| {
        let n = out.len();
        for ((o, &g), &u) in out.iter_mut().zip(&gate[first..first + n]).zip(&up[first..first + n]) {
            *o = F::value(g) * u;
        }
    }))
}

/// A new buffer of `n` elements, filled block by block with `f(first_element, block)`.
fn generate(n: usize, f: impl Fn(usize, &mut [f32]) + Sync + Send) -> Vec<f32> {
    new_rows(n, 1, 4, |first, block| {
        simd::run(
            #[inline(always)]
            || f(first, block),
        );
    })
}

/// Gradients of gate and up.
pub(super) fn gated_backward(act: Activation, gate: &[f32], up: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    monomorphic!(act, F => gated_backward_of::<F>(gate, up, dy))
}

fn gated_backward_of<F: Function>(gate: &[f32], up: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    const BLOCK: usize = 8 * 1024;
    let n = gate.len();
    let (mut dg, mut du) = (vec![0f32; n], vec![0f32; n]);
    let block = |(i, (dg, du)): (usize, (&mut [f32], &mut [f32]))| {
        let range = i * BLOCK..i * BLOCK + dg.len();
        let args = gate[range.clone()].iter().zip(&up[range.clone()]).zip(&dy[range]);
        simd::run(
            #[inline(always)]
            || {
                for ((dg, du), ((&g, &u), &d)) in dg.iter_mut().zip(du).zip(args) {
                    let (value, slope) = F::both(g);
                    *dg = d * u * slope;
                    *du = d * value;
                }
            },
        );
    };
    if threads() == 1 || n < PARALLEL_ELEMENTS / 4 {
        dg.chunks_mut(BLOCK).zip(du.chunks_mut(BLOCK)).enumerate().for_each(block);
    } else {
        dg.par_chunks_mut(BLOCK).zip(du.par_chunks_mut(BLOCK)).enumerate().for_each(block);
    }
    (dg, du)
}
