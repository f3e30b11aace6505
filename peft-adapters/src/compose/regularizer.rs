//! What holds the values of a fusion near the identity: `0.01 · ‖V − I‖²` a place (`get_fusion_regularization_loss` in
//! `adapters/model_mixin.py`, 1.3).

use candle_core::{DType, Tensor};
use peft_core::{Parameter, Result, TrainingHook};

const FACTOR: f64 = 0.01;

/// The values `[hidden, hidden]` of all places.
#[derive(Debug)]
pub(super) struct Regularizer(pub(super) Vec<Parameter>);

impl TrainingHook for Regularizer {
    fn penalty(&self) -> Result<(f64, Vec<(String, Tensor)>)> {
        let mut sum = 0.0;
        let mut gradients = Vec::with_capacity(self.0.len());
        for value in &self.0 {
            let weight = value.value();
            let away = (&weight - Tensor::eye(weight.dim(0)?, weight.dtype(), weight.device())?)?;
            sum += FACTOR * f64::from(away.sqr()?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?);
            gradients.push((value.name().to_owned(), (away * (2.0 * FACTOR))?));
        }
        Ok((sum, gradients))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;
    use peft_core::Role;

    use super::*;

    #[test]
    fn values_are_drawn_to_the_identity() {
        let weight = Tensor::new(&[[1.5f32, 2.0], [0.0, 1.0]], &Device::Cpu).unwrap();
        let hook = Regularizer(vec![Parameter::new("v", &weight, Role::Plain).unwrap()]);
        let (penalty, gradients) = hook.penalty().unwrap();
        assert!((penalty - 0.01 * 4.25).abs() < 1e-6, "{penalty}");
        assert_eq!(gradients[0].0, "v");
        let got = gradients[0].1.to_vec2::<f32>().unwrap();
        assert!((got[0][0] - 0.01).abs() < 1e-6 && (got[0][1] - 0.04).abs() < 1e-6 && got[1] == [0.0, 0.0], "{got:?}");
    }
}
