//! PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`, read strictly, written atomically.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::adapter_config::AdapterConfig;
use crate::adapter_keys::{canonical, compare};
use crate::error::{Error, Result};
use crate::safetensors_file::{SafetensorsFile, write_safetensors};
use crate::suggest::did_you_mean;

/// Name of the weights in an adapter folder.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// A tensor that the model and the config ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Name on disk, as today's PEFT writes it (`base_model.model.….lora_A.weight`).
    pub key: String,
    /// Shape on disk.
    pub shape: Vec<usize>,
    /// Whether the file may lack it.
    pub optional: bool,
}

impl ExpectedTensor {
    /// A tensor that must be there.
    pub fn required(key: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self { key: key.into(), shape: shape.into(), optional: false }
    }

    /// A tensor that may be there.
    pub fn optional(key: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self { optional: true, ..Self::required(key, shape) }
    }
}

/// An opened adapter folder. Tensor names are those of today's PEFT, also for files of older versions.
#[derive(Debug)]
pub struct AdapterFolder {
    dir: PathBuf,
    config: AdapterConfig,
    weights: Arc<SafetensorsFile>,
    keys: BTreeMap<String, Place>,
}

/// Where a tensor lies: the file, and its name there.
pub type StoredTensor = (Arc<SafetensorsFile>, String);

/// A tensor of the folder.
#[derive(Debug, Clone)]
enum Place {
    Stored(StoredTensor),
    /// Made of what another program's file holds.
    Made(Tensor),
}

impl Place {
    fn shape(&self) -> Option<&[usize]> {
        match self {
            Self::Stored((file, name)) => Some(&file.get(name)?.shape),
            Self::Made(tensor) => Some(tensor.dims()),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Stored((file, name)) => file.get(name).map_or(0, |meta| meta.bytes.len()),
            Self::Made(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
        }
    }
}

impl AdapterFolder {
    /// Reads the config and maps the weights.
    ///
    /// # Errors
    /// As [`AdapterConfig::read`] and [`SafetensorsFile::open`]; weights that exist only as `adapter_model.bin` (the
    /// message tells how to convert them); two tensors that stand for the same one.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let config = AdapterConfig::read(dir)?;
        let path = dir.join(ADAPTER_WEIGHTS);
        if !path.exists() {
            return Err(no_weights(dir));
        }
        let weights = Arc::new(SafetensorsFile::open(&path)?);
        let mut keys: BTreeMap<String, StoredTensor> = BTreeMap::new();
        for name in weights.names() {
            // With bias = "all", PEFT stores the biases of `modules_to_save` a second time, under the wrapper's name (and
            // the adapter's, where the module holds others).
            let is_copy = |wrapper: &str| {
                let plain = name.replacen(wrapper, ".", 1);
                plain != name && weights.get(&plain).is_some()
            };
            if is_copy(".modules_to_save.default.") || is_copy(".modules_to_save.") {
                continue;
            }
            let Some(key) = canonical(name) else { continue };
            if let Some((_, other)) = keys.insert(key, (weights.clone(), name.to_owned())) {
                let message = format!("holds the same tensor twice, as `{other}` and as `{name}`; remove one of them");
                return Err(Error::file(&path, message));
            }
        }
        Ok(Self::foreign(dir, config, weights, keys))
    }

    /// The folder `dir` of another program, which keeps its adapter in other files: the config and the names that PEFT (or this
    /// project, for a method that PEFT lacks) would have for it, and where each tensor lies. `weights` is the file to name
    /// in messages.
    pub fn foreign(
        dir: impl AsRef<Path>,
        config: AdapterConfig,
        weights: Arc<SafetensorsFile>,
        keys: BTreeMap<String, StoredTensor>,
    ) -> Self {
        let keys = keys.into_iter().map(|(key, stored)| (key, Place::Stored(stored))).collect();
        Self { dir: dir.as_ref().to_owned(), config, weights, keys }
    }

    /// The folder `dir` of another program whose tensors are not PEFT's but for their names: those that PEFT would have, made of
    /// what is in `weights`.
    pub fn converted(
        dir: impl AsRef<Path>,
        config: AdapterConfig,
        weights: Arc<SafetensorsFile>,
        tensors: BTreeMap<String, Tensor>,
    ) -> Self {
        let keys = tensors.into_iter().map(|(key, tensor)| (key, Place::Made(tensor))).collect();
        Self { dir: dir.as_ref().to_owned(), config, weights, keys }
    }

    /// The tensors that `name` gives a name to, under it and another config: a part of an adapter that is made of several.
    #[must_use]
    pub fn part(&self, config: AdapterConfig, name: impl Fn(&str) -> Option<String>) -> Self {
        let keys = self.keys.iter().filter_map(|(key, place)| Some((name(key)?, place.clone()))).collect();
        Self { dir: self.dir.clone(), config, weights: self.weights.clone(), keys }
    }

