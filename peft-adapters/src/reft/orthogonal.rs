//! A matrix with orthonormal rows as PyTorch parametrises it (`torch.nn.utils.parametrizations.orthogonal` with Householder
//! reflections and a base): below the diagonal of `originalᵀ` `[hidden, r]` stand reflectors, on it signs, and what their product
//! makes of the first `r` unit vectors is turned by the base.

use candle_core::{DType, Tensor};
use peft_core::kernels::{self, FrozenWeight, Stream};
use peft_core::{Ctx, Parameter, Result, Role};

/// The parametrised rows `[r, hidden]`, with `r` below `hidden`.
#[derive(Debug)]
pub(crate) struct Orthonormal {
    /// `[r, hidden]`. Its diagonal and what is left of it are not trained.
    original: Parameter,
    /// `[hidden, hidden]`, orthogonal and frozen.
    base: Parameter,
    /// Ones right of the diagonal, `[r, hidden]`.
    beyond: Tensor,
    /// Ones on the diagonal, `[r, hidden]`.
    diagonal: Tensor,
}

impl Orthonormal {
    /// Rows that start at random, as a function of `stream`, trained as `role` says. `name` gives the key of a tensor of the parametrisation.
    pub(crate) fn new(
        [r, hidden]: [usize; 2],
        stream: Stream,
        device: &candle_core::Device,
        role: Role,
        name: impl Fn(&str) -> String,
    ) -> Result<Self> {
        let ones = |keep: fn(usize, usize) -> bool| {
            let at = |i: usize| move |j: usize| if keep(i, j) { 1f32 } else { 0.0 };
            Tensor::from_vec((0..r).flat_map(|i| (0..hidden).map(at(i))).collect::<Vec<f32>>(), (r, hidden), device)
        };
        let (beyond, diagonal) = (ones(|i, j| j > i)?, ones(|i, j| j == i)?);
        let base = Tensor::from_vec(random_orthogonal(r, hidden, stream), (hidden, hidden), device)?;
        Ok(Self {
            original: Parameter::new(name("parametrizations.weight.original"), &diagonal.neg()?, role)?,
            base: Parameter::new(name("parametrizations.weight.0.base"), &base, Role::NoDecay)?,
            beyond,
            diagonal,
        })
    }

    pub(crate) fn parameter(&self) -> &Parameter {
        &self.original
    }

    pub(crate) fn base(&self) -> &Parameter {
        &self.base
    }

    /// The rows.
    pub(crate) fn get(&self, ctx: &Ctx<'_>) -> Result<Tensor> {
        let original = self.original.get(ctx);
        let vectors = (original.mul(&self.beyond)? + &self.diagonal)?;
        let scales = (vectors.sqr()?.sum_keepdim(1)?.recip()? * 2.0)?;
        // A row vector times the reflections, the last of the product first.
        let mut rows = self.diagonal.clone();
        for i in (0..vectors.dim(0)?).rev() {
            let vector = vectors.narrow(0, i, 1)?;
            let along = rows.matmul(&vector.t()?)?.broadcast_mul(&scales.narrow(0, i, 1)?)?;
            rows = (rows - along.matmul(&vector)?)?;
        }
        // PyTorch cuts the signs to whole numbers; they are ±1, and a step without a gradient may move ours a little.
        let signs = self.original.value().mul(&self.diagonal)?.sum_keepdim(1)?.sign()?;
        let rows = rows.broadcast_mul(&signs)?;
        let base = FrozenWeight::dense(&self.base.value().to_dtype(DType::F32)?)?;
        Ok(kernels::frozen_linear(&rows, &base, None)?)
    }
}

/// An orthogonal matrix `[hidden, hidden]` whose first `r` columns are uniform among orthonormal ones: those of the QR
/// decomposition of normal values, completed by the same reflections.
fn random_orthogonal(r: usize, hidden: usize, stream: Stream) -> Vec<f32> {
    let normal = stream.normal_vec(r * hidden, 1.0);
    let mut columns: Vec<Vec<f64>> =
        normal.chunks_exact(hidden).map(|column| column.iter().map(|&x| f64::from(x)).collect()).collect();
    let mut reflectors: Vec<Vec<f64>> = Vec::with_capacity(r);
    let mut signs = vec![1.0; hidden];
    for i in 0..r {
        let Some(column) = columns.get(i) else { break };
        let mut v: Vec<f64> = column.iter().enumerate().map(|(j, x)| if j < i { 0.0 } else { *x }).collect();
        let length = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        let Some(at) = v.get_mut(i) else { break };
        let sign = if *at < 0.0 { -1.0 } else { 1.0 };
        *at += sign * length;
        if let Some(s) = signs.get_mut(i) {
            *s = -sign;
        }
        for column in columns.iter_mut().skip(i + 1) {
            reflect(column, &v);
        }
        reflectors.push(v);
    }
    let mut out = vec![0f32; hidden * hidden];
    for (j, sign) in signs.into_iter().enumerate() {
        let mut column = vec![0.0; hidden];
        if let Some(one) = column.get_mut(j) {
            *one = sign;
        }
        reflectors.iter().rev().for_each(|v| reflect(&mut column, v));
        for (row, x) in out.chunks_exact_mut(hidden).zip(column) {
            if let Some(place) = row.get_mut(j) {
                *place = x as f32;
            }
        }
    }
    out
}

/// `x − 2v(v·x)/(v·v)`.
fn reflect(x: &mut [f64], v: &[f64]) {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let square = dot(v, v);
    if square > 0.0 {
        let factor = 2.0 * dot(v, x) / square;
        x.iter_mut().zip(v).for_each(|(x, v)| *x -= factor * v);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;
    use peft_core::kernels::testing::{close, randn};
    use peft_core::{AdapterSet, Route};

    use super::*;

    #[test]
    fn rows_stay_orthonormal_and_start_as_the_base_has_them() {
        let set = AdapterSet::empty();
        let ctx = Ctx::eval(&set, &Route::Base);
        for [r, hidden] in [[1, 2], [3, 7], [6, 7]] {
            let stream = Stream { seed: 3, step: 0, site: 1 };
            let rows = Orthonormal::new([r, hidden], stream, &Device::Cpu, Role::NoDecay, str::to_owned).unwrap();
            let eye = |n| Tensor::eye(n, DType::F32, &Device::Cpu).unwrap();
            let base = rows.base().value();
            close("base", &base.matmul(&base.t().unwrap()).unwrap(), &eye(hidden), 1e-5).unwrap();
            let start = rows.get(&ctx).unwrap();
            close("start", &start, &base.narrow(1, 0, r).unwrap().t().unwrap(), 1e-5).unwrap();
            rows.parameter()
                .set(&(randn(5, (r, hidden), 0.9).unwrap() - (&rows.diagonal * 4.0).unwrap()).unwrap())
                .unwrap();
            let moved = rows.get(&ctx).unwrap();
            close("moved", &moved.matmul(&moved.t().unwrap()).unwrap(), &eye(r), 1e-5).unwrap();
            assert!(close("moved", &moved, &start, 1e-2).is_err());
        }
    }
}
