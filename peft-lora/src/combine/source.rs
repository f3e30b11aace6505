//! Where the changes come from: a LoRA folder as it lies on disk, or an adapter of any method opened on its base.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use peft_core::adapter_keys::KEY_PREFIX;
use peft_core::suggest::did_you_mean;
use peft_core::{
    Adapter, AdapterFolder, BaseLayer, BaseModel, Candidate, Context, Delta, Error, FrozenLinear, ModuleKind,
    Parameter, Result, SelectRules, SiteAdapter, SiteModule, TargetModules, TargetSpec, Unmatched, check_finite,
    parameter_name, select,
};
use serde_json::{Map, Value};

use super::change::{Change, Update};
use crate::config::LoraConfig;
use crate::dora;

/// A site that an adapter changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) embedding: bool,
    /// Outputs, or the width of an embedding.
    pub(super) out: usize,
    /// Inputs, or the vocabulary of an embedding.
    pub(super) inp: usize,
    /// Rank of the update, where it has one.
    pub(super) rank: Option<usize>,
}

/// One of the adapters that are combined.
#[derive(Debug)]
pub struct Source<'a> {
    /// What messages call it.
    pub(super) name: String,
    pub(super) weight: f64,
    pub(super) config: Map<String, Value>,
    pub(super) places: BTreeMap<String, Place>,
    /// Tensors that stand in place of the base's, by key; the bias of an adapted layer without PEFT's `base_layer`.
    pub(super) whole: BTreeMap<String, Tensor>,
    origin: Origin<'a>,
}

enum Origin<'a> {
    Folder(Folder<'a>),
    Opened { adapter: &'a Adapter, base: &'a dyn BaseModel },
}

struct Folder<'a> {
    files: &'a AdapterFolder,
    scales: BTreeMap<String, f64>,
    /// The base, where the adapter is a DoRA.
    dora: Option<&'a dyn BaseModel>,
    /// `lora_bias`.
    has_bias: bool,
}

impl std::fmt::Debug for Origin<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Folder(_) => "Folder",
            Self::Opened { .. } => "Opened",
        })
    }
}

/// What stands behind a site's path in the keys of a LoRA, with whether it is of an embedding.
const A_OF: [(&str, &str, bool); 2] =
    [(".lora_A.weight", ".lora_B.weight", false), (".lora_embedding_A", ".lora_embedding_B", true)];

impl<'a> Source<'a> {
    /// A LoRA's own files. `base` is needed for DoRA, whose change depends on it; where it is given, the sites are looked up
    /// in it.
    ///
    /// # Errors
    /// A config or a tensor that is not a LoRA's, NaN or infinity, DoRA without a base; the message names the key.
    pub fn of_folder(
        name: &str,
        weight: f64,
        files: &'a AdapterFolder,
        base: Option<&'a dyn BaseModel>,
    ) -> Result<Self> {
        let file = || files.weights().path().display().to_string();
        let config = LoraConfig::from_adapter_config(files.config().map()).with_context(|| name.to_owned())?;
        if config.init.subtracts() {
            let message =
                "its factors are those of the weights that it started from, less what is left of them in the base";
            return Err(Error::config("init_lora_weights", message)).with_context(|| name.to_owned());
        }
        let dora = match (config.use_dora, base) {
            (true, None) => {
                let message = "scales the base's own weights, so that what it changes depends on them; give --model";
                return Err(Error::config("use_dora", message)).with_context(|| name.to_owned());
            }
            (true, base) => base,
            (false, _) => None,
        };
        if let Some(name) = config.targets.target_parameters.first() {
            return Err(Error::config("target_parameters", experts_apart(name)));
        }
        let (mut places, mut whole) = (BTreeMap::new(), BTreeMap::new());
        for key in files.keys() {
            let Some(inner) = key.strip_prefix(KEY_PREFIX) else {
                let message =
                    format!("`{key}` does not begin with `{KEY_PREFIX}`; it was not saved by PEFT's save_pretrained");
                return Err(Error::file(files.weights().path(), message));
            };
            let found = A_OF.iter().find_map(|(a, b, embedding)| Some((inner.strip_suffix(a)?, b, *embedding)));
            if let Some((path, b, embedding)) = found {
                let place = place(files, key, &parameter_name(path, b.trim_start_matches('.')), embedding)?;
                places.insert(path.to_owned(), place);
            } else if let Some(part) = lora_part(inner) {
                let used = match part {
                    "lora_B.weight" | "lora_embedding_B" => true,
                    "lora_B.bias" => config.lora_bias,
                    "lora_magnitude_vector" => config.use_dora,
                    _ => false,
                };
                if !used {
                    let message = format!("holds `{key}`, which a LoRA with this config does not have");
                    return Err(Error::file(files.weights().path(), message));
                }
            } else {
                let tensor = files.tensor(key, &Device::Cpu)?;
                check_finite(key, &tensor).with_context(file)?;
                whole.insert(key.to_owned(), tensor);
            }
        }
        if places.is_empty() {
            return Err(Error::file(files.weights().path(), "holds no factors of a LoRA"));
        }
        let scales = scales(&config, &places, files)?;
        if let Some(base) = base {
            places.iter().try_for_each(|(path, place)| fits(path, place, base)).with_context(|| name.to_owned())?;
        }
        let whole = without_base_layer(whole, &places);
        let origin = Origin::Folder(Folder { files, scales, dora, has_bias: config.lora_bias });
        let config = files.config().map().clone();
        Ok(Self { name: name.to_owned(), weight, config, places, whole, origin })
    }

