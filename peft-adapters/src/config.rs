//! The config of bottleneck adapters, with AdapterHub's keys, presets and defaults (`BnConfig` and its subclasses in
//! `adapters/configuration/adapter_config.py`, 1.3).

use std::collections::BTreeMap;

use peft_core::config_keys::{completed, peft_defaults};
use peft_core::kernels::Activation;
use peft_core::suggest::did_you_mean;
use peft_core::{BaseModel, ConfigKeys, Error, Result, TargetSpec, task_keys};
use serde_json::{Map, Value, json};

use crate::bottleneck::{Placement, Residual};
use crate::phm::PhmConfig;

/// `peft_type` of bottleneck adapters; PEFT has no such method, so the name is ours.
pub(crate) const PEFT_TYPE: &str = "BOTTLENECK";
/// The key of a recipe that names a preset.
const PRESET: &str = "preset";

/// Named settings: AdapterHub's, under its present and its older name.
const PRESETS: [(&str, &str); 7] = [
    ("seq_bn", "pfeiffer"),
    ("double_seq_bn", "houlsby"),
    ("par_bn", "parallel"),
    ("scaled_par_bn", "scaled_parallel"),
    ("compacter", "compacter"),
    ("compacter++", "compacter++"),
    ("adapter_plus", "adapter_plus"),
];

/// Settings of AdapterHub's that say something which is not here: the key, and the value under which it says nothing.
fn not_here() -> [(&'static str, Value); 2] {
    [("inv_adapter", Value::Null), ("init_weights_seed", Value::Null)]
}

/// The keys of AdapterHub's `BnConfig`.
pub(crate) const ADAPTERHUB_KEYS: [&str; 33] = [
    "mh_adapter",
    "output_adapter",
    "reduction_factor",
    "non_linearity",
    "original_ln_before",
    "original_ln_after",
    "ln_before",
    "ln_after",
    "init_weights",
    "init_weights_seed",
    "is_parallel",
    "scaling",
    "use_gating",
    "residual_before_ln",
    "adapter_residual_before_ln",
    "inv_adapter",
    "inv_adapter_reduction_factor",
    "cross_adapter",
    "leave_out",
    "dropout",
    "phm_layer",
    "phm_dim",
    "factorized_phm_W",
    "shared_W_phm",
    "shared_phm_rule",
    "factorized_phm_rule",
    "phm_c_init",
    "phm_init_range",
    "learn_phm",
    "hypercomplex_nonlinearity",
    "phm_rank",
    "phm_bias",
    "stochastic_depth",
];

/// What an adapter's projections start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// Normal with standard deviation 0.02.
    Bert,
    /// `down` uniform as PyTorch's linear layers, `up` zero: the adapter starts as nothing.
    MamAdapter,
    /// Normal with standard deviation 0.01, cut off at two of them.
    Houlsby,
}

/// A factor on the network's result.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum ScalingKind {
    Fixed(f64),
    Learned,
    Channel,
}

/// The settings of a bottleneck adapter.
#[derive(Debug, Clone)]
pub struct BottleneckConfig {
    pub(crate) behind_attention: bool,
    pub(crate) behind_cross_attention: bool,
    pub(crate) behind_feed_forward: bool,
    reduction: Reduction,
    pub(crate) activation: Activation,
    pub(crate) placement: Placement,
    pub(crate) joins_stream: bool,
    pub(crate) norm_before: bool,
    pub(crate) norm_after: bool,
    pub(crate) residual_before_norm: bool,
    pub(crate) start: Start,
    pub(crate) scaling: ScalingKind,
    pub(crate) dropout: f32,
    pub(crate) stochastic_depth: f32,
    pub(crate) gated: bool,
    /// Blocks without an adapter.
    pub(crate) leave_out: Vec<usize>,
    /// Modules that are trained whole, such as a class head.
    pub(crate) saved: TargetSpec,
    /// What the projections are made of, where they are not dense.
    pub(crate) phm: Option<PhmConfig>,
    raw: Map<String, Value>,
}

/// By how much the hidden size is divided.
#[derive(Debug, Clone)]
struct Reduction {
    default: Option<f64>,
    of_block: BTreeMap<usize, f64>,
}

