//! GGUF blocks in `f32`, in loops that become vector instructions.
//!
//! candle's own conversion makes a tensor at each call and is compiled for the oldest processor of the target. The
//! values here are the same bits. Formats: `ggml-common.h` and `ggml-quants.c` of ggml.

use candle_core::quantized::GgmlDType;

/// Elements of a block of the older types.
const SMALL: usize = 32;
/// Elements of a block of the K types.
const LARGE: usize = 256;

/// Calls a function on each block, whose sizes its type gives; true. A macro, since a function passed as a value is called
/// through a piece of code that is not compiled for the wider vectors.
macro_rules! each {
    ($f:ident, $bytes:ident, $out:ident) => {{
        let (blocks, out) = ($bytes.as_chunks().0, $out.as_chunks_mut().0);
        for (block, out) in blocks.iter().zip(out) {
            $f(block, out);
        }
        true
    }};
}

/// Whether [`widen`] knows the type.
pub(crate) fn knows(dtype: GgmlDType) -> bool {
    use GgmlDType as D;
    !matches!(dtype, D::Q8_1 | D::Q2K | D::Q3K | D::Q8K)
}

/// Writes the elements of whole blocks to `out`; `false`, and nothing written, for a type that is not known here or where
/// `out` has another length. To be called inside of [`crate::simd::run`].
#[inline(always)]
pub(crate) fn widen(dtype: GgmlDType, bytes: &[u8], out: &mut [f32]) -> bool {
    use GgmlDType as D;
    if bytes.len() / dtype.type_size() * dtype.block_size() != out.len() {
        return false;
    }
    match dtype {
        D::F32 => each!(f32_bits, bytes, out),
        D::F16 => each!(f16_bits, bytes, out),
        D::BF16 => each!(bf16_bits, bytes, out),
        D::Q4_0 => each!(q4_0, bytes, out),
        D::Q4_1 => each!(q4_1, bytes, out),
        D::Q5_0 => each!(q5_0, bytes, out),
        D::Q5_1 => each!(q5_1, bytes, out),
        D::Q8_0 => each!(q8_0, bytes, out),
        D::Q4K => each!(q4_k, bytes, out),
        D::Q5K => each!(q5_k, bytes, out),
        D::Q6K => each!(q6_k, bytes, out),
        D::Q8_1 | D::Q2K | D::Q3K | D::Q8K => false,
    }
}

#[inline(always)]
fn f32_bits(b: &[u8; 4], y: &mut [f32; 1]) {
    y[0] = f32::from_le_bytes(*b);
}

#[inline(always)]
fn f16_bits(b: &[u8; 2], y: &mut [f32; 1]) {
    y[0] = half(*b);
}

#[inline(always)]
fn bf16_bits(b: &[u8; 2], y: &mut [f32; 1]) {
    y[0] = f32::from_le_bytes([0, 0, b[0], b[1]]);
}

/// The value of a half-precision number, in operations that need no table and no special instruction: the exponent is
/// moved by a multiplication, which is exact for subnormal numbers too.
#[inline(always)]
fn half(bytes: [u8; 2]) -> f32 {
    let h = u32::from(u16::from_le_bytes(bytes));
    let moved = f32::from_bits((h & 0x7fff) << 13) * f32::from_bits((127 + 127 - 15) << 23);
    let infinite = if h & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(moved.to_bits() | infinite | (h & 0x8000) << 16)
}

#[inline(always)]
fn q4_0(b: &[u8; 18], y: &mut [f32; SMALL]) {
    let d = half([b[0], b[1]]);
    for j in 0..16 {
        let q = b[2 + j];
        y[j] = f32::from(i16::from(q & 15) - 8) * d;
        y[j + 16] = f32::from(i16::from(q >> 4) - 8) * d;
    }
}

