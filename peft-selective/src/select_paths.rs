//! Selecting sites that a method finds by itself, under PEFT's rules for `exclude_modules` and `modules_to_save`.

use peft_core::select::{PatternHits, Selection};
use peft_core::{Candidate, Result, SelectRules, TargetModules, TargetSpec, select};

/// The sites at `paths`, with the other keys of `spec` as they are. In the plan, `(key, words)` stands for the paths.
pub(crate) fn select_paths(
    spec: &TargetSpec,
    paths: Vec<String>,
    (key, words): (&'static str, &str),
    candidates: &[Candidate<'_>],
    rules: &SelectRules<'_>,
) -> Result<Selection> {
    let spec = TargetSpec { target_modules: Some(TargetModules::Names(paths)), ..spec.clone() };
    let mut selection = select(&spec, candidates, rules)?;
    selection.hits.retain(|hits| hits.key != "target_modules");
    selection.hits.insert(0, PatternHits { key, pattern: words.to_owned(), hits: selection.sites.len() });
    Ok(selection)
}