/// The keys that this method knows, with the values of a preset.
fn defaults(preset: &str) -> Map<String, Value> {
    let mut keys = json!({
        "mh_adapter": false, "output_adapter": true, "reduction_factor": 16, "non_linearity": "relu",
        "original_ln_before": false, "original_ln_after": true, "ln_before": false, "ln_after": false,
        "init_weights": "bert", "is_parallel": false, "scaling": 1.0, "residual_before_ln": true,
        "use_gating": false, "stochastic_depth": 0.0,
        "adapter_residual_before_ln": false, "leave_out": [], "dropout": 0.0, "modules_to_save": null, "cross_adapter": false,
        "inv_adapter_reduction_factor": null, "phm_layer": false, "phm_dim": 4, "factorized_phm_W": true, "shared_W_phm": false,
        "shared_phm_rule": true, "factorized_phm_rule": false, "phm_c_init": "normal", "phm_init_range": 0.0001,
        "learn_phm": true, "hypercomplex_nonlinearity": "glorot-uniform", "phm_rank": 1, "phm_bias": true
    });
    let changes = match preset {
        "double_seq_bn" => json!({"mh_adapter": true, "non_linearity": "swish"}),
        "par_bn" => json!({"is_parallel": true, "reduction_factor": 2, "init_weights": "mam_adapter", "scaling": 4.0}),
        "scaled_par_bn" => {
            json!({"is_parallel": true, "reduction_factor": 2, "init_weights": "mam_adapter", "scaling": "learned"})
        }
        "compacter" => {
            json!({"mh_adapter": true, "phm_layer": true, "reduction_factor": 32, "non_linearity": "gelu"})
        }
        "compacter++" => {
            json!({"original_ln_before": true, "phm_layer": true, "reduction_factor": 32, "non_linearity": "gelu"})
        }
        "adapter_plus" => json!({
            "original_ln_before": true, "original_ln_after": false, "residual_before_ln": false, "init_weights": "houlsby",
            "scaling": "channel", "reduction_factor": 96, "non_linearity": "gelu", "stochastic_depth": 0.1
        }),
        _ => json!({"original_ln_before": true}),
    };
    if let (Value::Object(keys), Value::Object(changes)) = (&mut keys, changes) {
        keys.extend(changes);
        keys.extend(not_here().map(|(key, value)| (key.to_string(), value)));
    }
    peft_defaults(PEFT_TYPE, keys)
}

fn preset(name: &str) -> Result<&'static str> {
    let found = PRESETS.iter().find(|(new, old)| name == *new || name == *old);
    found.map(|(new, _)| *new).ok_or_else(|| {
        let names = PRESETS.iter().flat_map(|(new, old)| [*new, *old]);
        let known: Vec<_> = PRESETS.iter().map(|p| p.0).collect();
        let near = did_you_mean(name, names);
        Error::config(PRESET, format!("`{name}` is not one of {}{near}", known.join(", ")))
    })
}

