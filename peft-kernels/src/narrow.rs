//! Activations held in `bf16` between the passes: half the memory, eight significant bits.

use candle_core::{DType, Device, Result, Storage, Tensor};
use half::bf16;

use crate::cpu::{self, new_rows};
use crate::simd;
use crate::stored::Stored;

/// `t` in `dtype`, untracked. On a CPU from `f32` to `bf16`, rounded to the nearest with ties to even, and back in one
/// parallel pass each.
///
/// # Errors
/// When candle cannot convert.
pub fn convert(t: &Tensor, dtype: DType) -> Result<Tensor> {
    match (t.device(), t.dtype(), dtype) {
        (_, from, to) if from == to => Ok(t.detach()),
        (Device::Cpu, DType::F32, DType::BF16) => narrowed(&t.contiguous()?),
        (Device::Cpu, DType::BF16, DType::F32) if t.is_contiguous() => widened(t),
        _ => Ok(t.to_dtype(dtype)?.detach()),
    }
}

fn narrowed(t: &Tensor) -> Result<Tensor> {
    let narrow = cpu::with(t, |x| {
        Ok(new_rows(x.data.len(), 1, 2, |first, out: &mut [bf16]| {
            simd::run(
                #[inline(always)]
                || {
                    for (to, &from) in out.iter_mut().zip(&x.data[first..]) {
                        *to = nearest(from);
                    }
                },
            );
        }))
    })?;
    Tensor::from_vec(narrow, t.shape(), &Device::Cpu)
}

fn widened(t: &Tensor) -> Result<Tensor> {
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        candle_core::bail!("a CPU kernel got a tensor on {:?}", t.device().location())
    };
    let start = layout.start_offset();
    let x = &storage.as_slice::<bf16>()?[start..start + t.elem_count()];
    let wide = new_rows(x.len(), 1, 2, |first, out: &mut [f32]| {
        simd::run(
            #[inline(always)]
            || Stored::widen_bf16(&x[first..], out),
        );
    });
    cpu::tensor(wide, t.shape().clone())
}

/// The nearest `bf16`, ties to even. NaN stays NaN.
#[inline(always)]
pub(crate) fn nearest(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::randn;

    #[test]
    fn rounding_is_that_of_half() {
        let halfway = |bits: u32| [bits, bits | 0x7fff, bits | 0x8000, bits | 0x8001].map(f32::from_bits);
        let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE, 1e-45];
        let odd = [0x3f80_0000, 0x3f81_0000, 0x7f7f_0000, 0x0001_0000, 0xc3ff_0000].into_iter().flat_map(halfway);
        // More than one block of a parallel loop, and no multiple of any vector.
        let many = randn(1, 40_003, 3.0).unwrap().to_vec1::<f32>().unwrap();
        let values: Vec<f32> = special.into_iter().chain(odd).chain(many).collect();
        let t = Tensor::new(values.as_slice(), &Device::Cpu).unwrap();
        let narrow = convert(&t, DType::BF16).unwrap();
        let wide = convert(&narrow, DType::F32).unwrap().to_vec1::<f32>().unwrap();
        for (&x, got) in values.iter().zip(wide) {
            let want = bf16::from_f32(x).to_f32();
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{x:e}: {got:e}, not {want:e}");
        }
    }

    #[test]
    fn views_and_other_types_convert_as_well() {
        let t = randn(1, (3, 4), 1.0).unwrap();
        let view = t.t().unwrap();
        let back = convert(&convert(&view, DType::BF16).unwrap().t().unwrap(), DType::F32).unwrap();
        let want = t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
        assert_eq!(back.to_vec2::<f32>().unwrap(), want.to_vec2::<f32>().unwrap());
        assert_eq!(convert(&t, DType::F16).unwrap().dtype(), DType::F16);
    }
}
