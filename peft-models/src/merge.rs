//! Merging: the weights that a base and its adapters make together, in `f32`, rounded once when written.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::FrozenWeight;
use peft_core::{
    Adapter, BaseLayer, BaseModel, Context, Delta, Error, FrozenLinear, PlannedTensor, Result, ShardWriter, Site,
    SiteAdapter, SiteKind, SiteModule, SiteTable,
};

use crate::gguf::{GgufTensorSpec, GgufType, GgufWriteOptions, write_gguf};
use crate::model_files::ModelFiles;

/// Largest shard that is written, in bytes: what transformers uses.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// A base with adapters applied one after another. Tensors are made when they are asked for.
pub struct Merged<'a> {
    model: &'a dyn BaseModel,
    adapters: Vec<Arc<Adapter>>,
    tied: bool,
}

impl std::fmt::Debug for Merged<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Merged")
            .field("adapters", &self.adapters.len())
            .field("tied", &self.tied)
            .finish_non_exhaustive()
    }
}

/// The two tensors that a site may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Weight,
    Bias,
}

impl<'a> Merged<'a> {
    /// The merge of `adapters`, in this order, into `model`.
    ///
    /// # Errors
    /// When an adapter cannot be merged; the message says why.
    pub fn new(model: &'a dyn BaseModel, adapters: Vec<Arc<Adapter>>) -> Result<Self> {
        if let Some(adapter) = adapters.iter().find(|a| a.virtual_tokens().is_some()) {
            return Err(Error::msg(format!(
                "an adapter of type {} cannot be merged: its virtual tokens stand in front of every sequence, and no weight of \
                 the model holds them; serve it unmerged",
                adapter.peft_type()
            )));
        }
        for adapter in &adapters {
            let beyond = |s: &SiteAdapter| s.module.as_ref()?.beyond_weights();
            if let Some((id, does)) = adapter.touched().find_map(|(id, s)| Some((id, beyond(s)?))) {
                let path = model.sites().get(id).map_or("", |s| s.path.as_str());
                return Err(Error::msg(format!(
                    "an adapter of type {} cannot be merged: behind `{path}` it {does}, and no weight of the model holds that; \
                     serve it unmerged",
                    adapter.peft_type()
                )));
            }
            let added =
                |id| matches!(model.sites().get(id).map(|s| s.kind), Some(SiteKind::Linear { bias: false, .. }));
            if let Some((id, _)) = adapter.touched().find(|(id, s)| s.bias.is_some() && added(*id)) {
                let path = model.sites().get(id).map_or("", |s| s.path.as_str());
                return Err(Error::msg(format!(
                    "an adapter of type {} cannot be merged: it adds a bias to `{path}`, which has none in models of type `{}`; \
                     serve it unmerged, or train without add_biases",
                    adapter.peft_type(),
                    model.model_type()
                )));
            }
        }
        let tied = match (model.tied_embedding(), head(model.sites())) {
            (Some(path), Some(head)) => {
                let embedding = model.sites().find(path).map(|s| s.id);
                adapters.iter().all(|a| {
                    let follows = match embedding.and_then(|id| a.at(id)).and_then(|s| s.module.as_ref()) {
                        Some(SiteModule::Embedding(m)) => m.changes_tied_head(),
                        _ => true,
                    };
                    follows && a.at(head.id).is_none()
                })
            }
            _ => false,
        };
        Ok(Self { model, adapters, tied })
    }

    /// Whether head and embedding are still one tensor.
    #[must_use]
    pub fn tied(&self) -> bool {
        self.tied
    }

