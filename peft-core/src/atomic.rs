//! Files and folders that are either the old ones or the new ones, whatever happens while they are written.
//!
//! Data goes into a temporary sibling (`.tmp-NAME-XXXXXX`), is flushed to the disk, and is renamed into place. After
//! an error (full disk, read-only folder) the temporary is gone and the old data untouched. After a kill the
//! temporary stays; the next write of the same name removes it. A live writer holds a lock on its temporary, so
//! cleaning up never takes away another process's work.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

const TEMP: &str = ".tmp-";
const OLD: &str = ".old-";
const RANDOM_LEN: usize = 6;

/// Replaces the file `path` by `bytes`.
///
/// # Errors
/// [`Error::Write`] with the path; the old file is untouched.
pub fn write_file(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    write_file_with(path, |writer| writer.write_all(bytes))
}

/// Replaces the file `path` by what `write` produces.
///
/// # Errors
/// [`Error::Write`] with the path and what `write` or the system said; the old file is untouched.
pub fn write_file_with(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
) -> Result<()> {
    let file = AtomicFile::create(path)?;
    let mut writer = BufWriter::with_capacity(1 << 20, file.file());
    let written = write(&mut writer).and_then(|()| writer.flush());
    // A buffer that could not be written must not be tried again on drop.
    let _ = writer.into_parts();
    written.map_err(|cause| Error::write(&file.path, cause))?;
    file.commit()
}

/// A file under construction: write to [`AtomicFile::file`], then [`AtomicFile::commit`]. Dropped without a commit,
/// it leaves nothing behind.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    temp: tempfile::NamedTempFile,
}

impl AtomicFile {
    /// Starts a new version of `path`; the folder that holds it must exist.
    ///
    /// # Errors
    /// [`Error::Write`] if the folder takes no new file.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let name = file_name(&path)?;
        let fail = |cause| Error::write(&path, cause);
        let parent = parent(&path);
        let _folder = FolderLock::new(parent, &name);
        let mut builder = tempfile::Builder::new();
        let prefix = format!("{TEMP}{name}-");
        builder.prefix(&prefix).rand_bytes(RANDOM_LEN);
        #[cfg(unix)]
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        #[cfg(unix)]
        builder.permissions(permissions);
        let temp = builder.tempfile_in(parent).map_err(|error| fail(plain(error)))?;
        let _ = temp.as_file().try_lock();
        Ok(Self { path, temp })
    }

    /// The temporary file.
    pub fn file(&self) -> &File {
        self.temp.as_file()
    }

    /// Where the file will stand.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes the data to the disk and puts the file in its place.
    ///
    /// # Errors
    /// [`Error::Write`]; the old file is untouched.
    pub fn commit(self) -> Result<()> {
        let fail = |cause| Error::write(&self.path, cause);
        self.temp.as_file().sync_all().map_err(fail)?;
        self.temp.persist(&self.path).map_err(|error| fail(error.error))?;
        sync_dir(parent(&self.path)).map_err(fail)
    }
}

/// Replaces the folder `path` by what `write` puts into the folder that it is given.
///
/// Everything is flushed to the disk before the folders change places (in one step where the system can exchange two
/// names, as Linux and macOS do). Parent folders are made. Killed at any moment, `path` holds the complete old or
/// the complete new contents; on other systems call [`recover_dir`] before reading.
///
/// # Errors
/// What `write` returned, or [`Error::Write`] with the path; the old folder is untouched.
pub fn replace_dir<T, E: From<Error>>(
    path: impl AsRef<Path>,
    write: impl FnOnce(&Path) -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    let path = path.as_ref();
    // Exchange the folder that a link points at, not the link.
    let path =
        if path.is_symlink() { fs::canonicalize(path).map_err(|e| Error::io(path, e))? } else { path.to_owned() };
    let fail = |cause| Error::write(&path, cause);
    let name = file_name(&path)?;
    let parent = parent(&path);
    fs::create_dir_all(parent).map_err(fail)?;
    if path.exists() && !path.is_dir() {
        return Err(fail(io::ErrorKind::NotADirectory.into()).into());
    }
    recover_dir(&path)?;
    let (temp, _lock) = {
        let _folder = FolderLock::new(parent, &name);
        let prefix = format!("{TEMP}{name}-");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).rand_bytes(RANDOM_LEN);
        #[cfg(unix)]
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        #[cfg(unix)]
        builder.permissions(permissions);
        let temp = builder.tempdir_in(parent).map_err(|error| fail(plain(error)))?;
        let lock = File::open(temp.path()).ok();
        let _ = lock.as_ref().map(File::try_lock);
        (temp, lock)
    };
    let value = write(temp.path())?;
    sync_tree(temp.path()).map_err(fail)?;
    if path.exists() {
        exchange(temp.path(), &path, &name).map_err(fail)?;
        sync_dir(parent).map_err(fail)?;
        // What stands at the temporary's name now is the old folder; a failure here is cleaned up next time.
        let _ = temp.close();
    } else {
        fs::rename(temp.path(), &path).map_err(fail)?;
        let _ = temp.keep();
        sync_dir(parent).map_err(fail)?;
    }
    Ok(value)
}

