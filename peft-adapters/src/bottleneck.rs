//! One bottleneck adapter at the end of a sublayer.

use candle_core::{DType, Tensor};
use peft_core::kernels::{self, Activation, Stream};
use peft_core::{Ctx, Gate, Join, Mode, Parameter, Result, SiteId, SublayerModule, sequences};

use crate::phm::Phm;

/// Epsilon of the adapter's own layer norms, PyTorch's default.
const LAYER_NORM_EPS: f64 = 1e-5;

/// What the adapter's own residual connection starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residual {
    /// The sublayer's output alone (`residual_before_ln = true`).
    Output,
    /// The sublayer's output on the residual stream, before the model's norm (`"post_add"`).
    Sum,
    /// What the adapter reads (`residual_before_ln = false`).
    Input,
}

/// How an adapter stands to the sublayer, the residual stream and the model's norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// It reads what the sublayer made.
    Sequential {
        /// With the residual stream added and, in a post-norm model, normalised by the model's norm (`original_ln_before`).
        on_stream: bool,
        /// What is added to its result.
        residual: Residual,
    },
    /// It reads the residual stream that the sublayer reads, and its result is added to the sublayer's.
    Parallel,
}

/// A layer norm of the adapter's own.
#[derive(Debug)]
pub(crate) struct Norm {
    /// `[hidden]`.
    pub(crate) weight: Parameter,
    /// `[hidden]`.
    pub(crate) bias: Parameter,
}

impl Norm {
    fn parameters(&self) -> [&Parameter; 2] {
        [&self.weight, &self.bias]
    }

    fn forward(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        Ok(kernels::layer_norm(x, &self.weight.get(ctx), Some(&self.bias.get(ctx)), LAYER_NORM_EPS)?)
    }
}

/// The weight of a projection, `[out, in]`.
#[derive(Debug)]
pub(crate) enum Weight {
    Dense(Parameter),
    Phm(Phm),
}

/// A linear layer.
#[derive(Debug)]
pub(crate) struct Projection {
    pub(crate) weight: Weight,
    /// `[out]`.
    pub(crate) bias: Option<Parameter>,
}

impl Projection {
    pub(crate) fn forward(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let weight = match &self.weight {
            Weight::Dense(weight) => weight.get(ctx),
            Weight::Phm(phm) => phm.weight(ctx)?,
        };
        let out = kernels::trainable_linear(x, &weight)?;
        match &self.bias {
            Some(bias) => Ok(kernels::add_bias(&out, &bias.get(ctx))?),
            None => Ok(out),
        }
    }

    pub(crate) fn parameters(&self) -> Vec<&Parameter> {
        let weight: Vec<_> = match &self.weight {
            Weight::Dense(weight) => vec![weight],
            Weight::Phm(phm) => phm.parameters().collect(),
        };
        weight.into_iter().chain(&self.bias).collect()
    }

    pub(crate) fn dtype(&self) -> DType {
        match &self.weight {
            Weight::Dense(weight) => weight.dtype(),
            Weight::Phm(phm) => phm.dtype(),
        }
    }
}

/// What the network's result is multiplied by.
#[derive(Debug)]
pub(crate) enum Scaling {
    Fixed(f64),
    /// `[1]`, or `[hidden]` for a factor a channel.
    Learned(Parameter),
}

impl Scaling {
    /// `made` `[tokens, width]`, multiplied.
    pub(crate) fn of(&self, made: Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        Ok(match self {
            Scaling::Fixed(1.0) => made,
            Scaling::Fixed(s) => (made * *s)?,
            Scaling::Learned(s) => {
                let factors = s.get(ctx).broadcast_as(made.dim(1)?)?.contiguous()?;
                kernels::scale_columns(&made, &factors)?
            }
        })
    }

    pub(crate) fn parameter(&self) -> Option<&Parameter> {
        match self {
            Scaling::Fixed(_) => None,
            Scaling::Learned(s) => Some(s),
        }
    }
}

