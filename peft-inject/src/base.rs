//! The sites of a checkpoint whose model nobody knows.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::adapter_config::read_json_file;
use peft_core::checkpoint::Checkpoint;
use peft_core::kernels::{Deferred, FrozenWeight};
use peft_core::{
    BaseLayer, BaseModel, Error, FrozenEmbedding, FrozenLinear, FrozenNorm, NormKind, Result, SiteId, SiteKind,
    SiteTable, Stored,
};
use serde_json::{Map, Value};

/// A folder of safetensors as adapters see it. Names and shapes of its tensors say what is where:
///
/// | tensor | site |
/// |---|---|
/// | `….weight`, a matrix | a linear layer `[out, in]`; in GPT-2 `[in, out]` where transformers has a `Conv1D` |
/// | the same, called an embedding (`embed_tokens`, `word_embeddings`, `wte`, `wpe`, `shared`, …) | an embedding `[vocab, dim]` |
/// | `….weight`, a vector | a normalisation |
///
/// Others (convolutions, experts in one tensor) are handed to the model as they are, and an adapter for them is refused. Matrices stay in the file
/// until they are used.
#[derive(Debug)]
pub struct Base {
    checkpoint: Arc<Checkpoint>,
    sites: Arc<SiteTable>,
    layers: Vec<Layer>,
    model_type: String,
    tied: Option<String>,
    device: Device,
}

#[derive(Debug)]
enum Layer {
    Linear(FrozenLinear),
    Embedding(FrozenEmbedding),
    Norm(FrozenNorm),
}

impl Base {
    /// Opens a model's folder: `config.json` beside `model.safetensors` or shards with an index.
    ///
    /// # Errors
    /// A folder without them, damaged files, a norm that cannot be read.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        Self::open_below(folder, "")
    }

    /// Like [`Base::open`], for a checkpoint that lacks a part of the path that adapters know: that of a bare `BertModel` has
    /// `encoder.layer.0…`, where an adapter trained on `BertForSequenceClassification` has `bert.encoder.layer.0…`; there
    /// `prefix` is `bert`.
    ///
    /// # Errors
    /// As [`Base::open`].
    pub fn open_below(folder: impl AsRef<Path>, prefix: &str) -> Result<Self> {
        let folder = folder.as_ref();
        let checkpoint = Arc::new(Checkpoint::open(folder)?);
        let path = folder.join("config.json");
        let config = read_json_file(&path)?
            .ok_or_else(|| Error::file(folder, "has no config.json, which says what kind of model it is"))?;
        let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default().to_owned();
        let names: Vec<&str> = checkpoint.names().filter_map(|name| name.strip_suffix(".weight")).collect();
        let blocks = names.iter().filter_map(|name| block_of(name)).max().map_or(0, |last| last + 1);
        let (sites, layers) = (SiteTable::new(), Vec::new());
        let mut made = Making { checkpoint: &checkpoint, sites, layers, blocks, device: Device::Cpu };
        for name in names {
            made.add(name, prefix, has_conv1d(&model_type))?;
        }
        let Making { sites, layers, device, .. } = made;
        let tied = tied_embedding(&config, &sites);
        Ok(Self { sites: Arc::new(sites), layers, model_type, tied, device, checkpoint })
    }

    /// The files.
    pub(crate) fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// A tensor as the file has it, in `dtype`.
    pub(crate) fn tensor(&self, name: &str, dtype: DType) -> Result<Tensor> {
        self.checkpoint.tensor_as(name, dtype, &self.device)
    }
}

impl BaseModel for Base {
    fn sites(&self) -> &Arc<SiteTable> {
        &self.sites
    }

    fn layer(&self, site: SiteId) -> Result<BaseLayer<'_>> {
        match self.layers.get(site.index()) {
            Some(Layer::Linear(layer)) => Ok(BaseLayer::Linear(layer)),
            Some(Layer::Embedding(layer)) => Ok(BaseLayer::Embedding(layer)),
            Some(Layer::Norm(layer)) => Ok(BaseLayer::Norm(layer)),
            None => Err(Error::msg(format!("site {} is not one of this checkpoint", site.0))),
        }
    }

    fn model_type(&self) -> &str {
        &self.model_type
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn dtype(&self) -> DType {
        DType::F32
    }

    fn tied_embedding(&self) -> Option<&str> {
        self.tied.as_deref()
    }
}

struct Making<'a> {
    checkpoint: &'a Arc<Checkpoint>,
    sites: SiteTable,
    layers: Vec<Layer>,
    blocks: usize,
    device: Device,
}

