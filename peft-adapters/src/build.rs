//! From a config to bottleneck adapters on a base model.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::{
    Adapter, BaseModel, Built, Error, Gate, Parameter, Result, Role, SiteAdapter, SiteModule, SublayerKind,
    SublayerSite, Unmatched, candidates, insert_saved, parameter_name, select_saved,
};

use crate::bottleneck::{Bottleneck, Norm, Projection, Scaling, Weight};
use crate::config::{BottleneckConfig, ScalingKind, Start};
use crate::phm::{Shared, Way};

/// The stream's step of a gate's start, behind those of the projections.
const GATE: u32 = u32::MAX;

/// Makes a parameter of a site, for the end of its name.
type MakeParameter<'a> = &'a dyn Fn(&str, Tensor, Role) -> Result<Parameter>;

impl BottleneckConfig {
    /// Makes the adapter that this config describes on `base`. Random starts are a function of `seed` and the site.
    ///
    /// # Errors
    /// When the model does not say where its sublayers end, or no block would get an adapter; with [`Unmatched::Error`], a name
    /// in `modules_to_save` that no module has.
    pub fn build(&self, base: &dyn BaseModel, seed: u64, unmatched: Unmatched) -> Result<Built> {
        let sublayers = base.sublayers();
        if sublayers.is_empty() {
            let message = format!(
                "bottleneck adapters are not supported on model type `{}` here: they stand behind sublayers, where this model does not ask for them",
                base.model_type()
            );
            return Err(Error::config("type", message));
        }
        let blocks = sublayers.iter().map(|s| s.block + 1).max().unwrap_or(0);
        if let Some(block) = self.leave_out.iter().find(|&&block| block >= blocks) {
            return Err(Error::config("leave_out", format!("the model has no block {block}: it has {blocks}")));
        }
        if self.behind_cross_attention && !sublayers.iter().any(|s| s.kind == SublayerKind::CrossAttention) {
            let message = format!("model type `{}` has no attention to an encoder", base.model_type());
            return Err(Error::config("cross_adapter", message));
        }
        let mut adapter = Adapter::new(self.to_adapter_config(), base.sites());
        let chosen: Vec<_> = sublayers.iter().filter(|at| self.stands_at(at)).collect();
        let shared = match (&self.phm, chosen.first()) {
            (Some(phm), Some(at)) => {
                phm.shared(at.hidden_size, self.width(at.block, at.hidden_size)?, seed, base.device())?
            }
            _ => Shared::default(),
        };
        for sublayer in chosen {
            let module = SiteModule::Sublayer(Arc::new(self.bottleneck(base, *sublayer, "", &shared, seed)?));
            adapter.insert(sublayer.end, SiteAdapter::new(Some(module), None))?;
        }
        shared.parameters().for_each(|parameter| adapter.add_shared(parameter.clone()));
        if adapter.trainable_elements() == 0 {
            return Err(Error::config("leave_out", "names every block: nothing would be trained"));
        }
        let selection = select_saved(&self.saved, &candidates(base.sites()), unmatched)?;
        insert_saved(&mut adapter, &selection, base)?;
        Ok(Built { adapter, selection })
    }

    /// Whether there is an adapter behind a sublayer.
    pub(crate) fn stands_at(&self, at: &SublayerSite) -> bool {
        let of_kind = match at.kind {
            SublayerKind::Attention => self.behind_attention,
            SublayerKind::CrossAttention => self.behind_cross_attention,
            SublayerKind::FeedForward => self.behind_feed_forward,
        };
        of_kind && !self.leave_out.contains(&at.block)
    }

