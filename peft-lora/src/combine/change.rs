//! The change that one adapter makes to the weight of one site, and what is made of several.

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::{FrozenWeight, Stream};
use peft_core::{Error, Result};

use crate::linalg::{self, OVERSAMPLING, Svd};

/// Up to this many rows or columns a matrix is decomposed whole: a second on one core.
const WHOLE: usize = 384;
/// Elements of a change that is made whole, at most: 16 GiB, more than the largest embedding has. Small factors can claim any size.
const MOST_ELEMENTS: usize = 1 << 32;
/// Times there and back through a matrix to find its leading directions; changes that were pruned have a flat spectrum.
const ITERATIONS: usize = 6;

/// `W ← diag(1 + gain)·W + update`, `b ← b + bias`. Of an embedding, `W` is the transposed table, `[dim, vocab]`. On the
/// CPU; factors in `f64`, whole matrices in `f32`.
#[derive(Debug, Clone)]
pub(super) struct Change {
    /// `g − 1: [out]`, what DoRA does to the base's own weight.
    pub(super) gain: Option<Tensor>,
    pub(super) update: Update,
    /// `[out]`.
    pub(super) bias: Option<Tensor>,
}

/// What is added to a weight.
#[derive(Debug, Clone)]
pub(super) enum Update {
    /// `scale·B·A`, and `diag(1 + gain)` of that where there is a gain.
    LowRank {
        /// `[r, in]`.
        a: Tensor,
        /// `[out, r]`.
        b: Tensor,
        scale: f64,
    },
    /// `[out, in]`.
    Dense(Tensor),
}

/// A change of low rank, `B·A`, with what it lacks of the one that was asked for.
#[derive(Debug)]
pub(super) struct Reduced {
    /// `[rank, in]` in `f32`.
    pub(super) a: Tensor,
    /// `[out, rank]` in `f32`.
    pub(super) b: Tensor,
    /// Frobenius norm of what was asked for.
    pub(super) norm: f64,
    /// Frobenius norm of what is lacking.
    pub(super) error: f64,
}

impl Reduced {
    pub(super) fn rank(&self) -> usize {
        self.a.dims().first().copied().unwrap_or(0)
    }
}

/// How large the rank of a result may be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RankRule {
    /// This rank at every site; filled up with zeros where less is enough.
    Fixed(usize),
    /// At each site the smallest rank with at most this relative Frobenius error.
    WithinError(f64),
}

impl RankRule {
    /// The smallest rank that loses nothing but the rounding of an `f32`.
    pub const EXACT: Self = Self::WithinError(f32::EPSILON as f64 / 2.0);

    /// How many of the leading singular values `s` are kept, and the norm of what is then lacking. `beyond` is the norm of
    /// what they do not cover; `None` where even all of them lack too much.
    fn keep(self, s: &[f64], beyond: f64, norm: f64) -> Option<(usize, f64)> {
        let lacking = |k: usize| s.iter().skip(k).map(|s| s * s).fold(beyond * beyond, |sum, s| sum + s).sqrt();
        match self {
            Self::Fixed(rank) => Some((rank.min(s.len()), lacking(rank))),
            Self::WithinError(most) => {
                // From above, since most changes need most of their values; one is kept of nothing, too.
                let fits = |k: &usize| lacking(*k) <= most * norm;
                let k = (1..=s.len()).rev().take_while(fits).last()?;
                Some((k, lacking(k)))
            }
        }
    }

    fn fill(self, reduced: Reduced) -> Result<Reduced> {
        let Self::Fixed(rank) = self else { return Ok(reduced) };
        let missing = rank.saturating_sub(reduced.rank());
        if missing == 0 {
            return Ok(reduced);
        }
        let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let a = Tensor::cat(&[&reduced.a, &zeros((missing, reduced.a.dim(1)?))?], 0)?;
        let b = Tensor::cat(&[&reduced.b, &zeros((reduced.b.dim(0)?, missing))?], 1)?;
        Ok(Reduced { a, b, ..reduced })
    }
}

impl Change {
    /// `gain` of the change, or none: `1 + Σ wᵢ gainᵢ` is what the base's own weight is multiplied with in the end.
    pub(super) fn added_gain(parts: &[(f64, Self)]) -> Result<Option<Tensor>> {
        sum(parts.iter().filter_map(|(w, c)| Some((*w, c.gain.as_ref()?))))
    }

