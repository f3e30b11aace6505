//! The recipe: a TOML file with a table a concern, flags laid over it, unknown keys refused.

use std::path::{Path, PathBuf};

use peft_core::suggest::did_you_mean;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::objective::Objective;
use crate::{recipe_combinations, recipe_preferences};

mod tables;

pub use tables::{DataTable, EndpointTable, ModelTable, OutputTable, SampleTable, TrainTable};

/// A recipe that cannot be used; the message names the file or key.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RecipeError(String);

/// All that a training run is told.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Recipe {
    /// The base model.
    pub model: ModelTable,
    /// The method and its PEFT keys; `type` or `init_from` says which.
    pub method: Table,
    /// The rows.
    pub data: DataTable,
    /// How to train.
    pub train: TrainTable,
    /// Where results go.
    pub output: OutputTable,
    /// Prompts to show.
    pub sample: SampleTable,
    /// A model behind an HTTP API, in place of `[model]`.
    pub endpoint: EndpointTable,
}

impl Recipe {
    /// Reads a recipe file (none: an empty recipe) and lays `overrides` (dotted key, value) over it. Paths in the file
    /// are taken relative to its folder; those of overrides relative to the working folder.
    ///
    /// # Errors
    /// A missing or malformed file, an unknown key (with the nearest known), a value of the wrong type.
    pub fn load(file: Option<&Path>, overrides: &[(String, Value)]) -> Result<Self, RecipeError> {
        let mut table = match file {
            None => Table::new(),
            Some(path) => {
                let text =
                    std::fs::read_to_string(path).map_err(|e| RecipeError(format!("{}: {e}", path.display())))?;
                let mut table: Table = text.parse().map_err(|e: toml::de::Error| {
                    RecipeError(format!("{}: {}", path.display(), e.to_string().trim_end()))
                })?;
                resolve_paths(&mut table, path.parent().unwrap_or(Path::new("")));
                table
            }
        };
        for (key, value) in overrides {
            set(&mut table, key, value.clone())?;
        }
        let metric = table.get("train").and_then(|t| t.get("metric")).is_some();
        let origin = file.map_or_else(String::new, |p| format!("{}: ", p.display()));
        check_keys(&table).map_err(|e| RecipeError(format!("{origin}{e}")))?;
        let mut recipe: Self = Value::Table(table)
            .try_into()
            .map_err(|e: toml::de::Error| RecipeError(format!("{origin}{}", e.message())))?;
        recipe.check().map_err(|e| RecipeError(format!("{origin}{e}")))?;
        // The likelihood of chosen answers alone, which eval_loss is, often falls while a preference is learned.
        if !metric && recipe.objective()?.preference().is_some() {
            recipe.train.metric = recipe_preferences::METRIC.into();
        }
        Ok(recipe)
    }

    /// What training lowers.
    ///
    /// # Errors
    /// A name that is no objective's, or a weight that does not belong to it.
    pub fn objective(&self) -> Result<Objective, RecipeError> {
        recipe_combinations::objective(self).map_err(RecipeError)
    }

