//! Loading layers and registering their sites, in the order of the forward pass.

use std::borrow::Cow;

use peft_core::kernels::FrozenWeight;
use peft_core::{
    Context, FrozenEmbedding, FrozenExperts, FrozenLinear, FrozenNorm, NormKind, Result, SiteKind, SiteTable, Stored,
};

use crate::source::{Placement, WeightSource};

/// Registers a site for every layer that is loaded.
pub(crate) struct Loader<'a> {
    source: &'a dyn WeightSource,
    placement: &'a Placement,
    /// The sites so far.
    pub(crate) sites: SiteTable,
    /// The segment that runs the layers to come.
    pub(crate) segment: usize,
}

impl<'a> Loader<'a> {
    /// Loads from `source`, beginning with segment 0.
    pub(crate) fn new(source: &'a dyn WeightSource, placement: &'a Placement) -> Self {
        Self { source, placement, sites: SiteTable::new(), segment: 0 }
    }

    /// A linear layer with weight `[out, inp]`.
    pub(crate) fn linear(&mut self, path: &str, inp: usize, out: usize, bias: bool) -> Result<FrozenLinear> {
        self.linear_from(self.source, path, inp, out, bias)
    }

    /// A linear layer whose weights are in another source.
    pub(crate) fn linear_from(
        &mut self,
        source: &dyn WeightSource,
        path: &str,
        inp: usize,
        out: usize,
        bias: bool,
    ) -> Result<FrozenLinear> {
        let weight = source.weight(&format!("{path}.weight"), (out, inp))?;
        let bias_tensor = if bias { Some(source.vector(&format!("{path}.bias"), out)?) } else { None };
        let kind = SiteKind::Linear { in_features: inp, out_features: out, bias };
        let site = self.sites.register(path, kind, self.segment);
        FrozenLinear::new(site, path, weight, bias_tensor)
    }

    /// A `Conv1D` of transformers: a linear layer whose weight is `[inp, out]` in the source. It is turned once, here, so that
    /// everything else finds `[out, inp]`.
    pub(crate) fn conv1d(&mut self, path: &str, inp: usize, out: usize, bias: bool) -> Result<FrozenLinear> {
        let name = format!("{path}.weight");
        let stored = self.source.weight(&name, (inp, out))?;
        let weight = stored.transposed().with_context(|| name)?;
        let bias_tensor = if bias { Some(self.source.vector(&format!("{path}.bias"), out)?) } else { None };
        let kind = SiteKind::Linear { in_features: inp, out_features: out, bias };
        let site = self.sites.register(path, kind, self.segment);
        self.sites.set_stored(site, Stored { fan_in_fan_out: true, ..Stored::default() });
        Ok(FrozenLinear::new(site, path, weight, bias_tensor)?.as_conv1d())
    }

    /// A router with weight `[experts, inp]`, which checkpoints may have under the name `stored`.
    pub(crate) fn router(&mut self, path: &str, stored: &str, inp: usize, experts: usize) -> Result<FrozenLinear> {
        let name = if self.source.contains(&format!("{stored}.weight")) { stored } else { path };
        let weight = self.source.weight(&format!("{name}.weight"), (experts, inp))?;
        let kind = SiteKind::Linear { in_features: inp, out_features: experts, bias: false };
        let site = self.sites.register(path, kind, self.segment);
        self.sites.mark_router(site);
        self.sites.set_stored(site, Stored { name: Some(Cow::Owned(stored.to_owned())), ..Stored::default() });
        FrozenLinear::new(site, path, weight, None)
    }

    /// The weights `[out, inp]` of experts. In checkpoints each expert has `parts` of `out / parts.len()` rows under `stored`, or all
    /// are one tensor under `path`.
    pub(crate) fn experts(
        &mut self,
        path: &str,
        stored: &str,
        parts: &'static [&'static str],
        [experts, inp, out]: [usize; 3],
    ) -> Result<FrozenExperts> {
        let kind = SiteKind::Experts { experts, in_features: inp, out_features: out };
        let site = self.sites.register(path, kind, self.segment);
        let layout = Stored { name: Some(Cow::Owned(stored.to_owned())), parts, ..Stored::default() };
        self.sites.set_stored(site, layout);
        let name = |expert: usize, part: &str| format!("{stored}.{expert}.{part}.weight");
        let apart = parts.iter().any(|part| self.source.contains(&name(0, part)));
        let weights = if !apart && self.source.contains(path) {
            self.source.experts(path, (experts, out, inp))?
        } else {
            let rows = out / parts.len().max(1);
            let expert = |expert: usize| -> Result<FrozenWeight> {
                let own = parts.iter().map(|part| self.source.weight(&name(expert, part), (rows, inp)));
                let own = own.collect::<Result<Vec<_>>>()?;
                match own.as_slice() {
                    [one] => Ok(one.clone()),
                    several => FrozenWeight::stacked(several).with_context(|| name(expert, "*")),
                }
            };
            (0..experts).map(expert).collect::<Result<_>>()?
        };
        FrozenExperts::new(site, path, weights)
    }

    /// A normalisation of width `dim`; a layer norm has a bias, an RMS norm has none.
    pub(crate) fn norm(&mut self, path: &str, dim: usize, kind: NormKind, eps: f64) -> Result<FrozenNorm> {
        let has_bias = kind == NormKind::Layer;
        let weight = self.source.vector(&format!("{path}.weight"), dim)?;
        let bias = if has_bias { Some(self.source.vector(&format!("{path}.bias"), dim)?) } else { None };
        let site = self.sites.register(path, SiteKind::Norm { dim, bias: has_bias }, self.segment);
        Ok(FrozenNorm::new(site, path, kind, weight, bias, eps))
    }

    /// An embedding with table `[vocab, dim]`.
    pub(crate) fn embedding(&mut self, path: &str, vocab: usize, dim: usize) -> Result<FrozenEmbedding> {
        let table = self.source.weight(&format!("{path}.weight"), (vocab, dim))?;
        let site = self.sites.register(path, SiteKind::Embedding { vocab, dim }, self.segment);
        Ok(FrozenEmbedding::new(site, path, table, self.placement.activations))
    }
}