    /// `Σ wᵢ biasᵢ`.
    pub(super) fn added_bias(parts: &[(f64, Self)]) -> Result<Option<Tensor>> {
        sum(parts.iter().filter_map(|(w, c)| Some((*w, c.bias.as_ref()?))))
    }

    /// What the adapter adds to the weight, whole, in `f32`; with the base's `weight: [out, in]` in `f32` where it has a gain.
    pub(super) fn dense(&self, weight: Option<&Tensor>) -> Result<Tensor> {
        let update = self.dense_update()?;
        match (&self.gain, weight) {
            (None, _) => Ok(update),
            (Some(gain), Some(weight)) => {
                let gain = gain.to_dtype(DType::F32)?.unsqueeze(1)?;
                Ok((weight.broadcast_mul(&gain)? + update)?)
            }
            (Some(_), None) => Err(Error::msg("the change depends on the base")),
        }
    }

    /// The update alone, whole, in `f32`.
    fn dense_update(&self) -> Result<Tensor> {
        match (&self.update, self.factors()) {
            (Update::Dense(update), _) => Ok(update.clone()),
            (_, Some(factors)) => {
                let (a, b) = factors?;
                let (out, inp) = (b.dim(0)?, a.dim(1)?);
                if out.checked_mul(inp).is_none_or(|n| n > MOST_ELEMENTS) {
                    let message =
                        format!("a whole change of [{out}, {inp}] is too large to be made; take cat, linear or svd");
                    return Err(Error::msg(message));
                }
                Ok(b.to_dtype(DType::F32)?.matmul(&a.to_dtype(DType::F32)?)?)
            }
            (Update::LowRank { .. }, None) => Err(Error::msg("has no factors")),
        }
    }

    /// A and B of the update, scale and gain in B; `None` where it has no factors.
    fn factors(&self) -> Option<Result<(Tensor, Tensor)>> {
        let Update::LowRank { a, b, scale } = &self.update else { return None };
        let scaled = || -> Result<(Tensor, Tensor)> {
            let b = (b * *scale)?;
            Ok((
                a.clone(),
                match &self.gain {
                    Some(gain) => b.broadcast_mul(&(gain + 1.0)?.unsqueeze(1)?)?,
                    None => b,
                },
            ))
        };
        Some(scaled())
    }
}

fn sum<'t>(terms: impl Iterator<Item = (f64, &'t Tensor)>) -> Result<Option<Tensor>> {
    let mut sum: Option<Tensor> = None;
    for (weight, term) in terms {
        let term = (term * weight)?;
        sum = Some(match sum {
            Some(sum) => (sum + term)?,
            None => term,
        });
    }
    Ok(sum)
}

/// `[Aᵢ]` and `[wᵢ·Bᵢ]` of all updates, one after another: their product is the weighted sum. `None` where one has no factors.
fn stacked(parts: &[(f64, Change)]) -> Result<Option<(Tensor, Tensor)>> {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for (weight, change) in parts {
        let Some(factors) = change.factors() else { return Ok(None) };
        let (ai, bi) = factors?;
        a.push(ai);
        b.push((bi * *weight)?);
    }
    Ok(Some((Tensor::cat(&a, 0)?, Tensor::cat(&b, 1)?)))
}

/// `Σ |wᵢ|·‖updateᵢ‖` of updates that have factors.
fn terms(parts: &[(f64, Change)]) -> Result<f64> {
    let mut sum = 0.0;
    for (weight, change) in parts {
        if let Some(factors) = change.factors() {
            let (a, b) = factors?;
            sum += weight.abs() * linalg::product_norm(&a, &b)?;
        }
    }
    Ok(sum)
}

/// The updates as they are, one after another: exact, of the sum of the ranks. As in PEFT, weight and scale go into A, unless a
/// gain is in B. `None` where one has no factors.
pub(super) fn concatenated(parts: &[(f64, Change)]) -> Result<Option<Reduced>> {
    let Some((stacked_a, stacked_b)) = stacked(parts)? else { return Ok(None) };
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for (weight, change) in parts {
        if let (None, Update::LowRank { a: ai, b: bi, scale }) = (&change.gain, &change.update) {
            a.push((ai * (*weight * *scale))?);
            b.push(bi.clone());
        } else if let Some(factors) = change.factors() {
            let (ai, bi) = factors?;
            a.push((ai * *weight)?);
            b.push(bi);
        }
    }
    let norm = linalg::product_norm(&stacked_a, &stacked_b)?;
    let (a, b) = (Tensor::cat(&a, 0)?.to_dtype(DType::F32)?, Tensor::cat(&b, 1)?.to_dtype(DType::F32)?);
    Ok(Some(Reduced { a, b, norm, error: 0.0 }))
}

