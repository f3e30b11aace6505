#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::super::testing::{Fixture, max_diff};
use super::*;
use candle_core::Var;

fn optimizer(case: &serde_json::Value) -> AdamW {
    let get = |k: &str| case[k].as_f64().unwrap();
    AdamW::new(AdamWConfig { beta1: get("beta1"), beta2: get("beta2"), eps: get("eps") }).unwrap()
}

#[test]
fn equals_torch() {
    let f = Fixture::load();
    for case in f.json["adamw"].as_array().unwrap() {
        let (bf16, wd) = (case["dtype"] == "bf16", case["weight_decay"].as_f64().unwrap());
        let dtype = if bf16 { DType::BF16 } else { DType::F32 };
        for fused in [true, false] {
            let mut o = optimizer(case);
            o.fused = fused;
            // A bf16 value may land on the other side of one rounding.
            let tolerance = if bf16 { 8e-3 } else { 3e-7 };
            f.check(case, dtype, wd, tolerance, &mut o);
        }
    }
}

#[test]
fn large_parameters_take_the_parallel_path() {
    let n = (1 << 16) + 4099;
    let host: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.02).collect();
    let g = Tensor::from_slice(&host, (n,), &Device::Cpu).unwrap().sin().unwrap();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let start = Tensor::from_slice(&host, (n,), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let mut results = Vec::new();
        for fused in [true, false] {
            let mut o = AdamW::new(AdamWConfig::default()).unwrap();
            o.fused = fused;
            let mut p = OptParam::new("w", Var::from_tensor(&start).unwrap());
            p.weight_decay = 0.1;
            p.lr_scale = 16.0;
            for _ in 0..3 {
                o.step(std::slice::from_ref(&p), &[Some(g.clone())], 1e-3).unwrap();
            }
            results.push(p.var.as_detached_tensor());
        }
        let tolerance = if dtype == DType::F32 { 1e-6 } else { 8e-3 };
        assert!(max_diff(&results[0], &results[1]) <= tolerance, "{dtype:?}");
        assert!(max_diff(&results[0], &start) > 1e-3);
    }
}

