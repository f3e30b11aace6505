//! EVA: A starts as the leading principal components of each layer's inputs on the training data, and ranks move to the
//! layers whose components explain most (Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance
//! Adaptation", 2024, arXiv:2410.07170; PEFT `tuners/lora/eva.py`).
//!
//! An [`EvaObserver`] puts a module at every target that looks at its input. Whoever has the data runs it through the
//! model until [`EvaObserver::converged`], and [`EvaObserver::finish`] gives the config with its new ranks and the
//! components.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Tensor, TensorId};
use peft_core::kernels::{ServingForm, Stream};
use peft_core::select::{SelectRules, SelectedSite, select};
use peft_core::{
    Adapter, AdapterSet, BaseLayer, BaseModel, Built, Ctx, Delta, Error, FrozenLinear, Parameter, PeftModule, Result,
    Site, SiteAdapter, SiteId, SiteModule, SiteTable, candidates, parameter_name,
};
use serde_json::{Map, Value};

use crate::config::LoraConfig;
use pca::IncrementalPca;

mod pca;

/// `eva_config`, with PEFT's keys and defaults.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvaConfig {
    /// A layer gets at most `rho · r` directions; 1 leaves all ranks as they are.
    pub rho: f64,
    /// A component has converged when its cosine with the one before is at least this.
    pub tau: f64,
    /// Look at counted tokens only.
    pub use_label_mask: bool,
    /// Divide each component by the root of its singular value.
    pub whiten: bool,
    /// Change alpha with the rank, so that every layer keeps its scale.
    pub adjust_scaling_factors: bool,
}

impl Default for EvaConfig {
    fn default() -> Self {
        Self { rho: 2.0, tau: 0.99, use_label_mask: true, whiten: false, adjust_scaling_factors: true }
    }
}

impl EvaConfig {
    /// Reads `eva_config`; absent keys have their defaults.
    ///
    /// # Errors
    /// An unknown key or a value out of range, by its name.
    pub(crate) fn parse(value: Option<&Value>) -> Result<Self> {
        let mut config = Self::default();
        let map = match value {
            None => return Ok(config),
            Some(Value::Object(map)) => map,
            Some(other) => return Err(Error::config("eva_config", format!("{other} is not a table"))),
        };
        let wrong =
            |key: &str, value: &Value, what| Error::config(format!("eva_config.{key}"), format!("{value} {what}"));
        for (key, value) in map {
            let flag = || value.as_bool().ok_or_else(|| wrong(key, value, "is neither true nor false"));
            let number = || value.as_f64().ok_or_else(|| wrong(key, value, "is not a number"));
            match key.as_str() {
                "rho" => config.rho = number()?,
                "tau" => config.tau = number()?,
                "use_label_mask" => config.use_label_mask = flag()?,
                "whiten" => config.whiten = flag()?,
                "adjust_scaling_factors" => config.adjust_scaling_factors = flag()?,
                // Labels that do not count are -100 here as there.
                "label_mask_value" => {}
                _ => {
                    let known = "rho, tau, use_label_mask, whiten, adjust_scaling_factors";
                    return Err(Error::config(format!("eva_config.{key}"), format!("is not a key; known: {known}")));
                }
            }
        }
        if !(config.rho >= 1.0 && config.rho.is_finite()) {
            return Err(Error::config("eva_config.rho", format!("{} is not a number from 1", config.rho)));
        }
        if !(0.0..=1.0).contains(&config.tau) {
            return Err(Error::config("eva_config.tau", format!("{} is outside [0, 1]", config.tau)));
        }
        Ok(config)
    }
}

/// Gathers the inputs of the layers that a config targets.
#[derive(Debug)]
pub struct EvaObserver {
    config: LoraConfig,
    sites: Arc<SiteTable>,
    selected: Vec<SelectedSite>,
    adapters: AdapterSet,
    shared: Arc<Shared>,
}

/// What the modules of all sites write to.
#[derive(Debug)]
struct Shared(Mutex<Observed>);

/// The layers that are observed, gathered by their input: layers that read the same tensor share one decomposition.
#[derive(Debug, Default)]
struct Observed {
    /// Rows of this batch that are looked at; `None` while the first pass only finds out which layers share an input.
    rows: Option<Vec<u32>>,
    inputs: HashMap<TensorId, usize>,
    group_of: HashMap<SiteId, usize>,
    groups: Vec<Group>,
    seed: u64,
}

