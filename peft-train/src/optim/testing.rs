//! The torch fixture that the optimisers' tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use candle_core::{DType, Device, Tensor, Var};
use serde_json::Value;

use super::{OptParam, Optimizer};

pub(super) struct Fixture {
    pub(super) json: Value,
    shapes: Vec<Vec<usize>>,
}

fn floats(v: &Value) -> Vec<f32> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

pub(super) fn max_diff(a: &Tensor, b: &Tensor) -> f64 {
    let get = |t: &Tensor| t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
    get(a).iter().zip(get(b)).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
}

impl Fixture {
    pub(super) fn load() -> Self {
        let json: Value = serde_json::from_str(include_str!("../../tests/fixtures/torch_optim.json")).unwrap();
        let shapes = serde_json::from_value(json["shapes"].clone()).unwrap();
        Self { json, shapes }
    }

    fn tensor(&self, i: usize, v: &Value) -> Tensor {
        Tensor::from_vec(floats(v), self.shapes[i].as_slice(), &Device::Cpu).unwrap()
    }

    pub(super) fn params(&self, dtype: DType, weight_decay: f64) -> Vec<OptParam> {
        (0..self.shapes.len())
            .map(|i| {
                let t = self.tensor(i, &self.json["start"][i]).to_dtype(dtype).unwrap();
                OptParam { weight_decay, ..OptParam::new(format!("p{i}"), Var::from_tensor(&t).unwrap()) }
            })
            .collect()
    }

    pub(super) fn grads(&self, t: usize) -> Vec<Option<Tensor>> {
        let g = &self.json["grads"][t];
        (0..self.shapes.len()).map(|i| (!g[i].is_null()).then(|| self.tensor(i, &g[i]))).collect()
    }

    /// Twenty steps, compared with the fixture at those it recorded.
    pub(super) fn check(&self, case: &Value, dtype: DType, weight_decay: f64, tolerance: f64, o: &mut dyn Optimizer) {
        let params = self.params(dtype, weight_decay);
        let lr = case["lr"].as_f64().unwrap();
        for t in 0..20 {
            let grads: Vec<_> = self.grads(t).into_iter().map(|g| g.map(|g| g.to_dtype(dtype).unwrap())).collect();
            o.step(&params, &grads, lr * (1.0 - t as f64 / 40.0)).unwrap();
            for want in case["want"].as_array().unwrap().iter().filter(|w| w["step"] == t) {
                for (i, p) in params.iter().enumerate() {
                    let d = max_diff(&p.var, &self.tensor(i, &want["params"][i]));
                    assert!(d <= tolerance, "{} step {t} parameter {i}: differs by {d:e} ({case:.80})", o.name());
                }
            }
        }
    }
}