    /// One adapter of the tensors of several folders, in the folder `dir`.
    ///
    /// # Errors
    /// No folder, or a tensor that two of them have.
    pub fn joined(dir: impl AsRef<Path>, config: AdapterConfig, parts: Vec<Self>) -> Result<Self> {
        let dir = dir.as_ref();
        let Some(first) = parts.first() else { return Err(Error::file(dir, "holds no adapter")) };
        let (weights, mut keys) = (first.weights.clone(), BTreeMap::new());
        for part in parts {
            for (key, place) in part.keys {
                if keys.contains_key(&key) {
                    return Err(Error::file(
                        part.weights.path(),
                        format!("holds `{key}`, which another of its parts has"),
                    ));
                }
                keys.insert(key, place);
            }
        }
        Ok(Self { dir: dir.to_owned(), config, weights, keys })
    }

    /// The same files under another config, for a config of another program's.
    #[must_use]
    pub fn with_config(self, config: AdapterConfig) -> Self {
        Self { config, ..self }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The config.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The weights' file, with the names as they stand in it.
    pub fn weights(&self) -> &SafetensorsFile {
        &self.weights
    }

    /// Names of the tensors, sorted.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.keys.keys().map(String::as_str)
    }

    /// Whether a tensor is there.
    pub fn contains(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    /// Shape of a tensor, if it is there.
    pub fn shape(&self, key: &str) -> Option<&[usize]> {
        self.keys.get(key)?.shape()
    }

    /// Bytes of all tensors together.
    pub fn bytes(&self) -> usize {
        self.keys.values().map(Place::bytes).sum()
    }

    /// One tensor in the type that it has in the file.
    ///
    /// # Errors
    /// It is not there, or its type cannot be used.
    pub fn tensor(&self, key: &str, device: &Device) -> Result<Tensor> {
        match self.keys.get(key) {
            Some(Place::Stored((file, name))) => file.tensor(name, device),
            Some(Place::Made(tensor)) => Ok(tensor.to_device(device)?),
            None => {
                let near = did_you_mean(key, self.keys());
                Err(Error::file(self.weights.path(), format!("has no tensor `{key}`{near}")))
            }
        }
    }

    /// Compares the file with `expected` without reading a tensor.
    ///
    /// # Errors
    /// [`Error::AdapterKeys`], which lists what is missing, unexpected and of another shape, with near misses and
    /// the known causes (a prefix too many or too few, another tool's format).
    pub fn check(&self, expected: &[ExpectedTensor]) -> Result<()> {
        self.compare(self.keys(), expected)
    }

    /// Compares one tensor with what is `expected` of it; others may be there.
    ///
    /// # Errors
    /// [`Error::AdapterKeys`] when it is missing or of another shape.
    pub fn check_one(&self, expected: &ExpectedTensor) -> Result<()> {
        self.compare(self.keys().filter(|key| *key == expected.key), std::slice::from_ref(expected))
    }

    fn compare<'a>(&'a self, keys: impl Iterator<Item = &'a str>, expected: &[ExpectedTensor]) -> Result<()> {
        let found = keys.filter_map(|key| Some((key, self.shape(key)?))).collect();
        let mismatch = compare(&found, expected);
        if mismatch.is_empty() {
            return Ok(());
        }
        Err(Error::AdapterKeys { path: self.weights.path().to_owned(), mismatch: Box::new(mismatch) })
    }

    /// The tensors of `expected`, by name, each in the type that it has in the file.
    ///
    /// # Errors
    /// As [`Self::check`]: nothing may be missing (but for the optional), nothing left over, every shape must fit.
    pub fn load(&self, expected: &[ExpectedTensor], device: &Device) -> Result<BTreeMap<String, Tensor>> {
        self.check(expected)?;
        expected
            .iter()
            .filter(|tensor| self.contains(&tensor.key))
            .map(|tensor| Ok((tensor.key.clone(), self.tensor(&tensor.key, device)?)))
            .collect()
    }
}

fn no_weights(dir: &Path) -> Error {
    let pickle = dir.join("adapter_model.bin");
    if pickle.exists() {
        return only_a_pickle(dir, "adapter_model.bin", ADAPTER_WEIGHTS);
    }
    let message =
        format!("has adapter_config.json and no {ADAPTER_WEIGHTS}; the adapter was not saved or downloaded completely");
    Error::file(dir, message)
}

/// The error for a folder with weights in a pickle alone, which is not read; the message has the command that makes the file
/// `wanted` of it.
pub fn only_a_pickle(dir: &Path, pickle: &str, wanted: &str) -> Error {
    let message = format!(
        "has its weights only as a PyTorch pickle ({pickle}), which can run code and is not opened here; convert it once: \
         python -c \"import torch, safetensors.torch as s; s.save_file({{k: v.clone() for k, v in torch.load('{}', \
         weights_only=True).items()}}, '{}', metadata={{'format': 'pt'}})\"",
        dir.join(pickle).display(),
        dir.join(wanted).display()
    );
    Error::file(dir, message)
}