    /// Names and shapes of all tensors, as the family's checkpoints have them.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut all = Vec::new();
        for site in self.model.sites().iter() {
            if site.is_output_head && self.tied {
                continue;
            }
            let (weight, bias) = match site.kind {
                SiteKind::Linear { in_features, out_features, bias } => {
                    let mut shape = vec![out_features, in_features];
                    if site.stored.fan_in_fan_out {
                        shape.reverse();
                    }
                    (shape, bias.then_some(out_features))
                }
                SiteKind::Embedding { vocab, dim } => (vec![vocab, dim], None),
                SiteKind::Norm { dim, bias } => (vec![dim], bias.then_some(dim)),
                SiteKind::Experts { experts, in_features, out_features } => {
                    let rows = out_features / site.stored.parts.len().max(1);
                    let names =
                        (0..experts).flat_map(|e| site.stored.parts.iter().map(move |p| site.stored_part(e, p)));
                    all.extend(names.map(|name| (name, vec![rows, in_features])));
                    continue;
                }
            };
            all.push((format!("{}.weight", site.stored_name()), weight));
            all.extend(bias.map(|n| (format!("{}.bias", site.stored_name()), vec![n])));
        }
        all
    }

    /// A merged tensor in `f32`.
    ///
    /// # Errors
    /// An unknown name, an adapter that cannot be merged, or a result with NaN or infinity.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.tensor_as(name, DType::F32)
    }

    /// A merged tensor, rounded once to `dtype`. One that no adapter touches and that is stored in `dtype` is handed out as
    /// it is, without a copy: the embedding is a fifth of a small model.
    ///
    /// # Errors
    /// As [`Merged::tensor`].
    pub fn tensor_as(&self, name: &str, dtype: DType) -> Result<Tensor> {
        let (path, part) = match (name.strip_suffix(".weight"), name.strip_suffix(".bias")) {
            (Some(path), _) => (path, Part::Weight),
            (None, Some(path)) => (path, Part::Bias),
            _ => return Err(Error::msg(format!("`{name}` is neither a weight nor a bias"))),
        };
        let sites = self.model.sites();
        let site = sites.find(path).or_else(|| sites.iter().find(|site| site.stored_name() == path));
        let merged = match (site, part) {
            (Some(site), part) => self.merge_site(site, part, dtype).with_context(|| path.to_string())?,
            (None, Part::Weight) => self.merge_expert(path, dtype).with_context(|| path.to_string())?,
            (None, Part::Bias) => return Err(unknown(path)),
        };
        peft_core::check_finite(name, &merged)?;
        Ok(merged)
    }

    /// The part of an expert's weight that checkpoints have as a layer at `path`.
    fn merge_expert(&self, path: &str, dtype: DType) -> Result<Tensor> {
        let numbered = path.rsplit_once('.').and_then(|(rest, part)| {
            let (stored, expert) = rest.rsplit_once('.')?;
            Some((stored, expert.parse::<usize>().ok()?, part))
        });
        let Some((stored, expert, part)) = numbered else { return Err(unknown(path)) };
        let found = self.model.sites().iter().filter(|site| site.stored_name() == stored).find_map(|site| {
            let at = site.stored.parts.iter().position(|p| *p == part)?;
            Some((site, at))
        });
        let Some((site, at)) = found else { return Err(unknown(path)) };
        let BaseLayer::Experts(layer) = self.model.layer(site.id)? else { return Err(unknown(path)) };
        let weight = layer.weights().get(expert).ok_or_else(|| unknown(path))?;
        let mut merged = None;
        for adapter in &self.adapters {
            if let Some(SiteModule::Experts(m)) = adapter.at(site.id).and_then(|s| s.module.as_ref()) {
                merged = Some((merged.map_or_else(|| weight.to_dense(DType::F32), Ok)? + m.delta(expert)?)?);
            }
        }
        let whole = merged.map_or_else(|| weight.to_dense(dtype), |w| w.to_dtype(dtype))?;
        let rows = whole.dim(0)? / site.stored.parts.len().max(1);
        Ok(whole.narrow(0, at * rows, rows)?.contiguous()?)
    }

    fn merge_site(&self, site: &Site, part: Part, dtype: DType) -> Result<Tensor> {
        match self.model.layer(site.id)? {
            BaseLayer::Linear(layer) => {
                let layer = self.linear(site, layer)?;
                match part {
                    Part::Weight if layer.is_fan_in_fan_out() => {
                        Ok(layer.weight().to_dense(dtype)?.t()?.contiguous()?)
                    }
                    Part::Weight => Ok(layer.weight().to_dense(dtype)?),
                    Part::Bias => {
                        let bias = layer.bias().ok_or_else(|| Error::msg("the layer has no bias"))?;
                        Ok(bias.to_dtype(dtype)?)
                    }
                }
            }
            BaseLayer::Embedding(e) => {
                let mut merged = None;
                for adapter in &self.adapters {
                    if let Some(SiteModule::Embedding(m)) = adapter.at(site.id).and_then(|s| s.module.as_ref()) {
                        merged = Some(m.merge(&merged.map_or_else(|| e.weight().to_dense(DType::F32), Ok)?)?);
                    }
                }
                Ok(merged.map_or_else(|| e.weight().to_dense(dtype), |w| w.to_dtype(dtype))?)
            }
            BaseLayer::Norm(norm) => {
                let (mut weight, mut bias) = (norm.weight().clone(), norm.bias().cloned());
                for adapter in self.adapters.iter().filter_map(|a| a.at(site.id)) {
                    if let Some(SiteModule::Norm(m)) = &adapter.module {
                        (weight, bias) = m.merge(norm)?;
                    }
                    bias = adapter.bias.as_ref().map(|b| b.value()).or(bias);
                }
                let part = if part == Part::Weight { Some(weight) } else { bias };
                Ok(part.ok_or_else(|| Error::msg("the norm has no bias"))?.to_dtype(dtype)?)
            }
            BaseLayer::Experts(_) => Err(Error::msg("experts are merged one by one")),
        }
    }

    fn linear(&self, site: &Site, layer: &FrozenLinear) -> Result<FrozenLinear> {
        let mut layer = layer.clone();
        // A head that was tied to an embedding which an adapter changed follows it only where the adapter says so, and
        // then it is still tied and never asked for here.
        for adapter in self.adapters.iter().filter_map(|a| a.at(site.id)) {
            if let Some(SiteModule::Linear(module)) = &adapter.module {
                layer = apply(&layer, module.delta(&layer)?)?;
            }
            if let Some(bias) = &adapter.bias {
                layer = with_weight(&layer, layer.weight().clone(), Some(bias.value()))?;
            }
        }
        Ok(layer)
    }
}

