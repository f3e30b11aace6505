//! The frozen layers that models are built from. Each asks the context which adapter acts at its site.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_kernels::{Branch, FrozenWeight, RoutedSpan, SequenceSpan, ServingForm};

use crate::ctx::{Ctx, Mode, Route, StepRng};
use crate::error::{Context, Error, Result};
use crate::sequences;
use crate::set::SiteModule;
use crate::site::SiteId;

/// A frozen linear layer at a site.
#[derive(Debug, Clone)]
pub struct FrozenLinear {
    site: SiteId,
    path: Arc<str>,
    weight: FrozenWeight,
    bias: Option<Tensor>,
    fan_in_fan_out: bool,
}

impl FrozenLinear {
    /// A layer at `site` with weight `[out, in]` and bias `[out]`.
    ///
    /// # Errors
    /// When the bias does not fit the weight.
    pub fn new(site: SiteId, path: impl Into<Arc<str>>, weight: FrozenWeight, bias: Option<Tensor>) -> Result<Self> {
        let path = path.into();
        if let Some(b) = &bias
            && b.dims() != [weight.out_features()]
        {
            return Err(Error::Shape {
                name: format!("{path}.bias"),
                actual: b.dims().to_vec(),
                expected: vec![weight.out_features()],
            });
        }
        Ok(Self { site, path, weight, bias, fan_in_fan_out: false })
    }

    /// This layer as a `Conv1D`, whose weight is `[in, out]` in files.
    #[must_use]
    pub fn as_conv1d(self) -> Self {
        Self { fan_in_fan_out: true, ..self }
    }

    /// Whether files have its weight as `[in, out]` (`Conv1D`); in memory it is `[out, in]` all the same.
    #[must_use]
    pub fn is_fan_in_fan_out(&self) -> bool {
        self.fan_in_fan_out
    }

    /// The site's id.
    #[must_use]
    pub fn site(&self) -> SiteId {
        self.site
    }

    /// The module path.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The weight `[out, in]`.
    #[must_use]
    pub fn weight(&self) -> &FrozenWeight {
        &self.weight
    }

    /// The bias `[out]`.
    #[must_use]
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The frozen layer alone: `x·Wᵀ + b`.
    ///
    /// # Errors
    /// When `x` has another width; the message names the site.
    pub fn base(&self, x: &Tensor) -> Result<Tensor> {
        peft_kernels::frozen_linear(x, &self.weight, self.bias.as_ref()).with_context(|| self.path.to_string())
    }

