//! ReFT (Wu et al. 2024, arXiv:2404.03592): low-rank changes of the residual stream behind a block, at the first or last tokens
//! of a sequence, with AdapterHub's keys, places and files (`adapters` 1.3, `methods/reft.py`).
//!
//! | preset | `h` becomes |
//! |---|---|
//! | `loreft` | `h + Rᵀ(Wh + b − Rh)`, the rows of `R` orthonormal |
//! | `noreft` | `h + Pᵀ(Wh + b − Ph)`, `P` free |
//! | `direft` | `h + Pᵀ(Wh + b)` |
//!
//! Written with a cache, a text has its interventions at the prompt's tokens, and at written ones only where a pass over the
//! whole text would have them among the first. (AdapterHub's package takes each written token for the first of a text.)

mod build;
mod config;
mod orthogonal;

use candle_core::{DType, Tensor};
use peft_core::kernels::{self, Activation, SequenceSpan};
use peft_core::{Ctx, Join, Parameter, Result, SiteId, SublayerModule, sequences};

use self::orthogonal::Orthonormal;

pub use config::ReftConfig;
pub(crate) use config::{ADAPTERHUB_KEYS, PEFT_TYPE};

/// The rows of a projection `[r, hidden]`.
#[derive(Debug)]
pub(crate) enum Rows {
    Free(Parameter),
    Orthonormal(Orthonormal),
}

impl Rows {
    fn get(&self, ctx: &Ctx<'_>) -> Result<Tensor> {
        match self {
            Self::Free(rows) => Ok(rows.get(ctx)),
            Self::Orthonormal(rows) => rows.get(ctx),
        }
    }

    fn parameter(&self) -> &Parameter {
        match self {
            Self::Free(rows) => rows,
            Self::Orthonormal(rows) => rows.parameter(),
        }
    }
}

/// One intervention: `h + Pᵀ(act(Wh + b) − Ph)`, or without `Ph`.
#[derive(Debug)]
pub(crate) struct Unit {
    /// `W`, `[r, hidden]`.
    pub(crate) source: Parameter,
    /// `b`, `[r]`.
    pub(crate) bias: Parameter,
    /// `P`.
    pub(crate) projection: Rows,
}

/// The interventions behind one block.
#[derive(Debug)]
pub(crate) struct Reft {
    pub(crate) site: SiteId,
    /// That of the first and that of the last tokens; one may stand for both.
    pub(crate) units: Vec<Unit>,
    /// How many of the first and of the last tokens of a sequence.
    pub(crate) positions: [usize; 2],
    pub(crate) activation: Option<Activation>,
    pub(crate) subtract: bool,
    pub(crate) dropout: f32,
}

impl Unit {
    /// `[tokens, hidden]` to the same shape.
    fn forward(&self, x: &Tensor, reft: &Reft, ctx: &Ctx<'_>) -> Result<Tensor> {
        let rows = self.projection.get(ctx)?;
        let mut made = kernels::add_bias(&kernels::trainable_linear(x, &self.source.get(ctx))?, &self.bias.get(ctx))?;
        if let Some(act) = reft.activation {
            made = kernels::activation(&made, act)?;
        }
        if reft.subtract {
            made = (made - kernels::trainable_linear(x, &rows)?)?;
        }
        Ok(kernels::add(x, &made.matmul(&rows)?)?)
    }
}

impl Reft {
    /// The rows of the first and of the last tokens of each sequence, ascending and without those of the last among the first:
    /// the last intervention is the one that holds.
    fn places(&self, sequences: &[SequenceSpan]) -> [Vec<u32>; 2] {
        let [first, last] = self.positions;
        let (mut at_first, mut at_last) = (Vec::new(), Vec::new());
        for span in sequences {
            let (rows, cached) = (&span.queries, span.keys.len().saturating_sub(span.queries.len()));
            let end = if cached == 0 { rows.end.saturating_sub(last).max(rows.start) } else { rows.end };
            at_first.extend((rows.start..end.min(rows.start + first.saturating_sub(cached))).map(|row| row as u32));
            at_last.extend((end..rows.end).map(|row| row as u32));
        }
        [at_first, at_last]
    }
}

