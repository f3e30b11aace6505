//! Rows from `.jsonl`, `.json`, `.csv`, `.parquet` and `.txt` files, folders of them, and mixtures.
//!
//! - `.jsonl`: one object a line; blank lines are skipped.
//! - `.json`: an array of objects, or an object whose `data` is one. Several objects one after another are read as JSON lines.
//! - `.csv`: a header row, then records; all values are strings.
//! - `.parquet`: the columns' own types; bytes that are UTF-8 count as strings.
//! - `.txt`: one row `{"text": line}` a line, as `load_dataset("text")` of Hugging Face datasets reads it, except that blank
//!   lines, which have nothing to learn, are skipped.
//!
//! Text is UTF-8; a byte order mark at the start and CRLF line ends are accepted.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::{DataError, Location, nearest};
use super::structured;

/// One row: columns in file order, and where it stands.
#[derive(Clone, Debug)]
pub struct Row {
    /// Columns.
    pub fields: Map<String, Value>,
    /// File and line.
    pub at: Location,
}

/// Iterator over the rows of one file.
pub(crate) type Rows = Box<dyn Iterator<Item = Result<Row, DataError>>>;

/// What a recipe's `data.train` names: a path, or a list of `{path, weight}`.
#[derive(Clone, Debug, PartialEq)]
pub enum DataSpec {
    /// A file, or a folder of files.
    Path(PathBuf),
    /// Several of them, each with its share of an epoch.
    Mixture(Vec<MixturePart>),
}

/// One part of a mixture.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixturePart {
    /// A file, or a folder of files.
    pub path: PathBuf,
    /// Relative share of the rows of an epoch. If no part has one, every row is taken once an epoch; if some have, the
    /// others count as 1.
    #[serde(default)]
    pub weight: Option<f64>,
}

