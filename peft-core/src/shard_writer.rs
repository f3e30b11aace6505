//! Writing a model folder's weights tensor by tensor: `model.safetensors`, or shards with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::atomic::{AtomicFile, write_file};
use crate::checkpoint::{INDEX_FILE, SINGLE_FILE};
use crate::error::{Context, Error, Result};
use crate::st_header;
use crate::suggest::did_you_mean;
use crate::tensor_bytes::write_tensor;

/// Largest shard that Hugging Face tools wrote for years, and a good size for downloads.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;
/// Shards are kept open until all are complete.
const MAX_SHARDS: usize = 800;

/// One tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Type on disk.
    pub dtype: DType,
}

/// Writes the planned tensors, in any order, with no more than one of them in memory. Nothing is visible in the
/// folder before [`ShardWriter::finish`]; dropped without it, nothing stays.
///
/// The folder must not hold weights yet: write into a fresh folder, for example inside
/// [`crate::atomic::replace_dir`].
#[derive(Debug)]
pub struct ShardWriter {
    dir: PathBuf,
    places: BTreeMap<String, Place>,
    shards: Vec<Shard>,
    total: u64,
    pending: usize,
}

#[derive(Debug)]
struct Place {
    shard: usize,
    bytes: Range<usize>,
    shape: Vec<usize>,
    dtype: DType,
    written: bool,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    head: Vec<u8>,
    size: u64,
    file: Option<AtomicFile>,
}

impl ShardWriter {
    /// Plans the files: tensors go into shards in the given order, a new shard starting when the next tensor would
    /// exceed `max_shard_bytes` (a larger tensor gets its own shard). One shard becomes `model.safetensors`.
    ///
    /// # Errors
    /// An empty plan, a name twice, a type that safetensors lacks, too many shards, or a folder that holds weights.
    pub fn create(dir: impl AsRef<Path>, plan: Vec<PlannedTensor>, max_shard_bytes: u64) -> Result<Self> {
        let dir = dir.as_ref().to_owned();
        std::fs::create_dir_all(&dir).map_err(|cause| Error::write(&dir, cause))?;
        for name in [SINGLE_FILE, INDEX_FILE] {
            if dir.join(name).exists() {
                return Err(Error::file(&dir, format!("holds a model already ({name}); choose another output folder")));
            }
        }
        if plan.is_empty() {
            return Err(Error::file(&dir, "there is no tensor to write"));
        }
        let groups = split(&plan, max_shard_bytes).map_err(|message| Error::file(&dir, message))?;
        if groups.len() > MAX_SHARDS {
            return Err(Error::msg(format!("{} shards are too many; raise the shard size", groups.len())));
        }
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let mut writer = Self { dir, places: BTreeMap::new(), shards: Vec::new(), total: 0, pending: plan.len() };
        let count = groups.len();
        let mut plan = plan.into_iter();
        for (shard, length) in groups.into_iter().enumerate() {
            let tensors: Vec<PlannedTensor> = plan.by_ref().take(length).collect();
            let entries: Vec<(&str, Dtype, &[usize])> =
                tensors.iter().map(|t| (t.name.as_str(), Dtype::from(t.dtype), t.shape.as_slice())).collect();
            let file = if count == 1 {
                SINGLE_FILE.to_owned()
            } else {
                format!("model-{:05}-of-{count:05}.safetensors", shard + 1)
            };
            let path = writer.dir.join(file);
            let (head, places) =
                st_header::build(&entries, &metadata).map_err(|message| Error::file(&path, message))?;
            let size = places.iter().map(|place| place.end).max().unwrap_or(0).max(head.len()) as u64;
            writer.total += size - head.len() as u64;
            for (tensor, bytes) in tensors.into_iter().zip(places) {
                let place = Place { shard, bytes, shape: tensor.shape, dtype: tensor.dtype, written: false };
                if writer.places.insert(tensor.name.clone(), place).is_some() {
                    return Err(Error::file(&path, format!("tensor `{}` is planned twice", tensor.name)));
                }
            }
            writer.shards.push(Shard { path, head, size, file: None });
        }
        Ok(writer)
    }

    /// Bytes of all tensors together.
    pub fn bytes(&self) -> u64 {
        self.total
    }

    /// Number of files with weights.
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// Writes one tensor; it must have the planned shape and type.
    ///
    /// # Errors
    /// An unplanned name, another shape or type, a second write, or [`Error::Write`].
    pub fn write(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let place = self.place(name)?;
        if tensor.dims() != place.shape {
            let name = format!("tensor `{name}`");
            return Err(Error::Shape { name, actual: tensor.dims().to_vec(), expected: place.shape.clone() });
        }
        if tensor.dtype() != place.dtype {
            let message = format!("tensor `{name}` has the type {:?}, planned was {:?}", tensor.dtype(), place.dtype);
            return Err(Error::msg(message));
        }
        self.put(name, |mut sink| {
            write_tensor(tensor, |bytes| sink.write_all(bytes)).with_context(|| format!("tensor `{name}`"))
        })
    }