    /// The recipe as TOML, every default filled in.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).unwrap_or_default()
    }

    /// The recipe with its paths made absolute, so that it means the same wherever it is kept. Hub ids stay.
    #[must_use]
    pub fn with_absolute_paths(&self) -> Self {
        let absolute = |path: &mut String| {
            if let Ok(full) = std::path::absolute(&*path)
                && full.exists()
            {
                *path = full.to_string_lossy().into_owned();
            }
        };
        let mut recipe = self.clone();
        recipe.model.path.iter_mut().for_each(absolute);
        recipe.output.dir.iter_mut().for_each(absolute);
        parts(&mut recipe.method).into_iter().for_each(absolute);
        let from = recipe.method.get_mut("init_from");
        for value in from.into_iter().chain(&mut recipe.data.train).chain(&mut recipe.data.eval) {
            match value {
                Value::String(path) => absolute(path),
                Value::Array(parts) => {
                    for part in parts.iter_mut().filter_map(|p| p.as_table_mut()?.get_mut("path")) {
                        if let Value::String(path) = part {
                            absolute(path);
                        }
                    }
                }
                _ => {}
            }
        }
        recipe
    }

    fn check(&self) -> Result<(), String> {
        let positive = [
            ("train.batch_size", self.train.batch_size),
            ("train.gradient_accumulation", self.train.gradient_accumulation),
            ("data.max_length", self.data.max_length),
            ("train.eval_batch_size", self.train.eval_batch_size.unwrap_or(1)),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, n)| *n == 0) {
            return Err(format!("`{key}` must be at least 1"));
        }
        let t = &self.train;
        let finite = [
            ("train.epochs", t.epochs),
            ("train.learning_rate", t.learning_rate),
            ("train.warmup_ratio", t.warmup_ratio),
            ("train.weight_decay", t.weight_decay),
            ("train.max_grad_norm", t.max_grad_norm),
            ("train.loraplus_lr_ratio", t.loraplus_lr_ratio.unwrap_or(1.0)),
        ];
        if let Some((key, v)) = finite.iter().find(|(_, v)| !(v.is_finite() && *v >= 0.0)) {
            return Err(format!("`{key}` is {v}; it must be a number from 0"));
        }
        if t.max_steps == Some(0) || (t.max_steps.is_none() && t.epochs == 0.0) {
            return Err("nothing to train: `train.epochs` or `train.max_steps` is 0".into());
        }
        if self.model.quantize != "none" {
            return Err(format!(
                "`model.quantize` = \"{}\": quantising at load comes with quantised training; a .gguf base is trained in \
                 its own blocks",
                self.model.quantize
            ));
        }
        recipe_combinations::check(self)?;
        match self.model.init.as_str() {
            "pretrained" | "random" => Ok(()),
            other => Err(format!("`model.init` = \"{other}\" is neither \"pretrained\" nor \"random\"")),
        }
    }
}

/// A `--set` value: TOML where it parses as TOML, else the text itself.
#[must_use]
pub fn parse_value(text: &str) -> Value {
    format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v")).unwrap_or_else(|| text.into())
}

fn set(table: &mut Table, key: &str, value: Value) -> Result<(), RecipeError> {
    match key.split_once('.') {
        None => {
            table.insert(key.to_string(), value);
            Ok(())
        }
        Some((head, rest)) => {
            let inner = table.entry(head).or_insert_with(|| Value::Table(Table::new()));
            match inner {
                Value::Table(inner) => set(inner, rest, value),
                _ => Err(RecipeError(format!("`{key}`: `{head}` is not a table"))),
            }
        }
    }
}

fn check_keys(table: &Table) -> Result<(), String> {
    let known = known_keys();
    for (name, value) in table {
        let Some(keys) = known.get(name) else {
            let near = did_you_mean(name, known.keys().map(String::as_str));
            return Err(format!("`{name}` is not a table of a recipe{near}"));
        };
        let Value::Table(inner) = value else {
            return Err(format!("`{name}` is a table: write [{name}]"));
        };
        // The method's keys are checked by the method.
        if name == "method" {
            continue;
        }
        if let Some(key) = inner.keys().find(|k| !keys.contains(k)) {
            let near = did_you_mean(key, keys.iter().map(String::as_str));
            return Err(format!("`{name}.{key}` is not a key of a recipe{near}"));
        }
    }
    Ok(())
}

/// Every table and its keys, from the defaults themselves.
fn known_keys() -> std::collections::BTreeMap<String, Vec<String>> {
    // JSON keeps keys whose value is none, which TOML leaves out.
    let all = serde_json::to_value(Recipe::default()).unwrap_or_default();
    let tables = all.as_object().cloned().unwrap_or_default();
    tables
        .into_iter()
        .map(|(name, t)| (name, t.as_object().map(|t| t.keys().cloned().collect()).unwrap_or_default()))
        .collect()
}

fn resolve_paths(table: &mut Table, folder: &Path) {
    let method = table.get_mut("method").and_then(Value::as_table_mut);
    method.map(parts).into_iter().flatten().for_each(|path| resolve(path, folder, false));
    for (name, keys) in [
        ("model", &["path"][..]),
        ("method", &["init_from"]),
        ("data", &["train", "eval", "chat_template"]),
        ("output", &["dir"]),
    ] {
        let Some(Value::Table(inner)) = table.get_mut(name) else { continue };
        for key in keys {
            match inner.get_mut(*key) {
                Some(Value::String(path)) => {
                    resolve(path, folder, name == "output" || name == "data" && *key != "chat_template")
                }
                Some(Value::Array(parts)) => {
                    for part in parts {
                        if let Some(Value::String(path)) = part.as_table_mut().and_then(|t| t.get_mut("path")) {
                            resolve(path, folder, true);
                        }
                    }
                }
                _ => {}
            }
        }
    }
}

