//! The config of an adapter made of several: AdapterHub's setup and its keys and presets of a fusion (`AdapterFusionConfig` in
//! `adapters/configuration/adapter_fusion_config.py`, 1.3), and the parts with their configs.

use std::collections::BTreeSet;
use std::path::Path;

use peft_core::config_keys::{completed, peft_defaults};
use peft_core::suggest::did_you_mean;
use peft_core::{BaseModel, ConfigKeys, Error, Result, TargetSpec, task_keys};
use serde_json::{Map, Value, json};

use super::setup::{SETUP, Setup, normalised, numbers};
use crate::bottleneck::Placement;
use crate::config::{BottleneckConfig, PEFT_TYPE as BOTTLENECK, probability, saved};

/// The key of a recipe that names a preset.
const PRESET: &str = "preset";
const PRESETS: [&str; 2] = ["dynamic", "static"];
/// The parts: folders and tables in a recipe, names and configs in a file.
const ADAPTERS: &str = "adapters";
const WEIGHTS: &str = "weights";

/// `peft_type` of each kind; PEFT has no such methods, so the names are ours.
pub(crate) const PEFT_TYPES: [&str; 2] = ["ADAPTER_FUSION", "COMPOSITION"];

/// The keys of AdapterHub's `AdapterFusionConfig`.
pub(crate) const FUSION_KEYS: [&str; 10] = [
    "dropout_prob",
    "key",
    "query",
    "query_before_ln",
    "regularization",
    "residual_before",
    "temperature",
    "value",
    "value_before_softmax",
    "value_initialized",
];

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// AdapterFusion: attention to what the parts make.
    Fusion,
    /// A stack or a mean, of which new parts are trained.
    Composition,
}

impl Kind {
    pub(crate) fn peft_type(self) -> &'static str {
        match self {
            Self::Fusion => PEFT_TYPES[0],
            Self::Composition => PEFT_TYPES[1],
        }
    }
}

/// A part of a recipe's adapter.
#[derive(Debug, Clone)]
pub(super) enum Source {
    /// Of a folder, which stays as it is.
    Folder(String),
    /// A new bottleneck adapter, which is trained.
    New(Box<BottleneckConfig>),
}

/// A part with what it is.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) config: BottleneckConfig,
    pub(super) trained: bool,
}

/// The settings of a fusion.
#[derive(Debug, Clone)]
pub(super) struct FusionSettings {
    pub(super) query: bool,
    pub(super) key: bool,
    pub(super) value: bool,
    pub(super) query_before_norm: bool,
    pub(super) residual_before: bool,
    pub(super) value_before_softmax: bool,
    pub(super) value_initialized: bool,
    pub(super) regularization: bool,
    pub(super) dropout: f32,
}

/// The settings of an adapter made of several.
#[derive(Debug, Clone)]
pub struct ComposeConfig {
    pub(super) setup: Setup,
    /// Of a recipe: the parts by name.
    pub(super) sources: Vec<(String, Source)>,
    /// Of a file: the same with their configs.
    pub(super) parts: Vec<Part>,
    /// Where there is a fusion in it.
    pub(super) fusion: Option<FusionSettings>,
    /// Modules that are trained whole, such as a class head.
    pub(super) saved: TargetSpec,
    raw: Map<String, Value>,
}

/// AdapterHub's settings of a fusion under a preset.
pub(crate) fn fusion_settings(preset: &str) -> Map<String, Value> {
    let dynamic = preset == "dynamic";
    let keys = json!({
        "key": true, "query": true, "value": dynamic, "query_before_ln": false, "regularization": dynamic,
        "residual_before": false, "temperature": false, "value_before_softmax": true, "value_initialized": dynamic,
        "dropout_prob": null
    });
    keys.as_object().cloned().unwrap_or_default()
}

fn defaults(kind: Kind, preset: &str) -> Map<String, Value> {
    let mut own = Map::from_iter([ADAPTERS, SETUP, "modules_to_save"].map(|key| (key.to_owned(), Value::Null)));
    if kind == Kind::Fusion {
        own.extend(fusion_settings(preset));
    }
    peft_defaults(kind.peft_type(), Value::Object(own))
}

