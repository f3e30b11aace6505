//! What an adapter is, by its contents.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::SystemTime;

use candle_core::DType;
use peft_core::{Adapter, Error, Result};
use sha2::{Digest, Sha256};

/// SHA-256 of an adapter's files, or of its config and tensors where it has no files.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentHash([u8; 32]);

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Endings of the files that adapters are made of, whosever they are. What training writes beside them does not change one.
const ENDINGS: [&str; 5] = ["json", "safetensors", "bin", "pt", "npz"];

/// Name, length, time of the last change and number of each file of an adapter: equal while nobody has written to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fingerprint(Vec<(String, u64, Option<SystemTime>, u64)>);

impl Fingerprint {
    /// That of a folder.
    pub(crate) fn of(folder: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
            let path = entry.map_err(|e| Error::io(folder, e))?.path();
            let counts = path.extension().and_then(|e| e.to_str()).is_some_and(|e| ENDINGS.contains(&e));
            let (true, Some(name)) = (counts, path.file_name().and_then(|n| n.to_str())) else { continue };
            let about = std::fs::metadata(&path).map_err(|e| Error::io(&path, e))?;
            if about.is_file() {
                files.push((name.to_owned(), about.len(), about.modified().ok(), inode(&about)));
            }
        }
        files.sort();
        Ok(Self(files))
    }

    /// The hash of the folder's files.
    pub(crate) fn hash(&self, folder: &Path) -> Result<ContentHash> {
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 18];
        for (name, length, ..) in &self.0 {
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name);
            hash.update(length.to_le_bytes());
            let path = folder.join(name);
            let mut file = File::open(&path).map_err(|e| Error::io(&path, e))?;
            loop {
                let n = file.read(&mut buffer).map_err(|e| Error::io(&path, e))?;
                match buffer.get(..n) {
                    Some(bytes) if n > 0 => hash.update(bytes),
                    _ => break,
                }
            }
        }
        Ok(ContentHash(hash.finalize().into()))
    }
}

#[cfg(unix)]
fn inode(about: &std::fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(about)
}

#[cfg(not(unix))]
fn inode(_: &std::fs::Metadata) -> u64 {
    0
}

/// The hash of an adapter that has no files: of its config and the values of its tensors.
pub(crate) fn hash_of(adapter: &Adapter) -> Result<ContentHash> {
    let mut hash = Sha256::new();
    hash.update(serde_json::to_vec(&adapter.config).map_err(|e| Error::msg(e.to_string()))?);
    for (name, tensor) in adapter.tensors() {
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        hash.update(format!("{:?}{:?}", tensor.dtype(), tensor.dims()));
        for value in tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()? {
            hash.update(value.to_le_bytes());
        }
    }
    Ok(ContentHash(hash.finalize().into()))
}