/// `s · up(act(down(norm(x))))` at its [`Placement`]. `down` is `[bottleneck, hidden]`, `up` is `[hidden, bottleneck]`. It
/// calculates in the parameters' type, `f32`.
#[derive(Debug)]
pub struct Bottleneck {
    pub(crate) site: SiteId,
    pub(crate) placement: Placement,
    /// Whether the stream and the model's norm come behind the adapter (`original_ln_after`).
    pub(crate) joins_stream: bool,
    /// Whether the adapter's residual is added before its own norm at the end (`adapter_residual_before_ln`).
    pub(crate) residual_before_norm: bool,
    pub(crate) norm_before: Option<Norm>,
    pub(crate) down: Projection,
    pub(crate) activation: Activation,
    pub(crate) up: Projection,
    pub(crate) scaling: Scaling,
    pub(crate) dropout: f32,
    /// Share of the sequences that the adapter leaves alone in training (`stochastic_depth`, Huang et al. 2016,
    /// arXiv:1603.09382); the others have its result divided by the rest.
    pub(crate) stochastic_depth: f32,
    pub(crate) gate: Option<Gate>,
    pub(crate) norm_after: Option<Norm>,
}

impl Bottleneck {
    /// The network alone: `[tokens, hidden]` to `[tokens, hidden]`, without the norm at its end.
    fn network(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let out = self.scaled(x, ctx)?;
        let out = match ctx.dropout(self.site, self.dropout) {
            Some(dropout) => kernels::dropout(&out, dropout.p, dropout.stream)?,
            None => out,
        };
        match &self.gate {
            Some(gate) => gate.apply(&out, x, ctx),
            None => Ok(out),
        }
    }

    /// The network without dropout and gate, which is what a fusion attends to.
    pub(crate) fn scaled(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let normed = self.norm_before.as_ref().map(|norm| norm.forward(x, ctx)).transpose()?;
        let inner = kernels::activation(&self.down.forward(normed.as_ref().unwrap_or(x), ctx)?, self.activation)?;
        let out = self.some_sequences(self.up.forward(&inner, ctx)?, ctx)?;
        self.scaling.of(out, ctx)
    }

    /// The network of `read`, with the norm at its end and its residual connection.
    pub(crate) fn with_residual(&self, [read, residual]: &[Tensor; 2], ctx: &Ctx<'_>) -> Result<Tensor> {
        let made = self.network(read, ctx)?;
        if self.residual_before_norm && self.placement != Placement::Parallel {
            return self.norm_after(kernels::add(&made, residual)?, ctx);
        }
        Ok(kernels::add(&self.norm_after(made, ctx)?, residual)?)
    }

    /// What is left of `out` by [`Bottleneck::stochastic_depth`].
    fn some_sequences(&self, out: Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let Some(drop) = ctx.dropout(self.site, self.stochastic_depth) else { return Ok(out) };
        // Other numbers than those of the dropout here.
        let stream = Stream { site: !drop.stream.site, ..drop.stream };
        sequences::each(&out, ctx.sequences, |i, rows| {
            let factor = if stream.uniform(i as u64) < drop.p { 0.0 } else { 1.0 / (1.0 - f64::from(drop.p)) };
            Ok((rows * factor)?)
        })
    }

    fn norm_after(&self, x: Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        match &self.norm_after {
            Some(norm) => norm.forward(&x, ctx),
            None => Ok(x),
        }
    }

    /// What the adapter reads at its place, and what its result is added to, both in the parameters' type.
    pub(crate) fn reads(&self, join: &Join<'_>, ctx: &Ctx<'_>) -> Result<[Tensor; 2]> {
        let Placement::Sequential { on_stream, residual } = self.placement else {
            let read = join.residual.to_dtype(self.dtype())?;
            return Ok([read, join.output.to_dtype(self.dtype())?]);
        };
        let read = if on_stream { join.plain(ctx)? } else { join.output.clone() };
        let residual = match residual {
            Residual::Output => join.output.clone(),
            Residual::Sum => kernels::add(join.residual, join.output)?,
            Residual::Input => read.clone(),
        };
        Ok([read.to_dtype(self.dtype())?, residual.to_dtype(self.dtype())?])
    }

    /// The stream behind the adapter, for its result with the residual connection.
    pub(crate) fn behind(&self, output: &Tensor, join: &Join<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let output = output.to_dtype(join.output.dtype())?;
        if self.joins_stream { join.of(&output, ctx) } else { Ok(output) }
    }

