//! Selecting sites that a method finds by itself, under PEFT's rules for `exclude_modules` and `modules_to_save`.

use peft_core::select::{PatternHits, Selection};
use peft_core::{Candidate, Result, SelectRules, TargetModules, TargetSpec, Unmatched, select, select_saved};

/// The sites at `paths` but for those of `modules_to_save`, which are trained whole anyway. In the plan, `(key, words)` stands for
/// the paths.
pub(crate) fn select_paths(
    spec: &TargetSpec,
    mut paths: Vec<String>,
    (key, words): (&'static str, &str),
    candidates: &[Candidate<'_>],
    rules: &SelectRules<'_>,
) -> Result<Selection> {
    let saved = select_saved(spec, candidates, Unmatched::Report)?.saved;
    let members = || saved.iter().flat_map(|saved| &saved.members).filter_map(|&i| candidates.get(i));
    paths.retain(|path| members().all(|saved| saved.path != path));
    let spec = TargetSpec { target_modules: Some(TargetModules::Names(paths)), ..spec.clone() };
    let mut selection = select(&spec, candidates, rules)?;
    selection.hits.retain(|hits| hits.key != "target_modules");
    selection.hits.insert(0, PatternHits { key, pattern: words.to_owned(), hits: selection.sites.len() });
    Ok(selection)
}
