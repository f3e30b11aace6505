//! What the build functions of methods share: from a config's selection to an adapter.

use crate::adapter_keys::KEY_PREFIX;
use crate::error::{Error, Result};
use crate::saved::trained_copy;
use crate::segmented::BaseModel;
use crate::select::{Candidate, ModuleKind, Selection};
use crate::set::{Adapter, SiteAdapter};
use crate::site::{Site, SiteId, SiteKind, SiteTable};

/// An adapter as built from a config, with what the config's patterns matched.
#[derive(Debug)]
pub struct Built {
    /// The adapter, its parameters as the config's initialisation starts them.
    pub adapter: Adapter,
    /// What each pattern matched.
    pub selection: Selection,
}

/// The sites of a model as the matcher takes them.
#[must_use]
pub fn candidates(sites: &SiteTable) -> Vec<Candidate<'_>> {
    let kind = |site: &Site| match site.kind {
        SiteKind::Linear { .. } => ModuleKind::Linear,
        SiteKind::Embedding { .. } => ModuleKind::Embedding,
        SiteKind::Norm { .. } => ModuleKind::Norm,
    };
    sites.iter().map(|s| Candidate { path: &s.path, kind: kind(s), is_output_head: s.is_output_head }).collect()
}

/// The site that a selection's index stands for.
///
/// # Errors
/// When the selection was made for other candidates.
pub fn selected_site(sites: &SiteTable, index: usize) -> Result<&Site> {
    let id = u32::try_from(index).ok().map(SiteId);
    id.and_then(|id| sites.get(id)).ok_or_else(|| Error::msg("a selected site does not exist"))
}

/// The key of a site's tensor in the adapter file.
#[must_use]
pub fn parameter_name(path: &str, suffix: &str) -> String {
    format!("{KEY_PREFIX}{path}.{suffix}")
}

/// Puts a trained copy of its own at every site of `modules_to_save`.
///
/// # Errors
/// When the base cannot be read, or a site is adapted already.
pub fn insert_saved(adapter: &mut Adapter, selection: &Selection, base: &dyn BaseModel) -> Result<()> {
    for &index in selection.saved.iter().flat_map(|saved| &saved.members) {
        let site = selected_site(base.sites(), index)?;
        let module = trained_copy(&format!("{KEY_PREFIX}{}", site.path), base.layer(site.id)?)?;
        adapter.insert(site.id, SiteAdapter::new(Some(module), None))?;
    }
    Ok(())
}
