//! Which modules of a model an adapter touches, exactly as Hugging Face PEFT decides it.
//!
//! The rules are those of `check_target_module_exists`, `_maybe_include_all_linear_layers`, `get_pattern_key` and
//! `_set_trainable` (peft 0.21.2). One thing is stricter: a pattern that hits nothing is an error that names the
//! nearest module names ([`Unmatched::Error`]). PEFT ignores such patterns, so for configs that PEFT wrote there
//! is [`Unmatched::Report`].

use std::collections::{BTreeSet, HashMap};

use crate::error::{Error, Result};
use crate::python_regex::PythonRegex;
use crate::select_spec::{TargetModules, TargetSpec};
use crate::suggest::{did_you_mean, nearest};

/// What a module is, as far as adapters care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ModuleKind {
    /// A linear layer, or GPT-2's transposed `Conv1D`.
    Linear,
    /// An embedding table.
    Embedding,
    /// A layer norm or RMS norm.
    Norm,
    /// Any other module, containers included.
    Other,
}

impl ModuleKind {
    fn noun(self) -> &'static str {
        match self {
            Self::Linear => "a linear layer",
            Self::Embedding => "an embedding",
            Self::Norm => "a norm",
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
    /// Modules that are trained whole.
    pub saved: Vec<SavedModule>,
    /// Hits per pattern, in the order of the config; `all-linear` is one pattern.
    pub hits: Vec<PatternHits>,
    /// Patterns without a hit (only with [`Unmatched::Report`]).
    pub unmatched: Vec<UnmatchedPattern>,
}

/// One entry of `target_modules` or `exclude_modules`, compiled.
enum Matcher {
    /// The whole name, or its end after a dot.
    Name(String),
    Regex(PythonRegex),
    /// Exactly these modules (all-linear).
    Set(BTreeSet<String>),
}

#[derive(PartialEq, Clone, Copy)]
enum Found {
    No,
    Suffix,
    /// Through the full name or a regex: `layers_to_transform` does not apply.
    Exact,
}

impl Matcher {
    fn find(&self, path: &str) -> Result<Found> {
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

fn matchers(
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

/// `layers_to_transform` and `layers_pattern`, compiled.
struct LayerFilter {
    indices: Vec<i64>,
    patterns: Vec<PythonRegex>,
}

impl LayerFilter {
    fn new(spec: &TargetSpec) -> Result<Option<Self>> {
        let Some(indices) = spec.layers_to_transform.as_ref().filter(|indices| !indices.is_empty()) else {
            return Ok(None);
        };
        const KEY: &str = "layers_pattern";
        let after = r"\.(?P<idx>\d+)\.";
        let patterns = if spec.layers_pattern.is_empty() {
            vec![PythonRegex::match_within(KEY, "", r".*?\.[^.]*\.(?P<idx>\d+)\.", "")?]
        } else {
            spec.layers_pattern
                .iter()
                .map(|pattern| PythonRegex::match_within(KEY, r"(?:^|.*?\.)", pattern, after))
                .collect::<Result<_>>()?
        };
        Ok(Some(Self { indices: indices.clone(), patterns }))
    }

    /// Layer number of a module: the first number found by the first pattern that matches at all.
    fn layer(&self, path: &str) -> Result<Option<i64>> {
        for pattern in &self.patterns {
            if let Some(index) = pattern.capture(path, "idx")? {
                return Ok(index.and_then(|digits| digits.parse().ok()));
            }
        }
        Ok(None)
    }
}

/// All modules: the candidates, then the containers that their paths imply.
struct Modules<'a> {
    candidates: &'a [Candidate<'a>],
    containers: Vec<&'a str>,
}

impl<'a> Modules<'a> {
    fn new(candidates: &'a [Candidate<'a>]) -> Self {
        let known: BTreeSet<&str> = candidates.iter().map(|candidate| candidate.path).collect();
        let mut containers = BTreeSet::new();
        for candidate in candidates {
            for (dot, _) in candidate.path.match_indices('.') {
                if let Some(prefix) = candidate.path.get(..dot).filter(|prefix| !known.contains(prefix)) {
                    containers.insert(prefix);
                }
            }
        }
        Self { candidates, containers: containers.into_iter().collect() }
    }

    fn paths(&self) -> impl Iterator<Item = &'a str> + '_ {
        self.candidates.iter().map(|candidate| candidate.path).chain(self.containers.iter().copied())
    }

    /// What `all-linear` stands for: every linear layer but the language-model head or, where there is none, the
    /// classification head of a sequence classifier.
    fn all_linear(&self, task_type: Option<&str>) -> BTreeSet<String> {
        let has_head = self.candidates.iter().any(|candidate| candidate.is_output_head);
        let class_head = if !has_head && task_type == Some("SEQ_CLS") {
            ["score", "classifier"].into_iter().find(|name| self.paths().any(|path| path == *name))
        } else {
            None
        };
        self.candidates
            .iter()
            .filter(|c| c.kind == ModuleKind::Linear && !c.is_output_head && Some(c.path) != class_head)
            .map(|c| c.path.to_owned())
            .collect()
    }

