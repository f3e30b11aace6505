//! Writing a GGUF v3 file that llama.cpp, transformers and this crate load.
//!
//! **Element types.** Matrices get the wanted type, everything with one dimension stays f32. Where a row is no whole
//! number of blocks, llama.cpp's fallbacks apply: Q2_K and Q3_K become Q4_0, Q4_K becomes Q5_0, Q5_K becomes Q5_1, Q6_K
//! becomes Q8_0, and if 32 does not divide the row either, the matrix is f16. The output head (the embedding, if the
//! head is tied) is kept at Q6_K or better, since an error there reaches the logits directly.
//!
//! **Streaming.** The header needs all names and shapes, so those are given up front, and each tensor is asked for when
//! its turn comes; one is in memory at a time.

use std::{collections::HashSet, io::Write, path::Path, thread};

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor},
};
use peft_core::atomic::write_file_with;

use super::{
    Array, GgufError, Value,
    names::{Projection, gguf_name, halved_row, permuted_projection},
    types::type_number,
};
use crate::{
    config::{DecoderConfig, GgufDescription},
    tokenizer::Tokenizer,
};

/// Element type to write matrices in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // The variants are ggml's names.
pub enum GgufType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

/// Every type with its name on the command line and llama.cpp's `llama_ftype` number.
const WRITABLE: &[(&str, GgufType, GgmlDType, u32)] = &[
    ("f32", GgufType::F32, GgmlDType::F32, 0),
    ("f16", GgufType::F16, GgmlDType::F16, 1),
    ("bf16", GgufType::Bf16, GgmlDType::BF16, 32),
    ("q8_0", GgufType::Q8_0, GgmlDType::Q8_0, 7),
    ("q4_0", GgufType::Q4_0, GgmlDType::Q4_0, 2),
    ("q4_1", GgufType::Q4_1, GgmlDType::Q4_1, 3),
    ("q5_0", GgufType::Q5_0, GgmlDType::Q5_0, 8),
    ("q5_1", GgufType::Q5_1, GgmlDType::Q5_1, 9),
    ("q2_k", GgufType::Q2K, GgmlDType::Q2K, 10),
    ("q3_k", GgufType::Q3K, GgmlDType::Q3K, 12),
    ("q4_k", GgufType::Q4K, GgmlDType::Q4K, 15),
    ("q5_k", GgufType::Q5K, GgmlDType::Q5K, 17),
    ("q6_k", GgufType::Q6K, GgmlDType::Q6K, 18),
];

impl GgufType {
    /// The names that [`GgufType::from_name`] knows.
    pub fn names() -> impl Iterator<Item = &'static str> {
        WRITABLE.iter().map(|(name, ..)| *name)
    }

    /// The type behind a name such as `q4_k`, whatever its case.
    pub fn from_name(name: &str) -> Option<Self> {
        WRITABLE.iter().find(|(known, ..)| known.eq_ignore_ascii_case(name)).map(|(_, kind, ..)| *kind)
    }

    fn block_type(self) -> GgmlDType {
        WRITABLE.iter().find(|(_, kind, ..)| *kind == self).map_or(GgmlDType::F32, |(.., block_type, _)| *block_type)
    }

    fn file_type(self) -> u32 {
        WRITABLE.iter().find(|(_, kind, ..)| *kind == self).map_or(0, |(.., file_type)| *file_type)
    }
}

/// What to write besides the weights.
#[derive(Debug, Clone)]
pub struct GgufWriteOptions {
    /// Element type of the matrices.
    pub weights: GgufType,
    /// `general.name`.
    pub name: Option<String>,
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensorSpec {
    /// Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Shape in row-major order, `[rows, columns]`.
    pub shape: Vec<usize>,
}

const ALIGNMENT: u64 = 32;
/// Rows are converted in pieces of about this many elements. Small in tests, so that they have several.
const PIECE: usize = if cfg!(test) { 1 << 16 } else { 1 << 22 };

/// A tensor on its way into the file.
pub(super) struct Planned<'a> {
    pub(super) spec: &'a GgufTensorSpec,
    pub(super) name: String,
    pub(super) block_type: GgmlDType,
    pub(super) bytes: u64,
    /// Rows of a head whose order llama.cpp has otherwise.
    pub(super) head_rows: Option<usize>,
}