    /// An adapter of any method that changes weights.
    ///
    /// # Errors
    /// What is no change of the weights of linear layers or embeddings, by its site.
    pub fn of_adapter(name: &str, weight: f64, adapter: &'a Adapter, base: &'a dyn BaseModel) -> Result<Self> {
        let refuse = |message: String| Err(Error::msg(format!("{name}: {message}")));
        let kind = adapter.peft_type();
        if adapter.virtual_tokens().is_some() {
            return refuse(format!(
                "{kind} puts virtual tokens in front of every sequence, which no change of a weight does"
            ));
        }
        let (mut places, mut whole) = (BTreeMap::new(), BTreeMap::new());
        for (id, at) in adapter.touched() {
            let Some(site) = base.sites().get(id) else { continue };
            let path = &site.path;
            whole.extend(at.bias.iter().map(|b| (parameter_name(path, "bias"), b.value())));
            let Some(module) = &at.module else { continue };
            if let Some(does) = module.beyond_weights() {
                return refuse(format!("at `{path}` {kind} {does}, which no change of a weight does"));
            }
            if module.parameters().iter().any(|p| is_whole(p, path)) {
                whole.extend(module.parameters().iter().map(|p| (p.name().to_owned(), p.value())));
                continue;
            }
            let (embedding, layer) = match base.layer(id)? {
                BaseLayer::Linear(layer) => (false, layer.weight()),
                BaseLayer::Embedding(table) => (true, table.weight()),
                BaseLayer::Norm(_) => return refuse(format!("`{path}` is a norm, whose weight a LoRA cannot change")),
                BaseLayer::Experts(_) => return refuse(experts_apart(path)),
            };
            let (out, inp) = (layer.out_features(), layer.in_features());
            let (out, inp) = if embedding { (inp, out) } else { (out, inp) };
            places.insert(path.clone(), Place { embedding, out, inp, rank: None });
        }
        if places.is_empty() {
            return refuse(format!(
                "{kind} changes no weight of a linear layer or an embedding that a LoRA could hold"
            ));
        }
        for (key, tensor) in &whole {
            check_finite(key, tensor).with_context(|| name.to_owned())?;
        }
        let (name, config) = (name.to_owned(), adapter.config.clone());
        Ok(Self { name, weight, config, places, whole, origin: Origin::Opened { adapter, base } })
    }

    /// The largest rank that the adapter has, if it has ranks.
    pub(super) fn rank(&self) -> Option<usize> {
        let of_config =
            || self.config.get("r").and_then(Value::as_u64).and_then(|r| usize::try_from(r).ok()).filter(|r| *r > 0);
        self.places.values().filter_map(|place| place.rank).max().or_else(of_config)
    }

