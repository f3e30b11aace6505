#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{RotaryLayout, RotaryPlan, Turn, neutral, rotary};
use crate::testing::{check_gradients, close, randn};

const LAYOUTS: [RotaryLayout; 2] = [RotaryLayout::Half, RotaryLayout::Interleaved];

fn tables(max: usize, half: usize) -> (Tensor, Tensor) {
    let angle = |p: usize, i: usize| p as f64 * 10_000f64.powf(-(i as f64) / half as f64);
    let table = |f: fn(f64) -> f64| {
        let data: Vec<f32> = (0..max * half).map(|n| f(angle(n / half, n % half)) as f32).collect();
        Tensor::from_vec(data, (max, half), &Device::Cpu).unwrap()
    };
    (table(f64::cos), table(f64::sin))
}

fn plan(positions: &[u32], half: usize, head_dim: usize, layout: RotaryLayout) -> Arc<RotaryPlan> {
    let (cos, sin) = tables(64, half);
    RotaryPlan::new(&cos, &sin, positions, head_dim, layout).unwrap()
}

#[test]
fn both_forms_match_the_definition() {
    let positions = [0u32, 1, 2, 63, 0, 7, 7];
    for layout in LAYOUTS {
        for (heads, dim, half) in [(1usize, 2usize, 1usize), (3, 8, 4), (2, 12, 3), (5, 64, 32), (1, 80, 20), (2, 7, 3)]
        {
            let plan = plan(&positions, half, dim, layout);
            let x = randn(5, (positions.len(), heads * dim), 1.0).unwrap();
            let data = x.to_vec2::<f32>().unwrap();
            let mut want = data.clone();
            for (t, p) in positions.iter().enumerate() {
                for h in 0..heads {
                    for i in 0..half {
                        let (a, b) = match layout {
                            RotaryLayout::Half => (h * dim + i, h * dim + i + half),
                            RotaryLayout::Interleaved => (h * dim + 2 * i, h * dim + 2 * i + 1),
                        };
                        let angle = f64::from(*p) * 10_000f64.powf(-(i as f64) / half as f64);
                        let (xa, xb) = (f64::from(data[t][a]), f64::from(data[t][b]));
                        want[t][a] = (xa * angle.cos() - xb * angle.sin()) as f32;
                        want[t][b] = (xb * angle.cos() + xa * angle.sin()) as f32;
                    }
                }
            }
            let want = Tensor::new(want, &Device::Cpu).unwrap();
            close("fused", &rotary(&x, &plan).unwrap(), &want, 1e-5).unwrap();
            close("neutral", &neutral::turn(&x, &plan, Turn::Forward).unwrap(), &want, 1e-5).unwrap();
            let back = neutral::turn(&rotary(&x, &plan).unwrap(), &plan, Turn::Back).unwrap();
            close("there and back", &back, &x, 1e-5).unwrap();
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for layout in LAYOUTS {
        // A table with a scale, as YaRN's: the backward must be the transpose, not the inverse.
        let (cos, sin) = tables(16, 3);
        let (cos, sin) = ((cos * 1.3).unwrap(), (sin * 1.3).unwrap());
        let plan = RotaryPlan::new(&cos, &sin, &[3, 9, 15, 0], 8, layout).unwrap();
        let x = randn(6, (4, 24), 1.0).unwrap();
        check_gradients(std::slice::from_ref(&x), |a| rotary(&a[0], &plan)).unwrap();
        let low = x.to_dtype(DType::BF16).unwrap();
        let got = rotary(&low, &plan).unwrap();
        assert_eq!(got.dtype(), DType::BF16);
        close("bf16", &got.to_dtype(DType::F32).unwrap(), &rotary(&x, &plan).unwrap(), 2e-2).unwrap();
    }
}

#[test]
fn rows_in_parallel_are_the_same() {
    let positions: Vec<u32> = (0..500).map(|i| i % 64).collect();
    let plan = plan(&positions, 32, 64, RotaryLayout::Half);
    let x = randn(7, (500, 9 * 64), 1.0).unwrap();
    let want = neutral::turn(&x, &plan, Turn::Forward).unwrap();
    close("500 rows", &rotary(&x, &plan).unwrap(), &want, 1e-6).unwrap();
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (cos, sin) = tables(16, 4);
    let new = |positions: &[u32], dim: usize| RotaryPlan::new(&cos, &sin, positions, dim, RotaryLayout::Half);
    assert!(new(&[0, 16], 8).unwrap_err().to_string().contains("position 16"));
    assert!(new(&[u32::MAX], 8).is_err());
    assert!(new(&[0], 7).unwrap_err().to_string().contains("head of 7"));
    assert!(RotaryPlan::new(&cos, &cos.t().unwrap(), &[0], 8, RotaryLayout::Half).is_err());
    let plan = new(&[0, 1], 8).unwrap();
    for shape in [(2, 12), (3, 8)] {
        assert!(rotary(&randn(1, shape, 1.0).unwrap(), &plan).is_err());
    }
    assert!(rotary(&randn(1, (1, 2, 8), 1.0).unwrap(), &plan).is_err());
    assert!(new(&[], 8).is_ok());
}