/// Writes a model: metadata of `config` and `tokenizer`, then each tensor of `tensors`, which `load` hands over by its
/// spec in turn. Tensors may be of any floating-point type and on any device. The file appears whole or not at all.
///
/// A tied `lm_head.weight` is left out, as llama.cpp has it.
///
/// # Errors
/// A tensor without a GGUF name, of another shape than announced, or with NaN, infinite or (for f16) too large values;
/// a configuration or tokenizer that GGUF cannot express; `load` failing; a disk that cannot be written.
pub fn write_gguf(
    path: impl AsRef<Path>,
    config: &DecoderConfig,
    tokenizer: &Tokenizer,
    tensors: &[GgufTensorSpec],
    options: &GgufWriteOptions,
    mut load: impl FnMut(&GgufTensorSpec) -> candle_core::Result<Tensor>,
) -> Result<(), GgufError> {
    let path = path.as_ref();
    let inexpressible = |reason: String| GgufError::Inexpressible { path: path.into(), reason };
    let GgufDescription { mut metadata, frequency_factors: factors } =
        config.to_gguf_metadata().map_err(inexpressible)?;
    let planned = plan(config, tensors, options.weights).map_err(inexpressible)?;
    metadata.extend(general(options));
    let described = tokenizer.to_gguf_metadata(config.vocab_size).map_err(inexpressible)?;
    for (name, id) in [
        ("bos_token_id", config.bos_token_id),
        ("eos_token_id", config.eos_token_id()),
        ("padding_token_id", config.pad_token_id),
    ] {
        let key = format!("tokenizer.ggml.{name}");
        if let Some(id) = id.filter(|id| (*id as usize) < config.vocab_size)
            && !described.iter().any(|(known, _)| *known == key)
        {
            metadata.push((key, id.into()));
        }
    }
    metadata.extend(described);
    let mut head = header(&metadata, &planned, factors.as_deref());
    if let Some(factors) = &factors {
        let start = head.len();
        head.extend(factors.iter().flat_map(|factor| factor.to_le_bytes()));
        head.resize(start + (head.len() - start).next_multiple_of(ALIGNMENT as usize), 0);
    }
    write_planned(path, &head, &planned, |tensor| {
        load(tensor.spec).map_err(|source| candle_error(path, &tensor.spec.name, source))
    })
}

/// Writes a head and then each tensor, which `load` hands over in turn. The file appears whole or not at all.
pub(super) fn write_planned<'p>(
    path: &Path,
    head: &[u8],
    planned: &'p [Planned<'p>],
    mut load: impl FnMut(&'p Planned<'p>) -> Result<Tensor, GgufError>,
) -> Result<(), GgufError> {
    // Failures inside the closure are not all I/O errors; they are carried out here.
    let mut failure = None;
    let written = write_file_with(path, |mut out| {
        out.write_all(head)?;
        for tensor in planned {
            if let Err(error) = load(tensor).and_then(|values| write_tensor(&mut out, tensor, &values, path)) {
                failure = Some(error);
                return Err(std::io::Error::other("a tensor could not be written"));
            }
            pad(&mut out, tensor.bytes)?;
        }
        Ok(())
    });
    match (failure, written) {
        (Some(error), _) => Err(error),
        (None, Err(error)) => Err(error.into()),
        (None, Ok(())) => Ok(()),
    }
}

fn general(options: &GgufWriteOptions) -> Vec<(String, Value)> {
    let mut entries = vec![
        ("general.type".to_owned(), Value::from("model")),
        ("general.file_type".to_owned(), options.weights.file_type().into()),
        ("general.quantization_version".to_owned(), 2u32.into()),
    ];
    if let Some(name) = &options.name {
        entries.push(("general.name".to_owned(), name.as_str().into()));
    }
    entries
}

fn plan<'a>(
    config: &DecoderConfig,
    tensors: &'a [GgufTensorSpec],
    wanted: GgufType,
) -> Result<Vec<Planned<'a>>, String> {
    let mut planned = Vec::with_capacity(tensors.len());
    let mut seen = HashSet::new();
    for spec in tensors {
        if spec.name == "lm_head.weight" && config.tie_word_embeddings {
            continue;
        }
        let name = gguf_name(&spec.name).ok_or_else(|| format!("GGUF has no name for tensor `{}`", spec.name))?;
        if !seen.insert(name.clone()) {
            return Err(format!("tensor `{}` is there twice", spec.name));
        }
        let elements = spec.shape.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim));
        let (Some(elements), 1..=4) = (elements.filter(|elements| *elements > 0), spec.shape.len()) else {
            return Err(format!("tensor `{}` has shape {:?}", spec.name, spec.shape));
        };
        let head =
            spec.name == "lm_head.weight" || (config.tie_word_embeddings && spec.name == "model.embed_tokens.weight");
        let block_type = type_for(wanted.block_type(), &spec.shape, head);
        let bytes = (elements / block_type.block_size()) as u64 * block_type.type_size() as u64;
        let rows = spec.shape.first().copied().unwrap_or(0);
        let head_rows = permuted_head(config, &spec.name, rows)?;
        planned.push(Planned { spec, name, block_type, bytes, head_rows });
    }
    Ok(planned)
}