#[inline(always)]
fn q4_1(b: &[u8; 20], y: &mut [f32; SMALL]) {
    let (d, m) = (half([b[0], b[1]]), half([b[2], b[3]]));
    for j in 0..16 {
        let q = b[4 + j];
        y[j] = f32::from(q & 15) * d + m;
        y[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The fifth bits of a block's elements, each moved to bit 4: of `j` and of `j + 16`.
#[inline(always)]
fn fifth(bits: u32, j: usize) -> (u8, u8) {
    ((((bits >> j) << 4) & 16) as u8, ((bits >> (j + 12)) & 16) as u8)
}

#[inline(always)]
fn q5_0(b: &[u8; 22], y: &mut [f32; SMALL]) {
    let (d, high) = (half([b[0], b[1]]), u32::from_le_bytes([b[2], b[3], b[4], b[5]]));
    for j in 0..16 {
        let (q, (h0, h1)) = (b[6 + j], fifth(high, j));
        y[j] = f32::from(i16::from(q & 15 | h0) - 16) * d;
        y[j + 16] = f32::from(i16::from(q >> 4 | h1) - 16) * d;
    }
}

#[inline(always)]
fn q5_1(b: &[u8; 24], y: &mut [f32; SMALL]) {
    let (d, m) = (half([b[0], b[1]]), half([b[2], b[3]]));
    let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for j in 0..16 {
        let (q, (h0, h1)) = (b[8 + j], fifth(high, j));
        y[j] = f32::from(q & 15 | h0) * d + m;
        y[j + 16] = f32::from(q >> 4 | h1) * d + m;
    }
}

#[inline(always)]
fn q8_0(b: &[u8; 34], y: &mut [f32; SMALL]) {
    let d = half([b[0], b[1]]);
    for j in 0..SMALL {
        y[j] = f32::from(b[2 + j] as i8) * d;
    }
}

/// Scale and minimum, of six bits each, of the `j`-th 32 elements of a Q4_K or Q5_K block.
#[inline(always)]
fn scale_min(packed: &[u8; 12], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        ((packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4))
    };
    (f32::from(scale), f32::from(min))
}

/// The part of a block that starts at `at`.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block.get(at..).and_then(|b| b.first_chunk()).unwrap_or(&[0; N])
}

#[inline(always)]
fn q4_k(b: &[u8; 144], y: &mut [f32; LARGE]) {
    let (d, min) = (half([b[0], b[1]]), half([b[2], b[3]]));
    for (i, y) in y.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let q = part::<32>(b, 16 + 32 * i);
        let ((s1, m1), (s2, m2)) = (scale_min(part(b, 4), 2 * i), scale_min(part(b, 4), 2 * i + 1));
        let (d1, m1, d2, m2) = (d * s1, min * m1, d * s2, min * m2);
        for j in 0..32 {
            y[j] = d1 * f32::from(q[j] & 15) - m1;
            y[j + 32] = d2 * f32::from(q[j] >> 4) - m2;
        }
    }
}

#[inline(always)]
fn q5_k(b: &[u8; 176], y: &mut [f32; LARGE]) {
    let (d, min) = (half([b[0], b[1]]), half([b[2], b[3]]));
    let high = part::<32>(b, 16);
    for (i, y) in y.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let q = part::<32>(b, 48 + 32 * i);
        let ((s1, m1), (s2, m2)) = (scale_min(part(b, 4), 2 * i), scale_min(part(b, 4), 2 * i + 1));
        let (d1, m1, d2, m2) = (d * s1, min * m1, d * s2, min * m2);
        for j in 0..32 {
            let fifth = high[j] >> (2 * i);
            y[j] = d1 * f32::from(q[j] & 15 | (fifth & 1) << 4) - m1;
            y[j + 32] = d2 * f32::from(q[j] >> 4 | (fifth & 2) << 3) - m2;
        }
    }
}

#[inline(always)]
fn q6_k(b: &[u8; 210], y: &mut [f32; LARGE]) {
    let d = half([b[208], b[209]]);
    for (i, y) in y.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let (low, high, scales) = (part::<64>(b, 64 * i), part::<32>(b, 128 + 32 * i), part::<8>(b, 192 + 8 * i));
        let scale = |s: usize| d * f32::from(scales[s] as i8);
        for half in 0..2 {
            let s = [scale(half), scale(half + 2), scale(half + 4), scale(half + 6)];
            for l in 16 * half..16 * half + 16 {
                let h = high[l];
                let value = |q: u8, bits: u8| f32::from(i16::from(q | (bits & 3) << 4) - 32);
                y[l] = s[0] * value(low[l] & 15, h);
                y[l + 32] = s[1] * value(low[l + 32] & 15, h >> 2);
                y[l + 64] = s[2] * value(low[l] >> 4, h >> 4);
                y[l + 96] = s[3] * value(low[l + 32] >> 4, h >> 6);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;
    use candle_core::quantized::QTensor;
    use half::f16;

    use super::*;
    use crate::testing::randn;

    #[test]
    fn halves_are_those_of_the_half_crate() {
        for bits in 0..=u16::MAX {
            let (got, want) = (half(bits.to_le_bytes()), f16::from_bits(bits).to_f32());
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#x}: {got}, not {want}");
        }
    }

    #[test]
    fn blocks_are_the_bits_of_candles_conversion() {
        use GgmlDType as D;
        let w = randn(1, (6, 512), 0.7).unwrap();
        let types = [
            D::F32,
            D::F16,
            D::BF16,
            D::Q4_0,
            D::Q4_1,
            D::Q5_0,
            D::Q5_1,
            D::Q8_0,
            D::Q2K,
            D::Q3K,
            D::Q4K,
            D::Q5K,
            D::Q6K,
        ];
        for dtype in types {
            let q = QTensor::quantize(&w, dtype).unwrap();
            let want = q.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mut got = vec![f32::NAN; want.len()];
            let known = widen(dtype, &q.data().unwrap(), &mut got);
            assert_eq!(known, !matches!(dtype, D::Q2K | D::Q3K), "{dtype:?}");
            assert_eq!(known, knows(dtype), "{dtype:?}");
            if known {
                assert_eq!(got, want, "{dtype:?}");
            }
            assert!(!widen(dtype, &q.data().unwrap(), &mut got[1..]), "{dtype:?}");
        }
    }
}
