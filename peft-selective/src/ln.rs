//! LN tuning (Zhao et al. 2023, arXiv:2312.11420; PEFT `tuners/ln_tuning`): norms are trained on copies of their own.

use peft_core::config_keys::{completed, peft_defaults};
use peft_core::select::saved_target_modules;
use peft_core::{
    Adapter, BaseModel, Built, ConfigKeys, ModuleKind, Result, SelectRules, SiteAdapter, TargetSpec, Unmatched,
    candidates, insert_saved, parameter_name, select, selected_site, task_keys, trained_copy,
};
use serde_json::{Map, Value, json};

const PEFT_TYPE: &str = "LN_TUNING";

/// The settings of LN tuning.
#[derive(Debug, Clone)]
pub struct LnConfig {
    targets: TargetSpec,
    raw: Map<String, Value>,
}

fn known() -> Map<String, Value> {
    peft_defaults(PEFT_TYPE, json!({"exclude_modules": null, "modules_to_save": null, "target_modules": null}))
}

impl LnConfig {
    /// Reads the config of an existing adapter. Keys that PEFT may add later are ignored, as PEFT does.
    ///
    /// # Errors
    /// A value of the wrong type; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        Ok(Self { targets: TargetSpec::from_config(&ConfigKeys(config).only(&known()))?, raw: config.clone() })
    }

    /// Reads the `[method]` table of a recipe: PEFT's keys, where an unknown one is an error with the nearest known.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        ConfigKeys(config).refuse_unknown("ln", &known())?;
        Self::from_adapter_config(config)
    }

    /// This config as PEFT completes it for the task of `base` ([`task_keys`]).
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.extend(task_keys(&self.targets, base)?);
        Self::from_adapter_config(&raw)
    }

    /// Makes the adapter that this config describes on `base`. As in PEFT, targets need not be norms.
    ///
    /// # Errors
    /// When a pattern matches nothing (with [`Unmatched::Error`]) or the base cannot be read.
    pub fn build(&self, base: &dyn BaseModel, unmatched: Unmatched) -> Result<Built> {
        let sites = base.sites().clone();
        let candidates = candidates(&sites);
        let mut spec = self.targets.clone();
        spec.fill_default_targets(PEFT_TYPE, base.model_type())?;
        let supported = &[ModuleKind::Norm, ModuleKind::Linear, ModuleKind::Embedding];
        let selection = select(&spec, &candidates, &SelectRules { method: "LN tuning", supported, unmatched })?;
        let mut config = completed(known(), &self.raw);
        if let Some(targets) = saved_target_modules(&spec, PEFT_TYPE, &candidates) {
            config.insert("target_modules".into(), targets.to_json());
        }
        let mut adapter = Adapter::new(config, &sites);
        for selected in &selection.sites {
            let site = selected_site(&sites, selected.index)?;
            let module = trained_copy(&parameter_name(&site.path, "ln_tuning_layers"), base.layer(site.id)?)?;
            adapter.insert(site.id, SiteAdapter::new(Some(module), None))?;
        }
        insert_saved(&mut adapter, &selection, base)?;
        Ok(Built { adapter, selection })
    }
}
