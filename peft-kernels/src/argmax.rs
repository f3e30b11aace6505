//! The largest element of each row: what greedy decoding takes from the logits.

use candle_core::{DType, Device, Result, Tensor};

use crate::{cpu, simd};

/// For each row of `x: [rows, width]` the index of its largest element, the first of several; `None` for a row that is
/// empty or has a NaN.
///
/// # Errors
/// When `x` is not a matrix of floats.
pub fn argmax_rows(x: &Tensor) -> Result<Vec<Option<u32>>> {
    let (rows, width) = x.dims2()?;
    if width == 0 {
        return Ok(vec![None; rows]);
    }
    let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
    cpu::with(&x, |x| Ok(x.data.chunks_exact(width).map(argmax).collect()))
}

fn argmax(row: &[f32]) -> Option<u32> {
    let (largest, all_numbers) = simd::run(
        #[inline(always)]
        || (simd::max(row), simd::sum1(row, |x| if x.is_nan() { 1.0 } else { 0.0 }) == 0.0),
    );
    if !all_numbers {
        return None;
    }
    row.iter().position(|x| *x == largest).map(|i| i as u32)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_first_of_the_largest() {
        let row = |n: usize, large: &[usize]| {
            let mut row: Vec<f32> = (0..n).map(|i| -((i * 7 % 5) as f32) - 1.0).collect();
            large.iter().for_each(|&i| row[i] = 3.0);
            row
        };
        for n in [1, 5, 32, 100, 1000] {
            for at in [0, n / 2, n - 1] {
                let mut x = row(n, &[at, n - 1]);
                x.extend(row(n, &[at]));
                let mut broken = row(n, &[at]);
                broken[n / 3] = f32::NAN;
                x.extend(broken);
                let x = Tensor::from_vec(x, (3, n), &Device::Cpu).unwrap();
                assert_eq!(argmax_rows(&x).unwrap(), [Some(at as u32), Some(at as u32), None], "{n} elements");
            }
        }
        let infinite = Tensor::new(&[[f32::NEG_INFINITY; 3]], &Device::Cpu).unwrap();
        assert_eq!(argmax_rows(&infinite).unwrap(), [Some(0)]);
        assert_eq!(argmax_rows(&Tensor::zeros((2, 0), DType::F32, &Device::Cpu).unwrap()).unwrap(), [None, None]);
    }
}
