//! From a config to interventions behind the blocks of a base model.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::{
    Adapter, BaseModel, Built, Error, Parameter, Result, Role, SiteAdapter, SiteModule, SublayerKind, SublayerSite,
    Unmatched, candidates, insert_saved, parameter_name, select_saved,
};

use super::orthogonal::Orthonormal;
use super::{Reft, ReftConfig, Rows, Unit};

/// Streams of one unit: source, bias, projection.
const DRAWS: u32 = 3;

impl ReftConfig {
    /// Makes the adapter that this config describes on `base`. Random starts are a function of `seed` and the site.
    ///
    /// # Errors
    /// When the model does not say where its blocks end, or a block or a rank does not fit it; the message names the key.
    pub fn build(&self, base: &dyn BaseModel, seed: u64, unmatched: Unmatched) -> Result<Built> {
        let ends: Vec<SublayerSite> =
            base.sublayers().into_iter().filter(|s| s.kind == SublayerKind::FeedForward).collect();
        if ends.is_empty() {
            let message = format!("reft is not supported on model type `{}`", base.model_type());
            return Err(Error::config("type", message));
        }
        let blocks = ends.iter().map(|s| s.block + 1).max().unwrap_or(0);
        if let Some(block) = self.layers.iter().flatten().find(|&&block| block >= blocks) {
            return Err(Error::config("layers", format!("the model has no block {block}: it has {blocks}")));
        }
        let mut adapter = Adapter::new(self.to_adapter_config(), base.sites());
        for end in ends.iter().filter(|end| self.layers.as_ref().is_none_or(|layers| layers.contains(&end.block))) {
            let module = Arc::new(self.module(base, *end, end.block + 1 == blocks, seed)?);
            for unit in &module.units {
                if let Rows::Orthonormal(rows) = &unit.projection {
                    adapter.add_fixed(rows.base().clone());
                }
            }
            adapter.insert(end.end, SiteAdapter::new(Some(SiteModule::Sublayer(module)), None))?;
        }
        let selection = select_saved(&self.saved, &candidates(base.sites()), unmatched)?;
        insert_saved(&mut adapter, &selection, base)?;
        Ok(Built { adapter, selection })
    }

    fn module(&self, base: &dyn BaseModel, at: SublayerSite, is_last: bool, seed: u64) -> Result<Reft> {
        let site = base.sites().get(at.end).ok_or_else(|| Error::msg("a block ends at a site that does not exist"))?;
        let (r, hidden) = (self.r, at.hidden_size);
        if r >= hidden {
            return Err(Error::config("r", format!("{r} is not below the model's hidden size {hidden}")));
        }
        // Behind the last block only rows with a label are read, which may be none of these positions.
        let role = |role: Role| if is_last { Role::Rows } else { role };
        let unit = |number: usize| -> Result<Unit> {
            let stream = |draw: u32| Stream { seed, step: number as u32 * DRAWS + draw, site: at.end.0 };
            let name = |suffix: &str| parameter_name(&site.path, &format!("units.{number}.{suffix}"));
            let bound = 1.0 / (hidden as f32).sqrt();
            let parameter = |suffix: &str, draw: u32, shape: &[usize], role: Role| {
                let values = stream(draw).uniform_vec(shape.iter().product(), -bound, bound);
                let value = Tensor::from_vec(values, shape, &Device::Cpu)?.to_device(base.device())?;
                Parameter::new(name(suffix), &value, role)
            };
            Ok(Unit {
                source: parameter("learned_source.weight", 0, &[r, hidden], role(Role::Plain))?,
                bias: parameter("learned_source.bias", 1, &[r], role(Role::NoDecay))?,
                projection: if self.orthogonal {
                    let of = |tensor: &str| name(&format!("projection.{tensor}"));
                    Rows::Orthonormal(Orthonormal::new([r, hidden], stream(2), base.device(), role(Role::NoDecay), of)?)
                } else {
                    Rows::Free(parameter("projection.weight", 2, &[r, hidden], role(Role::Plain))?)
                },
            })
        };
        Ok(Reft {
            site: at.end,
            units: self.units().into_iter().map(unit).collect::<Result<_>>()?,
            positions: self.positions,
            activation: self.activation,
            subtract: self.subtract,
            dropout: self.dropout,
        })
    }
}