impl ComposeConfig {
    /// Reads the config of an existing adapter, which names every setting and has the parts' configs.
    ///
    /// # Errors
    /// A value of the wrong type, or one that stands for something that is not here; the message names the key.
    pub fn from_adapter_config(kind: Kind, config: &Map<String, Value>) -> Result<Self> {
        Self::read(completed(defaults(kind, "dynamic"), config), Vec::new())
    }

    /// Reads the `[method]` table of a recipe: the parts in `adapters`, folders and tables of new bottleneck adapters; for a fusion
    /// AdapterHub's keys over those of a `preset` (`dynamic` where none is named), for a composition its `setup` and `weights`.
    ///
    /// # Errors
    /// An unknown key or preset, too few parts, nothing that would be trained, or a value of the wrong type; the message names the
    /// key.
    pub fn from_recipe(kind: Kind, config: &Map<String, Value>) -> Result<Self> {
        let config = Self::of_folders(kind, config)?;
        let is_new = |(_, source): &(String, Source)| matches!(source, Source::New(_));
        if kind == Kind::Composition && !config.sources.iter().any(is_new) {
            let message = "are folders alone, which stay as they are, so that nothing would be trained: give a table for a new adapter, \
                           such as {preset = \"seq_bn\"}; `peft-cli compose` puts folders together without training";
            return Err(Error::config(ADAPTERS, message));
        }
        Ok(config)
    }

    /// Like [`ComposeConfig::from_recipe`], where nothing need be trained.
    ///
    /// # Errors
    /// The same but for that.
    pub fn of_folders(kind: Kind, config: &Map<String, Value>) -> Result<Self> {
        let mut own = config.clone();
        let (mut sources, mut preset) = (Vec::new(), "dynamic");
        let mut known = defaults(kind, preset);
        let list = own.remove(ADAPTERS);
        let parts = parts(list.as_ref(), &mut sources)?;
        let setup = if kind == Kind::Fusion {
            if let Some(named) = own.remove(PRESET) {
                preset = PRESETS.into_iter().find(|name| named == *name).ok_or_else(|| {
                    let near = named.as_str().map(|name| did_you_mean(name, PRESETS)).unwrap_or_default();
                    Error::config(PRESET, format!("{named} is not one of {}{near}", PRESETS.join(", ")))
                })?;
            }
            Setup::Fuse(parts)
        } else {
            let kind = own.remove(SETUP).unwrap_or_else(|| "stack".into());
            let weights = own.remove(WEIGHTS);
            let n = parts.len();
            match (kind.as_str(), weights) {
                (Some("stack"), None) => Setup::Stack(parts),
                (Some("average"), weights) => {
                    let weights = weights.map_or_else(|| Ok(vec![1.0; n]), |list| numbers(&list, n))?;
                    Setup::Average(normalised(&weights)?.into_iter().zip(parts).collect())
                }
                (Some("stack"), Some(_)) => return Err(Error::config(WEIGHTS, "goes with setup = \"average\"")),
                _ => return Err(Error::config(SETUP, format!("{kind} is not one of stack, average"))),
            }
        };
        known.extend([PRESET, WEIGHTS].map(|key| (key.to_owned(), Value::Null)));
        ConfigKeys(&own).refuse_unknown(if kind == Kind::Fusion { "fusion" } else { "composition" }, &known)?;
        let mut settings = completed(defaults(kind, preset), &own);
        // Left to the base where the recipe does not say it.
        settings.insert("task_type".into(), own.get("task_type").cloned().unwrap_or(Value::Null));
        // Through the form of a file, which refuses what cannot stand in one another.
        settings.insert(SETUP.into(), setup.to_json());
        Self::read(settings, sources)
    }

