//! Activation functions, alone and as the gate of a gated MLP (SwiGLU, GeGLU: Shazeer, "GLU Variants Improve
//! Transformer", 2020).

mod cpu;
mod neutral;

use std::fmt;
use std::str::FromStr;

use candle_core::{Result, Shape, Tensor};

use crate::cpu::{View, tensor, with};
use crate::diff_op::{DiffOp, apply, is_cpu_f32};
use crate::reduce::wide;
use crate::tape::Keeps;

/// An elementwise activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x·σ(x)`, also called swish.
    Silu,
    /// `x·Φ(x)` with the exact normal distribution (Hendrycks & Gimpel, 2016).
    Gelu,
    /// GELU by its tanh approximation, as GPT-2 and Gemma use it.
    GeluTanh,
    /// `x·σ(1.702·x)`, as CLIP uses it.
    QuickGelu,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²`.
    ReluSquared,
    /// `1 / (1 + e⁻ˣ)`.
    Sigmoid,
    /// The hyperbolic tangent.
    Tanh,
}

/// Names in the `hidden_act` of transformers' configs, and what they mean there (`transformers/activations.py`).
const NAMES: [(&str, Activation); 14] = [
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("gelu_python", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu_accurate", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_python_tanh", Activation::GeluTanh),
    ("quick_gelu", Activation::QuickGelu),
    ("relu", Activation::Relu),
    ("relu2", Activation::ReluSquared),
    ("sigmoid", Activation::Sigmoid),
    ("tanh", Activation::Tanh),
];

/// An activation name that is none of transformers' or not implemented here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownActivation(String);

impl fmt::Display for UnknownActivation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown activation `{}`; known are ", self.0)?;
        for (i, (name, _)) in NAMES.iter().enumerate() {
            write!(f, "{}`{name}`", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl std::error::Error for UnknownActivation {}

impl FromStr for Activation {
    type Err = UnknownActivation;

    /// Reads the `hidden_act` of a Hugging Face config.
    fn from_str(name: &str) -> std::result::Result<Self, UnknownActivation> {
        match NAMES.iter().find(|(known, _)| *known == name) {
            Some((_, act)) => Ok(*act),
            None => Err(UnknownActivation(name.to_string())),
        }
    }
}

/// `act(x)`, element by element. Calculated in `f32` whatever the type of `x`.
///
/// # Errors
/// When the device fails.
pub fn activation(x: &Tensor, act: Activation) -> Result<Tensor> {
    apply(Pointwise(act), &[x])
}

/// `act(gate) ⊙ up` as one node that keeps only its arguments: SwiGLU with [`Activation::Silu`], GeGLU with GELU.
///
/// # Errors
/// When `gate` and `up` differ in shape or type.
pub fn gated_activation(gate: &Tensor, up: &Tensor, act: Activation) -> Result<Tensor> {
    if gate.shape() != up.shape() || gate.dtype() != up.dtype() {
        candle_core::bail!(
            "gated_activation: gate is {:?} {:?} but up is {:?} {:?}",
            gate.dtype(),
            gate.dims(),
            up.dtype(),
            up.dims()
        );
    }
    apply(Gated(act), &[gate, up])
}

struct Pointwise(Activation);

impl DiffOp for Pointwise {
    const NAME: &'static str = "activation";
    const KEEPS: Keeps = Keeps::Arguments;
    const CHEAP: bool = true;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        Ok((cpu::forward(self.0, args[0].data), args[0].shape.clone()))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        neutral::value(self.0, &wide(&args[0])?)?.to_dtype(args[0].dtype())
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, args: &[crate::cuda::View<'_>]) -> Result<Option<crate::cuda::Made>> {
        crate::cuda::pointwise::activation(self.0, args)
    }

    #[cfg(feature = "cuda")]
    fn cuda_backward(
        &self,
        args: &[Tensor],
        _: &Tensor,
        grad: &Tensor,
        needs: &[bool],
    ) -> Result<Option<Vec<Option<Tensor>>>> {
        match (args, needs) {
            ([x], [true]) => crate::cuda::pointwise::activation_backward(self.0, x, grad),
            _ => Ok(None),
        }
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let x = &args[0];
        if !needs[0] {
            return Ok(vec![None]);
        }
        if is_cpu_f32(x) && is_cpu_f32(grad) {
            let dx = with(x, |x| with(grad, |dy| Ok(cpu::backward(self.0, x.data, dy.data))))?;
            return Ok(vec![Some(tensor(dx, x.shape())?)]);
        }
        let dx = (neutral::slope(self.0, &wide(x)?)? * wide(grad)?)?;
        Ok(vec![Some(dx.to_dtype(x.dtype())?)])
    }
}

struct Gated(Activation);

impl DiffOp for Gated {
    const NAME: &'static str = "gated_activation";
    const KEEPS: Keeps = Keeps::Arguments;
    const CHEAP: bool = true;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        Ok((cpu::gated_forward(self.0, args[0].data, args[1].data), args[0].shape.clone()))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        (neutral::value(self.0, &wide(&args[0])?)? * wide(&args[1])?)?.to_dtype(args[0].dtype())
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, args: &[crate::cuda::View<'_>]) -> Result<Option<crate::cuda::Made>> {
        crate::cuda::pointwise::gated(self.0, args)
    }

    #[cfg(feature = "cuda")]
    fn cuda_backward(
        &self,
        args: &[Tensor],
        _: &Tensor,
        grad: &Tensor,
        needs: &[bool],
    ) -> Result<Option<Vec<Option<Tensor>>>> {
        let [gate, up] = args else { return Ok(None) };
        crate::cuda::pointwise::gated_backward(self.0, [gate, up, grad], needs)
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let (gate, up) = (&args[0], &args[1]);
        if is_cpu_f32(gate) && is_cpu_f32(up) && is_cpu_f32(grad) {
            let (dg, du) = with(gate, |g| {
                with(up, |u| with(grad, |dy| Ok(cpu::gated_backward(self.0, g.data, u.data, dy.data))))
            })?;
            let give = |wanted: bool, d: Vec<f32>| wanted.then(|| tensor(d, gate.shape())).transpose();
            return Ok(vec![give(needs[0], dg)?, give(needs[1], du)?]);
        }
        let (g, dy) = (wide(gate)?, wide(grad)?);
        let dg = if needs[0] {
            let d = ((neutral::slope(self.0, &g)? * &dy)? * wide(up)?)?;
            Some(d.to_dtype(gate.dtype())?)
        } else {
            None
        };
        let du = if needs[1] { Some((neutral::value(self.0, &g)? * dy)?.to_dtype(up.dtype())?) } else { None };
        Ok(vec![dg, du])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::test_support::{Check, SHAPES};
    use crate::testing::{close, randn};
    use candle_core::{DType, Device};

    const ALL: [Activation; 8] = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::QuickGelu,
        Activation::Relu,
        Activation::ReluSquared,
        Activation::Sigmoid,
        Activation::Tanh,
    ];

    fn check(name: &'static str, act: Activation) -> Check {
        if matches!(act, Activation::Relu | Activation::ReluSquared) {
            Check::new(name).kinked()
        } else {
            Check::new(name)
        }
    }

    #[test]
    fn forms_agree_forward_and_backward() {
        for (i, shape) in SHAPES.into_iter().enumerate() {
            for act in ALL {
                let (x, y) = (randn(i as u64, shape, 2.0).unwrap(), randn(40 + i as u64, shape, 1.0).unwrap());
                check("activation", act).run(std::slice::from_ref(&x), |a| activation(&a[0], act)).unwrap();
                check("gated", act).run(&[x, y], |a| gated_activation(&a[0], &a[1], act)).unwrap();
            }
        }
    }

    /// Values of transformers' `ACT2FN` in double precision at -2.5, -0.3, 0, 0.7, 4.
    #[test]
    fn known_values() {
        let x = Tensor::new(&[-2.5f64, -0.3, 0.0, 0.7, 4.0], &Device::Cpu).unwrap();
        for (act, want) in [
            (Activation::Silu, [-0.18964545005, -0.12766724496, 0.0, 0.46773144052, 3.92805516015]),
            (Activation::Gelu, [-0.01552416331, -0.11462657334, 0.0, 0.53062544344, 3.99987331503]),
            (Activation::GeluTanh, [-0.01508426609, -0.11462907646, 0.0, 0.53057013471, 3.99992975405]),
            (Activation::QuickGelu, [-0.03498616505, -0.11251586462, 0.0, 0.53689395172, 3.99558527586]),
            (Activation::Relu, [0.0, 0.0, 0.0, 0.7, 4.0]),
            (Activation::ReluSquared, [0.0, 0.0, 0.0, 0.49, 16.0]),
            (Activation::Sigmoid, [0.07585818002, 0.42555748319, 0.5, 0.66818777217, 0.98201379004]),
            (Activation::Tanh, [-0.98661429815, -0.29131261245, 0.0, 0.60436777712, 0.99932929974]),
        ] {
            let want = Tensor::new(&want, &Device::Cpu).unwrap();
            close(&format!("{act:?}"), &activation(&x, act).unwrap(), &want, 1e-9).unwrap();
            let fused = activation(&x.to_dtype(DType::F32).unwrap(), act).unwrap();
            close(&format!("{act:?} fused"), &fused, &want, 3e-7).unwrap();
        }
    }

    #[test]
    fn large_inputs_stay_finite() {
        let x = Tensor::new(&[-1e4f32, -100.0, 100.0, 1e4], &Device::Cpu).unwrap();
        for act in ALL {
            let var = candle_core::Var::from_tensor(&x).unwrap();
            let y = activation(var.as_tensor(), act).unwrap();
            let grads = y.sum_all().unwrap().backward().unwrap();
            let g = grads.get(var.as_tensor()).unwrap();
            for v in [y.to_vec1::<f32>().unwrap(), g.to_vec1::<f32>().unwrap()].concat() {
                assert!(v.is_finite(), "{act:?}: {v}");
            }
        }
    }

    #[test]
    fn names() {
        assert_eq!("silu".parse(), Ok(Activation::Silu));
        assert_eq!("gelu".parse(), Ok(Activation::Gelu));
        assert_eq!("gelu_pytorch_tanh".parse(), Ok(Activation::GeluTanh));
        let e = "geglu".parse::<Activation>().unwrap_err().to_string();
        assert!(e.contains("`geglu`") && e.contains("`gelu_new`"), "{e}");
    }

    #[test]
    fn gate_and_up_must_match() {
        let (a, b) = (randn(1, (2, 3), 1.0).unwrap(), randn(1, (3, 2), 1.0).unwrap());
        assert!(gated_activation(&a, &b, Activation::Silu).unwrap_err().to_string().contains("[2, 3]"));
    }
}
