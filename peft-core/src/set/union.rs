//! One adapter that does what several do.

use serde_json::{Map, Value};

use super::{Adapter, SiteAdapter};
use crate::error::{Error, Result};
use crate::site::{SiteId, SiteTable};

/// `peft_type` of such an adapter; PEFT has none, so the name is ours.
pub const UNION: &str = "UNION";
/// The key of its config under which those of its parts are a list.
pub const UNION_PARTS: &str = "methods";

impl Adapter {
    /// One adapter of several for the same model, each with what it does: modules at sites, virtual tokens, shared parameters. Their
    /// configs are a list under [`UNION_PARTS`] of `config`, in order. Where several train a copy of the same layer, such as a class head,
    /// the first one's stays.
    ///
    /// # Errors
    /// Two that change the same site or put virtual tokens in front, or one that depends on the task, reads a first
    /// pass or acts on the training loop.
    pub fn union(parts: Vec<Self>, mut config: Map<String, Value>, sites: &SiteTable) -> Result<Self> {
        let own: Vec<Value> = parts.iter().map(|part| part.config.clone().into()).collect();
        let exported: Vec<Value> = parts
            .iter()
            .map(|part| part.config.iter().chain(&part.export_keys).map(|(k, v)| (k.clone(), v.clone())))
            .map(|keys| Value::Object(keys.collect()))
            .collect();
        let differs = own != exported;
        config.insert(UNION_PARTS.to_owned(), own.into());
        let mut whole = Self::new(config, sites);
        if differs {
            whole.set_export_key(UNION_PARTS, exported.into());
        }
        for part in parts {
            whole.absorb(part, sites)?;
        }
        Ok(whole)
    }

    fn absorb(&mut self, other: Self, sites: &SiteTable) -> Result<()> {
        let refused =
            |why: &str| Err(Error::msg(format!("{} cannot be one of several methods: {why}", other.peft_type())));
        if other.tasks.is_some() {
            return refused("it does another thing for each task");
        }
        if other.first_pass {
            return refused("it reads a first pass over the base alone");
        }
        if other.training_hook.is_some() {
            return refused("it acts on the training loop");
        }
        if self.virtual_tokens.is_some() && other.virtual_tokens.is_some() {
            return refused("another one puts virtual tokens in front already");
        }
        for (i, theirs) in other.sites.into_iter().enumerate() {
            let (Some(theirs), Some(ours)) = (theirs, self.sites.get_mut(i)) else { continue };
            let path = sites.get(SiteId(i as u32)).map_or("", |site| site.path.as_str());
            *ours = Some(match ours.take() {
                None => theirs,
                Some(ours) => both(ours, theirs, path)?,
            });
        }
        self.virtual_tokens = self.virtual_tokens.take().or(other.virtual_tokens);
        self.constants.extend(other.constants);
        self.fixed.extend(other.fixed);
        self.shared.extend(other.shared);
        self.export_tensors.extend(other.export_tensors);
        Ok(())
    }
}

/// What two adapters do at one site, of which only one may have a module and only one a bias.
fn both(ours: SiteAdapter, theirs: SiteAdapter, path: &str) -> Result<SiteAdapter> {
    let is_copy = |adapter: &SiteAdapter| {
        adapter.bias.is_none()
            && adapter
                .parameters()
                .iter()
                .all(|p| ["weight", "bias"].iter().any(|end| p.name().ends_with(&format!("{path}.{end}"))))
    };
    if is_copy(&ours) && is_copy(&theirs) {
        return Ok(ours);
    }
    if (ours.module.is_some() && theirs.module.is_some()) || (ours.bias.is_some() && theirs.bias.is_some()) {
        let kind = |adapter: &SiteAdapter| adapter.module.as_ref().map_or("a bias", super::SiteModule::kind);
        let message = format!(
            "two of the methods change `{path}`, with {} and {}: give them other targets",
            kind(&ours),
            kind(&theirs)
        );
        return Err(Error::msg(message));
    }
    Ok(SiteAdapter::new(ours.module.or(theirs.module), ours.bias.or(theirs.bias)))
}
