//! The weights of a base model in a Hugging Face folder, by mmap.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::safetensors_file::SafetensorsFile;
use crate::st_header::{TensorMeta, printable, what_it_is};
use crate::suggest::did_you_mean;

/// File name of a model in one piece.
pub const SINGLE_FILE: &str = "model.safetensors";
/// File name of the index of a model in shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// An index larger than this is not an index.
const MAX_INDEX: u64 = 256 << 20;
/// How many names a message lists.
const LISTED: usize = 10;

/// All tensors of a model folder: `model.safetensors`, or shards with `model.safetensors.index.json`. Opening maps
/// the files and checks their headers; tensors are copied out one by one in the type they have on disk.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Name → index into `files`.
    places: BTreeMap<String, usize>,
}

impl Checkpoint {
    /// Opens a model folder, or a single `.safetensors` file. As in transformers, `model.safetensors` comes before
    /// the index where both exist.
    ///
    /// # Errors
    /// Nothing to open (the message says what to do about a PyTorch-only folder, a missing index, an adapter or a
    /// git-lfs pointer), a missing shard, an index that lists what the shards lack, a tensor that is in two shards,
    /// or a damaged file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let info = std::fs::metadata(path).map_err(|cause| Error::io(path, cause))?;
        if info.is_file() {
            let is_gguf = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"));
            if is_gguf {
                return Err(Error::file(path, "is a GGUF file, not safetensors"));
            }
            return Self::from_files(path, vec![SafetensorsFile::open(path)?]);
        }
        if path.join(SINGLE_FILE).exists() {
            return Self::from_files(path, vec![SafetensorsFile::open(path.join(SINGLE_FILE))?]);
        }
        let index = path.join(INDEX_FILE);
        if index.exists() {
            return Self::open_index(path, &index);
        }
        Err(nothing_to_open(path))
    }

    fn from_files(path: &Path, files: Vec<SafetensorsFile>) -> Result<Self> {
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for (at, file) in files.iter().enumerate() {
            for name in file.names() {
                if let Some(first) = places.insert(name.to_owned(), at) {
                    let first = files.get(first).map_or(path, SafetensorsFile::path);
                    let message =
                        format!("holds the tensor `{}`, which {} holds too", printable(name), first.display());
                    return Err(Error::file(file.path(), message));
                }
            }
        }
        Ok(Self { path: path.to_owned(), files, places })
    }

    fn open_index(path: &Path, index: &Path) -> Result<Self> {
        let wrong = |message: String| Error::file(index, message);
        let size = std::fs::metadata(index).map_err(|cause| Error::io(index, cause))?.len();
        if size > MAX_INDEX {
            return Err(wrong(format!("is no index: it has {size} bytes")));
        }
        let bytes = std::fs::read(index).map_err(|cause| Error::io(index, cause))?;
        let json: Value = serde_json::from_slice(&bytes)
            .map_err(|error| wrong(format!("is not a JSON file: {error}{}", what_it_is(&bytes))))?;
        let map = json
            .get("weight_map")
            .and_then(Value::as_object)
            .ok_or_else(|| wrong("has no `weight_map` table".to_owned()))?;
        let mut listed: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (tensor, file) in map {
            let file = file.as_str().filter(|file| is_plain(file)).ok_or_else(|| {
                wrong(format!("names the file {file} for `{}`, which is no file of this folder", printable(tensor)))
            })?;
            listed.entry(file).or_default().insert(tensor);
        }
        if listed.is_empty() {
            return Err(wrong("lists no tensor".to_owned()));
        }
        let missing: Vec<&str> = listed.keys().copied().filter(|file| !path.join(file).exists()).collect();
        if !missing.is_empty() {
            return Err(wrong(format!(
                "lists {} files, of which {} not there: {}; download the rest",
                listed.len(),
                if missing.len() == 1 { "1 is".to_owned() } else { format!("{} are", missing.len()) },
                list(missing.iter().copied())
            )));
        }
        let files = listed.keys().map(|file| SafetensorsFile::open(path.join(file))).collect::<Result<Vec<_>>>()?;
        for (file, names) in files.iter().zip(listed.values()) {
            let absent: Vec<&str> = names.iter().copied().filter(|name| file.get(name).is_none()).collect();
            if !absent.is_empty() {
                return Err(Error::file(
                    file.path(),
                    format!(
                        "lacks {} of the {} tensors that {INDEX_FILE} lists for it: {}; files of different versions are \
                         mixed, download the model again",
                        absent.len(),
                        names.len(),
                        list(absent.iter().copied())
                    ),
                ));
            }
        }
        Self::from_files(path, files)
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files, sorted by name.
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// The file that holds a tensor.
    ///
    /// # Errors
    /// There is no such tensor; the message names the nearest ones.
    pub fn file_of(&self, name: &str) -> Result<&SafetensorsFile> {
        self.places.get(name).and_then(|at| self.files.get(*at)).ok_or_else(|| {
            let near = did_you_mean(name, self.names());
            Error::file(&self.path, format!("has no tensor `{}`{near}", printable(name)))
        })
    }

    /// Type, shape and size of a tensor.
    ///
    /// # Errors
    /// As [`Self::file_of`].
    pub fn meta(&self, name: &str) -> Result<&TensorMeta> {
        self.file_of(name)?.meta(name)
    }

    /// Shape of a tensor.
    ///
    /// # Errors
    /// As [`Self::file_of`].
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.meta(name)?.shape)
    }

    /// Type of a tensor on disk.
    ///
    /// # Errors
    /// As [`Self::file_of`], or candle has no such type.
    pub fn dtype(&self, name: &str) -> Result<DType> {
        self.file_of(name)?.dtype(name)
    }

    /// Refuses a tensor of another shape than `expected`.
    ///
    /// # Errors
    /// [`Error::Shape`] with file and name, or as [`Self::file_of`].
    pub fn expect_shape(&self, name: &str, expected: &[usize]) -> Result<()> {
        let file = self.file_of(name)?;
        let actual = &file.meta(name)?.shape;
        if actual == expected {
            return Ok(());
        }
        Err(Error::Shape {
            name: format!("{}: tensor `{name}`", file.path().display()),
            actual: actual.clone(),
            expected: expected.to_vec(),
        })
    }

    /// Copies a tensor out in its type on disk; its pages leave this process's memory as they are copied.
    ///
    /// # Errors
    /// As [`SafetensorsFile::tensor`].
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.file_of(name)?.tensor(name, device)
    }

    /// Like [`Self::tensor`], converted to `dtype` in chunks while it is copied.
    ///
    /// # Errors
    /// As [`SafetensorsFile::tensor_as`].
    pub fn tensor_as(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.file_of(name)?.tensor_as(name, dtype, device)
    }

    /// Bytes of all tensors together.
    pub fn bytes(&self) -> usize {
        self.files
            .iter()
            .flat_map(|file| file.names().filter_map(|name| file.get(name)))
            .map(|meta| meta.bytes.len())
            .sum()
    }
}

