//! From a config, and the adapters that it names, to fusions on a base model.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::{
    Adapter, AdapterFolder, BaseModel, Built, Error, ExpectedTensor, Parameter, Result, Role, SiteAdapter, SiteModule,
    SublayerModule, SublayerSite, Task, Unmatched, candidates, check_finite, insert_saved, parameter_name,
    select_saved,
};
use serde_json::{Map, Value};

use super::regularizer::Regularizer;
use super::{Fusion, FusionConfig};
use crate::bottleneck::{Projection, Weight};
use crate::phm::Shared;

impl FusionConfig {
    /// Makes a fresh fusion of the adapters in `folders`, which are those that the recipe names, in order.
    ///
    /// # Errors
    /// What is no bottleneck adapter of this model, adapters that stand at different places, or one with more than bottlenecks.
    pub fn build_from(
        &self,
        base: &dyn BaseModel,
        folders: &[AdapterFolder],
        seed: u64,
        unmatched: Unmatched,
    ) -> Result<Built> {
        let mut members: Vec<(String, Map<String, Value>)> = Vec::with_capacity(folders.len());
        for files in folders {
            let stem = files.dir().file_name().and_then(|name| name.to_str()).unwrap_or("adapter").replace('.', "_");
            let taken = |name: &str| members.iter().any(|(there, _)| there == name);
            let name = match taken(&stem) {
                false => stem,
                true => (2..).map(|n| format!("{stem}-{n}")).find(|name| !taken(name)).unwrap_or(stem),
            };
            members.push((name, files.config().map().clone()));
        }
        let config = self.with_members(&members)?;
        let built = config.build(base, seed, unmatched)?;
        for (files, (name, _)) in folders.iter().zip(&members) {
            fill(&built.adapter, files, name, base)?;
        }
        Ok(built)
    }

    /// Makes the fusion that this config describes on `base`, its adapters without values.
    ///
    /// # Errors
    /// When the adapters do not stand at the same places of this model.
    pub fn build(&self, base: &dyn BaseModel, seed: u64, unmatched: Unmatched) -> Result<Built> {
        let sublayers = base.sublayers();
        let places = self.places(&sublayers)?;
        let mut adapter = Adapter::new(self.to_adapter_config(), base.sites());
        let mut values = Vec::new();
        for at in places {
            let module = self.fusion(base, at, seed)?;
            for parameter in module.members.iter().flat_map(SublayerModule::parameters) {
                adapter.add_fixed(parameter.clone());
            }
            values.extend(module.value.iter().flat_map(Projection::parameters).cloned());
            adapter.insert(at.end, SiteAdapter::new(Some(SiteModule::Sublayer(Arc::new(module))), None))?;
        }
        if self.regularization && !values.is_empty() {
            adapter.set_training_hook(Box::new(Regularizer(values)));
        }
        let selection = select_saved(&self.saved, &candidates(base.sites()), unmatched)?;
        insert_saved(&mut adapter, &selection, base)?;
        Ok(Built { adapter, selection })
    }

    /// Where all adapters stand.
    fn places(&self, sublayers: &[SublayerSite]) -> Result<Vec<SublayerSite>> {
        let mut of_all: Option<Vec<SublayerSite>> = None;
        for (name, config) in &self.members {
            let of_one: Vec<_> = sublayers.iter().filter(|at| config.stands_at(at)).copied().collect();
            match &of_all {
                Some(all) if *all != of_one => {
                    let message = format!(
                        "`{name}` stands at other places than the adapters before it (mh_adapter, output_adapter, leave_out)"
                    );
                    return Err(Error::config("adapters", message));
                }
                _ => of_all = Some(of_one),
            }
        }
        match of_all {
            Some(places) if !places.is_empty() => Ok(places),
            _ => Err(Error::config("adapters", "there is no place in this model where they stand")),
        }
    }

    fn fusion(&self, base: &dyn BaseModel, at: SublayerSite, seed: u64) -> Result<Fusion> {
        let site =
            base.sites().get(at.end).ok_or_else(|| Error::msg("a sublayer ends at a site that does not exist"))?;
        let hidden = at.hidden_size;
        let parameter = |suffix: &str, value: Tensor, role: Role| {
            Parameter::new(
                parameter_name(&site.path, &format!("fusion.{suffix}")),
                &value.to_device(base.device())?,
                role,
            )
        };
        let normal = |draw: u32| {
            let values = Stream { seed, step: draw, site: at.end.0 }.normal_vec(hidden * hidden, 0.02);
            Tensor::from_vec(values, (hidden, hidden), &Device::Cpu)
        };
        let linear = |name: &str, draw: u32| -> Result<Projection> {
            let bias = Tensor::zeros(hidden, DType::F32, &Device::Cpu)?;
            // The same is added to all scores by the key's bias, which the softmax does not see.
            let role = if name == "key" { Role::ZeroAtStart } else { Role::NoDecay };
            Ok(Projection {
                weight: Weight::Dense(parameter(&format!("{name}.weight"), normal(draw)?, Role::Plain)?),
                bias: Some(parameter(&format!("{name}.bias"), bias, role)?),
            })
        };
        let value = || -> Result<Projection> {
            let start = if self.value_initialized {
                let eye = Tensor::eye(hidden, DType::F32, &Device::Cpu)?;
                // Ones on the diagonal, 1e-6 elsewhere.
                ((eye * (1.0 - 1e-6))? + 1e-6)?
            } else {
                normal(2)?
            };
            Ok(Projection { weight: Weight::Dense(parameter("value.weight", start, Role::NoDecay)?), bias: None })
        };
        let members = self
            .members
            .iter()
            .map(|(name, config)| config.bottleneck(base, at, &format!("adapters.{name}."), &Shared::default(), seed));
        Ok(Fusion {
            site: at.end,
            members: members.collect::<Result<_>>()?,
            query: self.query.then(|| linear("query", 0)).transpose()?,
            key: self.key.then(|| linear("key", 1)).transpose()?,
            value: self.value.then(value).transpose()?,
            query_before_norm: self.query_before_norm,
            residual_before: self.residual_before,
            value_before_softmax: self.value_before_softmax,
            dropout: self.dropout,
        })
    }
}

/// Gives the member `name` of a fusion the values in its own `files`. A class head there is left alone: the fusion trains one.
fn fill(adapter: &Adapter, files: &AdapterFolder, name: &str, base: &dyn BaseModel) -> Result<()> {
    let infix = format!(".adapters.{name}.");
    let mut used = BTreeSet::new();
    for parameter in adapter.fixed().iter().filter(|p| p.name().contains(&infix)) {
        let key = parameter.name().replacen(&infix, ".", 1);
        files.check_one(&ExpectedTensor::required(key.clone(), parameter.var().dims().to_vec()))?;
        let value = files.tensor(&key, base.device())?;
        check_finite(&key, &value)?;
        parameter.set(&value)?;
        used.insert(key);
    }
    let has_head = matches!(base.task(), Task::Classification { .. });
    let head = base.sites().iter().map(|site| site.segment).max();
    let of_head = |key: &str| {
        let at_head =
            |site: &peft_core::Site| Some(site.segment) == head && key.starts_with(&parameter_name(&site.path, ""));
        has_head && base.sites().iter().any(at_head)
    };
    match files.keys().find(|key| !used.contains(*key) && !of_head(key)) {
        None => Ok(()),
        Some(key) => {
            let message = format!("holds `{key}` beside its bottlenecks, for which a fusion has no place");
            Err(Error::file(files.weights().path() as &Path, message))
        }
    }
}