    /// Whether some sequences go without it in this pass.
    fn drops_sequences(&self, ctx: &Ctx<'_>) -> bool {
        self.stochastic_depth > 0.0 && ctx.mode != Mode::Eval
    }

    fn dtype(&self) -> DType {
        self.down.dtype()
    }
}

impl SublayerModule for Bottleneck {
    fn join(&self, sublayer: &Join<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let output = self.with_residual(&self.reads(sublayer, ctx)?, ctx)?;
        self.behind(&output, sublayer, ctx)
    }

    fn reads_sequences(&self, ctx: &Ctx<'_>) -> bool {
        self.gate.is_some() || self.drops_sequences(ctx)
    }

    fn parameters(&self) -> Vec<&Parameter> {
        let mut all = Vec::new();
        all.extend(self.norm_before.iter().flat_map(Norm::parameters));
        all.extend(self.down.parameters().into_iter().chain(self.up.parameters()));
        all.extend(self.scaling.parameter());
        all.extend(self.norm_after.iter().flat_map(Norm::parameters));
        all.extend(self.gate.iter().flat_map(Gate::parameters));
        all
    }
}

/// Adapters for tests.
#[cfg(test)]
pub(crate) mod testing {
    #![allow(clippy::unwrap_used)]
    use peft_core::Role;
    use peft_core::kernels::testing::randn;

    use super::*;

    pub(crate) const HIDDEN: usize = 6;

    pub(crate) fn parameter(seed: u64, shape: &[usize]) -> Parameter {
        Parameter::new(format!("p{seed}"), &randn(seed, shape, 0.6).unwrap(), Role::Plain).unwrap()
    }

    fn dense(weight: Parameter, bias: Parameter) -> Projection {
        Projection { weight: Weight::Dense(weight), bias: Some(bias) }
    }

