//! DeLoRA (Bini et al. 2025, arXiv:2503.18225; PEFT `tuners/delora`): a low-rank change of bounded norm.

use candle_core::{DType, Tensor};
use peft_core::{Parameter, Result, Role, parameter_name};
use serde_json::json;

use super::{Kind, Made, Method, size};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;

pub(crate) const KIND: Kind = Kind {
    name: "delora",
    peft_type: "DELORA",
    label: "DeLoRA",
    keys: || {
        json!({"bias": "none", "delora_lambda": 15, "exclude_modules": null, "init_weights": true, "lambda_pattern": {},
            "layers_pattern": null, "layers_to_transform": null, "module_dropout": 0.0, "r": 8, "rank_pattern": {}})
    },
    only_default: &["bias", "module_dropout"],
    patterns: &[("lambda_pattern", Some("alpha_pattern"))],
    read: |keys| {
        let (r, lambda) = (size(keys, "r", 8)?, keys.number("delora_lambda", 15.0)?);
        Ok(Box::new(DeLora { r, lambda, identity: keys.flag("init_weights", true)? }))
    },
};

/// Below this PEFT takes the norm of a row of A or a column of B for this.
const LEAST_NORM: f64 = 1e-4;

#[derive(Debug)]
struct DeLora {
    r: usize,
    lambda: f64,
    identity: bool,
}

impl Method for DeLora {
    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let ((out, inp), r) = (start.dims(), start.rank.unwrap_or(self.r));
        let lambda = start.alpha.unwrap_or(self.lambda);
        let role = if self.identity { Role::ZeroAtStart } else { Role::Plain };
        start.kaiming("delora_A", (r, inp), role)?;
        match self.identity {
            true => start.constant("delora_B", 0.0, (out, r), Role::Plain)?,
            false => start.kaiming("delora_B", (out, r), Role::Plain)?,
        }
        let role = if self.identity { Role::ZeroAtStart } else { Role::NoDecay };
        start.constant("delora_lambda", lambda, 1, role)?;
        let norms = start.layer.weight().to_dense(DType::F32)?.sqr()?.sum(0)?.sqrt()?.to_device(start.device)?;
        let name = parameter_name(start.layer.path(), "delora_w_norm");
        let norms = Parameter::new(name, &norms, Role::Plain)?;
        Ok((start.finish(Bounded { norms: norms.clone(), r }, 0.0), vec![norms]))
    }
}

/// `B·diag(λ / (r·‖a_i‖·‖b_i‖))·A`, its columns times the norms of those of the base weight.
#[derive(Debug)]
struct Bounded {
    norms: Parameter,
    r: usize,
}

impl Formula for Bounded {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [a, b, lambda] = exactly(parameters)?;
        let norm = |t: &Tensor, over: usize| -> Result<Tensor> {
            // Clamped before the root, whose slope at 0 is infinite.
            Ok(t.sqr()?.sum(over)?.maximum(LEAST_NORM * LEAST_NORM)?.sqrt()?)
        };
        let norms = (norm(a, 1)? * norm(b, 0)?)?;
        let strength = (lambda / self.r as f64)?.broadcast_div(&norms)?;
        Ok(Change::LowRank {
            a: a.broadcast_mul(&self.norms.value().to_dtype(a.dtype())?)?,
            b: b.broadcast_mul(&strength)?,
        })
    }
}
