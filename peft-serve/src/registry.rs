//! Adapters by name, of which some are in memory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use arc_swap::{ArcSwap, ArcSwapOption};
use peft_core::suggest::did_you_mean;
use peft_core::{Adapter, AdapterSet, Ctx, Error as CoreError, Route, SiteModule, VirtualTokens};

use crate::content::{ContentHash, Fingerprint, hash_of};

/// Opens the adapter in a folder on the base model: `peft_train::methods::open` and what belongs to it.
pub type Opener = dyn Fn(&Path) -> Result<Adapter, CoreError> + Send + Sync;

/// Why a name gives no adapter.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Nothing has this name.
    #[error("no adapter is called `{name}`{near}")]
    Unknown {
        /// The name.
        name: String,
        /// `; did you mean …?`, or nothing.
        near: String,
    },
    /// Not a name for an adapter.
    #[error("`{0}` is no name for an adapter: 1 to 128 letters, digits, `.`, `_`, `:` and `-`")]
    Name(String),
    /// The adapter cannot be opened.
    #[error("adapter `{name}`: {cause}")]
    Open {
        /// The name.
        name: String,
        /// What is wrong with it.
        cause: CoreError,
    },
    /// The files are no longer those that were published.
    #[error(
        "adapter `{name}`: the files in {} are not those that were published under this name; publish them anew",
        folder.display()
    )]
    Changed {
        /// The name.
        name: String,
        /// The folder.
        folder: PathBuf,
    },
}

/// One state of a named adapter. Who holds it keeps it in memory, whatever happens to the name.
#[derive(Debug)]
pub struct Generation {
    name: Arc<str>,
    hash: ContentHash,
    adapter: Arc<Adapter>,
    bytes: u64,
    whole_prompts: bool,
}

impl Generation {
    /// An adapter that has no files.
    ///
    /// # Errors
    /// When its tensors cannot be read.
    pub fn of(name: &str, adapter: Arc<Adapter>) -> Result<Self, CoreError> {
        let hash = hash_of(&adapter)?;
        Ok(Self::new(name.into(), hash, adapter))
    }

    fn new(name: Arc<str>, hash: ContentHash, adapter: Arc<Adapter>) -> Self {
        let bytes = adapter.tensors().iter().map(|(_, t)| (t.elem_count() * t.dtype().size_in_bytes()) as u64).sum();
        let (set, route) = (AdapterSet::empty(), Route::Base);
        let ctx = Ctx::eval(&set, &route);
        let gated = adapter.virtual_tokens().is_some_and(VirtualTokens::is_gated);
        let reads = |module: &SiteModule| module.reads_sequences(&ctx);
        let whole_prompts = gated || adapter.touched().filter_map(|(_, site)| site.module.as_ref()).any(reads);
        Self { name, hash, adapter, bytes, whole_prompts }
    }

    /// The name that it was leased by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What tells it from other generations of the name.
    #[must_use]
    pub fn hash(&self) -> ContentHash {
        self.hash
    }

    /// The adapter.
    #[must_use]
    pub fn adapter(&self) -> &Arc<Adapter> {
        &self.adapter
    }

    /// Bytes of its tensors.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether a prompt has to run in one pass, since the adapter looks at whole sequences (ReFT, gated bottlenecks).
    #[must_use]
    pub fn whole_prompts(&self) -> bool {
        self.whole_prompts
    }

    /// How many virtual tokens it puts in front of a sequence.
    #[must_use]
    pub fn virtual_tokens(&self) -> usize {
        self.adapter.virtual_tokens().map_or(0, |tokens| tokens.count)
    }
}

/// A name in the registry, for lists.
#[derive(Debug, Clone)]
pub struct Listed {
    /// The name.
    pub name: String,
    /// Where it is read from; `None` where it was handed over as it is.
    pub folder: Option<PathBuf>,
    /// When the name was published.
    pub published: SystemTime,
    /// The content, where it has been read.
    pub hash: Option<ContentHash>,
    /// Bytes in memory; 0 where it is on disk alone.
    pub bytes: u64,
}

/// What the registry holds and has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RegistryStats {
    /// Names.
    pub registered: usize,
    /// Those in memory.
    pub resident: usize,
    /// Bytes of those.
    pub bytes: u64,
    /// Adapters that were opened so far.
    pub opened: u64,
    /// Adapters that the budget put out of memory so far.
    pub evicted: u64,
}