    /// The layer with whatever adapter `ctx` has here: `[tokens, in]` to `[tokens, out]`.
    ///
    /// # Errors
    /// When a tensor operation fails; the message names the site.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        match ctx.route {
            Route::Base => self.base(x),
            Route::Uniform(slot) => self.through(*slot, x, ctx),
            Route::Rows(runs) => self.routed(x, runs, ctx),
        }
    }

    /// Layers that read the same input, each with whatever adapter `ctx` has there: as [`FrozenLinear::forward`] of every
    /// one, with their low-rank adapters made together where all tokens use the same.
    ///
    /// # Errors
    /// When a tensor operation fails; the message names the sites.
    pub fn forward_siblings<const N: usize>(layers: [&Self; N], x: &Tensor, ctx: &Ctx<'_>) -> Result<[Tensor; N]> {
        let branches: Option<Vec<Branch<'_>>> = layers.iter().map(|l| l.branch(ctx)).collect();
        let results = match branches {
            Some(branches) => {
                peft_kernels::sibling_linears(x, &branches).with_context(|| layers.map(|l| l.path()).join(", "))?
            }
            None => layers.iter().map(|l| l.forward(x, ctx)).collect::<Result<_>>()?,
        };
        results.try_into().map_err(|r: Vec<_>| Error::msg(format!("{} results of {N} layers", r.len())))
    }

    /// This layer as one of several that are run together, where its adapter is no more than a low-rank change.
    fn branch(&self, ctx: &Ctx<'_>) -> Option<Branch<'_>> {
        let adapter = match ctx.route {
            Route::Base => None,
            Route::Uniform(slot) => ctx.adapters.at(*slot, self.site),
            Route::Rows(_) => return None,
        };
        let low_rank = match adapter {
            None => None,
            Some(adapter) if adapter.bias.is_some() => return None,
            Some(adapter) => match &adapter.module {
                Some(SiteModule::Linear(module)) => Some(module.low_rank(self, ctx)?),
                None | Some(SiteModule::Sublayer(_) | SiteModule::Attention(_)) => None,
                Some(_) => return None,
            },
        };
        Some(Branch { weight: &self.weight, bias: self.bias.as_ref(), low_rank })
    }

    /// Whether no adapter of `ctx` touches this layer.
    #[must_use]
    pub fn is_plain(&self, ctx: &Ctx<'_>) -> bool {
        !ctx.route.any_slot(|slot| ctx.adapters.at(slot, self.site).is_some())
    }

    /// Whether a module of `ctx` at this layer or behind it reads whole sequences, so that all their rows have to be made.
    #[must_use]
    pub fn reads_sequences(&self, ctx: &Ctx<'_>) -> bool {
        ctx.route.any_slot(|slot| self.slot_reads_sequences(slot, ctx))
    }

    fn slot_reads_sequences(&self, slot: usize, ctx: &Ctx<'_>) -> bool {
        let module = ctx.adapters.at(slot, self.site).and_then(|adapter| adapter.module.as_ref());
        module.is_some_and(|module| module.reads_sequences(ctx))
    }

    /// The sequences of the rows of `run`, counted from its start, where the module of `slot` reads them.
    pub(crate) fn sequences_of(
        &self,
        run: &Range<usize>,
        slot: Option<usize>,
        ctx: &Ctx<'_>,
    ) -> Result<Vec<SequenceSpan>> {
        match slot {
            Some(slot) if self.slot_reads_sequences(slot, ctx) => {
                sequences::within(ctx.sequences, run).with_context(|| self.path.to_string())
            }
            _ => Ok(Vec::new()),
        }
    }

    fn through(&self, slot: usize, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let Some(adapter) = ctx.adapters.at(slot, self.site) else { return self.base(x) };
        let y = match &adapter.module {
            Some(SiteModule::Linear(module)) => module.forward(self, x, ctx).with_context(|| self.path.to_string())?,
            None | Some(SiteModule::Sublayer(_) | SiteModule::Attention(_)) => self.base(x)?,
            Some(other) => return Err(Error::site(&*self.path, format!("{} on a linear layer", other.kind()))),
        };
        match (&adapter.bias, &self.bias) {
            // The trained bias takes the base bias's place.
            (Some(trained), Some(base)) => {
                let shift = (trained.get(ctx) - base.to_dtype(trained.dtype())?)?.to_dtype(y.dtype())?;
                Ok(peft_kernels::add_bias(&y, &shift)?)
            }
            (Some(trained), None) => Ok(peft_kernels::add_bias(&y, &trained.get(ctx).to_dtype(y.dtype())?)?),
            (None, _) => Ok(y),
        }
    }

    /// Runs of tokens through different adapters: the frozen product once for all tokens, then each run's serving form
    /// added in place. Runs whose adapter has no serving form here go through it apart.
    fn routed(&self, x: &Tensor, runs: &[(Range<usize>, Option<usize>)], ctx: &Ctx<'_>) -> Result<Tensor> {
        let mut forms: Vec<(Range<usize>, Option<Arc<ServingForm>>)> = Vec::with_capacity(runs.len());
        // Serving forms are those of evaluation, and made once.
        let mut all_fit = ctx.mode == Mode::Eval;
        for (run, slot) in runs {
            let form = match slot.and_then(|s| ctx.adapters.at(s, self.site)) {
                None => None,
                Some(adapter) => match adapter.serving_form(self)? {
                    Some(form) => Some(form),
                    None => {
                        all_fit = false;
                        break;
                    }
                },
            };
            forms.push((run.clone(), form));
        }
        if all_fit {
            let spans: Vec<RoutedSpan<'_>> = forms
                .iter()
                .filter_map(|(run, form)| Some(RoutedSpan { tokens: run.clone(), form: form.as_deref()? }))
                .collect();
            return peft_kernels::routed_linear(x, &self.weight, self.bias.as_ref(), &spans)
                .with_context(|| self.path.to_string());
        }
        let parts = runs
            .iter()
            .enumerate()
            .map(|(i, (run, slot))| {
                let x = x.narrow(0, run.start, run.len())?;
                let sequences = self.sequences_of(run, *slot, ctx)?;
                let first = ctx.first_of(run)?;
                let rng = StepRng { run: i as u32, ..ctx.rng };
                let ctx = &Ctx { rng, sequences: &sequences, first: first.as_ref(), ..*ctx };
                match slot {
                    Some(slot) => self.through(*slot, &x, ctx),
                    None => self.base(&x),
                }
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }
}

/// A frozen token embedding at a site.
#[derive(Debug, Clone)]
pub struct FrozenEmbedding {
    site: SiteId,
    path: Arc<str>,
    weight: FrozenWeight,
    dtype: DType,
}

impl FrozenEmbedding {
    /// An embedding at `site` with table `[vocab, dim]`, giving activations of type `dtype`.
    #[must_use]
    pub fn new(site: SiteId, path: impl Into<Arc<str>>, weight: FrozenWeight, dtype: DType) -> Self {
        Self { site, path: path.into(), weight, dtype }
    }

    /// The site's id.
    #[must_use]
    pub fn site(&self) -> SiteId {
        self.site
    }

    /// The module path.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The table `[vocab, dim]`.
    #[must_use]
    pub fn weight(&self) -> &FrozenWeight {
        &self.weight
    }

    /// The frozen rows of `ids`, untracked.
    ///
    /// # Errors
    /// When an id is outside the vocabulary.
    pub fn base(&self, ids: &[u32]) -> Result<Tensor> {
        Ok(self.weight.rows(ids).with_context(|| self.path.to_string())?.to_dtype(self.dtype)?)
    }

    /// The embeddings with whatever adapter `ctx` has here: `[ids.len(), dim]`.
    ///
    /// # Errors
    /// When an id is outside the vocabulary or a tensor operation fails.
    pub fn forward(&self, ids: &[u32], ctx: &Ctx<'_>) -> Result<Tensor> {
        let through = |ids: &[u32], slot: Option<usize>| match slot
            .and_then(|s| ctx.adapters.at(s, self.site))
            .and_then(|a| a.module.as_ref())
        {
            Some(SiteModule::Embedding(module)) => {
                module.forward(self, ids, ctx).with_context(|| self.path.to_string())
            }
            Some(other) => Err(Error::site(&*self.path, format!("{} on an embedding", other.kind()))),
            None => self.base(ids),
        };
        match ctx.route {
            Route::Base => self.base(ids),
            Route::Uniform(slot) => through(ids, Some(*slot)),
            Route::Rows(runs) => {
                let parts = runs
                    .iter()
                    .map(|(run, slot)| match ids.get(run.clone()) {
                        Some(ids) => through(ids, *slot),
                        None => Err(Error::site(&*self.path, "the route reaches past the batch")),
                    })
                    .collect::<Result<Vec<_>>>()?;
                Ok(Tensor::cat(&parts, 0)?)
            }
        }
    }

    /// The logits of `head`, which is tied to this table, for `hidden: [rows, dim]`: the head's own adapters, and those of
    /// this embedding that change the table itself.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn tied_logits(&self, head: &FrozenLinear, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        if !self.changes_tied_head(ctx) {
            return head.forward(hidden, ctx);
        }
        let run = |slot: Option<usize>, hidden: &Tensor, first: Option<&Tensor>| {
            let route = slot.map_or(Route::Base, Route::Uniform);
            let ctx = Ctx { route: &route, first, ..*ctx };
            let frozen = || head.forward(hidden, &ctx);
            match slot.and_then(|s| ctx.adapters.at(s, self.site)).and_then(|a| a.module.as_ref()) {
                Some(SiteModule::Embedding(m)) => m.tied_logits(hidden, &frozen, &ctx),
                _ => frozen(),
            }
        };
        match ctx.route {
            Route::Base => run(None, hidden, None),
            Route::Uniform(slot) => run(Some(*slot), hidden, ctx.first),
            Route::Rows(runs) => {
                let parts = runs
                    .iter()
                    .map(|(rows, slot)| {
                        run(*slot, &hidden.narrow(0, rows.start, rows.len())?, ctx.first_of(rows)?.as_ref())
                    })
                    .collect::<Result<Vec<_>>>()?;
                Ok(Tensor::cat(&parts, 0)?)
            }
        }
    }

    /// Whether an adapter of `ctx` changes the logits of a head tied to this table.
    #[must_use]
    pub fn changes_tied_head(&self, ctx: &Ctx<'_>) -> bool {
        let changes = |slot: usize| match ctx.adapters.at(slot, self.site).and_then(|a| a.module.as_ref()) {
            Some(SiteModule::Embedding(m)) => m.changes_tied_head(),
            _ => false,
        };
        ctx.route.any_slot(changes)
    }
}

