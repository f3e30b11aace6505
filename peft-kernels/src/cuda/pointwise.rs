//! Activations, gates and dropout.

use candle_core::{Result, Tensor};
use peft_cuda::pointwise::{self, Act, Mask};

use super::{Made, View, with};
use crate::Activation;

fn act(of: Activation) -> Act {
    match of {
        Activation::Silu => Act::Silu,
        Activation::Gelu => Act::Gelu,
        Activation::GeluTanh => Act::GeluTanh,
        Activation::QuickGelu => Act::QuickGelu,
        Activation::Relu => Act::Relu,
        Activation::ReluSquared => Act::ReluSquared,
        Activation::Sigmoid => Act::Sigmoid,
        Activation::Tanh => Act::Tanh,
    }
}

/// Whether all are of one type and length, and start where 16 bytes can be read at a time.
fn alike(views: &[View<'_>]) -> bool {
    let like = |v: &View<'_>| v.operand.element == views[0].operand.element && v.len() == views[0].len();
    views.iter().all(|v| like(v) && v.operand.address.is_multiple_of(16))
}

pub(crate) fn activation(of: Activation, args: &[View<'_>]) -> Result<Option<Made>> {
    let ([x], true) = (args, alike(args)) else { return Ok(None) };
    let mut out = x.like()?;
    x.run(&[pointwise::activation(act(of), x.operand, 0, out.operand.address, x.len())], &mut [&mut out])?;
    Ok(Some(out))
}

pub(crate) fn activation_backward(of: Activation, x: &Tensor, grad: &Tensor) -> Result<Option<Vec<Option<Tensor>>>> {
    with(&[x, grad], |views| {
        let ([x, grad], true) = (views, alike(views)) else { return Ok(None) };
        let mut dx = x.like()?;
        let launch = pointwise::activation(act(of), x.operand, grad.operand.address, dx.operand.address, x.len());
        x.run(&[launch], &mut [&mut dx])?;
        Ok(Some(vec![Some(dx.tensor())]))
    })
}

pub(crate) fn gated(of: Activation, args: &[View<'_>]) -> Result<Option<Made>> {
    let ([gate, up], true) = (args, alike(args)) else { return Ok(None) };
    let mut out = gate.like()?;
    let to = out.operand.address;
    gate.run(&[pointwise::gated_forward(act(of), gate.operand, up.operand.address, to, gate.len())], &mut [&mut out])?;
    Ok(Some(out))
}

pub(crate) fn gated_backward(
    of: Activation,
    [gate, up, grad]: [&Tensor; 3],
    needs: &[bool],
) -> Result<Option<Vec<Option<Tensor>>>> {
    with(&[gate, up, grad], |views| {
        let ([gate, up, grad], true) = (views, alike(views)) else { return Ok(None) };
        let room = |i: usize| needs.get(i).is_some_and(|n| *n).then(|| gate.like()).transpose();
        let (mut d_gate, mut d_up) = (room(0)?, room(1)?);
        let at = |m: &Option<Made>| m.as_ref().map_or(0, |m| m.operand.address);
        let to = (at(&d_gate), at(&d_up));
        let (up, grad) = (up.operand.address, grad.operand.address);
        let launch = pointwise::gated_backward(act(of), gate.operand, up, grad, to, gate.len());
        gate.run(&[launch], &mut d_gate.iter_mut().chain(&mut d_up).collect::<Vec<_>>())?;
        Ok(Some(vec![d_gate.map(Made::tensor), d_up.map(Made::tensor)]))
    })
}

pub(crate) fn dropout(mask: Mask, args: &[View<'_>]) -> Result<Option<Made>> {
    let ([x], true) = (args, alike(args)) else { return Ok(None) };
    let mut out = x.like()?;
    x.run(&[pointwise::dropout(mask, x.operand, out.operand.address, x.len())], &mut [&mut out])?;
    Ok(Some(out))
}