/// A file name without folders, as the hub's indices have them: nothing may lead out of the folder.
fn is_plain(file: &str) -> bool {
    let mut parts = Path::new(file).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) && !file.contains(['\\', '\0'])
}

fn list<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    let more = names.len().saturating_sub(LISTED);
    let shown: Vec<String> = names.take(LISTED).map(printable).collect();
    let shown = shown.join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

fn nothing_to_open(path: &Path) -> Error {
    let Ok(entries) = std::fs::read_dir(path) else {
        return Error::file(path, "cannot be listed; check its permissions");
    };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let has = |test: &dyn Fn(&str) -> bool| names.iter().find(|name| test(name)).cloned();
    let message = if names.is_empty() {
        "is empty; it should hold config.json and model.safetensors".to_owned()
    } else if has(&|name| name.starts_with("adapter_config.json") || name.starts_with("adapter_model.")).is_some() {
        "holds an adapter, not a base model; give the adapter with --adapter and its base model with --model".to_owned()
    } else if let Some(shard) = has(&|name| name.starts_with("model-") && name.ends_with(".safetensors")) {
        format!("has shards such as {shard} and no {INDEX_FILE}; download the index too")
    } else if let Some(pickle) = has(&|name| name.starts_with("pytorch_model") && name.ends_with(".bin")) {
        format!(
            "has its weights only as a PyTorch pickle ({pickle}), which can run code and is not opened here; save it as \
             safetensors once: python -c \"from transformers import AutoModelForCausalLM as M; \
             M.from_pretrained('{0}').save_pretrained('{0}')\"",
            path.display()
        )
    } else if let Some(other) = has(&|name| name.ends_with(".safetensors")) {
        format!("has no {SINGLE_FILE}; if {other} is the model, give the path of that file or rename it")
    } else if let Some(gguf) = has(&|name| name.ends_with(".gguf")) {
        format!("has no {SINGLE_FILE}; give the path of the GGUF file itself: {}", path.join(gguf).display())
    } else {
        format!("has no {SINGLE_FILE} and no {INDEX_FILE}; download the model's weights")
    };
    Error::file(path, message)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::safetensors_file::write_safetensors;
    use std::fs;

    fn save(path: PathBuf, names: &[&str]) {
        let tensor = Tensor::arange(0f32, 6f32, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        write_safetensors(path, names.iter().map(|name| (*name, &tensor)), &BTreeMap::new()).unwrap();
    }

    fn sharded(index: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path().join("model-00001-of-00002.safetensors"), &["a", "b"]);
        save(dir.path().join("model-00002-of-00002.safetensors"), &["c"]);
        fs::write(dir.path().join(INDEX_FILE), index).unwrap();
        dir
    }

    const GOOD: &str = r#"{"metadata":{"total_size":72},"weight_map":{"a":"model-00001-of-00002.safetensors",
        "b":"model-00001-of-00002.safetensors","c":"model-00002-of-00002.safetensors"}}"#;

    #[test]
    fn opens_single_and_sharded() {
        let dir = sharded(GOOD);
        let model = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(model.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(model.bytes(), 72);
        assert!(model.contains("c") && !model.contains("d"));
        assert_eq!(model.shape("c").unwrap(), [2, 3]);
        assert_eq!(model.dtype("c").unwrap(), DType::F32);
        assert_eq!(model.tensor("c", &Device::Cpu).unwrap().to_vec2::<f32>().unwrap()[1], [3.0, 4.0, 5.0]);
        let half = model.tensor_as("a", DType::BF16, &Device::Cpu).unwrap();
        assert_eq!(half.dtype(), DType::BF16);
        let error = model.expect_shape("a", &[3, 2]).unwrap_err().to_string();
        assert!(error.contains("00001") && error.contains("[2, 3]") && error.contains("[3, 2]"), "{error}");
        model.expect_shape("a", &[2, 3]).unwrap();

        save(dir.path().join(SINGLE_FILE), &["x"]);
        assert_eq!(Checkpoint::open(dir.path()).unwrap().names().collect::<Vec<_>>(), ["x"]);
        assert_eq!(Checkpoint::open(dir.path().join(SINGLE_FILE)).unwrap().names().len(), 1);
    }

    #[test]
    fn bad_indices_are_explained() {
        for (index, reason) in [
            ("not json", "is not a JSON file"),
            ("version https://git-lfs.github.com/spec/v1", "git lfs pull"),
            ("{}", "no `weight_map`"),
            (r#"{"weight_map":{}}"#, "lists no tensor"),
            (r#"{"weight_map":{"a":3}}"#, "no file of this folder"),
            (r#"{"weight_map":{"a":"../model.safetensors"}}"#, "no file of this folder"),
            (r#"{"weight_map":{"a":"/etc/passwd"}}"#, "no file of this folder"),
            (r#"{"weight_map":{"a":""}}"#, "no file of this folder"),
            (r#"{"weight_map":{"a":".."}}"#, "no file of this folder"),
            (r#"{"weight_map":{"a":"model-00003-of-00003.safetensors"}}"#, "1 is not there: model-00003"),
            (r#"{"weight_map":{"c":"model-00001-of-00002.safetensors"}}"#, "lacks 1 of the 1 tensors"),
        ] {
            let error = Checkpoint::open(sharded(index).path()).unwrap_err().to_string();
            assert!(error.contains(reason), "{index}: {error}");
        }
        let dir = sharded(GOOD);
        save(dir.path().join("model-00002-of-00002.safetensors"), &["c", "a"]);
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("`a`") && error.contains("holds too"), "{error}");
        let path = dir.path().join("model-00002-of-00002.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 4]).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("00002-of-00002") && error.contains("cut off"), "{error}");
    }

    #[test]
    fn folders_without_weights_say_what_to_do() {
        for (file, reason) in [
            ("pytorch_model.bin", "save_pretrained"),
            ("pytorch_model-00001-of-00002.bin", "save_pretrained"),
            ("model-00001-of-00002.safetensors", "download the index"),
            ("adapter_config.json", "--adapter"),
            ("weights.safetensors", "rename it"),
            ("model.gguf", "GGUF file itself"),
            ("config.json", "download the model's weights"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(file), b"{}").unwrap();
            let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(reason), "{file}: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(Checkpoint::open(dir.path()).unwrap_err().to_string().contains("is empty"));
        assert!(Checkpoint::open(dir.path().join("no")).unwrap_err().to_string().contains("No such file"));
        fs::write(dir.path().join("m.gguf"), b"GGUF").unwrap();
        assert!(Checkpoint::open(dir.path().join("m.gguf")).unwrap_err().to_string().contains("GGUF"));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn loading_does_not_keep_the_file_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SINGLE_FILE);
        // Resident bytes of the file's mapping alone: other tests run in this process.
        let resident = || -> usize {
            let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
            let mut lines = smaps.lines().skip_while(|line| !line.ends_with(path.to_str().unwrap()));
            let line = lines.find(|line| line.starts_with("Rss:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
        };
        let size = 40usize << 20;
        let tensor = Tensor::zeros(size / 4, DType::F32, &Device::Cpu).unwrap();
        write_safetensors(&path, [("w", &tensor)], &BTreeMap::new()).unwrap();
        let model = Checkpoint::open(dir.path()).unwrap();
        assert!(model.file_of("w").unwrap().raw("w").unwrap().iter().all(|byte| *byte == 0));
        assert!(resident() >= size, "the test sees the mapping");
        model.tensor("w", &Device::Cpu).unwrap();
        assert!(resident() < size / 8, "{} MB stay", resident() >> 20);
        model.tensor_as("w", DType::BF16, &Device::Cpu).unwrap();
        assert!(resident() < size / 8, "{} MB stay", resident() >> 20);
    }
}