    fn read(raw: Map<String, Value>, sources: Vec<(String, Source)>) -> Result<Self> {
        let keys = ConfigKeys(&raw);
        let setup = Setup::from_json(keys.get(SETUP).unwrap_or(&Value::Null))?;
        let parts = read_parts(keys.get(ADAPTERS))?;
        if sources.is_empty() && setup.names() != parts.iter().map(|part| part.name.as_str()).collect::<Vec<_>>() {
            let message = format!("are not those of `{SETUP}`, in its order: {}", setup.names().join(", "));
            return Err(Error::config(ADAPTERS, message));
        }
        let fusion = if setup.fusion_name().is_some() { Some(FusionSettings::read(keys)?) } else { None };
        let is_mean =
            matches!(&setup, Setup::Average(list) if list.iter().all(|(_, part)| matches!(part, Setup::One(_))));
        let parallel = |part: &&Part| part.config.placement == Placement::Parallel;
        let count = parts.iter().filter(parallel).count();
        if count > 0 && !(is_mean && count == parts.len()) {
            let name = parts.iter().find(parallel).map_or("", |part| part.name.as_str());
            let message = format!(
                "`{name}` is a parallel adapter; only a mean of such ones can be made, and the others are in sequence"
            );
            return Err(Error::config(ADAPTERS, message));
        }
        Ok(Self { setup, sources, parts, fusion, saved: saved(keys)?, raw })
    }

    /// The folders of the parts, as the recipe names them.
    pub fn folders(&self) -> impl Iterator<Item = &str> {
        self.sources.iter().filter_map(|(_, source)| match source {
            Source::Folder(folder) => Some(folder.as_str()),
            Source::New(_) => None,
        })
    }

    /// This config for the task of `base`: a class head is trained and stored whole ([`task_keys`]).
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.extend(task_keys(&self.saved, base)?);
        Self::read(raw, self.sources.clone())
    }

    /// This config with what its parts are, which are `(name, config, trained)`.
    ///
    /// # Errors
    /// Parts that cannot be put together.
    pub(super) fn with_parts(&self, parts: &[(String, Map<String, Value>, bool)]) -> Result<Self> {
        let mut raw = self.raw.clone();
        let one = |(name, config, trained): &(String, Map<String, Value>, bool)| {
            let mut config = config.clone();
            // The whole adapter's, not a part's.
            config.insert("modules_to_save".into(), Value::Null);
            json!({"name": name, "config": config, "trained": trained})
        };
        raw.insert(ADAPTERS.into(), parts.iter().map(one).collect::<Vec<_>>().into());
        Self::read(raw, Vec::new())
    }

    /// The config as it is written.
    pub(super) fn to_adapter_config(&self) -> Map<String, Value> {
        self.raw.clone()
    }
}

impl FusionSettings {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        if keys.flag("temperature", false)? {
            let message = "true is not supported: AdapterHub's package lowers it with every pass and does not store where it got to";
            return Err(Error::config("temperature", message));
        }
        let [query, key, value] = [keys.flag("query", true)?, keys.flag("key", true)?, keys.flag("value", true)?];
        if !(query || key || value) {
            return Err(Error::config("query", "this, `key` and `value` are false: nothing would be trained"));
        }
        Ok(Self {
            query,
            key,
            value,
            query_before_norm: keys.flag("query_before_ln", false)?,
            residual_before: keys.flag("residual_before", false)?,
            value_before_softmax: keys.flag("value_before_softmax", true)?,
            value_initialized: keys.flag("value_initialized", value)?,
            regularization: keys.flag("regularization", value)?,
            dropout: probability(keys, "dropout_prob")?,
        })
    }
}