    /// Short names for suggestions: the last and the last two segments of every candidate.
    fn short_names(&self) -> BTreeSet<&'a str> {
        let mut names = BTreeSet::new();
        for candidate in self.candidates {
            let mut dots = candidate.path.rmatch_indices('.').map(|(dot, _)| dot + 1);
            names.extend(dots.next().map_or(Some(candidate.path), |start| candidate.path.get(start..)));
            names.extend(dots.next().and_then(|start| candidate.path.get(start..)));
        }
        names
    }
}

/// The modules that `spec` selects among `candidates`.
///
/// # Errors
/// A pattern that is not a valid Python regular expression, one that hits nothing (unless `rules` says otherwise),
/// a target that is not of a supported kind, keys that exclude one another, and a spec that selects no module at
/// all. `target_modules: null` has to be filled in before ([`TargetSpec::fill_default_targets`]).
pub fn select(spec: &TargetSpec, candidates: &[Candidate<'_>], rules: &SelectRules<'_>) -> Result<Selection> {
    spec.validate()?;
    let Some(target_modules) = &spec.target_modules else {
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
    let mut exclude_hits = vec![Hits::default(); excludes.len()];
    let mut layer_hits = vec![0usize; layers.as_ref().map_or(0, |layers| layers.indices.len())];
    let mut layers_seen = BTreeSet::new();
    let mut chosen: Vec<usize> = Vec::new();
    for (position, path) in modules.paths().enumerate() {
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
    for ((pattern, matcher), hits) in targets.iter().zip(&target_hits) {
        out.hits.push(PatternHits { key: "target_modules", pattern: pattern.clone(), hits: hits.decisive });
        if hits.candidates + hits.containers == 0 {
            missed.target(pattern, matcher);
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
    let sites: Vec<&str> = chosen.iter().filter_map(|index| candidates.get(*index)).map(|c| c.path).collect();
    let ranks = pattern_values("rank_pattern", &spec.rank_pattern, &sites, &mut out.hits, &mut missed)?;
    let alphas = pattern_values("alpha_pattern", &spec.alpha_pattern, &sites, &mut out.hits, &mut missed)?;
    out.sites = chosen
        .iter()
        .zip(ranks.into_iter().zip(alphas))
        .map(|(index, (rank, alpha))| SelectedSite { index: *index, rank, alpha })
        .collect();

    let list = missed.list;
    if rules.unmatched == Unmatched::Error && !list.is_empty() {
        return Err(Error::Unmatched { patterns: list });
    }
    if out.sites.is_empty() {
        return Err(nothing_selected(spec, &list));
    }
    for saved in &out.saved {
        if let Some(site) = out.sites.iter().find(|site| saved.members.contains(&site.index)) {
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
    if let Some(first) = missed.iter().find(|pattern| matches!(pattern.key, "target_modules" | "layers_to_transform")) {
        return Error::Unmatched { patterns: vec![first.clone()] };
    }
    let message = match &spec.target_modules {
        Some(TargetModules::Names(names)) if names.is_empty() => "is an empty list; name the modules to adapt".to_owned(),
        _ => "selects no module: `exclude_modules`, `modules_to_save` or `layers_to_transform` keep out all that it matches"
            .to_owned(),
    };
    Error::config("target_modules", message)
}

/// Collects what to say about patterns without a hit.
struct Missed<'a> {
    modules: &'a Modules<'a>,
    list: Vec<UnmatchedPattern>,
}

impl Missed<'_> {
    fn push(&mut self, key: &'static str, pattern: &str, advice: String) {
        self.list.push(UnmatchedPattern { key, pattern: pattern.to_owned(), advice });
    }

    fn name(&mut self, key: &'static str, name: &str, what: &str) {
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

    fn target(&mut self, pattern: &str, matcher: &Matcher) {
        match matcher {
            Matcher::Name(_) => self.name("target_modules", pattern, "matches no module"),
            Matcher::Regex(_) => self.regex("target_modules", pattern),
            Matcher::Set(_) => self.push("target_modules", pattern, "finds no linear layer in this model".to_owned()),
        }
    }

    fn exclude(&mut self, pattern: &str, matcher: &Matcher, hit_container: bool) {
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

    fn layer(&mut self, index: i64, seen: &BTreeSet<i64>, patterns: &[String]) {
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
                    .containers
                    .iter()
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

    fn pattern_key(&mut self, key: &'static str, pattern: &str, sites: &[&str]) {
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

#[cfg(test)]
#[path = "select_tests.rs"]
mod tests;
