//! LoRA's config, with PEFT's keys, defaults and meanings (`peft/tuners/lora/config.py`, 0.21).

use peft_core::config_keys::{completed, peft_defaults};
use peft_core::select_spec::TargetSpec;
use peft_core::suggest::did_you_mean;
use peft_core::{BaseModel, ConfigKeys, Error, Result, task_keys, token_ids};
use serde_json::{Map, Value, json};

use crate::eva::EvaConfig;
use crate::init::Init;

/// Which biases are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BiasTraining {
    /// None.
    None,
    /// Every bias of the model.
    All,
    /// The biases of the adapted layers.
    LoraOnly,
}

/// Rows of embedding tables that are trained: `trainable_token_indices`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainableTokens {
    /// `(end of the embedding's path, token ids)`; without a path, the model's table of tokens.
    pub by_module: Vec<(Option<String>, Vec<u32>)>,
}

/// The settings of a LoRA adapter.
#[derive(Debug, Clone)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Scale numerator: the delta is multiplied by `lora_alpha / r`, or `lora_alpha / √r` with rsLoRA.
    pub lora_alpha: f64,
    /// Probability of dropout on LoRA's input.
    pub lora_dropout: f32,
    /// Which modules, with ranks and alphas by pattern.
    pub targets: TargetSpec,
    /// Which biases are trained.
    pub bias: BiasTraining,
    /// Scale by `1/√r` (Kalajdzievski, 2023).
    pub use_rslora: bool,
    /// Weight-decomposed LoRA (Liu et al., 2024).
    pub use_dora: bool,
    /// A bias on B.
    pub lora_bias: bool,
    /// A gate for each sequence in the place of the scale (UniPELT). PEFT has none, so it is for a part of a union.
    pub use_gating: bool,
    /// How A and B start.
    pub init: Init,
    /// How EVA finds A and the ranks, where `init` says so.
    pub eva: EvaConfig,
    /// Embedding rows trained beside the low-rank part.
    pub trainable_tokens: Option<TrainableTokens>,
    /// The config as read, from which it is written back with PEFT's defaults filled in.
    raw: Map<String, Value>,
}

/// PEFT's keys with their defaults.
fn defaults() -> Map<String, Value> {
    let own = json!({
        "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "bias": "none", "corda_config": null,
        "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false,
        "init_lora_weights": true, "layer_replication": null, "layers_pattern": null, "layers_to_transform": null,
        "loftq_config": {}, "lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.0, "lora_ga_config": null,
        "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null, "qalora_group_size": 16,
        "r": 8, "rank_pattern": {}, "target_modules": null, "target_parameters": null, "trainable_token_indices": null,
        "use_bdlora": null, "use_dora": false, "use_qalora": false, "use_rslora": false
    });
    peft_defaults("LORA", own)
}

