//! Adapters, and the immutable sets of them that a forward pass is given.

mod union;

pub use union::{UNION, UNION_PARTS};

use std::sync::{Arc, OnceLock};

use candle_core::Tensor;
use peft_kernels::ServingForm;
use serde_json::{Map, Value};

use crate::ctx::Ctx;
use crate::error::{Error, Result};
use crate::head::Labels;
use crate::heads::AttentionModule;
use crate::layers::FrozenLinear;
use crate::module::{EmbeddingModule, ExpertsModule, NormModule, PeftModule};
use crate::param::Parameter;
use crate::site::{SiteId, SiteTable};
use crate::sublayer::SublayerModule;
use crate::task::check_task;
use crate::training_hook::TrainingHook;
use crate::virtual_tokens::VirtualTokens;

/// The module that an adapter puts at a site.
#[derive(Debug, Clone)]
pub enum SiteModule {
    /// Around a linear layer.
    Linear(Arc<dyn PeftModule>),
    /// Around an embedding.
    Embedding(Arc<dyn EmbeddingModule>),
    /// In place of a normalisation.
    Norm(Arc<dyn NormModule>),
    /// On the weights of the experts of a mixture.
    Experts(Arc<dyn ExpertsModule>),
    /// Where a sublayer joins the residual stream; it stands at the sublayer's last linear layer.
    Sublayer(Arc<dyn SublayerModule>),
    /// Beside the heads of an attention; it stands at the attention's last linear layer.
    Attention(Arc<dyn AttentionModule>),
}

impl SiteModule {
    /// What kind of layer the module is for, in words.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Linear(_) => "a module for linear layers",
            Self::Embedding(_) => "a module for embeddings",
            Self::Norm(_) => "a module for norms",
            Self::Experts(_) => "a module for experts",
            Self::Sublayer(_) => "a module for the ends of sublayers",
            Self::Attention(_) => "a module for the heads of attention",
        }
    }

    /// The module's trainable parameters.
    #[must_use]
    pub fn parameters(&self) -> Vec<&Parameter> {
        match self {
            Self::Linear(m) => m.parameters(),
            Self::Embedding(m) => m.parameters(),
            Self::Norm(m) => m.parameters(),
            Self::Experts(m) => m.parameters(),
            Self::Sublayer(m) => m.parameters(),
            Self::Attention(m) => m.parameters(),
        }
    }

    /// What the module does that no change of a weight does, as a predicate; nothing where it changes one layer.
    #[must_use]
    pub fn beyond_weights(&self) -> Option<&'static str> {
        match self {
            Self::Sublayer(_) => Some("changes the residual stream"),
            Self::Attention(_) => Some("adds what queries see beside their sequence"),
            Self::Linear(_) | Self::Embedding(_) | Self::Norm(_) | Self::Experts(_) => None,
        }
    }

    /// Whether it is given all rows of a sequence together ([`Ctx::sequences`]).
    #[must_use]
    pub fn reads_sequences(&self, ctx: &Ctx<'_>) -> bool {
        match self {
            Self::Linear(m) => m.reads_sequences(),
            Self::Sublayer(m) => m.reads_sequences(ctx),
            Self::Embedding(_) | Self::Norm(_) | Self::Experts(_) | Self::Attention(_) => false,
        }
    }

    fn frozen(&self) -> Vec<&Parameter> {
        match self {
            Self::Linear(m) => m.frozen(),
            _ => Vec::new(),
        }
    }

    fn for_task(&self, task: usize) -> Self {
        match self {
            Self::Linear(m) => m.for_task(task).map_or_else(|| self.clone(), Self::Linear),
            _ => self.clone(),
        }
    }

    fn check(&self) -> Result<()> {
        match self {
            Self::Linear(m) => m.check(),
            _ => Ok(()),
        }
    }

    fn exported(&self) -> Result<Vec<(String, Tensor)>> {
        match self {
            Self::Linear(m) => m.exported(),
            _ => Ok(self.parameters().into_iter().map(|p| (p.name().to_string(), p.value())).collect()),
        }
    }
}

