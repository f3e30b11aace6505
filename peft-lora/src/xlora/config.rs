//! X-LoRA's config, with PEFT's keys and defaults (`peft/tuners/xlora/config.py`, 0.21.2).

use peft_core::config_keys::{completed, peft_defaults};
use peft_core::{BaseModel, ConfigKeys, Error, ExpectedTensor, Result, TargetSpec, task_keys};
use serde_json::{Map, Value, json};

use super::PEFT_TYPE;
use super::classifier::{Shape, Weighing};

/// The experts by number: folders in a recipe, names of folders in a file.
const ADAPTERS: &str = "adapters";
/// The experts' configs, in memory; in files they lie in the experts' folders.
pub(super) const EXPERTS: &str = "experts";
/// Ours: PEFT leaves a class head as it is.
const SAVED: &str = "modules_to_save";
const TOP_K: &str = "top_k_lora";
const SOFTMAX_OF_TOP: &str = "enable_softmax_topk";
/// More than anyone has, and few enough to count.
const MOST_EXPERTS: usize = 1024;

/// The settings of an X-LoRA adapter.
#[derive(Debug, Clone)]
pub struct XLoraConfig {
    /// The experts' folders, in order.
    folders: Vec<String>,
    pub(super) weighing: Weighing,
    depth: usize,
    width: usize,
    dropout: f32,
    /// Whether each layer has weights of its own.
    pub(super) layerwise: bool,
    pub(super) trains_experts: bool,
    /// Of what every expert adds.
    pub(super) scale: f64,
    /// Modules that are trained whole, such as a class head.
    pub(super) saved: TargetSpec,
    raw: Map<String, Value>,
}

fn defaults() -> Map<String, Value> {
    peft_defaults(
        PEFT_TYPE,
        json!({
            ADAPTERS: null, SOFTMAX_OF_TOP: false, "enable_softmax": true, "global_scaling_weight": 1.0, "hidden_size": null,
            "layerwise_scalings": false, "scaling_pass_value": 0.0, "softmax_temperature": 1.0, TOP_K: null,
            "use_trainable_adapters": false, "xlora_depth": 1, "xlora_dropout_p": 0.2, "xlora_size": 2048
        }),
    )
}

