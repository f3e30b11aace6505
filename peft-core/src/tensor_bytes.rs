//! Tensors from and to little-endian bytes, in chunks: no second full copy, on all cores.

use std::io;
use std::ops::Range;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

use crate::error::{Error, Result};

/// Elements that one task converts at a time.
const CHUNK: usize = 1 << 20;

/// `bytes` as `T`s; `done` is told the byte ranges that are no longer needed.
fn decode<const N: usize, T: Copy + Default + Send>(
    bytes: &[u8],
    convert: impl Fn([u8; N]) -> T + Sync,
    done: &(impl Fn(Range<usize>) + Sync),
) -> Vec<T> {
    let mut out = vec![T::default(); bytes.len() / N];
    out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * N)).enumerate().for_each(|(index, (out, bytes))| {
        for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
            *out = convert(*bytes);
        }
        let start = index * CHUNK * N;
        done(start..start + bytes.len());
    });
    out
}

/// candle's type for a type on disk, if it has one.
pub(crate) fn candle_dtype(dtype: Dtype) -> Option<DType> {
    DType::try_from(dtype).ok()
}

/// A tensor from `bytes` of type `from`, converted to `to`. `shape` must fit the bytes (the header check saw to it).
pub(crate) fn read_tensor(
    bytes: &[u8],
    shape: &[usize],
    from: Dtype,
    to: DType,
    device: &Device,
    done: impl Fn(Range<usize>) + Sync,
) -> Result<Tensor> {
    macro_rules! floats {
        ($read:expr, $size:literal) => {{
            let read = $read;
            match to {
                DType::F32 => Some(tensor(decode::<$size, f32>(bytes, read, &done), shape)?),
                DType::BF16 => Some(tensor(decode::<$size, bf16>(bytes, |b| bf16::from_f32(read(b)), &done), shape)?),
                DType::F16 => Some(tensor(decode::<$size, f16>(bytes, |b| f16::from_f32(read(b)), &done), shape)?),
                DType::F64 => Some(tensor(decode::<$size, f64>(bytes, |b| f64::from(read(b)), &done), shape)?),
                _ => None,
            }
        }};
    }
    let same = candle_dtype(from).ok_or_else(|| {
        Error::msg(format!("has the type {from:?}, which cannot be used; convert the file to F32, BF16 or F16"))
    })?;
    let cpu = match (from, to) {
        _ if !from.bitsize().is_multiple_of(8) => None,
        (Dtype::BF16, DType::BF16) => Some(tensor(decode::<2, _>(bytes, bf16::from_le_bytes, &done), shape)?),
        (Dtype::F16, DType::F16) => Some(tensor(decode::<2, _>(bytes, f16::from_le_bytes, &done), shape)?),
        (Dtype::F64, DType::F64) => Some(tensor(decode::<8, _>(bytes, f64::from_le_bytes, &done), shape)?),
        (Dtype::F32, _) => floats!(f32::from_le_bytes, 4),
        (Dtype::BF16, _) => floats!(|b| bf16::from_le_bytes(b).to_f32(), 2),
        (Dtype::F16, _) => floats!(|b| f16::from_le_bytes(b).to_f32(), 2),
        (Dtype::F64, _) => floats!(|b| f64::from_le_bytes(b) as f32, 8),
        (Dtype::I64, DType::I64) => Some(tensor(decode::<8, _>(bytes, i64::from_le_bytes, &done), shape)?),
        (Dtype::U32, DType::U32) => Some(tensor(decode::<4, _>(bytes, u32::from_le_bytes, &done), shape)?),
        (Dtype::U8, DType::U8) => Some(tensor(decode::<1, _>(bytes, |[b]: [u8; 1]| b, &done), shape)?),
        _ => None,
    };
    let cpu = match cpu {
        Some(tensor) => tensor,
        // Rare types are small in practice: candle's own, unchunked conversion.
        None => {
            let raw = Tensor::from_raw_buffer(bytes, same, shape, &Device::Cpu)?;
            done(0..bytes.len());
            if same == to { raw } else { raw.to_dtype(to)? }
        }
    };
    Ok(cpu.to_device(device)?)
}

fn tensor<T: WithDType>(values: Vec<T>, shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// The tensor's elements as little-endian bytes, piece by piece in order. Copies to the CPU if it lies elsewhere.
pub(crate) fn write_tensor(tensor: &Tensor, mut sink: impl FnMut(&[u8]) -> io::Result<()>) -> Result<io::Result<()>> {
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Err(Error::msg("tensor could not be brought to the CPU")) };
    let Some((start, end)) = layout.contiguous_offsets() else { return Err(Error::msg("tensor is not contiguous")) };
    macro_rules! encode {
        ($values:expr) => {{
            let mut buffer = Vec::with_capacity(CHUNK);
            let mut result = Ok(());
            for chunk in $values.get(start..end).unwrap_or_default().chunks(CHUNK / 8) {
                buffer.clear();
                buffer.extend(chunk.iter().flat_map(|value| value.to_le_bytes()));
                result = sink(&buffer);
                if result.is_err() {
                    break;
                }
            }
            result
        }};
    }
    Ok(match storage {
        CpuStorage::F32(values) => encode!(values),
        CpuStorage::BF16(values) => encode!(values),
        CpuStorage::F16(values) => encode!(values),
        CpuStorage::F64(values) => encode!(values),
        CpuStorage::I64(values) => encode!(values),
        CpuStorage::I32(values) => encode!(values),
        CpuStorage::I16(values) => encode!(values),
        CpuStorage::U32(values) => encode!(values),
        CpuStorage::U8(values) => sink(values.get(start..end).unwrap_or_default()),
        _ => return Err(Error::msg(format!("tensors of type {:?} cannot be written", tensor.dtype()))),
    })
}

