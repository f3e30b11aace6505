//! The recipe: a TOML file with a table a concern, flags laid over it, unknown keys refused.

use std::path::{Path, PathBuf};

use peft_core::suggest::did_you_mean;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::objective::Objective;
use crate::recipe_combinations;

/// A recipe that cannot be used; the message names the file or key.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RecipeError(String);

/// `[model]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelTable {
    /// A folder, a `.gguf` file or a hub id.
    pub path: Option<String>,
    /// `auto` (as stored), `f32`, `bf16` or `f16`. A CPU computes in `f32`, so that there `f32` leaves narrower weights as
    /// they are stored: they are widened exactly, panel by panel; and there `bf16` means that activations wait for the
    /// backward pass in `bf16`, too.
    pub dtype: String,
    /// `none`; other kinds come with quantised training.
    pub quantize: String,
    /// `auto`, `cpu`, `cuda:0` or `metal`.
    pub device: String,
    /// `pretrained`, or `random` to start from the config alone.
    pub init: String,
}

impl Default for ModelTable {
    fn default() -> Self {
        Self {
            path: None,
            dtype: "auto".into(),
            quantize: "none".into(),
            device: "auto".into(),
            init: "pretrained".into(),
        }
    }
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataTable {
    /// A path, or a list of `{path, weight}`.
    pub train: Option<Value>,
    /// As `train`, for evaluation.
    pub eval: Option<Value>,
    /// Name of the format; detected from the columns if left out.
    pub format: Option<String>,
    /// minijinja over the row's columns.
    pub template: Option<String>,
    /// Path or text of a chat template in place of the tokenizer's.
    pub chat_template: Option<String>,
    /// Words that a causal LM answers in place of the labels.
    pub label_words: Table,
    /// Names of the classes of a class head, in the order of their numbers; left out, the model's or those in the data.
    pub labels: Vec<String>,
    /// The possible answers of every row, of which its own is one; left out, the keys of `label_words`, or each row's own in a
    /// column `choices`. Evaluation then measures how often the right one is the likeliest.
    pub choices: Vec<String>,
    /// Tokens a row, at most.
    pub max_length: usize,
    /// Fill batches by tokens instead of rows.
    pub packing: bool,
    /// A new order every epoch.
    pub shuffle: bool,
    /// Similar lengths together.
    pub group_by_length: bool,
    /// Close rows of plain text with the end token.
    pub text_eos: bool,
}

impl Default for DataTable {
    fn default() -> Self {
        Self {
            train: None,
            eval: None,
            format: None,
            template: None,
            chat_template: None,
            label_words: Table::new(),
            labels: Vec::new(),
            choices: Vec::new(),
            max_length: 512,
            packing: false,
            shuffle: true,
            group_by_length: false,
            text_eos: false,
        }
    }
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainTable {
    /// Passes over the data, unless `max_steps` is given.
    pub epochs: f64,
    /// Optimiser steps.
    pub max_steps: Option<u64>,
    /// Rows a micro-batch.
    pub batch_size: usize,
    /// Micro-batches an optimiser step.
    pub gradient_accumulation: usize,
    /// `auto`, `true` or `false`.
    pub gradient_checkpointing: Value,
    /// What `gradient_checkpointing = "auto"` fits activations into: `"4GiB"`; left out, half the free memory.
    pub memory_budget: Option<String>,
    /// In what activations wait for the backward pass: `f32`, `bf16` (half their memory, gradients of activations rounded to
    /// 8 bits), or `auto`, which is `bf16` with a base asked for in it and `f32` otherwise.
    pub activation_dtype: String,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Name of the schedule.
    pub scheduler: String,
    /// Share of the steps for warm-up, unless `warmup_steps` is given.
    pub warmup_ratio: f64,
    /// Steps of warm-up.
    pub warmup_steps: Option<u64>,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest gradient norm; 0 is off.
    pub max_grad_norm: f64,
    /// `adamw`, `sgd` or `mezo`, which trains by forward passes alone.
    pub optimizer: String,
    /// AdamW's first decay.
    pub beta1: Option<f64>,
    /// AdamW's second decay.
    pub beta2: Option<f64>,
    /// AdamW's denominator offset.
    pub eps: Option<f64>,
    /// SGD's momentum.
    pub momentum: Option<f64>,
    /// MeZO: how far parameters are moved for a difference of losses; 1e-3 if left out.
    pub mezo_eps: Option<f64>,
    /// MeZO: differences that a step takes the mean of; 1 if left out.
    pub mezo_samples: Option<usize>,
    /// What is lowered: `loss`; `t_few`, T-Few's losses on rows with choices; or, with `mezo`, minus `accuracy` or minus `f1`.
    pub objective: String,
    /// T-Few: weight of the unlikelihood loss; 1 if left out.
    pub unlikelihood: Option<f64>,
    /// T-Few: weight of the length-normalised loss; 1 if left out.
    pub length_normalised: Option<f64>,
    /// LoRA+: learning rate of B over that of A.
    pub loraplus_lr_ratio: Option<f64>,
    /// Seed of initialisation, data order and dropout.
    pub seed: u64,
    /// Rows an evaluation batch; left out, `batch_size`.
    pub eval_batch_size: Option<usize>,
    /// Metric that picks the best adapter.
    pub metric: String,
    /// Evaluations without progress before training stops; 0 never stops.
    pub early_stopping_patience: u32,
    /// Smallest gain that counts as progress.
    pub early_stopping_min_delta: f64,
}

impl Default for TrainTable {
    fn default() -> Self {
        Self {
            epochs: 1.0,
            max_steps: None,
            batch_size: 8,
            gradient_accumulation: 1,
            gradient_checkpointing: Value::String("auto".into()),
            memory_budget: None,
            activation_dtype: "auto".into(),
            learning_rate: 2e-4,
            scheduler: "cosine".into(),
            warmup_ratio: 0.03,
            warmup_steps: None,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            optimizer: "adamw".into(),
            beta1: None,
            beta2: None,
            eps: None,
            momentum: None,
            mezo_eps: None,
            mezo_samples: None,
            objective: "loss".into(),
            unlikelihood: None,
            length_normalised: None,
            loraplus_lr_ratio: None,
            seed: 0,
            eval_batch_size: None,
            metric: "eval_loss".into(),
            early_stopping_patience: 0,
            early_stopping_min_delta: 0.0,
        }
    }
}

/// `[output]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OutputTable {
    /// The output folder.
    pub dir: Option<String>,
    /// Optimiser steps between checkpoints; 0 writes none.
    pub save_every: u64,
    /// Optimiser steps between evaluations; 0 evaluates at the end only.
    pub eval_every: u64,
    /// Checkpoints that are kept; 0 keeps all.
    pub keep_checkpoints: usize,
}

impl Default for OutputTable {
    fn default() -> Self {
        Self { dir: None, save_every: 0, eval_every: 0, keep_checkpoints: 2 }
    }
}

/// `[sample]`: prompts that are answered before and after training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SampleTable {
    /// The prompts.
    pub prompts: Vec<String>,
    /// Tokens an answer, at most.
    pub max_new_tokens: usize,
}

impl Default for SampleTable {
    fn default() -> Self {
        Self { prompts: Vec::new(), max_new_tokens: 32 }
    }
}

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
        let origin = file.map_or_else(String::new, |p| format!("{}: ", p.display()));
        check_keys(&table).map_err(|e| RecipeError(format!("{origin}{e}")))?;
        let recipe: Self = Value::Table(table)
            .try_into()
            .map_err(|e: toml::de::Error| RecipeError(format!("{origin}{}", e.message())))?;
        recipe.check().map_err(|e| RecipeError(format!("{origin}{e}")))?;
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
