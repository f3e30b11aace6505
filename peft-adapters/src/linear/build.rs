//! From a config to series or parallel adapters on a base model.

use std::collections::BTreeSet;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::select::saved_target_modules;
use peft_core::{
    Adapter, BaseLayer, BaseModel, Built, FrozenLinear, ModuleKind, Parameter, Result, Role, SelectRules, SiteAdapter,
    SiteId, SiteModule, TargetModules, TargetSpec, Unmatched, candidates, insert_saved, parameter_name, select,
    selected_site,
};

use super::config::PEFT_TYPE;
use super::{LinearAdapter, LinearAdapterConfig, Side};
use crate::bottleneck::{Projection, Scaling, Weight};
use crate::config::{ScalingKind, Start};
use crate::phm::Way;

/// The layers of LLM-Adapters' tables for its families (`mapping.py`), of which a model has some: around the feed-forward
/// network in series, at the values of attention and the network's end in parallel.
const SERIES: [&str; 9] =
    ["gate_proj", "up_proj", "down_proj", "fc1", "fc2", "fc_in", "fc_out", "dense_h_to_4h", "dense_4h_to_h"];
const PARALLEL: [&str; 4] = ["v_proj", "down_proj", "fc2", "fc_out"];

impl LinearAdapterConfig {
    /// Makes the adapter that this config describes on `base`. Random starts are a function of `seed` and the site.
    ///
    /// # Errors
    /// When a pattern is wrong or no target is known for the model; the message names the key.
    pub fn build(&self, base: &dyn BaseModel, seed: u64, unmatched: Unmatched) -> Result<Built> {
        let sites = base.sites().clone();
        let candidates = candidates(&sites);
        let spec = self.with_targets(&candidates.iter().map(|c| c.path).collect::<Vec<_>>());
        let rules = SelectRules { method: "LLM-Adapters", supported: &[ModuleKind::Linear], unmatched };
        let selection = select(&spec, &candidates, &rules)?;
        let names = saved_target_modules(&spec, PEFT_TYPE, &candidates).map(|t| t.to_json());
        let mut adapter = Adapter::new(self.to_adapter_config(names), &sites);
        let ends: BTreeSet<SiteId> = base.sublayers().iter().map(|sublayer| sublayer.end).collect();
        for selected in &selection.sites {
            let site = selected_site(&sites, selected.index)?;
            let BaseLayer::Linear(layer) = base.layer(site.id)? else { continue };
            let module = self.module(layer, ends.contains(&site.id), seed, base.device())?;
            adapter.insert(site.id, SiteAdapter::new(Some(SiteModule::Linear(Arc::new(module))), None))?;
        }
        insert_saved(&mut adapter, &selection, base)?;
        Ok(Built { adapter, selection })
    }

    /// The targets, those of the tables where none are given.
    fn with_targets(&self, paths: &[&str]) -> TargetSpec {
        let mut spec = self.targets.clone();
        if spec.target_modules.is_none() {
            let known: &[&str] = if self.parallel { &PARALLEL } else { &SERIES };
            let there = |name: &&&str| paths.iter().any(|path| path.rsplit('.').next() == Some(**name));
            let names: Vec<String> = known.iter().filter(there).map(|name| (*name).to_owned()).collect();
            spec.target_modules = (!names.is_empty()).then_some(TargetModules::Names(names));
        }
        spec
    }

    fn module(&self, layer: &FrozenLinear, ends: bool, seed: u64, device: &Device) -> Result<LinearAdapter> {
        let [inputs, outputs] = [layer.weight().in_features(), layer.weight().out_features()];
        let side = if self.parallel {
            Side::Parallel
        } else if ends || outputs < inputs {
            Side::Output
        } else {
            Side::Input
        };
        let [read, made] = match side {
            Side::Input => [inputs; 2],
            Side::Output => [outputs; 2],
            Side::Parallel => [inputs, outputs],
        };
        let parameter = |suffix: &str, value: Tensor, role: Role| {
            Parameter::new(parameter_name(layer.path(), suffix), &value.to_device(device)?, role)
        };
        let role = |role: Role| if self.start == Start::MamAdapter { Role::ZeroAtStart } else { role };
        let projection = |name: &str, way: Way, [inp, out]: [usize; 2], roles: [Role; 2]| -> Result<Projection> {
            let stream = Stream { seed, step: way as u32, site: layer.site().0 };
            let weight = Tensor::from_vec(self.start.values(out * inp, inp, way, stream), (out, inp), &Device::Cpu)?;
            let bias =
                || parameter(&format!("{name}.bias"), Tensor::zeros(out, weight.dtype(), &Device::Cpu)?, roles[1]);
            Ok(Projection {
                bias: self.projection_bias.then(bias).transpose()?,
                weight: Weight::Dense(parameter(&format!("{name}.weight"), weight.clone(), roles[0])?),
            })
        };
        Ok(LinearAdapter {
            side,
            down: projection("adapter_down", Way::Down, [read, self.size], [role(Role::Plain), role(Role::NoDecay)])?,
            activation: self.activation,
            up: projection("adapter_up", Way::Up, [self.size, made], [Role::Plain, Role::NoDecay])?,
            scaling: match self.scaling {
                ScalingKind::Fixed(s) => Scaling::Fixed(s),
                ScalingKind::Learned | ScalingKind::Channel => Scaling::Learned(parameter(
                    "adapter_scaling",
                    Tensor::new(&[1f32], &Device::Cpu)?,
                    role(Role::NoDecay),
                )?),
            },
            dropout: self.dropout,
        })
    }
}
