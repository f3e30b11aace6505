//! From a config to an adapter on a base model: which sites, which modules, how they start.

use std::collections::HashSet;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_core::adapter_keys::KEY_PREFIX;
use peft_core::kernels::Stream;
use peft_core::select::{SelectRules, Unmatched, saved_target_modules, select};
use peft_core::select_spec::TargetModules;
use peft_core::suggest::did_you_mean;
use peft_core::{
    Adapter, BaseLayer, BaseModel, Built, Context, Error, FrozenEmbedding, FrozenLinear, Gate, Parameter, Result, Role,
    Site, SiteAdapter, SiteKind, SiteModule, SiteTable, TrainedTokens, candidates, insert_saved, parameter_name,
    selected_site,
};

use crate::config::{BiasTraining, LoraConfig};
use crate::dora;
use crate::embedding::LoraEmbedding;
use crate::experts::{LoraExperts, key_prefixes};
use crate::gated::GatedLora;
use crate::linear::LoraLinear;

impl LoraConfig {
    /// Makes the adapter that this config describes on `base`. Random starts are a function of `seed` and the site.
    ///
    /// With [`Unmatched::Error`] a pattern that hits nothing is refused with the nearest names; adapters written by PEFT
    /// are read with [`Unmatched::Report`], since PEFT ignores such patterns.
    ///
    /// # Errors
    /// When a pattern or a combination of settings is wrong; the message names it.
    pub fn build(&self, base: &dyn BaseModel, seed: u64, unmatched: Unmatched) -> Result<Built> {
        self.for_experts(base)?.build_named(base, seed, unmatched)
    }

    fn build_named(&self, base: &dyn BaseModel, seed: u64, unmatched: Unmatched) -> Result<Built> {
        let sites = base.sites().clone();
        let candidates = candidates(&sites);
        let mut spec = self.targets.clone();
        if spec.target_parameters.is_empty() {
            spec.fill_default_targets("LORA", base.model_type())?;
        }
        let selection = select(&spec, &candidates, &SelectRules { unmatched, ..SelectRules::LORA })?;
        let names = saved_target_modules(&spec, "LORA", &candidates).map(|t| t.to_json());
        let mut config = self.to_adapter_config(names);
        if spec.task_type.is_none() {
            config.insert("task_type".into(), base.task().peft_name().into());
        }
        let mut adapter = Adapter::new(config, &sites);
        if self.init.subtracts() {
            for (key, value) in self.doubled() {
                adapter.set_export_key(key, value);
            }
        }
        let builder = Builder { config: self, base, seed };

        let mut adapted = HashSet::new();
        for selected in &selection.sites {
            let site = selected_site(&sites, selected.index)?;
            let (r, alpha) = (selected.rank.unwrap_or(self.r), selected.alpha.unwrap_or(self.lora_alpha));
            let module = builder.module(site, r, alpha).with_context(|| site.path.clone())?;
            adapter.insert(site.id, SiteAdapter::new(Some(module), None))?;
            adapted.insert(site.id);
        }
        if !selection.parameters.is_empty() {
            self.check_parameters()?;
        }
        let experts =
            selection.parameters.iter().map(|p| selected_site(&sites, p.index)).collect::<Result<Vec<_>>>()?;
        let prefixes = key_prefixes(&experts.iter().map(|site| site.path.as_str()).collect::<Vec<_>>());
        for ((selected, site), prefix) in selection.parameters.iter().zip(experts).zip(prefixes) {
            let (r, alpha) = (selected.rank.unwrap_or(self.r), selected.alpha.unwrap_or(self.lora_alpha));
            let module = builder.parameter_module(site, &prefix, r, alpha).with_context(|| site.path.clone())?;
            adapter.insert(site.id, SiteAdapter::new(Some(module), None)).map_err(|_| {
                let message = "adapts this weight, and target_modules its layer: take it out of one of the two";
                Error::site(&site.path, format!("target_parameters {message}"))
            })?;
            adapted.insert(site.id);
        }
        insert_saved(&mut adapter, &selection, base)?;
        let mut whole = HashSet::new();
        for saved in &selection.saved {
            for &index in &saved.members {
                let site = selected_site(&sites, index)?;
                whole.insert(site.id);
                if self.bias == BiasTraining::All {
                    builder.add_wrapper_biases(&mut adapter, &saved.path, site)?;
                }
            }
        }
        for (site, tokens) in builder.tokens(&sites)? {
            adapter
                .insert(site.id, SiteAdapter::new(Some(tokens), None))
                .map_err(|_| Error::config("trainable_token_indices", format!("`{}` is adapted already", site.path)))?;
        }
        for site in sites.iter().filter(|s| !whole.contains(&s.id)) {
            if let Some(bias) = builder.bias(site, adapted.contains(&site.id))? {
                adapter.insert(site.id, SiteAdapter::new(None, Some(bias)))?;
            }
        }
        if saves_embeddings(&spec.target_modules, self.trainable_tokens.is_some()) {
            for site in sites.iter().filter(|s| adapted.contains(&s.id)) {
                let weight = match base.layer(site.id)? {
                    BaseLayer::Embedding(e) => e.weight().clone(),
                    BaseLayer::Linear(l) if site.is_output_head => l.weight().clone(),
                    _ => continue,
                };
                adapter.add_constant(parameter_name(&site.path, "base_layer.weight"), weight.to_dense(base.dtype())?);
            }
        }
        if adapter.parameters().is_empty() {
            return Err(Error::config("target_modules", "leaves nothing to train"));
        }
        Ok(Built { adapter, selection })
    }
}