impl<'de> Deserialize<'de> for DataSpec {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = DataSpec;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a path, or a list of {path, weight}")
            }
            fn visit_str<E: serde::de::Error>(self, v: &str) -> Result<DataSpec, E> {
                Ok(DataSpec::Path(v.into()))
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<DataSpec, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(DataSpec::Mixture(parts))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl From<&Path> for DataSpec {
    fn from(path: &Path) -> Self {
        Self::Path(path.to_path_buf())
    }
}

impl DataSpec {
    /// The parts with their weights; no weights where rows are simply taken once.
    ///
    /// # Errors
    /// An empty list, and weights that are not finite and above zero.
    pub fn parts(&self) -> Result<(Vec<&Path>, Option<Vec<f64>>), DataError> {
        match self {
            Self::Path(path) => Ok((vec![path], None)),
            Self::Mixture(parts) if parts.is_empty() => {
                Err(DataError::Config("the data mixture is empty; it takes a list of {path, weight}".into()))
            }
            Self::Mixture(parts) => {
                if let Some(bad) = parts.iter().find(|p| p.weight.is_some_and(|w| !w.is_finite() || w <= 0.0)) {
                    return Err(DataError::Config(format!(
                        "weight {} of {} in the data mixture: weights are numbers above 0",
                        bad.weight.unwrap_or_default(),
                        bad.path.display()
                    )));
                }
                let weights = parts
                    .iter()
                    .any(|p| p.weight.is_some())
                    .then(|| parts.iter().map(|p| p.weight.unwrap_or(1.0)).collect());
                Ok((parts.iter().map(|p| p.path.as_path()).collect(), weights))
            }
        }
    }
}

const EXTENSIONS: [&str; 5] = ["jsonl", "json", "csv", "parquet", "txt"];

fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// The data files that a path stands for: itself, or, of a folder, its data files sorted by name (not those of folders in it).
///
/// # Errors
/// A path that does not exist (with the nearest name beside it), another file type, a folder without data files.
pub fn data_files(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    let accepted = "expected .jsonl, .json, .csv, .parquet, .txt, or a folder of them";
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(DataError::file(path, format!("no such file or folder{}", sibling_hint(path))));
        }
        Err(e) => return Err(DataError::io(path, e)),
    };
    if !meta.is_dir() {
        if !EXTENSIONS.contains(&extension(path).as_str()) {
            return Err(DataError::file(path, format!("`{}` is no data file type; {accepted}", extension(path))));
        }
        return Ok(vec![path.to_path_buf()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|e| DataError::io(path, e))? {
        let file = entry.map_err(|e| DataError::io(path, e))?.path();
        if file.is_file() && EXTENSIONS.contains(&extension(&file).as_str()) {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(DataError::file(path, format!("no data file in this folder; {accepted}")));
    }
    files.sort();
    Ok(files)
}

fn sibling_hint(path: &Path) -> String {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let siblings: Vec<String> = std::fs::read_dir(folder)
        .map(|entries| entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    nearest(&name, siblings.iter().map(String::as_str)).map(|n| format!("; did you mean `{n}`?")).unwrap_or_default()
}

/// Opens one data file and reads its rows in order. The iterator ends after the first error.
///
/// # Errors
/// See [`data_files`]; the iterator yields malformed rows, and a file without any row, as errors with file and line.
pub fn read_rows(path: &Path) -> Result<impl Iterator<Item = Result<Row, DataError>> + use<>, DataError> {
    let file: Arc<Path> = Arc::from(path);
    let rows: Rows = match extension(path).as_str() {
        "jsonl" => Box::new(json_lines(Lines::open(&file)?)),
        "txt" => Box::new(text_lines(Lines::open(&file)?)),
        "json" => json_file(&file)?,
        "csv" => structured::csv_rows(&file)?,
        "parquet" => structured::parquet_rows(&file)?,
        other => {
            return Err(DataError::file(path, format!("`{other}` is no data file type")));
        }
    };
    let mut rows = rows;
    let mut seen = false;
    let mut over = false;
    Ok(std::iter::from_fn(move || {
        if over {
            return None;
        }
        match rows.next() {
            Some(Ok(row)) => {
                seen = true;
                Some(Ok(row))
            }
            Some(Err(e)) => {
                over = true;
                Some(Err(e))
            }
            None => {
                over = true;
                (!seen).then(|| Err(DataError::row(&Location::line(&file, 1), "the file is empty: it has no row")))
            }
        }
    }))
}

/// Opens a text file for reading, past its byte order mark if it has one.
pub(crate) fn open_text(file: &Arc<Path>) -> Result<BufReader<File>, DataError> {
    let handle = File::open(file).map_err(|e| DataError::io(file, e))?;
    let mut reader = BufReader::with_capacity(1 << 16, handle);
    let start = reader.fill_buf().map_err(|e| DataError::io(file, e))?;
    if start.starts_with(&[0xff, 0xfe]) || start.starts_with(&[0xfe, 0xff]) {
        return Err(DataError::row(
            &Location::line(file, 1),
            "the file is UTF-16 text; expected UTF-8 (save it again as UTF-8)",
        ));
    }
    if start.starts_with(&[0xef, 0xbb, 0xbf]) {
        reader.consume(3);
    }
    Ok(reader)
}

struct Lines {
    file: Arc<Path>,
    reader: BufReader<File>,
    number: u64,
}

impl Lines {
    fn open(file: &Arc<Path>) -> Result<Self, DataError> {
        Ok(Self { file: Arc::clone(file), reader: open_text(file)?, number: 0 })
    }
}

impl Iterator for Lines {
    type Item = Result<(Location, String), DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Vec::new();
        match self.reader.read_until(b'\n', &mut line) {
            Err(e) => return Some(Err(DataError::io(&self.file, e))),
            Ok(0) => return None,
            Ok(_) => {}
        }
        self.number += 1;
        let at = Location::line(&self.file, self.number);
        if line.last() == Some(&b'\n') {
            line.pop();
            if line.last() == Some(&b'\r') {
                line.pop();
            }
        }
        Some(match String::from_utf8(line) {
            Ok(text) => Ok((at, text)),
            Err(e) => {
                let column = e.utf8_error().valid_up_to() + 1;
                Err(DataError::row(&at, format!("byte {column} of the line is not UTF-8; save the file as UTF-8")))
            }
        })
    }
}

fn text_lines(lines: Lines) -> impl Iterator<Item = Result<Row, DataError>> {
    lines.filter(|l| !matches!(l, Ok((_, text)) if text.trim().is_empty())).map(|line| {
        line.map(|(at, text)| {
            let mut fields = Map::new();
            fields.insert("text".into(), Value::String(text));
            Row { fields, at }
        })
    })
}

fn json_lines(lines: Lines) -> impl Iterator<Item = Result<Row, DataError>> {
    lines
        .filter(|l| !matches!(l, Ok((_, text)) if text.trim().is_empty()))
        .map(|line| line.and_then(|(at, text)| json_row(&text, at)))
}

fn json_row(text: &str, at: Location) -> Result<Row, DataError> {
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Object(fields)) => Ok(Row { fields, at }),
        Ok(other) => Err(DataError::row(
            &at,
            format!("expected an object such as {{\"text\": \"…\"}}, found {}", kind_of(&other)),
        )),
        Err(e) => Err(DataError::row(&at, format!("malformed JSON, expected one object: {}", json_reason(&e)))),
    }
}

