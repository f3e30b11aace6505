#![allow(clippy::unwrap_used)]
use std::iter;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Tensor};

use super::*;
use crate::cpu::Mat;
use crate::stored::Stored;
use crate::testing::randn;
use crate::weight::FrozenWeight;

fn emulate(a: Panel<'_>, b: &[[Word; COLS]], tile: &mut Tile, times: impl Fn(Word, Word) -> f32) {
    *tile = [[0.0; COLS]; ROWS];
    for (k, b) in b.iter().enumerate() {
        for (r, sums) in tile.iter_mut().enumerate() {
            let a = match a {
                Panel::LaidOut(words) => words[k][r],
                Panel::InPlace(words, stride) => words[r * stride + k],
            };
            for (sum, &b) in sums.iter_mut().zip(b) {
                *sum += times(a, b);
            }
        }
    }
}

/// What the processor does with pairs of `bf16`.
fn pairs(a: Panel<'_>, b: &[[Word; COLS]], tile: &mut Tile) {
    let halves = |pair: Word| [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)];
    emulate(a, b, tile, |a, b| {
        let (a, b) = (halves(a), halves(b));
        a[0] * b[0] + a[1] * b[1]
    });
}

/// What the processor does with single numbers.
fn singles(a: Panel<'_>, b: &[[Word; COLS]], tile: &mut Tile) {
    emulate(a, b, tile, |a, b| f32::from_bits(a) * f32::from_bits(b));
}

/// A random matrix in every kind of storage that its rows fit.
fn storages(out: usize, inp: usize) -> Vec<FrozenWeight> {
    let w = randn(1, (out, inp), 1.0).unwrap();
    let dense = [DType::F32, DType::F16, DType::BF16].map(|d| FrozenWeight::dense(&w.to_dtype(d).unwrap()).unwrap());
    let blocks = [GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q6K];
    let fit = blocks.into_iter().filter(|dtype| inp.is_multiple_of(dtype.block_size()));
    let blocks = fit.map(|dtype| FrozenWeight::gguf(Arc::new(QTensor::quantize(&w, dtype).unwrap())).unwrap());
    dense.into_iter().chain(blocks).collect()
}

/// Holds both products, made anew and added, of every format to the definition in `f64`.
fn check(tokens: usize, width: usize, columns: usize) {
    for contracted in [Contracted::In, Contracted::Out] {
        let (out, inp) = if contracted == Contracted::In { (columns, width) } else { (width, columns) };
        let x = randn(2, (tokens, width), 1.0).unwrap();
        let factor = Factor { out, inp, contracted };
        for weight in storages(out, inp) {
            let dense = weight.to_dense(DType::F64).unwrap();
            let turned = if contracted == Contracted::In { dense.t().unwrap() } else { dense };
            let what = format!("{} [{tokens}, {width}] × [{width}, {columns}], {contracted:?}", weight.dtype_name());
            weight
                .with_stored(|stored| {
                    for kernel in iter::once(singles as Kernel).chain(in_f32::hardware()) {
                        if let Some(format) = InF32::with_kernel(stored, kernel) {
                            hold(&what, &x, &turned, factor, &format);
                        }
                    }
                    if let Stored::Bf16(data) = stored {
                        let x = x.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
                        for kernel in [Some(pairs as Kernel), in_bf16::hardware()].into_iter().flatten() {
                            hold(&what, &x, &turned, factor, &InBf16::with_kernel(data, kernel));
                        }
                    }
                    Ok(())
                })
                .unwrap();
        }
    }
}

