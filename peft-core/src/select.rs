//! Which modules of a model an adapter touches, exactly as Hugging Face PEFT decides it.
//!
//! The rules are those of `check_target_module_exists`, `_maybe_include_all_linear_layers`, `get_pattern_key` and
//! `_set_trainable` (peft 0.21.2). One thing is stricter: a pattern that hits nothing is an error that names the
//! nearest module names ([`Unmatched::Error`]). PEFT ignores such patterns, so for configs that PEFT wrote there
//! is [`Unmatched::Report`].

use std::collections::BTreeSet;

use crate::error::{Error, Result};
use crate::python_regex::PythonRegex;
use crate::select_layers::LayerFilter;
use crate::select_missed::Missed;
use crate::select_modules::Modules;
pub use crate::select_parameters::target_matches;
use crate::select_parameters::{parameter_key, select_parameters};
pub use crate::select_saved::{minimal_target_modules, saved_target_modules};
use crate::select_spec::{TargetModules, TargetSpec};

/// What a module is, as far as adapters care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ModuleKind {
    /// A linear layer, or GPT-2's transposed `Conv1D`.
    Linear,
    /// An embedding table.
    Embedding,
    /// A layer norm or RMS norm.
    Norm,
    /// A router of experts, a module of its own kind in transformers.
    Router,
    /// The weights of experts: in transformers a parameter and no module, found by `target_parameters` alone.
    Experts,
    /// Any other module, containers included.
    Other,
}

impl ModuleKind {
    pub(crate) fn noun(self) -> &'static str {
        match self {
            Self::Linear => "a linear layer",
            Self::Embedding => "an embedding",
            Self::Norm => "a norm",
            Self::Router => "a router of experts",
            Self::Experts => "the weights of experts",
            Self::Other => "not a layer with a weight matrix",
        }
    }
}

/// A module that could be selected. `path` is its name inside the base model (`model.layers.0.mlp.up_proj`).
/// Containers (`model.layers.0.mlp`) need not be listed: they follow from the paths.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Name inside the base model, without `base_model.model.`.
    pub path: &'a str,
    /// What the module is.
    pub kind: ModuleKind,
    /// Whether it is the language-model head (transformers' `get_output_embeddings`).
    pub is_output_head: bool,
}

/// What to do about a pattern that hits nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unmatched {
    /// Refuse, with the nearest names: for what a user wrote.
    #[default]
    Error,
    /// List it in [`Selection::unmatched`]: for configs of existing adapters, where PEFT ignored it too.
    Report,
}

/// What a method can adapt.
#[derive(Debug, Clone, Copy)]
pub struct SelectRules<'a> {
    /// Name of the method, for messages (`LoRA`).
    pub method: &'a str,
    /// Kinds of module that it can adapt; matching another kind is an error, as in PEFT.
    pub supported: &'a [ModuleKind],
    /// What to do about patterns without a hit.
    pub unmatched: Unmatched,
}

impl SelectRules<'static> {
    /// LoRA and its variants: linear layers and embeddings, unmatched patterns refused.
    pub const LORA: Self =
        Self { method: "LoRA", supported: &[ModuleKind::Linear, ModuleKind::Embedding], unmatched: Unmatched::Error };
}

/// One adapted module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SelectedSite {
    /// Index into the candidates.
    pub index: usize,
    /// Rank from `rank_pattern`, if an entry matches.
    pub rank: Option<usize>,
    /// Alpha from `alpha_pattern`, if an entry matches.
    pub alpha: Option<f64>,
}

/// One module that is trained and saved whole (`modules_to_save`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedModule {
    /// Name inside the base model; may be a container such as `classifier`.
    pub path: String,
    /// Indices of the candidates that it is or contains.
    pub members: Vec<usize>,
}