/// Keys whose features change the maths and are not built here: any value but the default is refused.
const UNSUPPORTED: &[&str] = &[
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// Keys that PEFT knows and that need nothing from a reader.
const OTHER_KEYS: &[&str] = &["kasa_config", "monteclora_config", "velora_config", "runtime_config"];

/// The key of a gate, in a config of our own.
const GATE: &str = "use_gating";

impl LoraConfig {
    /// Reads the config of an existing adapter. Keys that PEFT may add later are ignored, as PEFT does; keys that change
    /// the maths in ways that are not built here are refused.
    ///
    /// # Errors
    /// A value of the wrong type or out of range; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        Self::parse(config, Init::of_file)
    }

    /// Reads the `[method]` table of a recipe: PEFT's keys, where an unknown one is an error with the nearest known.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type or out of range; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        let known = defaults();
        for key in config.keys() {
            if !known.contains_key(key) && !OTHER_KEYS.contains(&key.as_str()) && key != GATE {
                let near = did_you_mean(key, known.keys().map(String::as_str).chain([GATE]));
                return Err(Error::config(key, format!("is not a key of method lora{near}")));
            }
        }
        Self::parse(config, Init::parse)
    }

    pub(crate) fn parse(config: &Map<String, Value>, init: fn(Option<&Value>) -> Result<Init>) -> Result<Self> {
        let keys = ConfigKeys(config);
        let get = |key: &str| keys.get(key);
        for key in UNSUPPORTED {
            if get(key).is_some_and(|v| *v != Value::Bool(false)) {
                return Err(Error::config(*key, "is not supported; train or convert the adapter without it"));
            }
        }
        let r = keys.count("r", 65_536)?.unwrap_or(8);
        let lora_dropout = keys.number("lora_dropout", 0.0)?;
        if !(0.0..1.0).contains(&lora_dropout) {
            return Err(Error::config("lora_dropout", format!("{lora_dropout} is outside [0, 1)")));
        }
        let bias = match get("bias") {
            None => BiasTraining::None,
            Some(Value::String(s)) if s == "none" => BiasTraining::None,
            Some(Value::String(s)) if s == "all" => BiasTraining::All,
            Some(Value::String(s)) if s == "lora_only" => BiasTraining::LoraOnly,
            Some(v) => return Err(Error::config("bias", format!("{v} is none of \"none\", \"all\", \"lora_only\""))),
        };
        let mut parsed = Self {
            r,
            lora_alpha: keys.number("lora_alpha", 8.0)?,
            lora_dropout: lora_dropout as f32,
            targets: TargetSpec::from_config(config)?,
            bias,
            use_rslora: keys.flag("use_rslora", false)?,
            use_dora: keys.flag("use_dora", false)?,
            lora_bias: keys.flag("lora_bias", false)?,
            use_gating: keys.flag(GATE, false)?,
            init: init(get("init_lora_weights"))?,
            eva: EvaConfig::parse(get("eva_config"))?,
            trainable_tokens: get("trainable_token_indices").map(parse_tokens).transpose()?,
            raw: config.clone(),
        };
        if !parsed.use_gating {
            parsed.raw.remove(GATE);
        } else if parsed.use_dora || parsed.lora_bias || parsed.init.subtracts() {
            let message = "goes with a plain LoRA: not with use_dora, lora_bias, or a start at a part of the weight";
            return Err(Error::config(GATE, message));
        }
        if parsed.use_dora && parsed.lora_bias {
            return Err(Error::config("lora_bias", "cannot be combined with use_dora"));
        }
        if parsed.lora_bias && !matches!(parsed.init, Init::Default | Init::Random) {
            // PEFT refuses to load such a config.
            return Err(Error::config("lora_bias", "goes with init_lora_weights = true or false only"));
        }
        Ok(parsed)
    }

    /// This config as PEFT completes it for the task of `base` ([`task_keys`]).
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        self.with_keys(task_keys(&self.targets, base)?)
    }

    /// The config as read.
    pub(crate) fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// This config with other values for some of its keys.
    ///
    /// # Errors
    /// A value of the wrong type or out of range; the message names the key.
    pub(crate) fn with_keys(&self, keys: Map<String, Value>) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.extend(keys);
        Self::parse(&raw, Init::parse)
    }

    /// The scale of the delta for a rank and an alpha.
    #[must_use]
    pub fn scale(&self, r: usize, alpha: f64) -> f64 {
        if self.use_rslora { alpha / (r as f64).sqrt() } else { alpha / r as f64 }
    }

    /// The keys of a config that change when PiSSA or OLoRA are written as a plain LoRA of twice the rank on the original
    /// base, as PEFT's `path_initial_model_for_weight_conversion` does. Every alpha grows so that every scale stays: by 2,
    /// or by √2 with rsLoRA; patterns likewise, which PEFT leaves out for rsLoRA.
    #[must_use]
    pub(crate) fn doubled(&self) -> Map<String, Value> {
        let factor = if self.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        let alpha = |alpha: f64| {
            let alpha = alpha * factor;
            // Whole numbers stay whole, as PEFT writes them.
            if alpha.fract() == 0.0 && alpha.abs() < 1e15 { Value::from(alpha as i64) } else { Value::from(alpha) }
        };
        let ranks: Map<_, _> = self.targets.rank_pattern.iter().map(|(k, r)| (k.clone(), Value::from(2 * r))).collect();
        let alphas: Map<_, _> = self.targets.alpha_pattern.iter().map(|(k, a)| (k.clone(), alpha(*a))).collect();
        let mut keys = Map::new();
        keys.insert("init_lora_weights".into(), true.into());
        keys.insert("r".into(), (2 * self.r).into());
        keys.insert("lora_alpha".into(), alpha(self.lora_alpha));
        keys.insert("rank_pattern".into(), ranks.into());
        keys.insert("alpha_pattern".into(), alphas.into());
        keys
    }

    /// The config as PEFT writes it: its keys and defaults, ours where given. `target_modules` are the names that were
    /// matched where the config said `all-linear`.
    #[must_use]
    pub fn to_adapter_config(&self, target_modules: Option<Value>) -> Map<String, Value> {
        let mut out = completed(defaults(), &self.raw);
        out.extend(target_modules.map(|targets| ("target_modules".to_owned(), targets)));
        out
    }
}