    pub(crate) fn bottleneck(
        seed: u64,
        placement: Placement,
        scaling: Scaling,
        norms: [bool; 2],
        residual_before_norm: bool,
    ) -> Bottleneck {
        let norm = |wanted: bool, seed| {
            wanted.then(|| Norm { weight: parameter(seed, &[HIDDEN]), bias: parameter(seed + 1, &[HIDDEN]) })
        };
        Bottleneck {
            site: SiteId(0),
            placement,
            joins_stream: true,
            residual_before_norm,
            norm_before: norm(norms[0], 20),
            down: dense(parameter(seed + 1, &[3, HIDDEN]), parameter(seed + 2, &[3])),
            activation: Activation::Relu,
            up: dense(parameter(seed + 3, &[HIDDEN, 3]), parameter(seed + 4, &[HIDDEN])),
            scaling,
            dropout: 0.0,
            stochastic_depth: 0.0,
            gate: None,
            norm_after: norm(norms[1], 30),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use peft_core::kernels::SequenceSpan;
    use peft_core::kernels::testing::{close, randn};
    use peft_core::{AdapterSet, FrozenNorm, NormKind, Route, StepRng};

    use super::testing::{HIDDEN, bottleneck, parameter};
    use super::*;

    fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Tensor {
        let centred = x.broadcast_sub(&x.mean_keepdim(1).unwrap()).unwrap();
        let variance = centred.sqr().unwrap().mean_keepdim(1).unwrap();
        let unit = centred.broadcast_div(&(variance + LAYER_NORM_EPS).unwrap().sqrt().unwrap()).unwrap();
        unit.broadcast_mul(weight).unwrap().broadcast_add(bias).unwrap()
    }

    /// The forward pass as `adapters/methods/modeling.py` has it: `pre_forward`, `forward`, `post_forward`.
    fn reference(b: &Bottleneck, h: &Tensor, stream: &Tensor, model_norm: Option<(&Tensor, &Tensor)>) -> Tensor {
        let normed = |x: &Tensor| model_norm.map_or(x.clone(), |(w, b)| layer_norm(x, w, b));
        let own = |norm: &Norm, x: &Tensor| layer_norm(x, &norm.weight.value(), &norm.bias.value());
        let (read, residual) = match b.placement {
            Placement::Parallel => (stream.clone(), None),
            Placement::Sequential { on_stream, residual } => {
                let sum = (h + stream).unwrap();
                let read = if on_stream { normed(&sum) } else { h.clone() };
                let residual = match residual {
                    Residual::Output => h.clone(),
                    Residual::Sum => sum,
                    Residual::Input => read.clone(),
                };
                (read, Some(residual))
            }
        };
        let x = b.norm_before.as_ref().map_or(read.clone(), |norm| own(norm, &read));
        let linear = |p: &Projection, x: &Tensor| {
            let [weight, bias] = p.parameters().try_into().unwrap();
            x.matmul(&weight.value().t().unwrap()).unwrap().broadcast_add(&bias.value()).unwrap()
        };
        let up = linear(&b.up, &linear(&b.down, &x).relu().unwrap());
        let mut out = match &b.scaling {
            Scaling::Fixed(s) => (up * *s).unwrap(),
            Scaling::Learned(s) => up.broadcast_mul(&s.value()).unwrap(),
        };
        if let Some(residual) = residual.as_ref().filter(|_| b.residual_before_norm) {
            out = (out + residual).unwrap();
        }
        if let Some(norm) = &b.norm_after {
            out = own(norm, &out);
        }
        if let Some(residual) = residual.filter(|_| !b.residual_before_norm) {
            out = (out + residual).unwrap();
        }
        if b.placement == Placement::Parallel {
            out = (out + h).unwrap();
        }
        if b.joins_stream { normed(&(out + stream).unwrap()) } else { out }
    }

    #[test]
    fn every_placement_is_adapterhubs() {
        let (h, stream) = (randn(7, (5, HIDDEN), 1.0).unwrap(), randn(8, (5, HIDDEN), 1.0).unwrap());
        let (weight, bias) = (randn(9, HIDDEN, 1.0).unwrap(), randn(10, HIDDEN, 1.0).unwrap());
        let model_norm = FrozenNorm::new(SiteId(1), "norm", NormKind::Layer, weight.clone(), Some(bias.clone()), 1e-5);
        let set = AdapterSet::empty();
        let ctx = Ctx::eval(&set, &Route::Base);
        let sequential = [true, false].into_iter().flat_map(|on_stream| {
            [Residual::Output, Residual::Sum, Residual::Input]
                .map(|residual| Placement::Sequential { on_stream, residual })
        });
        for placement in sequential.chain([Placement::Parallel]) {
            for norms in [[false, false], [true, false], [false, true], [true, true]] {
                for (i, before) in [true, false].into_iter().enumerate() {
                    let scaling = || match i {
                        0 => Scaling::Fixed(1.7),
                        _ => Scaling::Learned(parameter(40, &[HIDDEN])),
                    };
                    for post_norm in [false, true] {
                        let mut b =
                            bottleneck(0, placement, scaling(), norms, before && placement != Placement::Parallel);
                        b.joins_stream = i == 0 || post_norm;
                        let norm = post_norm.then_some(&model_norm);
                        let join = Join { output: &h, residual: &stream, norm };
                        let want = reference(&b, &h, &stream, post_norm.then_some((&weight, &bias)));
                        let name = format!("{placement:?}, norms {norms:?}, {before}, post-norm {post_norm}");
                        close(&name, &b.join(&join, &ctx).unwrap(), &want, 1e-5).unwrap();
                    }
                }
            }
        }
    }

    fn span(rows: std::ops::Range<usize>) -> SequenceSpan {
        SequenceSpan { queries: rows.clone(), keys: rows, prefix: 0..0 }
    }

    #[test]
    fn a_gate_is_the_mean_over_its_sequence() {
        let set = AdapterSet::empty();
        let ctx = Ctx::eval(&set, &Route::Base);
        let (h, stream) = (randn(7, (5, HIDDEN), 1.0).unwrap(), randn(8, (5, HIDDEN), 1.0).unwrap());
        for placement in [Placement::Parallel, Placement::Sequential { on_stream: false, residual: Residual::Output }] {
            let mut b = bottleneck(0, placement, Scaling::Fixed(1.5), [true, false], false);
            let sequences = [span(0..3), span(3..5)];
            let join = Join { output: &h, residual: &stream, norm: None };
            let open = b.join(&join, &ctx).unwrap();
            let base = (&h + &stream).unwrap();
            let (weight, bias) = (parameter(50, &[1, HIDDEN]), parameter(51, &[1]));
            let read = if placement == Placement::Parallel { &stream } else { &h };
            let scores = read.matmul(&weight.value().t().unwrap()).unwrap().broadcast_add(&bias.value()).unwrap();
            let scores: Vec<f32> = scores.flatten_all().unwrap().to_vec1().unwrap();
            let mean = |s: &[f32]| s.iter().map(|x| 1.0 / (1.0 + (-x).exp())).sum::<f32>() / s.len() as f32;
            let [first, second] = [mean(&scores[..3]), mean(&scores[3..])];
            let gates = Tensor::new(vec![first, first, first, second, second], h.device()).unwrap();
            let made = (&open - &base).unwrap().broadcast_mul(&gates.reshape((5, 1)).unwrap()).unwrap();
            b.gate = Some(Gate::new(weight, bias));
            assert!(b.reads_sequences(&ctx));
            let got = b.join(&join, &Ctx { sequences: &sequences, ..ctx }).unwrap();
            close("gated", &got, &(made + base).unwrap(), 1e-5).unwrap();
            // The rows of one sequence alone.
            let (h, stream) = (h.narrow(0, 3, 2).unwrap(), stream.narrow(0, 3, 2).unwrap());
            let alone = Join { output: &h, residual: &stream, norm: None };
            let made = b.join(&alone, &Ctx { sequences: &[span(0..2)], ..ctx }).unwrap();
            close("alone", &made, &got.narrow(0, 3, 2).unwrap(), 1e-6).unwrap();
            for wrong in [vec![], vec![span(0..1)], vec![span(1..2)]] {
                assert!(b.join(&alone, &Ctx { sequences: &wrong, ..ctx }).is_err());
            }
        }
    }

    #[test]
    fn stochastic_depth_leaves_whole_sequences_alone() {
        let set = AdapterSet::empty();
        let (rows, p) = (400, 0.25_f32);
        let (h, stream) = (randn(7, (rows, HIDDEN), 1.0).unwrap(), randn(8, (rows, HIDDEN), 1.0).unwrap());
        let sequences: Vec<_> = (0..rows / 2).map(|i| span(2 * i..2 * i + 2)).collect();
        let placement = Placement::Sequential { on_stream: false, residual: Residual::Output };
        let mut b = bottleneck(0, placement, Scaling::Fixed(1.0), [false, false], false);
        let eval = Ctx { sequences: &sequences, ..Ctx::eval(&set, &Route::Base) };
        let join = Join { output: &h, residual: &stream, norm: None };
        let base = (&h + &stream).unwrap();
        let whole = (b.join(&join, &eval).unwrap() - &base).unwrap();
        b.stochastic_depth = p;
        close("evaluation", &(b.join(&join, &eval).unwrap() - &base).unwrap(), &whole, 0.0).unwrap();
        let train = |step| Ctx { mode: Mode::Train { track: false }, rng: StepRng { seed: 1, step, run: 0 }, ..eval };
        assert!(b.reads_sequences(&train(0)) && !b.reads_sequences(&eval));
        let made = |step| (b.join(&join, &train(step)).unwrap() - &base).unwrap().to_vec2::<f32>().unwrap();
        let (got, whole) = (made(0), whole.to_vec2::<f32>().unwrap());
        let mut dropped = 0;
        for (got, whole) in got.chunks(2).zip(whole.chunks(2)) {
            let off = got.concat().iter().all(|x| x.abs() < 1e-6);
            dropped += usize::from(off);
            for (got, whole) in got.concat().iter().zip(whole.concat()).filter(|_| !off) {
                assert!((got - whole / (1.0 - p)).abs() < 1e-5, "{got} {whole}");
            }
        }
        // 200 sequences, of which a quarter goes: a standard deviation is 6.
        assert!((30..70).contains(&dropped), "{dropped}");
        assert!(made(1) != got && made(0) == got);
    }

    #[test]
    fn parameters_come_in_the_order_of_the_layers() {
        let b = bottleneck(0, Placement::Parallel, Scaling::Learned(parameter(40, &[1])), [true, true], false);
        let names: Vec<&str> = b.parameters().into_iter().map(Parameter::name).collect();
        assert_eq!(names, ["p20", "p21", "p1", "p2", "p3", "p4", "p40", "p30", "p31"]);
    }
}