impl XLoraConfig {
    /// Reads the `[method]` table of a recipe: PEFT's keys, and the experts' folders in `adapters`, a list or PEFT's table
    /// `{"0": …, "1": …}`.
    ///
    /// # Errors
    /// An unknown key, no experts, settings under which nothing would be learnt, or a value that is wrong or not honoured; the message
    /// names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        let mut known = defaults();
        known.insert(SAVED.into(), Value::Null);
        ConfigKeys(config).refuse_unknown("xlora", &known)?;
        let read = Self::read(config.clone())?;
        read.check_training()?;
        Ok(read)
    }

    /// Reads the config of an existing adapter.
    ///
    /// # Errors
    /// A value that is wrong or not honoured; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        Self::read(config.clone())
    }

    fn read(raw: Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(&raw);
        let folders = folders(keys.get(ADAPTERS))?;
        let temperature = keys.number("softmax_temperature", 1.0)?;
        if temperature <= 0.0 {
            return Err(Error::config("softmax_temperature", format!("{temperature} is not above 0")));
        }
        if keys.number("scaling_pass_value", 0.0)? != 0.0 {
            let message = "is not 0: a first pass through the base with its experts is not built, only one through the base alone";
            return Err(Error::config("scaling_pass_value", message));
        }
        let dropout = keys.number("xlora_dropout_p", 0.2)?;
        if !(0.0..1.0).contains(&dropout) {
            return Err(Error::config("xlora_dropout_p", format!("{dropout} is outside [0, 1)")));
        }
        let of_saved = [SAVED, "task_type"].into_iter();
        let of_saved = of_saved.filter_map(|key| Some((key.to_owned(), keys.get(key)?.clone())));
        Ok(Self {
            weighing: Weighing {
                softmax: keys.flag("enable_softmax", true)?.then_some(temperature),
                top_k: keys.count(TOP_K, folders.len())?,
                softmax_of_top: keys.flag(SOFTMAX_OF_TOP, false)?,
            },
            depth: keys.count("xlora_depth", 64)?.unwrap_or(1),
            width: keys.count("xlora_size", 65_536)?.unwrap_or(2048),
            dropout: dropout as f32,
            layerwise: keys.flag("layerwise_scalings", false)?,
            trains_experts: keys.flag("use_trainable_adapters", false)?,
            scale: keys.number("global_scaling_weight", 1.0)?,
            saved: TargetSpec::from_config(&of_saved.collect())?,
            folders,
            raw,
        })
    }

    /// Refuses settings under which the classifier learns nothing.
    ///
    /// # Errors
    /// What makes its weights constants, by its key.
    pub fn check_training(&self) -> Result<()> {
        if self.folders.len() == 1 && self.weighing.softmax.is_some() {
            let message = "is one expert, whose weight a softmax makes 1 for every token: name two or more";
            return Err(Error::config(ADAPTERS, message));
        }
        if self.weighing.softmax_of_top && (self.folders.len() == 1 || self.weighing.top_k == Some(1)) {
            let message = format!("makes the weight of one expert 1 for every token: set {TOP_K} to 2 or more");
            return Err(Error::config(SOFTMAX_OF_TOP, message));
        }
        Ok(())
    }

    /// The experts' folders, in order: in a recipe as it names them, in a file those beside it.
    #[must_use]
    pub fn folders(&self) -> &[String] {
        &self.folders
    }

    /// The experts' configs, of an adapter that was read.
    ///
    /// # Errors
    /// When they are not there.
    pub fn expert_configs(&self) -> Result<Vec<&Map<String, Value>>> {
        let list = self.raw.get(EXPERTS).and_then(Value::as_array).into_iter().flatten();
        let found: Vec<_> = list.filter_map(Value::as_object).collect();
        if found.len() != self.folders.len() {
            return Err(Error::config(ADAPTERS, "are not there: X-LoRA cannot be a part of another adapter's file"));
        }
        Ok(found)
    }

    /// This config for the task of `base`: a class head is trained and stored whole ([`task_keys`]).
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.extend(task_keys(&self.saved, base)?);
        Self::read(raw)
    }

    /// What the file of an adapter for `base` has to hold at least, before anything of a size that the config says is made.
    ///
    /// # Errors
    /// A config for another model.
    pub fn stored(&self, base: &dyn BaseModel) -> Result<Vec<ExpectedTensor>> {
        Ok(self.shape(base, None)?.inner())
    }

    /// The shape of the classifier, which has weights of its own for each of `layers`.
    pub(super) fn shape(&self, base: &dyn BaseModel, layers: Option<usize>) -> Result<Shape> {
        let hidden = self.hidden_size(base)?;
        let (depth, width, dropout, experts) = (self.depth, self.width, self.dropout, self.folders.len());
        Ok(Shape { hidden, depth, width, dropout, experts, layers })
    }

    /// The width of the hidden states.
    fn hidden_size(&self, base: &dyn BaseModel) -> Result<usize> {
        let Some(dims) = base.prompt_dims() else {
            let message =
                format!("cannot be told: X-LoRA reads hidden states, and a `{}` has none here", base.model_type());
            return Err(Error::config("hidden_size", message));
        };
        match ConfigKeys(&self.raw).count("hidden_size", usize::MAX)? {
            Some(given) if given != dims.hidden_size => {
                Err(Error::config("hidden_size", format!("is {given}, and this model's is {}", dims.hidden_size)))
            }
            _ => Ok(dims.hidden_size),
        }
    }

    /// The config as it is kept: PEFT's keys, and the configs of the experts, which are written beside it.
    pub(super) fn to_adapter_config(&self, hidden_size: usize, experts: Vec<Value>) -> Map<String, Value> {
        let mut out = completed(defaults(), &self.raw);
        let names = (0..experts.len()).map(|i| (i.to_string(), i.to_string().into()));
        out.insert(ADAPTERS.into(), Value::Object(names.collect()));
        out.insert("hidden_size".into(), hidden_size.into());
        out.insert(EXPERTS.into(), experts.into());
        out
    }
}