    /// Whether the base's own weights are scaled.
    pub(super) fn has_gain(&self) -> bool {
        matches!(&self.origin, Origin::Folder(folder) if folder.dora.is_some())
    }

    /// What the adapter does at one of its places.
    pub(super) fn change(&self, path: &str, place: &Place) -> Result<Change> {
        let change = match &self.origin {
            Origin::Folder(folder) => folder_change(folder, path, place),
            Origin::Opened { adapter, base } => opened_change(adapter, path, *base),
        };
        change.with_context(|| self.name.clone())
    }
}

/// Whether a parameter is the module's own weight or bias, or rows of it, and not a change of it.
fn is_whole(parameter: &Parameter, path: &str) -> bool {
    let rest = parameter.name().strip_prefix(KEY_PREFIX).and_then(|k| k.strip_prefix(path));
    rest.is_some_and(|rest| matches!(rest, ".weight" | ".bias" | ".token_adapter.trainable_tokens_delta"))
}

/// The last segments of a key, from the one that begins with `lora_`; `None` for what is no part of a LoRA.
fn lora_part(key: &str) -> Option<&str> {
    key.rfind(".lora_").and_then(|dot| key.get(dot + 1..))
}

fn place(files: &AdapterFolder, a: &str, b: &str, embedding: bool) -> Result<Place> {
    let shape = |key: &str| files.shape(key).unwrap_or_default();
    match (shape(a), shape(b)) {
        ([r, inp], [out, r_of_b]) if r == r_of_b && *r > 0 => {
            Ok(Place { embedding, out: *out, inp: *inp, rank: Some(*r) })
        }
        _ if !files.contains(b) => Err(Error::file(files.weights().path(), format!("has `{a}` and no `{b}`"))),
        (of_a, of_b) => {
            let message = format!(
                "`{a}` is {of_a:?} and `{b}` is {of_b:?}, which are not the factors [r, in] and [out, r] of a matrix"
            );
            Err(Error::file(files.weights().path(), message))
        }
    }
}

/// The scale at each place. The file's ranks have to be those of the config, which the scales depend on.
fn scales(
    config: &LoraConfig,
    places: &BTreeMap<String, Place>,
    files: &AdapterFolder,
) -> Result<BTreeMap<String, f64>> {
    let kind = |place: &Place| if place.embedding { ModuleKind::Embedding } else { ModuleKind::Linear };
    let candidates: Vec<Candidate<'_>> =
        places.iter().map(|(path, place)| Candidate { path, kind: kind(place), is_output_head: false }).collect();
    let spec = TargetSpec {
        target_modules: Some(TargetModules::Names(places.keys().cloned().collect())),
        rank_pattern: config.targets.rank_pattern.clone(),
        alpha_pattern: config.targets.alpha_pattern.clone(),
        ..TargetSpec::default()
    };
    let selection = select(&spec, &candidates, &SelectRules { unmatched: Unmatched::Report, ..SelectRules::LORA })?;
    let mut scales = BTreeMap::new();
    for site in &selection.sites {
        let Some((path, place)) = candidates.get(site.index).and_then(|c| places.get_key_value(c.path)) else {
            continue;
        };
        let (r, alpha) = (site.rank.unwrap_or(config.r), site.alpha.unwrap_or(config.lora_alpha));
        if place.rank != Some(r) {
            let has = place.rank.unwrap_or_default();
            let message = format!(
                "`{path}` has rank {has} and the config says {r} (r, rank_pattern), on which its scale depends"
            );
            return Err(Error::file(files.weights().path(), message));
        }
        scales.insert(path.clone(), config.scale(r, alpha));
    }
    Ok(scales)
}

