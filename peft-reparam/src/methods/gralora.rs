//! GraLoRA (Jung et al. 2025, arXiv:2505.20355; PEFT `tuners/gralora`): a low-rank change for each of k × k blocks.

use candle_core::Tensor;
use peft_core::{ConfigKeys, Error, Result, Role};
use serde_json::json;

use super::{Kind, Made, Method, dropout, size, size_or_zero};
use crate::change::{Change, Formula};
use crate::start::Start;

pub(crate) const KIND: Kind = Kind {
    name: "gralora",
    peft_type: "GRALORA",
    label: "GraLoRA",
    keys: || {
        json!({"alpha": 64, "bias": "none", "fan_in_fan_out": false, "gralora_dropout": 0.0, "gralora_k": 2,
            "hybrid_r": 0, "init_weights": true, "layers_pattern": null, "layers_to_transform": null, "r": 32})
    },
    only_default: &["bias"],
    patterns: &[],
    read: |keys| Ok(Box::new(GraLora::read(keys)?)),
};

#[derive(Debug)]
struct GraLora {
    r: usize,
    /// Rank of the plain LoRA beside the blocks.
    hybrid: usize,
    k: usize,
    alpha: f64,
    dropout: f32,
    identity: bool,
}

impl GraLora {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        let (r, k) = (size(keys, "r", 32)?, size(keys, "gralora_k", 2)?);
        if !r.is_multiple_of(k) {
            return Err(Error::config("r", format!("{r} is not a multiple of gralora_k = {k}")));
        }
        Ok(Self {
            r,
            hybrid: size_or_zero(keys, "hybrid_r", 0)?,
            k,
            alpha: keys.number("alpha", 64.0)?,
            dropout: dropout(keys, "gralora_dropout")?,
            identity: keys.flag("init_weights", true)?,
        })
    }
}

impl Method for GraLora {
    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let ((out, inp), k, r) = (start.dims(), self.k, self.r);
        for (n, what) in [(inp, "inputs"), (out, "outputs")] {
            if !n.is_multiple_of(k) {
                return Err(start.misfit("gralora_k", format!("{k} does not divide its {n} {what}")));
            }
        }
        let role = if self.identity { Role::ZeroAtStart } else { Role::Plain };
        // Uniform over what a block reads, as PEFT's.
        start.uniform("gralora_A", 1.0 / ((inp / k) as f64).sqrt(), (k, inp / k, r), role)?;
        match self.identity {
            true => start.constant("gralora_B", 0.0, (k, r, out / k), Role::Plain)?,
            false => start.uniform("gralora_B", 1.0 / (r as f64).sqrt(), (k, r, out / k), Role::Plain)?,
        }
        if self.hybrid > 0 {
            start.kaiming("gralora_A_general.weight", (self.hybrid, inp), role)?;
            match self.identity {
                true => start.constant("gralora_B_general.weight", 0.0, (out, self.hybrid), Role::Plain)?,
                false => start.kaiming("gralora_B_general.weight", (out, self.hybrid), Role::Plain)?,
            }
        }
        let scale = self.alpha / (r + self.hybrid) as f64;
        Ok((start.finish(Blocks { scale }, self.dropout), Vec::new()))
    }
}

/// Block (output run j, input run n) is `(A_n[:, j-th part of r]·B_j[n-th part of r, :])ᵀ`; a plain LoRA is added to all.
#[derive(Debug)]
struct Blocks {
    scale: f64,
}

impl Formula for Blocks {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let (a, b, general) = match parameters {
            [a, b] => (a, b, None),
            [a, b, general_a, general_b] => (a, b, Some(general_b.matmul(general_a)?)),
            _ => return Err(Error::msg(format!("{} parameters for GraLoRA", parameters.len()))),
        };
        let ((k, inp, r), out) = (a.dims3()?, b.dim(2)?);
        let a = a.reshape((k, inp, k, r / k))?.permute((0, 2, 1, 3))?.contiguous()?;
        let b = b.reshape((k, k, r / k, out))?.transpose(0, 1)?.contiguous()?;
        // [input run, output run, input, output]
        let blocks = a.matmul(&b)?.permute((1, 3, 0, 2))?.contiguous()?.reshape((k * out, k * inp))?;
        let sum = match general {
            Some(general) => (blocks + general)?,
            None => blocks,
        };
        Ok(Change::Dense((sum * self.scale)?))
    }
}
