//! A vector added to, or multiplied into, every row.
//!
//! candle's broadcast operations keep a gradient as large as the activations for a frozen vector; these keep none.

use candle_core::{Result, Shape, Tensor};

use crate::cpu::{self, View, new_rows};
use crate::diff_op::{DiffOp, apply, is_cpu_f32};
use crate::reduce::{beside, check_vector, column_sum, row_blocks_with_sums, wide};
use crate::simd;
use crate::tape::Keeps;

/// `x + b` for every row of `x` (`[tokens, n]`), `b` `[n]`. The gradient of `b`, if it is tracked, is the sum of rows.
///
/// # Errors
/// When `b` is not a vector as long as the rows of `x`.
pub fn add_bias(x: &Tensor, b: &Tensor) -> Result<Tensor> {
    check_vector("add_bias", "the bias", x, b)?;
    apply(AddBias, &[x, &beside(x, b)?])
}

/// `x ⊙ s` for every row of `x` (`[tokens, n]`), `s` `[n]`: the scaling of IA³ and DoRA.
///
/// # Errors
/// When `s` is not a vector as long as the rows of `x`.
pub fn scale_columns(x: &Tensor, s: &Tensor) -> Result<Tensor> {
    check_vector("scale_columns", "the scale", x, s)?;
    apply(ScaleColumns, &[x, &beside(x, s)?])
}

/// `a + b` of one shape, as for a residual.
///
/// # Errors
/// When shapes or types differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.shape() != b.shape() || a.dtype() != b.dtype() {
        candle_core::bail!("add: {:?} {:?} and {:?} {:?}", a.dtype(), a.shape(), b.dtype(), b.shape());
    }
    apply(Add, &[a, b])
}

struct Add;

impl DiffOp for Add {
    const NAME: &'static str = "add";
    const KEEPS: Keeps = Keeps::Nothing;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let (a, b) = (args[0].data, args[1].data);
        let sum = new_rows(a.len(), 1, 3, |first, out| {
            let n = out.len();
            for ((o, a), b) in out.iter_mut().zip(&a[first..first + n]).zip(&b[first..first + n]) {
                *o = a + b;
            }
        });
        Ok((sum, args[0].shape.clone()))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        &args[0] + &args[1]
    }

    fn backward(&self, _: &[Tensor], _: &Tensor, grad: &Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(grad.clone()), Some(grad.clone())])
    }
}

/// `f(x, v)` with `v` beside every row.
fn each_row(args: &[View<'_>], f: impl Fn(f32, f32) -> f32 + Sync + Send) -> Result<(Vec<f32>, Shape)> {
    let (x, v) = (args[0], args[1].data);
    let (_, width) = x.rows()?;
    let out = new_rows(x.data.len(), width, width, |first, rows| {
        let x = &x.data[first * width..first * width + rows.len()];
        simd::run(
            #[inline(always)]
            || {
                for (out, x) in rows.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    for ((o, &x), &v) in out.iter_mut().zip(x).zip(v) {
                        *o = f(x, v);
                    }
                }
            },
        );
    });
    Ok((out, x.shape.clone()))
}

struct AddBias;

impl DiffOp for AddBias {
    const NAME: &'static str = "add_bias";
    const KEEPS: Keeps = Keeps::Nothing;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        each_row(
            args,
            #[inline(always)]
            |x, b| x + b,
        )
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        args[0].broadcast_add(&args[1].to_dtype(args[0].dtype())?)
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let dx = needs[0].then(|| grad.clone());
        let b = &args[1];
        let db = if !needs[1] {
            None
        } else if is_cpu_f32(grad) && is_cpu_f32(b) {
            let sums = cpu::with(grad, |dy| {
                let (rows, width) = dy.rows()?;
                Ok(row_blocks_with_sums(rows, width, &mut [], width, |range, _, sums| {
                    simd::run(
                        #[inline(always)]
                        || {
                            for dy in dy.data[range.start * width..range.end * width].chunks_exact(width) {
                                sums.iter_mut().zip(dy).for_each(|(s, &d)| *s += d);
                            }
                        },
                    );
                }))
            })?;
            Some(cpu::tensor(sums, b.shape())?)
        } else {
            Some(column_sum(&wide(grad)?)?.to_dtype(b.dtype())?)
        };
        Ok(vec![dx, db])
    }
}

struct ScaleColumns;

