//! BOFT (Liu et al. 2023, arXiv:2311.06243; PEFT `tuners/boft`) with one butterfly factor: blocks of the input are rotated
//! and outputs scaled. More factors need a CUDA extension in PEFT, which falls back to one without it.

use candle_core::Tensor;
use peft_core::{ConfigKeys, Error, Result, Role};
use serde_json::json;

use super::cayley::cayley;
use super::{Kind, Made, Method, size_or_zero};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;

pub(crate) const KIND: Kind = Kind {
    name: "boft",
    peft_type: "BOFT",
    label: "BOFT",
    keys: || {
        json!({"bias": "none", "boft_block_num": 0, "boft_block_size": 4, "boft_dropout": 0.0,
            "boft_n_butterfly_factor": 1, "exclude_modules": null, "fan_in_fan_out": false, "init_weights": true,
            "layers_pattern": null, "layers_to_transform": null})
    },
    only_default: &["bias", "boft_dropout", "boft_n_butterfly_factor"],
    patterns: &[],
    read: |keys| Ok(Box::new(Boft::read(keys)?)),
};

#[derive(Debug)]
struct Boft {
    /// 0 where the number says it.
    width: usize,
    number: usize,
    identity: bool,
}

impl Boft {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        let (width, number) = (size_or_zero(keys, "boft_block_size", 4)?, size_or_zero(keys, "boft_block_num", 0)?);
        if (width == 0) == (number == 0) {
            return Err(Error::config(
                "boft_block_size",
                "or `boft_block_num` has to be 0, and the other not, as in PEFT",
            ));
        }
        Ok(Self { width, number, identity: keys.flag("init_weights", true)? })
    }
}

impl Method for Boft {
    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let (out, inp) = start.dims();
        let (key, given) =
            if self.width > 0 { ("boft_block_size", self.width) } else { ("boft_block_num", self.number) };
        if !inp.is_multiple_of(given) {
            return Err(start.misfit(key, format!("{given} does not divide its {inp} inputs")));
        }
        let (number, width) = if self.width > 0 { (inp / given, given) } else { (given, inp / given) };
        let shape = (1, number, width, width);
        if self.identity {
            start.constant("boft_R", 0.0, shape, Role::NoDecay)?;
            start.constant("boft_s", 1.0, (out, 1), Role::NoDecay)?;
        } else {
            start.normal("boft_R", (0.0, 0.1), shape, Role::NoDecay)?;
            start.normal("boft_s", (1.0, 0.1), (out, 1), Role::NoDecay)?;
        }
        Ok((start.finish(Butterfly, 0.0), Vec::new()))
    }
}

/// The Cayley transform of the skew-symmetric part of each block, and the scale.
#[derive(Debug)]
struct Butterfly;

impl Formula for Butterfly {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [r, s] = exactly(parameters)?;
        let r = r.squeeze(0)?;
        let skew = ((&r - r.transpose(1, 2)?)? * 0.5)?;
        Ok(Change::BlockInput { blocks: cayley(&skew)?, scale: Some(s.flatten_all()?) })
    }
}
