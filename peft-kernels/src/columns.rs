//! Some of the columns of a matrix: what becomes of the result of a layer that makes several things at once (queries, keys
//! and values; gate and up of an MLP).

use candle_core::{D, Result, Shape, Tensor};

use crate::cpu::{self, View, new_rows};
use crate::diff_op::{DiffOp, apply, is_cpu_f32};
use crate::tape::Keeps;

/// Which columns: each row is cut into stretches of `stride` elements, and of every stretch the `width` elements from `start`
/// on are taken.
///
/// With one stretch a row this is a range of columns. With a stretch for each head it is, say, the keys where queries, keys
/// and values lie head by head (GPT-NeoX).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// Elements of a stretch.
    pub stride: usize,
    /// The first element taken of each.
    pub start: usize,
    /// How many are taken of each.
    pub width: usize,
}

impl Columns {
    /// How many columns of a row of `total` are taken.
    fn taken(&self, total: usize) -> usize {
        total.checked_div(self.stride).unwrap_or(0) * self.width
    }
}

/// The chosen `columns` of `x: [tokens, total]`, one after another: `[tokens, taken]`. The gradient of the others is zero.
///
/// # Errors
/// When `x` is no matrix, or its rows are not whole stretches that hold the columns.
pub fn columns(x: &Tensor, columns: Columns) -> Result<Tensor> {
    let Columns { stride, start, width } = columns;
    let end = start.checked_add(width);
    match x.dims() {
        [_, total] if stride > 0 && total.is_multiple_of(stride) && width > 0 && end.is_some_and(|e| e <= stride) => {}
        dims => candle_core::bail!("columns: {width} from {start} on of each {stride} cannot be taken of {dims:?}"),
    }
    apply(Take(columns), &[x])
}

struct Take(Columns);

impl Take {
    /// The gradient of `x` in tensor operations.
    fn spread(&self, grad: &Tensor, total: usize) -> Result<Tensor> {
        let Columns { stride, start, width } = self.0;
        let tokens = grad.dim(0)?;
        let stretches = grad.reshape((tokens, total / stride, width))?;
        let behind = stride - start - width;
        stretches.pad_with_zeros(D::Minus1, start, behind)?.reshape((tokens, total))
    }
}

impl DiffOp for Take {
    const NAME: &'static str = "columns";
    const KEEPS: Keeps = Keeps::Nothing;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let Columns { stride, start, width } = self.0;
        let x = args[0];
        let (tokens, total) = x.rows()?;
        let taken = self.0.taken(total);
        let out = new_rows(tokens * taken, taken, taken, |first, rows| {
            let from = x.data.chunks_exact(total).skip(first);
            for (out, row) in rows.chunks_exact_mut(taken).zip(from) {
                for (out, stretch) in out.chunks_exact_mut(width).zip(row.chunks_exact(stride)) {
                    out.copy_from_slice(&stretch[start..start + width]);
                }
            }
        });
        Ok((out, Shape::from((tokens, taken))))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let Columns { stride, start, width } = self.0;
        let (tokens, total) = args[0].dims2()?;
        let stretches = args[0].reshape((tokens, total / stride, stride))?.narrow(D::Minus1, start, width)?;
        stretches.contiguous()?.reshape((tokens, self.0.taken(total)))
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        if needs != [true] {
            return Ok(vec![None]);
        }
        let total = args[0].dim(1)?;
        if !is_cpu_f32(grad) {
            return Ok(vec![Some(self.spread(grad, total)?)]);
        }
        let Columns { stride, start, width } = self.0;
        let dx = cpu::with(grad, |dy| {
            let (tokens, taken) = dy.rows()?;
            Ok(new_rows(tokens * total, total, total, |first, rows| {
                let from = dy.data.chunks_exact(taken).skip(first);
                for (out, row) in rows.chunks_exact_mut(total).zip(from) {
                    for (out, dy) in out.chunks_exact_mut(stride).zip(row.chunks_exact(width)) {
                        out[start..start + width].copy_from_slice(dy);
                    }
                }
            }))
        })?;
        Ok(vec![Some(cpu::tensor(dx, args[0].shape())?)])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::test_support::Check;
    use crate::testing::randn;

    #[test]
    fn forms_agree_forward_and_backward() {
        for (tokens, stretches, stride, start, width) in
            [(1, 1, 1, 0, 1), (3, 1, 12, 5, 4), (7, 4, 9, 6, 3), (65, 3, 33, 0, 32), (2, 5, 6, 2, 1)]
        {
            let x = randn(1, (tokens, stretches * stride), 1.0).unwrap();
            Check::new("columns")
                .reads_a_part()
                .run(&[x], |a| columns(&a[0], Columns { stride, start, width }))
                .unwrap();
        }
    }

    #[test]
    fn takes_what_it_says() {
        let x = Tensor::arange(0f32, 24.0, &candle_core::Device::Cpu).unwrap().reshape((2, 12)).unwrap();
        let taken = columns(&x, Columns { stride: 6, start: 2, width: 2 }).unwrap();
        assert_eq!(taken.to_vec2::<f32>().unwrap(), [[2.0, 3.0, 8.0, 9.0], [14.0, 15.0, 20.0, 21.0]]);
    }

    #[test]
    fn columns_that_are_not_there() {
        let x = randn(1, (3, 12), 1.0).unwrap();
        for (stride, start, width) in [(0, 0, 1), (5, 0, 1), (6, 4, 3), (6, 0, 0), (6, usize::MAX, 2)] {
            assert!(columns(&x, Columns { stride, start, width }).is_err(), "{stride} {start} {width}");
        }
        assert!(columns(&randn(1, 12, 1.0).unwrap(), Columns { stride: 6, start: 0, width: 2 }).is_err());
    }
}