impl DiffOp for ScaleColumns {
    const NAME: &'static str = "scale_columns";
    const KEEPS: Keeps = Keeps::Arguments;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        each_row(
            args,
            #[inline(always)]
            |x, s| x * s,
        )
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        args[0].broadcast_mul(&args[1].to_dtype(args[0].dtype())?)
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let (x, s) = (&args[0], &args[1]);
        if !(is_cpu_f32(x) && is_cpu_f32(s) && is_cpu_f32(grad)) {
            let dx = if needs[0] { Some(self.neutral(&[grad.clone(), s.clone()])?) } else { None };
            let ds = if needs[1] { Some(column_sum(&(wide(grad)? * wide(x)?)?)?.to_dtype(s.dtype())?) } else { None };
            return Ok(vec![dx, ds]);
        }
        let (dx, ds) = cpu::with(x, |x| {
            cpu::with(s, |s| {
                cpu::with(grad, |dy| {
                    let (rows, width) = x.rows()?;
                    let mut dx = vec![0f32; if needs[0] { x.data.len() } else { 0 }];
                    let sums = if needs[1] { width } else { 0 };
                    let ds = row_blocks_with_sums(rows, width, &mut dx, sums, |range, dx, ds| {
                        simd::run(
                            #[inline(always)]
                            || {
                                let mut outs = dx.chunks_exact_mut(width);
                                for r in range {
                                    let x = &x.data[r * width..][..width];
                                    let dy = &dy.data[r * width..][..width];
                                    if let Some(dx) = outs.next() {
                                        for ((o, &d), &s) in dx.iter_mut().zip(dy).zip(s.data) {
                                            *o = d * s;
                                        }
                                    }
                                    for ((a, &d), &x) in ds.iter_mut().zip(dy).zip(x) {
                                        *a += d * x;
                                    }
                                }
                            },
                        );
                    });
                    Ok((dx, ds))
                })
            })
        })?;
        let dx = needs[0].then(|| cpu::tensor(dx, x.shape())).transpose()?;
        let ds = needs[1].then(|| cpu::tensor(ds, s.shape())).transpose()?;
        Ok(vec![dx, ds])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::test_support::{Check, SHAPES, backward};
    use crate::testing::{close, randn};
    use candle_core::{DType, Var};

    #[test]
    fn forms_agree_forward_and_backward() {
        for (i, (rows, width)) in SHAPES.into_iter().enumerate() {
            let args = [randn(i as u64, (rows, width), 1.5).unwrap(), randn(50 + i as u64, width, 0.7).unwrap()];
            Check::new("add_bias").run(&args, |a| add_bias(&a[0], &a[1])).unwrap();
            Check::new("scale_columns").run(&args, |a| scale_columns(&a[0], &a[1])).unwrap();
        }
    }

    #[test]
    fn any_rank_and_a_view_in_other_order() {
        let x = randn(1, (4, 3, 5), 1.0).unwrap();
        let b = randn(2, 4, 1.0).unwrap();
        let turned = x.t().unwrap().transpose(0, 2).unwrap();
        assert!(!turned.is_contiguous());
        let turned = turned.permute((2, 1, 0)).unwrap().permute((1, 2, 0)).unwrap();
        let b5 = randn(3, turned.dims()[2], 1.0).unwrap();
        close("bias", &add_bias(&turned, &b5).unwrap(), &turned.broadcast_add(&b5).unwrap(), 0.0).unwrap();
        assert!(add_bias(&x, &b).unwrap_err().to_string().contains("[5]"));
    }

    #[test]
    fn a_frozen_vector_gets_no_gradient_and_other_types_are_converted() {
        let x = Var::from_tensor(&randn(1, (3, 8), 1.0).unwrap()).unwrap();
        let b = randn(2, 8, 1.0).unwrap().to_dtype(DType::BF16).unwrap();
        for y in [add_bias(x.as_tensor(), &b).unwrap(), scale_columns(x.as_tensor(), &b).unwrap()] {
            assert_eq!(y.dtype(), DType::F32);
            let grads = backward(&y).unwrap();
            assert!(grads.get(x.as_tensor()).is_some() && grads.get(&b).is_none());
        }
        // A trained vector in another type than the activations gets its gradient in its own.
        let b = Var::from_tensor(&b).unwrap();
        let grads = backward(&scale_columns(x.as_tensor(), b.as_tensor()).unwrap()).unwrap();
        assert_eq!(grads.get(b.as_tensor()).unwrap().dtype(), DType::BF16);
    }
}