/// What one adapter does at one site.
#[derive(Debug, Default)]
pub struct SiteAdapter {
    /// The module, where there is one.
    pub module: Option<SiteModule>,
    /// A bias in place of the base's (`bias = "all"` or `"lora_only"`, BitFit), or on a linear layer that has none.
    pub bias: Option<Parameter>,
    form: OnceLock<Option<Arc<ServingForm>>>,
}

impl SiteAdapter {
    /// An adapter of one site.
    #[must_use]
    pub fn new(module: Option<SiteModule>, bias: Option<Parameter>) -> Self {
        Self { module, bias, form: OnceLock::new() }
    }

    /// The serving form at a linear layer, made on first use and kept.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn serving_form(&self, base: &FrozenLinear) -> Result<Option<Arc<ServingForm>>> {
        if let Some(form) = self.form.get() {
            return Ok(form.clone());
        }
        let mut form = match &self.module {
            Some(SiteModule::Linear(module)) => module.lower(base)?,
            // These act beside the layer and behind it.
            None | Some(SiteModule::Sublayer(_) | SiteModule::Attention(_)) => Some(ServingForm::default()),
            Some(_) => None,
        };
        if let (Some(form), Some(trained)) = (&mut form, &self.bias) {
            let shift = match base.bias() {
                Some(bias) => (trained.value() - bias.to_dtype(trained.dtype())?)?,
                None => trained.value(),
            };
            form.shift = Some(match form.shift.take() {
                Some(s) => (s + shift)?,
                None => shift,
            });
        }
        Ok(self.form.get_or_init(|| form.map(Arc::new)).clone())
    }

    /// The site's trainable parameters.
    #[must_use]
    pub fn parameters(&self) -> Vec<&Parameter> {
        let module = self.module.iter().flat_map(SiteModule::parameters);
        module.chain(&self.bias).collect()
    }
}

/// Config and named tensors of an adapter as other programs read it.
pub type Exported = (Map<String, Value>, Vec<(String, Tensor)>);

/// One adapter: a method's modules at the sites of one base model, and the config that made them.
#[derive(Debug)]
pub struct Adapter {
    /// The `adapter_config.json` of this adapter.
    pub config: Map<String, Value>,
    /// The outputs of the head that the adapter trains, where it does; PEFT's files have no place for them.
    pub labels: Labels,
    sites: Vec<Option<SiteAdapter>>,
    /// Which sites are `Conv1D`.
    fan_in_fan_out: Vec<bool>,
    virtual_tokens: Option<VirtualTokens>,
    constants: Vec<(String, Tensor)>,
    fixed: Vec<Parameter>,
    shared: Vec<Parameter>,
    /// Set where its modules depend on the task.
    tasks: Option<usize>,
    /// Whether its modules read what the base alone makes of the batch.
    first_pass: bool,
    training_hook: Option<Box<dyn TrainingHook>>,
    export_keys: Map<String, Value>,
    export_tensors: Vec<(String, ExportTensor)>,
}

/// A tensor that is no state of an adapter and that other programs expect in its file.
#[derive(Debug, Clone)]
enum ExportTensor {
    Constant(Tensor),
    /// The one stored under this key, again.
    CopyOf(String),
}

impl Adapter {
    /// An adapter with nothing in it, for a model with these sites.
    #[must_use]
    pub fn new(config: Map<String, Value>, sites: &SiteTable) -> Self {
        Self {
            config,
            labels: Labels::default(),
            sites: (0..sites.len()).map(|_| None).collect(),
            fan_in_fan_out: sites.iter().map(|site| site.stored.fan_in_fan_out).collect(),
            virtual_tokens: None,
            constants: Vec::new(),
            fixed: Vec::new(),
            shared: Vec::new(),
            tasks: None,
            first_pass: false,
            training_hook: None,
            export_keys: Map::new(),
            export_tensors: Vec::new(),
        }
    }