/// The rows of a head in the tensor called `name` in Hugging Face's files, where llama.cpp has its `rows` in another order.
pub(super) fn permuted_head(config: &DecoderConfig, name: &str, rows: usize) -> Result<Option<usize>, String> {
    let permutes_qk = config.family.gguf.is_some_and(|gguf| gguf.permutes_qk);
    let heads = match permuted_projection(name) {
        Some(Projection::Query) if permutes_qk => config.num_attention_heads,
        Some(Projection::Key) if permutes_qk => config.num_key_value_heads,
        _ => return Ok(None),
    };
    if rows != heads * config.head_dim {
        return Err(format!("tensor `{name}` has {rows} rows, not {heads} heads of {}", config.head_dim));
    }
    Ok(Some(config.head_dim))
}

/// The element type for a tensor: see the module's documentation.
fn type_for(wanted: GgmlDType, shape: &[usize], head: bool) -> GgmlDType {
    let columns = match shape {
        [.., _, columns] => *columns,
        _ => return GgmlDType::F32,
    };
    let wanted = match wanted {
        GgmlDType::Q4_0
        | GgmlDType::Q4_1
        | GgmlDType::Q5_0
        | GgmlDType::Q5_1
        | GgmlDType::Q2K
        | GgmlDType::Q3K
        | GgmlDType::Q4K
        | GgmlDType::Q5K
            if head =>
        {
            GgmlDType::Q6K
        }
        other => other,
    };
    let fits = |kind: GgmlDType| columns.is_multiple_of(kind.block_size());
    if fits(wanted) {
        return wanted;
    }
    let fallback = match wanted {
        GgmlDType::Q2K | GgmlDType::Q3K => GgmlDType::Q4_0,
        GgmlDType::Q4K => GgmlDType::Q5_0,
        GgmlDType::Q5K => GgmlDType::Q5_1,
        _ => GgmlDType::Q8_0,
    };
    if fits(fallback) { fallback } else { GgmlDType::F16 }
}

