//! GGUF files: llama.cpp's container of weights, configuration and tokenizer.
//!
//! The header is read by our own bounded reader (`read.rs`) because the file is untrusted; tensor data is memory-mapped
//! and handed to candle as the blocks it holds. Names, and the row order of `q_proj` and `k_proj`, are translated to
//! those of Hugging Face on the way in and back on the way out ([`write`]).
//!
//! Format: `docs/gguf.md` in ggml-org/ggml. Conventions: `convert_hf_to_gguf.py` in ggml-org/llama.cpp.

use std::{
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QStorage, QTensor},
};
use memmap2::Mmap;
use peft_core::mapping;
use peft_core::suggest::did_you_mean;

mod adapter;
mod names;
mod read;
mod types;
mod value;
mod write;

pub use adapter::write_gguf_adapter;
pub use names::{gguf_name, hf_name};
pub use types::{block_type, type_name};
pub use value::{Array, Value};
pub use write::{GgufTensorSpec, GgufType, GgufWriteOptions, write_gguf};

use crate::config::FAMILIES;

/// Why a GGUF file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file cannot be written.
    #[error(transparent)]
    Write(#[from] peft_core::Error),
    /// The file cannot be opened or mapped.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file is not GGUF, is cut short, or its header contradicts itself.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and what.
        reason: String,
    },
    /// A metadata key is absent or of another type than it should be.
    #[error("{}: metadata `{key}`: {reason}", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The metadata key.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// A tensor is absent, or is stored in a way that is not supported.
    #[error("{}: tensor `{name}`: {reason}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The model or its tokenizer cannot be expressed in GGUF.
    #[error("cannot write {}: {reason}", path.display())]
    Inexpressible {
        /// The file that would have been written.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// candle refused, for instance because a device is out of memory.
    #[error("{}: tensor `{name}`: {source}", path.display())]
    Candle {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// candle's error.
        source: Box<candle_core::Error>,
    },
}

/// Where a tensor lies in the file, and what it is. Shapes are in row-major order, `[rows, columns]`, as everywhere
/// outside GGUF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// ggml's number of the element type; [`block_type`] names those that can be loaded.
    pub ggml_type: u32,
    /// First byte of the data, from the start of the file.
    start: usize,
    /// Bytes of data; 0 for a type whose block size is unknown.
    length: usize,
}

impl TensorInfo {
    /// The element type, if it is one that can be loaded.
    pub fn block_type(&self) -> Option<GgmlDType> {
        block_type(self.ggml_type)
    }

    /// Where the data lies in the file, in bytes.
    pub fn bytes(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.length
    }
}

/// An open GGUF file: header in memory, data mapped.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    version: u32,
    metadata: HashMap<String, Value>,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
}

