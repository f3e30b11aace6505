//! Rows of hidden states: those of two tensors as those of one, where a block changes a part; some of one, where no more are read.

use candle_core::{Result, Shape, Tensor};

use crate::cpu::View;
use crate::diff_op::{DiffOp, apply};
use crate::embedding::embedding;
use crate::tape::Keeps;

/// The rows of `a: [n, width]`, then those of `b: [m, width]`: `[n + m, width]`. The backward pass reads nothing, and its
/// gradients are parts of the result's.
///
/// # Errors
/// When these are no matrices of one width, type and device.
pub fn stack_rows(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match (a.dims(), b.dims()) {
        ([_, n], [_, m]) if n == m && a.dtype() == b.dtype() => apply(Stack, &[a, b]),
        (a, b) => candle_core::bail!("stack_rows: {a:?} and {b:?} are no matrices of one width and type"),
    }
}

/// `rows` of `x: [n, width]`, `[rows.len(), width]`. The backward pass reads nothing; other rows have a gradient of zero.
///
/// # Errors
/// Names a row that `x` lacks.
pub fn select_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    embedding(rows, x)
}

struct Stack;

impl DiffOp for Stack {
    const NAME: &'static str = "stack_rows";
    const KEEPS: Keeps = Keeps::Nothing;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let ((a_rows, width), (b_rows, _)) = (args[0].shape.dims2()?, args[1].shape.dims2()?);
        Ok(([args[0].data, args[1].data].concat(), Shape::from((a_rows + b_rows, width))))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        Tensor::cat(args, 0)
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let mut start = 0;
        let part = |(x, needed): (&Tensor, &bool)| {
            let rows = x.dim(0)?;
            start += rows;
            needed.then(|| grad.narrow(0, start - rows, rows)).transpose()
        };
        args.iter().zip(needs).map(part).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::test_support::{Check, SHAPES};
    use crate::testing::randn;

    #[test]
    fn forms_agree_forward_and_backward() {
        for (i, (rows, width)) in SHAPES.into_iter().enumerate() {
            let args = [randn(i as u64, (rows, width), 1.0).unwrap(), randn(50, (3, width), 1.0).unwrap()];
            Check::new("stack_rows").run(&args, |a| stack_rows(&a[0], &a[1])).unwrap();
        }
    }

    #[test]
    fn matrices_that_do_not_fit() {
        let x = randn(1, (3, 4), 1.0).unwrap();
        let half = x.to_dtype(candle_core::DType::BF16).unwrap();
        for other in [randn(2, (3, 5), 1.0).unwrap(), randn(2, 4, 1.0).unwrap(), half] {
            assert!(stack_rows(&x, &other).is_err());
        }
        assert_eq!(stack_rows(&x, &x.narrow(0, 0, 0).unwrap()).unwrap().dims(), [3, 4]);
    }
}