/// The folders of the experts in the order of their numbers.
fn folders(value: Option<&Value>) -> Result<Vec<String>> {
    let wrong = |what: String| {
        let form = "it names the folders of LoRA adapters: adapters = [\"a\", \"b\"], or PEFT's {0 = \"a\", 1 = \"b\"}";
        Error::config(ADAPTERS, format!("{what}; {form}"))
    };
    let one = |value: &Value| match value {
        Value::String(folder) => Ok(folder.clone()),
        other => Err(wrong(format!("holds {other}, which is no folder"))),
    };
    let found: Vec<String> = match value {
        None => return Err(wrong("is not given".into())),
        Some(Value::Array(list)) => list.iter().map(one).collect::<Result<_>>()?,
        Some(Value::Object(map)) => (0..map.len())
            .map(|i| match map.get(&i.to_string()) {
                Some(value) => one(value),
                None => Err(wrong(format!(
                    "has {} experts and no `{i}`: PEFT numbers them from 0, and leaves others alone in every pass",
                    map.len()
                ))),
            })
            .collect::<Result<_>>()?,
        Some(other) => return Err(wrong(format!("is {other}"))),
    };
    match found.len() {
        0 => Err(wrong("names none".into())),
        n if n > MOST_EXPERTS => Err(wrong(format!("names {n}, more than {MOST_EXPERTS}"))),
        _ => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn recipe(keys: Value) -> Result<XLoraConfig> {
        let mut table = json!({"adapters": ["a", "b"]});
        table.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        XLoraConfig::from_recipe(table.as_object().unwrap())
    }

    #[test]
    fn experts_are_numbered() {
        let table = recipe(json!({"adapters": {"1": "y", "0": "x"}})).unwrap();
        assert_eq!((table.folders(), recipe(json!({})).unwrap().folders().len()), (&["x".into(), "y".into()][..], 2));
        let softmax = Weighing { softmax: Some(1.0), top_k: None, softmax_of_top: false };
        assert_eq!((table.weighing, table.depth, table.dropout), (softmax, 1, 0.2));
        assert!(table.expert_configs().is_err());
    }

    #[test]
    fn wrong_values_name_the_key() {
        for (keys, expect) in [
            (json!({"adapters": null}), "adapters"),
            (json!({"adapters": []}), "names none"),
            (json!({"adapters": ["a", 3]}), "no folder"),
            (json!({"adapters": {"law": "a", "code": "b"}}), "no `0`"),
            (json!({"adapters": ["a"]}), "two or more"),
            (json!({"adapter": ["a"]}), "did you mean `adapters`"),
            (json!({"top_k_lora": 3}), "top_k_lora"),
            (json!({"top_k_lora": 1, "enable_softmax_topk": true}), "enable_softmax_topk"),
            (json!({"softmax_temperature": 0}), "softmax_temperature"),
            (json!({"scaling_pass_value": 0.5}), "scaling_pass_value"),
            (json!({"xlora_dropout_p": 1.0}), "xlora_dropout_p"),
            (json!({"xlora_depth": 0}), "xlora_depth"),
            (json!({"layerwise_scalings": 1}), "layerwise_scalings"),
        ] {
            let e = recipe(keys.clone()).unwrap_err().to_string();
            assert!(e.contains(expect), "{keys}: {e}");
        }
        assert!(recipe(json!({"adapters": ["a"], "enable_softmax": false})).is_ok());
    }
}