    /// Puts `adapter` at a site. As PEFT does, the config's `fan_in_fan_out` becomes what is right for the layer there.
    ///
    /// # Errors
    /// When something is there already, or the site is not the model's.
    pub fn insert(&mut self, site: SiteId, adapter: SiteAdapter) -> Result<()> {
        if matches!(adapter.module, Some(SiteModule::Linear(_)))
            && let Some(value) = self.config.get_mut("fan_in_fan_out")
        {
            *value = self.fan_in_fan_out.get(site.index()).copied().unwrap_or(false).into();
        }
        match self.sites.get_mut(site.index()) {
            Some(place @ None) => *place = Some(adapter),
            Some(Some(there)) if there.module.is_none() && adapter.bias.is_none() => there.module = adapter.module,
            Some(Some(there)) if there.bias.is_none() && adapter.module.is_none() => there.bias = adapter.bias,
            Some(Some(_)) => return Err(Error::msg(format!("two adapters for one site (site {})", site.0))),
            None => return Err(Error::msg(format!("site {} is not one of the model's", site.0))),
        }
        Ok(())
    }

    /// Adds a tensor that is stored with the adapter but not trained, such as the full table that PEFT saves beside an
    /// adapted embedding.
    pub fn add_constant(&mut self, key: impl Into<String>, value: Tensor) {
        self.constants.push((key.into(), value));
    }

    /// Adds a tensor that the method reads, that is stored with the adapter and read back, and that is not trained, such
    /// as VeRA's projections.
    pub fn add_fixed(&mut self, tensor: Parameter) {
        self.fixed.push(tensor);
    }

    /// The tensors of [`Adapter::add_fixed`].
    #[must_use]
    pub fn fixed(&self) -> &[Parameter] {
        &self.fixed
    }

    /// Adds a parameter that modules of several sites read, such as VB-LoRA's bank of vectors. Those modules do not list it.
    pub fn add_shared(&mut self, parameter: Parameter) {
        self.shared.push(parameter);
    }

    /// Sets what the method does in training beside what its modules compute.
    pub fn set_training_hook(&mut self, hook: Box<dyn TrainingHook>) {
        self.training_hook = Some(hook);
    }

    /// What the method does in training beside what its modules compute.
    #[must_use]
    pub fn training_hook(&self) -> Option<&dyn TrainingHook> {
        self.training_hook.as_deref()
    }

    /// Says that modules depend on the task, and how many tasks there are.
    pub fn set_tasks(&mut self, tasks: usize) {
        self.tasks = Some(tasks);
    }

    /// How many tasks there are, where the adapter does another thing for each; `None` for a view of one of them.
    #[must_use]
    pub fn tasks(&self) -> Option<usize> {
        self.tasks
    }

    /// Says that modules read [`crate::Ctx::first`]: whoever runs the adapter makes a first pass over the base alone.
    pub fn set_first_pass(&mut self) {
        self.first_pass = true;
    }

    /// Whether modules read a first pass over the base alone.
    #[must_use]
    pub fn first_pass(&self) -> bool {
        self.first_pass
    }

    /// This adapter as it is for one task: the same parameters, without what acts on the training loop.
    ///
    /// # Errors
    /// A task that there is not, or an adapter that is the same for every task.
    pub fn for_task(&self, task: usize) -> Result<Self> {
        check_task(task, self.tasks)?;
        let site = |site: &SiteAdapter| {
            SiteAdapter::new(site.module.as_ref().map(|module| module.for_task(task)), site.bias.clone())
        };
        Ok(Self {
            config: self.config.clone(),
            labels: self.labels.clone(),
            sites: self.sites.iter().map(|s| s.as_ref().map(site)).collect(),
            fan_in_fan_out: self.fan_in_fan_out.clone(),
            virtual_tokens: self.virtual_tokens.as_ref().map(|tokens| tokens.for_task(task)),
            constants: self.constants.clone(),
            fixed: self.fixed.clone(),
            shared: self.shared.clone(),
            tasks: None,
            first_pass: self.first_pass,
            training_hook: None,
            export_keys: self.export_keys.clone(),
            export_tensors: self.export_tensors.clone(),
        })
    }

    /// Sets a key that [`Adapter::exported`] puts in place of the config's own.
    pub fn set_export_key(&mut self, key: impl Into<String>, value: Value) {
        self.export_keys.insert(key.into(), value);
    }