impl BottleneckConfig {
    /// Reads the config of an existing adapter, which names every setting. Keys that are not known are ignored.
    ///
    /// # Errors
    /// A value of the wrong type, or one that stands for something that is not here; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        Self::read(config, completed(defaults("seq_bn"), config))
    }

    /// Reads the `[method]` table of a recipe: AdapterHub's keys over those of a `preset` (`seq_bn` where none is named), where
    /// an unknown one is an error with the nearest known.
    ///
    /// # Errors
    /// An unknown key or preset, or a value of the wrong type; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        let mut own = config.clone();
        let base = match own.remove(PRESET) {
            None => "seq_bn",
            Some(Value::String(name)) => preset(&name)?,
            Some(other) => return Err(Error::config(PRESET, format!("{other} is not a name"))),
        };
        let mut known = defaults(base);
        let mut settings = completed(known.clone(), &own);
        // Left to the base ([`BottleneckConfig::for_base`]) where the recipe does not say it.
        settings.insert("task_type".into(), own.get("task_type").cloned().unwrap_or(Value::Null));
        known.insert(PRESET.into(), Value::Null);
        ConfigKeys(&own).refuse_unknown("bottleneck", &known)?;
        Self::read(&settings, settings.clone())
    }

    fn read(config: &Map<String, Value>, raw: Map<String, Value>) -> Result<Self> {
        for (key, nothing) in not_here() {
            let same = |a: &Value| *a == nothing || a.as_f64().is_some_and(|a| Some(a) == nothing.as_f64());
            if let Some(value) = config.get(key).filter(|v| !v.is_null() && !same(v)) {
                return Err(Error::config(key, format!("{value} is not supported; leave it at {nothing}")));
            }
        }
        let keys = ConfigKeys(&raw);
        let [mh, cross] = [keys.flag("mh_adapter", false)?, keys.flag("cross_adapter", false)?];
        let output = keys.flag("output_adapter", true)?;
        if !(mh || cross || output) {
            let message = "none of this, `mh_adapter` and `cross_adapter` is true: nothing would be trained";
            return Err(Error::config("output_adapter", message));
        }
        Ok(Self {
            behind_attention: mh,
            behind_cross_attention: cross,
            behind_feed_forward: output,
            reduction: Reduction::read(keys)?,
            activation: activation(keys, "relu")?,
            placement: placement(keys)?,
            joins_stream: keys.flag("original_ln_after", true)?,
            norm_before: keys.flag("ln_before", false)?,
            norm_after: keys.flag("ln_after", false)?,
            residual_before_norm: keys.flag("adapter_residual_before_ln", false)?,
            start: start(keys)?,
            scaling: scaling(keys)?,
            dropout: probability(keys, "dropout")?,
            stochastic_depth: stochastic_depth(keys)?,
            gated: keys.flag("use_gating", false)?,
            leave_out: leave_out(keys)?,
            saved: saved(keys)?,
            phm: phm(keys)?,
            raw,
        })
    }

    /// This config for the task of `base`: a class head is trained and stored whole ([`task_keys`]).
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.extend(task_keys(&self.saved, base)?);
        Self::from_adapter_config(&raw)
    }

    /// Width of the bottleneck in a block.
    ///
    /// # Errors
    /// When a table of reduction factors names neither the block nor a default.
    pub(crate) fn width(&self, block: usize, hidden_size: usize) -> Result<usize> {
        let factor = self.reduction.of_block.get(&block).copied().or(self.reduction.default);
        let factor = factor.ok_or_else(|| {
            Error::config("reduction_factor", format!("names neither block {block} nor a \"default\""))
        })?;
        let width = (hidden_size as f64 / factor).floor().max(1.0);
        // Wider than this is a mistake in the factor, and would be allocated.
        if width > 64.0 * hidden_size as f64 {
            return Err(Error::config("reduction_factor", format!("{factor} makes a bottleneck of {width:.0}")));
        }
        Ok(width as usize)
    }

    /// The config as it is written: every setting by its name.
    pub(crate) fn to_adapter_config(&self) -> Map<String, Value> {
        self.raw.clone()
    }
}

impl Reduction {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        let wrong = |v: &Value| {
            let message = format!("{v} is neither a number above 0 nor a table like {{\"1\": 8, \"default\": 16}}");
            Error::config("reduction_factor", message)
        };
        let factor = |v: &Value| v.as_f64().filter(|f| f.is_finite() && *f > 0.0).ok_or_else(|| wrong(v));
        let mut found = Self { default: None, of_block: BTreeMap::new() };
        match keys.get("reduction_factor") {
            None => found.default = Some(16.0),
            Some(Value::Object(table)) => {
                for (block, value) in table {
                    match block.parse::<usize>() {
                        Ok(block) => drop(found.of_block.insert(block, factor(value)?)),
                        Err(_) if block == "default" => found.default = Some(factor(value)?),
                        Err(_) => return Err(wrong(&json!(block))),
                    }
                }
            }
            Some(value) => found.default = Some(factor(value)?),
        }
        Ok(found)
    }
}

pub(crate) fn start(keys: ConfigKeys<'_>) -> Result<Start> {
    match keys.text("init_weights")?.unwrap_or("bert") {
        "bert" => Ok(Start::Bert),
        "mam_adapter" => Ok(Start::MamAdapter),
        "houlsby" => Ok(Start::Houlsby),
        other => Err(Error::config("init_weights", format!("`{other}` is not one of bert, mam_adapter, houlsby"))),
    }
}