/// PEFT saves the whole table of an adapted embedding or head when the targets name one outright.
fn saves_embeddings(targets: &Option<TargetModules>, trains_tokens: bool) -> bool {
    let named = match targets {
        Some(TargetModules::Names(names)) => names.iter().any(|n| n == "embed_tokens" || n == "lm_head"),
        Some(TargetModules::Regex(_)) => true,
        _ => false,
    };
    named && !trains_tokens
}

fn outside_blocks() -> Error {
    Error::config("use_gating", "goes with linear layers in the model's blocks: leave this one out of target_modules")
}

/// The stream's step of a gate's start, behind those of the factors.
const GATE: u32 = u32::MAX;

struct Builder<'a> {
    config: &'a LoraConfig,
    base: &'a dyn BaseModel,
    seed: u64,
}

impl Builder<'_> {
    fn parameter(&self, site: &Site, suffix: &str, value: &Tensor, role: Role) -> Result<Parameter> {
        Parameter::new(parameter_name(&site.path, suffix), &value.to_device(self.base.device())?, role)
    }

    fn module(&self, site: &Site, r: usize, alpha: f64) -> Result<SiteModule> {
        let scale = self.config.scale(r, alpha) as f32;
        match self.base.layer(site.id)? {
            BaseLayer::Linear(layer) if self.config.use_gating => {
                Ok(SiteModule::Linear(Arc::new(self.gated(site, layer, r)?)))
            }
            BaseLayer::Linear(layer) => Ok(SiteModule::Linear(Arc::new(self.linear(site, layer, r, scale)?))),
            BaseLayer::Embedding(_) if self.config.use_gating => Err(outside_blocks()),
            BaseLayer::Embedding(e) => Ok(SiteModule::Embedding(Arc::new(self.embedding(site, e, r, scale)?))),
            BaseLayer::Norm(_) => Err(Error::site(&site.path, "LoRA adapts linear layers and embeddings, not norms")),
            BaseLayer::Experts(_) => Err(Error::site(&site.path, "is a parameter: name it in target_parameters")),
        }
    }

    /// The module for a weight of `target_parameters`; `prefix` stands in front of the keys of experts.
    fn parameter_module(&self, site: &Site, prefix: &str, r: usize, alpha: f64) -> Result<SiteModule> {
        let scale = self.config.scale(r, alpha) as f32;
        match self.base.layer(site.id)? {
            BaseLayer::Experts(layer) => {
                let ((inp, out), experts) = (layer.dims(), layer.weights().len());
                let stream = Stream { seed: self.seed, step: 0, site: site.id.0 };
                let start = self.config.init.start_experts([experts, inp, out], r, stream, self.base.device())?;
                let a_role = if self.config.init.starts_at_zero() { Role::ZeroAtStart } else { Role::Plain };
                let parameter = |suffix: &str, value: &Tensor, role: Role| {
                    Parameter::new(parameter_name(prefix, suffix), &value.to_device(self.base.device())?, role)
                };
                let (a, b) =
                    (parameter("lora_A.weight", &start.a, a_role)?, parameter("lora_B.weight", &start.b, Role::LoraB)?);
                Ok(SiteModule::Experts(Arc::new(LoraExperts { a, b, experts, scale })))
            }
            BaseLayer::Linear(layer) if layer.is_fan_in_fan_out() => Err(Error::config(
                "target_parameters",
                "the weight lies transposed in this model: name the layer in target_modules",
            )),
            BaseLayer::Linear(layer) => Ok(SiteModule::Linear(Arc::new(self.linear(site, layer, r, scale)?))),
            BaseLayer::Embedding(_) | BaseLayer::Norm(_) => {
                Err(Error::site(&site.path, "is not a weight that target_parameters adapts"))
            }
        }
    }

    fn linear(&self, site: &Site, layer: &FrozenLinear, r: usize, scale: f32) -> Result<LoraLinear> {
        let config = self.config;
        let stream = Stream { seed: self.seed, step: 0, site: site.id.0 };
        let start = config.init.start(layer, r, f64::from(scale), stream, self.base.device())?;
        let subtracted = if config.init.subtracts() {
            let a = self.parameter(site, "lora_A_initial.weight", &start.a, Role::Plain)?;
            Some((a, self.parameter(site, "lora_B_initial.weight", &start.b, Role::Plain)?))
        } else {
            None
        };
        let a_role = if config.init.starts_at_zero() { Role::ZeroAtStart } else { Role::Plain };
        let magnitude = if config.use_dora {
            // What a start puts into A and B beyond zero it takes out of the base, so that the sum is W again.
            let scale = if subtracted.is_some() { 0.0 } else { scale };
            let norm = dora::weight_norm(layer.weight(), &start.a, &start.b, scale)?;
            Some(self.parameter(site, "lora_magnitude_vector", &norm, Role::NoDecay)?)
        } else {
            None
        };
        let b_bias = if config.lora_bias {
            let zero = Tensor::zeros(layer.weight().out_features(), DType::F32, self.base.device())?;
            Some(self.parameter(site, "lora_B.bias", &zero, Role::NoDecay)?)
        } else {
            None
        };
        Ok(LoraLinear {
            a: self.parameter(site, "lora_A.weight", &start.a, a_role)?,
            b: self.parameter(site, "lora_B.weight", &start.b, Role::LoraB)?,
            b_bias,
            magnitude,
            subtracted,
            scale,
            dropout: config.lora_dropout,
        })
    }

    /// LoRA with a gate, whose place is in a block: there it is known which rows are a sequence.
    fn gated(&self, site: &Site, layer: &FrozenLinear, r: usize) -> Result<GatedLora> {
        let head = self.base.sites().iter().map(|s| s.segment).max();
        if site.segment == 0 || Some(site.segment) == head {
            return Err(outside_blocks());
        }
        let LoraLinear { a, b, dropout, .. } = self.linear(site, layer, r, 1.0)?;
        let stream = Stream { seed: self.seed, step: GATE, site: site.id.0 };
        let name = parameter_name(&site.path, "gate");
        let silent = self.config.init.starts_at_zero();
        let gate = Gate::start(&name, [1, layer.weight().in_features()], silent, stream, self.base.device())?;
        Ok(GatedLora { a, b, gate, dropout })
    }

    /// On an embedding PEFT starts A at zero and B from a standard normal.
    fn embedding(&self, site: &Site, layer: &FrozenEmbedding, r: usize, scale: f32) -> Result<LoraEmbedding> {
        if self.config.init.subtracts() {
            return Err(Error::config(
                "init_lora_weights",
                "starts from the weights of linear layers, and this is an embedding: leave it out of target_modules, or use \
                 init_lora_weights = true",
            ));
        }
        let (vocab, dim) = (layer.weight().out_features(), layer.weight().in_features());
        let stream = Stream { seed: self.seed, step: 0, site: site.id.0 };
        let a = Tensor::zeros((r, vocab), DType::F32, &candle_core::Device::Cpu)?;
        let b = Tensor::from_vec(stream.normal_vec(dim * r, 1.0), (dim, r), &candle_core::Device::Cpu)?;
        let magnitude = if self.config.use_dora {
            // A is zero, so the norm is that of the table's columns.
            let norm = layer.weight().to_dense(DType::F32)?.sqr()?.sum(0)?.sqrt()?;
            Some(self.parameter(site, "lora_magnitude_vector", &norm, Role::NoDecay)?)
        } else {
            None
        };
        Ok(LoraEmbedding {
            a: self.parameter(site, "lora_embedding_A", &a, Role::Plain)?,
            b: self.parameter(site, "lora_embedding_B", &b, Role::ZeroAtStart)?,
            magnitude,
            scale,
        })
    }

    /// What PEFT stores of a module in `modules_to_save` besides the module, where `bias = "all"` makes it store whatever
    /// is called a bias: that of the base's module, and that of the trained one under the wrapper's name.
    fn add_wrapper_biases(&self, adapter: &mut Adapter, module: &str, site: &Site) -> Result<()> {
        let bias = match self.base.layer(site.id)? {
            BaseLayer::Linear(layer) => layer.bias(),
            BaseLayer::Norm(norm) => norm.bias(),
            BaseLayer::Embedding(_) | BaseLayer::Experts(_) => None,
        };
        if let (Some(bias), Some(inside)) = (bias, site.path.strip_prefix(module)) {
            let wrapped = |part: &str| format!("{KEY_PREFIX}{module}.{part}{inside}.bias");
            // Of the adapter's name PEFT removes the one in front of the last part only.
            let trained = if inside.is_empty() { "modules_to_save" } else { "modules_to_save.default" };
            adapter.add_export_tensor(wrapped("original_module"), bias.to_dtype(DType::F32)?);
            adapter.add_export_copy(wrapped(trained), parameter_name(&site.path, "bias"));
        }
        Ok(())
    }

    fn tokens<'s>(&self, sites: &'s SiteTable) -> Result<Vec<(&'s Site, SiteModule)>> {
        let key = "trainable_token_indices";
        let Some(tokens) = &self.config.trainable_tokens else { return Ok(Vec::new()) };
        let embeddings: Vec<&Site> = sites.iter().filter(|s| matches!(s.kind, SiteKind::Embedding { .. })).collect();
        let mut modules = Vec::new();
        for (name, ids) in &tokens.by_module {
            // Tokens are looked up first of all, so that their table is the first of a model's.
            let matches = |s: &&&Site| name.as_ref().is_none_or(|n| s.path == *n || s.path.ends_with(&format!(".{n}")));
            let Some(site) = embeddings.iter().find(matches) else {
                let name = name.as_deref().unwrap_or_default();
                let near = did_you_mean(name, embeddings.iter().map(|s| s.path.as_str()));
                return Err(Error::config(key, format!("`{name}` is not an embedding of this model{near}")));
            };
            let BaseLayer::Embedding(layer) = self.base.layer(site.id)? else { continue };
            let rows = layer.weight().rows(ids).with_context(|| key)?.to_dtype(DType::F32)?;
            let rows = self.parameter(site, "token_adapter.trainable_tokens_delta", &rows, Role::Rows)?;
            let tied = self.base.tied_embedding() == Some(site.path.as_str());
            let module = TrainedTokens::new(ids.clone(), rows, tied);
            modules.push((*site, SiteModule::Embedding(Arc::new(module))));
        }
        Ok(modules)
    }

    fn bias(&self, site: &Site, adapted: bool) -> Result<Option<Parameter>> {
        let wanted = match self.config.bias {
            BiasTraining::None => false,
            BiasTraining::All => true,
            BiasTraining::LoraOnly => adapted,
        };
        if !wanted {
            return Ok(None);
        }
        let bias = match self.base.layer(site.id)? {
            BaseLayer::Linear(layer) => layer.bias().cloned(),
            BaseLayer::Norm(norm) => norm.bias().cloned(),
            BaseLayer::Embedding(_) | BaseLayer::Experts(_) => None,
        };
        let suffix = if adapted { "base_layer.bias" } else { "bias" };
        bias.map(|b| self.parameter(site, suffix, &b.to_dtype(DType::F32)?, Role::NoDecay)).transpose()
    }
}