/// Puts the old folder back if a kill fell between the two renames of [`replace_dir`] on a system that cannot exchange
/// names in one step. Does nothing otherwise.
///
/// # Errors
/// [`Error::Write`] if the old folder cannot be renamed.
pub fn recover_dir(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    if path.exists() {
        return Ok(());
    }
    let name = file_name(path)?;
    match leftovers(parent(path), OLD, &name).into_iter().next() {
        Some(old) => fs::rename(&old, path).map_err(|cause| Error::write(path, cause)),
        None => Ok(()),
    }
}

fn exchange(temp: &Path, path: &Path, name: &str) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, temp, CWD, path, RenameFlags::EXCHANGE) {
            Ok(()) => return Ok(()),
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    exchange_in_two_steps(temp, path, name)
}

fn exchange_in_two_steps(temp: &Path, path: &Path, name: &str) -> io::Result<()> {
    let random = temp.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let random: String = random.chars().rev().take(RANDOM_LEN).collect();
    let old = parent(path).join(format!("{OLD}{name}-{random}"));
    fs::rename(path, &old)?;
    if let Err(error) = fs::rename(temp, path) {
        fs::rename(&old, path)?;
        return Err(error);
    }
    let _ = fs::remove_dir_all(&old);
    Ok(())
}

/// Holds the folder's lock while a temporary is made in it, and clears out what dead writers of `name` left.
struct FolderLock(#[allow(dead_code)] Option<File>);

impl FolderLock {
    fn new(parent: &Path, name: &str) -> Self {
        // A temporary folder is locked by the one who fills it, as a sign of life, and nobody else writes there: to
        // wait for its lock would be to wait for ourselves.
        if parent.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(TEMP)) {
            return Self(None);
        }
        let Ok(folder) = File::open(parent) else { return Self(None) };
        // Without locks (some network file systems) nobody can tell the living from the dead: clean nothing.
        if folder.lock().is_err() {
            return Self(None);
        }
        for path in leftovers(parent, TEMP, name) {
            if File::open(&path).is_ok_and(|file| file.try_lock().is_ok()) {
                let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            }
        }
        if parent.join(name).exists() {
            for path in leftovers(parent, OLD, name) {
                let _ = fs::remove_dir_all(path);
            }
        }
        Self(Some(folder))
    }
}

/// Entries of `parent` called `{prefix}{name}-XXXXXX`.
fn leftovers(parent: &Path, prefix: &str, name: &str) -> Vec<PathBuf> {
    let start = format!("{prefix}{name}-");
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| {
            let entry = entry.file_name();
            let random = entry.to_str().and_then(|entry| entry.strip_prefix(&start));
            random.is_some_and(|r| r.len() == RANDOM_LEN && r.bytes().all(|b| b.is_ascii_alphanumeric()))
        })
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