fn fits(path: &str, place: &Place, base: &dyn BaseModel) -> Result<()> {
    let Some(site) = base.sites().find(path) else {
        let near = did_you_mean(path, base.sites().iter().map(|s| s.path.as_str()));
        return Err(Error::site(path, format!("the model has no such module{near}")));
    };
    let dims = match base.layer(site.id)? {
        BaseLayer::Linear(layer) if !place.embedding => (layer.weight().out_features(), layer.weight().in_features()),
        BaseLayer::Embedding(table) if place.embedding => (table.weight().in_features(), table.weight().out_features()),
        _ => return Err(Error::site(path, "is another kind of module in the model")),
    };
    if dims != (place.out, place.inp) {
        let message =
            format!("the adapter's matrix is [{}, {}] and the model's [{}, {}]", place.out, place.inp, dims.0, dims.1);
        return Err(Error::site(path, message));
    }
    Ok(())
}

/// PEFT calls the bias of an adapted layer `base_layer.bias`, and that of any other `bias`: which of them it is depends on the
/// other adapters, too.
fn without_base_layer(whole: BTreeMap<String, Tensor>, places: &BTreeMap<String, Place>) -> BTreeMap<String, Tensor> {
    let plain = |key: String| {
        let path = key.strip_prefix(KEY_PREFIX).and_then(|k| k.strip_suffix(".base_layer.bias"));
        match path.filter(|path| places.contains_key(*path)) {
            Some(path) => parameter_name(path, "bias"),
            None => key,
        }
    };
    whole.into_iter().map(|(key, tensor)| (plain(key), tensor)).collect()
}

fn folder_change(folder: &Folder<'_>, path: &str, place: &Place) -> Result<Change> {
    let Folder { files, scales, dora, has_bias } = folder;
    let scale = scales.get(path).copied().unwrap_or(1.0);
    let read = |suffix: &str, shape: Option<usize>| -> Result<Tensor> {
        let key = parameter_name(path, suffix);
        let tensor = files.tensor(&key, &Device::Cpu)?;
        if let Some(n) = shape.filter(|n| tensor.dims() != [*n]) {
            return Err(Error::Shape { name: key, actual: tensor.dims().to_vec(), expected: vec![n] });
        }
        check_finite(&key, &tensor)?;
        Ok(tensor.to_dtype(DType::F64)?)
    };
    let (a, b) =
        if place.embedding { ("lora_embedding_A", "lora_embedding_B") } else { ("lora_A.weight", "lora_B.weight") };
    let (a, b) = (read(a, None)?, read(b, None)?);
    let bias = match *has_bias && !place.embedding {
        true => Some((read("lora_B.bias", Some(place.out))? * scale)?),
        false => None,
    };
    let gain = match *dora {
        Some(base) => {
            let magnitude = read("lora_magnitude_vector", Some(place.out))?;
            let norm = norm_with(base, path, &a, &(&b * scale)?)?.to_dtype(DType::F64)?;
            let gain = ((magnitude / norm)? - 1.0)?;
            check_finite(&format!("{path}: magnitude over norm"), &gain)?;
            Some(gain)
        }
        None => None,
    };
    Ok(Change { gain, update: Update::LowRank { a, b, scale }, bias })
}

/// Why experts are not combined; PEFT's `add_weighted_adapter` refuses them too.
fn experts_apart(path: &str) -> String {
    format!(
        "`{path}` holds the weights of experts, and those are not combined: merge the adapters into the model one after another"
    )
}

/// `‖W + BA‖₂` for each output, or of an embedding for each column of its table, `[out]` on the CPU.
pub(super) fn norm_with(base: &dyn BaseModel, path: &str, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let site = base.sites().find(path).ok_or_else(|| Error::site(path, "the model has no such module"))?;
    let on = |t: &Tensor| -> Result<Tensor> { Ok(t.to_dtype(DType::F32)?.to_device(base.device())?) };
    let (a, b) = (on(a)?, on(b)?);
    let norm = match base.layer(site.id)? {
        BaseLayer::Linear(layer) => dora::weight_norm(layer.weight(), &a, &b, 1.0)?,
        BaseLayer::Embedding(table) => {
            let table = (table.weight().to_dense(DType::F32)? + b.matmul(&a)?.t()?)?;
            table.sqr()?.sum(0)?.sqrt()?
        }
        BaseLayer::Norm(_) | BaseLayer::Experts(_) => {
            return Err(Error::site(path, "is no layer of one weight matrix"));
        }
    };
    Ok(norm.to_device(&Device::Cpu)?)
}

