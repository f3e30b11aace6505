//! GGUF blocks to `f32`, compiled for the vectors at hand.
//!
//! A frozen base in blocks is widened once for every product with it, so this must cost little beside the product.
//! Layouts and formulas: ggml, `ggml-common.h` and `ggml-quants.c` (`dequantize_row_*`). Values are the same bits as those
//! of candle's `dequantize`, which is compiled for the oldest processors of a family.

use candle_core::quantized::GgmlDType;
use half::f16;

use crate::simd;

/// Elements of a k-quant's super-block.
const SUPER: usize = 256;

/// Widens whole blocks of `dtype` into `out`. `false`, with `out` untouched, for a type that is not known here; the
/// lengths are the caller's to check.
pub(crate) fn widen(dtype: GgmlDType, blocks: &[u8], out: &mut [f32]) -> bool {
    simd::run(
        #[inline(always)]
        || {
            match dtype {
                GgmlDType::Q4_0 => each::<18, 32>(blocks, out, q4_0),
                GgmlDType::Q4_1 => each::<20, 32>(blocks, out, q4_1),
                GgmlDType::Q5_0 => each::<22, 32>(blocks, out, q5_0),
                GgmlDType::Q5_1 => each::<24, 32>(blocks, out, q5_1),
                GgmlDType::Q8_0 => each::<34, 32>(blocks, out, q8_0),
                GgmlDType::Q4K => each::<144, SUPER>(blocks, out, q4_k),
                GgmlDType::Q5K => each::<176, SUPER>(blocks, out, q5_k),
                GgmlDType::Q6K => each::<210, SUPER>(blocks, out, q6_k),
                _ => return false,
            }
            true
        },
    )
}

#[inline(always)]
fn each<const BYTES: usize, const N: usize>(blocks: &[u8], out: &mut [f32], f: impl Fn(&[u8; BYTES], &mut [f32; N])) {
    let (blocks, outs) = (blocks.as_chunks::<BYTES>().0, out.as_chunks_mut::<N>().0);
    for (block, out) in blocks.iter().zip(outs) {
        f(block, out);
    }
}

#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The low halves of 16 bytes, then the high ones.
#[inline(always)]
fn nibbles(bytes: &[u8], out: &mut [f32; 32], f: impl Fn(u8, usize) -> f32) {
    let (low, high) = out.split_at_mut(16);
    for (j, (y, q)) in low.iter_mut().zip(bytes).enumerate() {
        *y = f(q & 15, j);
    }
    for (j, (y, q)) in high.iter_mut().zip(bytes).enumerate() {
        *y = f(q >> 4, j + 16);
    }
}

#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(block, 0);
    nibbles(&block[2..], out, |q, _| f32::from(i16::from(q) - 8) * d);
}

#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    nibbles(&block[4..], out, |q, _| f32::from(q) * d + m);
}

/// The fifth bit of element `j`, as 0 or 16.
#[inline(always)]
fn fifth(high: u32, j: usize) -> u8 {
    ((high >> j & 1) << 4) as u8
}

#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let (d, high) = (half(block, 0), u32::from_le_bytes([block[2], block[3], block[4], block[5]]));
    nibbles(&block[6..], out, |q, j| f32::from(i16::from(q | fifth(high, j)) - 16) * d);
}

#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    nibbles(&block[8..], out, |q, j| f32::from(q | fifth(high, j)) * d + m);
}

#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (y, q) in out.iter_mut().zip(&block[2..]) {
        *y = f32::from(*q as i8) * d;
    }
}

/// Scale and minimum of group `j` of 8, six bits each in 12 bytes.
#[inline(always)]
fn scale_and_min(scales: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        let (low, high) = (scales[j + 4], (scales[j - 4] >> 6, scales[j] >> 6));
        (low & 15 | high.0 << 4, low >> 4 | high.1 << 4)
    };
    (f32::from(scale), f32::from(min))
}

#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; SUPER]) {
    let (d, min) = (half(block, 0), half(block, 2));
    let (scales, quants) = (&block[4..16], &block[16..]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, m) = scale_and_min(scales, group);
        let (scale, m) = (d * scale, min * m);
        let shift = 4 * (group % 2);
        for (y, q) in out.iter_mut().zip(&quants[group / 2 * 32..][..32]) {
            *y = scale * f32::from(q >> shift & 15) - m;
        }
    }
}

#[inline(always)]
fn q5_k(block: &[u8; 176], out: &mut [f32; SUPER]) {
    let (d, min) = (half(block, 0), half(block, 2));
    let (scales, high, quants) = (&block[4..16], &block[16..48], &block[48..]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, m) = scale_and_min(scales, group);
        let (scale, m) = (d * scale, min * m);
        let shift = 4 * (group % 2);
        for ((y, q), h) in out.iter_mut().zip(&quants[group / 2 * 32..][..32]).zip(high) {
            *y = scale * f32::from(q >> shift & 15 | (h >> group & 1) << 4) - m;
        }
    }
}

#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; SUPER]) {
    let d = half(block, 208);
    for (n, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high) = (&block[n * 64..][..64], &block[128 + n * 32..][..32]);
        let scales = &block[192 + n * 8..][..8];
        for (quarter, out) in out.chunks_exact_mut(32).enumerate() {
            let low = &low[quarter % 2 * 32..][..32];
            for (part, out) in out.chunks_exact_mut(16).enumerate() {
                let scale = d * f32::from(scales[quarter * 2 + part] as i8);
                let pairs = low[part * 16..][..16].iter().zip(&high[part * 16..][..16]);
                for (y, (q, h)) in out.iter_mut().zip(pairs) {
                    let q = q >> (quarter / 2 * 4) & 15 | (h >> (quarter * 2) & 3) << 4;
                    *y = scale * f32::from(i16::from(q) - 32);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::randn;
    use candle_core::Device;
    use candle_core::quantized::QTensor;

    #[test]
    fn values_are_candles_bit_for_bit() {
        use GgmlDType::*;
        let x = randn(1, (5, 3 * SUPER), 2.0).unwrap();
        for dtype in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
            let q = QTensor::quantize(&x, dtype).unwrap();
            let want = q.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mut got = vec![f32::NAN; want.len()];
            assert!(widen(dtype, &q.data().unwrap(), &mut got));
            let differs = got.iter().zip(&want).position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(differs, None, "{dtype:?}");
        }
        assert!(!widen(Q2K, &[], &mut []));
    }
}