fn unknown(path: &str) -> Error {
    Error::msg(format!("the model has no `{path}`"))
}

fn head(sites: &SiteTable) -> Option<&Site> {
    sites.iter().find(|s| s.is_output_head)
}

fn apply(layer: &FrozenLinear, delta: Delta) -> Result<FrozenLinear> {
    let dense = || layer.weight().to_dense(DType::F32);
    let old_bias = layer.bias().map(|b| b.to_dtype(DType::F32)).transpose()?;
    let (weight, bias) = match delta {
        Delta::Add { weight, bias } => {
            let bias = match (old_bias, bias) {
                (Some(old), Some(new)) => Some((old + new)?),
                (None, Some(_)) => {
                    return Err(Error::msg(
                        "the adapter has a bias (lora_bias) and the base layer none, so it cannot be merged here; serve it \
                         unmerged, or train without lora_bias",
                    ));
                }
                (old, None) => old,
            };
            ((dense()? + weight)?, bias)
        }
        Delta::ScaleOutput(l) => {
            let bias = old_bias.map(|b| b * &l).transpose()?;
            (dense()?.broadcast_mul(&l.unsqueeze(1)?)?, bias)
        }
        Delta::ScaleInput(l) => (dense()?.broadcast_mul(&l)?, old_bias),
        Delta::Replace { weight, bias } => (weight, bias.or(old_bias)),
        Delta::Unmergeable(why) => return Err(Error::msg(format!("cannot be merged: {why}"))),
    };
    with_weight(layer, FrozenWeight::dense(&weight)?, bias)
}

/// `layer` with another weight and bias.
fn with_weight(layer: &FrozenLinear, weight: FrozenWeight, bias: Option<Tensor>) -> Result<FrozenLinear> {
    let changed = FrozenLinear::new(layer.site(), layer.path(), weight, bias)?;
    Ok(if layer.is_fan_in_fan_out() { changed.as_conv1d() } else { changed })
}

/// Writes `merged` as a model folder that transformers loads: weights (in shards with an index beyond 5 GB), config,
/// tokenizer files. The folder appears whole or not at all.
///
/// # Errors
/// When an adapter cannot be merged, `out` holds something else than a model, or the disk refuses.
pub fn write_folder(
    files: &ModelFiles,
    merged: &Merged<'_>,
    out: &Path,
    dtype: DType,
    max_shard_bytes: u64,
) -> Result<()> {
    refuse_foreign_folder(out)?;
    peft_core::atomic::replace_dir(out, |tmp| -> Result<()> {
        let plan = merged.tensors();
        let planned = plan
            .iter()
            .map(|(name, shape)| PlannedTensor { name: name.clone(), shape: shape.clone(), dtype })
            .collect();
        let mut writer = ShardWriter::create(tmp, planned, max_shard_bytes)?;
        for (name, _) in &plan {
            writer.write(name, &merged.tensor_as(name, dtype)?)?;
        }
        writer.finish()?;
        files.write_companions(tmp, dtype, merged.tied())
    })
}