/// How often one pattern of the config was decisive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PatternHits {
    /// Config key (`target_modules`, `rank_pattern`, …).
    pub key: &'static str,
    /// The pattern as written (a layer index for `layers_to_transform`).
    pub pattern: String,
    /// Modules adapted through it; modules it kept out for `exclude_modules`; modules saved for `modules_to_save`.
    pub hits: usize,
}

/// A pattern that hit nothing, with what to say about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnmatchedPattern {
    /// Config key.
    pub key: &'static str,
    /// The pattern as written.
    pub pattern: String,
    /// Why, and the nearest names.
    pub advice: String,
}

impl std::fmt::Display for UnmatchedPattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}`: `{}` {}", self.key, self.pattern, self.advice)
    }
}

/// The result of [`select`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Selection {
    /// Adapted modules in the order of the candidates.
    pub sites: Vec<SelectedSite>,
    /// Weights adapted through `target_parameters`, in the order of the candidates.
    pub parameters: Vec<SelectedSite>,
    /// Modules that are trained whole.
    pub saved: Vec<SavedModule>,
    /// Hits per pattern, in the order of the config; `all-linear` is one pattern.
    pub hits: Vec<PatternHits>,
    /// Patterns without a hit (only with [`Unmatched::Report`]).
    pub unmatched: Vec<UnmatchedPattern>,
}

/// One entry of `target_modules` or `exclude_modules`, compiled.
pub(crate) enum Matcher {
    /// The whole name, or its end after a dot.
    Name(String),
    Regex(PythonRegex),
    /// Exactly these modules (all-linear).
    Set(BTreeSet<String>),
}

#[derive(PartialEq, Clone, Copy)]
pub(crate) enum Found {
    No,
    Suffix,
    /// Through the full name or a regex: `layers_to_transform` does not apply.
    Exact,
}

impl Matcher {
    pub(crate) fn find(&self, path: &str) -> Result<Found> {
        Ok(match self {
            Self::Name(name) if path == name => Found::Exact,
            Self::Name(name) if path.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.')) => {
                Found::Suffix
            }
            Self::Name(_) => Found::No,
            Self::Regex(regex) => {
                if regex.is_match(path)? {
                    Found::Exact
                } else {
                    Found::No
                }
            }
            Self::Set(names) => {
                if names.contains(path) {
                    Found::Exact
                } else {
                    Found::No
                }
            }
        })
    }
}

pub(crate) fn matchers(
    key: &str,
    modules: &TargetModules,
    all_linear: impl Fn() -> BTreeSet<String>,
) -> Result<Vec<(String, Matcher)>> {
    Ok(match modules {
        TargetModules::Names(names) => {
            let mut seen = BTreeSet::new();
            names
                .iter()
                .filter(|name| seen.insert(*name))
                .map(|name| (name.clone(), Matcher::Name(name.clone())))
                .collect()
        }
        TargetModules::Regex(pattern) => vec![(pattern.clone(), Matcher::Regex(PythonRegex::fullmatch(key, pattern)?))],
        TargetModules::AllLinear => vec![("all-linear".to_owned(), Matcher::Set(all_linear()))],
    })
}

/// The modules that `spec` selects among `candidates`.
///
/// # Errors
/// A pattern that is not a valid Python regular expression, one that hits nothing (unless `rules` says otherwise),
/// a target that is not of a supported kind, keys that exclude one another, and a spec that selects no module at
/// all. `target_modules: null` has to be filled in before ([`TargetSpec::fill_default_targets`]).
pub fn select(spec: &TargetSpec, candidates: &[Candidate<'_>], rules: &SelectRules<'_>) -> Result<Selection> {
    spec.validate()?;
    let none = TargetModules::Names(Vec::new());
    let parameters_only = (!spec.target_parameters.is_empty()).then_some(&none);
    let Some(target_modules) = spec.target_modules.as_ref().or(parameters_only) else {
        return Err(Error::config(
            "target_modules",
            "is not given; name the modules to adapt, for example [\"q_proj\", \"v_proj\"] or \"all-linear\"",
        ));
    };
    let modules = Modules::new(candidates);
    let targets = matchers("target_modules", target_modules, || modules.all_linear(spec.task_type.as_deref()))?;
    let excludes = match &spec.exclude_modules {
        Some(exclude) => matchers("exclude_modules", exclude, BTreeSet::new)?,
        None => Vec::new(),
    };
    let save_guards = spec
        .modules_to_save
        .iter()
        .map(|name| PythonRegex::match_within("modules_to_save", r"(^|.*\.)", name, r"($|\..*)"))
        .collect::<Result<Vec<_>>>()?;
    let layers = LayerFilter::new(spec)?;

    let mut target_hits = vec![Hits::default(); targets.len()];
    let mut names_experts = vec![false; targets.len()];
    let mut exclude_hits = vec![Hits::default(); excludes.len()];
    let mut layer_hits = vec![0usize; layers.as_ref().map_or(0, |layers| layers.indices.len())];
    let mut layers_seen = BTreeSet::new();
    let mut chosen: Vec<usize> = Vec::new();
    for (position, path) in modules.paths().enumerate() {
        // PEFT knows no such module.
        if candidates.get(position).is_some_and(|c| c.kind == ModuleKind::Experts) {
            for ((_, matcher), named) in targets.iter().zip(&mut names_experts) {
                *named = *named || matcher.find(path)? != Found::No;
            }
            continue;
        }
        // PEFT looks at the name alone first, so excluding and guarding go over containers too.
        let mut kept_out = false;
        for (hits, (_, matcher)) in exclude_hits.iter_mut().zip(&excludes) {
            if matcher.find(path)? != Found::No {
                let has_weights = candidates.get(position).is_some_and(|c| c.kind != ModuleKind::Other);
                hits.add(has_weights, !kept_out);
                kept_out = true;
            }
        }
        for guard in &save_guards {
            kept_out = kept_out || guard.is_match(path)?;
        }

        // As in PEFT, a full name among the entries wins over suffixes and is not subject to the layer filter.
        let mut finds = Vec::with_capacity(targets.len());
        for (_, matcher) in &targets {
            finds.push(matcher.find(path)?);
        }
        let best = if finds.contains(&Found::Exact) { Found::Exact } else { Found::Suffix };
        if !finds.contains(&best) {
            continue;
        }
        let mut passes = !kept_out;
        if let (Some(layers), Found::Suffix) = (&layers, best) {
            let layer = layers.layer(path)?;
            layers_seen.extend(layer);
            let at = layer.and_then(|layer| layers.indices.iter().position(|index| *index == layer));
            if let Some(hits) = at.and_then(|at| layer_hits.get_mut(at)) {
                *hits += 1;
            }
            passes = passes && at.is_some();
        }
        let first = finds.iter().position(|found| *found == best);
        for (at, (hits, found)) in target_hits.iter_mut().zip(&finds).enumerate() {
            if *found != Found::No {
                hits.add(position < candidates.len(), passes && Some(at) == first);
            }
        }
        if passes {
            let pattern = first.and_then(|at| targets.get(at)).map_or("", |(pattern, _)| pattern.as_str());
            let kind = candidates.get(position).map_or(ModuleKind::Other, |candidate| candidate.kind);
            if !rules.supported.contains(&kind) {
                return Err(unsupported(rules, pattern, path, kind, &modules));
            }
            chosen.push(position);
        }
    }

    let mut out = Selection::default();
    let mut missed = Missed { modules: &modules, list: Vec::new() };
    for (((pattern, matcher), hits), experts) in targets.iter().zip(&target_hits).zip(&names_experts) {
        out.hits.push(PatternHits { key: "target_modules", pattern: pattern.clone(), hits: hits.decisive });
        if hits.candidates + hits.containers == 0 {
            if *experts { missed.experts(pattern) } else { missed.target(pattern, matcher) }
        }
    }
    if let Some(layers) = &layers {
        for (index, hits) in layers.indices.iter().zip(&layer_hits) {
            out.hits.push(PatternHits { key: "layers_to_transform", pattern: index.to_string(), hits: *hits });
            if *hits == 0 {
                missed.layer(*index, &layers_seen, &spec.layers_pattern);
            }
        }
    }
    for ((pattern, matcher), hits) in excludes.iter().zip(&exclude_hits) {
        out.hits.push(PatternHits { key: "exclude_modules", pattern: pattern.clone(), hits: hits.decisive });
        if hits.candidates == 0 {
            missed.exclude(pattern, matcher, hits.containers > 0);
        }
    }
    out.saved = saved_modules(spec, &modules, &mut out.hits, &mut missed);
    let parameters = select_parameters(spec, candidates, rules, &mut out.hits, &mut missed)?;
    let keys = parameters.iter().filter_map(|index| candidates.get(*index)).map(parameter_key).collect::<Vec<_>>();
    let sites = chosen.iter().filter_map(|index| candidates.get(*index)).map(|c| c.path);
    let sites: Vec<&str> = sites.chain(keys.iter().map(String::as_str)).collect();
    let ranks = pattern_values("rank_pattern", &spec.rank_pattern, &sites, &mut out.hits, &mut missed)?;
    let alphas = pattern_values("alpha_pattern", &spec.alpha_pattern, &sites, &mut out.hits, &mut missed)?;
    let selected =
        |(index, (rank, alpha)): (&usize, (Option<usize>, Option<f64>))| SelectedSite { index: *index, rank, alpha };
    out.sites = chosen.iter().chain(&parameters).zip(ranks.into_iter().zip(alphas)).map(selected).collect();
    out.parameters = out.sites.split_off(chosen.len());

    let list = missed.list;
    if rules.unmatched == Unmatched::Error && !list.is_empty() {
        return Err(Error::Unmatched { patterns: list });
    }
    if out.sites.is_empty() && out.parameters.is_empty() {
        return Err(nothing_selected(spec, &list));
    }
    for saved in &out.saved {
        if let Some(site) = out.sites.iter().chain(&out.parameters).find(|site| saved.members.contains(&site.index)) {
            let path = candidates.get(site.index).map_or("", |candidate| candidate.path);
            return Err(Error::site(
                path,
                "is both a target of the adapter and in `modules_to_save`; take it out of one of the two",
            ));
        }
    }
    out.unmatched = list;
    Ok(out)
}

/// The modules of `modules_to_save` alone, for methods that have no targets.
///
/// # Errors
/// A name that is the end of no module's, unless `unmatched` says otherwise.
pub fn select_saved(spec: &TargetSpec, candidates: &[Candidate<'_>], unmatched: Unmatched) -> Result<Selection> {
    let modules = Modules::new(candidates);
    let (mut out, mut missed) = (Selection::default(), Missed { modules: &modules, list: Vec::new() });
    out.saved = saved_modules(spec, &modules, &mut out.hits, &mut missed);
    if unmatched == Unmatched::Error && !missed.list.is_empty() {
        return Err(Error::Unmatched { patterns: missed.list });
    }
    out.unmatched = missed.list;
    Ok(out)
}

/// Modules that one pattern matched.
#[derive(Clone, Default)]
struct Hits {
    candidates: usize,
    containers: usize,
    decisive: usize,
}

impl Hits {
    fn add(&mut self, is_candidate: bool, decisive: bool) {
        if is_candidate {
            self.candidates += 1;
        } else {
            self.containers += 1;
        }
        self.decisive += usize::from(decisive && is_candidate);
    }
}

/// First match wins, `re.match(rf"(.*\.)?({key})$", path)` (PEFT's `get_pattern_key`).
fn pattern_values<V: Copy>(
    key: &'static str,
    patterns: &[(String, V)],
    sites: &[&str],
    hits: &mut Vec<PatternHits>,
    missed: &mut Missed<'_>,
) -> Result<Vec<Option<V>>> {
    let mut values = vec![None; sites.len()];
    for (pattern, value) in patterns {
        let regex = PythonRegex::match_within(key, r"(.*\.)?(", pattern, ")$")?;
        let (mut matched, mut decided) = (false, 0);
        for (slot, path) in values.iter_mut().zip(sites) {
            if regex.is_match(path)? {
                matched = true;
                if slot.is_none() {
                    *slot = Some(*value);
                    decided += 1;
                }
            }
        }
        hits.push(PatternHits { key, pattern: pattern.clone(), hits: decided });
        if !matched {
            missed.pattern_key(key, pattern, sites);
        }
    }
    Ok(values)
}

/// PEFT compares by plain `endswith`: `head` also saves `lm_head`.
fn saved_modules(
    spec: &TargetSpec,
    modules: &Modules<'_>,
    hits: &mut Vec<PatternHits>,
    missed: &mut Missed<'_>,
) -> Vec<SavedModule> {
    let mut saved: Vec<SavedModule> = Vec::new();
    for path in modules.paths() {
        if spec.modules_to_save.iter().any(|name| path.ends_with(name.as_str())) {
            let inside =
                |other: &str| other == path || other.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'));
            let members =
                modules.candidates.iter().enumerate().filter(|(_, c)| inside(c.path)).map(|(i, _)| i).collect();
            saved.push(SavedModule { path: path.to_owned(), members });
        }
    }
    // PEFT adds both usual head names for classifiers; only one of them exists in any model.
    let automatic: &[&str] = match spec.task_type.as_deref() {
        Some("SEQ_CLS" | "TOKEN_CLS") => &["classifier", "score"],
        Some("QUESTION_ANS") => &["qa_outputs"],
        _ => &[],
    };
    for name in &spec.modules_to_save {
        let count = saved.iter().filter(|module| module.path.ends_with(name.as_str())).count();
        hits.push(PatternHits { key: "modules_to_save", pattern: name.clone(), hits: count });
        if count == 0 && !automatic.contains(&name.as_str()) {
            missed.name("modules_to_save", name, "is the end of no module's name");
        }
    }
    saved
}

fn unsupported(rules: &SelectRules<'_>, pattern: &str, path: &str, kind: ModuleKind, modules: &Modules<'_>) -> Error {
    let is_container = modules.containers.contains(&path);
    let inside: BTreeSet<&str> = modules
        .candidates
        .iter()
        .filter(|c| rules.supported.contains(&c.kind))
        .filter_map(|c| c.path.strip_prefix(path)?.strip_prefix('.'))
        .take(8)
        .collect();
    let what = if is_container { "a group of modules" } else { kind.noun() };
    let advice = if is_container && !inside.is_empty() {
        let list: Vec<String> = inside.iter().map(|name| format!("`{name}`")).collect();
        format!("; inside it are {}", list.join(", "))
    } else {
        "; name other modules, or keep this one out with `exclude_modules`".to_owned()
    };
    Error::config(
        "target_modules",
        format!("`{pattern}` matches {path}, which is {what} and not something that {} adapts{advice}", rules.method),
    )
}

fn nothing_selected(spec: &TargetSpec, missed: &[UnmatchedPattern]) -> Error {
    if let Some(first) = missed
        .iter()
        .find(|pattern| matches!(pattern.key, "target_modules" | "target_parameters" | "layers_to_transform"))
    {
        return Error::Unmatched { patterns: vec![first.clone()] };
    }
    let message = match &spec.target_modules {
        Some(TargetModules::Names(names)) if names.is_empty() => "is an empty list; name the modules to adapt".to_owned(),
        _ => "selects no module: `exclude_modules`, `modules_to_save` or `layers_to_transform` keep out all that it matches"
            .to_owned(),
    };
    Error::config("target_modules", message)
}

#[cfg(test)]
#[path = "select_tests.rs"]
mod tests;
