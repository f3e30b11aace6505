//! Principal components of rows that arrive batch by batch.

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::{FrozenWeight, Stream};
use peft_core::{Error, Result};

use crate::linalg;

/// Iterations of the randomised decomposition, as in PEFT's `IncrementalPCA`.
const ITERATIONS: usize = 4;

/// The leading principal components of all rows seen so far, held as `k` directions and nothing else: each batch is
/// stacked under the present components, scaled by their singular values, and decomposed anew (Ross et al., "Incremental
/// Learning for Robust Visual Tracking", 2008).
#[derive(Debug)]
pub(crate) struct IncrementalPca {
    wanted: usize,
    width: usize,
    stream: Stream,
    seen: usize,
    mean: Vec<f64>,
    /// Sum of the squared distances of all rows from their mean.
    scatter: f64,
    fitted: Option<Fitted>,
}

#[derive(Debug)]
struct Fitted {
    /// `[k, width]`, orthonormal, by falling singular value.
    components: Tensor,
    singular: Vec<f64>,
}

impl IncrementalPca {
    /// For the `wanted` leading components of rows of `width` elements; there are never more than `width`. `stream` draws
    /// the starts of the decompositions.
    pub(crate) fn new(wanted: usize, width: usize, stream: Stream) -> Self {
        Self { wanted: wanted.min(width), width, stream, seen: 0, mean: vec![0.0; width], scatter: 0.0, fitted: None }
    }

    /// Components that are looked for: a batch has at least as many rows.
    pub(crate) fn wanted(&self) -> usize {
        self.wanted
    }

    /// Takes in `rows: [n, width]` and gives the cosine of each component with what it was before.
    ///
    /// # Errors
    /// When there are fewer rows than components or a value is not finite.
    pub(crate) fn fit(&mut self, rows: &[f32]) -> Result<Option<Vec<f64>>> {
        let n = rows.len().checked_div(self.width).unwrap_or(0);
        if n == 0 || n < self.wanted {
            return Err(Error::msg(format!("{n} rows for {} components", self.wanted)));
        }
        if !rows.iter().all(|x| x.is_finite()) {
            return Err(Error::msg("the layer's input holds NaN or infinity"));
        }
        let mut mean = vec![0.0; self.width];
        for row in rows.chunks_exact(self.width) {
            mean.iter_mut().zip(row).for_each(|(m, &x)| *m += f64::from(x));
        }
        mean.iter_mut().for_each(|m| *m /= n as f64);

        let mut stacked: Vec<f32> = Vec::with_capacity(rows.len() + (self.wanted + 1) * self.width);
        if let Some(old) = &self.fitted {
            let components = old.components.flatten_all()?.to_vec1::<f32>()?;
            for (component, &s) in components.chunks_exact(self.width).zip(&old.singular) {
                stacked.extend(component.iter().map(|c| (f64::from(*c) * s) as f32));
            }
            // What the shift of the mean adds to the scatter.
            let weight = (self.seen as f64 * n as f64 / (self.seen + n) as f64).sqrt();
            stacked.extend(self.mean.iter().zip(&mean).map(|(old, new)| (weight * (old - new)) as f32));
        }
        for row in rows.chunks_exact(self.width) {
            stacked.extend(row.iter().zip(&mean).map(|(&x, m)| (f64::from(x) - m) as f32));
        }

        let (before, now, total) = (self.seen as f64, n as f64, (self.seen + n) as f64);
        let within: f64 = rows
            .chunks_exact(self.width)
            .map(|row| row.iter().zip(&mean).map(|(&x, m)| (f64::from(x) - m).powi(2)).sum::<f64>())
            .sum();
        let between: f64 = self.mean.iter().zip(&mean).map(|(a, b)| (a - b).powi(2)).sum();
        self.scatter += within + before * now / total * between;
        self.mean.iter_mut().zip(&mean).for_each(|(old, new)| *old = (*old * before + new * now) / total);
        self.seen += n;

        let height = stacked.len() / self.width;
        let matrix = FrozenWeight::dense(&Tensor::from_vec(stacked, (height, self.width), &Device::Cpu)?)?;
        let svd = linalg::randomised_svd(&matrix, self.wanted, self.wanted, ITERATIONS, self.stream)?;
        let components = with_fixed_signs(&svd.v)?;
        let cosines = match &self.fitted {
            None => None,
            Some(old) => {
                let products = (&components * &old.components)?.to_dtype(DType::F64)?.sum(1)?;
                Some(products.to_vec1::<f64>()?)
            }
        };
        self.fitted = Some(Fitted { components, singular: svd.s });
        Ok(cosines)
    }

    /// The share of the rows' variance that each component explains, falling; empty before the first batch.
    pub(crate) fn explained(&self) -> Vec<f64> {
        let singular = self.fitted.iter().flat_map(|f| &f.singular);
        singular.map(|s| if self.scatter > 0.0 { s * s / self.scatter } else { 0.0 }).collect()
    }