/// The base's weight in the orientation of changes, `[out, in]` or `[dim, vocab]`, in `f32` on the CPU.
pub(super) fn weight_of(base: &dyn BaseModel, path: &str) -> Result<Tensor> {
    let site = base.sites().find(path).ok_or_else(|| Error::site(path, "the model has no such module"))?;
    let weight = match base.layer(site.id)? {
        BaseLayer::Linear(layer) => layer.weight().to_dense(DType::F32)?,
        BaseLayer::Embedding(table) => table.weight().to_dense(DType::F32)?.t()?.contiguous()?,
        BaseLayer::Norm(_) | BaseLayer::Experts(_) => {
            return Err(Error::site(path, "is no layer of one weight matrix"));
        }
    };
    Ok(weight.to_device(&Device::Cpu)?)
}

fn opened_change(adapter: &Adapter, path: &str, base: &dyn BaseModel) -> Result<Change> {
    let site = base.sites().find(path).ok_or_else(|| Error::site(path, "the model has no such module"))?;
    let module = adapter.at(site.id).and_then(|at: &SiteAdapter| at.module.as_ref());
    let (update, bias) = match (module, base.layer(site.id)?) {
        (Some(SiteModule::Linear(module)), BaseLayer::Linear(layer)) => match module.lower(layer)? {
            // What scales the base's weights has no factors.
            Some(form) if form.scale_input.is_none() && form.scale_output.is_none() && form.low_rank.is_some() => {
                let (a, b) = form.low_rank.ok_or_else(|| Error::site(path, "no factors"))?;
                (Update::LowRank { a: host(&a, DType::F64)?, b: host(&b, DType::F64)?, scale: 1.0 }, form.shift)
            }
            _ => dense_delta(module.delta(layer)?, layer)?,
        },
        (Some(SiteModule::Embedding(module)), BaseLayer::Embedding(table)) => {
            if module.changes_tied_head() && base.tied_embedding() == Some(path) {
                let message = "the output head follows this embedding, which it does not under a LoRA of it";
                return Err(Error::site(path, message));
            }
            let weight = table.weight().to_dense(DType::F32)?;
            let change = (module.merge(&weight)? - weight)?.t()?.contiguous()?;
            (Update::Dense(host(&change, DType::F32)?), None)
        }
        _ => return Err(Error::site(path, "has no change of a weight")),
    };
    let of_update = match &update {
        Update::LowRank { b, .. } => b,
        Update::Dense(change) => change,
    };
    check_finite(path, of_update)?;
    let bias = bias.map(|b| host(&b, DType::F64)).transpose()?;
    Ok(Change { gain: None, update, bias })
}

fn host(t: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(t.to_device(&Device::Cpu)?.to_dtype(dtype)?)
}

/// The difference that a merge makes, and that of the bias.
fn dense_delta(delta: Delta, layer: &FrozenLinear) -> Result<(Update, Option<Tensor>)> {
    let weight = || layer.weight().to_dense(DType::F32);
    let old = layer.bias().map(|b| b.to_dtype(DType::F32)).transpose()?;
    let (change, bias) = match delta {
        Delta::Add { weight, bias } => (weight, bias),
        Delta::ScaleOutput(l) => {
            let grown = (l - 1.0)?;
            let bias = old.map(|b| b * &grown).transpose()?;
            (weight()?.broadcast_mul(&grown.unsqueeze(1)?)?, bias)
        }
        Delta::ScaleInput(l) => (weight()?.broadcast_mul(&(l - 1.0)?)?, None),
        Delta::Replace { weight: new, bias } => {
            let bias = match (bias, old) {
                (Some(new), Some(old)) => Some((new - old)?),
                (new, None) => new,
                (None, Some(_)) => None,
            };
            ((new - weight()?)?, bias)
        }
        Delta::Unmergeable(why) => return Err(Error::site(layer.path(), why)),
    };
    Ok((Update::Dense(host(&change, DType::F32)?), bias))
}
