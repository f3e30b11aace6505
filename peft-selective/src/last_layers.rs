//! The last blocks of a model, trained whole while everything below stays frozen (Lee et al. 2019, arXiv:1911.03090, who find
//! that the last quarter of the blocks gives most of what full fine-tuning gives).
//!
//! The backward pass stops below the first of them. PEFT has no such method: files have a `peft_type` of our own, and tensors are
//! called as PEFT calls those of `modules_to_save`.

use peft_core::adapter_keys::KEY_PREFIX;
use peft_core::config_keys::{completed, peft_defaults};
use peft_core::{
    Adapter, BaseModel, Built, ConfigKeys, Error, ModuleKind, Result, SelectRules, Site, SiteAdapter, SiteKind,
    TargetSpec, Unmatched, candidates, insert_saved, selected_site, task_keys, trained_copy,
};
use serde_json::{Map, Value, json};

use crate::select_paths::select_paths;

/// `peft_type` in our files.
const PEFT_TYPE: &str = "LAST_LAYERS";
/// How many blocks.
const COUNT: &str = "num_layers";
/// Whether the norm behind the last block is trained too.
const NORM: &str = "final_norm";
/// Whether the layer that makes logits is trained too.
const HEAD: &str = "output_head";

/// The settings of training the last blocks.
#[derive(Debug, Clone)]
pub struct LastLayersConfig {
    num_layers: Option<usize>,
    final_norm: bool,
    output_head: bool,
    /// Of these, `exclude_modules`, `modules_to_save` and `task_type`.
    targets: TargetSpec,
    raw: Map<String, Value>,
}

fn known() -> Map<String, Value> {
    let own = json!({COUNT: null, NORM: false, HEAD: false, "exclude_modules": null, "modules_to_save": null});
    peft_defaults(PEFT_TYPE, own)
}

impl LastLayersConfig {
    /// Reads the config of an existing adapter.
    ///
    /// # Errors
    /// A value of the wrong type; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(config);
        Ok(Self {
            num_layers: keys.count(COUNT, usize::MAX)?,
            final_norm: keys.flag(NORM, false)?,
            output_head: keys.flag(HEAD, false)?,
            targets: TargetSpec::from_config(&keys.only(&known()))?,
            raw: config.clone(),
        })
    }

    /// Reads the `[method]` table of a recipe, where an unknown key is an error with the nearest known.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        ConfigKeys(config).refuse_unknown("last_layers", &known())?;
        Self::from_adapter_config(config)
    }

    /// This config completed for the task of `base` ([`task_keys`]): the head of a classifier is trained too.
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.extend(task_keys(&self.targets, base)?);
        Self::from_adapter_config(&raw)
    }

    /// Makes the adapter that this config describes on `base`. In an encoder–decoder the blocks are those of the encoder and then
    /// those of the decoder, so that the last are the decoder's.
    ///
    /// # Errors
    /// No `num_layers`, or more than the model has; `final_norm` where there is none; a name of `modules_to_save` that is nothing's.
    pub fn build(&self, base: &dyn BaseModel, unmatched: Unmatched) -> Result<Built> {
        let sites = base.sites().clone();
        // The head is the segment behind the last block.
        let head = sites.iter().map(|site| site.segment).max().unwrap_or(0);
        let blocks = head.saturating_sub(1);
        let Some(count) = self.num_layers else {
            let message =
                format!("is not given: how many of the model's {blocks} blocks, from the last on, are trained");
            return Err(Error::config(COUNT, message));
        };
        if count > blocks {
            return Err(Error::config(COUNT, format!("is {count}, and this model has {blocks} blocks")));
        }
        let is_final_norm = |site: &Site| site.segment == head && matches!(site.kind, SiteKind::Norm { .. });
        if self.final_norm && !sites.iter().any(is_final_norm) {
            let message =
                format!("is true, and no norm stands behind the last block of model type `{}`", base.model_type());
            return Err(Error::config(NORM, message));
        }
        let wanted = |site: &&Site| {
            (blocks - count + 1..=blocks).contains(&site.segment)
                || (self.final_norm && is_final_norm(site))
                || (self.output_head && site.is_output_head)
        };
        let paths: Vec<String> = sites.iter().filter(wanted).map(|site| site.path.clone()).collect();
        let words = format!("the last {count} of {blocks} blocks");
        let candidates = candidates(&sites);
        let supported = &[ModuleKind::Norm, ModuleKind::Linear, ModuleKind::Embedding];
        let rules = SelectRules { method: "training the last blocks", supported, unmatched };
        let selection = select_paths(&self.targets, paths, (COUNT, &words), &candidates, &rules)?;
        let mut adapter = Adapter::new(completed(known(), &self.raw), &sites);
        for selected in &selection.sites {
            let site = selected_site(&sites, selected.index)?;
            let module = trained_copy(&format!("{KEY_PREFIX}{}", site.path), base.layer(site.id)?)?;
            adapter.insert(site.id, SiteAdapter::new(Some(module), None))?;
        }
        insert_saved(&mut adapter, &selection, base)?;
        Ok(Built { adapter, selection })
    }
}
