//! Full fine-tuning: every weight, bias and norm on a copy of its own. The result is a model, not an adapter.

use std::sync::Arc;

use peft_core::suggest::did_you_mean;
use peft_core::{
    Adapter, BaseLayer, BaseModel, Error, Result, SiteAdapter, SiteModule, TrainedEmbedding, TrainedLinear,
    TrainedNorm, untrained,
};
use serde_json::{Map, Value};

/// `peft_type` in our own checkpoints of full fine-tuning; PEFT has none.
pub const PEFT_TYPE: &str = "FULL";

/// An adapter that trains every parameter of `base`. A head that is tied to the embedding stays tied.
///
/// # Errors
/// A key in `config` (this method has none besides `type`), or a base that cannot be read.
pub fn build(config: &Map<String, Value>, base: &dyn BaseModel) -> Result<Adapter> {
    let known = ["task_type", "peft_type", "base_model_name_or_path", "inference_mode"];
    if let Some(key) = config.keys().find(|k| !known.contains(&k.as_str())) {
        let near = did_you_mean(key, ["type", "task_type"]);
        return Err(Error::config(key, format!("is not a key of method full{near}")));
    }
    let mut own = config.clone();
    own.insert("peft_type".into(), PEFT_TYPE.into());
    let sites = base.sites().clone();
    let mut adapter = Adapter::new(own, &sites);
    for site in sites.iter() {
        let module = match base.layer(site.id)? {
            BaseLayer::Linear(_) if site.is_output_head && base.tied_embedding().is_some() => continue,
            BaseLayer::Linear(layer) => SiteModule::Linear(Arc::new(TrainedLinear::new(&site.path, layer)?)),
            BaseLayer::Experts(experts) => return Err(untrained(experts.path())),
            BaseLayer::Norm(norm) => SiteModule::Norm(Arc::new(TrainedNorm::new(&site.path, norm)?)),
            BaseLayer::Embedding(e) => {
                let tied = base.tied_embedding() == Some(site.path.as_str());
                SiteModule::Embedding(Arc::new(TrainedEmbedding::new(&site.path, e, tied)?))
            }
        };
        adapter.insert(site.id, SiteAdapter::new(Some(module), None))?;
    }
    Ok(adapter)
}