    /// The adapter at one place; `prefix` is what its tensors' names begin with behind the layer's.
    pub(crate) fn bottleneck(
        &self,
        base: &dyn BaseModel,
        at: SublayerSite,
        prefix: &str,
        shared: &Shared,
        seed: u64,
    ) -> Result<Bottleneck> {
        let site =
            base.sites().get(at.end).ok_or_else(|| Error::msg("a sublayer ends at a site that does not exist"))?;
        let (hidden, width) = (at.hidden_size, self.width(at.block, at.hidden_size)?);
        let parameter = |suffix: &str, value: Tensor, role: Role| {
            let name = parameter_name(&site.path, &format!("{prefix}{suffix}"));
            Parameter::new(name, &value.to_device(base.device())?, role)
        };
        let full = |value: f32, n: usize| Ok::<_, Error>(Tensor::full(value, n, &Device::Cpu)?);
        // No gradient gets through a projection of zeros, and a norm of its result has nothing to scale.
        let silent = self.start == Start::MamAdapter;
        let role = |role: Role| if silent { Role::ZeroAtStart } else { role };
        let norm = |suffix: &str| -> Result<Norm> {
            Ok(Norm {
                weight: parameter(&format!("{suffix}.weight"), full(1.0, hidden)?, role(Role::NoDecay))?,
                bias: parameter(&format!("{suffix}.bias"), full(0.0, hidden)?, role(Role::NoDecay))?,
            })
        };
        let projection = |suffix: &str, way: Way, [inp, out]: [usize; 2], roles: [Role; 2]| -> Result<Projection> {
            let (stream, [of_weight, of_bias]) = (Stream { seed, step: way as u32, site: at.end.0 }, roles);
            if let Some(phm) = &self.phm {
                let path = format!("{}.{suffix}", site.path);
                let weight = phm.projection((&path, stream, base.device()), way, [inp, out], shared)?;
                let bias = phm.bias.then(|| parameter(&format!("{suffix}.b"), full(0.0, out)?, of_bias)).transpose()?;
                return Ok(Projection { weight: Weight::Phm(weight), bias });
            }
            let weight = Tensor::from_vec(self.start.values(out * inp, inp, way, stream), (out, inp), &Device::Cpu)?;
            Ok(Projection {
                weight: Weight::Dense(parameter(&format!("{suffix}.weight"), weight, of_weight)?),
                bias: Some(parameter(&format!("{suffix}.bias"), full(0.0, out)?, of_bias)?),
            })
        };
        // AdapterHub's names: the norm in front is the first of the layers that lead down.
        let norm_before = if self.norm_before { Some(norm("adapter_down.0")?) } else { None };
        let down = if self.norm_before { "adapter_down.1" } else { "adapter_down.0" };
        let scale =
            |n: usize| Ok::<_, Error>(Scaling::Learned(parameter("scaling", full(1.0, n)?, role(Role::NoDecay))?));
        Ok(Bottleneck {
            site: at.end,
            placement: self.placement,
            joins_stream: self.joins_stream,
            residual_before_norm: self.residual_before_norm,
            norm_before,
            down: projection(down, Way::Down, [hidden, width], [role(Role::Plain), role(Role::NoDecay)])?,
            activation: self.activation,
            up: projection("adapter_up", Way::Up, [width, hidden], [Role::Plain, Role::NoDecay])?,
            scaling: match self.scaling {
                ScalingKind::Fixed(s) => Scaling::Fixed(s),
                ScalingKind::Learned => scale(1)?,
                ScalingKind::Channel => scale(hidden)?,
            },
            dropout: self.dropout,
            stochastic_depth: self.stochastic_depth,
            gate: if self.gated {
                Some(self.gate(&parameter, hidden, Stream { seed, step: GATE, site: at.end.0 })?)
            } else {
                None
            },
            norm_after: if self.norm_after { Some(norm("adapter_norm_after")?) } else { None },
        })
    }

    fn gate(&self, parameter: MakeParameter<'_>, hidden: usize, stream: Stream) -> Result<Gate> {
        let (weight, bias) = match self.start {
            Start::Bert | Start::MamAdapter => (stream.normal_vec(hidden, 0.02), 0.0),
            // AdapterHub leaves PyTorch's start of a linear layer as it is.
            Start::Houlsby => {
                let bound = 1.0 / (hidden as f32).sqrt();
                let mut values = stream.uniform_vec(hidden + 1, -bound, bound);
                let bias = values.pop().unwrap_or(0.0);
                (values, bias)
            }
        };
        let role = |role: Role| if self.start == Start::MamAdapter { Role::ZeroAtStart } else { role };
        let weight = parameter("gate.weight", Tensor::from_vec(weight, (1, hidden), &Device::Cpu)?, role(Role::Plain))?;
        Ok(Gate::new(weight, parameter("gate.bias", Tensor::new(&[bias], &Device::Cpu)?, role(Role::NoDecay))?))
    }
}

impl Start {
    /// The `n` values that a projection of `fan_in` inputs starts from.
    pub(crate) fn values(self, n: usize, fan_in: usize, way: Way, stream: Stream) -> Vec<f32> {
        match self {
            Start::Bert => stream.normal_vec(n, 0.02),
            Start::Houlsby => truncated_normal(stream, n, 0.01),
            Start::MamAdapter if way == Way::Up => vec![0.0; n],
            Start::MamAdapter => {
                // Kaiming's uniform distribution with a = √5.
                let bound = 1.0 / (fan_in as f32).sqrt();
                stream.uniform_vec(n, -bound, bound)
            }
        }
    }
}

/// `n` values from the normal distribution without what lies beyond two standard deviations.
fn truncated_normal(stream: Stream, n: usize, std: f32) -> Vec<f32> {
    // One draw in 22 lies outside: of four, none but one in 230,000 times, which then is the bound.
    const DRAWS: usize = 4;
    let draws = stream.normal_vec(n * DRAWS, 1.0);
    let one = |z: &[f32]| z.iter().copied().find(|z| z.abs() <= 2.0).or(z.first().copied()).unwrap_or(0.0);
    draws.chunks_exact(DRAWS).map(|z| one(z).clamp(-2.0, 2.0) * std).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_values_are_normal_within_two_deviations() {
        let values = truncated_normal(Stream { seed: 1, step: 2, site: 3 }, 40_000, 0.01);
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
        assert!(values.iter().all(|v| v.abs() <= 0.02));
        // The standard deviation of a normal distribution cut off at 2 is 0.880 of the whole one's.
        assert!(mean.abs() < 2e-4 && (variance.sqrt() / 0.0088 - 1.0).abs() < 0.02, "{mean} {variance}");
    }
}
