//! VB-LoRA (Li et al. 2024, arXiv:2405.15179; PEFT `tuners/vblora`): both factors of every layer are put together of vectors of
//! one bank, each piece a mixture of the few vectors whose logits are largest.

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::{self, Stream};
use peft_core::{ConfigKeys, Error, Parameter, Result, Role, parameter_name};
use serde_json::json;

use super::{Kind, Made, Method, dropout, size};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;

pub(crate) const KIND: Kind = Kind {
    name: "vblora",
    peft_type: "VBLORA",
    label: "VB-LoRA",
    keys: || {
        json!({"bias": "none", "exclude_modules": null, "fan_in_fan_out": false, "init_logits_std": 0.1,
            "init_vector_bank_bound": 0.02, "layers_pattern": null, "layers_to_transform": null, "num_vectors": 256,
            "r": 4, "save_only_topk_weights": false, "topk": 2, "vblora_dropout": 0.0, "vector_length": 256})
    },
    only_default: &["bias"],
    patterns: &[],
    read: |keys| Ok(Box::new(VbLora::read(keys)?)),
};

const LOGITS: [&str; 2] = ["vblora_logits_A", "vblora_logits_B"];
const INDICES: &str = "_topk_indices";
const WEIGHTS: &str = "_topk_weights";

#[derive(Debug)]
struct VbLora {
    r: usize,
    vectors: usize,
    length: usize,
    top: usize,
    only_top: bool,
    dropout: f32,
    bank_bound: f64,
    logits_std: f64,
}

impl VbLora {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        let (vectors, top) = (size(keys, "num_vectors", 256)?, size(keys, "topk", 2)?);
        if top > vectors {
            return Err(Error::config("topk", format!("{top} is more than the {vectors} of num_vectors")));
        }
        Ok(Self {
            r: size(keys, "r", 4)?,
            vectors,
            length: size(keys, "vector_length", 256)?,
            top,
            only_top: keys.flag("save_only_topk_weights", false)?,
            dropout: dropout(keys, "vblora_dropout")?,
            bank_bound: keys.number("init_vector_bank_bound", 0.02)?,
            logits_std: keys.number("init_logits_std", 0.1)?,
        })
    }

    /// The smallest type that holds the number of a vector, as in PEFT's files.
    fn index_type(&self) -> DType {
        match self.vectors {
            0..0x100 => DType::U8,
            0x100..0x8000 => DType::I16,
            _ => DType::I32,
        }
    }
}

impl Method for VbLora {
    fn shared_trained(&self, seed: u64, device: &Device) -> Result<Vec<Parameter>> {
        let (stream, bound) = (Stream { seed, step: 0, site: u32::MAX }, self.bank_bound as f32);
        let values = stream.uniform_vec(self.vectors * self.length, -bound, bound);
        let bank = Tensor::from_vec(values, (self.vectors, self.length), &Device::Cpu)?.to_device(device)?;
        Ok(vec![Parameter::new("base_model.vblora_vector_bank", &bank, Role::Plain)?])
    }

    fn check_training(&self, _: u64, parameters: &[&Parameter]) -> Result<()> {
        if self.top == 1 {
            return Err(Error::config("topk", "is 1, which leaves the logits without a gradient; use 2 or more"));
        }
        match parameters.iter().any(|p| p.name().ends_with(WEIGHTS)) {
            false => Ok(()),
            true => Err(Error::config(
                "save_only_topk_weights",
                "left only the chosen vectors in this adapter, which is used and merged and not trained; start from a checkpoint \
                 of its run, or from an adapter that was saved without it",
            )),
        }
    }

    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let ((out, inp), length) = (start.dims(), self.length);
        for (n, what) in [(inp, "inputs"), (out, "outputs")] {
            if !n.is_multiple_of(length) {
                return Err(start.misfit("vector_length", format!("{length} does not divide its {n} {what}")));
            }
        }
        let shapes = [(self.r, inp / length), (out / length, self.r)];
        if !self.only_top || !start.is_stored(&format!("{}{INDICES}", LOGITS[0])) {
            for (name, (rows, columns)) in LOGITS.into_iter().zip(shapes) {
                start.normal(name, (0.0, self.logits_std), (rows, columns, self.vectors), Role::Plain)?;
            }
            let formula = Mixed { top: self.top, only_top: self.only_top.then(|| self.index_type()) };
            return Ok((start.finish(formula, self.dropout), Vec::new()));
        }
        let mut indices = Vec::new();
        for (name, (rows, columns)) in LOGITS.into_iter().zip(shapes) {
            start.constant(&format!("{name}{WEIGHTS}"), 0.0, (rows, columns, self.top - 1), Role::Plain)?;
            let zeros =
                Tensor::zeros((rows, columns, self.top), DType::F32, start.device)?.to_dtype(self.index_type())?;
            let name = parameter_name(start.layer.path(), &format!("{name}{INDICES}"));
            indices.push(Parameter::new(name, &zeros, Role::Plain)?);
        }
        let formula = Chosen { indices: indices.clone(), vectors: self.vectors };
        Ok((start.finish(formula, self.dropout), indices))
    }
}