pub(crate) fn activation(keys: ConfigKeys<'_>, default: &str) -> Result<Activation> {
    let name = keys.text("non_linearity")?.unwrap_or(default).to_lowercase();
    name.parse::<Activation>().map_err(|e| Error::config("non_linearity", e.to_string()))
}

fn placement(keys: ConfigKeys<'_>) -> Result<Placement> {
    if keys.flag("is_parallel", false)? {
        return Ok(Placement::Parallel);
    }
    let on_stream = keys.flag("original_ln_before", false)?;
    let residual = match keys.get("residual_before_ln") {
        None | Some(Value::Bool(true)) => Residual::Output,
        Some(Value::Bool(false)) => Residual::Input,
        Some(Value::String(s)) if s == "post_add" && on_stream => Residual::Sum,
        Some(Value::String(s)) if s == "post_add" => {
            return Err(Error::config("residual_before_ln", "`post_add` goes with original_ln_before = true"));
        }
        Some(other) => {
            return Err(Error::config("residual_before_ln", format!("{other} is not true, false or \"post_add\"")));
        }
    };
    Ok(Placement::Sequential { on_stream, residual })
}

pub(crate) fn probability(keys: ConfigKeys<'_>, key: &str) -> Result<f32> {
    match keys.number(key, 0.0)? {
        p if (0.0..1.0).contains(&p) => Ok(p as f32),
        p => Err(Error::config(key, format!("{p} is outside [0, 1)"))),
    }
}

fn stochastic_depth(keys: ConfigKeys<'_>) -> Result<f32> {
    let p = probability(keys, "stochastic_depth")?;
    if p > 0.0 && keys.flag("is_parallel", false)? {
        let message = "acts on sequential adapters only, in AdapterHub's package too: set it to 0";
        return Err(Error::config("stochastic_depth", message));
    }
    Ok(p)
}

pub(crate) fn scaling(keys: ConfigKeys<'_>) -> Result<ScalingKind> {
    match keys.get("scaling") {
        None => Ok(ScalingKind::Fixed(1.0)),
        Some(Value::String(s)) if s == "learned" => Ok(ScalingKind::Learned),
        Some(Value::String(s)) if s == "channel" => Ok(ScalingKind::Channel),
        Some(v) => match v.as_f64().filter(|s| s.is_finite()) {
            Some(s) => Ok(ScalingKind::Fixed(s)),
            None => Err(Error::config("scaling", format!("{v} is not a number, \"learned\" or \"channel\""))),
        },
    }
}

fn phm(keys: ConfigKeys<'_>) -> Result<Option<PhmConfig>> {
    let read = PhmConfig::read(keys)?;
    if read.as_ref().is_some_and(|phm| phm.shares_weight) && keys.get("reduction_factor").is_some_and(Value::is_object)
    {
        let message = "adapters of several widths cannot share their weights: give one reduction_factor";
        return Err(Error::config("shared_W_phm", message));
    }
    Ok(read)
}

/// What is trained whole beside the adapters.
pub(crate) fn saved(keys: ConfigKeys<'_>) -> Result<TargetSpec> {
    let own = ["modules_to_save", "task_type"].into_iter();
    TargetSpec::from_config(&own.filter_map(|key| Some((key.to_owned(), keys.get(key)?.clone()))).collect())
}

fn leave_out(keys: ConfigKeys<'_>) -> Result<Vec<usize>> {
    let wrong = |v: &Value| Error::config("leave_out", format!("{v} is not a list of blocks, counted from 0"));
    keys.get("leave_out").map_or_else(|| Ok(Vec::new()), |list| blocks(list).ok_or_else(|| wrong(list)))
}

