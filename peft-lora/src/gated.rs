//! LoRA with a gate for each sequence (UniPELT, Mao et al. 2022, arXiv:2110.07577; `use_gating` of AdapterHub's `LoRAConfig`).

use candle_core::Tensor;
use peft_core::kernels::{self, ServingForm};
use peft_core::{Ctx, Delta, FrozenLinear, Gate, Parameter, PeftModule, Result};

/// `y = W x + b + g·B·A·drop(x)`, where `g` is the gate for the sequence. It stands in the place of `α/r`, as in AdapterHub's package.
#[derive(Debug)]
pub struct GatedLora {
    /// `[r, in]`.
    pub(crate) a: Parameter,
    /// `[out, r]`.
    pub(crate) b: Parameter,
    pub(crate) gate: Gate,
    pub(crate) dropout: f32,
}

impl PeftModule for GatedLora {
    fn forward(&self, base: &FrozenLinear, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let dropout = ctx.dropout(base.site(), self.dropout);
        let change = kernels::lora_delta(x, &self.a.get(ctx), &self.b.get(ctx), 1.0, dropout)?;
        let y = base.base(x)?;
        Ok(kernels::add(&y, &self.gate.apply(&change, x, ctx)?.to_dtype(y.dtype())?)?)
    }

    fn reads_sequences(&self) -> bool {
        true
    }

    fn parameters(&self) -> Vec<&Parameter> {
        [&self.a, &self.b].into_iter().chain(self.gate.parameters()).collect()
    }

    fn delta(&self, _: &FrozenLinear) -> Result<Delta> {
        Ok(Delta::Unmergeable("its gate is another for each sequence".into()))
    }

    fn lower(&self, _: &FrozenLinear) -> Result<Option<ServingForm>> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use peft_core::kernels::testing::{close, randn};
    use peft_core::kernels::{FrozenWeight, SequenceSpan};
    use peft_core::{AdapterSet, Mode, Role, Route, SiteId, StepRng};

    use super::*;

    fn parameter(name: &str, seed: u64, shape: impl Into<candle_core::Shape>) -> Parameter {
        Parameter::new(name, &randn(seed, shape, 0.5).unwrap(), Role::Plain).unwrap()
    }

    fn span(rows: std::ops::Range<usize>) -> SequenceSpan {
        SequenceSpan { queries: rows.clone(), keys: rows, prefix: 0..0 }
    }

    /// The result and all gradients, against `LoRA.forward` of `adapters/methods/lora.py` in candle's own operations.
    #[test]
    fn each_sequence_has_its_gate() {
        let (out, inp, r) = (7, 9, 3);
        let (w, bias) = (randn(1, (out, inp), 0.5).unwrap(), randn(2, out, 0.5).unwrap());
        let base = FrozenLinear::new(SiteId(4), "layer", FrozenWeight::dense(&w).unwrap(), Some(bias.clone())).unwrap();
        let x = candle_core::Var::from_tensor(&randn(3, (5, inp), 1.0).unwrap()).unwrap();
        let dy = randn(9, (5, out), 1.0).unwrap();
        let [weight, shift] = [parameter("g.weight", 6, (1, inp)), parameter("g.bias", 7, 1)];
        let (a, b) = (parameter("a", 4, (r, inp)), parameter("b", 5, (out, r)));
        let module =
            GatedLora { a: a.clone(), b: b.clone(), gate: Gate::new(weight.clone(), shift.clone()), dropout: 0.0 };
        let set = AdapterSet::empty();
        let rng = StepRng { seed: 11, step: 2, run: 0 };
        let sequences = [span(0..3), span(3..5)];
        let mode = Mode::Train { track: true };
        let ctx = Ctx { mode, sequences: &sequences, ..Ctx::train(&set, &Route::Base, rng) };
        let y = module.forward(&base, x.as_tensor(), &ctx).unwrap();
        let grads = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();

        let of = |p: &Parameter| p.var().as_tensor().clone();
        let reference = |rows: std::ops::Range<usize>| {
            let x = x.as_tensor().narrow(0, rows.start, rows.len()).unwrap();
            let plain = x.matmul(&w.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
            let change = x.matmul(&of(&a).t().unwrap()).unwrap().matmul(&of(&b).t().unwrap()).unwrap();
            let scores = x.matmul(&of(&weight).t().unwrap()).unwrap().broadcast_add(&of(&shift)).unwrap();
            let open = (scores.neg().unwrap().exp().unwrap() + 1.0).unwrap().recip().unwrap();
            (plain + change.broadcast_mul(&open.mean_keepdim(0).unwrap()).unwrap()).unwrap()
        };
        let want = Tensor::cat(&[reference(0..3), reference(3..5)], 0).unwrap();
        close("y", &y, &want, 1e-5).unwrap();
        let expected = (&want * &dy).unwrap().sum_all().unwrap().backward().unwrap();
        let parameters = [("a", of(&a)), ("b", of(&b)), ("gate", of(&weight)), ("its bias", of(&shift))];
        for (name, t) in parameters.into_iter().chain([("x", x.as_tensor().clone())]) {
            close(name, grads.get(&t).unwrap(), expected.get(&t).unwrap(), 1e-4).unwrap();
        }
        let unknown = Ctx { sequences: &[], ..ctx };
        assert!(module.forward(&base, x.as_tensor(), &unknown).is_err());
    }
}