fn refuse_foreign_folder(out: &Path) -> Result<()> {
    let empty = || std::fs::read_dir(out).is_ok_and(|mut d| d.next().is_none());
    if !out.exists() || out.join("config.json").is_file() || (out.is_dir() && empty()) {
        return Ok(());
    }
    Err(Error::file(out, "exists and is not a model folder; choose another output, or empty it first"))
}

/// Writes `merged` as one GGUF file whose matrices have type `weights`.
///
/// # Errors
/// When an adapter cannot be merged, the model does not fit GGUF, or the disk refuses.
pub fn write_gguf_file(files: &ModelFiles, merged: &Merged<'_>, out: &Path, weights: GgufType) -> Result<()> {
    let mut config = files.decoder_config()?.clone();
    if config.labels.is_some() {
        return Err(Error::file(files.path(), "has a class head, which GGUF cannot hold; write safetensors"));
    }
    config.tie_word_embeddings = merged.tied();
    let specs: Vec<GgufTensorSpec> =
        merged.tensors().into_iter().map(|(name, shape)| GgufTensorSpec { name, shape }).collect();
    let options =
        GgufWriteOptions { weights, name: files.path().file_stem().map(|n| n.to_string_lossy().into_owned()) };
    let tokenizer = files.tokenizer()?;
    write_gguf(out, &config, &tokenizer, &specs, &options, |spec| merged.tensor(&spec.name)?.to_device(&Device::Cpu))
        .map_err(|e| Error::msg(e.to_string()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use peft_core::kernels::testing::randn;
    use peft_core::kernels::{ServingForm, WeightStorage};
    use peft_core::{BaseModel, Ctx, Parameter, PeftModule, Role};
    use serde_json::{Map, Value, json};

    use super::*;
    use crate::Decoder;
    use crate::config::DecoderConfig;
    use crate::source::{Placement, RandomSource};

    /// Adds a matrix to the weight.
    #[derive(Debug)]
    struct Added(Parameter);

    impl PeftModule for Added {
        fn forward(&self, base: &FrozenLinear, x: &Tensor, _: &Ctx<'_>) -> Result<Tensor> {
            base.base(x)
        }

        fn parameters(&self) -> Vec<&Parameter> {
            vec![&self.0]
        }

        fn delta(&self, _: &FrozenLinear) -> Result<Delta> {
            Ok(Delta::Add { weight: self.0.value(), bias: None })
        }

        fn lower(&self, _: &FrozenLinear) -> Result<Option<ServingForm>> {
            Ok(None)
        }
    }

    fn model(weights: DType) -> Decoder {
        let Value::Object(map) = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 19, "hidden_size": 8,
            "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 16, "tie_word_embeddings": true
        }) else {
            unreachable!()
        };
        let config = DecoderConfig::from_hf_map(map, Path::new("config.json")).unwrap();
        let placement = Placement::cpu(Some(weights));
        let source = RandomSource { seed: 1, std: 0.3, untied_head: false, placement: placement.clone() };
        Decoder::load(config, &source, &placement).unwrap()
    }

    #[test]
    fn what_no_adapter_touches_is_handed_out_as_it_lies() {
        let model = model(DType::BF16);
        let merged = Merged::new(&model, Vec::new()).unwrap();
        let stored = |path: &str| match model.layer(model.sites().find(path).unwrap().id).unwrap() {
            BaseLayer::Linear(l) => l.weight().storage().clone(),
            BaseLayer::Embedding(e) => e.weight().storage().clone(),
            BaseLayer::Norm(_) | BaseLayer::Experts(_) => unreachable!(),
        };
        for path in ["model.embed_tokens", "model.layers.0.mlp.up_proj"] {
            let WeightStorage::Dense(weight) = stored(path) else { unreachable!() };
            assert_eq!(merged.tensor_as(&format!("{path}.weight"), DType::BF16).unwrap().id(), weight.id(), "{path}");
        }
    }

    #[test]
    fn what_stays_in_its_file_merges_the_same() {
        let loaded = model(DType::BF16);
        let dir = tempfile::tempdir().unwrap();
        let files = || ModelFiles::open(dir.path()).unwrap();
        let config = Value::Object(loaded.config().to_hf_json());
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let stored = Merged::new(&loaded, Vec::new()).unwrap();
        let plan = stored.tensors().into_iter().map(|(name, shape)| PlannedTensor { name, shape, dtype: DType::BF16 });
        let mut writer = ShardWriter::create(dir.path(), plan.collect(), MAX_SHARD_BYTES).unwrap();
        for (name, _) in stored.tensors() {
            writer.write(&name, &stored.tensor_as(&name, DType::BF16).unwrap()).unwrap();
        }
        writer.finish().unwrap();

        let deferred = files().load_deferred(&Placement::cpu(None), 0).unwrap();
        assert_eq!(deferred.nbytes(), 0);
        let mut adapter = Adapter::new(Map::new(), deferred.sites());
        let change = Parameter::new("change", &randn(3, (8, 8), 1e-2).unwrap(), Role::Plain).unwrap();
        let site = deferred.sites().find("model.layers.0.self_attn.q_proj").unwrap().id;
        let module = SiteModule::Linear(Arc::new(Added(change)));
        adapter.insert(site, SiteAdapter::new(Some(module), None)).unwrap();
        let adapters = vec![Arc::new(adapter)];
        let here = Merged::new(&loaded, adapters.clone()).unwrap();
        let there = Merged::new(&deferred, adapters.clone()).unwrap();
        let bits = |m: &Merged<'_>, name: &str| {
            let t = m.tensor_as(name, DType::BF16).unwrap();
            t.flatten_all().unwrap().to_vec1::<half::bf16>().unwrap()
        };
        for (name, _) in here.tensors() {
            assert_eq!(bits(&there, &name), bits(&here, &name), "{name}");
        }

        // A matrix that is not there is named when it is read.
        let mut config = loaded.config().to_hf_json();
        config.insert("intermediate_size".into(), 13.into());
        std::fs::write(dir.path().join("config.json"), Value::Object(config).to_string()).unwrap();
        let other = files().load_deferred(&Placement::cpu(None), 0).unwrap();
        let merged = Merged::new(&other, Vec::new()).unwrap();
        let message = merged.tensor("model.layers.0.mlp.up_proj.weight").unwrap_err().to_string();
        assert!(message.contains("model.layers.0.mlp.up_proj") && message.contains("[12, 8]"), "{message}");
    }

    #[test]
    fn every_tensor_is_rounded_once() {
        let path = "model.layers.0.self_attn.q_proj";
        for stored in [DType::F32, DType::BF16] {
            let model = model(stored);
            let mut adapter = Adapter::new(Map::new(), model.sites());
            // So small that each of the two would be lost in bf16 on its own.
            let change = Parameter::new("change", &randn(3, (8, 8), 1e-3).unwrap(), Role::Plain).unwrap();
            let module = SiteModule::Linear(Arc::new(Added(change.clone())));
            let site = model.sites().find(path).unwrap().id;
            adapter.insert(site, SiteAdapter::new(Some(module), None)).unwrap();
            let adapter = Arc::new(adapter);
            let merged = Merged::new(&model, vec![adapter.clone(), adapter]).unwrap();
            let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<half::bf16>().unwrap();
            for (name, _) in merged.tensors() {
                let exact = merged.tensor(&name).unwrap();
                assert_eq!(exact.dtype(), DType::F32);
                let rounded = merged.tensor_as(&name, DType::BF16).unwrap();
                assert_eq!(bits(&rounded), bits(&exact.to_dtype(DType::BF16).unwrap()), "{name}");
            }
            let BaseLayer::Linear(layer) = model.layer(site).unwrap() else { unreachable!() };
            let twice = (change.value() * 2.0).unwrap();
            let expected = (layer.weight().to_dense(DType::F32).unwrap() + twice).unwrap();
            let weight = merged.tensor(&format!("{path}.weight")).unwrap();
            peft_core::kernels::testing::close("q_proj", &weight, &expected, 1e-6).unwrap();
        }
    }
}
