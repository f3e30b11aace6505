//! Rotary embedding.

use candle_core::{Result, Tensor};
use peft_cuda::Element;
use peft_cuda::rows::{self, Heads};

use super::{Made, View, with};

/// `x` turned by the angles of `cos` and `sin`, or back.
pub(crate) fn turn(heads: Heads, cos: &Tensor, sin: &Tensor, x: &View<'_>, back: bool) -> Result<Option<Made>> {
    with(&[cos, sin], |angles| {
        let [cos, sin] = angles else { return Ok(None) };
        if [cos, sin].iter().any(|a| a.operand.element != Element::F32 || a.len() != heads.tokens * heads.half) {
            return Ok(None);
        }
        let mut out = x.like()?;
        let angles = (cos.operand.address, sin.operand.address);
        x.run(&[rows::rotary(heads, x.operand, angles, out.operand.address, back)], &mut [&mut out])?;
        Ok(Some(out))
    })
}
