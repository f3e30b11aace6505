//! OFT (Qiu et al. 2023, arXiv:2306.07280, and its input-side form, arXiv:2506.19847; PEFT `tuners/oft`): blocks of the
//! input are rotated.

use candle_core::Tensor;
use peft_core::{ConfigKeys, Error, Result, Role};
use serde_json::json;

use super::cayley::{cayley, cayley_series};
use super::{Kind, Made, Method, size_or_zero};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;

pub(crate) const KIND: Kind = Kind {
    name: "oft",
    peft_type: "OFT",
    label: "OFT",
    keys: || {
        json!({"bias": "none", "block_share": false, "coft": false, "eps": 6e-5, "exclude_modules": null,
            "fan_in_fan_out": false, "init_weights": true, "layers_pattern": null, "layers_to_transform": null,
            "module_dropout": 0.0, "num_cayley_neumann_terms": 5, "oft_block_size": 32, "r": 0,
            "use_cayley_neumann": true})
    },
    only_default: &["bias", "coft", "module_dropout"],
    patterns: &[],
    read: |keys| Ok(Box::new(Oft::read(keys)?)),
};

/// Either how wide blocks are, or how many there are.
#[derive(Debug, Clone, Copy)]
enum Blocks {
    Width(usize),
    Number(usize),
}

#[derive(Debug)]
struct Oft {
    blocks: Blocks,
    shared: bool,
    /// Terms of the series, or the exact form.
    terms: Option<usize>,
    identity: bool,
}

impl Oft {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        let blocks = match (size_or_zero(keys, "r", 0)?, size_or_zero(keys, "oft_block_size", 32)?) {
            (0, width) if width > 0 => Blocks::Width(width),
            (number, 0) if number > 0 => Blocks::Number(number),
            _ => return Err(Error::config("oft_block_size", "or `r` has to be 0, and the other not, as in PEFT")),
        };
        let series = keys.flag("use_cayley_neumann", true)?;
        let terms = keys.count("num_cayley_neumann_terms", 64)?.unwrap_or(5);
        Ok(Self {
            blocks,
            shared: keys.flag("block_share", false)?,
            terms: series.then_some(terms),
            identity: keys.flag("init_weights", true)?,
        })
    }
}

impl Method for Oft {
    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let (_, inp) = start.dims();
        let width = match self.blocks {
            Blocks::Width(width) => nearest_divisor(inp, width),
            Blocks::Number(number) => inp / nearest_divisor(inp, number),
        };
        let number = if self.shared { 1 } else { inp / width };
        let shape = (number, width * width.saturating_sub(1) / 2);
        match self.identity {
            true => start.constant("oft_R.weight", 0.0, shape, Role::NoDecay)?,
            false => start.normal("oft_R.weight", (0.0, 0.1), shape, Role::NoDecay)?,
        }
        Ok((start.finish(Rotations { width, number: inp / width, terms: self.terms }, 0.0), Vec::new()))
    }
}

/// The divisor of `n` nearest to `wanted`, the smaller of two equally near.
fn nearest_divisor(n: usize, wanted: usize) -> usize {
    if wanted >= n {
        return n;
    }
    let divides = |d: &usize| n.is_multiple_of(*d);
    let higher = (wanted..=n).find(divides).unwrap_or(n);
    let lower = (1..=wanted).rev().find(divides).unwrap_or(1);
    if wanted - lower <= higher - wanted { lower } else { higher }
}

/// The Cayley transform of the skew-symmetric blocks whose upper triangles, row by row, are the parameter.
#[derive(Debug)]
struct Rotations {
    width: usize,
    number: usize,
    terms: Option<usize>,
}

impl Formula for Rotations {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [vectors] = exactly(parameters)?;
        let q = skew_symmetric(vectors, self.width)?;
        let blocks = match self.terms {
            Some(terms) => cayley_series(&q, terms)?,
            None => cayley(&q)?,
        };
        let blocks = match blocks.dim(0)? {
            1 => blocks.repeat((self.number, 1, 1))?,
            _ => blocks,
        };
        Ok(Change::BlockInput { blocks, scale: None })
    }
}

/// `[n, width, width]` from upper triangles `[n, width·(width − 1)/2]`.
fn skew_symmetric(vectors: &Tensor, width: usize) -> Result<Tensor> {
    let (n, elements) = vectors.dims2()?;
    let (mut places, mut signs) = (vec![elements as u32; width * width], vec![0f32; width * width]);
    let pairs = (0..width).flat_map(|i| (i + 1..width).map(move |j| (i, j)));
    for ((i, j), k) in pairs.zip(0u32..) {
        for (at, sign) in [(i * width + j, 1.0), (j * width + i, -1.0)] {
            if let (Some(place), Some(s)) = (places.get_mut(at), signs.get_mut(at)) {
                (*place, *s) = (k, sign);
            }
        }
    }
    let device = vectors.device();
    let padded = Tensor::cat(&[vectors, &Tensor::zeros((n, 1), vectors.dtype(), device)?], 1)?;
    let signs = Tensor::from_vec(signs, (1, width * width), device)?.to_dtype(vectors.dtype())?;
    let flat = padded.index_select(&Tensor::from_vec(places, width * width, device)?, 1)?.broadcast_mul(&signs)?;
    Ok(flat.reshape((n, width, width))?)
}