    /// Puts virtual tokens in front of every sequence.
    pub fn set_virtual_tokens(&mut self, tokens: VirtualTokens) {
        self.virtual_tokens = Some(tokens);
    }

    /// What stands in front of every sequence.
    #[must_use]
    pub fn virtual_tokens(&self) -> Option<&VirtualTokens> {
        self.virtual_tokens.as_ref()
    }

    /// Adds a tensor that is only in what [`Adapter::exported`] gives.
    pub fn add_export_tensor(&mut self, key: impl Into<String>, value: Tensor) {
        self.export_tensors.push((key.into(), ExportTensor::Constant(value)));
    }

    /// Adds a second tensor with the values of the one called `of` to what [`Adapter::exported`] gives.
    pub fn add_export_copy(&mut self, key: impl Into<String>, of: impl Into<String>) {
        self.export_tensors.push((key.into(), ExportTensor::CopyOf(of.into())));
    }

    /// The tensors of [`Adapter::add_export_copy`]: each key, and the key of the one that it repeats.
    pub fn export_copies(&self) -> impl Iterator<Item = (&str, &str)> {
        self.export_tensors.iter().filter_map(|(key, tensor)| match tensor {
            ExportTensor::CopyOf(of) => Some((key.as_str(), of.as_str())),
            ExportTensor::Constant(_) => None,
        })
    }

    /// What this adapter does at a site.
    #[must_use]
    pub fn at(&self, site: SiteId) -> Option<&SiteAdapter> {
        self.sites.get(site.index()).and_then(Option::as_ref)
    }

    /// The sites that this adapter touches, in order.
    pub fn touched(&self) -> impl Iterator<Item = (SiteId, &SiteAdapter)> {
        self.sites.iter().enumerate().filter_map(|(i, s)| s.as_ref().map(|s| (SiteId(i as u32), s)))
    }

    /// All trainable parameters, in site order, then those of virtual tokens and those that sites share.
    #[must_use]
    pub fn parameters(&self) -> Vec<&Parameter> {
        let of_sites = self.touched().flat_map(|(_, s)| s.parameters());
        let of_prompts = self.virtual_tokens.iter().flat_map(VirtualTokens::parameters);
        of_sites.chain(of_prompts).chain(&self.shared).collect()
    }

    /// Trainable elements.
    #[must_use]
    pub fn trainable_elements(&self) -> usize {
        self.parameters().iter().map(|p| p.elem_count()).sum()
    }

    /// The modules' tensors that are not trained and that a checkpoint restores ([`PeftModule::frozen`]).
    #[must_use]
    pub fn frozen(&self) -> Vec<&Parameter> {
        let of_sites = self.touched().filter_map(|(_, s)| s.module.as_ref()).flat_map(SiteModule::frozen);
        of_sites.chain(self.virtual_tokens.iter().flat_map(VirtualTokens::frozen)).collect()
    }

    /// Refuses values that were read from a file and cannot be used ([`PeftModule::check`]).
    ///
    /// # Errors
    /// What is wrong; the message names the tensor.
    pub fn check(&self) -> Result<()> {
        self.touched().filter_map(|(_, s)| s.module.as_ref()).try_for_each(SiteModule::check)
    }