fn file_name(path: &Path) -> Result<String> {
    path.file_name()
        .and_then(|name| name.to_str())
        .map(str::to_owned)
        .ok_or_else(|| Error::file(path, "is not a path that can be written; give a name in UTF-8"))
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The system's error without the temporary's name, which tempfile adds to the message.
fn plain(error: io::Error) -> io::Error {
    fn code(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
        let own = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        own.or_else(|| error.source().and_then(code))
    }
    let found = error.raw_os_error().or_else(|| error.get_ref().and_then(|inner| code(inner)));
    found.map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

fn sync_dir(path: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
}

fn sync_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_dir(path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use std::time::Duration;

    fn entries(path: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn files_are_replaced_whole_with_usual_permissions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_file(&path, b"one").unwrap();
        write_file(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(entries(dir.path()), ["a.json"]);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let reference = dir.path().join("plain");
            fs::write(&reference, b"").unwrap();
            let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode();
            assert_eq!(mode(&path), mode(&reference));
        }
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        write_file(&path, b"old").unwrap();
        let error = write_file_with(&path, |writer| {
            writer.write_all(&[1; 3000])?;
            Err(io::ErrorKind::StorageFull.into())
        })
        .unwrap_err()
        .to_string();
        assert!(error.contains("a.bin") && error.contains("the disk is full"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(entries(dir.path()), ["a.bin"]);
        let error = replace_dir(dir.path().join("d"), |temp| {
            fs::write(temp.join("x"), b"1").unwrap();
            Err::<(), _>(Error::msg("stop"))
        })
        .unwrap_err();
        assert_eq!(error.to_string(), "stop");
        assert_eq!(entries(dir.path()), ["a.bin"]);
    }

    #[test]
    fn impossible_places_are_named_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let error = write_file(dir.path().join("no/such/a"), b"").unwrap_err().to_string();
        assert!(error.contains("no/such/a") && error.contains("parent folder does not exist"), "{error}");
        assert!(!error.contains(".tmp-"), "{error}");
        fs::write(dir.path().join("f"), b"").unwrap();
        let error = write_file(dir.path().join("f/a"), b"").unwrap_err().to_string();
        assert!(error.contains("a part of the path is a file"), "{error}");
        let error = replace_dir(dir.path().join("f"), |_| Ok::<_, Error>(())).unwrap_err().to_string();
        assert!(error.contains("is a file, not a folder"), "{error}");
        fs::create_dir(dir.path().join("d")).unwrap();
        let error = write_file(dir.path().join("d"), b"").unwrap_err().to_string();
        assert!(error.contains("a folder stands where"), "{error}");
        assert!(write_file("/", b"").is_err());
        assert!(write_file("", b"").is_err());
        if cfg!(target_os = "linux") {
            let error = write_file("/sys/kernel/x", b"").unwrap_err().to_string();
            assert!(error.contains("choose another output folder"), "{error}");
        }
    }

    #[test]
    fn folders_change_places_in_both_ways() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/step-1");
        for round in 0..3u8 {
            replace_dir(&path, |temp| {
                fs::create_dir(temp.join("inner")).unwrap();
                fs::write(temp.join("inner/x"), [round]).unwrap();
                fs::write(temp.join(format!("only-{round}")), b"").unwrap();
                Ok::<_, Error>(())
            })
            .unwrap();
            assert_eq!(entries(&path), ["inner".to_owned(), format!("only-{round}")]);
            assert_eq!(fs::read(path.join("inner/x")).unwrap(), [round]);
            assert_eq!(entries(path.parent().unwrap()), ["step-1"]);
        }
        let temp = path.parent().unwrap().join(".tmp-step-1-abcdef");
        fs::create_dir(&temp).unwrap();
        exchange_in_two_steps(&temp, &path, "step-1").unwrap();
        assert!(entries(&path).is_empty());
        assert_eq!(entries(path.parent().unwrap()), ["step-1"]);
    }

    #[test]
    fn leftovers_of_the_dead_go_and_those_of_the_living_stay() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".tmp-a-b12345"), b"").unwrap();
        fs::create_dir(dir.path().join(".tmp-a-c12345")).unwrap();
        fs::write(dir.path().join(".tmp-a-b-b12345"), b"of another name").unwrap();
        let living = AtomicFile::create(dir.path().join("a")).unwrap();
        write_file(dir.path().join("a"), b"x").unwrap();
        assert_eq!(entries(dir.path()).len(), 3, "{:?}", entries(dir.path()));
        living.file().write_all_for_test(b"living");
        living.commit().unwrap();
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"living");
        assert_eq!(entries(dir.path()), [".tmp-a-b-b12345", "a"]);
    }

    trait WriteAll {
        fn write_all_for_test(&self, bytes: &[u8]);
    }
    impl WriteAll for File {
        fn write_all_for_test(&self, bytes: &[u8]) {
            (&*self).write_all(bytes).unwrap();
        }
    }

    #[test]
    fn an_interrupted_exchange_is_undone() {
        let dir = tempfile::tempdir().unwrap();
        let old = dir.path().join(".old-ck-abc123");
        fs::create_dir(&old).unwrap();
        fs::write(old.join("x"), b"old").unwrap();
        recover_dir(dir.path().join("ck")).unwrap();
        assert_eq!(fs::read(dir.path().join("ck/x")).unwrap(), b"old");
    }

    const CHILD: &str = "PEFT_ATOMIC_TEST_CHILD";

    /// Not a test by itself: what the killed process of the next test runs.
    #[test]
    fn child_that_writes_for_ever() {
        let Some(dir) = std::env::var_os(CHILD) else { return };
        let dir = PathBuf::from(dir);
        for round in 0u64.. {
            replace_dir(dir.join("ck"), |temp| {
                for file in 0..4 {
                    write_file(temp.join(format!("f{file}")), &round.to_le_bytes().repeat(2000))?;
                }
                Ok::<_, Error>(())
            })
            .unwrap();
            write_file(dir.join("state"), &round.to_le_bytes().repeat(5000)).unwrap();
        }
    }

    #[test]
    fn a_kill_at_any_moment_leaves_complete_data() {
        let dir = tempfile::tempdir().unwrap();
        let whole = |bytes: &[u8]| {
            assert!(!bytes.is_empty() && bytes.chunks(8).all(|chunk| chunk == &bytes[..8]), "torn file");
            bytes[..8].to_vec()
        };
        for round in 0..30u64 {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "atomic::tests::child_that_writes_for_ever"])
                .env(CHILD, dir.path())
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
            // Kill at another moment each time, but never before the child has replaced both at least once.
            let written = |name: &str| fs::metadata(dir.path().join(name)).and_then(|m| m.modified()).ok();
            let before = (written("ck"), written("state"));
            let started = std::time::Instant::now();
            while written("ck") == before.0 || written("state") == before.1 || written("state").is_none() {
                assert!(started.elapsed() < Duration::from_secs(60), "the child writes nothing");
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_micros(round * 1_370 % 23_000));
            child.kill().unwrap();
            child.wait().unwrap();
            let bytes = fs::read(dir.path().join("state")).unwrap();
            assert_eq!(bytes.len(), 40_000);
            whole(&bytes);
            let folder = dir.path().join("ck");
            assert_eq!(entries(&folder), ["f0", "f1", "f2", "f3"]);
            let rounds: Vec<_> = (0..4).map(|f| whole(&fs::read(folder.join(format!("f{f}"))).unwrap())).collect();
            assert!(rounds.iter().all(|r| *r == rounds[0]), "a mixed folder");
            assert!(entries(dir.path()).len() <= 4, "leftovers pile up: {:?}", entries(dir.path()));
        }
        write_file(dir.path().join("state"), b"end").unwrap();
        replace_dir(dir.path().join("ck"), |_| Ok::<_, Error>(())).unwrap();
        assert_eq!(entries(dir.path()), ["ck", "state"]);
    }

    #[test]
    fn files_are_written_atomically_inside_a_folder_that_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        for round in ["one", "two"] {
            replace_dir(&target, |tmp| -> Result<()> {
                write_file(tmp.join("a"), round.as_bytes())?;
                write_file(tmp.join("a"), round.as_bytes())
            })
            .unwrap();
            assert_eq!(fs::read_to_string(target.join("a")).unwrap(), round);
        }
    }
}
