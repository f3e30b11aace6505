//! The same in candle tensor operations, `f32` inside.

use candle_core::{D, DType, Result, Tensor};

use super::{RotaryLayout, RotaryPlan, Turn};

/// Turns each head of `x` by its token's angles, or back.
pub(super) fn turn(x: &Tensor, plan: &RotaryPlan, turn: Turn) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let (dim, half) = (plan.head_dim, plan.half());
    let heads = width / dim;
    let f = x.to_dtype(DType::F32)?.reshape((tokens, heads, dim))?;
    let angles = |t: &Tensor| t.to_device(x.device())?.reshape((tokens, 1, half));
    let (cos, sin) = (angles(&plan.cos)?, angles(&plan.sin)?);
    let sin = if turn == Turn::Back { sin.neg()? } else { sin };
    let turned = f.narrow(D::Minus1, 0, 2 * half)?;
    let (a, b) = match plan.layout {
        RotaryLayout::Half => (turned.narrow(D::Minus1, 0, half)?, turned.narrow(D::Minus1, half, half)?),
        RotaryLayout::Interleaved => {
            let pairs = turned.contiguous()?.reshape((tokens, heads, half, 2))?;
            (pairs.narrow(D::Minus1, 0, 1)?.squeeze(D::Minus1)?, pairs.narrow(D::Minus1, 1, 1)?.squeeze(D::Minus1)?)
        }
    };
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let ya = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let yb = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let y = match plan.layout {
        RotaryLayout::Half => Tensor::cat(&[ya, yb], D::Minus1)?,
        RotaryLayout::Interleaved => Tensor::stack(&[ya, yb], D::Minus1)?.reshape((tokens, heads, 2 * half))?,
    };
    let rest = f.narrow(D::Minus1, 2 * half, dim - 2 * half)?;
    let y = if dim == 2 * half { y } else { Tensor::cat(&[y, rest], D::Minus1)? };
    y.reshape((tokens, width))?.to_dtype(x.dtype())
}
