//! Optimisers over a flat list of named parameters.
//!
//! The trainer hands every optimiser the same three things once a step: the parameters, one gradient (or none)
//! for each, and the scheduled learning rate. State is keyed by parameter name, kept in f32 whatever the
//! parameter's dtype, and leaves and returns as tensors, so that a checkpoint restores it bit for bit.

pub mod adamw;
mod buffer;
pub mod clip;
pub mod sgd;
#[cfg(test)]
mod testing;

pub use adamw::{AdamW, AdamWConfig};
pub use clip::{GradNorm, clip_grad_norm, grad_norm};
pub use sgd::{Sgd, SgdConfig};

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Shape, Tensor, Var};
use peft_core::suggest::did_you_mean;
use serde::{Deserialize, Serialize};

/// What can go wrong in an optimiser.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OptimError {
    /// The gradient list does not line up with the parameter list.
    #[error("{params} parameters but {grads} gradients; pass one entry a parameter, `None` where there is none")]
    Count {
        /// Number of parameters passed.
        params: usize,
        /// Number of gradients passed.
        grads: usize,
    },
    /// A gradient, or a restored moment, has another shape than its parameter.
    #[error("`{name}`: {what} has shape {got:?}, the parameter has {want:?}")]
    Shape {
        /// Parameter.
        name: String,
        /// "gradient" or the state tensor's name.
        what: &'static str,
        /// Shape found.
        got: Shape,
        /// Shape of the parameter.
        want: Shape,
    },
    /// Two parameters share one name, so their state would too.
    #[error("parameter `{0}` is listed twice; every trainable parameter needs its own name")]
    Duplicate(String),
    /// The parameter is not a float that can be trained.
    #[error("`{name}` is {dtype:?}; trainable parameters are f32, bf16 or f16")]
    DType {
        /// Parameter.
        name: String,
        /// Its dtype.
        dtype: DType,
    },
    /// A saved state tensor cannot be used.
    #[error("optimizer state `{key}`: {why}; the checkpoint was written by another optimizer or is damaged")]
    State {
        /// Key in the saved state.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// A hyper-parameter is out of range.
    #[error("{name} = {value}: {why}")]
    Hyper {
        /// Name of the setting.
        name: &'static str,
        /// Value given.
        value: f64,
        /// What it must be.
        why: &'static str,
    },
    /// No optimiser of that name.
    #[error("unknown optimizer `{name}`{hint}; known: {known}")]
    Unknown {
        /// Name given.
        name: String,
        /// Nearest known names as a phrase, or nothing.
        hint: String,
        /// All names.
        known: String,
    },
    /// What trains by forward passes alone is no [`Optimizer`].
    #[error("{0} takes losses, not gradients, and is no optimizer of gradients")]
    Forward(OptimizerKind),
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Result of an optimiser call.
pub type Result<T, E = OptimError> = std::result::Result<T, E>;

/// A trainable parameter as an optimiser sees it.
#[derive(Debug, Clone)]
pub struct OptParam {
    /// Unique, stable name; the key of its state in a checkpoint.
    pub name: String,
    /// The variable that is updated in place.
    pub var: Var,
    /// Factor on the scheduled learning rate (LoRA+, arXiv 2402.12354: B learns faster than A). 1 is neutral.
    pub lr_scale: f64,
    /// Weight decay of this parameter; 0 is off (biases and norms usually).
    pub weight_decay: f64,
}

impl OptParam {
    /// A parameter with neutral learning-rate scale and no weight decay.
    pub fn new(name: impl Into<String>, var: Var) -> Self {
        Self { name: name.into(), var, lr_scale: 1.0, weight_decay: 0.0 }
    }
}

/// An update rule with state.
pub trait Optimizer: Send + fmt::Debug {
    /// Updates every parameter that has a gradient, in place. A parameter whose gradient is `None` keeps its value
    /// and its state, as in torch. `lr` is the scheduled rate; each parameter's `lr_scale` multiplies it.
    ///
    /// # Errors
    /// Lists that do not line up, shapes or dtypes that do not fit, restored state for parameters that do not exist.
    /// Nothing is changed when the lists are refused.
    fn step(&mut self, params: &[OptParam], grads: &[Option<Tensor>], lr: f64) -> Result<()>;

    /// All state as named CPU tensors in a stable order: floats f32 in the parameter's shape, counters i64 `[1]`.
    ///
    /// # Errors
    /// Copying from the device failed.
    fn state(&self) -> Result<Vec<(String, Tensor)>>;

    /// Replaces the whole state with one that [`state`](Self::state) gave. On an error the old state stays.
    ///
    /// # Errors
    /// A key that this optimiser does not write, a missing partner tensor, a wrong dtype or shape.
    fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()>;

    /// Name as recipes spell it.
    fn name(&self) -> &'static str;
}

/// The optimisers a recipe can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW with decoupled weight decay.
    AdamW,
    /// Stochastic gradient descent, momentum optional.
    Sgd,
    /// Forward passes alone ([`crate::mezo`]).
    Mezo,
    /// Black-Box Tuning, by forward passes alone ([`crate::bbt`]).
    Bbt,
    /// Black-Box Prompt Learning, by forward passes or an API's log-probabilities alone ([`crate::bdpl`]).
    Bdpl,
}

