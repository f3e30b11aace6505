//! Where models and adapters come from.
//!
//! A user names a model or an adapter by a *spec*: an existing folder in Hugging Face layout, a `.gguf` file, or a hub id
//! `org/name[@revision]` (`org/name/file.gguf[@revision]` for one file of a GGUF repository). [`resolve`] turns a spec
//! into a [`Location`] on this machine's disk, and downloads into the cache that Hugging Face's own tools use where it
//! has to: only the files that are needed, all from one commit, resumed where an earlier try broke off.
//!
//! ```no_run
//! use peft_hub::{Kind, Location, Options, resolve};
//!
//! match resolve("HuggingFaceTB/SmolLM2-135M@main", Kind::Model, &Options::from_env())? {
//!     Location::Folder(folder) => println!("weights and config in {}", folder.display()),
//!     Location::Gguf(file) => println!("everything in {}", file.display()),
//! }
//! # Ok::<(), peft_hub::HubError>(())
//! ```

mod cache;
mod client;
mod download;
mod error;
mod local;
mod options;
mod snapshot;
mod spec;

use std::path::{Path, PathBuf};

pub use error::{HubError, Result};
pub use options::{Event, Options, Progress};

/// What a spec is expected to name; decides which files are looked for and downloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A base model: `config.json`, safetensors weights and the tokenizer's files, or a GGUF file.
    Model,
    /// An adapter: `adapter_config.json` and PEFT's `adapter_model.safetensors`, AdapterHub's `adapter.safetensors` or mlx-lm's
    /// `adapters.safetensors`; on this machine, also a folder with one file of weights and no config (kohya's).
    Adapter,
}

impl Kind {
    pub(crate) fn noun(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Adapter => "adapter",
        }
    }
}

/// Where a model or an adapter lies on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A folder in Hugging Face layout.
    Folder(PathBuf),
    /// A single GGUF file that holds weights, config and tokenizer.
    Gguf(PathBuf),
}

impl Location {
    /// The folder or the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Folder(path) | Self::Gguf(path) => path,
        }
    }
}

/// Find what `spec` names, downloading it where it is a hub id that the cache does not hold.
///
/// An existing path always wins over a hub id of the same spelling. Without a network, or with `HF_HUB_OFFLINE`, a
/// complete earlier download is used.
///
/// # Errors
/// The spec names nothing, the path lacks a needed file, the hub refuses or cannot be reached, the download breaks more
/// often than [`Options::retries`] allows (what has arrived is kept and resumed next time), or the disk is full.
pub fn resolve(spec: &str, kind: Kind, options: &Options) -> Result<Location> {
    match spec::parse(spec)? {
        spec::Spec::Local(path) => local::check(&path, kind),
        spec::Spec::Hub(id) => snapshot::find(&id, kind, options),
    }
}
