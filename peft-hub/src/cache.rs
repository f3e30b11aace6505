//! The cache on disk, in the layout that huggingface_hub (Python) and hf-hub share:
//! `models--org--name/{blobs/<etag>, snapshots/<commit>/<file> -> ../../blobs/<etag>, refs/<revision>}`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use hf_hub::{Cache as HubCache, CacheRepo, Repo, RepoType};

use crate::error::{HubError, Result};
use crate::options::Options;
use crate::spec::HubId;

/// One repository's part of the cache.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
    layout: CacheRepo,
    /// The whole cache's folder, for messages.
    pub(crate) root: PathBuf,
}

/// Whether `text` is a full commit hash (SHA-1 or SHA-256 in hex).
pub(crate) fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

impl Cache {
    /// The place of a repository; nothing is created.
    pub(crate) fn of(id: &HubId, options: &Options) -> Result<Self> {
        let root = options.cache.clone().ok_or_else(|| HubError::Setting {
            name: "HF_HOME",
            why: "neither it nor HOME is set, so there is no place for downloads; set one of them".to_owned(),
        })?;
        let repo = Repo::new(id.repo.clone(), RepoType::Model);
        Ok(Self { folder: root.join(repo.folder_name()), layout: HubCache::new(root.clone()).repo(repo), root })
    }

    /// Where the file of that content lies, or will.
    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.layout.blob_path(etag)
    }

    /// The folder in which a commit's files stand under their own names.
    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.layout.pointer_path(commit)
    }

    /// The commit that a revision stood for when it was last downloaded.
    pub(crate) fn commit_of(&self, revision: &str) -> Option<String> {
        let commit = match fs::read_to_string(self.folder.join("refs").join(revision)) {
            Ok(text) => text.trim().to_owned(),
            Err(_) => revision.to_owned(),
        };
        (is_commit(&commit) && self.snapshot(&commit).is_dir()).then_some(commit)
    }

    /// Remember what a revision stands for. Done last, so that a remembered commit is a complete one.
    pub(crate) fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        let path = self.folder.join("refs").join(revision);
        if fs::read_to_string(&path).is_ok_and(|known| known == commit) {
            return Ok(());
        }
        replace(&path, |temporary| fs::write(temporary, commit))
    }

    /// Let `snapshots/<commit>/<file>` stand for a blob.
    pub(crate) fn link(&self, etag: &str, commit: &str, file: &str) -> Result<()> {
        let up = "../".repeat(2 + file.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{etag}"));
        let blob = self.blob(etag);
        replace(&self.snapshot(commit).join(file), |temporary| symlink(&target, &blob, temporary))
    }
}

/// A symlink where the system has them, else a second name or a copy.
fn symlink(target: &Path, blob: &Path, link: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        let _ = blob;
        std::os::unix::fs::symlink(target, link)
    }
    #[cfg(not(unix))]
    {
        let _ = target;
        fs::hard_link(blob, link).or_else(|_| fs::copy(blob, link).map(|_| ()))
    }
}

/// Tells the temporary files of one process apart.
static TURN: AtomicU64 = AtomicU64::new(0);

/// Make a file under a temporary name beside `path`, then move it there in one step.
fn replace(path: &Path, make: impl Fn(&Path) -> std::io::Result<()>) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(|source| HubError::io(parent, source))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let turn = TURN.fetch_add(1, Ordering::Relaxed);
    let temporary = parent.join(format!(".{name}.{}.{turn}", std::process::id()));
    let _ = fs::remove_file(&temporary); // left by a killed process of the same id
    make(&temporary).and_then(|()| fs::rename(&temporary, path)).map_err(|source| {
        let _ = fs::remove_file(&temporary);
        HubError::io(path, source)
    })
}