/// serde_json's message with the column only: the line is said by us.
fn json_reason(e: &serde_json::Error) -> String {
    let message = e.to_string();
    let reason = message.split(" at line ").next().unwrap_or(&message);
    format!("{reason} (column {})", e.column())
}

fn json_file(file: &Arc<Path>) -> Result<Rows, DataError> {
    let mut bytes = Vec::new();
    open_text(file)?.read_to_end(&mut bytes).map_err(|e| DataError::io(file, e))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let before = e.as_bytes().get(..e.utf8_error().valid_up_to()).unwrap_or_default();
        let line = 1 + before.iter().filter(|b| **b == b'\n').count() as u64;
        DataError::row(&Location::line(file, line), "the line has bytes that are not UTF-8; save the file as UTF-8")
    })?;
    if text.trim().is_empty() {
        return Ok(Box::new(std::iter::empty()));
    }

    #[derive(Deserialize)]
    struct Wrapped<'a> {
        #[serde(borrow)]
        data: Option<Vec<&'a serde_json::value::RawValue>>,
    }
    let parsed = if text.trim_start().starts_with('{') {
        serde_json::from_str::<Wrapped<'_>>(&text).map(|w| w.data)
    } else {
        serde_json::from_str::<Vec<&serde_json::value::RawValue>>(&text).map(Some)
    };
    match parsed {
        Ok(Some(elements)) => {
            // Elements are slices of `text`, so their line is the count of newlines before them.
            let (mut line, mut position) = (1u64, 0usize);
            let base = text.as_ptr() as usize;
            let mut rows = Vec::with_capacity(elements.len());
            for element in elements {
                let start = (element.get().as_ptr() as usize).saturating_sub(base);
                let between = text.as_bytes().get(position..start).unwrap_or_default();
                line += between.iter().filter(|b| **b == b'\n').count() as u64;
                position = start;
                rows.push(json_row(element.get(), Location::line(file, line)));
            }
            Ok(Box::new(rows.into_iter()))
        }
        Ok(None) => Err(DataError::row(
            &Location::line(file, 1),
            "expected an array of rows, or an object whose `data` is one (JSON lines belong in a .jsonl file)",
        )),
        Err(e) if e.to_string().starts_with("trailing characters") && text.trim_start().starts_with('{') => {
            Ok(Box::new(json_lines(Lines::open(file)?)))
        }
        Err(e) => Err(DataError::row(
            &Location::line(file, e.line() as u64),
            format!("malformed JSON, expected an array of rows, or an object whose `data` is one: {}", json_reason(&e)),
        )),
    }
}

/// The JSON type of a value, for messages.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

impl Row {
    /// The names of the columns, for messages.
    pub(crate) fn columns(&self) -> String {
        if self.fields.is_empty() {
            return "no columns".into();
        }
        let names: Vec<String> = self.fields.keys().take(12).map(|k| format!("`{k}`")).collect();
        let more = if self.fields.len() > names.len() { ", …" } else { "" };
        format!("{}{more}", names.join(", "))
    }

    /// A column that must be there.
    pub(crate) fn required(&self, name: &str) -> Result<&Value, DataError> {
        self.fields.get(name).ok_or_else(|| {
            let hint = nearest(name, self.fields.keys().map(String::as_str))
                .map(|n| format!("; did you mean `{n}`?"))
                .unwrap_or_default();
            DataError::row(&self.at, format!("column `{name}` is missing, the row has {}{hint}", self.columns()))
        })
    }

    /// A column that must be there and hold a string.
    pub(crate) fn string(&self, name: &str) -> Result<&str, DataError> {
        match self.required(name)? {
            Value::String(s) => Ok(s),
            other => Err(self.wrong_type(name, "a string", other)),
        }
    }

    pub(crate) fn wrong_type(&self, name: &str, expected: &str, found: &Value) -> DataError {
        DataError::row(&self.at, format!("column `{name}`: expected {expected}, found {}", kind_of(found)))
    }
}
