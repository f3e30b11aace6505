//! Values and derivatives in tensor operations.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use candle_core::{Result, Tensor};

use super::Activation;

const QUICK: f64 = 1.702;
const CUBIC: f64 = 0.044_715;

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

/// `max(x, 0)`, NaN kept.
fn relu(x: &Tensor) -> Result<Tensor> {
    x.lt(0.0)?.where_cond(&x.zeros_like()?, x)
}

/// Φ(x).
fn normal(x: &Tensor) -> Result<Tensor> {
    ((x * FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5
}

/// σ(2u) with u the argument of GELU's tanh.
fn gelu_gate(x: &Tensor) -> Result<Tensor> {
    let inner = (x * ((x.sqr()? * CUBIC)? + 1.0)?)?;
    sigmoid(&(inner * (2.0 * (2.0 / PI).sqrt()))?)
}

/// `s + x·s·(1 − s)·du`, the derivative of `x·s(u(x))` for a sigmoid `s`.
fn swish_slope(x: &Tensor, s: &Tensor, du: &Tensor) -> Result<Tensor> {
    let ds = (s * (1.0 - s)?)?;
    s + ((x * ds)? * du)?
}

/// `act(x)`.
pub(super) fn value(act: Activation, x: &Tensor) -> Result<Tensor> {
    match act {
        Activation::Silu => x * sigmoid(x)?,
        Activation::Gelu => x * normal(x)?,
        Activation::GeluTanh => x * gelu_gate(x)?,
        Activation::QuickGelu => x * sigmoid(&(x * QUICK)?)?,
        Activation::Relu => relu(x),
        Activation::ReluSquared => relu(x)?.sqr(),
        Activation::Sigmoid => sigmoid(x),
        Activation::Tanh => x.tanh(),
    }
}

/// `act'(x)`.
pub(super) fn slope(act: Activation, x: &Tensor) -> Result<Tensor> {
    match act {
        Activation::Silu => swish_slope(x, &sigmoid(x)?, &x.ones_like()?),
        Activation::Gelu => {
            let density = ((x.sqr()? * -0.5)?.exp()? * (0.5 / PI).sqrt())?;
            normal(x)? + (x * density)?
        }
        Activation::GeluTanh => {
            let du = (((x.sqr()? * (3.0 * CUBIC))? + 1.0)? * (2.0 * (2.0 / PI).sqrt()))?;
            swish_slope(x, &gelu_gate(x)?, &du)
        }
        Activation::QuickGelu => swish_slope(x, &sigmoid(&(x * QUICK)?)?, &(x.ones_like()? * QUICK)?),
        Activation::Relu => x.gt(0.0)?.to_dtype(x.dtype()),
        Activation::ReluSquared => relu(x)? * 2.0,
        Activation::Sigmoid => {
            let s = sigmoid(x)?;
            &s * (1.0 - &s)?
        }
        Activation::Tanh => 1.0 - x.tanh()?.sqr()?,
    }
}
