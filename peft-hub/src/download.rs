//! One file from the hub into the cache: locked, resumed, checked, then named.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::cache::Cache;
use crate::client::{Client, Metadata};
use crate::error::{HubError, Result};
use crate::options::Event;
use crate::spec::HubId;

const BUFFER: usize = 256 << 10;

/// Have `file` of `commit` in the cache; returns its path in the snapshot.
pub(crate) fn fetch(client: &Client<'_>, cache: &Cache, id: &HubId, commit: &str, file: &str) -> Result<PathBuf> {
    let path = cache.snapshot(commit).join(file);
    if path.is_file() {
        return Ok(path);
    }
    let metadata = client.metadata(id, commit, file)?;
    let blob = cache.blob(&metadata.etag);
    if !blob.is_file() {
        let folder = blob.parent().unwrap_or(&blob);
        std::fs::create_dir_all(folder).map_err(|source| HubError::io(folder, source))?;
        let _lock = lock(client, &folder.join(format!("{}.lock", metadata.etag)), file)?;
        if !blob.is_file() {
            let mut transfer = Transfer {
                client,
                id,
                commit,
                file,
                metadata: &metadata,
                part: folder.join(format!("{}.part", metadata.etag)),
            };
            transfer.run()?;
            std::fs::rename(&transfer.part, &blob).map_err(|source| HubError::io(&blob, source))?;
        }
    }
    cache.link(&metadata.etag, commit, file)?;
    Ok(path)
}

/// Hold a lock file until dropped, waiting for a process that has it.
fn lock(client: &Client<'_>, path: &Path, file: &str) -> Result<File> {
    let io = |source| HubError::io(path, source);
    let lock = File::create(path).map_err(io)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            client
                .options
                .tell(Event::Note { message: &format!("{file}: waiting for another process that is downloading it") });
            lock.lock().map_err(io)?;
        }
        // A file system without locks: two processes may then download the same file, each checking what it got.
        Err(TryLockError::Error(_)) => {}
    }
    Ok(lock)
}

struct Transfer<'a> {
    client: &'a Client<'a>,
    id: &'a HubId,
    commit: &'a str,
    file: &'a str,
    metadata: &'a Metadata,
    part: PathBuf,
}

/// How one try ended.
enum Try {
    Complete,
    /// The stream ended early; what has arrived is in the part file.
    Broken(String),
    /// The part file is of no use.
    Useless(&'static str),
}

impl Transfer<'_> {
    /// Fill the part file and check it, resuming as often as the options allow.
    fn run(&mut self) -> Result<()> {
        let mut tries = 0;
        let mut restarted = false;
        loop {
            let why = match self.attempt()? {
                Try::Complete => match self.damage()? {
                    None => {
                        self.client.options.tell(Event::Done { file: self.file });
                        return Ok(());
                    }
                    Some(why) => Try::Useless(why),
                },
                other => other,
            };
            match why {
                Try::Useless(why) => {
                    let _ = std::fs::remove_file(&self.part);
                    if restarted {
                        return Err(HubError::Corrupt {
                            file: self.file.to_owned(),
                            endpoint: self.client.options.endpoint.clone(),
                            why: why.to_owned(),
                        });
                    }
                    restarted = true; // once from the first byte: the part may have been an old one
                }
                Try::Broken(why) if tries >= self.client.options.retries => {
                    return Err(HubError::Truncated {
                        file: self.file.to_owned(),
                        have: self.have(),
                        size: self.metadata.size.map_or("?".to_owned(), |size| size.to_string()),
                        why,
                    });
                }
                Try::Broken(why) => {
                    self.client.wait(tries, &format!("{}: {why}", self.file));
                    tries += 1;
                }
                Try::Complete => {}
            }
        }
    }

    /// Bytes in the part file.
    fn have(&self) -> u64 {
        std::fs::metadata(&self.part).map_or(0, |metadata| metadata.len())
    }

    fn attempt(&self) -> Result<Try> {
        let size = self.metadata.size;
        let mut have = self.have();
        if size.is_some_and(|size| have > size) {
            return Ok(Try::Useless("longer than announced"));
        }
        let mut part = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&self.part)
            .map_err(|source| HubError::io(&self.part, source))?;
        if size == Some(have) {
            return Ok(Try::Complete);
        }
        let bytes = match self.client.bytes(self.id, self.commit, self.file, have) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(Try::Useless("the server has no such range")),
            // Refused at the first byte there is no use in trying again; later, the line may come back.
            Err(HubError::Connection { why, .. }) if have > 0 => return Ok(Try::Broken(why)),
            Err(error) => return Err(error),
        };
        if bytes.start != have {
            part.set_len(0).map_err(|source| HubError::io(&self.part, source))?;
            have = 0;
        }
        self.client.options.tell(Event::Start { file: self.file, size, have });
        self.copy(bytes.reader, &mut part, have)
    }

    fn copy(&self, mut reader: impl Read, part: &mut File, mut have: u64) -> Result<Try> {
        let size = self.metadata.size;
        let mut buffer = vec![0; BUFFER];
        loop {
            let read = match reader.read(&mut buffer) {
                Ok(read) => read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Ok(Try::Broken(error.to_string())),
            };
            let Some(chunk) = buffer.get(..read).filter(|chunk| !chunk.is_empty()) else {
                break;
            };
            have = have.saturating_add(chunk.len() as u64);
            if size.is_some_and(|size| have > size) {
                return Ok(Try::Useless("longer than announced"));
            }
            part.write_all(chunk).map_err(|source| self.write_error(source, have))?;
            self.client.options.tell(Event::Advance { file: self.file, bytes: chunk.len() as u64 });
        }
        if size.is_some_and(|size| have < size) {
            return Ok(Try::Broken("the server closed the connection".to_owned()));
        }
        part.sync_all().map_err(|source| self.write_error(source, have))?;
        Ok(Try::Complete)
    }

    fn write_error(&self, source: std::io::Error, have: u64) -> HubError {
        match HubError::io(&self.part, source) {
            HubError::DiskFull { path, .. } => HubError::DiskFull {
                path,
                need: self.metadata.size.map_or(String::new(), |size| {
                    format!(" ({} more bytes of {size} needed)", size.saturating_sub(have))
                }),
            },
            other => other,
        }
    }

    /// Why a complete part file is not what was announced. Large files are named by their SHA-256; small ones by a git
    /// hash, which is not checked.
    fn damage(&self) -> Result<Option<&'static str>> {
        let etag = &self.metadata.etag;
        if etag.len() != 64 || !etag.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(None);
        }
        let io = |source| HubError::io(&self.part, source);
        let mut part = File::open(&self.part).map_err(io)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            let read = part.read(&mut buffer).map_err(io)?;
            match buffer.get(..read) {
                None | Some([]) => break,
                Some(chunk) => hash.update(chunk),
            }
        }
        let got: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok((!got.eq_ignore_ascii_case(etag)).then_some("its SHA-256 differs"))
    }
}
