//! Gates: how far a part of an adapter is open to a sequence (UniPELT, Mao et al. 2022, arXiv:2110.07577).

use candle_core::{Device, Tensor};
use peft_kernels::{self as kernels, Stream};

use crate::ctx::Ctx;
use crate::error::Result;
use crate::param::{Parameter, Role};
use crate::sequences;

/// How far something is open to a sequence: the mean over its tokens of `sigmoid(w·x + b)`, a number for each output. It is that of
/// AdapterHub's package (`use_gating`), padding apart, which there is a part of the mean. The tokens are those of the pass: one that is
/// written with a cache has a gate of its own.
#[derive(Debug)]
pub struct Gate {
    /// `[outputs, in]`.
    weight: Parameter,
    /// `[outputs]`.
    bias: Parameter,
}

impl Gate {
    /// A gate with weight `[outputs, in]` and bias `[outputs]`.
    #[must_use]
    pub fn new(weight: Parameter, bias: Parameter) -> Self {
        Self { weight, bias }
    }

    /// A gate as AdapterHub starts those of LoRA and prefixes: weights normal with standard deviation 0.02, the bias uniform as
    /// PyTorch's. Its parameters are `{name}.weight` and `{name}.bias`; with `silent`, what it multiplies is zero at the start.
    ///
    /// # Errors
    /// When the values cannot be made.
    pub fn start(
        name: &str,
        [outputs, width]: [usize; 2],
        silent: bool,
        stream: Stream,
        device: &Device,
    ) -> Result<Self> {
        let bound = 1.0 / (width as f32).sqrt();
        let bias = Stream { site: !stream.site, ..stream }.uniform_vec(outputs, -bound, bound);
        let weight = Tensor::from_vec(stream.normal_vec(outputs * width, 0.02), (outputs, width), device)?;
        let role = |role: Role| if silent { Role::ZeroAtStart } else { role };
        Ok(Self {
            weight: Parameter::new(format!("{name}.weight"), &weight, role(Role::Plain))?,
            bias: Parameter::new(
                format!("{name}.bias"),
                &Tensor::from_vec(bias, outputs, device)?,
                role(Role::NoDecay),
            )?,
        })
    }

    /// `sigmoid(w·x + b)` of each row of `x` `[tokens, in]`: `[tokens, outputs]`.
    fn of_tokens(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let x = x.to_dtype(self.weight.dtype())?;
        let scores = kernels::add_bias(&kernels::trainable_linear(&x, &self.weight.get(ctx))?, &self.bias.get(ctx))?;
        Ok(((scores / 2.0)?.tanh()? / 2.0)?.affine(1.0, 0.5)?)
    }

    /// How far it is open to the sequence with these rows `[tokens, in]`: `[1, outputs]`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn of_sequence(&self, rows: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        Ok(self.of_tokens(rows, ctx)?.mean_keepdim(0)?)
    }

    /// `made` `[tokens, width]`, each sequence multiplied by the first output for its rows of `x` `[tokens, in]`.
    ///
    /// # Errors
    /// When the sequences of `ctx` do not cover the rows, or a tensor operation fails.
    pub fn apply(&self, made: &Tensor, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let open = self.of_tokens(x, ctx)?.narrow(1, 0, 1)?;
        let means = sequences::each(&open, ctx.sequences, |_, rows| {
            let tokens = rows.dim(0)?;
            Ok(rows.mean_keepdim(0)?.broadcast_as((tokens, 1))?)
        })?;
        Ok(made.broadcast_mul(&means)?)
    }

    /// The parameters, in the order in which they are stored.
    #[must_use]
    pub fn parameters(&self) -> [&Parameter; 2] {
        [&self.weight, &self.bias]
    }
}
