//! From a config and its experts to an X-LoRA adapter on a base model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use peft_core::{
    Adapter, AdapterSet, BaseLayer, BaseModel, Built, Ctx, Error, Mode, Result, Route, SiteAdapter, SiteId, SiteModule,
    Task, Unmatched, candidates, insert_saved, parameter_name, select_saved,
};
use serde_json::Value;

use super::classifier::Classifier;
use super::files::expert_part;
use super::{Expert, XLoraConfig, XLoraLinear};

/// Layers in the order in which PEFT numbers them, in which transformers makes them: that of the pass, but that Phi-3's `o_proj` is made
/// before its `qkv_proj`.
fn in_pefts_order<T>(layers: BTreeMap<SiteId, T>, base: &dyn BaseModel) -> Vec<(SiteId, T)> {
    let mut layers: Vec<(SiteId, T)> = layers.into_iter().collect();
    let attention = |layers: &[(SiteId, T)], i: usize, name: &str| {
        let site = layers.get(i).and_then(|(site, _)| base.sites().get(*site));
        site.and_then(|site| site.path.strip_suffix(name)).map(str::to_owned)
    };
    for i in 1..layers.len() {
        let first = attention(&layers, i - 1, ".qkv_proj");
        if first.is_some() && first == attention(&layers, i, ".o_proj") {
            layers.swap(i - 1, i);
        }
    }
    layers
}

impl XLoraConfig {
    /// Makes the adapter that this config describes on `base`, of `experts` in the order of their numbers, which are LoRA adapters for
    /// the same base. The classifier starts from `seed`.
    ///
    /// # Errors
    /// An expert that is more than A and B on linear layers, or a model that has no last hidden state.
    pub fn build(&self, base: &dyn BaseModel, experts: &[Adapter], seed: u64, unmatched: Unmatched) -> Result<Built> {
        if base.task() == Task::Seq2SeqLm {
            let message =
                "an encoder–decoder has two last hidden states, and X-LoRA reads that of the tokens that it changes";
            return Err(Error::msg(message));
        }
        if experts.len() != self.folders().len() {
            return Err(Error::config("adapters", format!("are {}, not {}", self.folders().len(), experts.len())));
        }
        let selection = select_saved(&self.saved, &candidates(base.sites()), unmatched)?;
        let heads: BTreeSet<usize> = match base.task() {
            Task::Head { .. } => selection.saved.iter().flat_map(|saved| saved.members.clone()).collect(),
            _ => BTreeSet::new(),
        };
        let mut layers: BTreeMap<SiteId, Vec<Expert>> = BTreeMap::new();
        for (number, adapter) in experts.iter().enumerate() {
            let numbered = |e: Error| Error::config("adapters", format!("of expert {number}: {e}"));
            // Heads of experts are left alone: the adapter trains one for itself.
            for (site, own) in adapter.touched().filter(|(site, _)| !heads.contains(&site.index())) {
                let expert = self.expert(number, site, own, base).map_err(numbered)?;
                layers.entry(site).or_default().push(expert);
            }
        }
        let shape = self.shape(base, self.layerwise.then_some(layers.len()))?;
        let classifier = Arc::new(Classifier::new(shape, self.weighing, seed, base.device())?);
        let configs = experts.iter().map(|expert| Value::Object(expert.config.clone()));
        let mut adapter = Adapter::new(self.to_adapter_config(shape.hidden, configs.collect()), base.sites());
        adapter.set_first_pass();
        classifier.parameters().for_each(|parameter| adapter.add_shared(parameter.clone()));
        for (layer, (site, experts)) in in_pefts_order(layers, base).into_iter().enumerate() {
            if !self.trains_experts {
                experts.iter().flat_map(|e| [&e.a, &e.b]).for_each(|parameter| adapter.add_fixed(parameter.clone()));
            }
            let (classifier, trains_experts) = (classifier.clone(), self.trains_experts);
            let module = XLoraLinear { experts, classifier, layer, trains_experts };
            adapter.insert(site, SiteAdapter::new(Some(SiteModule::Linear(Arc::new(module))), None))?;
        }
        insert_saved(&mut adapter, &selection, base)?;
        Ok(Built { adapter, selection })
    }

    /// Expert `number` at a site, from what it does there.
    fn expert(&self, number: usize, site: SiteId, own: &SiteAdapter, base: &dyn BaseModel) -> Result<Expert> {
        let path = base.sites().get(site).map_or("", |site| site.path.as_str());
        let more = || {
            let message = "it does more than A and B on a linear layer (DoRA, biases, embeddings, trained tokens, modules_to_save), \
                           which X-LoRA does not weigh";
            Error::site(path, message)
        };
        let (BaseLayer::Linear(layer), Some(SiteModule::Linear(module)), None) =
            (base.layer(site)?, &own.module, &own.bias)
        else {
            return Err(more());
        };
        let set = AdapterSet::empty();
        let training = Ctx { mode: Mode::Train { track: false }, ..Ctx::eval(&set, &Route::Base) };
        let low_rank = module.low_rank(layer, &training).ok_or_else(more)?;
        let &[a, b] = module.parameters().as_slice() else { return Err(more()) };
        let named = |part: &str| parameter_name(path, &expert_part(number, part));
        Ok(Expert {
            number,
            a: a.renamed(named("lora_A.weight")),
            b: b.renamed(named("lora_B.weight")),
            scale: (f64::from(low_rank.scale) * self.scale) as f32,
            dropout: low_rank.dropout.map_or(0.0, |dropout| dropout.p),
        })
    }
}
