//! Metadata values.

/// One metadata value of a GGUF file, in the type it has there.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // The variants are the names of Rust's own types.
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// A list of values of one type. Lists of lists are not part of what llama.cpp writes or reads.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
}

impl Value {
    /// The value as a non-negative whole number, whatever its width.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(n) => Some(n.into()),
            Self::U16(n) => Some(n.into()),
            Self::U32(n) => Some(n.into()),
            Self::U64(n) => Some(n),
            Self::I8(n) => n.try_into().ok(),
            Self::I16(n) => n.try_into().ok(),
            Self::I32(n) => n.try_into().ok(),
            Self::I64(n) => n.try_into().ok(),
            _ => None,
        }
    }

    /// The value as a number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(x) => Some(x.into()),
            Self::F64(x) => Some(x),
            Self::U64(n) => Some(n as f64),
            Self::I64(n) => Some(n as f64),
            Self::I8(n) => Some(n.into()),
            Self::I16(n) => Some(n.into()),
            Self::I32(n) => Some(n.into()),
            _ => self.as_u64().map(|n| n as f64),
        }
    }

    /// The value as a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    /// The value as a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    /// The value as a list of strings.
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            Self::Array(Array::String(items)) => Some(items),
            _ => None,
        }
    }

    /// The value as a list of 32-bit floats.
    pub fn as_f32s(&self) -> Option<&[f32]> {
        match self {
            Self::Array(Array::F32(items)) => Some(items),
            _ => None,
        }
    }

    /// The value as a list of whole numbers, whatever their width.
    pub fn as_integers(&self) -> Option<Vec<i64>> {
        let Self::Array(array) = self else { return None };
        match array {
            Array::U8(items) => Some(items.iter().map(|n| i64::from(*n)).collect()),
            Array::I8(items) => Some(items.iter().map(|n| i64::from(*n)).collect()),
            Array::U16(items) => Some(items.iter().map(|n| i64::from(*n)).collect()),
            Array::I16(items) => Some(items.iter().map(|n| i64::from(*n)).collect()),
            Array::U32(items) => Some(items.iter().map(|n| i64::from(*n)).collect()),
            Array::I32(items) => Some(items.iter().map(|n| i64::from(*n)).collect()),
            Array::U64(items) => items.iter().map(|n| i64::try_from(*n).ok()).collect(),
            Array::I64(items) => Some(items.clone()),
            _ => None,
        }
    }
}

macro_rules! from {
    ($($type:ty => $variant:expr),* $(,)?) => {
        $(impl From<$type> for Value {
            fn from(value: $type) -> Self {
                $variant(value)
            }
        })*
    };
}

from! {
    u32 => Value::U32,
    f32 => Value::F32,
    bool => Value::Bool,
    String => Value::String,
    Vec<f32> => |items| Value::Array(Array::F32(items)),
    Vec<i32> => |items| Value::Array(Array::I32(items)),
    Vec<String> => |items| Value::Array(Array::String(items)),
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::String(value.to_owned())
    }
}