#[derive(Debug)]
struct Group {
    leader: SiteId,
    wanted: usize,
    width: usize,
    /// Rows that did not make a batch yet.
    pending: Vec<f32>,
    pca: Option<IncrementalPca>,
    cosines: Vec<f64>,
    /// Nothing to learn at the moment: all components that the present ranks need have converged.
    done: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Observed> {
        // A panic elsewhere leaves whole numbers of rows behind: nothing here is half done between statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observed {
    fn see(&mut self, site: SiteId, wanted: usize, x: &Tensor) -> Result<()> {
        let width = x.dim(1)?;
        let Some(rows) = &self.rows else {
            let next = self.groups.len();
            let group = *self.inputs.entry(x.id()).or_insert(next);
            self.group_of.insert(site, group);
            match self.groups.get_mut(group) {
                Some(g) => g.wanted = g.wanted.max(wanted),
                None => self.groups.push(Group {
                    leader: site,
                    wanted,
                    width,
                    pending: Vec::new(),
                    pca: None,
                    cosines: Vec::new(),
                    done: false,
                }),
            }
            return Ok(());
        };
        let group = self.group_of.get(&site).and_then(|&i| self.groups.get_mut(i));
        let Some(group) = group.filter(|g| g.leader == site && !g.done) else { return Ok(()) };
        let index = Tensor::new(rows.as_slice(), x.device())?;
        let looked_at = x.detach().index_select(&index, 0)?.to_dtype(DType::F32)?;
        group.pending.extend(looked_at.flatten_all()?.to_vec1::<f32>()?);
        let stream = Stream { seed: self.seed, step: 1, site: site.0 };
        let pca = group.pca.get_or_insert_with(|| IncrementalPca::new(group.wanted, group.width, stream));
        if group.pending.len() >= pca.wanted().max(1) * group.width {
            if let Some(cosines) = pca.fit(&group.pending)? {
                group.cosines = cosines;
            }
            group.pending.clear();
        }
        Ok(())
    }

    /// Ranks by where the explained variance is largest: the components of all layers compete for the sum of all ranks.
    fn ranks(&self, order: &[(SiteId, usize)]) -> HashMap<SiteId, usize> {
        let explained = |site: &SiteId| {
            let group = self.group_of.get(site).and_then(|&g| self.groups.get(g));
            group.and_then(|g| g.pca.as_ref()).map(IncrementalPca::explained).unwrap_or_default()
        };
        let budget = order.iter().map(|(_, r)| r).sum();
        let mut all: Vec<(f64, SiteId)> =
            order.iter().flat_map(|(site, _)| explained(site).into_iter().map(|e| (e, *site))).collect();
        // Stable: of layers with the same input the first comes first.
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut ranks: HashMap<SiteId, usize> = order.iter().map(|(site, _)| (*site, 0)).collect();
        for (_, site) in all.into_iter().take(budget) {
            *ranks.entry(site).or_default() += 1;
        }
        ranks
    }
}

#[derive(Debug)]
struct Looking {
    site: SiteId,
    wanted: usize,
    shared: Arc<Shared>,
}

impl PeftModule for Looking {
    fn forward(&self, base: &FrozenLinear, x: &Tensor, _: &Ctx<'_>) -> Result<Tensor> {
        self.shared.lock().see(self.site, self.wanted, x)?;
        base.base(x)
    }

    fn parameters(&self) -> Vec<&Parameter> {
        Vec::new()
    }

    fn delta(&self, _: &FrozenLinear) -> Result<Delta> {
        Ok(Delta::Unmergeable("it only looks at inputs".into()))
    }

    fn lower(&self, _: &FrozenLinear) -> Result<Option<ServingForm>> {
        Ok(None)
    }
}

impl EvaObserver {
    /// Looks at the inputs of the linear layers in the blocks that `config` targets. Embeddings and the output head are
    /// left to the default start.
    ///
    /// # Errors
    /// When a pattern of the config matches nothing, or only layers that have no observed input.
    pub fn new(config: LoraConfig, base: &dyn BaseModel, seed: u64) -> Result<Self> {
        let sites = base.sites().clone();
        let config = config.for_experts(base)?.into_owned();
        let mut spec = config.targets.clone();
        if spec.target_parameters.is_empty() {
            spec.fill_default_targets("LORA", base.model_type())?;
        }
        let selection = select(&spec, &candidates(&sites), &SelectRules::LORA)?;
        let shared = Arc::new(Shared(Mutex::new(Observed { seed, ..Observed::default() })));
        let mut adapter = Adapter::new(Map::new(), &sites);
        let mut observed = 0;
        for selected in &selection.sites {
            let Some(site) = observable(&sites, base, selected)? else { continue };
            let wanted = (selected.rank.unwrap_or(config.r) as f64 * config.eva.rho).round() as usize;
            let module = Looking { site: site.id, wanted, shared: shared.clone() };
            adapter.insert(site.id, SiteAdapter::new(Some(SiteModule::Linear(Arc::new(module))), None))?;
            observed += 1;
        }
        if observed == 0 {
            return Err(Error::config(
                "init_lora_weights",
                "eva looks at linear layers inside the blocks: none is targeted",
            ));
        }
        let adapters = AdapterSet::one("eva", Arc::new(adapter));
        Ok(Self { config, sites, selected: selection.sites, adapters, shared })
    }

    /// Whether only counted tokens are looked at.
    #[must_use]
    pub fn counted_only(&self) -> bool {
        self.config.eva.use_label_mask
    }

