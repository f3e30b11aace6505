//! The frozen linear layer as one graph node: `y = x·Wᵀ + b` forward, `dx = dy·W` backward, never dW.

use candle_core::{DType, Result, Shape, Tensor};

use crate::cpu::{self, View};
use crate::diff_op::{self, DiffOp};
use crate::frozen_gemm::Addend;
use crate::tape::Keeps;
use crate::weight::FrozenWeight;

/// `x·Wᵀ + bias` for `x: [tokens, in]`, with a gradient for `x` alone.
///
/// # Errors
/// When shapes do not fit.
pub fn frozen_linear(x: &Tensor, weight: &FrozenWeight, bias: Option<&Tensor>) -> Result<Tensor> {
    if let Some(b) = bias
        && b.dims() != [weight.out_features()]
    {
        candle_core::bail!("a bias of {:?} on a weight with {} outputs", b.shape(), weight.out_features());
    }
    diff_op::apply(FrozenLinearOp { weight: weight.clone(), bias: bias.map(Tensor::detach) }, &[x])
}

/// `x·Wᵀ` for a tracked weight `[out, in]`: gradients for both, each only where it is needed.
///
/// # Errors
/// When shapes do not fit.
pub fn trainable_linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    diff_op::apply(TrainableLinear, &[x, weight])
}

struct FrozenLinearOp {
    weight: FrozenWeight,
    bias: Option<Tensor>,
}

/// The dimensions of a `[tokens, width]` argument.
pub(crate) fn matrix(shape: &Shape, width: usize, op: &str) -> Result<usize> {
    match shape.dims2() {
        Ok((tokens, w)) if w == width => Ok(tokens),
        _ => candle_core::bail!("{op}: the input is [tokens, {width}], not {shape:?}"),
    }
}

/// Calls `f` with the elements of a bias in `f32`.
pub(crate) fn with_bias<R>(bias: Option<&Tensor>, f: impl FnOnce(Option<&[f32]>) -> Result<R>) -> Result<R> {
    let Some(bias) = bias else { return f(None) };
    cpu::with(&bias.to_dtype(DType::F32)?.contiguous()?, |b| f(Some(b.data)))
}

impl DiffOp for FrozenLinearOp {
    const NAME: &'static str = "frozen_linear";
    const KEEPS: Keeps = Keeps::Nothing;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let (n, k) = (self.weight.out_features(), self.weight.in_features());
        let tokens = matrix(args[0].shape, k, Self::NAME)?;
        let y = with_bias(self.bias.as_ref(), |bias| {
            self.weight.matmul_t_cpu(args[0].data, tokens, Addend { bias, ..Addend::default() })
        })?;
        Ok((y, Shape::from((tokens, n))))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let y = self.weight.matmul_t(&args[0])?;
        match &self.bias {
            Some(b) => y.broadcast_add(&b.to_dtype(y.dtype())?),
            None => Ok(y),
        }
    }

    fn backward(&self, _: &[Tensor], _: &Tensor, grad: &Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(self.weight.matmul(grad)?)])
    }
}

struct TrainableLinear;

impl DiffOp for TrainableLinear {
    const NAME: &'static str = "trainable_linear";
    const KEEPS: Keeps = Keeps::Arguments;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let (n, k) = args[1].shape.dims2()?;
        let tokens = matrix(args[0].shape, k, Self::NAME)?;
        let y = cpu::gemm(cpu::Mat::new(args[0].data, tokens, k), cpu::Mat::new(args[1].data, n, k).t(), 1.0)?;
        Ok((y, Shape::from((tokens, n))))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        // The product is made in the activations' type, as autocast does, whatever the weight's.
        args[0].matmul(&args[1].to_dtype(args[0].dtype())?.t()?)
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let (x, w) = (&args[0], &args[1]);
        let dx = needs[0].then(|| grad.matmul(&w.to_dtype(grad.dtype())?)).transpose()?;
        let dw = needs[1].then(|| grad.t()?.matmul(x)?.to_dtype(w.dtype())).transpose()?;
        Ok(vec![dx, dw])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::{check_gradients, close, randn};
    use candle_core::Var;

    #[test]
    fn forward_and_gradient() {
        for (tokens, inp, out) in [(1, 1, 1), (3, 7, 5), (65, 33, 17)] {
            let w = randn(1, (out, inp), 0.5).unwrap();
            let b = randn(2, out, 0.5).unwrap();
            let x = randn(3, (tokens, inp), 1.0).unwrap();
            let frozen = FrozenWeight::dense(&w).unwrap();
            let y = frozen_linear(&x, &frozen, Some(&b)).unwrap();
            let reference = x.matmul(&w.t().unwrap()).unwrap().broadcast_add(&b).unwrap();
            close("y", &y, &reference, 1e-5).unwrap();
            check_gradients(std::slice::from_ref(&x), |a| frozen_linear(&a[0], &frozen, Some(&b))).unwrap();
            check_gradients(&[x, w], |a| trainable_linear(&a[0], &a[1])).unwrap();
        }
    }

    #[test]
    fn the_store_never_sees_the_weight() {
        let w = randn(1, (64, 32), 0.5).unwrap();
        let x = Var::from_tensor(&randn(2, (3, 32), 1.0).unwrap()).unwrap();
        let y = frozen_linear(x.as_tensor(), &FrozenWeight::dense(&w).unwrap(), None).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        let shapes: Vec<_> = grads.get_ids().filter_map(|id| grads.get_id(*id)).map(|g| g.dims().to_vec()).collect();
        assert!(shapes.iter().all(|s| s != &[64, 32] && s != &[32, 64]), "{shapes:?}");
        assert!(grads.get(x.as_tensor()).is_some());
    }

    #[test]
    fn half_precision_goes_through_the_neutral_form() {
        let w = randn(1, (5, 6), 0.5).unwrap();
        let x = randn(2, (4, 6), 1.0).unwrap();
        let frozen = FrozenWeight::dense(&w).unwrap();
        let y = frozen_linear(&x.to_dtype(DType::F16).unwrap(), &frozen, None).unwrap();
        assert_eq!(y.dtype(), DType::F16);
        close("f16", &y, &frozen_linear(&x, &frozen, None).unwrap(), 5e-3).unwrap();
    }
}