/// Every folder in `method.adapters`, a list, whose lists are stacks, or a table.
fn parts(method: &mut Table) -> Vec<&mut String> {
    let all: Vec<&mut Value> = match method.get_mut("adapters") {
        Some(Value::Array(list)) => list.iter_mut().collect(),
        Some(Value::Table(table)) => table.iter_mut().map(|(_, part)| part).collect(),
        _ => Vec::new(),
    };
    all.into_iter()
        .flat_map(|part| match part {
            Value::String(path) => vec![path],
            Value::Array(stack) => stack
                .iter_mut()
                .filter_map(|part| match part {
                    Value::String(path) => Some(path),
                    _ => None,
                })
                .collect(),
            _ => Vec::new(),
        })
        .collect()
}

/// Hub ids and template texts are not paths: without `always`, only what exists in the recipe's folder, or starts like a
/// path, is taken relative to it.
fn resolve(path: &mut String, folder: &Path, always: bool) {
    let relative: PathBuf = folder.join(&*path);
    if Path::new(&*path).is_relative() && (always || relative.exists() || path.starts_with('.')) {
        *path = without_detours(&relative).to_string_lossy().into_owned();
    }
}

/// `a/b/../c` as `a/c`, so that messages are short. Only names that are there to be cut are cut.
fn without_detours(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut short = PathBuf::new();
    for part in path.components() {
        match (part, short.components().next_back()) {
            (Component::ParentDir, Some(Component::Normal(_))) => {
                short.pop();
            }
            (Component::CurDir, _) => {}
            _ => short.push(part),
        }
    }
    short
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn load(text: &str, overrides: &[(&str, &str)]) -> Result<Recipe, RecipeError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("r.toml");
        std::fs::write(&file, text).unwrap();
        let overrides: Vec<_> = overrides.iter().map(|(k, v)| (k.to_string(), parse_value(v))).collect();
        Recipe::load(Some(&file), &overrides)
    }

    #[test]
    fn overrides_win_and_values_are_toml_or_text() {
        let r = load("[train]\nbatch_size = 4", &[("train.batch_size", "2"), ("model.path", "a/b"), ("method.r", "3")])
            .unwrap();
        assert_eq!((r.train.batch_size, r.model.path.as_deref()), (2, Some("a/b")));
        assert_eq!(r.method["r"], Value::Integer(3));
        assert_eq!(parse_value("[\"q\", \"k\"]").as_array().unwrap().len(), 2);
    }

    #[test]
    fn relative_paths_belong_to_the_recipe() {
        let r = load("[data]\ntrain = \"rows.jsonl\"\n[model]\npath = \"org/name\"", &[]).unwrap();
        let train = r.data.train.unwrap().as_str().unwrap().to_string();
        assert!(train.ends_with("/rows.jsonl") && train.starts_with('/'), "{train}");
        assert_eq!(r.model.path.as_deref(), Some("org/name"));
    }

    #[test]
    fn detours_are_cut() {
        assert_eq!(without_detours(Path::new("examples/q/../../target/x")), Path::new("target/x"));
        assert_eq!(without_detours(Path::new("../a/./b")), Path::new("../a/b"));
    }

    #[test]
    fn wrong_recipes_name_the_key() {
        for (text, expect) in [
            ("[trian]", "`train`"),
            ("[train]\nbatchsize = 4", "`batch_size`"),
            ("[train]\nbatch_size = \"four\"", "invalid type"),
            ("[train]\nbatch_size = 0", "train.batch_size"),
            ("[train]\nlearning_rate = nan", "train.learning_rate"),
            ("train = 3", "[train]"),
            ("[endpoint]\nmodel = \"m\"", "endpoint.url"),
            ("[train]\nbdpl_length = 3", "setting of bdpl"),
            ("[train]\noptimizer = \"bbt\"\nlearning_rate = 0.1", "bbt_sigma"),
            ("[model]\nquantize = \"nf4\"", "model.quantize"),
            ("[model", "r.toml"),
        ] {
            let e = load(text, &[]).unwrap_err().to_string();
            assert!(e.contains(expect), "{text}: {e}");
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let mut r = Recipe::default();
        r.data.train = Some("x".into());
        r.method.insert("type".into(), "lora".into());
        let again: Recipe = toml::from_str(&r.to_toml()).unwrap();
        assert_eq!(again, r);
    }
}
