//! From a config to an adapter on a base model.

use std::collections::BTreeSet;
use std::sync::Arc;

use peft_core::select::saved_target_modules;
use peft_core::{
    Adapter, BaseLayer, BaseModel, Built, Context, ModuleKind, Parameter, Result, SelectRules, SiteAdapter, SiteModule,
    Unmatched, candidates, insert_saved, parameter_name, select, selected_site,
};

use crate::config::ReparamConfig;
use crate::start::Start;

impl ReparamConfig {
    /// Makes the adapter that this config describes on `base`. Random starts are a function of `seed` and the site. `stored`
    /// are the names of the tensors in the file that it is made for, since some methods store more than one form.
    ///
    /// With [`Unmatched::Error`] a pattern that hits nothing is refused with the nearest names; adapters written by PEFT
    /// are read with [`Unmatched::Report`], since PEFT ignores such patterns.
    ///
    /// # Errors
    /// When a pattern is wrong or a setting does not fit a layer; the message names it.
    pub fn build(
        &self,
        base: &dyn BaseModel,
        seed: u64,
        unmatched: Unmatched,
        stored: &BTreeSet<String>,
    ) -> Result<Built> {
        let sites = base.sites().clone();
        let candidates = candidates(&sites);
        let mut spec = self.targets.clone();
        spec.fill_default_targets(self.kind.peft_type, base.model_type())?;
        let rules = SelectRules { method: self.kind.label, supported: &[ModuleKind::Linear], unmatched };
        let selection = select(&spec, &candidates, &rules)?;
        let names = saved_target_modules(&spec, self.kind.peft_type, &candidates).map(|t| t.to_json());
        let mut adapter = Adapter::new(self.to_adapter_config(base, names), &sites);

        let mut layers = Vec::new();
        for selected in &selection.sites {
            let site = selected_site(&sites, selected.index)?;
            if let BaseLayer::Linear(layer) = base.layer(site.id)? {
                layers.push((layer, (selected.rank, selected.alpha)));
            }
        }
        let dims = layers.iter().map(|(l, _)| (l.weight().out_features(), l.weight().in_features()));
        let shared = self.method.shared(&dims.collect::<Vec<_>>(), base.device())?;
        let trained = self.method.shared_trained(seed, base.device())?;
        let repeated = self.method.stores_shared() && self.method.repeats_shared();
        let mut modules = Vec::new();
        for (layer, pattern) in layers {
            let start = Start::new(layer, pattern, (&shared, &trained), base.device(), (seed, stored));
            let (module, fixed) = self.method.module(start).with_context(|| layer.path().to_owned())?;
            let module = Arc::new(module);
            modules.push(module.clone());
            adapter.insert(layer.site(), SiteAdapter::new(Some(SiteModule::Linear(module)), None))?;
            fixed.into_iter().for_each(|parameter| adapter.add_fixed(parameter));
            for of in shared.iter().map(Parameter::name).filter(|_| repeated) {
                let suffix = of.rsplit('.').next().unwrap_or(of);
                adapter.add_export_copy(parameter_name(layer.path(), suffix), of);
            }
        }
        let parameters: Vec<_> = modules.iter().map(|module| module.parameters.as_slice()).collect();
        if let Some(tasks) = self.method.tasks() {
            adapter.set_tasks(tasks);
        }
        if let Some(hook) = self.method.training_hook(&parameters)? {
            adapter.set_training_hook(hook);
        }
        trained.into_iter().for_each(|parameter| adapter.add_shared(parameter));
        if self.method.stores_shared() {
            shared.into_iter().for_each(|parameter| adapter.add_fixed(parameter));
        }
        insert_saved(&mut adapter, &selection, base)?;
        Ok(Built { adapter, selection })
    }
}