/// Adapters by name. Names are published by swapping one pointer to an immutable table; a request leases the generation that it
/// begins with and keeps it, whatever is published, unloaded or put out of memory meanwhile.
///
/// An adapter that is only registered costs its name: it is opened on its first use. Adapters in memory may take `budget` bytes
/// of tensors together; beyond, those that were used longest ago go and are opened again on their next use. What requests
/// still hold is not counted, and the newest one stays, however large it is.
pub struct Registry {
    opener: Box<Opener>,
    budget: Option<u64>,
    table: ArcSwap<HashMap<Arc<str>, Arc<Entry>>>,
    /// Held by who publishes or evicts; nobody who reads takes it.
    publishing: Mutex<()>,
    clock: AtomicU64,
    opened: AtomicU64,
    evicted: AtomicU64,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("budget", &self.budget).field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// A published name.
struct Entry {
    name: Arc<str>,
    /// `None` for an adapter that was handed over, which stays in memory.
    folder: Option<PathBuf>,
    published: SystemTime,
    resident: ArcSwapOption<Generation>,
    /// What the files were when they were first read. Whoever opens the adapter holds it meanwhile.
    known: Mutex<Option<(Fingerprint, ContentHash)>>,
    used: AtomicU64,
}

impl Entry {
    fn new(name: Arc<str>, folder: Option<PathBuf>) -> Self {
        let (resident, known) = (ArcSwapOption::empty(), Mutex::new(None));
        Self { name, folder, published: SystemTime::now(), resident, known, used: AtomicU64::new(0) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    /// An empty registry whose adapters `opener` opens, and may take `budget` bytes in memory.
    pub fn new(
        opener: impl Fn(&Path) -> Result<Adapter, CoreError> + Send + Sync + 'static,
        budget: Option<u64>,
    ) -> Self {
        Self {
            opener: Box::new(opener),
            budget,
            table: ArcSwap::default(),
            publishing: Mutex::new(()),
            clock: AtomicU64::new(1),
            opened: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
        }
    }

    /// Publishes names for folders without opening them. Names that are there already are replaced.
    ///
    /// # Errors
    /// A name that cannot be one, or a folder that is none; nothing is published then.
    pub fn register(&self, names: impl IntoIterator<Item = (String, PathBuf)>) -> Result<(), RegistryError> {
        let mut entries = Vec::new();
        for (name, folder) in names {
            let known = checked(&name)?;
            if !folder.is_dir() {
                return Err(RegistryError::Open { name, cause: CoreError::file(&folder, "is not a folder") });
            }
            entries.push(Entry::new(known, Some(folder)));
        }
        self.publish(entries);
        Ok(())
    }

    /// Opens the adapter in a folder and publishes it as `name`, in place of what had this name.
    ///
    /// # Errors
    /// A name that cannot be one, or an adapter that cannot be opened; what was published before stays.
    pub fn load(&self, name: &str, folder: &Path) -> Result<Arc<Generation>, RegistryError> {
        let entry = Entry::new(checked(name)?, Some(folder.to_path_buf()));
        self.touch(&entry);
        let generation = self.open(&entry, &mut lock(&entry.known))?;
        self.publish([entry]);
        self.evict(name);
        Ok(generation)
    }

    /// Publishes an adapter as it is. It has no files, so it stays in memory.
    ///
    /// # Errors
    /// A name that cannot be one, or tensors that cannot be read.
    pub fn insert(&self, name: &str, adapter: Arc<Adapter>) -> Result<Arc<Generation>, RegistryError> {
        let entry = Entry::new(checked(name)?, None);
        let cause = |cause| RegistryError::Open { name: name.to_owned(), cause };
        let generation = Arc::new(Generation::of(name, adapter).map_err(cause)?);
        entry.resident.store(Some(generation.clone()));
        self.publish([entry]);
        self.evict(name);
        Ok(generation)
    }

    /// Takes a name away. Requests that hold its adapter go on. Whether there was one.
    pub fn unload(&self, name: &str) -> bool {
        let _publishing = lock(&self.publishing);
        let mut table = HashMap::clone(&self.table.load());
        let found = table.remove(name).is_some();
        self.table.store(Arc::new(table));
        found
    }

    /// The adapter that is published as `name` now, opened if it is on disk alone: then this call reads files.
    ///
    /// # Errors
    /// An unknown name; an adapter that cannot be opened, or whose files changed since they were first read.
    pub fn lease(&self, name: &str) -> Result<Arc<Generation>, RegistryError> {
        let entry = self.table.load().get(name).cloned().ok_or_else(|| self.unknown(name))?;
        self.touch(&entry);
        if let Some(generation) = entry.resident.load_full() {
            return Ok(generation);
        }
        let mut known = lock(&entry.known);
        // Another request may have opened it meanwhile.
        if let Some(generation) = entry.resident.load_full() {
            return Ok(generation);
        }
        let generation = self.open(&entry, &mut known)?;
        drop(known);
        self.evict(name);
        Ok(generation)
    }

    /// As [`Registry::lease`] for an adapter that is in memory; nothing for any other.
    #[must_use]
    pub fn resident(&self, name: &str) -> Option<Arc<Generation>> {
        let table = self.table.load();
        let entry = table.get(name)?;
        self.touch(entry);
        entry.resident.load_full()
    }

    /// Whether the name is published.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.table.load().contains_key(name)
    }

    /// All names, in alphabetical order.
    #[must_use]
    pub fn list(&self) -> Vec<Listed> {
        let table = self.table.load();
        let mut listed: Vec<Listed> = table.values().map(|entry| Self::listed(entry)).collect();
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        listed
    }

    /// One name of the list.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Listed> {
        self.table.load().get(name).map(|entry| Self::listed(entry))
    }

