//! SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175; PEFT `tuners/shira`): a few elements of the weight, at random places that
//! are stored.

use candle_core::{DType, Device, Tensor};
use peft_core::{ConfigKeys, Error, Parameter, Result, Role, kernels, parameter_name};
use serde_json::{Value, json};

use super::{Kind, Made, Method, seed, size};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;
use crate::torch_random::TorchRandom;

pub(crate) const KIND: Kind = Kind {
    name: "shira",
    peft_type: "SHIRA",
    label: "SHiRA",
    keys: || json!({"fan_in_fan_out": false, "init_weights": true, "mask_type": "random", "r": 32, "random_seed": null}),
    only_default: &[],
    patterns: &[],
    read: |keys| Ok(Box::new(Shira::read(keys)?)),
};

const INDICES: &str = "shira_indices";

#[derive(Debug)]
struct Shira {
    r: usize,
    /// Of the places, where PEFT is to draw the same.
    seed: Option<i64>,
    /// A mask that is not random, which only a file can bring.
    other_mask: Option<Value>,
    identity: bool,
}

impl Shira {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        Ok(Self {
            r: size(keys, "r", 32)?,
            seed: keys.get("random_seed").map(|_| seed(keys, "random_seed", 0)).transpose()?,
            other_mask: keys.get("mask_type").filter(|mask| *mask != "random").cloned(),
            identity: keys.flag("init_weights", true)?,
        })
    }
}

impl Method for Shira {
    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let (out, inp) = start.dims();
        let elements = out.saturating_mul(inp);
        let n = self.r.saturating_mul(out + inp);
        if n > elements {
            return Err(start.misfit("r", format!("{} · ({inp} + {out}) is more than its {elements} elements", self.r)));
        }
        if start.layer.is_fan_in_fan_out() {
            return Err(start.misfit("target_modules", "PEFT has no SHiRA for Conv1D layers; use another method"));
        }
        if let Some(mask) = self.other_mask.as_ref().filter(|_| !start.is_stored(INDICES)) {
            return Err(Error::config(
                "mask_type",
                format!("{mask} is not \"random\", which is all that is built here"),
            ));
        }
        // As PEFT's mask of 0 and 1 has them: in the order of the weight.
        let drawn = self.seed.unwrap_or_else(|| i64::from(start.random_word()));
        let mut places = TorchRandom::new(drawn).permutation(elements as u64, n);
        places.sort_unstable();
        let rows = places.iter().map(|place| (place / inp as u64) as i32);
        let columns = places.iter().map(|place| (place % inp as u64) as i32);
        let indices = Tensor::from_vec(rows.chain(columns).collect(), (2, n), &Device::Cpu)?;
        let name = parameter_name(start.layer.path(), INDICES);
        let indices = Parameter::new(name, &indices.to_device(start.device)?, Role::Plain)?;
        match self.identity {
            true => start.constant("shira_weight", 0.0, n, Role::Plain)?,
            false => start.normal("shira_weight", (0.0, 1.0), n, Role::Plain)?,
        }
        let formula = Sparse { indices: indices.clone(), shape: (out, inp) };
        Ok((start.finish(formula, 0.0), vec![indices]))
    }
}

/// A matrix with the weights at their places and zeros elsewhere.
#[derive(Debug)]
struct Sparse {
    /// Rows and columns, `[2, n]`.
    indices: Parameter,
    /// `(out, in)`.
    shape: (usize, usize),
}

impl Sparse {
    /// The indices as places in the weight, row after row.
    fn places(&self) -> Result<Vec<u32>> {
        let indices = self.indices.value().to_device(&Device::Cpu)?.to_dtype(DType::I64)?.to_vec2::<i64>()?;
        let [rows, columns] = indices.as_slice() else { return Err(Error::msg("SHiRA has rows and columns")) };
        let (out, inp) = self.shape;
        let place = |(row, column): (&i64, &i64)| {
            let row = usize::try_from(*row).ok().filter(|row| *row < out);
            let column = usize::try_from(*column).ok().filter(|column| *column < inp);
            row.zip(column).and_then(|(row, column)| u32::try_from(row * inp + column).ok())
        };
        rows.iter()
            .zip(columns)
            .map(|at| {
                let message =
                    || format!("{} holds {at:?}, which is no place of a [{out}, {inp}] weight", self.indices.name());
                place(at).ok_or_else(|| Error::msg(message()))
            })
            .collect()
    }
}

impl Formula for Sparse {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [weight] = exactly(parameters)?;
        Ok(Change::Dense(kernels::sparse_matrix(weight, &self.places()?, self.shape)?))
    }

    fn check(&self) -> Result<()> {
        self.places().map(|_| ())
    }
}