/// Writes an adapter folder that PEFT loads: weights first, then the config, each atomically, so that a folder with a
/// config is complete. The folder is made if need be; other files in it stay.
///
/// # Errors
/// A tensor of a type that PEFT's files do not have, a name that occurs twice, or [`Error::Write`].
pub fn write_adapter<'a>(
    dir: impl AsRef<Path>,
    config: &AdapterConfig,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> Result<()> {
    let dir = dir.as_ref();
    let tensors: Vec<(&str, &Tensor)> = tensors.into_iter().collect();
    for (name, tensor) in &tensors {
        let floats = matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F16);
        // The integer types that every torch has.
        if !floats && !matches!(tensor.dtype(), DType::U8 | DType::I16 | DType::I32 | DType::I64) {
            let message = format!(
                "tensor `{name}` has the type {:?}; adapters hold F32, BF16, F16 and, as indices, U8, I16, I32 or I64",
                tensor.dtype()
            );
            return Err(Error::file(dir.join(ADAPTER_WEIGHTS), message));
        }
    }
    std::fs::create_dir_all(dir).map_err(|cause| Error::write(dir, cause))?;
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(dir.join(ADAPTER_WEIGHTS), tensors, &metadata)?;
    config.write(dir)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn config() -> AdapterConfig {
        let json = json!({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "lora_alpha": 16, "mine": [1, 2]});
        AdapterConfig::new(json.as_object().unwrap().clone()).unwrap()
    }

    fn ones(shape: &[usize], dtype: DType) -> Tensor {
        Tensor::ones(shape, dtype, &Device::Cpu).unwrap()
    }

    fn folder(tensors: &[(&str, &Tensor)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        write_adapter(dir.path(), &config(), tensors.iter().copied()).unwrap();
        dir
    }

    #[test]
    fn strict_reading_lists_every_difference() {
        let (a, b) = (ones(&[2, 8], DType::F32), ones(&[8, 2], DType::F32));
        let p = "base_model.model.model.layers.0.self_attn.q_proj";
        let names = [format!("{p}.lora_A.weight"), format!("{p}.lora_B.weight"), format!("{p}.lora_C.weight")];
        let dir = folder(&[(&names[0], &a), (&names[1], &b), (&names[2], &b)]);
        let adapter = AdapterFolder::open(dir.path()).unwrap();
        let expected = [
            ExpectedTensor::required(&names[0], [4, 8]),
            ExpectedTensor::required(&names[1], [8, 2]),
            ExpectedTensor::required(format!("{p}.lora_magnitude_vector"), [8]),
            ExpectedTensor::optional("base_model.model.lm_head.weight", [8, 8]),
        ];
        let text = adapter.load(&expected, &Device::Cpu).unwrap_err().to_string();
        for part in [
            ADAPTER_WEIGHTS,
            "1 missing, 1 unexpected, 1 of another shape",
            "missing: base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            "unexpected: base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight",
            "lora_A.weight is [2, 8], expected [4, 8]",
        ] {
            assert!(text.contains(part), "{text}\nlacks {part}");
        }
        let fits = [
            ExpectedTensor::required(&names[0], [2, 8]),
            ExpectedTensor::required(&names[1], [8, 2]),
            ExpectedTensor::optional(&names[2], [8, 2]),
            ExpectedTensor::optional("other", [1]),
        ];
        let loaded = adapter.load(&fits, &Device::Cpu).unwrap();
        assert_eq!(loaded.keys().collect::<Vec<_>>(), names.iter().collect::<Vec<_>>());
        assert_eq!(adapter.config().get("mine").unwrap(), &json!([1, 2]));
        let error = adapter.tensor("nope.lora_A.weight", &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("has no tensor `nope.lora_A.weight`"), "{error}");
    }

    #[test]
    fn files_of_old_versions_load() {
        let (a, b) = (ones(&[2, 8], DType::F32), ones(&[8, 2], DType::BF16));
        let dir = folder(&[
            ("base_model.model.a.lora_A.default.weight", &a),
            ("base_model.model.a.lora_B.default.weight", &b),
            ("base_model.model.score.modules_to_save.default.weight", &a),
            ("base_model.model.score.original_module.weight", &a),
        ]);
        let adapter = AdapterFolder::open(dir.path()).unwrap();
        let expected = [
            ExpectedTensor::required("base_model.model.a.lora_A.weight", [2, 8]),
            ExpectedTensor::required("base_model.model.a.lora_B.weight", [8, 2]),
            ExpectedTensor::required("base_model.model.score.weight", [2, 8]),
        ];
        let loaded = adapter.load(&expected, &Device::Cpu).unwrap();
        assert_eq!(loaded.len(), 3);
        assert_eq!(loaded["base_model.model.a.lora_B.weight"].dtype(), DType::BF16);
        let dir = folder(&[("a.lora_A.default.weight", &a), ("a.lora_A.weight", &a)]);
        let error = AdapterFolder::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("twice"), "{error}");
    }

    /// `tests/fixtures/make_hf_lora.py` made the folder with HF PEFT: DoRA, a rank pattern, a bf16 head saved whole.
    #[test]
    fn a_folder_of_peft_is_written_back_byte_for_byte() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf_lora");
        let adapter = AdapterFolder::open(&dir).unwrap();
        let layer = "base_model.model.model.layers.0";
        let mut expected = vec![ExpectedTensor::required("base_model.model.lm_head.weight", [16, 8])];
        for (name, outputs, inputs, rank) in [
            ("self_attn.q_proj", 8, 8, 4),
            ("self_attn.k_proj", 4, 8, 2),
            ("self_attn.v_proj", 4, 8, 2),
            ("self_attn.o_proj", 8, 8, 2),
            ("mlp.gate_proj", 12, 8, 2),
            ("mlp.up_proj", 12, 8, 1),
            ("mlp.down_proj", 8, 12, 2),
        ] {
            expected.push(ExpectedTensor::required(format!("{layer}.{name}.lora_A.weight"), [rank, inputs]));
            expected.push(ExpectedTensor::required(format!("{layer}.{name}.lora_B.weight"), [outputs, rank]));
            expected.push(ExpectedTensor::required(format!("{layer}.{name}.lora_magnitude_vector"), [outputs]));
        }
        let tensors = adapter.load(&expected, &Device::Cpu).unwrap();
        assert_eq!(tensors.len(), 22);
        assert_eq!(tensors["base_model.model.lm_head.weight"].dtype(), DType::BF16);
        let copy = tempfile::tempdir().unwrap();
        write_adapter(copy.path(), adapter.config(), tensors.iter().map(|(n, t)| (n.as_str(), t))).unwrap();
        for file in ["adapter_config.json", ADAPTER_WEIGHTS] {
            let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
            assert!(read(&dir) == read(copy.path()), "{file} differs from PEFT's");
        }
    }

    #[test]
    fn folders_that_are_not_complete_are_explained() {
        let dir = tempfile::tempdir().unwrap();
        config().write(dir.path()).unwrap();
        let error = AdapterFolder::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("not saved or downloaded completely"), "{error}");
        std::fs::write(dir.path().join("adapter_model.bin"), b"x").unwrap();
        let error = AdapterFolder::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("weights_only=True") && error.contains("save_file"), "{error}");
    }

    #[test]
    fn only_types_that_peft_has_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let error = write_adapter(dir.path(), &config(), [("ids", &ones(&[1], DType::U32))]).unwrap_err().to_string();
        assert!(error.contains("`ids`") && error.contains("U32"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let a = ones(&[1], DType::F32);
        let error = write_adapter(dir.path(), &config(), [("a", &a), ("a", &a)]).unwrap_err().to_string();
        assert!(error.contains("twice"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn save_load_save_is_stable(
            shapes in prop::collection::btree_map("base_model\\.model\\.[a-z]{1,4}\\.[0-9]\\.lora_[AB]\\.weight", (1usize..5, 1usize..5, 0usize..3), 0..10),
        ) {
            let tensors: Vec<(String, Tensor)> = shapes.iter().enumerate().map(|(i, (name, (rows, cols, dtype)))| {
                let values: Vec<f32> = (0..rows * cols).map(|k| (i * 31 + k) as f32 * 0.37).collect();
                let dtype = [DType::F32, DType::BF16, DType::F16][*dtype];
                (name.clone(), Tensor::from_vec(values, (*rows, *cols), &Device::Cpu).unwrap().to_dtype(dtype).unwrap())
            }).collect();
            let dir = tempfile::tempdir().unwrap();
            write_adapter(dir.path(), &config(), tensors.iter().map(|(n, t)| (n.as_str(), t))).unwrap();
            let bytes = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
            let first = (bytes(ADAPTER_WEIGHTS), bytes("adapter_config.json"));
            let adapter = AdapterFolder::open(dir.path()).unwrap();
            let expected: Vec<_> = tensors.iter().map(|(n, t)| ExpectedTensor::required(n, t.dims())).collect();
            let loaded = adapter.load(&expected, &Device::Cpu).unwrap();
            write_adapter(dir.path(), adapter.config(), loaded.iter().map(|(n, t)| (n.as_str(), t))).unwrap();
            prop_assert_eq!(first, (bytes(ADAPTER_WEIGHTS), bytes("adapter_config.json")));
        }
    }
}
