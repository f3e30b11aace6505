//! `target_parameters`: weights by the names that they have as parameters, as PEFT's `_inject_parameters` matches them.

use std::collections::BTreeSet;

use crate::error::{Error, Result};
use crate::python_regex::PythonRegex;
use crate::select::{Candidate, Found, ModuleKind, PatternHits, SelectRules, matchers};
use crate::select_missed::Missed;
use crate::select_spec::{TargetModules, TargetSpec};

const KEY: &str = "target_parameters";

/// The name of a candidate's weight as a parameter of the model.
pub(crate) fn parameter_key(candidate: &Candidate<'_>) -> String {
    match candidate.kind {
        ModuleKind::Experts => candidate.path.to_owned(),
        _ => format!("{}.weight", candidate.path),
    }
}

/// The candidates whose weights `target_parameters` names, by the whole name or its end after a dot. As in PEFT, neither
/// `exclude_modules` nor `layers_to_transform` acts on them.
pub(crate) fn select_parameters(
    spec: &TargetSpec,
    candidates: &[Candidate<'_>],
    rules: &SelectRules<'_>,
    hits: &mut Vec<PatternHits>,
    missed: &mut Missed<'_>,
) -> Result<Vec<usize>> {
    let names: BTreeSet<&str> = spec.target_parameters.iter().map(String::as_str).collect();
    let mut counts = vec![0usize; names.len()];
    let mut chosen = Vec::new();
    if names.is_empty() {
        return Ok(chosen);
    }
    for (index, candidate) in candidates.iter().enumerate().filter(|(_, c)| c.kind != ModuleKind::Other) {
        let key = parameter_key(candidate);
        let ends = |name: &str| key == name || key.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'));
        let Some(at) = names.iter().position(|name| ends(name)) else { continue };
        if !matches!(candidate.kind, ModuleKind::Linear | ModuleKind::Router | ModuleKind::Experts) {
            let name = names.iter().nth(at).copied().unwrap_or_default();
            return Err(Error::config(
                KEY,
                format!(
                    "`{name}` matches {key}, which is {} and not a weight that {} adapts there",
                    candidate.kind.noun(),
                    rules.method
                ),
            ));
        }
        counts.iter_mut().zip(&names).filter(|(_, name)| ends(name)).for_each(|(count, _)| *count += 1);
        chosen.push(index);
    }
    for (name, count) in names.iter().zip(counts) {
        hits.push(PatternHits { key: KEY, pattern: (*name).to_owned(), hits: count });
        if count == 0 {
            missed.parameter(KEY, name);
        }
    }
    Ok(chosen)
}

/// Whether a spec with a regular expression matches a name: PEFT's `check_target_module_exists`, which it asks about names that are
/// no module's as well.
///
/// # Errors
/// A pattern that is not a valid Python regular expression.
pub fn target_matches(spec: &TargetSpec, name: &str) -> Result<bool> {
    let find = |key: &'static str, modules: &Option<TargetModules>| -> Result<bool> {
        let Some(modules) = modules else { return Ok(false) };
        for (_, matcher) in matchers(key, modules, BTreeSet::new)? {
            if matcher.find(name)? != Found::No {
                return Ok(true);
            }
        }
        Ok(false)
    };
    if find("exclude_modules", &spec.exclude_modules)? {
        return Ok(false);
    }
    for saved in &spec.modules_to_save {
        if PythonRegex::match_within("modules_to_save", r"(^|.*\.)", saved, r"($|\..*)")?.is_match(name)? {
            return Ok(false);
        }
    }
    find("target_modules", &spec.target_modules)
}