/// Which normalisation a [`FrozenNorm`] is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// Root mean square; the weight is `offset + w` (1 for Gemma, else 0).
    Rms {
        /// What is added to the stored weight.
        offset: f32,
    },
    /// Mean and variance.
    Layer,
}

/// A frozen normalisation at a site.
#[derive(Debug, Clone)]
pub struct FrozenNorm {
    site: SiteId,
    path: Arc<str>,
    kind: NormKind,
    weight: Tensor,
    bias: Option<Tensor>,
    eps: f64,
}

impl FrozenNorm {
    /// A normalisation at `site` with weight and bias `[dim]`.
    #[must_use]
    pub fn new(
        site: SiteId,
        path: impl Into<Arc<str>>,
        kind: NormKind,
        weight: Tensor,
        bias: Option<Tensor>,
        eps: f64,
    ) -> Self {
        Self { site, path: path.into(), kind, weight, bias, eps }
    }

    /// The site's id.
    #[must_use]
    pub fn site(&self) -> SiteId {
        self.site
    }

    /// The module path.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The weight `[dim]`.
    #[must_use]
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias `[dim]`.
    #[must_use]
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// This normalisation with another weight and bias.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn apply(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let y = match self.kind {
            NormKind::Rms { offset } => peft_kernels::rms_norm(x, weight, self.eps, offset),
            NormKind::Layer => peft_kernels::layer_norm(x, weight, bias, self.eps),
        };
        y.with_context(|| self.path.to_string())
    }

    /// The normalisation with whatever adapter `ctx` has here.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let through = |x: &Tensor, slot: Option<usize>| match slot.and_then(|s| ctx.adapters.at(s, self.site)) {
            None => self.apply(x, &self.weight, self.bias.as_ref()),
            Some(adapter) => {
                let trained = adapter.bias.as_ref().map(|b| b.get(ctx));
                match &adapter.module {
                    Some(SiteModule::Norm(module)) => module.forward(self, x, ctx),
                    Some(other) => Err(Error::site(&*self.path, format!("{} on a norm", other.kind()))),
                    None => self.apply(x, &self.weight, trained.as_ref().or(self.bias.as_ref())),
                }
            }
        };
        match ctx.route {
            Route::Base => through(x, None),
            Route::Uniform(slot) => through(x, Some(*slot)),
            Route::Rows(runs) => {
                if !ctx.route.any_slot(|slot| ctx.adapters.at(slot, self.site).is_some()) {
                    return through(x, None);
                }
                let parts = runs
                    .iter()
                    .map(|(run, slot)| through(&x.narrow(0, run.start, run.len())?, *slot))
                    .collect::<Result<Vec<_>>>()?;
                Ok(Tensor::cat(&parts, 0)?)
            }
        }
    }
}