    /// The adapters that a pass over data has to be given, in slot 0.
    #[must_use]
    pub fn adapters(&self) -> &AdapterSet {
        &self.adapters
    }

    /// Says which rows `[tokens]` of the next batch to look at. Before the first call a pass finds out which layers share
    /// an input.
    pub fn begin(&self, rows: Vec<u32>) {
        let mut observed = self.shared.lock();
        observed.rows = Some(rows);
        let order = self.order(&observed);
        let ranks = observed.ranks(&order);
        let tau = self.config.eva.tau;
        let Observed { groups, group_of, .. } = &mut *observed;
        for (i, group) in groups.iter_mut().enumerate() {
            let members = group_of.iter().filter(|(_, g)| **g == i).filter_map(|(site, _)| ranks.get(site));
            let needed = members.copied().max().unwrap_or(0);
            group.done = group.cosines.iter().take(needed).all(|c| *c >= tau) && !group.cosines.is_empty();
        }
    }

    /// Layers with an input of their own, and how many of them have all components that the present ranks need.
    #[must_use]
    pub fn converged(&self) -> (usize, usize) {
        let observed = self.shared.lock();
        (observed.groups.len(), observed.groups.iter().filter(|g| g.done).count())
    }

    /// The observed sites with the ranks that the config gives them, in order.
    fn order(&self, observed: &Observed) -> Vec<(SiteId, usize)> {
        let rank = |s: &SelectedSite| s.rank.unwrap_or(self.config.r);
        let sites = self.selected.iter().map(|s| (SiteId(s.index as u32), rank(s)));
        sites.filter(|(site, _)| observed.group_of.contains_key(site)).collect()
    }

    /// The adapter with its new ranks, A at the components and B at zero.
    ///
    /// # Errors
    /// When a layer was never run, or a tensor cannot be made.
    pub fn finish(self, base: &dyn BaseModel, seed: u64) -> Result<Built> {
        let observed = self.shared.lock();
        let ranks = observed.ranks(&self.order(&observed));
        let config = self.redistributed(&ranks)?;
        let built = config.build(base, seed, peft_core::select::Unmatched::Error)?;
        let starts: HashMap<String, SiteId> = ranks
            .iter()
            .filter(|(_, r)| **r > 0)
            .filter_map(|(site, _)| Some((parameter_name(&self.sites.get(*site)?.path, "lora_A.weight"), *site)))
            .collect();
        for parameter in built.adapter.parameters() {
            let Some(site) = starts.get(parameter.name()) else { continue };
            let group = observed.group_of.get(site).and_then(|&g| observed.groups.get(g));
            let pca = group.and_then(|g| g.pca.as_ref());
            let rank = ranks.get(site).copied().unwrap_or(0);
            let pca = pca.ok_or_else(|| Error::msg(format!("{} saw no data", parameter.name())))?;
            let components = pca.components(rank, config.eva.whiten)?;
            parameter.set(&components.to_device(base.device())?)?;
        }
        Ok(built)
    }

    /// The config with the ranks as patterns, as PEFT writes it: full paths, and targets without layers of rank 0.
    fn redistributed(&self, ranks: &HashMap<SiteId, usize>) -> Result<LoraConfig> {
        let config = &self.config;
        let (mut rank_pattern, mut alpha_pattern, mut kept) = (Map::new(), Map::new(), Vec::<Value>::new());
        for selected in &self.selected {
            let Some(site) = self.sites.get(SiteId(selected.index as u32)) else { continue };
            let (r, mut alpha) = (selected.rank.unwrap_or(config.r), selected.alpha.unwrap_or(config.lora_alpha));
            let new = ranks.get(&site.id).copied().unwrap_or(r);
            if new == 0 {
                continue;
            }
            if config.eva.adjust_scaling_factors {
                alpha *= new as f64 / r as f64;
            }
            kept.push(site.path.clone().into());
            if new != config.r {
                rank_pattern.insert(site.path.clone(), new.into());
            }
            if alpha != config.lora_alpha {
                alpha_pattern.insert(site.path.clone(), alpha.into());
            }
        }
        let mut keys = Map::new();
        keys.insert("rank_pattern".into(), rank_pattern.into());
        keys.insert("alpha_pattern".into(), alpha_pattern.into());
        if kept.len() < self.selected.len() {
            keys.insert("target_modules".into(), kept.into());
        }
        config.with_keys(keys)
    }
}

/// The site of a selected layer whose input a pass through the blocks shows.
fn observable<'a>(sites: &'a SiteTable, base: &dyn BaseModel, selected: &SelectedSite) -> Result<Option<&'a Site>> {
    let Some(site) = sites.get(SiteId(selected.index as u32)) else { return Ok(None) };
    let is_linear = matches!(base.layer(site.id)?, BaseLayer::Linear(_));
    Ok((is_linear && !site.is_output_head).then_some(site))
}
