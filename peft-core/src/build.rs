//! What the build functions of methods share: from a config's selection to an adapter.

use crate::adapter_keys::{KEY_PREFIX, SOFT_PROMPT_KEY_PREFIX};
use crate::error::{Error, Result};
use crate::saved::trained_copy;
use crate::segmented::{BaseModel, Task};
use crate::select::{Candidate, ModuleKind, Selection};
use crate::select_spec::TargetSpec;
use crate::set::{Adapter, SiteAdapter};
use crate::site::{Site, SiteId, SiteKind, SiteTable};

use serde_json::{Map, Value};

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
        SiteKind::Linear { .. } if site.is_router => ModuleKind::Router,
        SiteKind::Linear { .. } => ModuleKind::Linear,
        SiteKind::Embedding { .. } => ModuleKind::Embedding,
        SiteKind::Norm { .. } => ModuleKind::Norm,
        SiteKind::Experts { .. } => ModuleKind::Experts,
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

/// Puts a trained copy of its own at every site of `modules_to_save`. Where the adapter has virtual tokens, they must be set
/// already: PEFT gives the copies other names beside them.
///
/// # Errors
/// When the base cannot be read, or a site is adapted already.
pub fn insert_saved(adapter: &mut Adapter, selection: &Selection, base: &dyn BaseModel) -> Result<()> {
    let prefix = if adapter.virtual_tokens().is_some() { SOFT_PROMPT_KEY_PREFIX } else { KEY_PREFIX };
    for &index in selection.saved.iter().flat_map(|saved| &saved.members) {
        let site = selected_site(base.sites(), index)?;
        let module = trained_copy(&format!("{prefix}{}", site.path), base.layer(site.id)?)?;
        adapter.insert(site.id, SiteAdapter::new(Some(module), None))?;
    }
    Ok(())
}

/// The keys of a config as PEFT completes them for the task of `base`: `task_type`, and for a head of its own the modules
/// of the head in `modules_to_save`, trained and stored whole (`PeftModelForSequenceClassification` and its like). Layers of the head that
/// the checkpoint has no weights for are among them, which PEFT leaves to the user.
///
/// # Errors
/// A `task_type` in `spec` that is not the base's.
pub fn task_keys(spec: &TargetSpec, base: &dyn BaseModel) -> Result<Map<String, Value>> {
    let task = base.task();
    if let Some(given) = spec.task_type.as_deref().filter(|given| *given != task.peft_name()) {
        let name = task.peft_name();
        return Err(Error::config("task_type", format!("is {given}, and this model's head is for {name}")));
    }
    let mut keys = Map::new();
    keys.insert("task_type".into(), task.peft_name().into());
    if let Task::Head { kind, .. } = task {
        let mut saved = spec.modules_to_save.clone();
        for name in kind.saved_modules() {
            if !saved.iter().any(|s| s == name) {
                saved.push((*name).into());
            }
        }
        let missing = |path: &&String| !saved.iter().any(|name| is_or_holds(name, path));
        let fresh: Vec<String> = base.fresh_layers().iter().filter(missing).cloned().collect();
        saved.extend(fresh);
        keys.insert("modules_to_save".into(), saved.into());
    }
    Ok(keys)
}

/// Whether a module called `name` (by the end of its path, as PEFT matches it) is the layer at `path` or holds it.
fn is_or_holds(name: &str, path: &str) -> bool {
    let upto = path.match_indices('.').map(|(dot, _)| dot).chain([path.len()]);
    upto.filter_map(|end| path.get(..end)).any(|module| module.ends_with(name))
}