fn parse_tokens(value: &Value) -> Result<TrainableTokens> {
    let key = "trainable_token_indices";
    let by_module = match value {
        Value::Object(map) => {
            map.iter().map(|(k, v)| Ok((Some(k.clone()), token_ids(key, v)?))).collect::<Result<Vec<_>>>()?
        }
        other => vec![(None, token_ids(key, other)?)],
    };
    Ok(TrainableTokens { by_module })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(text: &str) -> Result<LoraConfig> {
        let Value::Object(map) = serde_json::from_str(text).unwrap() else { unreachable!() };
        LoraConfig::from_recipe(&map)
    }

    #[test]
    fn peft_defaults_and_scales() {
        let c = parse("{}").unwrap();
        assert_eq!((c.r, c.lora_alpha, c.scale(8, 8.0)), (8, 8.0, 1.0));
        let rs = parse(r#"{"r": 4, "lora_alpha": 8, "use_rslora": true}"#).unwrap();
        assert_eq!(rs.scale(4, 8.0), 4.0);
    }

    /// What PEFT starts from data may be read, since the file holds the result; what changed the base may not.
    #[test]
    fn files_of_other_initialisations() {
        let read = |name: &str| {
            let Value::Object(map) = json!({ "init_lora_weights": name }) else { unreachable!() };
            LoraConfig::from_adapter_config(&map)
        };
        assert_eq!(read("eva").unwrap().init, Init::Eva);
        assert_eq!(read("mica").unwrap().init, Init::Default);
        assert_eq!(read("pissa_niter_4").unwrap().init, Init::Pissa { iterations: Some(4) });
        for name in ["corda", "loftq", "lora_ga"] {
            let e = read(name).unwrap_err().to_string();
            assert!(e.contains("path_initial_model_for_weight_conversion"), "{e}");
        }
    }

    #[test]
    fn doubling_keeps_every_scale() {
        for rslora in [false, true] {
            let c = parse(&format!(
                r#"{{"r": 6, "lora_alpha": 9, "use_rslora": {rslora}, "rank_pattern": {{"q_proj": 4}},
                    "alpha_pattern": {{"q_proj": 2.5}}, "init_lora_weights": "pissa"}}"#
            ))
            .unwrap();
            let mut map = c.to_adapter_config(None);
            map.extend(c.doubled());
            let d = LoraConfig::from_adapter_config(&map).unwrap();
            assert_eq!((d.r, d.targets.rank_pattern[0].1, d.init), (12, 8, Init::Default));
            assert!((d.scale(12, d.lora_alpha) - c.scale(6, 9.0)).abs() < 1e-12);
            assert!((d.scale(8, d.targets.alpha_pattern[0].1) - c.scale(4, 2.5)).abs() < 1e-12);
        }
    }

    #[test]
    fn wrong_values_name_the_key() {
        for (text, expect) in [
            (r#"{"lora_alhpa": 3}"#, "lora_alpha"),
            (r#"{"r": 0}"#, "`r`"),
            (r#"{"r": "four"}"#, "`r`"),
            (r#"{"lora_dropout": 1.0}"#, "lora_dropout"),
            (r#"{"bias": "some"}"#, "lora_only"),
            (r#"{"use_dora": 1}"#, "use_dora"),
            (r#"{"use_gatin": true}"#, "use_gating"),
            (r#"{"use_gating": true, "use_dora": true}"#, "use_gating"),
            (r#"{"use_gating": true, "init_lora_weights": "pissa"}"#, "use_gating"),
            (r#"{"use_qalora": true}"#, "use_qalora"),
            (r#"{"trainable_token_indices": [1, 1]}"#, "twice"),
            (r#"{"init_lora_weights": "psisa"}"#, "pissa"),
            (r#"{"init_lora_weights": "pissa_niter_x"}"#, "pissa_niter_16"),
            (r#"{"init_lora_weights": "lora_ga"}"#, "pissa_niter_16"),
            (r#"{"eva_config": {"rho": 0.5}}"#, "eva_config.rho"),
            (r#"{"eva_config": {"tua": 0.5}}"#, "tau"),
            (r#"{"init_lora_weights": "loftq"}"#, "GGUF"),
            (r#"{"init_lora_weights": "corda"}"#, "not built here"),
            (r#"{"init_lora_weights": "orthogonal", "lora_bias": true}"#, "lora_bias"),
        ] {
            let e = parse(text).unwrap_err().to_string();
            assert!(e.contains(expect), "{text}: {e}");
        }
    }
}
