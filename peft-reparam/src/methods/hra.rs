//! HRA (Yuan et al. 2024, arXiv:2405.17484; PEFT `tuners/hra`): the input goes through a chain of Householder reflections.

use candle_core::{Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::{Result, Role};
use serde_json::json;

use super::{Kind, Made, Method, size};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;

pub(crate) const KIND: Kind = Kind {
    name: "hra",
    peft_type: "HRA",
    label: "HRA",
    keys: || {
        json!({"apply_GS": false, "bias": "none", "exclude_modules": null, "init_weights": true, "layers_pattern": null,
            "layers_to_transform": null, "r": 8})
    },
    only_default: &["bias"],
    patterns: &[],
    read: |keys| {
        let (r, orthogonal) = (size(keys, "r", 8)?, keys.flag("apply_GS", false)?);
        Ok(Box::new(Hra { r, orthogonal, paired: keys.flag("init_weights", true)? }))
    },
};

#[derive(Debug)]
struct Hra {
    r: usize,
    /// Gram–Schmidt on the reflections' directions.
    orthogonal: bool,
    /// Reflections start in equal pairs, which undo one another.
    paired: bool,
}

impl Method for Hra {
    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let ((_, inp), r) = (start.dims(), self.r);
        if self.paired && r.is_multiple_of(2) {
            let half = r / 2;
            let bound = 1.0 / (half as f32).sqrt();
            let stream = Stream { seed: start.seed, step: 0, site: start.layer.site().0 };
            let u = Tensor::from_vec(stream.uniform_vec(inp * half, -bound, bound), (inp, half, 1), &Device::Cpu)?;
            start.given("hra_u", Tensor::cat(&[&u, &u], 2)?.reshape((inp, r))?, Role::NoDecay)?;
        } else {
            start.kaiming("hra_u", (inp, r), Role::NoDecay)?;
        }
        Ok((start.finish(Reflections { orthogonal: self.orthogonal }, 0.0), Vec::new()))
    }
}

/// `W·H₁⋯H_r` with `H_i = I − 2·u_i·u_iᵀ`, as `I − 2·V·Uᵀ`: `v_i = H₁⋯H_{i−1}·u_i = u_i − 2·Σ_{j<i} (u_jᵀu_i)·v_j`.
///
/// With Gram–Schmidt the directions are orthonormal and V = U.
#[derive(Debug)]
struct Reflections {
    orthogonal: bool,
}

impl Formula for Reflections {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [u] = exactly(parameters)?;
        let unit = |v: &Tensor| -> Result<Tensor> { Ok(v.broadcast_div(&v.sqr()?.sum_keepdim(0)?.sqrt()?)?) };
        let (mut directions, mut images): (Vec<Tensor>, Vec<Tensor>) = (Vec::new(), Vec::new());
        for i in 0..u.dim(1)? {
            let mut direction = unit(&u.narrow(1, i, 1)?)?;
            let mut image = direction.clone();
            for (earlier, moved) in directions.iter().zip(&images) {
                let factor = if self.orthogonal { 1.0 } else { 2.0 };
                let along = ((earlier * &compared(&direction, &image, self.orthogonal))?.sum_keepdim(0)? * factor)?;
                image = (&image - moved.broadcast_mul(&along)?)?;
            }
            if self.orthogonal {
                image = unit(&image)?;
                direction = image.clone();
            }
            directions.push(direction);
            images.push(image);
        }
        let a = Tensor::cat(&directions, 1)?.t()?.contiguous()?;
        Ok(Change::LowRankInput { a, b: (Tensor::cat(&images, 1)? * -2.0)? })
    }
}

/// What earlier directions are compared with: modified Gram–Schmidt takes what is left so far, the product of reflections
/// the direction itself.
fn compared(direction: &Tensor, left: &Tensor, orthogonal: bool) -> Tensor {
    if orthogonal { left.clone() } else { direction.clone() }
}
