//! The gradient audit of the first training step.
//!
//! An operation without a backward pass cuts the graph silently: the loss still falls, because the rest learns, and
//! the parameters below the cut never move (candle's own fused norms and rope did this). So before the first update
//! every trainable parameter must show a gradient that is there, finite, and not all zero.

use std::fmt;

use candle_core::{DType, Tensor};

/// One trainable parameter and its gradient on the first step.
#[derive(Debug, Clone, Copy)]
pub struct AuditEntry<'a> {
    /// Parameter name.
    pub name: &'a str,
    /// Its gradient, if the backward pass gave one.
    pub grad: Option<&'a Tensor>,
    /// The method expects exact zeros on step 1, like LoRA's A while B is zero. A missing gradient is never expected.
    pub allow_zero: bool,
}

/// What is wrong with one gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The backward pass did not reach the parameter.
    Missing,
    /// It reached it with exact zeros only.
    Zero,
    /// NaN or infinity.
    NonFinite,
}

impl Fault {
    fn meaning(self) -> &'static str {
        match self {
            Self::Missing => {
                "no gradient: an operation between this parameter and the loss has no backward pass, or the \
                 parameter is not used in the forward pass"
            }
            Self::Zero => {
                "gradient is exactly zero everywhere: its site gets no tokens, a factor in front of it is zero, or \
                 a backward pass drops this path"
            }
            Self::NonFinite => {
                "gradient is NaN or infinite: check the base weights for NaN, or train in bf16 or f32 instead of f16"
            }
        }
    }
}

/// The audit failed, or could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// Parameters whose gradient is at fault.
    #[error(transparent)]
    Faults(#[from] AuditFaults),
    /// A gradient could not be read.
    #[error("gradient of `{name}` cannot be read: {source}")]
    Read {
        /// Parameter name.
        name: String,
        /// candle's error.
        source: candle_core::Error,
    },
}

/// The parameters that failed, in the order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditFaults {
    /// Name and fault of each.
    pub faults: Vec<(String, Fault)>,
    /// How many parameters were audited.
    pub audited: usize,
}

impl std::error::Error for AuditFaults {}

impl fmt::Display for AuditFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        write!(
            f,
            "gradient audit failed for {} of {} trainable parameters; training would leave them unchanged or ruin them",
            self.faults.len(),
            self.audited
        )?;
        for kind in [Fault::Missing, Fault::Zero, Fault::NonFinite] {
            let names: Vec<&str> = self.faults.iter().filter(|(_, k)| *k == kind).map(|(n, _)| n.as_str()).collect();
            if names.is_empty() {
                continue;
            }
            write!(f, "\n  {}:", kind.meaning())?;
            for name in names.iter().take(SHOWN) {
                write!(f, "\n    {name}")?;
            }
            if let Some(more) = names.len().checked_sub(SHOWN).filter(|m| *m > 0) {
                write!(f, "\n    … and {more} more")?;
            }
        }
        Ok(())
    }
}

/// Checks every trainable parameter's gradient on the first step.
///
/// # Errors
/// [`AuditError::Faults`] names all parameters that fail and what that usually means.
pub fn audit_gradients<'a>(entries: impl IntoIterator<Item = AuditEntry<'a>>) -> Result<(), AuditError> {
    let mut faults = Vec::new();
    let mut audited = 0;
    for e in entries {
        audited += 1;
        let fault = match e.grad {
            None => Some(Fault::Missing),
            Some(g) => {
                let max = max_abs(g).map_err(|source| AuditError::Read { name: e.name.to_owned(), source })?;
                match max {
                    None => Some(Fault::NonFinite),
                    Some(0.0) if !e.allow_zero => Some(Fault::Zero),
                    Some(_) => None,
                }
            }
        };
        if let Some(fault) = fault {
            faults.push((e.name.to_owned(), fault));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(AuditFaults { faults, audited }.into()) }
}

/// Largest magnitude, or `None` if any value is not finite.
fn max_abs(g: &Tensor) -> candle_core::Result<Option<f32>> {
    if g.elem_count() == 0 {
        return Ok(Some(0.0));
    }
    // max() may skip a NaN; `0·x` is 0 for finite x and NaN otherwise, and sums keep a NaN.
    let g = g.detach().flatten_all()?.to_dtype(DType::F32)?;
    let poison = (&g * 0.0)?.sum_all()?.to_scalar::<f32>()?;
    let max = g.abs()?.max(0)?.to_scalar::<f32>()?;
    Ok((poison == 0.0).then_some(max))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use candle_core::{Device, Var};

    fn t(v: &[f32]) -> Tensor {
        Tensor::new(v, &Device::Cpu).unwrap()
    }

    #[test]
    fn faults_are_named_with_their_meaning() {
        let (good, zero, nan, inf) = (t(&[0.0, 1e-30]), t(&[0.0, -0.0]), t(&[1.0, f32::NAN]), t(&[f32::NEG_INFINITY]));
        let half = nan.to_dtype(DType::BF16).unwrap();
        let entry = |name, grad, allow_zero| AuditEntry { name, grad, allow_zero };
        let e = audit_gradients([
            entry("good", Some(&good), false),
            entry("a.lora_A", Some(&zero), true),
            entry("a.lora_B", Some(&zero), false),
            entry("b.lora_A", None, true),
            entry("c", Some(&nan), true),
            entry("d", Some(&inf), false),
            entry("e", Some(&half), false),
        ])
        .unwrap_err();
        let AuditError::Faults(f) = &e else { panic!("{e}") };
        let want = [
            ("a.lora_B", Fault::Zero),
            ("b.lora_A", Fault::Missing),
            ("c", Fault::NonFinite),
            ("d", Fault::NonFinite),
            ("e", Fault::NonFinite),
        ];
        assert_eq!(f.faults, want.map(|(n, k)| (n.to_owned(), k)));
        let text = e.to_string();
        assert!(text.starts_with("gradient audit failed for 5 of 7"), "{text}");
        assert!(text.contains("b.lora_A") && text.contains("no backward pass"), "{text}");
        assert!(!text.contains("good"), "{text}");
        audit_gradients([entry("good", Some(&good), false), entry("A", Some(&zero), true)]).unwrap();
    }

    #[test]
    fn long_lists_are_cut() {
        let names: Vec<String> = (0..100).map(|i| format!("layer.{i}")).collect();
        let e = audit_gradients(names.iter().map(|n| AuditEntry { name: n, grad: None, allow_zero: false }));
        let text = e.unwrap_err().to_string();
        assert!(text.contains("… and 92 more"), "{text}");
        assert!(text.lines().count() < 15);
    }

    /// The failure the audit exists for: a detached path still lets the loss fall through the other parameter.
    #[test]
    fn a_cut_graph_is_caught() {
        let w1 = Var::from_tensor(&t(&[1.0, 2.0])).unwrap();
        let w2 = Var::from_tensor(&t(&[3.0, 4.0])).unwrap();
        let run = |cut: bool| {
            let h = w1.sqr().unwrap();
            let h = if cut { h.detach() } else { h };
            let grads = (h * w2.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
            audit_gradients([("w1", &w1), ("w2", &w2)].map(|(name, w)| AuditEntry {
                name,
                grad: grads.get(w),
                allow_zero: false,
            }))
        };
        run(false).unwrap();
        assert!(run(true).unwrap_err().to_string().contains("w1"));
    }
}