/// Refuses NaN and infinity in a floating-point tensor; integers always pass.
///
/// # Errors
/// [`Error::NotFinite`] with `name`, the number of such values, and the first of them.
pub fn check_finite(name: &str, tensor: &Tensor) -> Result<()> {
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else { return Ok(()) };
    macro_rules! check {
        ($values:expr) => {{
            let values = $values.get(start..end).unwrap_or_default();
            let count: usize = values
                .par_chunks(CHUNK)
                .map(|chunk| chunk.iter().map(|value| usize::from(!value.is_finite())).sum::<usize>())
                .sum();
            match values.iter().enumerate().find(|(_, value)| !value.is_finite()).filter(|_| count > 0) {
                None => Ok(()),
                Some((index, value)) => Err(Error::NotFinite {
                    name: name.to_owned(),
                    count,
                    elements: values.len(),
                    value: f64::from(*value),
                    index,
                }),
            }
        }};
    }
    match storage {
        CpuStorage::F32(values) => check!(values),
        CpuStorage::F64(values) => check!(values),
        CpuStorage::BF16(values) => check!(values),
        CpuStorage::F16(values) => check!(values),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn bytes_of(tensor: &Tensor) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_tensor(tensor, |chunk| {
            bytes.extend(chunk);
            Ok(())
        })
        .unwrap()
        .unwrap();
        bytes
    }

    #[test]
    fn every_conversion_agrees_with_candle() {
        let values: Vec<f32> = (0..60).map(|i| (i as f32 - 30.0) * 1.37e-3 * 7f32.powi(i % 9)).collect();
        let source = Tensor::from_vec(values, (3, 20), &Device::Cpu).unwrap();
        let floats = [DType::F32, DType::BF16, DType::F16, DType::F64];
        for from in floats {
            let source = source.to_dtype(from).unwrap();
            let bytes = bytes_of(&source);
            for to in floats {
                let ours = read_tensor(&bytes, &[3, 20], from.into(), to, &Device::Cpu, |_| ()).unwrap();
                let theirs = source.to_dtype(to).unwrap();
                assert_eq!(ours.dtype(), to);
                assert_eq!(bytes_of(&ours), bytes_of(&theirs), "{from:?} to {to:?}");
            }
        }
        for dtype in [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64] {
            let source =
                Tensor::from_vec((0..12u32).collect::<Vec<_>>(), 12, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let back = read_tensor(&bytes_of(&source), &[12], dtype.into(), dtype, &Device::Cpu, |_| ()).unwrap();
            assert_eq!(bytes_of(&back), bytes_of(&source));
            let float = read_tensor(&bytes_of(&source), &[12], dtype.into(), DType::F32, &Device::Cpu, |_| ()).unwrap();
            assert_eq!(float.to_vec1::<f32>().unwrap()[11], 11.0);
        }
        let error = read_tensor(&[0; 2], &[2], Dtype::BOOL, DType::F32, &Device::Cpu, |_| ()).unwrap_err().to_string();
        assert!(error.contains("BOOL"), "{error}");
    }

    #[test]
    fn chunks_cover_everything_once() {
        let n = CHUNK * 2 + 17;
        let values: Vec<f32> = (0..n).map(|i| i as f32).collect();
        let source = Tensor::from_vec(values, n, &Device::Cpu).unwrap();
        let bytes = bytes_of(&source);
        let seen = std::sync::Mutex::new(Vec::new());
        let done = |range: Range<usize>| seen.lock().unwrap().push((range.start, range.end));
        let back = read_tensor(&bytes, &[n], Dtype::F32, DType::F32, &Device::Cpu, done).unwrap();
        assert_eq!(bytes_of(&back), bytes);
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert_eq!(seen, [(0, CHUNK * 4), (CHUNK * 4, CHUNK * 8), (CHUNK * 8, n * 4)]);
    }

    #[test]
    fn views_are_written_in_logical_order() {
        let tensor = Tensor::from_vec(vec![1u8, 2, 3, 4, 5, 6], (2, 3), &Device::Cpu).unwrap();
        assert_eq!(bytes_of(&tensor.t().unwrap()), [1, 4, 2, 5, 3, 6]);
        assert_eq!(bytes_of(&tensor.narrow(0, 1, 1).unwrap()), [4, 5, 6]);
        assert!(bytes_of(&Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap()).is_empty());
    }

    #[test]
    fn nan_and_infinity_are_found() {
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let mut values = vec![1f32; 40];
            let fine = Tensor::from_vec(values.clone(), (4, 10), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            check_finite("a.lora_A.weight", &fine).unwrap();
            values[13] = f32::NEG_INFINITY;
            values[20] = f32::NAN;
            let bad = Tensor::from_vec(values, (4, 10), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let error = check_finite("a.lora_A.weight", &bad).unwrap_err().to_string();
            assert_eq!(error, "a.lora_A.weight: 2 of 40 values are not finite (first: -inf at index 13)");
            check_finite("row", &bad.narrow(0, 3, 1).unwrap()).unwrap();
        }
        check_finite("ids", &Tensor::zeros(3, DType::U32, &Device::Cpu).unwrap()).unwrap();
    }
}
