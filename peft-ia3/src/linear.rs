//! IA³ on a linear layer.

use candle_core::Tensor;
use peft_core::kernels::{self, ServingForm};
use peft_core::{Ctx, Delta, FrozenLinear, Parameter, PeftModule, Result, Role, parameter_name};

/// Which side of a layer is scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scaled {
    /// `y = W(l ⊙ x) + b`, at PEFT's `feedforward_modules`.
    Input,
    /// `y = l ⊙ (W x + b)`: the bias too, as in PEFT.
    Output,
}

/// The factors `l` of one linear layer (PEFT `tuners/ia3/layer.py`).
#[derive(Debug)]
pub struct Ia3Linear {
    /// `[1, in]` or `[out, 1]`, as PEFT stores them.
    l: Parameter,
    scaled: Scaled,
}

impl Ia3Linear {
    /// A module that starts from `start`, of as many elements as the scaled side has. Weight decay leaves it alone: it
    /// would pull the factors to 0, and what changes nothing is 1.
    ///
    /// # Errors
    /// When `start` has another number of elements.
    pub fn new(base: &FrozenLinear, scaled: Scaled, start: &Tensor) -> Result<Self> {
        let shape = match scaled {
            Scaled::Input => (1, base.weight().in_features()),
            Scaled::Output => (base.weight().out_features(), 1),
        };
        let name = parameter_name(base.path(), "ia3_l");
        Ok(Self { l: Parameter::new(name, &start.reshape(shape)?, Role::NoDecay)?, scaled })
    }

    /// How many factors a layer has on a side.
    #[must_use]
    pub fn width(base: &FrozenLinear, scaled: Scaled) -> usize {
        match scaled {
            Scaled::Input => base.weight().in_features(),
            Scaled::Output => base.weight().out_features(),
        }
    }
}

impl PeftModule for Ia3Linear {
    fn forward(&self, base: &FrozenLinear, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let l = self.l.get(ctx).flatten_all()?;
        match self.scaled {
            Scaled::Input => base.base(&kernels::scale_columns(x, &l)?),
            Scaled::Output => Ok(kernels::scale_columns(&base.base(x)?, &l)?),
        }
    }

    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.l]
    }

    fn delta(&self, _: &FrozenLinear) -> Result<Delta> {
        let l = self.l.value().flatten_all()?.to_dtype(candle_core::DType::F32)?;
        Ok(match self.scaled {
            Scaled::Input => Delta::ScaleInput(l),
            Scaled::Output => Delta::ScaleOutput(l),
        })
    }

    fn lower(&self, base: &FrozenLinear) -> Result<Option<ServingForm>> {
        let l = self.l.value().flatten_all()?;
        if self.scaled == Scaled::Input {
            return Ok(Some(ServingForm { scale_input: Some(l), ..ServingForm::default() }));
        }
        // The form adds the base's bias after the factor; IA³ scales it too.
        let shift = match base.bias() {
            Some(b) => Some((b.to_dtype(l.dtype())? * (&l - 1.0)?)?),
            None => None,
        };
        Ok(Some(ServingForm { scale_output: Some(l), shift, ..ServingForm::default() }))
    }
}