    /// Writes one tensor from its little-endian bytes (as [`crate::safetensors_file::SafetensorsFile::raw`] gives
    /// them), unconverted.
    ///
    /// # Errors
    /// As [`Self::write`]; the number of bytes must be the planned one.
    pub fn write_raw(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let planned = self.place(name)?.bytes.len();
        if bytes.len() != planned {
            return Err(Error::msg(format!("tensor `{name}` has {} bytes, planned were {planned}", bytes.len())));
        }
        self.put(name, |mut sink| Ok(sink.write_all(bytes)))
    }

    fn place(&self, name: &str) -> Result<&Place> {
        match self.places.get(name) {
            Some(place) if place.written => Err(Error::msg(format!("tensor `{name}` was written already"))),
            Some(place) => Ok(place),
            None => {
                Err(Error::msg(format!("tensor `{name}` was not planned{}", did_you_mean(name, self.places.keys()))))
            }
        }
    }

    fn put(&mut self, name: &str, write: impl FnOnce(&std::fs::File) -> Result<io::Result<()>>) -> Result<()> {
        let Some(place) = self.places.get_mut(name) else { return Ok(()) };
        let Some(shard) = self.shards.get_mut(place.shard) else { return Ok(()) };
        let file = match &mut shard.file {
            Some(file) => file,
            empty => empty.insert(start(&shard.path, &shard.head, shard.size)?),
        };
        let fail = |cause| Error::write(&shard.path, cause);
        let mut handle = file.file();
        handle.seek(SeekFrom::Start(place.bytes.start as u64)).map_err(fail)?;
        write(handle)?.map_err(fail)?;
        place.written = true;
        self.pending -= 1;
        Ok(())
    }

    /// Puts all files into place, the index last, and returns their names.
    ///
    /// # Errors
    /// A planned tensor was not written (named), or [`Error::Write`].
    pub fn finish(self) -> Result<Vec<String>> {
        if self.pending > 0 {
            let missing: Vec<&str> = self
                .places
                .iter()
                .filter(|(_, place)| !place.written)
                .map(|(name, _)| name.as_str())
                .take(10)
                .collect();
            let message = format!("{} tensors were planned and not written: {}", self.pending, missing.join(", "));
            return Err(Error::file(&self.dir, message));
        }
        let mut names = Vec::with_capacity(self.shards.len() + 1);
        let sharded = self.shards.len() > 1;
        for shard in self.shards {
            names.push(shard.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default());
            if let Some(file) = shard.file {
                file.commit()?;
            }
        }
        if sharded {
            let map: Map<String, Value> = self
                .places
                .iter()
                .map(|(name, place)| (name.clone(), names.get(place.shard).cloned().unwrap_or_default().into()))
                .collect();
            let index = json!({"metadata": {"total_size": self.total}, "weight_map": map});
            let mut text = serde_json::to_string_pretty(&index).map_err(|error| Error::msg(error.to_string()))?;
            text.push('\n');
            write_file(self.dir.join(INDEX_FILE), text.as_bytes())?;
            names.push(INDEX_FILE.to_owned());
        }
        Ok(names)
    }
}

/// Opens a shard, reserves its space (so that a full disk shows now, not hours later) and writes its header.
fn start(path: &Path, head: &[u8], size: u64) -> Result<AtomicFile> {
    let file = AtomicFile::create(path)?;
    let fail = |cause| Error::write(path, cause);
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::fs::fallocate(file.file(), rustix::fs::FallocateFlags::empty(), 0, size) {
        use rustix::io::Errno;
        if matches!(error, Errno::NOSPC | Errno::DQUOT | Errno::FBIG) {
            return Err(fail(error.into()));
        }
    }
    file.file().set_len(size).map_err(fail)?;
    file.file().write_all(head).map_err(fail)?;
    Ok(file)
}

