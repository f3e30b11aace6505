//! From a config, and the folders that it names, to an adapter made of several on a base model.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::{
    Adapter, AdapterFolder, BaseModel, Built, Error, ExpectedTensor, Parameter, Result, Role, SiteAdapter, SiteId,
    SiteModule, SublayerModule, SublayerSite, Task, Unmatched, candidates, check_finite, insert_saved, parameter_name,
    select_saved,
};

use super::attention::Attention;
use super::config::{FusionSettings, Part, Source};
use super::regularizer::Regularizer;
use super::setup::Setup;
use super::{ComposeConfig, Composed, Member, Node};
use crate::bottleneck::{Projection, Weight};
use crate::phm::Shared;

/// Added to the site of each part's dropout, so that parts at one place draw their own.
const SITES_APART: u32 = 1 << 20;

impl ComposeConfig {
    /// Makes the adapter of a recipe, whose parts are in `folders`, those that [`ComposeConfig::folders`] names, in order. New
    /// parts start from `seed`.
    ///
    /// # Errors
    /// What is no bottleneck adapter of this model, parts that stand at different places where they may not, or a folder with
    /// more than bottlenecks.
    pub fn build_from(
        &self,
        base: &dyn BaseModel,
        folders: &[AdapterFolder],
        seed: u64,
        unmatched: Unmatched,
    ) -> Result<Built> {
        let mut files = folders.iter();
        let mut parts = Vec::with_capacity(self.sources.len());
        let mut filled = Vec::with_capacity(folders.len());
        for (name, source) in &self.sources {
            match source {
                Source::New(config) => parts.push((name.clone(), config.to_adapter_config(), true)),
                Source::Folder(folder) => {
                    let files = files.next().ok_or_else(|| Error::msg(format!("`{folder}` was not opened")))?;
                    parts.push((name.clone(), files.config().map().clone(), false));
                    filled.push((name.as_str(), files));
                }
            }
        }
        let config = self.with_parts(&parts)?;
        let built = config.build(base, seed, unmatched)?;
        for (name, files) in &filled {
            fill(&built.adapter, files, name, base)?;
        }
        // A head goes with the last adapter, as in AdapterHub's package; a fusion trains its own.
        if let (None, Some((_, Source::Folder(_))), Some((_, files))) =
            (&self.fusion, self.sources.last(), filled.last())
        {
            fill_head(&built.adapter, files, base)?;
        }
        Ok(built)
    }

    /// Makes the adapter that this config describes on `base`; the values of parts that are not trained are still to be read.
    ///
    /// # Errors
    /// When the parts of a fusion or a mean do not stand at the same places of this model, or none has a place.
    pub fn build(&self, base: &dyn BaseModel, seed: u64, unmatched: Unmatched) -> Result<Built> {
        let mut adapter = Adapter::new(self.to_adapter_config(), base.sites());
        let mut values = Vec::new();
        for at in base.sublayers() {
            let Some(node) = self.node(&self.setup, &at)? else { continue };
            let module = self.composed(base, at, node, seed)?;
            for member in module.members.iter().filter(|member| !member.trained) {
                member.adapter.parameters().into_iter().for_each(|p| adapter.add_fixed(p.clone()));
            }
            let attention = module.attention.iter().flat_map(|attention| &attention.value);
            values.extend(attention.flat_map(Projection::parameters).cloned());
            adapter.insert(at.end, SiteAdapter::new(Some(SiteModule::Sublayer(Arc::new(module))), None))?;
        }
        if adapter.touched().next().is_none() {
            let message = format!("have no place in this model of type `{}`", base.model_type());
            return Err(Error::config("adapters", message));
        }
        if self.fusion.as_ref().is_some_and(|fusion| fusion.regularization) && !values.is_empty() {
            adapter.set_training_hook(Box::new(Regularizer(values)));
        }
        let selection = select_saved(&self.saved, &candidates(base.sites()), unmatched)?;
        insert_saved(&mut adapter, &selection, base)?;
        Ok(Built { adapter, selection })
    }