    /// The first `n` components `[n, width]`; with `whiten`, each divided by the root of its singular value.
    ///
    /// # Errors
    /// When fewer are known.
    pub(crate) fn components(&self, n: usize, whiten: bool) -> Result<Tensor> {
        let Some(fitted) = &self.fitted else { return Err(Error::msg("no rows were seen")) };
        let leading = fitted.components.narrow(0, 0, n)?.contiguous()?;
        if !whiten {
            return Ok(leading);
        }
        let roots: Vec<f32> = fitted.singular.iter().take(n).map(|s| s.sqrt().max(1e-12) as f32).collect();
        Ok(leading.broadcast_div(&Tensor::from_vec(roots, (n, 1), &Device::Cpu)?)?)
    }
}

/// Turns each row so that its largest element is positive: the same data give the same components.
fn with_fixed_signs(rows: &Tensor) -> Result<Tensor> {
    let mut values = rows.to_vec2::<f32>()?;
    for row in &mut values {
        let largest = row.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(0.0);
        if largest < 0.0 {
            row.iter_mut().for_each(|x| *x = -*x);
        }
    }
    Ok(Tensor::new(values, &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use peft_core::kernels::testing::{close, randn};

    const STREAM: Stream = Stream { seed: 1, step: 0, site: 0 };

    /// Rows whose variance falls by a factor from direction to direction, around a mean that is not zero.
    fn rows(n: usize, width: usize) -> Vec<f32> {
        let x = randn(3, (n, width), 1.0).unwrap().to_vec2::<f32>().unwrap();
        let scaled =
            x.iter().flat_map(|row| row.iter().enumerate().map(|(j, x)| 3.0 * x * 0.6f32.powi(j as i32) + 0.5));
        scaled.collect()
    }

    /// The leading directions of the centred rows by a full decomposition, and the share of each in the variance.
    fn reference(rows: &[f32], width: usize, k: usize) -> (Tensor, Vec<f64>) {
        let x = Tensor::from_slice(rows, (rows.len() / width, width), &Device::Cpu).unwrap();
        let centred = x.broadcast_sub(&x.mean_keepdim(0).unwrap()).unwrap();
        let all = linalg::svd(&centred, width).unwrap();
        let total: f64 = all.s.iter().map(|s| s * s).sum();
        let ratios = all.s.iter().take(k).map(|s| s * s / total).collect();
        (with_fixed_signs(&all.v.narrow(0, 0, k).unwrap()).unwrap(), ratios)
    }

    #[test]
    fn one_batch_is_a_plain_decomposition() {
        let data = rows(60, 12);
        let mut pca = IncrementalPca::new(4, 12, STREAM);
        assert!(pca.fit(&data).unwrap().is_none());
        let (components, ratios) = reference(&data, 12, 4);
        close("components", &pca.components(4, false).unwrap(), &components, 1e-3).unwrap();
        for (got, want) in pca.explained().iter().zip(ratios) {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
    }

    #[test]
    fn batches_come_close_to_all_rows_at_once() {
        let data = rows(400, 10);
        let mut pca = IncrementalPca::new(8, 10, STREAM);
        let mut last = None;
        for part in data.chunks(80 * 10) {
            last = pca.fit(part).unwrap();
        }
        let (components, ratios) = reference(&data, 10, 3);
        close("components", &pca.components(3, false).unwrap(), &components, 2e-2).unwrap();
        for (got, want) in pca.explained().iter().zip(ratios) {
            assert!((got - want).abs() < 1e-2 * want, "{got} {want}");
        }
        assert!(last.unwrap().iter().take(3).all(|c| *c > 0.99));
    }

    #[test]
    fn whitening_and_limits() {
        let data = rows(40, 6);
        // No more components than the rows have elements.
        let mut pca = IncrementalPca::new(99, 6, STREAM);
        assert_eq!(pca.wanted(), 6);
        pca.fit(&data).unwrap();
        let (plain, white) = (pca.components(2, false).unwrap(), pca.components(2, true).unwrap());
        let ratio = (plain / white).unwrap().sqr().unwrap().to_vec2::<f32>().unwrap();
        let s = pca.fitted.as_ref().unwrap().singular.clone();
        assert!((f64::from(ratio[1][0]) - s[1]).abs() < 1e-3 * s[1]);
        // The same rows, and constant ones, which explain nothing.
        let mut flat = IncrementalPca::new(2, 3, STREAM);
        flat.fit(&[1.0; 12]).unwrap();
        assert!(flat.explained().iter().all(|r| *r == 0.0));
    }

    #[test]
    fn wrong_rows_are_refused() {
        let mut pca = IncrementalPca::new(3, 4, STREAM);
        assert!(pca.fit(&[0.5; 8]).unwrap_err().to_string().contains("2 rows for 3"));
        assert!(pca.fit(&[f32::NAN; 16]).unwrap_err().to_string().contains("NaN"));
        assert!(pca.fit(&[]).is_err());
    }
}
