#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::super::testing::{Fixture, max_diff};
use super::*;

fn optimizer(case: &serde_json::Value) -> Sgd {
    let get = |k: &str| case[k].as_f64().unwrap();
    let nesterov = case["nesterov"].as_bool().unwrap();
    Sgd::new(SgdConfig { momentum: get("momentum"), dampening: get("dampening"), nesterov }).unwrap()
}

#[test]
fn equals_torch() {
    let f = Fixture::load();
    for case in f.json["sgd"].as_array().unwrap() {
        for fused in [true, false] {
            let mut o = optimizer(case);
            o.fused = fused;
            f.check(case, DType::F32, case["weight_decay"].as_f64().unwrap(), 3e-7, &mut o);
        }
    }
}

#[test]
fn state_survives_bit_for_bit() {
    let f = Fixture::load();
    let case = &f.json["sgd"][2];
    let (params, broken) = (f.params(DType::BF16, 0.1), f.params(DType::BF16, 0.1));
    let (mut straight, mut first, mut second) = (optimizer(case), optimizer(case), optimizer(case));
    for t in 0..20 {
        straight.step(&params, &f.grads(t), 1e-2).unwrap();
    }
    for t in 0..9 {
        first.step(&broken, &f.grads(t), 1e-2).unwrap();
    }
    second.load_state(&first.state().unwrap().into_iter().collect()).unwrap();
    for t in 9..20 {
        second.step(&broken, &f.grads(t), 1e-2).unwrap();
    }
    for (a, b) in params.iter().zip(&broken) {
        assert_eq!(max_diff(&a.var, &b.var), 0.0);
    }
}

#[test]
fn bad_settings_and_state() {
    assert!(Sgd::new(SgdConfig { momentum: -0.1, ..Default::default() }).is_err());
    assert!(Sgd::new(SgdConfig { nesterov: true, ..Default::default() }).is_err());
    assert!(Sgd::new(SgdConfig { nesterov: true, momentum: 0.9, dampening: 0.1 }).is_err());
    let t = Tensor::zeros(3, DType::F32, &candle_core::Device::Cpu).unwrap();
    let state = HashMap::from([("p0.momentum_buffer".to_owned(), t)]);
    assert!(Sgd::new(SgdConfig::default()).unwrap().load_state(&state).is_err());
    let mut o = Sgd::new(SgdConfig { momentum: 0.9, ..Default::default() }).unwrap();
    o.load_state(&state).unwrap();
    let f = Fixture::load();
    o.step(&f.params(DType::F32, 0.0), &f.grads(0), 0.1).unwrap();
    let adam = HashMap::from([("p0.exp_avg".to_owned(), Tensor::new(&[0f32], &candle_core::Device::Cpu).unwrap())]);
    assert!(o.load_state(&adam).is_err());
}
