//! From a config to an IA³ adapter on a base model.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::select::{PatternHits, UnmatchedPattern, saved_target_modules};
use peft_core::{
    Adapter, BaseLayer, BaseModel, Built, Error, FrozenLinear, ModuleKind, Result, SelectRules, SiteAdapter,
    SiteModule, TargetModules, Unmatched, candidates, insert_saved, select, selected_site,
};

use crate::config::{Ia3Config, PEFT_TYPE};
use crate::linear::{Ia3Linear, Scaled};
use crate::targets::{FEEDFORWARD, Feedforward};

impl Ia3Config {
    /// Makes the adapter that this config describes on `base`. Random starts are a function of `seed` and the site.
    ///
    /// With [`Unmatched::Error`] a pattern that hits nothing is refused with the nearest names; adapters written by PEFT
    /// are read with [`Unmatched::Report`], since PEFT ignores such patterns.
    ///
    /// # Errors
    /// When a pattern or a combination of settings is wrong; the message names it.
    pub fn build(&self, base: &dyn BaseModel, seed: u64, unmatched: Unmatched) -> Result<Built> {
        let sites = base.sites().clone();
        let candidates = candidates(&sites);
        let strict = unmatched == Unmatched::Error;
        let (spec, feedforward) = self.resolve(base.model_type(), strict)?;
        // PEFT's defaults for Mixtral name layers that transformers 5 has no longer.
        let unmatched = if self.targets.target_modules.is_none() { Unmatched::Report } else { unmatched };
        let rules = SelectRules { method: "IA³", supported: &[ModuleKind::Linear], unmatched };
        let mut selection = select(&spec, &candidates, &rules)?;
        let chosen = selection.sites.iter().map(|s| selected_site(&sites, s.index)).collect::<Result<Vec<_>>>()?;
        let paths: Vec<&str> = chosen.iter().map(|site| site.path.as_str()).collect();
        selection.hits.extend(feedforward_hits(&feedforward, &paths, strict && self.names_feedforward())?);

        let targets = saved_target_modules(&spec, PEFT_TYPE, &candidates).unwrap_or(TargetModules::Names(Vec::new()));
        let written = feedforward.beside(&targets);
        let mut adapter = Adapter::new(self.to_adapter_config(&targets, &written), &sites);
        for site in chosen {
            let BaseLayer::Linear(layer) = base.layer(site.id)? else { continue };
            let at_input = feedforward.contains(&site.path)?;
            if written.contains(&site.path)? != at_input {
                let message = format!(
                    "is not given, and the default for model type `{}` cannot be written beside these `target_modules`; name \
                     the targets that are scaled at their input",
                    base.model_type()
                );
                return Err(Error::config(FEEDFORWARD, message));
            }
            let scaled = if at_input { Scaled::Input } else { Scaled::Output };
            let start = self.start(layer, scaled, Stream { seed, step: 0, site: site.id.0 })?;
            let module = Ia3Linear::new(layer, scaled, &start.to_device(base.device())?)?;
            adapter.insert(site.id, SiteAdapter::new(Some(SiteModule::Linear(Arc::new(module))), None))?;
        }
        insert_saved(&mut adapter, &selection, base)?;
        Ok(Built { adapter, selection })
    }

    fn start(&self, layer: &FrozenLinear, scaled: Scaled, stream: Stream) -> Result<Tensor> {
        let width = Ia3Linear::width(layer, scaled);
        Ok(if self.init_ia3_weights {
            Tensor::ones(width, DType::F32, &Device::Cpu)?
        } else {
            Tensor::from_vec(stream.normal_vec(width, 1.0), width, &Device::Cpu)?
        })
    }
}

/// How many adapted modules each pattern of `feedforward_modules` says to scale at their input. With `strict` a pattern
/// that says so of none is refused.
fn feedforward_hits(feedforward: &Feedforward, paths: &[&str], strict: bool) -> Result<Vec<PatternHits>> {
    let mut hits = Vec::new();
    for pattern in feedforward.patterns() {
        let one = match feedforward {
            Feedforward::Names(_) => Feedforward::Names(vec![pattern.to_owned()]),
            regex @ Feedforward::Regex(..) => regex.clone(),
        };
        let mut count = 0;
        for path in paths {
            count += usize::from(one.contains(path)?);
        }
        if strict && count == 0 {
            let advice = "matches none of the modules that `target_modules` selects".to_owned();
            let patterns = vec![UnmatchedPattern { key: FEEDFORWARD, pattern: pattern.to_owned(), advice }];
            return Err(Error::Unmatched { patterns });
        }
        hits.push(PatternHits { key: FEEDFORWARD, pattern: pattern.to_owned(), hits: count });
    }
    Ok(hits)
}
