//! Combinations that look at single elements: TIES (Yadav et al. 2023, arXiv:2306.01708), DARE (Yu et al. 2023,
//! arXiv:2311.03099) and pruning by magnitude, with PEFT's rules (`peft/utils/merge_utils.py`, 0.21).

use peft_core::kernels::Stream;
use peft_core::{Error, Result};

/// What is done to each adapter's elements before they are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prune {
    Nothing,
    /// The largest stay as they are.
    Magnitude,
    /// Random ones stay, divided by the density.
    Random,
}

/// Which sign an element of the result may have, in TIES.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MajoritySign {
    /// That of the sum of the elements.
    #[default]
    Total,
    /// That which more elements have.
    Frequency,
}

/// How elements are combined.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Elementwise {
    pub(super) prune: Prune,
    /// Whether only elements of the elected sign count, and their mean in place of their sum.
    pub(super) elects_sign: Option<MajoritySign>,
    /// The share of elements that stay, in (0, 1].
    pub(super) density: f64,
}

impl Elementwise {
    /// Combines tensors of the same shape, each a weight and its elements. `stream` has the random numbers of the first; the
    /// others have its further steps.
    ///
    /// # Errors
    /// Tensors of different sizes, or none.
    pub(super) fn combine(self, mut tensors: Vec<(f64, Vec<f32>)>, stream: Stream) -> Result<Vec<f32>> {
        let n = tensors.first().map(|(_, t)| t.len()).ok_or_else(|| Error::msg("nothing to combine"))?;
        if tensors.iter().any(|(_, t)| t.len() != n) {
            return Err(Error::msg("tensors of different sizes are not combined element by element"));
        }
        for (i, (_, tensor)) in tensors.iter_mut().enumerate() {
            match self.prune {
                _ if self.density >= 1.0 => {}
                Prune::Nothing => {}
                Prune::Magnitude => keep_largest(tensor, (self.density * n as f64) as usize),
                Prune::Random => keep_random(tensor, self.density, Stream { step: stream.step + i as u32, ..stream }),
            }
        }
        let at = |i: usize| tensors.iter().map(move |(w, t)| (*w, f64::from(t.get(i).copied().unwrap_or(0.0))));
        Ok((0..n).map(|i| self.element(at(i)) as f32).collect())
    }

    fn element(self, values: impl Iterator<Item = (f64, f64)> + Clone) -> f64 {
        let Some(majority) = self.elects_sign else { return values.map(|(w, x)| w * x).sum() };
        let votes: f64 = match majority {
            MajoritySign::Total => values.clone().map(|(_, x)| x).sum(),
            MajoritySign::Frequency => values.clone().filter(|(_, x)| *x != 0.0).map(|(_, x)| x.signum()).sum(),
        };
        let agrees = |x: f64| if votes >= 0.0 { x > 0.0 } else { x < 0.0 };
        let (mut sum, mut count) = (0.0, 0.0f64);
        for (weight, x) in values.filter(|(_, x)| agrees(*x)) {
            sum += weight * x;
            count += 1.0;
        }
        sum / count.max(1.0)
    }
}

/// Sets all but the `k` largest magnitudes to zero; of equal ones the first stay.
fn keep_largest(values: &mut [f32], k: usize) {
    if k == 0 {
        values.fill(0.0);
        return;
    }
    if k >= values.len() {
        return;
    }
    let mut magnitudes: Vec<f32> = values.iter().map(|x| x.abs()).collect();
    let (larger, bound, _) = magnitudes.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let bound = *bound;
    let mut equal = k - larger.iter().filter(|x| **x > bound).count();
    for x in values {
        if x.abs() == bound && equal > 0 {
            equal -= 1;
        } else if x.abs() <= bound {
            *x = 0.0;
        }
    }
}

fn keep_random(values: &mut [f32], density: f64, stream: Stream) {
    let draws = stream.uniform_vec(values.len(), 0.0, 1.0);
    for (x, u) in values.iter_mut().zip(draws) {
        *x = if f64::from(u) < density { (f64::from(*x) / density) as f32 } else { 0.0 };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const STREAM: Stream = Stream { seed: 1, step: 0, site: 2 };

    fn rule(prune: Prune, elects_sign: Option<MajoritySign>, density: f64) -> Elementwise {
        Elementwise { prune, elects_sign, density }
    }

    /// Worked by hand: half of four elements stay of each, signs are elected, those that agree are averaged.
    #[test]
    fn ties_by_hand() {
        let (a, b) = (vec![4.0, -3.0, 1.0, 0.5], vec![-1.0, 2.0, 0.25, 6.0]);
        let tensors = || vec![(0.5, a.clone()), (1.0, b.clone())];
        // a → 4 −3 0 0, b → 0 2 0 6; sums 4 −1 0 6
        let total = rule(Prune::Magnitude, Some(MajoritySign::Total), 0.5).combine(tensors(), STREAM).unwrap();
        assert_eq!(total, [2.0, -1.5, 0.0, 6.0]);
        // one vote each on the second: a tie counts as positive
        let frequency = rule(Prune::Magnitude, Some(MajoritySign::Frequency), 0.5).combine(tensors(), STREAM).unwrap();
        assert_eq!(frequency, [2.0, 2.0, 0.0, 6.0]);
        let all = rule(Prune::Magnitude, Some(MajoritySign::Total), 1.0).combine(tensors(), STREAM).unwrap();
        assert_eq!(all, [2.0, -1.5, 0.375, 3.125]);
        let pruned = rule(Prune::Magnitude, None, 0.5).combine(tensors(), STREAM).unwrap();
        assert_eq!(pruned, [2.0, 0.5, 0.0, 6.0]);
        assert!(rule(Prune::Nothing, None, 1.0).combine(vec![(1.0, a), (1.0, vec![1.0])], STREAM).is_err());
    }

    #[test]
    fn as_many_stay_as_asked_for() {
        for (k, left) in [(0, 0), (1, 1), (3, 3), (6, 6), (9, 6)] {
            let mut values = vec![1.0, -1.0, 1.0, 1.0, -1.0, 2.0];
            keep_largest(&mut values, k);
            assert_eq!(values.iter().filter(|x| **x != 0.0).count(), left, "{k}: {values:?}");
            assert!(k == 0 || values[5] == 2.0);
        }
    }

    #[test]
    fn random_pruning_keeps_the_mean_and_repeats() {
        let ones = vec![1.0f32; 40_000];
        let dare = rule(Prune::Random, None, 0.25);
        let one = dare.combine(vec![(1.0, ones.clone())], STREAM).unwrap();
        assert!(one.iter().all(|x| *x == 0.0 || *x == 4.0));
        let mean = one.iter().sum::<f32>() / one.len() as f32;
        assert!((mean - 1.0).abs() < 0.05, "{mean}");
        assert_eq!(one, dare.combine(vec![(1.0, ones.clone())], STREAM).unwrap());
        // the second adapter draws others
        let two = dare.combine(vec![(0.0, ones.clone()), (1.0, ones)], STREAM).unwrap();
        assert_ne!(one, two);
    }
}