impl OptimizerKind {
    const NAMES: [(&'static str, Self); 6] = [
        ("adamw", Self::AdamW),
        ("adamw_torch", Self::AdamW),
        ("sgd", Self::Sgd),
        ("mezo", Self::Mezo),
        ("bbt", Self::Bbt),
        ("bdpl", Self::Bdpl),
    ];

    /// Whether it needs no gradient.
    #[must_use]
    pub fn is_forward_only(self) -> bool {
        matches!(self, Self::Mezo | Self::Bbt | Self::Bdpl)
    }
}

impl FromStr for OptimizerKind {
    type Err = OptimError;

    fn from_str(s: &str) -> Result<Self> {
        let key = s.trim().to_ascii_lowercase();
        if let Some((_, kind)) = Self::NAMES.iter().find(|(n, _)| *n == key) {
            return Ok(*kind);
        }
        let names = Self::NAMES.map(|(n, _)| n);
        let (hint, known) = (did_you_mean(&key, names), names.join(", "));
        Err(OptimError::Unknown { name: s.to_owned(), hint, known })
    }
}

impl fmt::Display for OptimizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AdamW => "adamw",
            Self::Sgd => "sgd",
            Self::Mezo => "mezo",
            Self::Bbt => "bbt",
            Self::Bdpl => "bdpl",
        })
    }
}

/// Settings that only some optimisers have, under torch's names; `None` is torch's default.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerOptions {
    /// AdamW: decay of the first moment, 0.9 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta1: Option<f64>,
    /// AdamW: decay of the second moment, 0.999 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta2: Option<f64>,
    /// AdamW: added to the denominator, 1e-8 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    /// SGD and MeZO: momentum, 0 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// SGD: damping of the gradient that enters the momentum, 0 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dampening: Option<f64>,
    /// SGD: Nesterov's momentum, off by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nesterov: Option<bool>,
    /// MeZO: how far parameters are moved, 1e-3 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mezo_eps: Option<f64>,
    /// MeZO: estimates a step, 1 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mezo_samples: Option<usize>,
}

/// Refuses settings that belong to another optimiser.
///
/// # Errors
/// Such a setting, named.
pub fn check_options(kind: OptimizerKind, options: &OptimizerOptions) -> Result<()> {
    use OptimizerKind as K;
    let o = options;
    let settings = [
        ("beta1", o.beta1, [K::AdamW].as_slice(), "is a setting of adamw; remove it or change the optimizer"),
        ("beta2", o.beta2, &[K::AdamW], "is a setting of adamw; remove it or change the optimizer"),
        ("eps", o.eps, &[K::AdamW], "is a setting of adamw; remove it or change the optimizer"),
        ("momentum", o.momentum, &[K::Sgd, K::Mezo], "is a setting of sgd and mezo; remove it or change the optimizer"),
        ("dampening", o.dampening, &[K::Sgd], "is a setting of sgd; remove it or change the optimizer"),
        (
            "nesterov",
            o.nesterov.map(|b| f64::from(u8::from(b))),
            &[K::Sgd],
            "is a setting of sgd; remove it or change the optimizer",
        ),
        ("mezo_eps", o.mezo_eps, &[K::Mezo], "is a setting of mezo; remove it or change the optimizer"),
        (
            "mezo_samples",
            o.mezo_samples.map(|n| n as f64),
            &[K::Mezo],
            "is a setting of mezo; remove it or change the optimizer",
        ),
    ];
    let foreign = settings.into_iter().find(|(_, value, owners, _)| value.is_some() && !owners.contains(&kind));
    if let Some((name, Some(value), _, why)) = foreign {
        return Err(OptimError::Hyper { name, value, why });
    }
    Ok(())
}