pub(super) fn header(metadata: &[(String, Value)], planned: &[Planned<'_>], factors: Option<&[f32]>) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(b"GGUF");
    out.extend_from_slice(&3u32.to_le_bytes());
    let count = planned.len() + usize::from(factors.is_some());
    out.extend_from_slice(&(count as u64).to_le_bytes());
    out.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        push_string(&mut out, key);
        push_value(&mut out, value);
    }
    let mut offset = 0u64;
    let mut entry = |name: &str, shape: &[usize], block_type: GgmlDType, bytes: u64| {
        push_string(&mut out, name);
        out.extend_from_slice(&(shape.len() as u32).to_le_bytes());
        for dim in shape.iter().rev() {
            out.extend_from_slice(&(*dim as u64).to_le_bytes());
        }
        out.extend_from_slice(&type_number(block_type).to_le_bytes());
        out.extend_from_slice(&offset.to_le_bytes());
        offset += bytes.next_multiple_of(ALIGNMENT);
    };
    if let Some(factors) = factors {
        entry("rope_freqs.weight", &[factors.len()], GgmlDType::F32, factors.len() as u64 * 4);
    }
    for tensor in planned {
        entry(&tensor.name, &tensor.spec.shape, tensor.block_type, tensor.bytes);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

fn push_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

macro_rules! push_numbers {
    ($out:expr, $number:expr, $items:expr) => {{
        push_array_head($out, $number, $items.len());
        $items.iter().for_each(|item| $out.extend_from_slice(&item.to_le_bytes()));
    }};
}

fn push_array_head(out: &mut Vec<u8>, kind: u32, count: usize) {
    out.extend_from_slice(&9u32.to_le_bytes());
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&(count as u64).to_le_bytes());
}

/// The number of a value's type, and the value.
fn push_value(out: &mut Vec<u8>, value: &Value) {
    let mut scalar = |kind: u32, bytes: &[u8]| {
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(bytes);
    };
    match value {
        Value::U8(n) => scalar(0, &n.to_le_bytes()),
        Value::I8(n) => scalar(1, &n.to_le_bytes()),
        Value::U16(n) => scalar(2, &n.to_le_bytes()),
        Value::I16(n) => scalar(3, &n.to_le_bytes()),
        Value::U32(n) => scalar(4, &n.to_le_bytes()),
        Value::I32(n) => scalar(5, &n.to_le_bytes()),
        Value::F32(x) => scalar(6, &x.to_le_bytes()),
        Value::Bool(flag) => scalar(7, &[u8::from(*flag)]),
        Value::String(text) => {
            scalar(8, &(text.len() as u64).to_le_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        Value::U64(n) => scalar(10, &n.to_le_bytes()),
        Value::I64(n) => scalar(11, &n.to_le_bytes()),
        Value::F64(x) => scalar(12, &x.to_le_bytes()),
        Value::Array(array) => match array {
            Array::U8(items) => push_numbers!(out, 0, items),
            Array::I8(items) => push_numbers!(out, 1, items),
            Array::U16(items) => push_numbers!(out, 2, items),
            Array::I16(items) => push_numbers!(out, 3, items),
            Array::U32(items) => push_numbers!(out, 4, items),
            Array::I32(items) => push_numbers!(out, 5, items),
            Array::F32(items) => push_numbers!(out, 6, items),
            Array::U64(items) => push_numbers!(out, 10, items),
            Array::I64(items) => push_numbers!(out, 11, items),
            Array::F64(items) => push_numbers!(out, 12, items),
            Array::Bool(items) => {
                push_array_head(out, 7, items.len());
                out.extend(items.iter().map(|flag| u8::from(*flag)));
            }
            Array::String(items) => {
                push_array_head(out, 8, items.len());
                items.iter().for_each(|text| push_string(out, text));
            }
        },
    }
}

fn pad(out: &mut impl Write, written: u64) -> std::io::Result<()> {
    let zeros = (written.next_multiple_of(ALIGNMENT) - written) as usize;
    out.write_all([0u8; ALIGNMENT as usize].get(..zeros).unwrap_or_default())
}

fn write_tensor(out: &mut impl Write, planned: &Planned<'_>, values: &Tensor, path: &Path) -> Result<(), GgufError> {
    let name = &planned.spec.name;
    let wrong = |reason: String| GgufError::Tensor { path: path.into(), name: name.clone(), reason };
    let candle = |source| candle_error(path, name, source);
    if values.dims() != planned.spec.shape.as_slice() {
        return Err(wrong(format!("has shape {:?}, announced as {:?}", values.dims(), planned.spec.shape)));
    }
    let mut values = values.to_device(&Device::Cpu).map_err(candle)?;
    let rows = planned.spec.shape.first().copied().unwrap_or(1);
    if let Some(head_rows) = planned.head_rows {
        let order: Vec<u32> = (0..rows).map(|row| halved_row(row, head_rows) as u32).collect();
        let order = Tensor::from_vec(order, rows, &Device::Cpu).map_err(candle)?;
        values = values.contiguous().and_then(|values| values.index_select(&order, 0)).map_err(candle)?;
    }
    let row_elements = values.elem_count() / rows.max(1);
    let piece_rows = (PIECE / row_elements.max(1)).clamp(1, rows.max(1));
    let starts: Vec<usize> = (0..rows).step_by(piece_rows).collect();
    let workers = thread::available_parallelism().map_or(1, usize::from);
    for group in starts.chunks(workers) {
        // Quantising takes most of the time, and candle does it on one thread.
        let pieces: Vec<Result<Vec<u8>, String>> = thread::scope(|scope| {
            let running: Vec<_> = group
                .iter()
                .map(|start| {
                    let (values, kind) = (&values, planned.block_type);
                    let length = piece_rows.min(rows - start);
                    scope.spawn(move || convert(values, *start, length, kind))
                })
                .collect();
            running
                .into_iter()
                .map(|piece| piece.join().unwrap_or_else(|_| Err("could not be converted".into())))
                .collect()
        });
        for piece in pieces {
            out.write_all(&piece.map_err(wrong)?).map_err(|source| GgufError::Io { path: path.into(), source })?;
        }
    }
    Ok(())
}

fn candle_error(path: &Path, name: &str, source: candle_core::Error) -> GgufError {
    GgufError::Candle { path: path.into(), name: name.into(), source: Box::new(source) }
}

/// The bytes of rows `start..start + length` in an element type.
fn convert(values: &Tensor, start: usize, length: usize, block_type: GgmlDType) -> Result<Vec<u8>, String> {
    let text = |error: candle_core::Error| error.to_string();
    let piece = values.narrow(0, start, length).and_then(|piece| piece.to_dtype(DType::F32)).map_err(text)?;
    let flat: Vec<f32> = piece.flatten_all().and_then(|piece| piece.to_vec1()).map_err(text)?;
    let limit = if block_type == GgmlDType::F16 { 65_504.0 } else { f32::MAX };
    if let Some(value) = flat.iter().find(|value| value.is_nan() || value.abs() > limit) {
        return Err(format!("holds {value}, which {} cannot", super::type_name(type_number(block_type))));
    }
    Ok(match block_type {
        GgmlDType::F32 => flat.iter().flat_map(|value| value.to_le_bytes()).collect(),
        GgmlDType::F16 => flat.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect(),
        GgmlDType::BF16 => flat.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect(),
        // From a tensor of its own: candle quantises the whole storage of a view, wherever the view begins.
        _ => Tensor::from_vec(flat, piece.dims(), &Device::Cpu)
            .and_then(|piece| QTensor::quantize(&piece, block_type))
            .and_then(|blocks| blocks.data().map(std::borrow::Cow::into_owned))
            .map_err(text)?,
    })
}
