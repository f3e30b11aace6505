//! C³A (Chen et al. 2024, arXiv:2407.19342; PEFT `tuners/c3a`): circulant blocks.

use candle_core::Tensor;
use peft_core::{Error, Result, Role};
use serde_json::{Value, json};

use super::{Kind, Made, Method, size};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;

pub(crate) const KIND: Kind = Kind {
    name: "c3a",
    peft_type: "C3A",
    label: "C³A",
    keys: || {
        json!({"bias": "none", "block_size": 256, "block_size_pattern": {}, "init_weights": "xavier_uniform",
            "layers_pattern": null, "layers_to_transform": null})
    },
    only_default: &["bias"],
    patterns: &[("block_size_pattern", Some("rank_pattern"))],
    read: |keys| {
        let kernel = match keys.get("init_weights") {
            Some(Value::Bool(true)) => Kernel::Zero,
            None | Some(Value::Bool(false)) => Kernel::Xavier,
            Some(Value::String(s)) if s == "xavier_uniform" => Kernel::Xavier,
            Some(Value::String(s)) if s == "kaiming_uniform" => Kernel::Kaiming,
            Some(Value::String(s)) if s == "gaussian" => Kernel::Gaussian,
            Some(other) => {
                let message = format!("{other} is none of true, \"gaussian\", \"kaiming_uniform\", \"xavier_uniform\"");
                return Err(Error::config("init_weights", message));
            }
        };
        Ok(Box::new(C3a { block: size(keys, "block_size", 256)?, kernel }))
    },
};

/// How kernels start.
#[derive(Debug, Clone, Copy)]
enum Kernel {
    Zero,
    Xavier,
    Kaiming,
    Gaussian,
}

#[derive(Debug)]
struct C3a {
    block: usize,
    kernel: Kernel,
}

impl Method for C3a {
    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let ((out, inp), block) = (start.dims(), start.rank.unwrap_or(self.block));
        for (n, what) in [(inp, "inputs"), (out, "outputs")] {
            if !n.is_multiple_of(block) {
                return Err(start.misfit("block_size", format!("{block} does not divide its {n} {what}")));
            }
        }
        let (name, shape) = ("c3a_kernel", (out / block, inp / block, block));
        match self.kernel {
            Kernel::Zero => start.constant(name, 0.0, shape, Role::Plain)?,
            Kernel::Xavier => start.uniform(name, (6.0 / (inp + out) as f64).sqrt(), shape, Role::Plain)?,
            Kernel::Kaiming => start.uniform(name, 1.0 / (inp as f64).sqrt(), shape, Role::Plain)?,
            Kernel::Gaussian => start.normal(name, (0.0, 1.0), shape, Role::Plain)?,
        }
        Ok((start.finish(Circulant, 0.0), Vec::new()))
    }
}

/// Row t, column s of a block is element `s − t` (modulo the block) of its kernel; all over the layer's inputs.
#[derive(Debug)]
struct Circulant;

impl Formula for Circulant {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [kernel] = exactly(parameters)?;
        let (rows, columns, block) = kernel.dims3()?;
        let places: Vec<u32> =
            (0..block).flat_map(|t| (0..block).map(move |s| ((s + block - t) % block) as u32)).collect();
        let places = Tensor::from_vec(places, block * block, kernel.device())?;
        let blocks = kernel.index_select(&places, 2)?.reshape((rows, columns, block, block))?;
        let weight = blocks.permute((0, 2, 1, 3))?.contiguous()?.reshape((rows * block, columns * block))?;
        Ok(Change::Dense((weight / (columns * block) as f64)?))
    }
}
