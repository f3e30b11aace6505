//! Trainable tokens as a method of its own (PEFT `tuners/trainable_tokens`): chosen rows of the embedding, and of the output
//! head where the two are tied or the head is named too.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::config_keys::{completed, peft_defaults};
use peft_core::kernels::Stream;
use peft_core::select::saved_target_modules;
use peft_core::{
    Adapter, BaseLayer, BaseModel, Built, ConfigKeys, Context, Error, ModuleKind, Parameter, Result, Role, SelectRules,
    Site, SiteAdapter, SiteKind, SiteModule, TargetModules, TargetSpec, TrainedHeadRows, TrainedTokens, Unmatched,
    candidates, parameter_name, select, selected_site, task_keys, token_ids,
};
use serde_json::{Map, Value, json};

const PEFT_TYPE: &str = "TRAINABLE_TOKENS";
const IDS: &str = "token_indices";
const ROWS: &str = "trainable_tokens_delta";

/// The settings of trainable tokens.
#[derive(Debug, Clone)]
pub struct TokensConfig {
    ids: Vec<u32>,
    targets: TargetSpec,
    /// Whether rows start as the table's own.
    identity: bool,
    raw: Map<String, Value>,
}

fn known() -> Map<String, Value> {
    peft_defaults(PEFT_TYPE, json!({"init_weights": true, "target_modules": null, "token_indices": []}))
}

impl TokensConfig {
    /// Reads the config of an existing adapter. Keys that PEFT may add later are ignored, as PEFT does.
    ///
    /// # Errors
    /// A value of the wrong type, or no tokens; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(config);
        let Some(ids) = keys.get(IDS) else { return Err(Error::config(IDS, "is not given; name the tokens to train")) };
        Ok(Self {
            ids: token_ids(IDS, ids)?,
            targets: TargetSpec::from_config(&keys.only(&known()))?,
            identity: keys.flag("init_weights", true)?,
            raw: config.clone(),
        })
    }

    /// Reads the `[method]` table of a recipe: PEFT's keys, where an unknown one is an error with the nearest known.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        ConfigKeys(config).refuse_unknown("trainable_tokens", &known())?;
        Self::from_adapter_config(config)
    }

    /// This config for the task of `base`. PEFT trains no class head with this method.
    ///
    /// # Errors
    /// A `task_type` that is not the base's, or a base whose head has no weights yet.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        if let Some(fresh) = base.fresh_layers().first() {
            let message = format!(
                "trainable_tokens trains rows of embeddings alone, and `{fresh}` has no weights in this checkpoint; use \
                 lora with trainable_token_indices"
            );
            return Err(Error::config("type", message));
        }
        let mut raw = self.raw.clone();
        raw.extend(task_keys(&self.targets, base)?.remove_entry("task_type"));
        Self::from_adapter_config(&raw)
    }

    /// Makes the adapter that this config describes on `base`. Without `target_modules` the tokens' own embedding is meant.
    /// Random starts are a function of `seed` and the site.
    ///
    /// # Errors
    /// When a pattern matches nothing (with [`Unmatched::Error`]) or what has no tokens, or a token is outside the
    /// vocabulary.
    pub fn build(&self, base: &dyn BaseModel, seed: u64, unmatched: Unmatched) -> Result<Built> {
        let sites = base.sites().clone();
        let candidates = candidates(&sites);
        let mut spec = self.targets.clone();
        if spec.target_modules.is_none() {
            // Tokens are looked up first of all.
            let table = sites.iter().find(|s| matches!(s.kind, SiteKind::Embedding { .. }));
            let table = table.ok_or_else(|| Error::config("type", "trainable_tokens needs an embedding"))?;
            spec.target_modules = Some(TargetModules::Regex(table.path.clone()));
        }
        let supported = &[ModuleKind::Embedding, ModuleKind::Linear];
        let selection = select(&spec, &candidates, &SelectRules { method: "trainable tokens", supported, unmatched })?;
        let mut config = completed(known(), &self.raw);
        if let Some(targets) = saved_target_modules(&spec, PEFT_TYPE, &candidates) {
            config.insert("target_modules".into(), targets.to_json());
        }
        if spec.task_type.is_none() {
            config.insert("task_type".into(), base.task().peft_name().into());
        }
        let mut adapter = Adapter::new(config, &sites);
        let selected = selection.sites.iter().map(|s| selected_site(&sites, s.index)).collect::<Result<Vec<_>>>()?;
        let is_tied = |site: &Site| base.tied_embedding() == Some(site.path.as_str());
        let tied = selected.iter().any(|site| is_tied(site));
        for site in selected {
            // A head that shares a trained table has no rows of its own.
            if site.is_output_head && tied {
                continue;
            }
            if is_tied(site) {
                // PEFT stores what the head follows once more, under the head's name.
                for head in sites.iter().filter(|s| s.is_output_head) {
                    adapter.add_export_copy(parameter_name(&head.path, ROWS), parameter_name(&site.path, ROWS));
                }
            }
            let module = self.module(site, base, is_tied(site), seed).with_context(|| site.path.clone())?;
            adapter.insert(site.id, SiteAdapter::new(Some(module), None))?;
        }
        Ok(Built { adapter, selection })
    }

    fn module(&self, site: &Site, base: &dyn BaseModel, tied: bool, seed: u64) -> Result<SiteModule> {
        let (weight, embedding) = match base.layer(site.id)? {
            BaseLayer::Embedding(table) => (table.weight(), true),
            BaseLayer::Linear(head) if site.is_output_head && head.bias().is_none() => (head.weight(), false),
            BaseLayer::Linear(_) | BaseLayer::Norm(_) | BaseLayer::Experts(_) => {
                return Err(Error::config("target_modules", "names a layer that has no row for each token"));
            }
        };
        let mut rows = weight.rows(&self.ids).with_context(|| IDS)?.to_dtype(DType::F32)?;
        if !self.identity {
            let values = Stream { seed, step: 0, site: site.id.0 }.normal_vec(rows.elem_count(), 1.0);
            rows = Tensor::from_vec(values, rows.shape(), &Device::Cpu)?;
        }
        let rows = Parameter::new(parameter_name(&site.path, ROWS), &rows.to_device(base.device())?, Role::Rows)?;
        Ok(match embedding {
            true => SiteModule::Embedding(Arc::new(TrainedTokens::new(self.ids.clone(), rows, tied))),
            false => SiteModule::Linear(Arc::new(TrainedHeadRows::new(self.ids.clone(), rows))),
        })
    }
}