impl Gguf {
    /// Opens a file, reads its header and checks that every tensor lies inside it.
    ///
    /// # Errors
    /// A file that cannot be read, is no little-endian GGUF of version 2 or 3, ends too early, or whose header lies:
    /// counts or lengths beyond the end, tensors outside the file, names that occur twice.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref().to_path_buf();
        let io = |source| GgufError::Io { path: path.clone(), source };
        let file = File::open(&path).map_err(io)?;
        let meta = file.metadata().map_err(io)?;
        if !meta.is_file() {
            return Err(GgufError::Malformed { path, reason: "not a regular file".into() });
        }
        if meta.len() == 0 {
            return Err(GgufError::Malformed { path, reason: "the file is empty".into() });
        }
        let map = mapping::map(&file).map_err(io)?;
        let header = read::header(&map).map_err(|reason| GgufError::Malformed { path: path.clone(), reason })?;
        let index = header.tensors.iter().enumerate().map(|(i, info)| (info.name.clone(), i)).collect();
        Ok(Self { path, map, version: header.version, metadata: header.metadata, tensors: header.tensors, index })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// A metadata value.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// All metadata keys, in no particular order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// All tensors in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of that name in the file.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(*self.index.get(name)?)
    }

    /// The tensor behind a Hugging Face name such as `model.layers.3.self_attn.q_proj.weight`.
    pub fn hf_tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensor(&gguf_name(name)?)
    }

    /// Hugging Face names of all model tensors in file order. Tensors that belong to the configuration
    /// (`rope_freqs.weight`) or that have no Hugging Face name are left out; for the latter see
    /// [`Gguf::unknown_tensors`].
    pub fn hf_tensor_names(&self) -> Vec<String> {
        self.tensors.iter().filter_map(|info| hf_name(&info.name)).collect()
    }

    /// Tensors that are neither part of the model nor of its configuration, as far as this reader knows. A loader that
    /// ignored them would run another model than the file holds.
    pub fn unknown_tensors(&self) -> Vec<&str> {
        let known = |name: &str| hf_name(name).is_some() || names::CONFIGURATION_TENSORS.contains(&name);
        self.tensors.iter().map(|info| info.name.as_str()).filter(|name| !known(name)).collect()
    }

    /// `general.architecture`.
    ///
    /// # Errors
    /// The key is absent or no string.
    pub fn architecture(&self) -> Result<&str, GgufError> {
        self.required_text("general.architecture")
    }

    /// A tensor by its Hugging Face name, as the blocks on disk: no value is changed, rows of `q_proj` and `k_proj` are
    /// put into Hugging Face's order. Also works for f32, f16 and bf16 tensors.
    ///
    /// # Errors
    /// No such tensor, an element type that is not supported, head counts that do not fit the rows, or no memory on the
    /// device.
    pub fn quantized(&self, hf_name: &str, device: &Device) -> Result<Arc<QTensor>, GgufError> {
        let info = self.find(hf_name)?;
        let block_type = self.supported(info)?;
        let candle = |source| self.candle_error(hf_name, source);
        let bytes = aligned(self.bytes_in_hf_order(info, hf_name)?);
        let storage =
            QStorage::from_data(std::borrow::Cow::Borrowed(bytes.get()), device, block_type).map_err(candle)?;
        self.forget(info);
        Ok(Arc::new(QTensor::new(storage, info.shape.clone()).map_err(candle)?))
    }

    /// A tensor by its Hugging Face name, dequantised to f32, rows in Hugging Face's order.
    ///
    /// # Errors
    /// As [`Gguf::quantized`].
    pub fn dense(&self, hf_name: &str, device: &Device) -> Result<Tensor, GgufError> {
        self.dense_as(hf_name, DType::F32, device)
    }

    /// As [`Gguf::dense`], in another floating-point type. A tensor stored in that type is not converted.
    ///
    /// # Errors
    /// As [`Gguf::quantized`].
    pub fn dense_as(&self, hf_name: &str, dtype: DType, device: &Device) -> Result<Tensor, GgufError> {
        let info = self.find(hf_name)?;
        let candle = |source| self.candle_error(hf_name, source);
        let stored = match self.supported(info)? {
            GgmlDType::F32 => DType::F32,
            GgmlDType::F16 => DType::F16,
            GgmlDType::BF16 => DType::BF16,
            // Dequantised on the CPU: the same values on every device.
            _ => {
                let blocks = self.quantized(hf_name, &Device::Cpu)?;
                return blocks
                    .dequantize(&Device::Cpu)
                    .and_then(|x| x.to_dtype(dtype)?.to_device(device))
                    .map_err(candle);
            }
        };
        let bytes = self.bytes_in_hf_order(info, hf_name)?;
        let read = Tensor::from_raw_buffer(&bytes, stored, &info.shape, &Device::Cpu);
        self.forget(info);
        read.and_then(|x| x.to_dtype(dtype)?.to_device(device)).map_err(candle)
    }

    /// Gives back a tensor's pages once its values are copied.
    fn forget(&self, info: &TensorInfo) {
        mapping::forget(&self.map, info.start..info.start + info.length);
    }

    /// The values of a small f32 tensor by its name in the file, such as `rope_freqs.weight`.
    pub(crate) fn small_f32(&self, name: &str, most: usize) -> Result<Option<Vec<f32>>, GgufError> {
        let Some(info) = self.tensor(name) else { return Ok(None) };
        let bytes = self.map.get(info.start..info.start + info.length).unwrap_or_default();
        if info.block_type() != Some(GgmlDType::F32) || bytes.len() / 4 > most {
            let reason = format!("expected at most {most} f32 values");
            return Err(GgufError::Tensor { path: self.path.clone(), name: name.into(), reason });
        }
        Ok(Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()))
    }

    fn find(&self, hf_name: &str) -> Result<&TensorInfo, GgufError> {
        self.hf_tensor(hf_name).ok_or_else(|| {
            let names = self.hf_tensor_names();
            let hint = did_you_mean(hf_name, &names);
            GgufError::Tensor {
                path: self.path.clone(),
                name: hf_name.into(),
                reason: format!("not in the file{hint}"),
            }
        })
    }

    fn supported(&self, info: &TensorInfo) -> Result<GgmlDType, GgufError> {
        info.block_type().ok_or_else(|| GgufError::Tensor {
            path: self.path.clone(),
            name: info.name.clone(),
            reason: format!(
                "is stored as {}, which cannot be loaded; requantise the file to one of {}",
                type_name(info.ggml_type),
                types::SUPPORTED
            ),
        })
    }

    /// The bytes of a tensor, with the rows of `q_proj` and `k_proj` where Hugging Face has them. Rows are whole
    /// blocks, so this moves blocks and changes none.
    fn bytes_in_hf_order(&self, info: &TensorInfo, hf_name: &str) -> Result<std::borrow::Cow<'_, [u8]>, GgufError> {
        let bytes = self.map.get(info.start..info.start + info.length).unwrap_or_default();
        let Some(head_rows) = self.permuted_head_rows(info, hf_name)? else { return Ok(bytes.into()) };
        let rows = info.shape.first().copied().unwrap_or(1).max(1);
        let row_bytes = bytes.len() / rows;
        let mut ordered = Vec::with_capacity(bytes.len());
        for row in 0..rows {
            let from = names::interleaved_row(row, head_rows) * row_bytes;
            ordered.extend_from_slice(bytes.get(from..from + row_bytes).unwrap_or_default());
        }
        Ok(ordered.into())
    }

    /// Rows of one head if llama.cpp permuted this tensor, else `None`.
    fn permuted_head_rows(&self, info: &TensorInfo, hf_name: &str) -> Result<Option<usize>, GgufError> {
        let architecture = self.architecture()?;
        let permutes = FAMILIES
            .iter()
            .filter_map(|family| family.gguf)
            .any(|gguf| gguf.architecture == architecture && gguf.permutes_qk);
        let key = match names::permuted_projection(hf_name) {
            Some(names::Projection::Query) if permutes => "attention.head_count",
            Some(names::Projection::Key) if permutes => "attention.head_count_kv",
            _ => return Ok(None),
        };
        let key = format!("{architecture}.{key}");
        // A file without a key/value head count has as many as query heads.
        let heads = match self.count(&key)? {
            Some(heads) => heads,
            None => self.required_count(&format!("{architecture}.attention.head_count"))?,
        };
        let rows = info.shape.first().copied().unwrap_or(0);
        if heads == 0 || !rows.is_multiple_of(heads) || !(rows / heads).is_multiple_of(2) {
            let reason = format!("{rows} rows cannot be divided into {heads} heads (`{key}`) of an even size");
            return Err(GgufError::Tensor { path: self.path.clone(), name: info.name.clone(), reason });
        }
        Ok(Some(rows / heads))
    }

    fn candle_error(&self, name: &str, source: candle_core::Error) -> GgufError {
        GgufError::Candle { path: self.path.clone(), name: name.into(), source: Box::new(source) }
    }

    fn metadata_error(&self, key: &str, reason: impl Into<String>) -> GgufError {
        GgufError::Metadata { path: self.path.clone(), key: key.into(), reason: reason.into() }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        get: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        self.metadata
            .get(key)
            .map(|value| get(value).ok_or_else(|| self.metadata_error(key, format!("is not {wanted}"))))
            .transpose()
    }

    /// A whole number, whatever its width in the file.
    ///
    /// # Errors
    /// The value is not a non-negative whole number.
    pub fn count(&self, key: &str) -> Result<Option<usize>, GgufError> {
        self.typed(key, "a whole number ≥ 0", |value| value.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// As [`Gguf::count`], for a key that must be there.
    ///
    /// # Errors
    /// The key is absent, or as [`Gguf::count`].
    pub fn required_count(&self, key: &str) -> Result<usize, GgufError> {
        self.count(key)?.ok_or_else(|| self.metadata_error(key, "is missing"))
    }

    /// A floating-point number.
    ///
    /// # Errors
    /// The value is not a number.
    pub fn number(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A string.
    ///
    /// # Errors
    /// The value is not a string.
    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// As [`Gguf::text`], for a key that must be there.
    ///
    /// # Errors
    /// The key is absent or no string.
    pub fn required_text(&self, key: &str) -> Result<&str, GgufError> {
        self.text(key)?.ok_or_else(|| self.metadata_error(key, "is missing"))
    }

    /// True or false.
    ///
    /// # Errors
    /// The value is no boolean.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A list of strings.
    ///
    /// # Errors
    /// The value is no list of strings.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "a list of strings", Value::as_strings)
    }
}

/// Bytes at an address that any block type may lie at. candle reads blocks in place and panics on an odd address, which
/// a file with `general.alignment = 1` would produce.
struct Aligned<'a> {
    bytes: std::borrow::Cow<'a, [u8]>,
    skip: usize,
}

const BLOCK_ALIGNMENT: usize = 8;

fn aligned(bytes: std::borrow::Cow<'_, [u8]>) -> Aligned<'_> {
    if (bytes.as_ptr() as usize).is_multiple_of(BLOCK_ALIGNMENT) {
        return Aligned { bytes, skip: 0 };
    }
    let mut copy = Vec::with_capacity(bytes.len() + BLOCK_ALIGNMENT);
    let skip = (BLOCK_ALIGNMENT - copy.as_ptr() as usize % BLOCK_ALIGNMENT) % BLOCK_ALIGNMENT;
    copy.resize(skip, 0u8);
    copy.extend_from_slice(&bytes);
    Aligned { bytes: copy.into(), skip }
}

impl Aligned<'_> {
    fn get(&self) -> &[u8] {
        self.bytes.get(self.skip..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
