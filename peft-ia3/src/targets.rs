//! Which modules IA³ scales, and which of them at their input.

use peft_core::python_regex::PythonRegex;
use peft_core::select_defaults::{default_model_types, default_target_modules};
use peft_core::suggest::did_you_mean;
use peft_core::{Error, Result, TargetModules};
use serde_json::Value;

/// The key that says which targets are scaled at their input.
pub(crate) const FEEDFORWARD: &str = "feedforward_modules";
/// `target_modules` of a recipe that stands for the paper's places.
pub(crate) const PAPER: &str = "paper";

/// The paper's places by model type: keys, values, and the input of the feed-forward's last product. PEFT's defaults have
/// queries in place of keys for many families. Families that make queries, keys and values in one product have no entry.
const PAPER_TARGETS: &[(&[&str], &[&str], &str)] = &[
    (
        &["llama", "llama4", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"],
        &["k_proj", "v_proj"],
        "down_proj",
    ),
    (&["mixtral"], &["k_proj", "v_proj"], "w2"),
    (&["opt", "bart", "phi"], &["k_proj", "v_proj"], "fc2"),
    (&["gptj"], &["k_proj", "v_proj"], "fc_out"),
    (&["gpt_neo"], &["k_proj", "v_proj"], "c_proj"),
    (&["t5", "mt5"], &["k", "v"], "wo"),
];

/// The paper's targets for a model type, and the one of them that is scaled at its input.
///
/// # Errors
/// A model type without an entry.
pub(crate) fn paper(model_type: &str) -> Result<(TargetModules, Feedforward)> {
    let found = PAPER_TARGETS.iter().find(|(types, ..)| types.contains(&model_type));
    let (_, attention, feedforward) = found.ok_or_else(|| {
        let message = format!(
            "\"{PAPER}\" means keys, values and the inner activations, whose modules are not known here for model type \
             `{model_type}`; name them, and those scaled at their input in `{FEEDFORWARD}`"
        );
        Error::config("target_modules", message)
    })?;
    let names = attention.iter().chain([feedforward]).map(|name| (*name).to_owned()).collect();
    Ok((TargetModules::Names(names), Feedforward::Names(vec![(*feedforward).to_owned()])))
}

/// `feedforward_modules`: the targets that are scaled at their input.
#[derive(Debug, Clone)]
pub(crate) enum Feedforward {
    /// Ends of module paths, dot or not: PEFT compares with plain `endswith` here.
    Names(Vec<String>),
    /// A Python regular expression over the whole path, and as it was written.
    Regex(PythonRegex, String),
}

impl Feedforward {
    pub(crate) fn parse(value: &Value) -> Result<Self> {
        match value {
            Value::String(pattern) => Ok(Self::Regex(PythonRegex::fullmatch(FEEDFORWARD, pattern)?, pattern.clone())),
            Value::Array(list) => list
                .iter()
                .map(|item| {
                    let name = item.as_str().map(str::to_owned);
                    name.ok_or_else(|| Error::config(FEEDFORWARD, format!("{item} is not a name")))
                })
                .collect::<Result<_>>()
                .map(Self::Names),
            other => Err(Error::config(FEEDFORWARD, format!("{other} is neither a list of names nor a pattern"))),
        }
    }

    /// PEFT's default for a model type.
    pub(crate) fn default_for(model_type: &str) -> Result<Self> {
        match default_target_modules("IA3_FEEDFORWARD", model_type) {
            Some(TargetModules::Names(names)) => Ok(Self::Names(names)),
            _ => Err(Error::config(
                FEEDFORWARD,
                format!(
                    "is not given and there is no default for model type `{model_type}`; name the targets that are scaled at \
                     their input, or give an empty list{}",
                    did_you_mean(model_type, default_model_types("IA3_FEEDFORWARD"))
                ),
            )),
        }
    }

    /// Whether the module at `path` is scaled at its input.
    pub(crate) fn contains(&self, path: &str) -> Result<bool> {
        match self {
            Self::Names(names) => Ok(names.iter().any(|name| path.ends_with(name.as_str()))),
            Self::Regex(regex, _) => regex.is_match(path),
        }
    }

    /// The patterns as written.
    pub(crate) fn patterns(&self) -> Vec<&str> {
        match self {
            Self::Names(names) => names.iter().map(String::as_str).collect(),
            Self::Regex(_, pattern) => vec![pattern],
        }
    }

    /// PEFT demands that each name is one of the targets, where both are lists.
    pub(crate) fn check_among(&self, targets: &TargetModules) -> Result<()> {
        let (Self::Names(names), TargetModules::Names(targets)) = (self, targets) else { return Ok(()) };
        match names.iter().find(|name| !targets.contains(name)) {
            None => Ok(()),
            Some(name) => {
                let near = did_you_mean(name, targets);
                Err(Error::config(FEEDFORWARD, format!("`{name}` is not among `target_modules`{near}")))
            }
        }
    }

    /// This in a form that PEFT reads back beside `targets`. What PEFT itself writes for a default that is not among the
    /// targets, or beside a list that `all-linear` became, it refuses to load.
    pub(crate) fn beside(&self, targets: &TargetModules) -> Self {
        match (self, targets) {
            (Self::Names(names), TargetModules::Names(list)) if self.check_among(targets).is_err() => {
                let ends = |target: &&String| names.iter().any(|name| target.ends_with(name.as_str()));
                Self::Names(list.iter().filter(ends).cloned().collect())
            }
            _ => self.clone(),
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        match self {
            Self::Names(names) => {
                let mut names = names.clone();
                names.sort();
                names.dedup();
                names.into()
            }
            Self::Regex(_, pattern) => pattern.clone().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn names(list: &[&str]) -> TargetModules {
        TargetModules::Names(list.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn ends_of_names_need_no_dot_and_patterns_match_whole_names() {
        let ends = Feedforward::parse(&json!(["n_proj"])).unwrap();
        assert!(ends.contains("model.layers.0.mlp.down_proj").unwrap());
        let pattern = Feedforward::parse(&json!("down_proj")).unwrap();
        assert!(!pattern.contains("model.layers.0.mlp.down_proj").unwrap());
        assert!(Feedforward::parse(&json!(".*down_proj")).unwrap().contains("mlp.down_proj").unwrap());
        assert!(Feedforward::parse(&json!("(")).is_err() && Feedforward::parse(&json!([1])).is_err());
    }

    #[test]
    fn what_is_written_can_be_read_by_peft() {
        let down = Feedforward::parse(&json!(["down_proj"])).unwrap();
        assert_eq!(down.beside(&names(&["k_proj", "down_proj"])).to_json(), json!(["down_proj"]));
        assert_eq!(down.beside(&names(&["k_proj", "v_proj"])).to_json(), json!([]));
        let full = names(&["layers.1.mlp.down_proj", "layers.0.mlp.down_proj", "layers.0.mlp.up_proj"]);
        assert_eq!(down.beside(&full).to_json(), json!(["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]));
        let error = down.check_among(&names(&["k_proj", "dawn_proj"])).unwrap_err().to_string();
        assert!(error.contains("`down_proj` is not among") && error.contains("`dawn_proj`"), "{error}");
    }

    #[test]
    fn the_papers_places_are_in_the_tables_of_peft_or_differ_by_the_key() {
        for (types, attention, feedforward) in PAPER_TARGETS {
            for model_type in *types {
                let Some(TargetModules::Names(default)) = default_target_modules("IA3", model_type) else {
                    unreachable!()
                };
                let gated = *model_type == "mt5";
                assert!(default.iter().any(|name| name == feedforward) || gated, "{model_type}");
                assert!(default.iter().any(|name| attention.contains(&name.as_str())), "{model_type}");
            }
        }
        assert!(paper("gpt2").unwrap_err().to_string().contains("`gpt2`"));
    }
}
