//! RMSNorm and LayerNorm.

use candle_core::{Result, Tensor};
use peft_cuda::Element;
use peft_cuda::norm::Norm;
use peft_cuda::rows::{Factor, column_sums, partial_rows};

use super::{Made, View, with};

/// Which norm.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) centred: bool,
    pub(crate) eps: f64,
    pub(crate) offset: f32,
}

impl Kind {
    /// Of rows as long as the weight, whose type is that of `x` or `f32`.
    fn of(&self, x: &View<'_>, weight: &View<'_>) -> Option<Norm> {
        let (width, of_weight) = (weight.len(), weight.operand.element);
        let fits = of_weight == x.operand.element || of_weight == Element::F32;
        let Self { centred, eps, offset } = *self;
        (fits && x.len().is_multiple_of(width)).then(|| Norm {
            centred,
            rows: x.len() / width,
            width,
            eps: eps as f32,
            offset,
        })
    }

    /// The norm of `x` by a weight and, if there is one, a bias of the weight's type.
    pub(crate) fn forward(&self, args: &[View<'_>]) -> Result<Option<Made>> {
        let [x, weight, rest @ ..] = args else { return Ok(None) };
        let Some(norm) = self.of(x, weight) else { return Ok(None) };
        let bias = match rest {
            [] => 0,
            [bias] if bias.operand.element == weight.operand.element => bias.operand.address,
            _ => return Ok(None),
        };
        let mut out = x.like()?;
        // As transformers' RMSNorm without an offset rounds the normalised value before it meets the weight.
        let rounds = !self.centred && self.offset == 0.0;
        let launch = norm.forward(x.operand, weight.operand, bias, out.operand.address, rounds);
        x.run(&[launch], &mut [&mut out])?;
        Ok(Some(out))
    }

    /// The gradients of `x`, the weight and, where it is among the arguments, the bias.
    pub(crate) fn backward(
        &self,
        args: &[Tensor],
        grad: &Tensor,
        needs: &[bool],
    ) -> Result<Option<Vec<Option<Tensor>>>> {
        let ([x, weight, ..], [need_x, need_weight, rest @ ..]) = (args, needs) else { return Ok(None) };
        with(&[x, weight, grad], |views| {
            let [x, weight, grad] = views else { return Ok(None) };
            let (Some(norm), true) = (self.of(x, weight), grad.operand.element == x.operand.element) else {
                return Ok(None);
            };
            let room = |needed: bool, room: &dyn Fn() -> Result<Made>| needed.then(room).transpose();
            let (width, address) = (norm.width, |m: &Option<Made>| m.as_ref().map_or(0, |m| m.operand.address));
            let mut dx = room(*need_x, &|| x.like())?;
            let means = room(*need_weight && self.centred, &|| x.room(norm.rows, Element::F32))?;
            let rstds = room(*need_weight, &|| x.room(norm.rows, Element::F32))?;
            let grad_at = grad.operand.address;
            let rows =
                norm.backward(x.operand, weight.operand, grad_at, address(&dx), address(&means), address(&rstds));
            x.run(&[rows], &mut dx.iter_mut().collect::<Vec<_>>())?;
            let sums = |needed: bool, factor: Factor| {
                room(needed, &|| {
                    let partial = x.room((partial_rows(norm.rows), width), Element::F32)?;
                    let mut out = x.room(width, weight.operand.element)?;
                    let size = (norm.rows, width);
                    let launches = column_sums(grad.operand, factor, partial.operand.address, out.operand, size);
                    x.run(&launches, &mut [&mut out])?;
                    Ok(out)
                })
            };
            let factor = Factor { x: x.operand.address, means: address(&means), rstds: address(&rstds) };
            let mut grads = vec![dx, sums(*need_weight, factor)?];
            for need_bias in rest {
                grads.push(sums(*need_bias, Factor::default())?);
            }
            Ok(Some(grads.into_iter().map(|g| g.map(Made::tensor)).collect()))
        })
    }
}