/// The parts of a recipe, which are added to `sources`; a list among them is a stack.
fn parts(list: Option<&Value>, sources: &mut Vec<(String, Source)>) -> Result<Vec<Setup>> {
    let wrong = |what: String| Error::config(ADAPTERS, what);
    let form =
        "a list of folders of bottleneck adapters and of tables of new ones: adapters = [\"a\", {preset = \"seq_bn\"}]";
    let list = match list {
        Some(Value::Array(list)) if list.len() > 1 => list,
        Some(Value::Array(_)) | None => return Err(wrong(format!("names two or more: {form}"))),
        Some(other) => return Err(wrong(format!("{other} is not {form}"))),
    };
    let mut one = |entry: &Value| {
        let (name, source) = match entry {
            Value::String(folder) => {
                let stem = Path::new(folder).file_name().and_then(|name| name.to_str()).unwrap_or("adapter");
                (stem.replace(['.', ','], "_"), Source::Folder(folder.clone()))
            }
            Value::Object(table) => {
                let mut table = table.clone();
                let name = match table.remove("name") {
                    None => "new".to_owned(),
                    Some(Value::String(name)) if !name.is_empty() && !name.contains(['.', ',']) => name,
                    Some(other) => {
                        return Err(wrong(format!("{other} cannot be a name: it is text without dots and commas")));
                    }
                };
                let config = BottleneckConfig::from_recipe(&table).map_err(|e| wrong(format!("{name}: {e}")))?;
                (name, Source::New(Box::new(config)))
            }
            other => return Err(wrong(format!("{other} is neither a folder nor a table; it takes {form}"))),
        };
        let taken = |name: &str| sources.iter().any(|(there, _)| there == name);
        let name = match taken(&name) {
            false => name,
            true => (2..).map(|n| format!("{name}-{n}")).find(|name| !taken(name)).unwrap_or(name),
        };
        sources.push((name.clone(), source));
        Ok(Setup::One(name))
    };
    list.iter()
        .map(|entry| match entry {
            Value::Array(stack) => Ok(Setup::Stack(stack.iter().map(&mut one).collect::<Result<_>>()?)),
            entry => one(entry),
        })
        .collect()
}

/// The parts of a file.
fn read_parts(list: Option<&Value>) -> Result<Vec<Part>> {
    let wrong = |what: String| Error::config(ADAPTERS, what);
    let list = match list {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(format!("{other} is no list"))),
    };
    let mut names = BTreeSet::new();
    list.iter()
        .map(|one| {
            let (Some(name), Some(config)) =
                (one.get("name").and_then(Value::as_str), one.get("config").and_then(Value::as_object))
            else {
                return Err(wrong(format!("{one} has no `name` and `config`")));
            };
            if !names.insert(name) || name.is_empty() || name.contains('.') {
                return Err(wrong(format!("`{name}` is there twice, or is no name")));
            }
            let trained = one.get("trained").and_then(Value::as_bool).unwrap_or(false);
            Ok(Part { name: name.to_owned(), config: part_config(name, config)?, trained })
        })
        .collect()
}

