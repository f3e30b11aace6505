//! AdaLoRA (Zhang et al. 2023, arXiv:2303.10512; PEFT `tuners/adalora`): `B·diag(E)·A`. Training starts at `init_r` ranks a layer
//! and moves them ([`allocator`]); a finished adapter has those of its file's `rank_pattern`.

use candle_core::Tensor;
use peft_core::{ConfigKeys, Error, Parameter, Result, Role, TrainingHook};
use serde_json::{Map, Value, json};

use super::{Kind, Made, Method, dropout};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;
use allocator::{Allocator, Schedule};

mod allocator;

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

#[derive(Debug)]
struct AdaLora {
    schedule: Schedule,
    alpha: f64,
    dropout: f32,
    identity: bool,
    /// Ranks that are left, where the allocation is finished.
    rank_pattern: Map<String, Value>,
}

impl AdaLora {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        let rank_pattern = match keys.get("rank_pattern") {
            None => Map::new(),
            Some(Value::Object(map)) => map.clone(),
            Some(other) => return Err(Error::config("rank_pattern", format!("{other} is not a table"))),
        };
        Ok(Self {
            schedule: Schedule::read(keys)?,
            alpha: keys.number("lora_alpha", 8.0)?,
            dropout: dropout(keys, "lora_dropout")?,
            identity: keys.flag("init_lora_weights", true)?,
            rank_pattern,
        })
    }

    /// How many of the ranks of the layer at `path` a finished allocation has left.
    fn rank(&self, path: &str) -> Result<usize> {
        let name = format!("{path}.lora_E");
        let found = self
            .rank_pattern
            .iter()
            .find(|(key, _)| key.strip_prefix("model.").unwrap_or(key) == name || **key == name);
        let Some((key, kept)) = found else { return Ok(self.schedule.init_r) };
        let flags = kept.as_array().map(|list| list.iter().map(Value::as_bool).collect::<Option<Vec<_>>>());
        let flags = flags.flatten().filter(|flags| flags.len() == self.schedule.init_r);
        let flags = flags.ok_or_else(|| {
            Error::config("rank_pattern", format!("`{key}` is not {} of true and false", self.schedule.init_r))
        })?;
        Ok(flags.into_iter().filter(|kept| *kept).count())
    }
}

impl Method for AdaLora {
    fn check_training(&self, _: u64, _: &[&Parameter]) -> Result<()> {
        let Schedule { init_r, target_r, .. } = self.schedule;
        if target_r > init_r && self.rank_pattern.is_empty() {
            let message = format!("{target_r} is more than init_r, {init_r}; AdaLoRA takes ranks away");
            return Err(Error::config("target_r", message));
        }
        Ok(())
    }

    fn training_hook(&self, layers: &[&[Parameter]]) -> Result<Option<Box<dyn TrainingHook>>> {
        Ok(Some(Box::new(Allocator::new(self.schedule, layers, self.rank_pattern.is_empty())?)))
    }

    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let ((out, inp), r) = (start.dims(), self.rank(start.layer.path())?);
        let alpha = if self.alpha > 0.0 { self.alpha } else { r as f64 };
        // PEFT divides by the rank that the run began with, whatever is left of it.
        let scale = alpha / (self.schedule.init_r as f64 + 1e-5);
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
        if e.elem_count() == 0 {
            // All ranks were taken away.
            let zeros = |shape: (usize, usize)| Tensor::zeros(shape, a.dtype(), a.device());
            return Ok(Change::LowRank { a: zeros((1, a.dim(1)?))?, b: zeros((b.dim(0)?, 1))? });
        }
        Ok(Change::LowRank { a: a.broadcast_mul(&(e * self.scale)?)?, b: b.clone() })
    }
}