    /// The whole state, as a checkpoint holds it: parameters, frozen and fixed tensors, and constants.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let parameters = self.parameters().into_iter().chain(self.frozen()).chain(&self.fixed);
        let parameters = parameters.map(|p| (p.name().to_string(), p.value()));
        parameters.chain(self.constants.iter().cloned()).collect()
    }

    /// Config and tensors of the adapter as other programs read it. The same as [`Adapter::config`] and
    /// [`Adapter::tensors`] for most methods; PiSSA and OLoRA become a plain LoRA of twice the rank here, a prefix that is
    /// made by a network becomes what the network makes, and AdaLoRA keeps the ranks that are left.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn exported(&self) -> Result<Exported> {
        let mut config = self.config.clone();
        config.extend(self.export_keys.iter().map(|(k, v)| (k.clone(), v.clone())));
        let mut tensors = Vec::new();
        for (_, site) in self.touched() {
            if let Some(module) = &site.module {
                tensors.extend(module.exported()?);
            }
            tensors.extend(site.bias.iter().map(|b| (b.name().to_string(), b.value())));
        }
        if let Some(virtual_tokens) = &self.virtual_tokens {
            tensors.extend(virtual_tokens.exported()?);
        }
        tensors.extend(self.shared.iter().map(|p| (p.name().to_string(), p.value())));
        tensors.extend(self.fixed.iter().map(|p| (p.name().to_string(), p.value())));
        tensors.extend(self.constants.iter().cloned());
        for (key, tensor) in &self.export_tensors {
            let value = match tensor {
                ExportTensor::Constant(value) => Some(value.clone()),
                ExportTensor::CopyOf(of) => tensors.iter().find(|(k, _)| k == of).map(|(_, v)| v.clone()),
            };
            tensors.extend(value.map(|v| (key.clone(), v)));
        }
        if let Some(hook) = &self.training_hook {
            hook.export(&mut config, &mut tensors)?;
        }
        Ok((config, tensors))
    }

    /// The lowest segment in which this adapter has a parameter: the backward pass stops there.
    #[must_use]
    pub fn lowest_segment(&self, sites: &SiteTable) -> Option<usize> {
        let of_sites = self.touched().filter_map(|(id, _)| sites.get(id)).map(|s| s.segment);
        of_sites.chain(self.virtual_tokens.as_ref().map(VirtualTokens::segment)).min()
    }

    /// The `peft_type` of the config.
    #[must_use]
    pub fn peft_type(&self) -> &str {
        self.config.get("peft_type").and_then(Value::as_str).unwrap_or("")
    }
}

/// The adapters that a forward pass may route to, by slot. Immutable: swapping publishes another set, and work in
/// flight keeps the one it began with.
#[derive(Debug, Clone, Default)]
pub struct AdapterSet {
    slots: Vec<(String, Arc<Adapter>)>,
}

impl AdapterSet {
    /// A set without adapters.
    #[must_use]
    pub fn empty() -> Self {
        Self::default()
    }

    /// A set with one adapter in slot 0.
    #[must_use]
    pub fn one(name: impl Into<String>, adapter: Arc<Adapter>) -> Self {
        Self { slots: vec![(name.into(), adapter)] }
    }

    /// This set with one more adapter, in the next slot; an adapter of the same name is replaced in its slot.
    #[must_use]
    pub fn with(&self, name: impl Into<String>, adapter: Arc<Adapter>) -> Self {
        let (mut slots, name) = (self.slots.clone(), name.into());
        match slots.iter_mut().find(|(n, _)| *n == name) {
            Some(slot) => slot.1 = adapter,
            None => slots.push((name, adapter)),
        }
        Self { slots }
    }

    /// A set of these adapters, the first in slot 0. Names are not compared: a slot is what counts.
    #[must_use]
    pub fn of(slots: impl IntoIterator<Item = (String, Arc<Adapter>)>) -> Self {
        Self { slots: slots.into_iter().collect() }
    }

    /// The slot of the adapter called `name`.
    #[must_use]
    pub fn slot(&self, name: &str) -> Option<usize> {
        self.slots.iter().position(|(n, _)| n == name)
    }

    /// The adapters' names, by slot.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.slots.iter().map(|(n, _)| n.as_str())
    }

    /// The adapters, by slot.
    pub fn adapters(&self) -> impl Iterator<Item = &Arc<Adapter>> {
        self.slots.iter().map(|(_, a)| a)
    }

    /// The adapter in a slot.
    #[must_use]
    pub fn adapter(&self, slot: usize) -> Option<&Arc<Adapter>> {
        self.slots.get(slot).map(|(_, a)| a)
    }

    /// What the adapter in `slot` does at `site`.
    #[must_use]
    pub fn at(&self, slot: usize, site: SiteId) -> Option<&SiteAdapter> {
        self.slots.get(slot).and_then(|(_, a)| a.at(site))
    }
}