fn part_config(name: &str, config: &Map<String, Value>) -> Result<BottleneckConfig> {
    let of = |message: String| Error::config(ADAPTERS, format!("{name}: {message}"));
    match config.get("peft_type").and_then(Value::as_str) {
        Some(BOTTLENECK) => {}
        other => {
            let other = other.unwrap_or("of no type");
            return Err(of(format!("is {other}, and only bottleneck adapters can be put together")));
        }
    }
    let config = BottleneckConfig::from_adapter_config(config).map_err(|e| of(e.to_string()))?;
    if config.phm.is_some() {
        return Err(of("is a Compacter, whose adapters share parameters; dense ones can be put together".into()));
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn fusion(keys: Value) -> Result<ComposeConfig> {
        ComposeConfig::from_recipe(Kind::Fusion, keys.as_object().unwrap())
    }

    fn two(more: Value) -> Value {
        let mut keys = json!({"adapters": ["x/a", "y/a"]});
        keys.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        keys
    }

    #[test]
    fn a_recipe_names_its_parts() {
        let dynamic = fusion(two(json!({}))).unwrap();
        assert_eq!(dynamic.folders().collect::<Vec<_>>(), ["x/a", "y/a"]);
        assert_eq!((dynamic.setup.names(), dynamic.setup.fusion_name()), (vec!["a", "a-2"], Some("a,a-2".into())));
        let settings = dynamic.fusion.unwrap();
        assert!(settings.value && settings.regularization && settings.value_initialized && settings.dropout == 0.0);
        let settings = fusion(two(json!({"preset": "static"}))).unwrap().fusion.unwrap();
        assert!(settings.query && !settings.value && !settings.regularization);
        let stacks = fusion(json!({"adapters": [["lang", "b.1"], {"preset": "seq_bn"}]})).unwrap();
        assert_eq!(
            (stacks.setup.names(), stacks.setup.fusion_name()),
            (vec!["lang", "b_1", "new"], Some("b_1,new".into()))
        );
        let keys =
            json!({"adapters": ["a", {"reduction_factor": 3, "name": "b"}], "setup": "average", "weights": [1, 3]});
        let mean = ComposeConfig::from_recipe(Kind::Composition, keys.as_object().unwrap()).unwrap();
        assert!(matches!(&mean.setup, Setup::Average(list) if list[1].0 == 0.75) && mean.fusion.is_none());
    }

    #[test]
    fn wrong_values_name_the_key() {
        for (keys, expect) in [
            (json!({}), "adapters"),
            (json!({"adapters": ["a"]}), "two or more"),
            (json!({"adapters": "a"}), "adapters"),
            (json!({"adapters": ["a", 3]}), "neither a folder nor a table"),
            (json!({"adapters": ["a", {"reduction_factr": 3}]}), "did you mean `reduction_factor`"),
            (json!({"adapters": ["a", {"name": "x.y"}]}), "cannot be a name"),
            (two(json!({"preset": "dynamc"})), "did you mean `dynamic`"),
            (two(json!({"temperature": true})), "temperature"),
            (two(json!({"dropout_prob": 1.0})), "dropout_prob"),
            (two(json!({"query": false, "key": false, "value": false})), "nothing would be trained"),
            (two(json!({"querry": false})), "did you mean `query`"),
        ] {
            let e = fusion(keys.clone()).unwrap_err().to_string();
            assert!(e.contains(expect), "{keys}: {e}");
        }
        for (keys, expect) in [
            (two(json!({})), "nothing would be trained"),
            (json!({"adapters": ["a", {}], "setup": "stak"}), "setup"),
            (json!({"adapters": ["a", {}], "weights": [1, 2]}), "setup = \"average\""),
            (json!({"adapters": ["a", {}], "setup": "average", "weights": [1]}), "list of 2"),
            (json!({"adapters": ["a", {}], "query": true}), "query"),
        ] {
            let e = ComposeConfig::from_recipe(Kind::Composition, keys.as_object().unwrap()).unwrap_err().to_string();
            assert!(e.contains(expect), "{keys}: {e}");
        }
        let single = |name: &str| json!({"type": "single", "children": [name]});
        for (config, expect) in [
            (json!({"peft_type": "LORA"}), "only bottleneck adapters"),
            (json!({"peft_type": "BOTTLENECK", "is_parallel": true}), "parallel"),
            (json!({"peft_type": "BOTTLENECK", "phm_layer": true}), "Compacter"),
            (json!({"peft_type": "BOTTLENECK", "dropout": 7}), "dropout"),
        ] {
            let keys = json!({"adapters": [{"name": "one", "config": config}, {"name": "two", "config": {"peft_type": "BOTTLENECK"}}],
                "setup": {"type": "Fuse", "children": [single("one"), single("two")]}});
            let e =
                ComposeConfig::from_adapter_config(Kind::Fusion, keys.as_object().unwrap()).unwrap_err().to_string();
            assert!(e.contains(expect) && e.contains("one"), "{e}");
        }
        let other = json!({"adapters": [], "setup": {"type": "Stack", "children": [single("one")]}});
        let e =
            ComposeConfig::from_adapter_config(Kind::Composition, other.as_object().unwrap()).unwrap_err().to_string();
        assert!(e.contains("in its order: one"), "{e}");
    }
}
