//! CSV and Parquet rows.

use std::fs::File;
use std::io::BufRead;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use serde_json::{Map, Number, Value};

use super::error::{DataError, Location};
use super::source::{Row, Rows, open_text};

/// Records of a CSV file with a header row, values as strings.
pub(crate) fn csv_rows(file: &Arc<Path>) -> Result<Rows, DataError> {
    let mut text = open_text(file)?;
    // The csv crate puts a record behind the `\r` of the line before, so that its line is one too low where lines end so.
    let start = text.fill_buf().map_err(|e| DataError::io(file, e))?;
    let first_line_end = start.iter().position(|b| *b == b'\n');
    let crlf = first_line_end.is_some_and(|at| start[..at].ends_with(b"\r"));
    let extra = u64::from(crlf);
    let mut reader = csv::ReaderBuilder::new().from_reader(text);
    let header = match reader.headers() {
        Ok(header) => header.clone(),
        Err(e) => return Err(csv_error(file, &e, 0)),
    };
    let mut names: Vec<String> = Vec::with_capacity(header.len());
    for name in &header {
        if names.iter().any(|n| n == name) {
            return Err(DataError::row(&Location::line(file, 1), format!("the header names column `{name}` twice")));
        }
        names.push(name.to_string());
    }
    let file = Arc::clone(file);
    let mut record = csv::StringRecord::new();
    Ok(Box::new(std::iter::from_fn(move || match reader.read_record(&mut record) {
        Ok(false) => None,
        Ok(true) => {
            let line = record.position().map_or(0, csv::Position::line) + extra;
            let fields = names
                .iter()
                .zip(record.iter())
                .map(|(name, value)| (name.clone(), Value::String(value.to_string())))
                .collect();
            Some(Ok(Row { fields, at: Location::line(&file, line) }))
        }
        Err(e) => Some(Err(csv_error(&file, &e, extra))),
    })))
}

fn csv_error(file: &Arc<Path>, e: &csv::Error, extra: u64) -> DataError {
    let line = e.position().map_or(1, |p| p.line() + extra);
    let at = Location::line(file, line);
    match e.kind() {
        csv::ErrorKind::Utf8 { .. } => {
            DataError::row(&at, "the record has bytes that are not UTF-8; save the file as UTF-8")
        }
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => DataError::row(
            &at,
            format!(
                "the record has {len} fields, the header {expected_len}; put values with a comma or a newline in double quotes"
            ),
        ),
        _ => DataError::row(&at, e.to_string()),
    }
}

/// Rows of a Parquet file. A panic inside the reader, which damaged files can provoke, comes out as an error.
pub(crate) fn parquet_rows(file: &Arc<Path>) -> Result<Rows, DataError> {
    let handle = File::open(file).map_err(|e| DataError::io(file, e))?;
    let opened = catch_unwind(AssertUnwindSafe(|| {
        SerializedFileReader::new(handle).map(|reader| {
            let rows = reader.metadata().file_metadata().num_rows();
            (RowIter::from_file_into(Box::new(reader)), rows)
        })
    }));
    let (mut rows, expected) = match opened {
        Ok(Ok(opened)) => opened,
        Ok(Err(e)) => {
            return Err(DataError::file(file, format!("not a readable Parquet file: {e}")));
        }
        Err(_) => {
            return Err(DataError::file(file, "not a readable Parquet file: it is damaged"));
        }
    };
    let file = Arc::clone(file);
    let mut number = 0u64;
    Ok(Box::new(std::iter::from_fn(move || {
        let next = catch_unwind(AssertUnwindSafe(|| rows.next()));
        let at = Location::row(&file, number + 1);
        match next {
            Ok(None) if i64::try_from(number).is_ok_and(|n| n < expected) => {
                number = u64::MAX;
                Some(Err(DataError::row(&at, format!("the Parquet file ends here, {expected} rows were promised"))))
            }
            Ok(None) => None,
            Ok(Some(Ok(row))) => {
                number += 1;
                let mut fields = Map::new();
                for (name, field) in row.into_columns() {
                    match parquet_value(field) {
                        Ok(value) => {
                            fields.insert(name, value);
                        }
                        Err(message) => {
                            return Some(Err(DataError::row(&at, format!("column `{name}`: {message}"))));
                        }
                    }
                }
                Some(Ok(Row { fields, at }))
            }
            Ok(Some(Err(e))) => Some(Err(DataError::row(&at, format!("unreadable Parquet row: {e}")))),
            Err(_) => Some(Err(DataError::row(&at, "unreadable Parquet row: the file is damaged"))),
        }
    })))
}

fn parquet_value(field: Field) -> Result<Value, String> {
    let float = |x: f64| Number::from_f64(x).map_or(Value::Null, Value::Number);
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(b) => Value::Bool(b),
        Field::Byte(n) => n.into(),
        Field::Short(n) => n.into(),
        Field::Int(n) => n.into(),
        Field::Long(n) => n.into(),
        Field::UByte(n) => n.into(),
        Field::UShort(n) => n.into(),
        Field::UInt(n) => n.into(),
        Field::ULong(n) => n.into(),
        Field::Float16(n) => float(n.into()),
        Field::Float(n) => float(n.into()),
        Field::Double(n) => float(n),
        Field::Str(s) => Value::String(s),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(s) => Value::String(s.to_string()),
            Err(_) => return Err("bytes that are not UTF-8, expected a string".into()),
        },
        Field::Group(row) => {
            let mut fields = Map::new();
            for (name, field) in row.into_columns() {
                fields.insert(name, parquet_value(field)?);
            }
            Value::Object(fields)
        }
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().cloned().map(parquet_value).collect::<Result<_, _>>()?)
        }
        Field::MapInternal(map) => {
            let mut fields = Map::new();
            for (key, value) in map.entries() {
                let key = match key {
                    Field::Str(s) => s.clone(),
                    other => other.to_string(),
                };
                fields.insert(key, parquet_value(value.clone())?);
            }
            Value::Object(fields)
        }
        other => Value::String(other.to_string()),
    })
}