    fn number(&self, name: &str) -> Result<(usize, &Part)> {
        let found = self.parts.iter().enumerate().find(|(_, part)| part.name == name);
        found.ok_or_else(|| Error::config("adapters", format!("has no `{name}`")))
    }

    /// The setup at one place, without the adapters that do not stand there.
    fn node(&self, setup: &Setup, at: &SublayerSite) -> Result<Option<Node>> {
        let all = |list: &mut dyn Iterator<Item = &Setup>, kind: &str| {
            let nodes = list.map(|part| self.node(part, at)).collect::<Result<Vec<_>>>()?;
            let there: Vec<Node> = nodes.iter().flatten().cloned().collect();
            if !there.is_empty() && there.len() < nodes.len() {
                let message = format!(
                    "{} are parts of a {kind} and do not all stand behind {:?} {} (mh_adapter, output_adapter, leave_out)",
                    setup.names().join(", "),
                    at.kind,
                    at.block
                );
                return Err(Error::config("adapters", message));
            }
            Ok(there)
        };
        let some = |nodes: Vec<Node>, make: fn(Vec<Node>) -> Node| (!nodes.is_empty()).then(|| make(nodes));
        Ok(match setup {
            Setup::One(name) => {
                let (i, part) = self.number(name)?;
                part.config.stands_at(at).then_some(Node::One(i))
            }
            Setup::Stack(list) => {
                let nodes = list.iter().map(|part| self.node(part, at)).collect::<Result<Vec<_>>>()?;
                some(nodes.into_iter().flatten().collect(), Node::Stack)
            }
            Setup::Fuse(list) => some(all(&mut list.iter(), "fusion")?, Node::Fuse),
            Setup::Average(list) => {
                let nodes = all(&mut list.iter().map(|(_, part)| part), "mean")?;
                let weights = list.iter().map(|(weight, _)| *weight);
                (!nodes.is_empty()).then(|| Node::Average(weights.zip(nodes).collect()))
            }
        })
    }

    fn composed(&self, base: &dyn BaseModel, at: SublayerSite, mut node: Node, seed: u64) -> Result<Composed> {
        let mut members = Vec::new();
        let mut places = vec![None; self.parts.len()];
        for (i, part) in self.parts.iter().enumerate().filter(|(_, part)| part.config.stands_at(&at)) {
            let prefix = format!("adapters.{}.", part.name);
            // Parts that start from the same seed would be the same.
            let seed = seed.wrapping_add((i as u64) << 32);
            let mut adapter = part.config.bottleneck(base, at, &prefix, &Shared::default(), seed)?;
            adapter.site = SiteId(at.end.0.wrapping_add(SITES_APART.wrapping_mul(i as u32 + 1)));
            if let Some(place) = places.get_mut(i) {
                *place = Some(members.len());
            }
            members.push(Member { adapter, trained: part.trained });
        }
        renumber(&mut node, &places);
        let has_fusion = has_fusion(&node);
        let attention = match &self.fusion {
            Some(settings) if has_fusion => Some(attention(settings, base, at, seed)?),
            _ => None,
        };
        Ok(Composed { members, node, attention })
    }
}

fn has_fusion(node: &Node) -> bool {
    match node {
        Node::One(_) => false,
        Node::Fuse(_) => true,
        Node::Stack(list) => list.iter().any(has_fusion),
        Node::Average(list) => list.iter().any(|(_, part)| has_fusion(part)),
    }
}

/// From numbers of all parts to those of one place.
fn renumber(node: &mut Node, places: &[Option<usize>]) {
    match node {
        Node::One(i) => *i = places.get(*i).copied().flatten().unwrap_or(usize::MAX),
        Node::Stack(list) | Node::Fuse(list) => list.iter_mut().for_each(|part| renumber(part, places)),
        Node::Average(list) => list.iter_mut().for_each(|(_, part)| renumber(part, places)),
    }
}

