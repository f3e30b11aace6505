//! Correlations of two lists of numbers.

/// Pearson's correlation (`scipy.stats.pearsonr`); 0 where it is not defined, since a list does not differ.
pub(crate) fn pearson(x: &[f64], y: &[f64]) -> f64 {
    let n = x.len().min(y.len()).max(1) as f64;
    let mean = |v: &[f64]| v.iter().sum::<f64>() / n;
    let (mx, my) = (mean(x), mean(y));
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        xy += (x - mx) * (y - my);
        xx += (x - mx) * (x - mx);
        yy += (y - my) * (y - my);
    }
    // Rounding of a mean alone is no difference.
    let differs = |v: &[f64]| v.iter().any(|x| Some(x) != v.first());
    if !(differs(x) && differs(y)) || xx * yy == 0.0 {
        return 0.0;
    }
    (xy / (xx.sqrt() * yy.sqrt())).clamp(-1.0, 1.0)
}

/// Spearman's rank correlation (`scipy.stats.spearmanr`): equal numbers have the mean of their ranks.
pub(crate) fn spearman(x: &[f64], y: &[f64]) -> f64 {
    pearson(&ranks(x), &ranks(y))
}

fn ranks(v: &[f64]) -> Vec<f64> {
    let mut order: Vec<(usize, f64)> = v.iter().copied().enumerate().collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mut ranks = vec![0.0; v.len()];
    let mut below = 0;
    for equal in order.chunk_by(|a, b| a.1 == b.1) {
        let rank = below as f64 + (equal.len() as f64 + 1.0) / 2.0;
        for (i, _) in equal {
            if let Some(of) = ranks.get_mut(*i) {
                *of = rank;
            }
        }
        below += equal.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against scipy: `pearsonr`, `spearmanr`.
    #[test]
    fn correlations_are_those_of_scipy() {
        let x = [2.5, 0.5, 2.5, 3.8, 4.2, 1.0, 5.0, 2.5];
        let y = [2.1, 1.4, 2.9, 3.3, 3.3, 0.2, 4.6, 3.3];
        assert!((pearson(&x, &y) - 0.887_226_843_738_391_2).abs() < 1e-12, "{}", pearson(&x, &y));
        assert!((spearman(&x, &y) - 0.9).abs() < 1e-12, "{}", spearman(&x, &y));
        for (x, y) in
            [(vec![0.1; 7], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), (vec![], vec![]), (vec![1.0], vec![2.0])]
        {
            assert_eq!((pearson(&x, &y), spearman(&x, &y)), (0.0, 0.0));
        }
        assert!((spearman(&[1.0, 2.0, 3.0], &[1.0, 8.0, 27.0]) - 1.0).abs() < 1e-12);
    }
}