impl SublayerModule for Reft {
    fn join(&self, sublayer: &Join<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let plain = sublayer.plain(ctx)?;
        sequences::check(&plain, ctx.sequences)?;
        let places = self.places(ctx.sequences);
        let groups = match self.units.as_slice() {
            [one] => vec![(one, places.concat())],
            several => several.iter().zip(places).collect(),
        };
        let mut changed = Vec::with_capacity(groups.len());
        for (unit, rows) in groups.iter().filter(|(_, rows)| !rows.is_empty()) {
            let read = kernels::select_rows(&plain, rows)?.to_dtype(DType::F32)?;
            changed.push(unit.forward(&read, self, ctx)?);
        }
        let changed = match changed.as_slice() {
            [] => return Ok(plain),
            [one] => one.clone(),
            several => Tensor::cat(several, 0)?,
        };
        let changed = match ctx.dropout(self.site, self.dropout) {
            Some(dropout) => kernels::dropout(&changed, dropout.p, dropout.stream)?,
            None => changed,
        };
        let which: Vec<(usize, usize)> =
            groups.iter().flat_map(|(_, rows)| rows).enumerate().map(|(i, &row)| (row as usize, i)).collect();
        Ok(kernels::replace_rows(&plain, &changed, &which)?)
    }

    fn reads_sequences(&self, _: &Ctx<'_>) -> bool {
        true
    }

    fn parameters(&self) -> Vec<&Parameter> {
        self.units.iter().flat_map(|unit| [&unit.source, &unit.bias, unit.projection.parameter()]).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use peft_core::kernels::testing::{close, randn};
    use peft_core::{AdapterSet, Role, Route};

    use super::*;

    const HIDDEN: usize = 5;

    fn reft(units: usize, positions: [usize; 2], subtract: bool) -> Reft {
        let parameter = |seed: u64, shape: &[usize]| {
            Parameter::new(format!("p{seed}"), &randn(seed, shape, 0.8).unwrap(), Role::Plain).unwrap()
        };
        let unit = |seed| Unit {
            source: parameter(seed, &[2, HIDDEN]),
            bias: parameter(seed + 1, &[2]),
            projection: Rows::Free(parameter(seed + 2, &[2, HIDDEN])),
        };
        let units = (0..units as u64).map(|i| unit(10 * i)).collect();
        Reft { site: SiteId(0), units, positions, activation: None, subtract, dropout: 0.0 }
    }

    fn span(queries: std::ops::Range<usize>, keys: usize) -> SequenceSpan {
        SequenceSpan { queries, keys: 0..keys, prefix: 0..0 }
    }

    fn intervened(unit: &Unit, h: &Tensor, subtract: bool) -> Tensor {
        let [w, b, p] = [&unit.source, &unit.bias, unit.projection.parameter()].map(Parameter::value);
        let made = h.matmul(&w.t().unwrap()).unwrap().broadcast_add(&b).unwrap();
        let made = if subtract { (made - h.matmul(&p.t().unwrap()).unwrap()).unwrap() } else { made };
        (h + made.matmul(&p).unwrap()).unwrap()
    }

    #[test]
    fn the_first_and_last_tokens_of_each_sequence_are_changed() {
        let (output, residual) = (randn(1, (9, HIDDEN), 1.0).unwrap(), randn(2, (9, HIDDEN), 1.0).unwrap());
        let sum = (&output + &residual).unwrap();
        let set = AdapterSet::empty();
        let ctx = Ctx::eval(&set, &Route::Base);
        // Six tokens, two tokens (both first and last), and a token behind three in a cache.
        let sequences = [span(0..6, 6), span(6..8, 2), span(8..9, 4)];
        for (units, subtract) in [(2, true), (2, false), (1, true)] {
            let reft = reft(units, [4, 1], subtract);
            let (first, last) = (&reft.units[0], reft.units.last().unwrap());
            // Row 8 has place 3, which is one of the first four; what was written is none of the last.
            let of: [Option<&Unit>; 9] = [
                Some(first),
                Some(first),
                Some(first),
                Some(first),
                None,
                Some(last),
                Some(first),
                Some(last),
                Some(first),
            ];
            let rows = of.iter().enumerate().map(|(i, unit)| {
                let row = sum.narrow(0, i, 1).unwrap();
                unit.map_or(row.clone(), |unit| intervened(unit, &row, subtract))
            });
            let want = Tensor::cat(&rows.collect::<Vec<_>>(), 0).unwrap();
            let join = Join { output: &output, residual: &residual, norm: None };
            let made = reft.join(&join, &Ctx { sequences: &sequences, ..ctx }).unwrap();
            close(&format!("{units} units"), &made, &want, 1e-5).unwrap();
            assert!(reft.join(&join, &ctx).is_err());
        }
        let places = reft(2, [2, 2], true).places(&[span(0..3, 3), span(3..4, 9)]);
        assert_eq!(places, [vec![0], vec![1, 2]]);
    }
}
