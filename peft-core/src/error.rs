//! The error of this crate.
//!
//! Every variant's `Display` is one complete message that names the file, key or site and, where there is one, the
//! way out. Causes are part of the message, so `source()` is empty and printing an error chain repeats nothing.

use std::path::{Path, PathBuf};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in sites, target matching, adapters and weight files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error("{}", candle_message(.0))]
    Candle(candle_core::Error),
    /// The system refused to read a file or folder.
    #[error("{}: {cause}{}", path.display(), read_advice(cause))]
    Io {
        /// File or folder that was touched.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The system refused to write a file or folder; what stood there before is untouched.
    #[error("could not write {}: {cause}; {}", path.display(), write_advice(cause))]
    Write {
        /// Where the data should have gone.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A file or folder is not what it should be.
    #[error("{}: {message}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and the way out.
        message: String,
    },
    /// A key of a config has a value that cannot be used.
    #[error("`{key}`: {message}")]
    Config {
        /// The key, as written in the config.
        key: String,
        /// What is wrong with the value.
        message: String,
    },
    /// Patterns of a config that hit nothing.
    #[error("{}", join(patterns))]
    Unmatched {
        /// Each with its key and the nearest names.
        patterns: Vec<crate::select::UnmatchedPattern>,
    },
    /// An adapter's tensors are not the ones that the model and the config ask for.
    #[error("{} {mismatch}", path.display())]
    AdapterKeys {
        /// The adapter's weights.
        path: PathBuf,
        /// What is missing, unexpected, of another shape.
        mismatch: Box<crate::adapter_keys::KeyMismatch>,
    },
    /// Something is wrong at one site (module path such as `model.layers.3.self_attn.q_proj`).
    #[error("{site}: {message}")]
    Site {
        /// Path of the module.
        site: String,
        /// What is wrong there.
        message: String,
    },
    /// A tensor has another shape than expected.
    #[error("{name}: has shape {actual:?}, expected {expected:?}")]
    Shape {
        /// Name of the tensor, with its file where known.
        name: String,
        /// Shape found.
        actual: Vec<usize>,
        /// Shape wanted.
        expected: Vec<usize>,
    },
    /// A tensor holds NaN or infinity.
    #[error("{name}: {count} of {elements} values are not finite (first: {value} at index {index})")]
    NotFinite {
        /// Name of the tensor.
        name: String,
        /// How many values are NaN or infinite.
        count: usize,
        /// How many values there are.
        elements: usize,
        /// The first such value.
        value: f64,
        /// Its index in the flattened tensor.
        index: usize,
    },
    /// Another error, with the place where it happened.
    #[error("{context}: {error}")]
    Context {
        /// Site, file or step.
        context: String,
        /// What happened there.
        error: Box<Error>,
    },
    /// Any other message.
    #[error("{0}")]
    Message(String),
}

impl Error {
    /// Reading `path` failed.
    pub fn io(path: impl AsRef<Path>, cause: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), cause }
    }

    /// Writing `path` failed.
    pub fn write(path: impl AsRef<Path>, cause: std::io::Error) -> Self {
        Self::Write { path: path.as_ref().to_owned(), cause }
    }

    /// The contents of `path` are wrong.
    pub fn file(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::File { path: path.as_ref().to_owned(), message: message.into() }
    }

    /// The value of config key `key` is wrong.
    pub fn config(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Config { key: key.into(), message: message.into() }
    }

    /// Something is wrong at module `site`.
    pub fn site(site: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Site { site: site.into(), message: message.into() }
    }

    /// A message without a place; name the place with [`Context::context`].
    pub fn msg(message: impl Into<String>) -> Self {
        Self::Message(message.into())
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Candle(error)
    }
}

impl From<Error> for candle_core::Error {
    /// For code that runs inside candle's custom operations.
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::Msg(other.to_string()),
        }
    }
}

/// Names the site, file or step on any error that becomes an [`Error`].
pub trait Context<T> {
    /// Puts `context` in front of the message.
    fn context(self, context: impl Into<String>) -> Result<T>;
    /// Puts what `context` returns in front of the message; only called on an error.
    fn with_context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, context: impl Into<String>) -> Result<T> {
        self.with_context(|| context)
    }

    fn with_context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|error| Error::Context { context: context().into(), error: Box::new(error.into()) })
    }
}

fn join<T: std::fmt::Display>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// candle's message without the backtrace that it appends when `RUST_BACKTRACE` is set.
fn candle_message(error: &candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => candle_message(inner),
        candle_core::Error::Context { inner, context } => {
            format!("{context}: {}", candle_message(inner))
        }
        candle_core::Error::WithPath { inner, path } => {
            format!("{}: {}", path.display(), candle_message(inner))
        }
        other => other.to_string(),
    }
}

fn read_advice(cause: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match cause.kind() {
        ErrorKind::PermissionDenied => "; check the file's permissions",
        _ => "",
    }
}

fn write_advice(cause: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match cause.kind() {
        ErrorKind::StorageFull => {
            "the disk is full: free some space or choose another output folder; what was there before is unchanged"
        }
        ErrorKind::QuotaExceeded => {
            "the disk quota is used up: free some space or choose another output folder; what was there before is unchanged"
        }
        ErrorKind::FileTooLarge => "the file system does not take files of this size: choose another output folder",
        ErrorKind::ReadOnlyFilesystem => "the file system is read-only: choose another output folder",
        ErrorKind::PermissionDenied => {
            "no permission to write there: choose another output folder or change its permissions"
        }
        ErrorKind::NotFound => "the parent folder does not exist",
        ErrorKind::NotADirectory => "a part of the path is a file, not a folder",
        ErrorKind::IsADirectory => "a folder stands where the file should go",
        _ => "what was there before is unchanged",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn messages_are_single_and_complete() {
        let full = Error::write("/out/a", std::io::Error::from_raw_os_error(28)).to_string();
        assert!(full.starts_with("could not write /out/a: ") && full.contains("the disk is full"), "{full}");
        let read_only = Error::write("/out/a", std::io::Error::from_raw_os_error(30)).to_string();
        assert!(read_only.contains("read-only: choose another"), "{read_only}");

        let nested: Result<()> = Err(Error::config("r", "must be positive")).context("adapter math");
        let nested = nested.unwrap_err();
        assert_eq!(nested.to_string(), "adapter math: `r`: must be positive");
        assert!(std::error::Error::source(&nested).is_none());
    }

    #[test]
    fn candle_errors_lose_their_backtrace_and_keep_their_context() {
        let tensor = candle_core::Tensor::zeros((2, 3), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        let error = tensor.matmul(&tensor).map_err(|e| e.bt()).context("model.layers.0.mlp").unwrap_err().to_string();
        assert!(error.starts_with("model.layers.0.mlp: "), "{error}");
        assert!(!error.contains('\n'), "{error}");
        let back: candle_core::Error = Error::site("a.b", "bad").into();
        assert_eq!(candle_message(&back), "a.b: bad");
    }
}
