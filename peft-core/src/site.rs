//! Sites: the places of a base model that an adapter may touch.

use std::borrow::Cow;
use std::collections::HashMap;

use crate::error::{Error, Result};

/// The dense number of a site in its model's [`SiteTable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SiteId(pub u32);

impl SiteId {
    /// The id as an index.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What stands at a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SiteKind {
    /// A linear layer with weight `[out_features, in_features]`.
    Linear {
        /// Columns of the weight.
        in_features: usize,
        /// Rows of the weight.
        out_features: usize,
        /// Whether the layer has a bias.
        bias: bool,
    },
    /// A token embedding with weight `[vocab, dim]`.
    Embedding {
        /// Rows of the table.
        vocab: usize,
        /// Width of the table.
        dim: usize,
    },
    /// A normalisation with weight `[dim]`.
    Norm {
        /// Length of the weight.
        dim: usize,
        /// Whether there is a bias.
        bias: bool,
    },
    /// One linear layer for each expert of a mixture, which transformers holds as a parameter `[experts, out_features, in_features]`.
    Experts {
        /// How many there are.
        experts: usize,
        /// Columns of each weight.
        in_features: usize,
        /// Rows of each weight.
        out_features: usize,
    },
}

/// One site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// The site's number.
    pub id: SiteId,
    /// The module path that transformers uses: `model.layers.3.self_attn.q_proj`.
    pub path: String,
    /// What stands there.
    pub kind: SiteKind,
    /// Which segment runs it: 0 is the embedding, `1..=layers` the blocks, `layers + 1` the head.
    pub segment: usize,
    /// Whether this is the layer that makes logits, which `all-linear` leaves out.
    pub is_output_head: bool,
    /// Whether this is a router of experts: a linear layer that transformers has as a module of its own kind, so that no method
    /// finds it among the linear layers.
    pub is_router: bool,
    /// How its tensors lie in checkpoints.
    pub stored: Stored,
}

/// How the tensors of a site lie in the checkpoints of its family.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stored {
    /// The name in front of `.weight` and `.bias`, where it is not the site's path; of experts, the name in front of their number.
    pub name: Option<Cow<'static, str>>,
    /// Of experts, the layers whose weights, one below the other, are the weight of each: `gate_proj` and `up_proj`.
    pub parts: &'static [&'static str],
    /// Whether a linear layer is a `Conv1D`, whose weight is `[in, out]` there: PEFT's `fan_in_fan_out`.
    pub fan_in_fan_out: bool,
}

impl Site {
    /// The name of its tensors in checkpoints, in front of `.weight` and `.bias`.
    #[must_use]
    pub fn stored_name(&self) -> &str {
        self.stored.name.as_deref().unwrap_or(&self.path)
    }

    /// The name of the tensor with a part of an expert's weight in checkpoints.
    #[must_use]
    pub fn stored_part(&self, expert: usize, part: &str) -> String {
        format!("{}.{expert}.{part}.weight", self.stored_name())
    }

    /// `(in_features, out_features)` of a linear site.
    ///
    /// # Errors
    /// When the site is not linear; the message names it.
    pub fn linear_dims(&self) -> Result<(usize, usize)> {
        match self.kind {
            SiteKind::Linear { in_features, out_features, .. } => Ok((in_features, out_features)),
            _ => Err(Error::site(&self.path, "is not a linear layer")),
        }
    }
}

/// All sites of a model, in the order in which the forward pass meets them.
#[derive(Debug, Clone, Default)]
pub struct SiteTable {
    sites: Vec<Site>,
    by_path: HashMap<String, SiteId>,
}

impl SiteTable {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a site and gives its id.
    pub fn register(&mut self, path: impl Into<String>, kind: SiteKind, segment: usize) -> SiteId {
        let (id, path) = (SiteId(self.sites.len() as u32), path.into());
        self.by_path.insert(path.clone(), id);
        self.sites.push(Site {
            id,
            path,
            kind,
            segment,
            is_output_head: false,
            is_router: false,
            stored: Stored::default(),
        });
        id
    }

    /// Marks a site as the layer that makes logits.
    pub fn mark_output_head(&mut self, id: SiteId) {
        if let Some(site) = self.sites.get_mut(id.index()) {
            site.is_output_head = true;
        }
    }

    /// Marks a site as a router of experts.
    pub fn mark_router(&mut self, id: SiteId) {
        if let Some(site) = self.sites.get_mut(id.index()) {
            site.is_router = true;
        }
    }

    /// Says how the tensors of a site lie in checkpoints.
    pub fn set_stored(&mut self, id: SiteId, stored: Stored) {
        if let Some(site) = self.sites.get_mut(id.index()) {
            site.stored = stored;
        }
    }

    /// The site at `path`.
    #[must_use]
    pub fn find(&self, path: &str) -> Option<&Site> {
        self.by_path.get(path).and_then(|id| self.sites.get(id.index()))
    }

    /// All sites in order.
    pub fn iter(&self) -> impl Iterator<Item = &Site> {
        self.sites.iter()
    }

    /// The site with this id.
    #[must_use]
    pub fn get(&self, id: SiteId) -> Option<&Site> {
        self.sites.get(id.index())
    }

    /// How many sites there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sites.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sites.is_empty()
    }
}
