//! What can go wrong between a spec and a file on disk.

use std::io;
use std::path::{Path, PathBuf};

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, HubError>;

/// Why a model or an adapter could not be found or fetched. Every message names the file, repository or address.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The spec is neither a path that exists nor shaped like a hub id.
    #[error("{spec}: no such folder, and not a hub id (org/name[@revision]){hint}")]
    NoSuchFolder {
        /// The spec as given.
        spec: String,
        /// Empty, or `; did you mean …?`.
        hint: String,
    },
    /// A path exists, but does not hold what was asked for.
    #[error("{}: {why}", path.display())]
    Unsuitable {
        /// The folder or file.
        path: PathBuf,
        /// What is missing, and what to give instead.
        why: String,
    },
    /// The hub knows no such repository (or shows it only to others).
    #[error("{repo}: no such repository on {endpoint}, and no folder of that name here; a private one needs HF_TOKEN")]
    NoSuchRepo {
        /// `org/name`.
        repo: String,
        /// The hub's address.
        endpoint: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error("{repo} has no revision `{revision}` on {endpoint}; give a branch, a tag or a full commit hash")]
    NoSuchRevision {
        /// `org/name`.
        repo: String,
        /// What stood after the `@`.
        revision: String,
        /// The hub's address.
        endpoint: String,
    },
    /// The repository lacks a file that is needed.
    #[error("{repo}@{revision} holds no {file}{hint}")]
    MissingFile {
        /// `org/name`.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// The missing file.
        file: String,
        /// Empty, or `; …` with the way out.
        hint: String,
    },
    /// The hub answered 401 or 403.
    #[error("{endpoint} refuses {repo} (HTTP {status}): {why}")]
    Refused {
        /// `org/name`.
        repo: String,
        /// The hub's address.
        endpoint: String,
        /// 401 or 403.
        status: u16,
        /// What to do about it.
        why: String,
    },
    /// Any other unwelcome HTTP status.
    #[error("{url}: HTTP {status}{hint}")]
    Status {
        /// The address asked.
        url: String,
        /// The HTTP status.
        status: u16,
        /// Empty, or `; …` with the way out.
        hint: String,
    },
    /// No connection, or none that lasted.
    #[error(
        "{url}: {why}; check the network, HF_ENDPOINT and proxies, or use an earlier download with HF_HUB_OFFLINE=1"
    )]
    Connection {
        /// The address asked.
        url: String,
        /// What the network said.
        why: String,
    },
    /// The body ended early more often than the retries allow.
    #[error(
        "{file}: the download broke off at {have} of {size} bytes ({why}); run the same command again to go on from there"
    )]
    Truncated {
        /// The file within the repository.
        file: String,
        /// Bytes on disk.
        have: u64,
        /// Bytes announced, or `?`.
        size: String,
        /// What the last try ended with.
        why: String,
    },
    /// What arrived is not what the hub announced.
    #[error("{file}: what {endpoint} sent is damaged ({why}); it was discarded, try again")]
    Corrupt {
        /// The file within the repository.
        file: String,
        /// The hub's address.
        endpoint: String,
        /// Which check failed.
        why: String,
    },
    /// The server does not speak the hub's protocol.
    #[error("{url}: not a Hugging Face hub's answer ({why}); check HF_ENDPOINT")]
    Protocol {
        /// The address asked.
        url: String,
        /// What was wrong.
        why: String,
    },
    /// `HF_HUB_OFFLINE` is set and the cache lacks something.
    #[error(
        "{repo}@{revision}: offline (HF_HUB_OFFLINE), and the cache {} holds no {missing}; unset HF_HUB_OFFLINE to download it",
        cache.display()
    )]
    Offline {
        /// `org/name`.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// The file, or the whole repository.
        missing: String,
        /// The cache's folder.
        cache: PathBuf,
    },
    /// The disk (or the quota) is full.
    #[error(
        "{}: no space left on the disk{need}; free some, or point HF_HOME at another disk; what has arrived is kept",
        path.display()
    )]
    DiskFull {
        /// The file being written.
        path: PathBuf,
        /// Empty, or how many bytes are still missing.
        need: String,
    },
    /// An environment variable or option holds something unusable.
    #[error("{name}: {why}")]
    Setting {
        /// The variable's name.
        name: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Reading or writing a file failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl HubError {
    /// An error while reading or writing `path`; a full disk has its own message.
    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { path: path.to_owned(), need: String::new() }
            }
            _ => Self::Io { path: path.to_owned(), source },
        }
    }

    /// Whether the hub could not be reached at all, so that an earlier download may stand in for it.
    pub(crate) fn is_unreachable(&self) -> bool {
        match self {
            Self::Connection { .. } => true,
            Self::Status { status, .. } => *status >= 500,
            _ => false,
        }
    }
}
