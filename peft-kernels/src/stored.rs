//! The elements of a weight as they lie in memory, and their values in `f32`.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Result};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::{blocks, cpu, simd};

/// A run of stored elements.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stored<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    /// GGUF blocks of one type.
    Blocks(&'a [u8], GgmlDType),
}

impl Stored<'_> {
    /// How many elements there are.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::Blocks(bytes, dtype) => bytes.len() / dtype.type_size() * dtype.block_size(),
        }
    }

    /// Elements that are stored together.
    pub(crate) fn block(&self) -> usize {
        match self {
            Self::Blocks(_, dtype) => dtype.block_size(),
            _ => 1,
        }
    }

    /// Whether [`Self::widen_inline`] knows the storage.
    pub(crate) fn widens_inline(&self) -> bool {
        match self {
            Self::Blocks(_, dtype) => blocks::knows(*dtype),
            _ => true,
        }
    }

    /// [`Self::widen`] of elements that there are, in a storage that it knows. To be called inside of [`simd::run`].
    #[inline(always)]
    pub(crate) fn widen_inline(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match self {
            Self::F32(x) => out.copy_from_slice(&x[range]),
            Self::F16(x) => x[range].convert_to_f32_slice(out),
            Self::Bf16(x) => Self::widen_bf16(&x[range], out),
            Self::Blocks(bytes, dtype) => {
                blocks::widen(*dtype, Self::bytes(bytes, *dtype, &range), out);
            }
        }
    }

    /// The blocks that hold the elements of `range`.
    #[inline(always)]
    fn bytes<'a>(bytes: &'a [u8], dtype: GgmlDType, range: &Range<usize>) -> &'a [u8] {
        let (size, block) = (dtype.type_size(), dtype.block_size());
        &bytes[range.start / block * size..range.end / block * size]
    }

    /// Where element `i` lies, or its block.
    pub(crate) fn address(&self, i: usize) -> *const u8 {
        match self {
            Self::F32(x) => x.as_ptr().wrapping_add(i).cast(),
            Self::F16(x) => x.as_ptr().wrapping_add(i).cast(),
            Self::Bf16(x) => x.as_ptr().wrapping_add(i).cast(),
            Self::Blocks(bytes, dtype) => bytes.as_ptr().wrapping_add(i / dtype.block_size() * dtype.type_size()),
        }
    }

    /// Writes `bf16` elements, as many as `out` holds, in `f32`. To be called inside of [`simd::run`].
    #[inline(always)]
    pub(crate) fn widen_bf16(x: &[bf16], out: &mut [f32]) {
        for (x, y) in x.iter().zip(out) {
            *y = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    }

    /// Writes the elements from `start` on, as many as `out` holds. Both are whole blocks.
    ///
    /// # Errors
    /// When there are fewer elements than that.
    pub(crate) fn widen(&self, start: usize, out: &mut [f32]) -> Result<()> {
        let range = start..start + out.len();
        if range.end > self.len() {
            candle_core::bail!("a weight has {} elements, fewer than its shape says", self.len());
        }
        if self.widens_inline() {
            simd::run(
                #[inline(always)]
                || self.widen_inline(start, out),
            );
        } else if let Self::Blocks(bytes, dtype) = self {
            let storage = QStorage::from_data(Cow::Borrowed(Self::bytes(bytes, *dtype, &range)), &Device::Cpu, *dtype)?;
            let wide = QTensor::new(storage, out.len())?.dequantize(&Device::Cpu)?;
            cpu::with(&wide, |wide| {
                out.copy_from_slice(wide.data);
                Ok(())
            })?;
        }
        Ok(())
    }
}
