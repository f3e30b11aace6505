//! A base model on disk: a Hugging Face folder or a GGUF file, with its configuration, weights and tokenizer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::{Checkpoint, Error, HeadKind, Result, Task};

use crate::any_model::AnyModel;
use crate::config::{DecoderConfig, ModelConfig, check_outputs};
use crate::decoder::Decoder;
use crate::encoder::Encoder;
use crate::encoder_decoder::EncoderDecoder;
use crate::gguf::Gguf;
use crate::source::{DeferredSource, GgufSource, Placement, RandomSource, SafetensorsSource, WeightSource};
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
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// The files of a base model, opened but not loaded.
#[derive(Debug)]
pub struct ModelFiles {
    path: PathBuf,
    config: ModelConfig,
    weights: Weights,
}

#[derive(Debug)]
enum Weights {
    Folder(Arc<Checkpoint>),
    Gguf(Arc<Gguf>),
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
            return Ok(Self { path: path.into(), config, weights: Weights::Folder(Arc::new(Checkpoint::open(path)?)) });
        }
        if !path.exists() {
            return Err(Error::file(path, "does not exist; give a model folder or a .gguf file"));
        }
        if path.extension().is_none_or(|e| !e.eq_ignore_ascii_case("gguf")) {
            return Err(Error::file(path, "is neither a model folder nor a .gguf file"));
        }
        let gguf = Gguf::open(path).map_err(message)?;
        let config = ModelConfig::Decoder(Box::new(DecoderConfig::from_gguf(&gguf).map_err(message)?));
        Ok(Self { path: path.into(), config, weights: Weights::Gguf(Arc::new(gguf)) })
    }

    /// Opens a folder with a `config.json` and a tokenizer whose weights are to be made at random.
    ///
    /// # Errors
    /// A missing or wrong `config.json`.
    pub fn open_random(path: &Path) -> Result<Self> {
        Ok(Self { path: path.into(), config: Self::config_of(path)?, weights: Weights::Random })
    }

    fn config_of(dir: &Path) -> Result<ModelConfig> {
        let file = dir.join("config.json");
        if !file.is_file() {
            return Err(Error::file(dir, "has no config.json; a model folder holds config.json and model.safetensors"));
        }
        ModelConfig::from_hf_json(&file).map_err(message)
    }

    /// Where the model is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The configuration of a decoder.
    ///
    /// # Errors
    /// When the model is an encoder.
    pub fn decoder_config(&self) -> Result<&DecoderConfig> {
        match &self.config {
            ModelConfig::Decoder(config) => Ok(config),
            other => Err(self.not_a_decoder(other.model_type())),
        }
    }

    fn not_a_decoder(&self, model_type: &str) -> Error {
        Error::file(&self.path, format!("is no decoder alone ({model_type}), and this needs a causal language model"))
    }

    /// Whether the checkpoint lacks the output layer of its class head, so that the number of classes is not fixed yet.
    #[must_use]
    pub fn lacks_class_head(&self) -> bool {
        match (&self.config, &self.weights) {
            (ModelConfig::Encoder(c), Weights::Folder(checkpoint)) => {
                !checkpoint.contains(&format!("{}.weight", c.head_out()))
            }
            (ModelConfig::Encoder(_), Weights::Random) => true,
            _ => false,
        }
    }

    /// Says what the head is for, where the checkpoint leaves it open: a checkpoint of the encoder alone may have any head, and one that
    /// reads a whole sequence may be for classes or for numbers. A head that is not made yet has two outputs, of a regression one, until
    /// [`ModelFiles::set_labels`] names others.
    ///
    /// # Errors
    /// When the checkpoint holds the head of another class, or when the model is no encoder and has none.
    pub fn set_head(&mut self, kind: HeadKind) -> Result<()> {
        let Task::Head { kind: now, outputs, .. } = self.config.task() else {
            let message = format!(
                "is a {} and has no head for {kind}: give an encoder, or a checkpoint whose class is a `*{}`",
                self.config.task().peft_name(),
                kind.architecture()
            );
            return Err(Error::file(&self.path, message));
        };
        if kind == now {
            return Ok(());
        }
        if let Some(named) = self.config.named_head().filter(|named| named.architecture() != kind.architecture()) {
            let message = format!(
                "has the head of a `*{}`, and {kind} needs that of a `*{}`: give the encoder that it was made from",
                named.architecture(),
                kind.architecture()
            );
            return Err(Error::file(&self.path, message));
        }
        self.config.set_head(kind);
        if !self.lacks_class_head() {
            return check_outputs(kind, outputs).map_err(|why| {
                Error::file(&self.path, format!("its config.json {why}, so its head is not one for {kind}"))
            });
        }
        let outputs = if kind == HeadKind::Regression { 1 } else { 2 };
        self.config.set_labels((0..outputs).map(|i| format!("LABEL_{i}")).collect());
        Ok(())
    }

    /// Names the classes of the class head, by their number.
    ///
    /// # Errors
    /// When the model has no class head, when the names are too few for what it is for or not all different, or when the checkpoint
    /// holds a head with another number of classes.
    pub fn set_labels(&mut self, labels: Vec<String>) -> Result<()> {
        let Some(known) = self.config.labels() else {
            return Err(Error::file(&self.path, "has no class head, so there are no classes to name"));
        };
        if let Some((i, twice)) = labels.iter().enumerate().find(|(i, name)| labels.iter().take(*i).any(|n| n == *name))
        {
            return Err(Error::file(&self.path, format!("class {i} has a name that another has: `{twice}`")));
        }
        if let Task::Head { kind, .. } = self.config.task() {
            check_outputs(kind, labels.len()).map_err(|why| Error::file(&self.path, format!("a head that {why}")))?;
        }
        if labels.len() != known.len() && !self.lacks_class_head() {
            return Err(Error::file(
                &self.path,
                format!("has a head for {} classes ({}), not for {}", known.len(), known.join(", "), labels.len()),
            ));
        }
        self.config.set_labels(labels);
        Ok(())
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

    /// Loads the weights. `seed` is for a model or a head that starts at random.
    ///
    /// # Errors
    /// A missing tensor or a wrong shape, by its name.
    pub fn load(&self, placement: &Placement, seed: u64) -> Result<AnyModel> {
        let source: Box<dyn WeightSource> = match &self.weights {
            Weights::Folder(checkpoint) => Box::new(SafetensorsSource::new(checkpoint.clone(), placement.clone())),
            Weights::Gguf(gguf) => Box::new(GgufSource::new(gguf.clone(), placement.clone())),
            Weights::Random => Box::new(self.random_source(placement, seed)),
        };
        self.load_from(source.as_ref(), placement, seed)
    }

    /// The model with its matrices left in their files ([`DeferredSource`]): for work that goes over them once. A missing or
    /// misshapen matrix is found when it is used.
    ///
    /// # Errors
    /// As [`ModelFiles::load`] for vectors.
    pub fn load_deferred(&self, placement: &Placement, seed: u64) -> Result<AnyModel> {
        let device = placement.device.clone();
        match &self.weights {
            Weights::Folder(checkpoint) => {
                let source = SafetensorsSource::new(checkpoint.clone(), placement.clone());
                self.load_from(&DeferredSource { source, device }, placement, seed)
            }
            Weights::Gguf(gguf) => {
                let source = GgufSource::new(gguf.clone(), placement.clone());
                self.load_from(&DeferredSource { source, device }, placement, seed)
            }
            Weights::Random => self.load(placement, seed),
        }
    }

    fn random_source(&self, placement: &Placement, seed: u64) -> RandomSource {
        let (raw, untied_head) = match &self.config {
            ModelConfig::Decoder(c) => (&c.raw, !c.tie_word_embeddings),
            ModelConfig::Encoder(c) => (&c.raw, true),
            ModelConfig::Seq2Seq(c) => (&c.raw, !c.tie_word_embeddings),
        };
        let std = raw.get("initializer_range").and_then(serde_json::Value::as_f64).unwrap_or(0.02) as f32;
        RandomSource { seed, std, untied_head, placement: placement.clone() }
    }

    fn load_from(&self, source: &dyn WeightSource, placement: &Placement, seed: u64) -> Result<AnyModel> {
        match &self.config {
            ModelConfig::Decoder(c) => Decoder::load((**c).clone(), source, placement).map(AnyModel::Decoder),
            ModelConfig::Encoder(c) => Encoder::load((**c).clone(), source, placement, seed).map(AnyModel::Encoder),
            ModelConfig::Seq2Seq(c) => {
                EncoderDecoder::load((**c).clone(), source, placement).map(Box::new).map(AnyModel::EncoderDecoder)
            }
        }
    }

    /// Loads the weights of a decoder.
    ///
    /// # Errors
    /// When the model is an encoder; a missing tensor or a wrong shape, by its name.
    pub fn load_decoder(&self, placement: &Placement, seed: u64) -> Result<Decoder> {
        match self.load(placement, seed)? {
            AnyModel::Decoder(model) => Ok(model),
            _ => Err(self.not_a_decoder(self.config.model_type())),
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

    /// Stored type of the token embedding where it is a float type; `f16` for GGUF blocks.
    ///
    /// # Errors
    /// When there is none.
    pub fn stored_dtype(&self) -> Result<DType> {
        let ends = ["embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "shared.weight"];
        let is_table = |name: &&String| ends.iter().any(|end| name.ends_with(end));
        match self.tensor_names().iter().find(is_table) {
            Some(name) => self.tensor_dtype(name),
            None => Err(Error::file(&self.path, "has no token embedding")),
        }
    }

    /// Writes config and tokenizer files into `dir`, so that weights beside them make a complete model folder. `tied`
    /// says whether the head shares the embedding in the written weights.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write_companions(&self, dir: &Path, dtype: DType, tied: bool) -> Result<()> {
        let mut config = self.config.to_hf_json(tied);
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
