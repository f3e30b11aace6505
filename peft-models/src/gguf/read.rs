//! The bounded header reader.
//!
//! Every count and length is compared with the bytes that are left before anything is allocated, so a header can make
//! this reader use at most a few times its own size in memory. candle's own reader is not used because it divides by
//! `general.alignment`, takes 32 bytes of memory for each one-byte array element, and refuses a whole file for one
//! tensor of a type it does not know.

use std::collections::{HashMap, HashSet};

use super::{Array, TensorInfo, Value, type_name, types::block_type};

pub(super) struct Header {
    pub(super) version: u32,
    pub(super) metadata: HashMap<String, Value>,
    pub(super) tensors: Vec<TensorInfo>,
}

/// Data offsets are multiples of this unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: usize = 32;
/// ggml's `GGML_MAX_DIMS`.
const MAX_DIMS: u32 = 4;
/// llama.cpp's limit of a tensor name is 64 bytes; a key may be 65,535.
const MAX_NAME_BYTES: usize = 65_535;
/// The smallest tensor entry: empty name, one dimension, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;
/// The smallest metadata entry: empty key, type, one byte.
const MIN_ENTRY_BYTES: u64 = 8 + 4 + 1;

type Outcome<T> = Result<T, String>;

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

macro_rules! numbers {
    ($($name:ident: $type:ty),*) => {
        $(fn $name(&mut self) -> Outcome<$type> {
            const SIZE: usize = size_of::<$type>();
            let mut raw = [0u8; SIZE];
            raw.copy_from_slice(self.take(SIZE)?);
            Ok(<$type>::from_le_bytes(raw))
        })*
    };
}

impl<'a> Reader<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, length: usize) -> Outcome<&'a [u8]> {
        let end = self.at.checked_add(length).filter(|end| *end <= self.bytes.len());
        let Some(slice) = end.and_then(|end| self.bytes.get(self.at..end)) else {
            return Err(format!(
                "the file is cut short: {length} bytes are needed at byte {} and {} are left",
                self.at,
                self.left()
            ));
        };
        self.at += length;
        Ok(slice)
    }

    numbers!(u8: u8, i8: i8, u16: u16, i16: i16, u32: u32, i32: i32, u64: u64, i64: i64, f32: f32, f64: f64);

    fn bool(&mut self) -> Outcome<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            byte => Err(format!("a boolean at byte {} is {byte}", self.at - 1)),
        }
    }

    fn string_bytes(&mut self) -> Outcome<&'a [u8]> {
        let length = self.u64()?;
        let length = usize::try_from(length).ok().filter(|length| *length <= self.left()).ok_or_else(|| {
            format!("a string at byte {} claims {length} bytes and {} are left", self.at, self.left())
        })?;
        self.take(length)
    }

    /// A value; some files hold bytes that are not UTF-8, and some end in zeros.
    fn string(&mut self) -> Outcome<String> {
        Ok(String::from_utf8_lossy(self.string_bytes()?).trim_end_matches('\0').to_owned())
    }

    /// A key or a tensor name, which must be exact.
    fn name(&mut self) -> Outcome<String> {
        let bytes = self.string_bytes()?;
        if bytes.is_empty() || bytes.len() > MAX_NAME_BYTES {
            return Err(format!("a name of {} bytes before byte {}", bytes.len(), self.at));
        }
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| format!("a name before byte {} is not UTF-8", self.at))
    }

    fn items<T>(&mut self, count: u64, size: usize, mut read: impl FnMut(&mut Self) -> Outcome<T>) -> Outcome<Vec<T>> {
        let count = usize::try_from(count)
            .ok()
            .filter(|count| count.checked_mul(size).is_some_and(|bytes| bytes <= self.left()))
            .ok_or_else(|| {
                format!("a list at byte {} claims {count} items and {} bytes are left", self.at, self.left())
            })?;
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(read(self)?);
        }
        Ok(items)
    }

    fn array(&mut self) -> Outcome<Array> {
        let kind = self.u32()?;
        let count = self.u64()?;
        Ok(match kind {
            0 => Array::U8(self.items(count, 1, Self::u8)?),
            1 => Array::I8(self.items(count, 1, Self::i8)?),
            2 => Array::U16(self.items(count, 2, Self::u16)?),
            3 => Array::I16(self.items(count, 2, Self::i16)?),
            4 => Array::U32(self.items(count, 4, Self::u32)?),
            5 => Array::I32(self.items(count, 4, Self::i32)?),
            6 => Array::F32(self.items(count, 4, Self::f32)?),
            7 => Array::Bool(self.items(count, 1, Self::bool)?),
            8 => Array::String(self.items(count, 8, Self::string)?),
            10 => Array::U64(self.items(count, 8, Self::u64)?),
            11 => Array::I64(self.items(count, 8, Self::i64)?),
            12 => Array::F64(self.items(count, 8, Self::f64)?),
            9 => return Err("a list of lists is not supported".into()),
            kind => return Err(format!("{kind} is not a type of list items")),
        })
    }

    fn value(&mut self) -> Outcome<Value> {
        Ok(match self.u32()? {
            0 => Value::U8(self.u8()?),
            1 => Value::I8(self.i8()?),
            2 => Value::U16(self.u16()?),
            3 => Value::I16(self.i16()?),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(self.i32()?),
            6 => Value::F32(self.f32()?),
            7 => Value::Bool(self.bool()?),
            8 => Value::String(self.string()?),
            9 => Value::Array(self.array()?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(self.i64()?),
            12 => Value::F64(self.f64()?),
            kind => return Err(format!("{kind} is not a type of values")),
        })
    }
}