/// A list of blocks, counted from 0.
pub(crate) fn blocks(list: &Value) -> Option<Vec<usize>> {
    list.as_array()?.iter().map(|block| block.as_u64().map(|block| block as usize)).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn recipe(keys: Value) -> Result<BottleneckConfig> {
        BottleneckConfig::from_recipe(keys.as_object().unwrap())
    }

    #[test]
    fn presets_are_those_of_adapterhub() {
        let seq = recipe(json!({})).unwrap();
        assert_eq!((seq.behind_attention, seq.behind_feed_forward), (false, true));
        assert_eq!(seq.placement, Placement::Sequential { on_stream: true, residual: Residual::Output });
        assert_eq!((seq.width(0, 576).unwrap(), seq.width(0, 8).unwrap()), (36, 1));
        let double = recipe(json!({"preset": "houlsby"})).unwrap();
        assert_eq!((double.behind_attention, double.activation), (true, Activation::Silu));
        assert_eq!(double.placement, Placement::Sequential { on_stream: false, residual: Residual::Output });
        let parallel = recipe(json!({"preset": "par_bn", "reduction_factor": {"1": 4, "default": 8}})).unwrap();
        assert_eq!((parallel.placement, parallel.scaling), (Placement::Parallel, ScalingKind::Fixed(4.0)));
        assert_eq!((parallel.width(1, 64).unwrap(), parallel.width(2, 64).unwrap()), (16, 8));
        assert_eq!(recipe(json!({"preset": "scaled_par_bn"})).unwrap().scaling, ScalingKind::Learned);
        let plus = recipe(json!({"preset": "adapter_plus"})).unwrap();
        assert_eq!(plus.placement, Placement::Sequential { on_stream: true, residual: Residual::Input });
        assert_eq!((plus.joins_stream, plus.scaling, plus.start), (false, ScalingKind::Channel, Start::Houlsby));
        assert_eq!((plus.stochastic_depth, plus.gated, seq.stochastic_depth), (0.1, false, 0.0));
        for (name, behind_attention) in [("compacter", true), ("compacter++", false)] {
            let compacter = recipe(json!({"preset": name})).unwrap();
            assert_eq!((compacter.behind_attention, compacter.width(0, 768).unwrap()), (behind_attention, 24));
            assert!(compacter.phm.is_some() && compacter.activation == Activation::Gelu);
        }
    }

    #[test]
    fn a_written_config_is_read_as_what_it_was() {
        let one =
            recipe(json!({"preset": "scaled_par_bn", "leave_out": [0], "dropout": 0.1, "task_type": "CAUSAL_LM"}))
                .unwrap();
        let written = one.to_adapter_config();
        assert_eq!(written["peft_type"], PEFT_TYPE);
        assert!(!written.contains_key(PRESET));
        let again = BottleneckConfig::from_adapter_config(&written).unwrap();
        assert_eq!(again.to_adapter_config(), written);
        assert_eq!((again.placement, again.leave_out), (Placement::Parallel, vec![0]));
    }

    #[test]
    fn wrong_values_name_the_key() {
        for (keys, expect) in [
            (json!({"preset": "seq_bm"}), "did you mean `seq_bn`"),
            (json!({"reduction_factr": 3}), "reduction_factr"),
            (json!({"reduction_factor": 0}), "reduction_factor"),
            (json!({"reduction_factor": {"one": 3}}), "reduction_factor"),
            (json!({"non_linearity": "rleu"}), "non_linearity"),
            (json!({"use_gating": 2}), "use_gating"),
            (json!({"inv_adapter": "nice"}), "inv_adapter"),
            (json!({"preset": "compacter", "shared_W_phm": true, "reduction_factor": {"default": 8}}), "shared_W_phm"),
            (json!({"stochastic_depth": 1.0}), "stochastic_depth"),
            (json!({"stochastic_depth": 0.1, "preset": "par_bn"}), "stochastic_depth"),
            (json!({"output_adapter": false}), "nothing would be trained"),
            (json!({"residual_before_ln": "post_add", "original_ln_before": false}), "original_ln_before"),
            (json!({"scaling": "often"}), "scaling"),
            (json!({"dropout": 1.0}), "dropout"),
            (json!({"leave_out": [-1]}), "leave_out"),
            (json!({"init_weights": "zero"}), "init_weights"),
        ] {
            let e = recipe(keys.clone()).unwrap_err().to_string();
            assert!(e.contains(expect), "{keys}: {e}");
        }
        let missing = recipe(json!({"reduction_factor": {"0": 2}})).unwrap();
        assert!(missing.width(1, 8).unwrap_err().to_string().contains("block 1"));
        let tiny = recipe(json!({"reduction_factor": 1e-9})).unwrap();
        assert!(tiny.width(0, 8).unwrap_err().to_string().contains("reduction_factor"));
    }
}
