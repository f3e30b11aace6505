//! MiSS (Kang & Yin 2024, arXiv:2409.15371; PEFT `tuners/miss`): every run of `r` inputs gets the same block added.

use candle_core::{Device, Tensor};
use peft_core::{ConfigKeys, Error, Result, Role};
use serde_json::{Value, json};

use super::{Kind, Made, Method, dropout, size};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;

pub(crate) const KIND: Kind = Kind {
    name: "miss",
    peft_type: "MISS",
    label: "MiSS",
    keys: || {
        json!({"bias": "none", "exclude_modules": null, "init_weights": true, "layers_pattern": null,
            "layers_to_transform": null, "mini_r": 1, "miss_dropout": 0.0, "r": 64})
    },
    only_default: &["bias"],
    patterns: &[],
    read: |keys| Ok(Box::new(Miss::read(keys)?)),
};

#[derive(Debug)]
struct Miss {
    r: usize,
    /// Columns of a block that is repeated along the outputs (`init_weights = "mini"`).
    mini: Option<usize>,
    identity: bool,
    dropout: f32,
}

impl Miss {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        let (mini, identity) = match keys.get("init_weights") {
            Some(Value::String(s)) if s == "mini" => (Some(size(keys, "mini_r", 1)?), true),
            Some(Value::String(s)) if s == "bat" => {
                return Err(Error::config("init_weights", "\"bat\" is not supported; use true or \"mini\""));
            }
            _ => (None, keys.flag("init_weights", true)?),
        };
        Ok(Self { r: size(keys, "r", 64)?, mini, identity, dropout: dropout(keys, "miss_dropout")? })
    }
}

impl Method for Miss {
    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let ((out, inp), r) = (start.dims(), self.r);
        if r > inp {
            return Err(start.misfit("r", format!("{r} is more than its {inp} inputs")));
        }
        if let Some(mini) = self.mini.filter(|mini| !out.is_multiple_of(*mini)) {
            return Err(start.misfit("mini_r", format!("{mini} does not divide its {out} outputs")));
        }
        let shape = (r, self.mini.unwrap_or(out));
        match self.identity {
            true => start.constant("miss_block", 0.0, shape, Role::Plain)?,
            false => start.kaiming("miss_block", shape, Role::Plain)?,
        }
        // Ones where input i is the i-th of its run, modulo r.
        let ones: Vec<f32> = (0..r).flat_map(|row| (0..inp).map(move |i| f32::from(u8::from(i % r == row)))).collect();
        let runs = Tensor::from_vec(ones, (r, inp), &Device::Cpu)?.to_device(start.device)?;
        Ok((start.finish(SharedBlock { runs, out }, self.dropout), Vec::new()))
    }
}

/// `Dᵀ` for the block `D: [r, out]`, times the sum over runs of inputs.
#[derive(Debug)]
struct SharedBlock {
    runs: Tensor,
    out: usize,
}

impl Formula for SharedBlock {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [block] = exactly(parameters)?;
        let columns = block.dim(1)?.max(1);
        let block = if columns == self.out { block.clone() } else { block.repeat((1, self.out / columns))? };
        Ok(Change::LowRank { a: self.runs.clone(), b: block.t()?.contiguous()? })
    }
}