/// Makes the optimiser that a recipe names.
///
/// # Errors
/// A setting out of range, or one that belongs to another optimiser; what trains without gradients, which is none.
pub fn build(kind: OptimizerKind, options: &OptimizerOptions) -> Result<Box<dyn Optimizer>> {
    use OptimizerKind as K;
    check_options(kind, options)?;
    let o = options;
    Ok(match kind {
        K::Mezo | K::Bbt | K::Bdpl => return Err(OptimError::Forward(kind)),
        K::AdamW => {
            let d = AdamWConfig::default();
            Box::new(AdamW::new(AdamWConfig {
                beta1: o.beta1.unwrap_or(d.beta1),
                beta2: o.beta2.unwrap_or(d.beta2),
                eps: o.eps.unwrap_or(d.eps),
            })?)
        }
        K::Sgd => Box::new(Sgd::new(SgdConfig {
            momentum: o.momentum.unwrap_or(0.0),
            dampening: o.dampening.unwrap_or(0.0),
            nesterov: o.nesterov.unwrap_or(false),
        })?),
    })
}

/// Checks what every optimiser checks before it touches a parameter.
fn check_lists(params: &[OptParam], grads: &[Option<Tensor>], lr: f64) -> Result<()> {
    if params.len() != grads.len() {
        return Err(OptimError::Count { params: params.len(), grads: grads.len() });
    }
    if !lr.is_finite() || lr < 0.0 {
        return Err(OptimError::Hyper { name: "learning_rate", value: lr, why: "must be finite and not negative" });
    }
    let mut seen = HashSet::with_capacity(params.len());
    for (p, g) in params.iter().zip(grads) {
        if !seen.insert(p.name.as_str()) {
            return Err(OptimError::Duplicate(p.name.clone()));
        }
        if !matches!(p.var.dtype(), DType::F32 | DType::BF16 | DType::F16) {
            return Err(OptimError::DType { name: p.name.clone(), dtype: p.var.dtype() });
        }
        if let Some(g) = g
            && g.shape() != p.var.shape()
        {
            return Err(OptimError::Shape {
                name: p.name.clone(),
                what: "gradient",
                got: g.shape().clone(),
                want: p.var.shape().clone(),
            });
        }
        in_range("weight_decay", p.weight_decay, p.weight_decay >= 0.0, "must be finite and not negative")?;
        in_range("lr_scale", p.lr_scale, p.lr_scale >= 0.0, "must be finite and not negative")?;
    }
    Ok(())
}

/// Refuses restored state that belongs to no parameter: training on would silently drop it.
fn check_names<'a>(params: &[OptParam], mut state: impl Iterator<Item = &'a String>) -> Result<()> {
    let names: HashSet<&str> = params.iter().map(|p| p.name.as_str()).collect();
    match state.find(|k| !names.contains(k.as_str())) {
        Some(key) => Err(OptimError::State { key: key.clone(), why: "no trainable parameter has this name".into() }),
        None => Ok(()),
    }
}

fn in_range(name: &'static str, value: f64, ok: bool, why: &'static str) -> Result<()> {
    if ok && value.is_finite() { Ok(()) } else { Err(OptimError::Hyper { name, value, why }) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn names_and_settings() {
        assert_eq!("AdamW".parse::<OptimizerKind>().unwrap(), OptimizerKind::AdamW);
        let e = "adamv".parse::<OptimizerKind>().unwrap_err().to_string();
        assert!(e.contains("did you mean `adamw`"), "{e}");
        for kind in [OptimizerKind::AdamW, OptimizerKind::Sgd] {
            let o = build(kind, &OptimizerOptions::default()).unwrap();
            assert_eq!(o.name(), kind.to_string());
            assert_eq!(o.name().parse::<OptimizerKind>().unwrap(), kind);
            assert!(o.state().unwrap().is_empty());
        }
        let momentum = OptimizerOptions { momentum: Some(0.9), ..Default::default() };
        build(OptimizerKind::Sgd, &momentum).unwrap();
        let e = build(OptimizerKind::AdamW, &momentum).unwrap_err().to_string();
        assert_eq!(e, "momentum = 0.9: is a setting of sgd and mezo; remove it or change the optimizer");
        let mezo = OptimizerOptions { mezo_eps: Some(0.1), ..Default::default() };
        assert!(check_options(OptimizerKind::Sgd, &mezo).unwrap_err().to_string().contains("setting of mezo"));
        check_options("mezo".parse().unwrap(), &mezo).unwrap();
        check_options(OptimizerKind::Mezo, &momentum).unwrap();
        for kind in [OptimizerKind::Mezo, OptimizerKind::Bbt, OptimizerKind::Bdpl] {
            assert!(kind.is_forward_only() && kind.to_string().parse::<OptimizerKind>().unwrap() == kind);
            assert!(build(kind, &OptimizerOptions::default()).unwrap_err().to_string().contains("not gradients"));
        }
        assert!(build(OptimizerKind::AdamW, &OptimizerOptions { beta1: Some(1.5), ..Default::default() }).is_err());
    }
}
