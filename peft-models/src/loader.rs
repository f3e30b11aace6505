//! Loading layers and registering their sites, in the order of the forward pass.

use peft_core::{Context, FrozenEmbedding, FrozenLinear, FrozenNorm, NormKind, Result, SiteKind, SiteTable, Stored};

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
