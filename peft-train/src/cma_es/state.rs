//! A search as a checkpoint holds it.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use nalgebra::{DMatrix, DVector};
use peft_core::{Error, Result};

use super::CmaEs;

/// Step size, generation, and the generation of the decomposition.
const SCALARS: &str = "scalars";
/// Whole numbers below it are exact in `f64`.
const EXACT: f64 = 9_007_199_254_740_992.0;

impl CmaEs {
    /// All that is needed to go on bit for bit, as `f64` tensors whose names begin with `prefix`.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn state(&self, prefix: &str) -> Result<Vec<(String, Tensor)>> {
        let n = self.dim();
        let vector = |v: &DVector<f64>| Tensor::from_slice(v.as_slice(), n, &Device::Cpu);
        // Columns one after another.
        let matrix = |m: &DMatrix<f64>| Tensor::from_slice(m.as_slice(), (n, n), &Device::Cpu);
        let scalars = [self.sigma, self.generation as f64, self.decomposed as f64];
        Ok(vec![
            (format!("{prefix}{SCALARS}"), Tensor::from_slice(&scalars, 3, &Device::Cpu)?),
            (format!("{prefix}mean"), vector(&self.mean)?),
            (format!("{prefix}path_sigma"), vector(&self.path_sigma)?),
            (format!("{prefix}path_c"), vector(&self.path_c)?),
            (format!("{prefix}covariance"), matrix(&self.covariance)?),
            (format!("{prefix}vectors"), matrix(&self.vectors)?),
            (format!("{prefix}roots"), vector(&self.roots)?),
        ])
    }

    /// Takes back what [`CmaEs::state`] gave, of a search of the same dimension.
    ///
    /// # Errors
    /// A tensor that is missing, misshapen or not finite; the message names it, and nothing is changed.
    pub fn load_state(&mut self, state: &HashMap<String, Tensor>, prefix: &str) -> Result<()> {
        let n = self.dim();
        let get = |name: &str, elements: usize| -> Result<Vec<f64>> {
            let key = format!("{prefix}{name}");
            let found = state.get(&key).filter(|t| t.dtype() == DType::F64 && t.elem_count() == elements);
            let values = found
                .ok_or_else(|| Error::msg(format!("`{key}` is missing or has another shape")))?
                .flatten_all()?
                .to_vec1::<f64>()?;
            match values.iter().all(|x| x.is_finite()) {
                true => Ok(values),
                false => Err(Error::msg(format!("`{key}` holds NaN or infinity"))),
            }
        };
        let scalars = get(SCALARS, 3)?;
        let &[sigma, generation, decomposed] = scalars.as_slice() else {
            return Err(Error::msg(format!("`{prefix}{SCALARS}` is damaged")));
        };
        let roots = get("roots", n)?;
        let counts = (0.0..EXACT).contains(&generation) && (0.0..=generation).contains(&decomposed);
        if !(sigma > 0.0 && counts && roots.iter().all(|r| *r > 0.0)) {
            return Err(Error::msg(format!("`{prefix}{SCALARS}` or `{prefix}roots` is out of range")));
        }
        let matrix = |name| Ok::<_, Error>(DMatrix::from_vec(n, n, get(name, n * n)?));
        let next = Self {
            strategy: self.strategy.clone(),
            stream: self.stream,
            generation: generation as u64,
            mean: DVector::from_vec(get("mean", n)?),
            sigma,
            path_sigma: DVector::from_vec(get("path_sigma", n)?),
            path_c: DVector::from_vec(get("path_c", n)?),
            covariance: matrix("covariance")?,
            vectors: matrix("vectors")?,
            roots: DVector::from_vec(roots),
            decomposed: decomposed as u64,
        };
        *self = next;
        Ok(())
    }
}
