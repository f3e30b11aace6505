//! Where a row comes from, and what can be wrong with it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The place of a row: `reviews.jsonl:12`, or `reviews.parquet:row 12` where a file has no lines. Counted from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The file, as it was named or found in a folder.
    pub file: Arc<Path>,
    /// Line (or row) number, from 1.
    pub number: u64,
    /// True for line-based files.
    pub is_line: bool,
}

impl Location {
    /// A line of a text file.
    pub fn line(file: &Arc<Path>, number: u64) -> Self {
        Self { file: Arc::clone(file), number, is_line: true }
    }

    /// A row of a file without lines (Parquet).
    pub fn row(file: &Arc<Path>, number: u64) -> Self {
        Self { file: Arc::clone(file), number, is_line: false }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = if self.is_line { "" } else { "row " };
        write!(f, "{}:{unit}{}", self.file.display(), self.number)
    }
}

/// What stops rows from becoming batches. Messages name file and line, what was expected, and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file as a whole is not what it should be.
    #[error("{}: {message}", path.display())]
    File {
        /// File or folder.
        path: PathBuf,
        /// What was expected and found.
        message: String,
    },
    /// One row is not what it should be.
    #[error("{at}: {message}")]
    Row {
        /// File and line.
        at: Location,
        /// What was expected and found.
        message: String,
    },
    /// A format name that does not exist.
    #[error("unknown data format `{name}`{hint}; formats are {known}")]
    UnknownFormat {
        /// As given.
        name: String,
        /// `; did you mean …?`, or empty.
        hint: String,
        /// All names.
        known: String,
    },
    /// A setting that can't be honoured.
    #[error("{0}")]
    Config(String),
}

impl DataError {
    pub(crate) fn row(at: &Location, message: impl Into<String>) -> Self {
        Self::Row { at: at.clone(), message: message.into() }
    }

    pub(crate) fn file(path: &Path, message: impl Into<String>) -> Self {
        Self::File { path: path.to_path_buf(), message: message.into() }
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }
}

/// The known name nearest to `name`, if it is near enough to be a slip of the pen.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|k| (strsim::jaro_winkler(&name.to_lowercase(), k), k))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}
