//! A matrix of which a few elements are trained and all others are zero.

use candle_core::{Result, Shape, Tensor};

use crate::cpu::{self, View};
use crate::diff_op::{DiffOp, apply};
use crate::tape::Keeps;

/// The matrix `[rows, columns]` that has `values[i]` at `places[i] = row·columns + column` and zeros elsewhere; `values` is
/// `[places.len()]`. Values at one place add up.
///
/// # Errors
/// When there is not one value a place, or a place lies outside of the matrix.
pub fn sparse_matrix(values: &Tensor, places: &[u32], (rows, columns): (usize, usize)) -> Result<Tensor> {
    if values.dims() != [places.len()] {
        candle_core::bail!("sparse_matrix: values are {:?} for {} places", values.dims(), places.len());
    }
    let elements = rows.saturating_mul(columns);
    if let Some(place) = places.iter().find(|place| **place as usize >= elements) {
        candle_core::bail!("sparse_matrix: place {place} is outside of a [{rows}, {columns}] matrix");
    }
    apply(SparseMatrix { places: places.to_vec(), shape: (rows, columns) }, &[values])
}

struct SparseMatrix {
    places: Vec<u32>,
    shape: (usize, usize),
}

impl DiffOp for SparseMatrix {
    const NAME: &'static str = "sparse_matrix";
    const KEEPS: Keeps = Keeps::Nothing;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let mut out = vec![0f32; self.shape.0 * self.shape.1];
        for (place, value) in self.places.iter().zip(args[0].data) {
            out[*place as usize] += value;
        }
        Ok((out, Shape::from(self.shape)))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let values = &args[0];
        let places = Tensor::new(self.places.as_slice(), values.device())?;
        let zeros = Tensor::zeros(self.shape.0 * self.shape.1, values.dtype(), values.device())?;
        zeros.index_add(&places, values, 0)?.reshape(self.shape)
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        if !needs[0] {
            return Ok(vec![None]);
        }
        if crate::diff_op::is_cpu_f32(grad) {
            let taken = cpu::with(grad, |dy| Ok(self.places.iter().map(|place| dy.data[*place as usize]).collect()))?;
            return Ok(vec![Some(cpu::tensor(taken, args[0].shape())?)]);
        }
        let places = Tensor::new(self.places.as_slice(), grad.device())?;
        Ok(vec![Some(grad.flatten_all()?.index_select(&places, 0)?)])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::test_support::Check;
    use crate::testing::randn;

    #[test]
    fn values_stand_at_their_places() {
        for (rows, columns) in [(1, 1), (3, 5), (33, 7)] {
            let places: Vec<u32> = (0..rows * columns).rev().step_by(2).map(|place| place as u32).collect();
            let values = randn(1, places.len(), 1.0).unwrap();
            let make = |args: &[Tensor]| sparse_matrix(&args[0], &places, (rows, columns));
            Check::new("sparse_matrix").run(std::slice::from_ref(&values), make).unwrap();
            let (made, values) = (make(std::slice::from_ref(&values)).unwrap(), values.to_vec1::<f32>().unwrap());
            let made = made.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (place, made) in made.iter().enumerate() {
                let value = places.iter().position(|p| *p as usize == place).map_or(0.0, |i| values[i]);
                assert_eq!(*made, value, "place {place}");
            }
        }
        let twice = sparse_matrix(&Tensor::new(&[1f32, 2.0], &candle_core::Device::Cpu).unwrap(), &[3, 3], (2, 2));
        assert_eq!(twice.unwrap().to_vec2::<f32>().unwrap(), [[0.0, 0.0], [0.0, 3.0]]);
    }

    #[test]
    fn places_must_fit() {
        let values = randn(1, 2, 1.0).unwrap();
        for (places, expect) in [(&[0, 6][..], "place 6"), (&[0], "1 places")] {
            let error = sparse_matrix(&values, places, (2, 3)).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        }
    }
}