/// For every piece the `top` vectors with the largest logits of `logits: [rows, columns, vectors]`, largest first, and the
/// weights `[rows·columns, top − 1]` of all but the last.
fn choose(logits: &Tensor, top: usize) -> Result<(Vec<u32>, Tensor)> {
    let (rows, columns, vectors) = logits.dims3()?;
    let values = logits.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let (mut chosen, mut places) = (Vec::new(), Vec::new());
    for (piece, values) in values.chunks(vectors).enumerate() {
        let mut order: Vec<usize> = (0..vectors).collect();
        order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
        chosen.extend(order.iter().take(top).map(|v| *v as u32));
        places.extend(order.iter().take(top).map(|v| (piece * vectors + v) as u32));
    }
    let pieces = rows * columns;
    let logits = kernels::embedding(&places, &logits.reshape((pieces * vectors, 1))?)?.reshape((pieces, top))?;
    let above = logits.broadcast_sub(&logits.narrow(1, 0, 1)?.detach())?.exp()?;
    let weights = above.broadcast_div(&above.sum_keepdim(1)?)?;
    Ok((chosen, weights.narrow(1, 0, top - 1)?))
}

/// The mixtures `[rows, columns, length]` of the vectors `chosen` in `bank: [vectors, length]`. The last of each takes what the
/// weights `[rows·columns, top − 1]` of the others leave of 1.
fn mixtures(chosen: &[u32], weights: &Tensor, bank: &Tensor, (rows, columns): (usize, usize)) -> Result<Tensor> {
    let (pieces, others) = weights.dims2()?;
    let vectors = kernels::embedding(chosen, bank)?;
    let length = vectors.dim(1)?;
    if others == 0 {
        return Ok(vectors.reshape((rows, columns, length))?);
    }
    let last = (1.0 - weights.sum_keepdim(1)?)?;
    let weights = Tensor::cat(&[weights, &last], 1)?.reshape((pieces, others + 1, 1))?;
    let mixed = vectors.reshape((pieces, others + 1, length))?.broadcast_mul(&weights)?.sum(1)?;
    Ok(mixed.reshape((rows, columns, length))?)
}

/// `B·A` of mixtures for the pieces of A's rows and of B's columns.
fn factors(a: &Tensor, b: &Tensor) -> Result<Change> {
    let ((r, in_pieces, length), (out_pieces, _, _)) = (a.dims3()?, b.dims3()?);
    let b = b.transpose(1, 2)?.contiguous()?.reshape((out_pieces * length, r))?;
    Ok(Change::LowRank { a: a.reshape((r, in_pieces * length))?, b })
}

/// From logits.
#[derive(Debug)]
struct Mixed {
    top: usize,
    /// The type of indices, where only what is chosen is stored.
    only_top: Option<DType>,
}

impl Formula for Mixed {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [a, b, bank] = exactly(parameters)?;
        let mixed = |logits: &Tensor| {
            let (rows, columns, _) = logits.dims3()?;
            let (chosen, weights) = choose(logits, self.top)?;
            mixtures(&chosen, &weights, bank, (rows, columns))
        };
        factors(&mixed(a)?, &mixed(b)?)
    }

    fn exported(&self, parameters: &[Parameter]) -> Result<Option<Vec<(String, Tensor)>>> {
        let Some(dtype) = self.only_top else { return Ok(None) };
        let mut tensors = Vec::new();
        for parameter in parameters {
            let (rows, columns, _) = parameter.value().dims3()?;
            let (chosen, weights) = choose(&parameter.value(), self.top)?;
            let indices = Tensor::from_vec(chosen, (rows, columns, self.top), &Device::Cpu)?.to_dtype(dtype)?;
            let weights = weights.contiguous()?.reshape((rows, columns, self.top - 1))?;
            tensors.push((format!("{}{INDICES}", parameter.name()), indices));
            tensors.push((format!("{}{WEIGHTS}", parameter.name()), weights));
        }
        Ok(Some(tensors))
    }
}

/// From a file that holds only what was chosen.
#[derive(Debug)]
struct Chosen {
    /// Of A's pieces and of B's.
    indices: Vec<Parameter>,
    vectors: usize,
}

impl Chosen {
    fn of(&self, indices: &Parameter) -> Result<Vec<u32>> {
        let indices = (indices.name(), indices.value().to_device(&Device::Cpu)?.to_dtype(DType::I64)?);
        let vector = |i: i64| {
            let vector = u32::try_from(i).ok().filter(|v| (*v as usize) < self.vectors);
            vector.ok_or_else(|| Error::msg(format!("{} holds {i}, and there are {} vectors", indices.0, self.vectors)))
        };
        indices.1.flatten_all()?.to_vec1::<i64>()?.into_iter().map(vector).collect()
    }
}

impl Formula for Chosen {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [a, b, bank] = exactly(parameters)?;
        let [of_a, of_b] = exactly(&self.indices)?;
        let mixed = |weights: &Tensor, indices: &Parameter| {
            let (rows, columns, others) = weights.dims3()?;
            let weights = weights.reshape((rows * columns, others))?;
            mixtures(&self.of(indices)?, &weights, bank, (rows, columns))
        };
        factors(&mixed(a, of_a)?, &mixed(b, of_b)?)
    }

    fn check(&self) -> Result<()> {
        self.indices.iter().try_for_each(|indices| self.of(indices).map(|_| ()))
    }
}