#[test]
fn state_survives_bit_for_bit() {
    let f = Fixture::load();
    let case = &f.json["adamw"][1];
    let params = f.params(DType::F32, 0.1);
    let mut straight = optimizer(case);
    for t in 0..20 {
        straight.step(&params, &f.grads(t), 1e-2).unwrap();
    }
    let broken = f.params(DType::F32, 0.1);
    let mut first = optimizer(case);
    for t in 0..9 {
        first.step(&broken, &f.grads(t), 1e-2).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("optimizer.safetensors");
    let map: HashMap<String, Tensor> = first.state().unwrap().into_iter().collect();
    candle_core::safetensors::save(&map, &path).unwrap();
    let mut second = optimizer(case);
    second.load_state(&candle_core::safetensors::load(&path, &Device::Cpu).unwrap()).unwrap();
    for t in 9..20 {
        second.step(&broken, &f.grads(t), 1e-2).unwrap();
    }
    for (a, b) in params.iter().zip(&broken) {
        assert_eq!(max_diff(&a.var, &b.var), 0.0);
    }
    let (a, b) = (straight.state().unwrap(), second.state().unwrap());
    assert_eq!(a.len(), 12);
    for ((ka, ta), (kb, tb)) in a.iter().zip(&b) {
        assert_eq!(ka, kb);
        assert_eq!(max_diff(ta, tb), 0.0);
    }
}

#[test]
fn hostile_state_is_refused_and_changes_nothing() {
    let f = Fixture::load();
    let params = f.params(DType::F32, 0.0);
    let mut o = AdamW::new(AdamWConfig::default()).unwrap();
    o.step(&params, &f.grads(0), 1e-2).unwrap();
    let good: HashMap<String, Tensor> = o.state().unwrap().into_iter().collect();
    let cpu = &Device::Cpu;
    let with = |key: &str, t: Option<Tensor>| {
        let mut m = good.clone();
        match t {
            Some(t) => m.insert(key.to_owned(), t),
            None => m.remove(key),
        };
        m
    };
    for (bad, says) in [
        (with("p0.step", None), "no step count"),
        (with("p0.exp_avg", None), "is missing"),
        (with("p0.step", Some(Tensor::new(&[-1i64], cpu).unwrap())), "single i64"),
        (with("p0.step", Some(Tensor::new(&[1i64, 2], cpu).unwrap())), "single i64"),
        (with("p0.step", Some(Tensor::new(&[1f32], cpu).unwrap())), "single i64"),
        (with("p0.exp_avg", Some(Tensor::new(&[1f64, 1.0, 1.0], cpu).unwrap())), "not F32"),
        (with("p0.momentum_buffer", Some(Tensor::new(&[1f32], cpu).unwrap())), "not a key"),
        (with("junk", Some(Tensor::new(&[1f32], cpu).unwrap())), "not a key"),
    ] {
        let e = o.load_state(&bad).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
        assert_eq!(o.slots.len(), 4);
    }
    // Shape and name only show against the parameters.
    o.load_state(&with("p0.exp_avg", Some(Tensor::zeros((2,), DType::F32, cpu).unwrap()))).unwrap();
    assert!(o.step(&params, &f.grads(0), 1e-2).unwrap_err().to_string().contains("exp_avg"));
    o.load_state(&good).unwrap();
    let e = o.step(&params[1..], &f.grads(0)[1..], 1e-2).unwrap_err().to_string();
    assert!(e.contains("`p0`"), "{e}");
    o.load_state(&good).unwrap();
    o.step(&params, &f.grads(0), 1e-2).unwrap();
}

#[test]
fn bad_lists_are_refused_before_anything_moves() {
    let f = Fixture::load();
    let params = f.params(DType::F32, 0.0);
    let before: Vec<Tensor> = params.iter().map(|p| p.var.copy().unwrap()).collect();
    let mut o = AdamW::new(AdamWConfig::default()).unwrap();
    assert!(o.step(&params, &f.grads(0)[1..], 1e-2).is_err());
    assert!(o.step(&params, &f.grads(0), f64::NAN).is_err());
    let mut g = f.grads(0);
    g.swap(0, 3);
    assert!(matches!(o.step(&params, &g, 1e-2), Err(OptimError::Shape { .. })));
    let mut twice = f.params(DType::F32, 0.0);
    twice[1].name = "p0".into();
    assert!(matches!(o.step(&twice, &f.grads(0), 1e-2), Err(OptimError::Duplicate(_))));
    let ids = OptParam::new("ids", Var::zeros(2, DType::U32, &Device::Cpu).unwrap());
    assert!(matches!(o.step(&[ids], &[None], 1e-2), Err(OptimError::DType { .. })));
    for (p, b) in params.iter().zip(&before) {
        assert_eq!(max_diff(&p.var, b), 0.0);
    }
    for config in [
        AdamWConfig { beta1: 1.0, ..Default::default() },
        AdamWConfig { beta2: f64::NAN, ..Default::default() },
        AdamWConfig { eps: -1.0, ..Default::default() },
    ] {
        assert!(AdamW::new(config).is_err());
    }
}

#[test]
fn a_detached_view_sees_the_update() {
    let p = OptParam::new("w", Var::ones((2, 2), DType::F32, &Device::Cpu).unwrap());
    let view = p.var.as_detached_tensor();
    let g = Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap();
    let mut o = AdamW::new(AdamWConfig::default()).unwrap();
    // A transposed, bf16 gradient is fine too.
    let g = g.t().unwrap().to_dtype(DType::BF16).unwrap();
    o.step(&[p], &[Some(g)], 0.1).unwrap();
    let v = view.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(v.iter().all(|x| (x - 0.9).abs() < 1e-6), "{v:?}");
}