pub(super) fn header(bytes: &[u8]) -> Outcome<Header> {
    let mut reader = Reader { bytes, at: 0 };
    if reader.take(4).ok() != Some(b"GGUF") {
        return Err("not a GGUF file (it does not begin with `GGUF`)".into());
    }
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        let hint = if (2..=3).contains(&version.swap_bytes()) { "; big-endian files are not supported" } else { "" };
        return Err(format!("GGUF version {version} is not 2 or 3{hint}"));
    }
    let tensor_count = reader.u64()?;
    let entry_count = reader.u64()?;
    let least =
        tensor_count.saturating_mul(MIN_TENSOR_BYTES).saturating_add(entry_count.saturating_mul(MIN_ENTRY_BYTES));
    if least > reader.left() as u64 {
        return Err(format!(
            "the header claims {tensor_count} tensors and {entry_count} metadata entries, more than {} bytes can hold",
            reader.left()
        ));
    }
    let mut metadata = HashMap::new();
    for _ in 0..entry_count {
        let key = reader.name()?;
        let value = reader.value().map_err(|reason| format!("metadata `{key}`: {reason}"))?;
        if metadata.contains_key(&key) {
            return Err(format!("metadata `{key}` occurs twice"));
        }
        metadata.insert(key, value);
    }
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(value) => value
            .as_u64()
            .and_then(|alignment| usize::try_from(alignment).ok())
            .filter(|alignment| alignment.is_power_of_two() && *alignment <= 1 << 20)
            .ok_or("`general.alignment` is not a power of two")?,
    };
    let mut tensors = Vec::with_capacity(tensor_count as usize);
    let mut names = HashSet::new();
    for _ in 0..tensor_count {
        let name = reader.name()?;
        let info = tensor(&mut reader, alignment, name)?;
        if !names.insert(info.name.clone()) {
            return Err(format!("tensor `{}` occurs twice", info.name));
        }
        tensors.push(info);
    }
    // Offsets count from the end of the header, rounded up.
    let data = reader.at.next_multiple_of(alignment);
    for info in &mut tensors {
        let start = data.checked_add(info.start);
        let end = start.and_then(|start| start.checked_add(info.length));
        let (Some(start), Some(_)) = (start, end.filter(|end| *end <= bytes.len())) else {
            return Err(format!(
                "tensor `{}` needs {} bytes at byte {data} + {}, and the file has {}: it is cut short or its header is wrong",
                info.name,
                info.length,
                info.start,
                bytes.len()
            ));
        };
        info.start = start;
    }
    Ok(Header { version, metadata, tensors })
}

/// One tensor entry; `start` still counts from the start of the data.
fn tensor(reader: &mut Reader<'_>, alignment: usize, name: String) -> Outcome<TensorInfo> {
    let dims = reader.u32()?;
    if dims == 0 || dims > MAX_DIMS {
        return Err(format!("tensor `{name}` has {dims} dimensions, not 1 to {MAX_DIMS}"));
    }
    let mut shape = Vec::with_capacity(dims as usize);
    for _ in 0..dims {
        let dim = reader.u64()?;
        match usize::try_from(dim) {
            Ok(dim) if dim > 0 => shape.push(dim),
            _ => return Err(format!("tensor `{name}` has a dimension of {dim}")),
        }
    }
    let elements = shape
        .iter()
        .try_fold(1usize, |product, dim| product.checked_mul(*dim))
        .filter(|elements| *elements <= isize::MAX as usize / 8)
        .ok_or_else(|| format!("tensor `{name}` of shape {shape:?} is too large"))?;
    // The file has the innermost dimension first.
    let columns = shape.first().copied().unwrap_or(1);
    shape.reverse();
    let ggml_type = reader.u32()?;
    let offset = reader.u64()?;
    let length = match block_type(ggml_type) {
        Some(kind) if !columns.is_multiple_of(kind.block_size()) => {
            return Err(format!(
                "tensor `{name}` has rows of {columns} elements, not a multiple of {}'s blocks of {}",
                type_name(ggml_type),
                kind.block_size()
            ));
        }
        Some(kind) => elements / kind.block_size() * kind.type_size(),
        None => 0,
    };
    let start = usize::try_from(offset)
        .ok()
        .filter(|offset| offset.is_multiple_of(alignment))
        .ok_or_else(|| format!("tensor `{name}` has offset {offset}, not a multiple of {alignment}"))?;
    Ok(TensorInfo { name, shape, ggml_type, start, length })
}