/// Lengths of the runs of `plan` that make up the shards.
fn split(plan: &[PlannedTensor], max: u64) -> Result<Vec<usize>, String> {
    let mut names = BTreeSet::new();
    let mut groups = Vec::new();
    let (mut count, mut bytes) = (0usize, 0u64);
    for tensor in plan {
        if !names.insert(&tensor.name) {
            return Err(format!("tensor `{}` is planned twice", tensor.name));
        }
        let size = st_header::byte_size(Dtype::from(tensor.dtype), &tensor.shape)
            .ok_or_else(|| format!("tensor `{}` of shape {:?} is too large", tensor.name, tensor.shape))?
            as u64;
        if count > 0 && bytes.saturating_add(size) > max {
            groups.push(count);
            (count, bytes) = (0, 0);
        }
        count += 1;
        bytes = bytes.saturating_add(size);
    }
    groups.push(count);
    Ok(groups)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::checkpoint::Checkpoint;
    use candle_core::Device;
    use proptest::prelude::*;

    fn planned(name: &str, tensor: &Tensor) -> PlannedTensor {
        PlannedTensor { name: name.into(), shape: tensor.dims().to_vec(), dtype: tensor.dtype() }
    }

    fn entries(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn mistakes_are_refused_and_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let t = Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap();
        let create = |plan| ShardWriter::create(dir.path(), plan, 1000);
        assert!(create(vec![]).unwrap_err().to_string().contains("no tensor"));
        assert!(create(vec![planned("a", &t), planned("a", &t)]).unwrap_err().to_string().contains("twice"));
        let huge = PlannedTensor { name: "h".into(), shape: vec![usize::MAX, 8], dtype: DType::F32 };
        assert!(create(vec![huge]).unwrap_err().to_string().contains("too large"));
        let mut writer = create(vec![planned("a", &t), planned("b", &t)]).unwrap();
        writer.write("a", &t).unwrap();
        assert!(writer.write("a", &t).unwrap_err().to_string().contains("already"));
        assert!(writer.write("A", &t).unwrap_err().to_string().contains("did you mean"));
        assert!(writer.write("b", &t.narrow(0, 0, 1).unwrap()).unwrap_err().to_string().contains("[1, 2]"));
        assert!(writer.write("b", &t.to_dtype(DType::F16).unwrap()).unwrap_err().to_string().contains("F16"));
        assert!(writer.write_raw("b", &[0; 3]).unwrap_err().to_string().contains("3 bytes"));
        assert!(writer.finish().unwrap_err().to_string().contains("not written: b"));
        assert!(entries(dir.path()).is_empty(), "{:?}", entries(dir.path()));
        std::fs::write(dir.path().join(SINGLE_FILE), b"").unwrap();
        assert!(create(vec![planned("a", &t)]).unwrap_err().to_string().contains("another output folder"));
    }

    #[test]
    fn no_room_is_noticed_at_once() {
        let dir = tempfile::tempdir().unwrap();
        // A petabyte does not fit anywhere that tests run.
        let plan = vec![
            PlannedTensor { name: "small".into(), shape: vec![1], dtype: DType::F32 },
            PlannedTensor { name: "w".into(), shape: vec![1 << 48], dtype: DType::F32 },
        ];
        let mut writer = ShardWriter::create(dir.path(), plan, u64::MAX).unwrap();
        let error = writer.write_raw("small", &[0; 4]).unwrap_err().to_string();
        assert!(error.contains(SINGLE_FILE) && error.contains("choose another output folder"), "{error}");
        drop(writer);
        assert!(entries(dir.path()).is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn what_is_written_is_read(
            sizes in prop::collection::vec((0usize..6, 1usize..6, any::<bool>()), 1..12),
            max in 1u64..200, reverse: bool,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let tensors: Vec<(String, Tensor)> = sizes.iter().enumerate().map(|(i, (rows, cols, half))| {
                let values: Vec<f32> = (0..rows * cols).map(|k| (i * 100 + k) as f32).collect();
                let tensor = Tensor::from_vec(values, (*rows, *cols), &Device::Cpu).unwrap();
                (format!("t{i}"), if *half { tensor.to_dtype(DType::BF16).unwrap() } else { tensor })
            }).collect();
            let plan = tensors.iter().map(|(name, tensor)| planned(name, tensor)).collect();
            let mut writer = ShardWriter::create(dir.path(), plan, max).unwrap();
            let shards = writer.shards();
            let total = writer.bytes();
            let mut order: Vec<_> = tensors.iter().collect();
            if reverse { order.reverse(); }
            for (name, tensor) in order { writer.write(name, tensor).unwrap(); }
            prop_assert!(entries(dir.path()).iter().all(|name| name.starts_with(".tmp-")));
            let names = writer.finish().unwrap();
            let mut sorted = names.clone();
            sorted.sort();
            prop_assert_eq!(entries(dir.path()), sorted);
            prop_assert_eq!(names.len(), if shards == 1 { 1 } else { shards + 1 });
            let back = Checkpoint::open(dir.path()).unwrap();
            prop_assert_eq!(back.bytes() as u64, total);
            prop_assert_eq!(back.names().len(), tensors.len());
            for file in back.files() {
                let bytes: usize = file.names().map(|name| file.get(name).unwrap().bytes.len()).sum();
                prop_assert!(bytes as u64 <= max || file.names().len() == 1 || bytes == 0 || shards == 1
                    || file.names().filter(|name| !file.get(name).unwrap().bytes.is_empty()).count() == 1);
            }
            for (name, tensor) in &tensors {
                let found = back.tensor(name, &Device::Cpu).unwrap();
                prop_assert_eq!(found.dtype(), tensor.dtype());
                let flat = |t: &Tensor| t.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
                prop_assert_eq!(flat(&found), flat(tensor));
            }
        }
    }
}