/// The best approximation of the weighted sum of the updates that `rule` allows. Updates that all have factors are never
/// made whole.
pub(super) fn reduced(parts: &[(f64, Change)], rule: RankRule, stream: Stream) -> Result<Reduced> {
    if let Some((a, b)) = stacked(parts)? {
        let mut svd = linalg::product_svd(&a, &b)?;
        // What terms that cancel leave is rounding.
        let rounding = 1e-14 * terms(parts)?;
        svd.s.iter_mut().for_each(|s| *s = if *s > rounding { *s } else { 0.0 });
        let norm = svd.s.iter().map(|s| s * s).sum::<f64>().sqrt();
        let (rank, error) = rule.keep(&svd.s, 0.0, norm).ok_or_else(|| Error::msg("no rank is enough"))?;
        return rule.fill(balanced(&svd, rank, norm, error)?);
    }
    let mut total: Option<Tensor> = None;
    for (weight, change) in parts {
        let term = (change.dense_update()? * *weight)?;
        total = Some(match total {
            Some(total) => (total + term)?,
            None => term,
        });
    }
    let total = total.ok_or_else(|| Error::msg("nothing to combine"))?;
    reduced_dense(&total, rule, stream)
}

/// The best approximation of `change: [out, in]` in `f32` that `rule` allows: by a full decomposition where it is small, or
/// else by a randomised one, whose error is measured and not estimated.
pub(super) fn reduced_dense(change: &Tensor, rule: RankRule, stream: Stream) -> Result<Reduced> {
    let most = change.dim(0)?.min(change.dim(1)?);
    let norm = frobenius(change)?;
    if norm == 0.0 {
        let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let (a, b) = (zeros((1, change.dim(1)?))?, zeros((change.dim(0)?, 1))?);
        return rule.fill(Reduced { a, b, norm, error: 0.0 });
    }
    let mut rank = match rule {
        RankRule::Fixed(rank) => rank.min(most),
        RankRule::WithinError(_) => 16,
    };
    let randomised = |rank: usize| most > WHOLE && 3 * (rank + OVERSAMPLING) < most;
    while randomised(rank) {
        // Half as many further directions: the tail of a pruned change is nearly flat.
        let oversampling = OVERSAMPLING.max(rank / 2);
        let svd = linalg::randomised_svd(&FrozenWeight::dense(change)?, rank, oversampling, ITERATIONS, stream)?;
        let all = balanced(&svd, rank, norm, 0.0)?;
        let beyond = frobenius(&(change - all.b.matmul(&all.a)?)?)?;
        if let Some((kept, error)) = rule.keep(&svd.s, beyond, norm) {
            return rule.fill(balanced(&svd, kept, norm, error)?);
        }
        rank *= 2;
    }
    let svd = linalg::svd(change, most)?;
    // The values are those of the matrix to more digits than its norm in f32 has.
    let norm = svd.s.iter().map(|s| s * s).sum::<f64>().sqrt();
    let (kept, error) = rule.keep(&svd.s, 0.0, norm).ok_or_else(|| Error::msg("no rank is enough"))?;
    rule.fill(balanced(&svd, kept, norm, error)?)
}

fn frobenius(m: &Tensor) -> Result<f64> {
    Ok(m.sqr()?.sum(1)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

/// The first `rank` triplets as factors with `√s` in each, so that neither is much larger than the other.
fn balanced(svd: &Svd, rank: usize, norm: f64, error: f64) -> Result<Reduced> {
    let roots: Vec<f32> = svd.s.iter().take(rank).map(|s| s.max(0.0).sqrt() as f32).collect();
    let rank = roots.len();
    let roots = Tensor::from_vec(roots, (rank, 1), &Device::Cpu)?;
    let part = |t: &Tensor| -> Result<Tensor> { Ok(t.narrow(0, 0, rank)?.broadcast_mul(&roots)?) };
    Ok(Reduced { a: part(&svd.v)?.contiguous()?, b: part(&svd.u)?.t()?.contiguous()?, norm, error })
}
