//! `target_modules` as PEFT writes it into a saved config.

use std::collections::{BTreeSet, HashMap};

use crate::select::Candidate;
use crate::select_modules::Modules;
use crate::select_spec::{TargetModules, TargetSpec};

/// From this many entries on PEFT shortens `target_modules` to minimal suffixes.
const MIN_TARGETS_TO_SHORTEN: usize = 20;

/// What PEFT writes as `target_modules` into adapter_config.json: `all-linear` becomes the modules' names, and a
/// list of 20 or more entries is shortened to suffixes that select the same modules (not for `peft_type` IA3).
/// Names come sorted (PEFT writes them in no particular order).
pub fn saved_target_modules(spec: &TargetSpec, peft_type: &str, candidates: &[Candidate<'_>]) -> Option<TargetModules> {
    let modules = Modules::new(candidates);
    let mut names: Vec<String> = match spec.target_modules.as_ref()? {
        TargetModules::Regex(pattern) => return Some(TargetModules::Regex(pattern.clone())),
        TargetModules::AllLinear => modules.all_linear(spec.task_type.as_deref()).into_iter().collect(),
        TargetModules::Names(names) => names.clone(),
    };
    names.sort();
    names.dedup();
    if names.len() < MIN_TARGETS_TO_SHORTEN || peft_type == "IA3" {
        return Some(TargetModules::Names(names));
    }
    let matched = |targets: &[String]| -> Vec<bool> {
        let set: BTreeSet<&str> = targets.iter().map(String::as_str).collect();
        modules.paths().map(|path| suffixes(path).any(|suffix| set.contains(suffix))).collect()
    };
    let before = matched(&names);
    let others: Vec<&str> = modules.paths().zip(&before).filter(|(_, hit)| !**hit).map(|(path, _)| path).collect();
    let short = minimal_target_modules(&names, &others);
    // The shortened list must select the same modules; PEFT trusts its algorithm here.
    let shorter = short.len() < names.len() && matched(&short) == before;
    Some(TargetModules::Names(if shorter { short } else { names }))
}

/// The shortest suffixes that tell `targets` from `others`, sorted (PEFT's `_find_minimal_target_modules`).
///
/// Targets are visited in the order of their suffix lists, short suffixes first; a target that an earlier suffix
/// covers adds nothing. A target that has no suffix of its own is left out, as in PEFT.
pub fn minimal_target_modules(targets: &[String], others: &[&str]) -> Vec<String> {
    let taken: std::collections::HashSet<&str> = others.iter().flat_map(|name| suffixes(name)).collect();
    let mut ordered: Vec<Vec<&str>> = targets.iter().map(|name| suffixes(name).collect()).collect();
    ordered.sort();
    let mut required: HashMap<&str, ()> = HashMap::new();
    for list in &ordered {
        // Covered means: a required suffix stands after a dot, so the full name itself does not count.
        let covered = list.iter().take(list.len().saturating_sub(1)).any(|suffix| required.contains_key(suffix));
        if covered {
            continue;
        }
        if let Some(suffix) = list.iter().find(|suffix| !required.contains_key(**suffix) && !taken.contains(**suffix)) {
            required.insert(suffix, ());
        }
    }
    let mut names: Vec<String> =
        if required.is_empty() { targets.to_vec() } else { required.into_keys().map(str::to_owned).collect() };
    names.sort();
    names
}

/// `c`, `b.c`, `a.b.c` for `a.b.c`.
fn suffixes(path: &str) -> impl Iterator<Item = &str> {
    path.rmatch_indices('.').map(|(dot, _)| dot + 1).filter_map(|start| path.get(start..)).chain(std::iter::once(path))
}
