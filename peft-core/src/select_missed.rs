//! What to say about patterns that hit nothing.

use std::collections::BTreeSet;

use crate::select::{Matcher, ModuleKind, UnmatchedPattern};
use crate::select_modules::Modules;
use crate::select_parameters::parameter_key;
use crate::suggest::{did_you_mean, nearest};

/// Collects what to say about patterns without a hit.
pub(crate) struct Missed<'a> {
    pub(crate) modules: &'a Modules<'a>,
    pub(crate) list: Vec<UnmatchedPattern>,
}

impl Missed<'_> {
    fn push(&mut self, key: &'static str, pattern: &str, advice: String) {
        self.list.push(UnmatchedPattern { key, pattern: pattern.to_owned(), advice });
    }

    pub(crate) fn name(&mut self, key: &'static str, name: &str, what: &str) {
        let mut near = did_you_mean(name, self.modules.short_names());
        if near.is_empty() {
            near = did_you_mean(name, &self.modules.containers);
        }
        self.push(key, name, format!("{what}{near}"));
    }

    fn regex(&mut self, key: &'static str, pattern: &str) {
        let ends = |path: &str| path == pattern || path.strip_suffix(pattern).is_some_and(|rest| rest.ends_with('.'));
        let advice = if self.modules.paths().any(ends) {
            format!(
                "matches no module: a string is a regular expression over the whole name; for all modules called \
                 `{pattern}` give a list: [\"{pattern}\"]"
            )
        } else {
            match self.modules.candidates.iter().find(|candidate| candidate.kind == ModuleKind::Linear) {
                Some(example) => format!("matches no module; it has to match a whole name such as `{}`", example.path),
                None => "matches no module".to_owned(),
            }
        };
        self.push(key, pattern, advice);
    }

    /// A name in `target_parameters`: the nearest are the last one to three parts of the parameters' names.
    pub(crate) fn parameter(&mut self, key: &'static str, name: &str) {
        let keys: Vec<String> = self.modules.candidates.iter().map(parameter_key).collect();
        let ends = keys.iter().flat_map(|key| {
            let dots: Vec<usize> = key.rmatch_indices('.').map(|(dot, _)| dot + 1).take(3).collect();
            dots.into_iter().filter_map(|start| key.get(start..))
        });
        let near = did_you_mean(name, ends.collect::<BTreeSet<&str>>());
        self.push(key, name, format!("matches no weight of the model{near}"));
    }

    pub(crate) fn experts(&mut self, pattern: &str) {
        let advice = "names the weights of experts, which are parameters and no module: LoRA adapts them through `target_parameters`";
        self.push("target_modules", pattern, advice.to_owned());
    }

    pub(crate) fn target(&mut self, pattern: &str, matcher: &Matcher) {
        match matcher {
            Matcher::Name(_) => self.name("target_modules", pattern, "matches no module"),
            Matcher::Regex(_) => self.regex("target_modules", pattern),
            Matcher::Set(_) => self.push("target_modules", pattern, "finds no linear layer in this model".to_owned()),
        }
    }

    pub(crate) fn exclude(&mut self, pattern: &str, matcher: &Matcher, hit_container: bool) {
        match matcher {
            Matcher::Name(name) if hit_container => self.push(
                "exclude_modules",
                pattern,
                format!(
                    "names a group of modules and keeps out nothing: only modules of exactly that name are meant; for all \
                     inside it use the pattern \"(.*\\.)?{}\\..*\"",
                    name.replace('.', "\\.")
                ),
            ),
            Matcher::Regex(_) if !hit_container => self.regex("exclude_modules", pattern),
            _ => self.name("exclude_modules", pattern, "keeps out no module"),
        }
    }

    pub(crate) fn layer(&mut self, index: i64, seen: &BTreeSet<i64>, patterns: &[String]) {
        let advice = match (seen.first(), seen.last()) {
            (Some(first), Some(last)) => format!("is no layer with a target; the layers are {first} to {last}"),
            _ if patterns.is_empty() => {
                "hits nothing: no layer number was found in the targets' names; set `layers_pattern` to the name of the \
                 list of layers, for example \"layers\""
                    .to_owned()
            }
            _ => {
                let lists: BTreeSet<&str> = self
                    .modules
                    .paths()
                    .filter_map(|path| path.strip_suffix(".0"))
                    .filter_map(|path| path.rsplit('.').next())
                    .collect();
                let near: Vec<String> = lists.iter().map(|name| format!("`{name}`")).collect();
                format!(
                    "hits nothing: `layers_pattern` {patterns:?} is in no target's name{}{}",
                    if near.is_empty() { "" } else { "; lists of layers in this model: " },
                    near.join(", ")
                )
            }
        };
        self.push("layers_to_transform", &index.to_string(), advice);
    }

    pub(crate) fn pattern_key(&mut self, key: &'static str, pattern: &str, sites: &[&str]) {
        let untargeted = self
            .modules
            .paths()
            .any(|path| path == pattern || path.strip_suffix(pattern).is_some_and(|rest| rest.ends_with('.')));
        if untargeted {
            self.push(key, pattern, "matches no module that `target_modules` selects".to_owned());
            return;
        }
        let mut names: BTreeSet<&str> = sites.iter().copied().collect();
        names.extend(sites.iter().filter_map(|path| path.rsplit('.').next()));
        let short: BTreeSet<&str> = names.iter().copied().filter(|name| !name.contains('.')).collect();
        let near = if pattern.contains('.') { nearest(pattern, &names) } else { nearest(pattern, &short) };
        let near = if near.is_empty() { String::new() } else { did_you_mean(pattern, near) };
        self.push(key, pattern, format!("matches no adapted module{near}"));
    }
}
