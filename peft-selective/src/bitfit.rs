//! BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): biases are trained and nothing else.
//!
//! PEFT has no such method; the nearest is a LoRA with `bias = "all"`, which needs a rank. Files have a `peft_type` of our own
//! and call each tensor as PEFT does there: `base_model.model.{path}.bias`.

use candle_core::{DType, Tensor};
use peft_core::config_keys::{completed, peft_defaults};
use peft_core::select::{Selection, saved_target_modules};
use peft_core::{
    Adapter, BaseLayer, BaseModel, Built, Candidate, ConfigKeys, Error, ModuleKind, Parameter, Result, Role,
    SelectRules, Site, SiteAdapter, SiteKind, TargetSpec, Unmatched, candidates, insert_saved, parameter_name, select,
    selected_site, task_keys,
};
use serde_json::{Map, Value, json};

use crate::select_paths::select_paths;

/// `peft_type` in our files.
const PEFT_TYPE: &str = "BITFIT";
/// The key that adds biases where there are none.
const ADD: &str = "add_biases";

/// The settings of BitFit.
#[derive(Debug, Clone)]
pub struct BitfitConfig {
    targets: TargetSpec,
    /// Whether linear layers without a bias get one, of zeros.
    add: bool,
    raw: Map<String, Value>,
}

fn known() -> Map<String, Value> {
    let own = json!({ADD: false, "exclude_modules": null, "modules_to_save": null, "target_modules": null});
    peft_defaults(PEFT_TYPE, own)
}

impl BitfitConfig {
    /// Reads the config of an existing adapter.
    ///
    /// # Errors
    /// A value of the wrong type; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(config);
        Ok(Self {
            targets: TargetSpec::from_config(&keys.only(&known()))?,
            add: keys.flag(ADD, false)?,
            raw: config.clone(),
        })
    }

    /// Reads the `[method]` table of a recipe, where an unknown key is an error with the nearest known.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        ConfigKeys(config).refuse_unknown("bitfit", &known())?;
        Self::from_adapter_config(config)
    }

    /// This config completed for the task of `base` ([`task_keys`]): the head of a classifier is trained too, as in the paper.
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.extend(task_keys(&self.targets, base)?);
        Self::from_adapter_config(&raw)
    }

    /// Makes the adapter that this config describes on `base`: the biases of the modules in `target_modules`, or all.
    ///
    /// # Errors
    /// When a pattern matches nothing or only layers without a bias (with [`Unmatched::Error`]), when nothing at all would be
    /// trained, or when the base cannot be read.
    pub fn build(&self, base: &dyn BaseModel, unmatched: Unmatched) -> Result<Built> {
        let sites = base.sites().clone();
        let candidates = candidates(&sites);
        let supported = &[ModuleKind::Norm, ModuleKind::Linear, ModuleKind::Embedding];
        let rules = SelectRules { method: "BitFit", supported, unmatched };
        let selection = match self.targets.target_modules {
            Some(_) => self.select_named(base, &candidates, &rules)?,
            None => {
                // A head gets no bias of its own unless it is named.
                let wanted = |site: &&Site| has_bias(site) || (self.place(site) && !site.is_output_head);
                let paths: Vec<String> = sites.iter().filter(wanted).map(|site| site.path.clone()).collect();
                if paths.is_empty() {
                    return Err(self.nothing(base, "this model"));
                }
                select_paths(&self.targets, paths, ("target_modules", "every bias"), &candidates, &rules)?
            }
        };
        let mut config = completed(known(), &self.raw);
        if let Some(targets) = saved_target_modules(&self.targets, PEFT_TYPE, &candidates) {
            config.insert("target_modules".into(), targets.to_json());
        }
        let mut adapter = Adapter::new(config, &sites);
        for selected in &selection.sites {
            let site = selected_site(&sites, selected.index)?;
            let bias = match base.layer(site.id)? {
                BaseLayer::Linear(layer) => match layer.bias() {
                    Some(bias) => bias.to_dtype(DType::F32)?,
                    None => Tensor::zeros(layer.weight().out_features(), DType::F32, base.device())?,
                },
                BaseLayer::Norm(norm) => match norm.bias() {
                    Some(bias) => bias.to_dtype(DType::F32)?,
                    None => continue,
                },
                BaseLayer::Embedding(_) | BaseLayer::Experts(_) => continue,
            };
            let bias = Parameter::new(parameter_name(&site.path, "bias"), &bias, Role::NoDecay)?;
            adapter.insert(site.id, SiteAdapter::new(None, Some(bias)))?;
        }
        insert_saved(&mut adapter, &selection, base)?;
        Ok(Built { adapter, selection })
    }

    /// The modules that `target_modules` names, as far as they have a bias or get one.
    fn select_named(
        &self,
        base: &dyn BaseModel,
        candidates: &[Candidate<'_>],
        rules: &SelectRules<'_>,
    ) -> Result<Selection> {
        let sites = base.sites();
        let fits = |index: usize| selected_site(sites, index).is_ok_and(|site| self.place(site));
        let mut selection = select(&self.targets, candidates, rules)?;
        selection.sites.retain(|selected| fits(selected.index));
        if selection.sites.is_empty() {
            return Err(self.nothing(base, "what `target_modules` selects"));
        }
        let with_bias: Vec<Candidate<'_>> =
            candidates.iter().enumerate().filter(|(i, _)| fits(*i)).map(|(_, c)| *c).collect();
        let counted = select(&self.targets, &with_bias, &SelectRules { unmatched: Unmatched::Report, ..*rules })?;
        let without = counted.unmatched.iter().find(|missed| missed.key == "target_modules");
        if let (Unmatched::Error, Some(missed)) = (rules.unmatched, without) {
            return Err(self.nothing(base, &format!("`{}` of `target_modules`", missed.pattern)));
        }
        for hits in selection.hits.iter_mut().filter(|hits| hits.key == "target_modules") {
            let found = counted.hits.iter().find(|h| h.key == hits.key && h.pattern == hits.pattern);
            hits.hits = found.map_or(0, |h| h.hits);
        }
        Ok(selection)
    }

    /// Whether a bias of this site is trained where the site is selected.
    fn place(&self, site: &Site) -> bool {
        has_bias(site) || (self.add && matches!(site.kind, SiteKind::Linear { .. }) && !site.is_router)
    }

    fn nothing(&self, base: &dyn BaseModel, what: &str) -> Error {
        let way_out = if self.add {
            "name linear layers, which get a bias each"
        } else {
            "add_biases = true gives each linear layer there a bias of zeros to train (such an adapter is served, and cannot be \
             merged); method ln trains norms instead"
        };
        let message =
            format!("bitfit trains biases, and {what} has none (model type `{}`): {way_out}", base.model_type());
        Error::config(if self.targets.target_modules.is_some() { "target_modules" } else { "type" }, message)
    }
}

fn has_bias(site: &Site) -> bool {
    match site.kind {
        SiteKind::Linear { bias, .. } | SiteKind::Norm { bias, .. } => bias,
        SiteKind::Embedding { .. } | SiteKind::Experts { .. } => false,
    }
}
