//! The checks that every operation goes through.
//!
//! Neutral forms calculate `f64` input in `f64`, so one function of `f32` input (fused) and of the same input widened
//! (neutral) is compared with a reference of twice the precision, forward and backward, and the reference itself with
//! finite differences.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};

use crate::testing::{check_gradients_with, close, randn};

/// `(rows, width)` that are odd, tiny, a vector wide, and one of a real model.
pub(crate) const SHAPES: [(usize, usize); 9] =
    [(1, 1), (3, 1), (1, 7), (65, 7), (3, 16), (65, 33), (257, 33), (257, 1), (65, 576)];

/// Gradients of `Σ y ⊙ w` for a fixed random `w`.
pub(crate) fn backward(y: &Tensor) -> Result<GradStore> {
    y.mul(&upstream(y, y.dtype())?)?.sum_all()?.backward()
}

/// Values that `rounding` can represent, in the type of `y`.
fn upstream(y: &Tensor, rounding: DType) -> Result<Tensor> {
    randn(77, y.shape(), 1.0)?.to_dtype(rounding)?.to_dtype(y.dtype())
}

/// Runs `f` on `threads` threads.
#[allow(clippy::unwrap_used)]
pub(crate) fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

pub(crate) struct Check {
    name: &'static str,
    tolerance: f64,
    half_factor: f64,
    differences: bool,
    reads_all: bool,
}

impl Check {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, tolerance: 4e-6, half_factor: 1.0, differences: true, reads_all: true }
    }

    /// Loosens the tolerance of half types: candle adds up their gradients in the half type itself.
    pub(crate) fn sums_in_half(self) -> Self {
        Self { half_factor: 8.0, ..self }
    }

    /// Leaves out finite differences, where the function has kinks.
    pub(crate) fn kinked(self) -> Self {
        Self { differences: false, ..self }
    }

    /// Leaves out that a NaN at the end of an input reaches the result, where the function does not read all of it.
    pub(crate) fn reads_a_part(self) -> Self {
        Self { reads_all: false, ..self }
    }

    /// The function's value and the gradients of all its inputs.
    fn evaluate(
        inputs: &[Tensor],
        rounding: DType,
        f: &(impl Fn(&[Tensor]) -> Result<Tensor> + Sync),
    ) -> Result<Vec<Tensor>> {
        let vars = inputs.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let y = f(&tracked)?;
        let grads = y.mul(&upstream(&y, rounding)?)?.sum_all()?.backward()?;
        let mut all = vec![y.detach()];
        for (i, v) in vars.iter().enumerate() {
            match grads.get(v.as_tensor()) {
                Some(g) => all.push(g.detach()),
                None => candle_core::bail!("input {i} got no gradient"),
            }
        }
        Ok(all)
    }

    /// The same through a recording.
    fn evaluate_recorded(inputs: &[Tensor], f: &(impl Fn(&[Tensor]) -> Result<Tensor> + Sync)) -> Result<Vec<Tensor>> {
        let vars = inputs.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let (y, record) = crate::record(|| f(&tracked))?;
        let grads: HashMap<_, _> = record.backward(&upstream(&y, DType::F32)?)?.into_iter().collect();
        let mut all = vec![y.detach()];
        for (i, v) in tracked.iter().enumerate() {
            match grads.get(&v.id()) {
                Some(g) => all.push(g.clone()),
                None => candle_core::bail!("input {i} got no gradient from the recording"),
            }
        }
        Ok(all)
    }

    /// Holds `f` to everything at once; `inputs` are `f32` on the CPU.
    pub(crate) fn run(self, inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor> + Sync) -> Result<()> {
        let dims: Vec<_> = inputs.iter().map(|t| t.dims().to_vec()).collect();
        let to = |ts: &[Tensor], d| ts.iter().map(|t| t.to_dtype(d)).collect::<Result<Vec<_>>>();
        let compare = |form: &str, got: &[Tensor], want: &[Tensor], tolerance: f64| -> Result<()> {
            for (i, (g, w)) in got.iter().zip(want).enumerate() {
                let what = if i == 0 { "value".to_string() } else { format!("gradient {}", i - 1) };
                // Sums over rows grow, and the error of a sum is relative to its largest terms.
                let size = w.to_dtype(DType::F64)?.abs()?.max_all()?.to_scalar::<f64>()?.max(1.0);
                close(&format!("{} {form} {dims:?}: {what}", self.name), g, w, tolerance * size)?;
            }
            Ok(())
        };

        let wide = to(inputs, DType::F64)?;
        let reference = Self::evaluate(&wide, DType::F32, &f)?;
        let fused = Self::evaluate(inputs, DType::F32, &f)?;
        compare("fused", &fused, &reference, self.tolerance)?;
        compare("recorded", &Self::evaluate_recorded(inputs, &f)?, &reference, self.tolerance)?;
        if self.differences {
            check_gradients_with(&wide, 1e-4, 1e-5, &f)?;
        }

        for threads in [1, 2] {
            let again = on_threads(threads, || Self::evaluate(inputs, DType::F32, &f))?;
            for (a, b) in again.iter().zip(&fused) {
                let bits = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
                if bits(a)?.iter().map(|v| v.to_bits()).ne(bits(b)?.iter().map(|v| v.to_bits())) {
                    candle_core::bail!("{} {dims:?}: {threads} threads give another result", self.name);
                }
            }
        }

        for (dtype, tolerance) in [(DType::BF16, 1.6e-2), (DType::F16, 2e-3)] {
            let inputs = to(inputs, dtype)?;
            let want = Self::evaluate(&to(&inputs, DType::F64)?, dtype, &f)?;
            let got = Self::evaluate(&inputs, dtype, &f)?;
            for t in &got {
                if t.dtype() != dtype {
                    candle_core::bail!("{} {dims:?}: {:?} came out of {dtype:?}", self.name, t.dtype());
                }
            }
            compare(dtype.as_str(), &got, &want, tolerance * self.half_factor)?;
        }

        let read_whole = if self.reads_all { inputs.len() } else { 0 };
        for i in 0..read_whole {
            let mut poisoned = inputs.to_vec();
            let mut data = poisoned[i].flatten_all()?.to_vec1::<f32>()?;
            if let Some(v) = data.last_mut() {
                *v = f32::NAN;
            }
            poisoned[i] = Tensor::from_vec(data, inputs[i].shape(), inputs[i].device())?;
            let y = f(&poisoned)?.flatten_all()?.to_vec1::<f32>()?;
            if !y.iter().any(|v| v.is_nan()) {
                candle_core::bail!("{} {dims:?}: NaN in input {i} vanished", self.name);
            }
        }
        Ok(())
    }
}

mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cpu::View;
    use crate::diff_op::{DiffOp, apply};
    use crate::tape::Keeps;
    use crate::testing::check_gradients;
    use candle_core::Shape;

    /// x², with the gradient `factor · x` or none at all.
    struct Square(Option<f64>);

    impl DiffOp for Square {
        const NAME: &'static str = "square";
        const KEEPS: Keeps = Keeps::Arguments;
        fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
            Ok((args[0].data.iter().map(|v| v * v).collect(), args[0].shape.clone()))
        }
        fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
            args[0].sqr()
        }
        fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
            let Some(factor) = self.0 else { return Ok(vec![None]) };
            Ok(vec![Some(((&args[0] * factor)? * grad)?)])
        }
    }

    #[test]
    fn a_broken_op_is_caught() {
        let x = [randn(5, (4, 6), 1.0).unwrap()];
        let check = |factor| check_gradients(&x, |a| apply(Square(factor), &[&a[0]]));
        check(Some(2.0)).unwrap();
        let e = check(Some(2.2)).unwrap_err().to_string();
        assert!(e.contains("gradient of input 0"), "{e}");
        let e = check(None).unwrap_err().to_string();
        assert!(e.contains("input 0 got no gradient"), "{e}");
        // One that is right in one form and wrong in the other is caught by the comparison of forms.
        struct Forked;
        impl DiffOp for Forked {
            const NAME: &'static str = "forked";
            const KEEPS: Keeps = Keeps::Nothing;
            fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
                Ok((args[0].data.iter().map(|v| v * 1.001).collect(), args[0].shape.clone()))
            }
            fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
                Ok(args[0].clone())
            }
            fn backward(&self, _: &[Tensor], _: &Tensor, grad: &Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
                Ok(vec![Some(grad.clone())])
            }
        }
        let e = Check::new("forked").run(&x, |a| apply(Forked, &[&a[0]])).unwrap_err().to_string();
        assert!(e.contains("forked fused") && e.contains("value"), "{e}");
    }
}