fn attention(settings: &FusionSettings, base: &dyn BaseModel, at: SublayerSite, seed: u64) -> Result<Attention> {
    let site = base.sites().get(at.end).ok_or_else(|| Error::msg("a sublayer ends at a site that does not exist"))?;
    let hidden = at.hidden_size;
    let parameter = |suffix: &str, value: Tensor, role: Role| {
        let name = parameter_name(&site.path, &format!("fusion.{suffix}"));
        Parameter::new(name, &value.to_device(base.device())?, role)
    };
    let normal = |draw: u32| {
        let values = Stream { seed, step: draw, site: at.end.0 }.normal_vec(hidden * hidden, 0.02);
        Tensor::from_vec(values, (hidden, hidden), &Device::Cpu)
    };
    let linear = |name: &str, draw: u32| -> Result<Projection> {
        let bias = Tensor::zeros(hidden, DType::F32, &Device::Cpu)?;
        // The key's bias adds the same to all scores, which the softmax does not see.
        let role = if name == "key" { Role::ZeroAtStart } else { Role::NoDecay };
        Ok(Projection {
            weight: Weight::Dense(parameter(&format!("{name}.weight"), normal(draw)?, Role::Plain)?),
            bias: Some(parameter(&format!("{name}.bias"), bias, role)?),
        })
    };
    let value = || -> Result<Projection> {
        let start = if settings.value_initialized {
            let eye = Tensor::eye(hidden, DType::F32, &Device::Cpu)?;
            // Ones on the diagonal, 1e-6 elsewhere.
            ((eye * (1.0 - 1e-6))? + 1e-6)?
        } else {
            normal(2)?
        };
        Ok(Projection { weight: Weight::Dense(parameter("value.weight", start, Role::NoDecay)?), bias: None })
    };
    Ok(Attention {
        site: at.end,
        query: settings.query.then(|| linear("query", 0)).transpose()?,
        key: settings.key.then(|| linear("key", 1)).transpose()?,
        value: settings.value.then(value).transpose()?,
        query_before_norm: settings.query_before_norm,
        residual_before: settings.residual_before,
        value_before_softmax: settings.value_before_softmax,
        dropout: settings.dropout,
    })
}

/// Sets `parameter` to what `files` has under `key`.
fn set(parameter: &Parameter, files: &AdapterFolder, key: &str, base: &dyn BaseModel) -> Result<()> {
    files.check_one(&ExpectedTensor::required(key, parameter.var().dims().to_vec()))?;
    let value = files.tensor(key, base.device())?;
    check_finite(key, &value)?;
    parameter.set(&value)
}

/// Gives the part `name` the values in its own `files`. A class head there is left alone.
fn fill(adapter: &Adapter, files: &AdapterFolder, name: &str, base: &dyn BaseModel) -> Result<()> {
    let infix = format!(".adapters.{name}.");
    let mut used = BTreeSet::new();
    for parameter in adapter.fixed().iter().filter(|p| p.name().contains(&infix)) {
        let key = parameter.name().replacen(&infix, ".", 1);
        set(parameter, files, &key, base)?;
        used.insert(key);
    }
    match files.keys().find(|key| !used.contains(*key) && !is_of_head(key, base)) {
        None => Ok(()),
        Some(key) => {
            let message =
                format!("holds `{key}` beside its bottlenecks, for which an adapter made of several has no place");
            Err(Error::file(files.weights().path() as &Path, message))
        }
    }
}

/// Gives the trained class head the values in `files`.
fn fill_head(adapter: &Adapter, files: &AdapterFolder, base: &dyn BaseModel) -> Result<()> {
    adapter
        .parameters()
        .into_iter()
        .filter(|parameter| is_of_head(parameter.name(), base))
        .try_for_each(|parameter| set(parameter, files, parameter.name(), base))
}

/// Whether a tensor is one of a class head.
fn is_of_head(key: &str, base: &dyn BaseModel) -> bool {
    let head = base.sites().iter().map(|site| site.segment).max();
    matches!(base.task(), Task::Head { .. })
        && base
            .sites()
            .iter()
            .any(|site| Some(site.segment) == head && key.strip_prefix(&parameter_name(&site.path, "")).is_some())
}
