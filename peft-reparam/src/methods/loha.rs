//! LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098; PEFT `tuners/loha`): the element-wise product of two low-rank products.

use candle_core::Tensor;
use peft_core::{Result, Role};
use serde_json::json;

use super::{Kind, Made, Method, size};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;

pub(crate) const KIND: Kind = Kind {
    name: "loha",
    peft_type: "LOHA",
    label: "LoHa",
    keys: || {
        json!({"alpha": 8, "alpha_pattern": {}, "exclude_modules": null, "init_weights": true, "layers_pattern": null,
            "layers_to_transform": null, "module_dropout": 0.0, "r": 8, "rank_dropout": 0.0, "rank_pattern": {},
            "use_effective_conv2d": false})
    },
    only_default: &["module_dropout", "rank_dropout"],
    patterns: &[],
    read: |keys| {
        Ok(Box::new(LoHa {
            r: size(keys, "r", 8)?,
            alpha: keys.number("alpha", 8.0)?,
            identity: keys.flag("init_weights", true)?,
        }))
    },
};

#[derive(Debug)]
struct LoHa {
    r: usize,
    alpha: f64,
    identity: bool,
}

impl Method for LoHa {
    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let ((out, inp), r) = (start.dims(), start.rank.unwrap_or(self.r));
        let scale = start.alpha.unwrap_or(self.alpha) / r as f64;
        let role = if self.identity { Role::ZeroAtStart } else { Role::Plain };
        start.kaiming("hada_w1_a", (out, r), role)?;
        start.kaiming("hada_w1_b", (r, inp), role)?;
        start.kaiming("hada_w2_a", (out, r), role)?;
        match self.identity {
            true => start.constant("hada_w2_b", 0.0, (r, inp), Role::Plain)?,
            false => start.kaiming("hada_w2_b", (r, inp), Role::Plain)?,
        }
        Ok((start.finish(HadamardProduct { scale }, 0.0), Vec::new()))
    }
}

/// `s·(w₁ₐ·w₁ᵦ) ⊙ (w₂ₐ·w₂ᵦ)`.
#[derive(Debug)]
struct HadamardProduct {
    scale: f64,
}

impl Formula for HadamardProduct {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [w1_a, w1_b, w2_a, w2_b] = exactly(parameters)?;
        Ok(Change::Dense(((w1_a.matmul(w1_b)? * w2_a.matmul(w2_b)?)? * self.scale)?))
    }
}