    fn listed(entry: &Entry) -> Listed {
        let resident = entry.resident.load();
        // Who opens it holds the lock; it is not worth waiting for.
        let known = entry.known.try_lock().ok().and_then(|known| known.as_ref().map(|(_, hash)| *hash));
        Listed {
            name: entry.name.to_string(),
            folder: entry.folder.clone(),
            published: entry.published,
            hash: resident.as_ref().map(|g| g.hash).or(known),
            bytes: resident.as_ref().map_or(0, |g| g.bytes),
        }
    }

    /// What it holds and has done.
    #[must_use]
    pub fn stats(&self) -> RegistryStats {
        let table = self.table.load();
        let resident = || table.values().filter_map(|entry| entry.resident.load().as_ref().map(|g| g.bytes));
        RegistryStats {
            registered: table.len(),
            resident: resident().count(),
            bytes: resident().sum(),
            opened: self.opened.load(Ordering::Relaxed),
            evicted: self.evicted.load(Ordering::Relaxed),
        }
    }

    fn unknown(&self, name: &str) -> RegistryError {
        let table = self.table.load();
        let near = did_you_mean(name, table.keys().map(AsRef::as_ref));
        RegistryError::Unknown { name: name.to_owned(), near }
    }

    fn touch(&self, entry: &Entry) {
        entry.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
    }

    fn publish(&self, entries: impl IntoIterator<Item = Entry>) {
        let _publishing = lock(&self.publishing);
        let mut table = HashMap::clone(&self.table.load());
        table.extend(entries.into_iter().map(|entry| (entry.name.clone(), Arc::new(entry))));
        self.table.store(Arc::new(table));
    }

    /// Reads an entry's files, which have to be those of `known` where that is known.
    fn open(
        &self,
        entry: &Entry,
        known: &mut Option<(Fingerprint, ContentHash)>,
    ) -> Result<Arc<Generation>, RegistryError> {
        let cause = |cause| RegistryError::Open { name: entry.name.to_string(), cause };
        let Some(folder) = &entry.folder else { return Err(self.unknown(&entry.name)) };
        let changed = || RegistryError::Changed { name: entry.name.to_string(), folder: folder.clone() };
        let before = Fingerprint::of(folder).map_err(cause)?;
        // Whoever has not written to the files has not changed them, and they need not be read twice.
        let expected = known.as_ref().filter(|(print, _)| *print == before).map(|(_, hash)| *hash);
        let (adapter, hash) = std::thread::scope(|threads| {
            let hashing = expected.is_none().then(|| threads.spawn(|| before.hash(folder)));
            let adapter = (self.opener)(folder);
            let hash = match (hashing, expected) {
                (Some(hashing), _) => {
                    hashing.join().unwrap_or_else(|_| Err(CoreError::msg("the files could not be read")))
                }
                (None, Some(hash)) => Ok(hash),
                (None, None) => Err(CoreError::msg("the files were not read")),
            };
            (adapter, hash)
        });
        let (adapter, hash) = (adapter.map_err(cause)?, hash.map_err(cause)?);
        if Fingerprint::of(folder).map_err(cause)? != before || known.as_ref().is_some_and(|(_, was)| *was != hash) {
            return Err(changed());
        }
        let adapter = adapter.settled().map_err(cause)?;
        *known = Some((before, hash));
        self.opened.fetch_add(1, Ordering::Relaxed);
        let generation = Arc::new(Generation::new(entry.name.clone(), hash, Arc::new(adapter)));
        entry.resident.store(Some(generation.clone()));
        Ok(generation)
    }

    /// Puts adapters out of memory, those that were used longest ago first, until all are within the budget; `newest` stays.
    fn evict(&self, newest: &str) {
        let Some(budget) = self.budget else { return };
        let _publishing = lock(&self.publishing);
        let table = self.table.load();
        let mut resident: Vec<(u64, u64, &Arc<Entry>)> = table
            .values()
            .filter_map(|entry| {
                let bytes = entry.resident.load().as_ref()?.bytes;
                Some((entry.used.load(Ordering::Relaxed), bytes, entry))
            })
            .collect();
        let mut total: u64 = resident.iter().map(|(_, bytes, _)| bytes).sum();
        resident.sort_by_key(|(used, ..)| *used);
        for (_, bytes, entry) in resident {
            if total <= budget {
                break;
            }
            if entry.folder.is_some() && *entry.name != *newest {
                entry.resident.store(None);
                self.evicted.fetch_add(1, Ordering::Relaxed);
                total -= bytes;
            }
        }
    }
}

/// The name, if it can be one.
fn checked(name: &str) -> Result<Arc<str>, RegistryError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '-');
    if name.is_empty() || name.len() > 128 || !name.chars().all(fits) {
        return Err(RegistryError::Name(name.chars().take(140).collect()));
    }
    Ok(name.into())
}