impl Making<'_> {
    /// Adds the layer whose tensors are `stored.weight` and maybe `stored.bias`, if it is one.
    fn add(&mut self, stored: &str, prefix: &str, conv1d: bool) -> Result<()> {
        let weight = format!("{stored}.weight");
        if !matches!(self.checkpoint.dtype(&weight), Ok(DType::F32 | DType::F16 | DType::BF16 | DType::F64)) {
            return Ok(());
        }
        let path = if prefix.is_empty() { stored.to_owned() } else { format!("{prefix}.{stored}") };
        let bias_name = format!("{stored}.bias");
        let bias = self.checkpoint.contains(&bias_name);
        let last = path.rsplit('.').next().unwrap_or_default().to_owned();
        match *self.checkpoint.shape(&weight)? {
            [vocab, dim] if is_embedding(&last) => {
                let id = self.register(stored, &path, SiteKind::Embedding { vocab, dim }, false);
                let weight = self.deferred(weight, (vocab, dim), false);
                self.layers.push(Layer::Embedding(FrozenEmbedding::new(id, path, weight, DType::F32)));
            }
            [rows, columns] => {
                let transposed = conv1d && matches!(&*last, "c_attn" | "c_proj" | "c_fc" | "q_attn");
                let (out, inp) = if transposed { (columns, rows) } else { (rows, columns) };
                let kind = SiteKind::Linear { in_features: inp, out_features: out, bias };
                let id = self.register(stored, &path, kind, transposed);
                if is_head(&last) {
                    self.sites.mark_output_head(id);
                }
                let weight = self.deferred(weight, (out, inp), transposed);
                let bias = bias.then(|| self.vector(&bias_name)).transpose()?;
                let layer = FrozenLinear::new(id, path, weight, bias)?;
                self.layers.push(Layer::Linear(if transposed { layer.as_conv1d() } else { layer }));
            }
            [dim] => {
                let id = self.register(stored, &path, SiteKind::Norm { dim, bias }, false);
                let kind = if bias { NormKind::Layer } else { NormKind::Rms { offset: 0.0 } };
                let bias = bias.then(|| self.vector(&bias_name)).transpose()?;
                // It is never run, so what keeps its variance from zero does not matter.
                self.layers.push(Layer::Norm(FrozenNorm::new(id, path, kind, self.vector(&weight)?, bias, 0.0)));
            }
            _ => {}
        }
        Ok(())
    }

    fn register(&mut self, stored: &str, path: &str, kind: SiteKind, fan_in_fan_out: bool) -> SiteId {
        let segment = match block_of(path) {
            Some(block) => block + 1,
            None if path.split('.').any(is_embedding) => 0,
            None => self.blocks + 1,
        };
        let id = self.sites.register(path, kind, segment);
        let name = (path != stored).then(|| stored.to_owned().into());
        self.sites.set_stored(id, Stored { name, fan_in_fan_out, ..Stored::default() });
        id
    }

    fn vector(&self, name: &str) -> Result<Tensor> {
        self.checkpoint.tensor_as(name, DType::F32, &self.device)
    }

    fn deferred(&self, name: String, (out, inp): (usize, usize), transposed: bool) -> FrozenWeight {
        let (checkpoint, device) = (Arc::clone(self.checkpoint), self.device.clone());
        let read = move || {
            let stored = checkpoint.dtype(&name).map_err(candle_core::Error::wrap)?;
            let dtype = if stored == DType::F64 { DType::F32 } else { stored };
            let tensor = checkpoint.tensor_as(&name, dtype, &device).map_err(candle_core::Error::wrap)?;
            FrozenWeight::dense(&if transposed { tensor.t()?.contiguous()? } else { tensor })
        };
        FrozenWeight::deferred(out, inp, Deferred::new(self.device.clone(), read))
    }
}

/// The number in a path: that of its block.
fn block_of(path: &str) -> Option<usize> {
    path.split('.').find_map(|part| part.parse().ok())
}

/// Whether models of this type have transformers' `Conv1D` in place of linear layers.
fn has_conv1d(model_type: &str) -> bool {
    matches!(model_type, "gpt2" | "openai-gpt" | "imagegpt" | "decision_transformer")
}

fn is_head(last: &str) -> bool {
    matches!(last, "lm_head" | "embed_out" | "score" | "classifier")
}

fn is_embedding(last: &str) -> bool {
    !is_head(last) && (last.contains("emb") || matches!(last, "wte" | "wpe" | "shared" | "relative_attention_bias"))
}

/// The table that the output head shares: a model that writes text, whose file has no head of its own.
fn tied_embedding(config: &Map<String, Value>, sites: &SiteTable) -> Option<String> {
    let writes = |name: &str| {
        ["ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM"].iter().any(|end| name.ends_with(end))
    };
    let architectures = config.get("architectures").and_then(Value::as_array).into_iter().flatten();
    let has_head = sites.iter().any(|site| site.is_output_head);
    if has_head || !architectures.filter_map(Value::as_str).any(writes) {
        return None;
    }
    let table = ["embed_tokens", "wte", "word_embeddings", "shared", "embed_in"];
    let site = table.iter().find_map(|name| sites.iter().find(|s| s.path.rsplit('.').next() == Some(name)))?;
    Some(site.path.clone())
}
