//! AdaLoRA's form (Zhang et al. 2023, arXiv:2303.10512; PEFT `tuners/adalora`): `B·diag(E)·A`, with ranks as a file's
//! `rank_pattern` has them. The allocator that moves ranks while training, and the regulariser that keeps A and B
//! orthogonal, are not here: what a run trains is the form at `init_r`, and runs that need more are refused.

use candle_core::Tensor;
use peft_core::{ConfigKeys, Error, Result, Role};
use serde_json::{Map, Value, json};

use super::{Kind, Made, Method, dropout, size};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;

pub(crate) const KIND: Kind = Kind {
    name: "adalora",
    peft_type: "ADALORA",
    label: "AdaLoRA",
    keys: || {
        json!({"alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "beta1": 0.85, "beta2": 0.85,
            "bias": "none", "corda_config": null, "deltaT": 1, "ensure_weight_tying": false, "eva_config": null,
            "exclude_modules": null, "fan_in_fan_out": false, "init_lora_weights": true, "init_r": 12,
            "layer_replication": null, "layers_pattern": null, "layers_to_transform": null, "loftq_config": {},
            "lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.0, "lora_ga_config": null, "megatron_config": null,
            "megatron_core": "megatron.core", "orth_reg_weight": 0.5, "qalora_group_size": 16, "r": 8,
            "rank_pattern": null, "target_parameters": null, "target_r": 8, "tfinal": 0, "tinit": 0, "total_step": null,
            "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false,
            "use_rslora": false})
    },
    only_default: &[
        "alora_invocation_tokens",
        "arrow_config",
        "bias",
        "layer_replication",
        "lora_bias",
        "megatron_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
    ],
    // PEFT's AdaLoRA has neither by module: its rank_pattern says which ranks are left of `init_r`.
    patterns: &[("rank_pattern", None), ("alpha_pattern", None)],
    read: |keys| Ok(Box::new(AdaLora::read(keys)?)),
};

/// What counts as no regulariser: PEFT refuses 0.
const NO_REGULARISER: f64 = 1e-9;

#[derive(Debug)]
struct AdaLora {
    init_r: usize,
    alpha: f64,
    dropout: f32,
    identity: bool,
    rank_pattern: Map<String, Value>,
    regulariser: f64,
    target_r: f64,
    /// Steps before ranks move.
    tinit: f64,
}

impl AdaLora {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        if keys.count("total_step", usize::MAX)?.is_none() {
            return Err(Error::config(
                "total_step",
                "is not given; PEFT loads no AdaLoRA without the steps of its run",
            ));
        }
        let rank_pattern = match keys.get("rank_pattern") {
            None => Map::new(),
            Some(Value::Object(map)) => map.clone(),
            Some(other) => return Err(Error::config("rank_pattern", format!("{other} is not a table"))),
        };
        let alpha = keys.number("lora_alpha", 8.0)?;
        Ok(Self {
            init_r: size(keys, "init_r", 12)?,
            alpha,
            dropout: dropout(keys, "lora_dropout")?,
            identity: keys.flag("init_lora_weights", true)?,
            rank_pattern,
            regulariser: keys.number("orth_reg_weight", 0.5)?,
            target_r: keys.number("target_r", 8.0)?,
            tinit: keys.number("tinit", 0.0)?,
        })
    }

    /// How many of the ranks of the layer at `path` a finished allocation has left.
    fn rank(&self, path: &str) -> Result<usize> {
        let name = format!("{path}.lora_E");
        let found = self
            .rank_pattern
            .iter()
            .find(|(key, _)| key.strip_prefix("model.").unwrap_or(key) == name || **key == name);
        let Some((key, kept)) = found else { return Ok(self.init_r) };
        let flags = kept.as_array().map(|list| list.iter().map(Value::as_bool).collect::<Option<Vec<_>>>());
        let flags = flags.flatten().filter(|flags| flags.len() == self.init_r);
        let flags = flags.ok_or_else(|| {
            Error::config("rank_pattern", format!("`{key}` is not {} of true and false", self.init_r))
        })?;
        Ok(flags.into_iter().filter(|kept| *kept).count())
    }
}

impl Method for AdaLora {
    fn check_training(&self, steps: u64) -> Result<()> {
        if self.regulariser > NO_REGULARISER {
            let message = format!(
                "is {}, and AdaLoRA's orthogonal regulariser is not a part of the loss here yet; set it to {NO_REGULARISER:e}",
                self.regulariser
            );
            return Err(Error::config("orth_reg_weight", message));
        }
        if self.target_r < self.init_r as f64 && steps as f64 > self.tinit {
            let message = format!(
                "is {}, after which AdaLoRA lowers ranks from {} to {}, and that is not built here yet; set target_r = init_r, \
                 or tinit to the run's {steps} steps",
                self.tinit, self.init_r, self.target_r
            );
            return Err(Error::config("tinit", message));
        }
        Ok(())
    }

    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let ((out, inp), r) = (start.dims(), self.rank(start.layer.path())?);
        let alpha = if self.alpha > 0.0 { self.alpha } else { r as f64 };
        // PEFT divides by the rank that the run began with, whatever is left of it.
        let scale = alpha / (self.init_r as f64 + 1e-5);
        let (std, role) = if self.identity { (0.02, Role::ZeroAtStart) } else { (1.0, Role::Plain) };
        start.normal("lora_A", (0.0, std), (r, inp), role)?;
        start.normal("lora_B", (0.0, std), (out, r), role)?;
        match self.identity {
            true => start.constant("lora_E", 0.0, (r, 1), Role::Plain)?,
            false => start.normal("lora_E", (0.0, 1.0), (r, 1), Role::Plain)?,
        }
        Ok((start.finish(Svd { scale }, self.dropout), Vec::new()))
    }
}

/// `s·B·(E ⊙ A)`.
#[derive(Debug)]
struct Svd {
    scale: f64,
}

impl Formula for Svd {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [a, b, e] = exactly(parameters)?;
        Ok(Change::LowRank { a: a.broadcast_mul(&(e * self.scale)?)?, b: b.clone() })
    }
}
