//! A base model on disk: a Hugging Face folder or a GGUF file, with its configuration, weights and tokenizer.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use peft_core::{Checkpoint, Error, Result};

use crate::config::DecoderConfig;
use crate::decoder::Decoder;
use crate::gguf::Gguf;
use crate::source::{GgufSource, Placement, RandomSource, SafetensorsSource};
use crate::tokenizer::Tokenizer;

/// Files that travel with a model: a merged folder gets them too.
const TOKENIZER_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// The files of a base model, opened but not loaded.
#[derive(Debug)]
pub struct ModelFiles {
    path: PathBuf,
    config: DecoderConfig,
    weights: Weights,
}

#[derive(Debug)]
enum Weights {
    Folder(Checkpoint),
    Gguf(Box<Gguf>),
    /// None yet: a config to train from nothing.
    Random,
}

impl ModelFiles {
    /// Opens a folder in Hugging Face layout or a `.gguf` file, reading headers only.
    ///
    /// # Errors
    /// A missing, truncated or unknown file, by its name.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let config = Self::config_of(path)?;
            return Ok(Self { path: path.into(), config, weights: Weights::Folder(Checkpoint::open(path)?) });
        }
        if !path.exists() {
            return Err(Error::file(path, "does not exist; give a model folder or a .gguf file"));
        }
        if path.extension().is_none_or(|e| !e.eq_ignore_ascii_case("gguf")) {
            return Err(Error::file(path, "is neither a model folder nor a .gguf file"));
        }
        let gguf = Gguf::open(path).map_err(message)?;
        let config = DecoderConfig::from_gguf(&gguf).map_err(message)?;
        Ok(Self { path: path.into(), config, weights: Weights::Gguf(Box::new(gguf)) })
    }

    /// Opens a folder with a `config.json` and a tokenizer whose weights are to be made at random.
    ///
    /// # Errors
    /// A missing or wrong `config.json`.
    pub fn open_random(path: &Path) -> Result<Self> {
        Ok(Self { path: path.into(), config: Self::config_of(path)?, weights: Weights::Random })
    }

    fn config_of(dir: &Path) -> Result<DecoderConfig> {
        let file = dir.join("config.json");
        if !file.is_file() {
            return Err(Error::file(dir, "has no config.json; a model folder holds config.json and model.safetensors"));
        }
        DecoderConfig::from_hf_json(&file).map_err(message)
    }

    /// Where the model is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Whether the model is a GGUF file.
    #[must_use]
    pub fn is_gguf(&self) -> bool {
        matches!(self.weights, Weights::Gguf(_))
    }

    /// The GGUF file, where the model is one.
    #[must_use]
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.weights {
            Weights::Gguf(gguf) => Some(gguf),
            _ => None,
        }
    }

    /// Loads the weights. `seed` is for a model that starts at random.
    ///
    /// # Errors
    /// A missing tensor or a wrong shape, by its name.
    pub fn load(&self, placement: &Placement, seed: u64) -> Result<Decoder> {
        let config = self.config.clone();
        match &self.weights {
            Weights::Folder(checkpoint) => {
                let source = SafetensorsSource::new(checkpoint, placement.clone());
                Decoder::load(config, &source, placement)
            }
            Weights::Gguf(gguf) => Decoder::load(config, &GgufSource::new(gguf, placement.clone()), placement),
            Weights::Random => {
                let std =
                    config.raw.get("initializer_range").and_then(serde_json::Value::as_f64).unwrap_or(0.02) as f32;
                let untied_head = !config.tie_word_embeddings;
                Decoder::load(config, &RandomSource { seed, std, untied_head, placement: placement.clone() }, placement)
            }
        }
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// When there is none or it is broken.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match &self.weights {
            Weights::Gguf(gguf) => Tokenizer::from_gguf(gguf).map_err(message),
            _ => Tokenizer::from_folder(&self.path).map_err(message),
        }
    }

    /// Names of all tensors, as transformers names them.
    #[must_use]
    pub fn tensor_names(&self) -> Vec<String> {
        match &self.weights {
            Weights::Folder(c) => c.names().map(str::to_string).collect(),
            Weights::Gguf(g) => g.hf_tensor_names(),
            Weights::Random => Vec::new(),
        }
    }

    /// A tensor in a type of the caller's choice, on the CPU.
    ///
    /// # Errors
    /// When it is absent or cannot be read.
    pub fn tensor(&self, name: &str, dtype: DType) -> Result<Tensor> {
        match &self.weights {
            Weights::Folder(c) => c.tensor_as(name, dtype, &Device::Cpu),
            Weights::Gguf(g) => g.dense_as(name, dtype, &Device::Cpu).map_err(message),
            Weights::Random => Err(Error::msg(format!("`{name}`: the model has no weights yet"))),
        }
    }

    /// Shape of a tensor.
    ///
    /// # Errors
    /// When it is absent.
    pub fn tensor_shape(&self, name: &str) -> Result<Vec<usize>> {
        match &self.weights {
            Weights::Folder(c) => c.shape(name).map(<[usize]>::to_vec),
            Weights::Gguf(g) => match g.hf_tensor(name) {
                Some(t) => Ok(t.shape.clone()),
                None => Err(Error::file(g.path(), format!("has no tensor for `{name}`"))),
            },
            Weights::Random => Err(Error::msg(format!("`{name}`: the model has no weights yet"))),
        }
    }

    /// Stored type of a tensor where it is a float type; `f16` for GGUF blocks.
    ///
    /// # Errors
    /// When it is absent.
    pub fn tensor_dtype(&self, name: &str) -> Result<DType> {
        match &self.weights {
            Weights::Folder(c) => c.dtype(name),
            Weights::Gguf(_) => Ok(DType::F16),
            Weights::Random => Ok(DType::F32),
        }
    }

    /// Writes config and tokenizer files into `dir`, so that weights beside them make a complete model folder. `tied`
    /// says whether the head shares the embedding in the written weights.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write_companions(&self, dir: &Path, dtype: DType, tied: bool) -> Result<()> {
        let mut config = self.config.to_hf_json();
        config.insert("tie_word_embeddings".into(), tied.into());
        let key =
            if config.contains_key("dtype") || !config.contains_key("torch_dtype") { "dtype" } else { "torch_dtype" };
        let name = match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        };
        config.insert(key.into(), name.into());
        let text = serde_json::to_string_pretty(&config).map_err(|e| Error::msg(e.to_string()))? + "\n";
        peft_core::atomic::write_file(dir.join("config.json"), text.as_bytes())?;
        if self.is_gguf() {
            return self.tokenizer()?.save(dir).map_err(message);
        }
        for file in TOKENIZER_FILES {
            let from = self.path.join(file);
            if from.is_file() {
                let bytes = std::fs::read(&from).map_err(|e| Error::io(&from, e))?;
                peft_core::atomic::write_file(dir.join(file), &bytes)?;
            }
        }
        Ok(())
    }
}

fn message(e: impl std::fmt::Display) -> Error {
    Error::msg(e.to_string())
}