/// The elements of a tensor.
fn elements(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn hold(what: &str, x: &Tensor, weight: &Tensor, factor: Factor, format: &dyn Format) {
    let (tokens, width) = x.dims2().unwrap();
    let columns = weight.dim(1).unwrap();
    let want = x.to_dtype(DType::F64).unwrap().matmul(weight).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    hold_with_addends(what, x, &want, factor, format);
    let x = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let x = Tokens::dense(&x, tokens, width);
    let mut added = vec![1f32; tokens * columns];
    add_product(&mut added, x, factor, format).unwrap();
    let new = new_product(x, factor, format, Addend::default()).unwrap();
    let room = 2e-5 * (width as f64).sqrt();
    for (i, want) in want.into_iter().enumerate() {
        for (how, got, want) in [("new", new[i], want), ("added", added[i], want + 1.0)] {
            let error = (f64::from(got) - want).abs();
            assert!(error <= room, "{what}, {how}, row {}, column {}: {got}, not {want}", i / columns, i % columns);
        }
    }
}

/// The product with a bias, with a product of low rank whose factors lie in wider matrices, and with both.
fn hold_with_addends(what: &str, x: &Tensor, product: &[f64], factor: Factor, format: &dyn Format) {
    let ((tokens, width), columns) = (x.dims2().unwrap(), factor.sizes().1);
    let (rank, stride, scale) = (1 + columns % 5, 7, 0.5);
    let (left, right) =
        (elements(&randn(5, (tokens, stride), 1.0).unwrap()), elements(&randn(6, (columns, rank), 1.0).unwrap()));
    let all_bias = elements(&randn(7, columns, 1.0).unwrap());
    let (x, x_low) = (elements(x), Mat::strided(&left, tokens, rank, stride));
    let low = LowRankProduct { x: x_low, w: Mat::new(&right, columns, rank).t(), scale };
    for (low_rank, bias) in [(None, Some(&all_bias[..])), (Some(low), None), (Some(low), Some(&all_bias[..]))] {
        let addend = Addend { low_rank, bias };
        addend.check(tokens, columns).unwrap();
        for kernel in iter::once(singles as Kernel).chain(in_f32::hardware()) {
            let got =
                new_product_with(Tokens::dense(&x, tokens, width), factor, format, Some((addend, kernel))).unwrap();
            let room = 2e-5 * (width as f64).sqrt() + 1e-5;
            for (i, (got, product)) in got.into_iter().zip(product).enumerate() {
                let (row, column) = (i / columns, i % columns);
                let dot = (0..rank)
                    .map(|k| f64::from(left[row * stride + k]) * f64::from(right[column * rank + k]))
                    .sum::<f64>();
                let want = product
                    + low_rank.map_or(0.0, |_| f64::from(scale) * dot)
                    + bias.map_or(0.0, |b| f64::from(b[column]));
                let error = (f64::from(got) - want).abs();
                assert!(error <= room, "{what}, addend, row {row}, column {column}: {got}, not {want}");
            }
        }
    }
}

#[test]
fn an_addend_that_does_not_fit_is_an_error_and_one_of_an_empty_product_is_all() {
    let (data, x, bias) = (vec![1f32; 64], vec![1f32; 64], [1f32, 2.0, 3.0, 4.0]);
    let format = InF32::with_kernel(Stored::F32(&data), singles).unwrap();
    let run = |width, addend| {
        let factor = Factor { out: 4, inp: width, contracted: Contracted::In };
        new_product(Tokens::dense(&x, 2, width), factor, &format, addend)
    };
    let low = |rows, rank, columns| {
        let (x, w) = (Mat::new(&x[..rows * rank], rows, rank), Mat::new(&data[..rank * columns], rank, columns));
        Some(LowRankProduct { x, w, scale: 2.0 })
    };
    assert!(run(8, Addend { low_rank: None, bias: Some(&bias[..3]) }).is_err());
    assert!(run(8, Addend { low_rank: low(3, 2, 4), bias: None }).is_err());
    assert!(run(8, Addend { low_rank: low(2, 2, 5), bias: None }).is_err());
    assert!(run(8, Addend { low_rank: low(2, 2, 4), bias: Some(&bias) }).is_ok());
    let both = Addend { low_rank: low(2, 2, 4), bias: Some(&bias) };
    assert_eq!(run(0, both).unwrap(), [5.0, 6.0, 7.0, 8.0, 5.0, 6.0, 7.0, 8.0]);
}

#[test]
fn products_are_those_of_the_stored_elements() {
    for (tokens, width, columns) in [
        (1, 1, 1),
        (3, 2, 33),
        (14, 32, 32),
        (15, 7, 31),
        (29, 65, 64),
        (17, 2 * WORDS, 40),
        (17, 2 * WORDS + 1, 40),
        // Rows that share a set of the cache.
        (30, WORDS, 50),
        (2, 5000, 3),
        (5, 3, 1057),
        (5, 1280, 288),
        (5, 288, 1280),
        (200, 70, 600),
    ] {
        check(tokens, width, columns);
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]
    #[test]
    fn any_shape(tokens in 1usize..60, width in 1usize..300, columns in 1usize..90) {
        check(tokens, width, columns);
    }
}

#[test]
fn what_does_not_fit_is_an_error_and_nothing_is_zero() {
    let (data, x) = (vec![1f32; 64], vec![1f32; 64]);
    let format = InF32::with_kernel(Stored::F32(&data), singles).unwrap();
    let run = |tokens, width, out, inp| {
        let factor = Factor { out, inp, contracted: Contracted::In };
        new_product(Tokens::dense(&x, tokens, width), factor, &format, Addend::default())
    };
    assert!(run(16, 5, 4, 5).is_err());
    assert!(run(4, 16, 5, 16).is_err());
    assert!(run(4, 16, 4, 8).is_err());
    assert_eq!(run(4, 16, 4, 16).unwrap(), vec![16.0; 16]);
    assert_eq!(run(4, 0, 4, 0).unwrap(), vec![0.0; 16]);
    assert!(run(0, 16, 4, 16).unwrap().is_empty());
    assert!(run(4, 16, 0, 16).unwrap().is_empty());
}
