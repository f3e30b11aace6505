//! AdamW (Loshchilov and Hutter, arXiv 1711.05101), as `torch.optim.AdamW` computes it.
//!
//! ```text
//! p ← p·(1 − lr·λ)
//! m ← m + (1 − β₁)(g − m)          v ← β₂·v + (1 − β₂)·g²
//! p ← p − lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)
//! ```
//! Moments are f32 whatever the parameter's dtype, and a bf16 or f16 parameter is rounded once a step. (torch keeps
//! the moments of a bf16 parameter in bf16; ours lose less.) On the CPU each parameter takes one pass over memory.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Tensor};
use serde::{Deserialize, Serialize};

use super::buffer::{Buffer, Kernel, Stored, run_cpu};
use super::{OptParam, OptimError, Optimizer, Result, check_lists, check_names, in_range};

const EXP_AVG: &str = "exp_avg";
const EXP_AVG_SQ: &str = "exp_avg_sq";
const STEP: &str = "step";

/// Hyper-parameters; the defaults are torch's. Weight decay is a property of the parameter ([`OptParam`]).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Decay of the first moment, in `[0, 1)`.
    pub beta1: f64,
    /// Decay of the second moment, in `[0, 1)`.
    pub beta2: f64,
    /// Added to the denominator, outside the root.
    pub eps: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

/// AdamW with saveable state.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    slots: BTreeMap<String, Slot>,
    names_checked: bool,
    fused: bool,
}

#[derive(Debug)]
struct Slot {
    step: i64,
    m: Buffer,
    v: Buffer,
}

impl AdamW {
    /// # Errors
    /// A beta outside `[0, 1)` or an epsilon that is negative or not finite.
    pub fn new(config: AdamWConfig) -> Result<Self> {
        let unit = |b: f64| (0.0..1.0).contains(&b);
        in_range("beta1", config.beta1, unit(config.beta1), "must be in [0, 1)")?;
        in_range("beta2", config.beta2, unit(config.beta2), "must be in [0, 1)")?;
        in_range("eps", config.eps, config.eps >= 0.0, "must be finite and not negative")?;
        Ok(Self { config, slots: BTreeMap::new(), names_checked: false, fused: true })
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, params: &[OptParam], grads: &[Option<Tensor>], lr: f64) -> Result<()> {
        check_lists(params, grads, lr)?;
        if !self.names_checked {
            check_names(params, self.slots.keys())?;
            self.names_checked = true;
        }
        for p in params {
            if let Some(slot) = self.slots.get(&p.name) {
                slot.m.check(&p.name, EXP_AVG, p.var.shape())?;
                slot.v.check(&p.name, EXP_AVG_SQ, p.var.shape())?;
            }
        }
        for (p, g) in params.iter().zip(grads) {
            let Some(g) = g else { continue };
            let slot = self.slots.entry(p.name.clone()).or_insert_with(|| Slot {
                step: 0,
                m: Buffer::zeros(p.var.shape()),
                v: Buffer::zeros(p.var.shape()),
            });
            let rule = Rule::new(&self.config, slot.step + 1, lr * p.lr_scale, p.weight_decay);
            let g = g.detach().to_dtype(DType::F32)?.contiguous()?;
            if self.fused && p.var.device().is_cpu() {
                let state = RefCell::new((slot.m.host()?, slot.v.host()?));
                p.var.inplace_op2(&g, &Fused { rule, state })?;
            } else {
                rule.tensors(p, &g, slot)?;
            }
            slot.step += 1;
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut out = Vec::with_capacity(3 * self.slots.len());
        for (name, slot) in &self.slots {
            out.push((format!("{name}.{EXP_AVG}"), slot.m.save()?));
            out.push((format!("{name}.{EXP_AVG_SQ}"), slot.v.save()?));
            out.push((format!("{name}.{STEP}"), Tensor::new(&[slot.step], &Device::Cpu)?));
        }
        Ok(out)
    }

    fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let bad = |key: &str, why: &str| OptimError::State { key: key.to_owned(), why: why.to_owned() };
        let mut slots = BTreeMap::new();
        for (key, t) in state {
            let Some((name, kind)) = key.rsplit_once('.') else {
                return Err(bad(key, "is not a key that AdamW writes"));
            };
            if kind == EXP_AVG || kind == EXP_AVG_SQ {
                if !state.contains_key(&format!("{name}.{STEP}")) {
                    return Err(bad(key, "has no step count beside it"));
                }
                continue;
            }
            if kind != STEP {
                return Err(bad(key, "is not a key that AdamW writes"));
            }
            let step = match t.dtype() {
                DType::I64 if t.elem_count() == 1 => t.flatten_all()?.to_vec1::<i64>()?,
                _ => Vec::new(),
            };
            let step = match step.first() {
                Some(&s) if (0..i64::MAX).contains(&s) => s,
                _ => return Err(bad(key, "is not a single i64 step count")),
            };
            let load = |kind: &str| {
                let key = format!("{name}.{kind}");
                let t = state.get(&key).ok_or_else(|| bad(&key, "is missing"))?;
                Buffer::load(&key, t)
            };
            slots.insert(name.to_owned(), Slot { step, m: load(EXP_AVG)?, v: load(EXP_AVG_SQ)? });
        }
        self.slots = slots;
        self.names_checked = false;
        Ok(())
    }

    fn name(&self) -> &'static str {
        "adamw"
    }
}

/// The constants of one parameter's step.
#[derive(Debug, Clone, Copy)]
struct Rule {
    decay: f64,
    one_minus_beta1: f64,
    beta2: f64,
    one_minus_beta2: f64,
    bias2_sqrt: f64,
    eps: f64,
    step_size: f64,
}

impl Rule {
    fn new(c: &AdamWConfig, step: i64, lr: f64, weight_decay: f64) -> Self {
        let t = step as f64;
        Self {
            decay: 1.0 - lr * weight_decay,
            one_minus_beta1: 1.0 - c.beta1,
            beta2: c.beta2,
            one_minus_beta2: 1.0 - c.beta2,
            bias2_sqrt: (1.0 - c.beta2.powf(t)).sqrt(),
            eps: c.eps,
            step_size: lr / (1.0 - c.beta1.powf(t)),
        }
    }

    /// The same update in candle's own operations, for devices that have no fused pass.
    fn tensors(&self, p: &OptParam, g: &Tensor, slot: &mut Slot) -> Result<()> {
        let device = p.var.device();
        let m = slot.m.tensor(device)?;
        let m = (&m + ((g - &m)? * self.one_minus_beta1)?)?;
        let v = slot.v.tensor(device)?;
        let v = ((v * self.beta2)? + (g.sqr()? * self.one_minus_beta2)?)?;
        let denom = ((v.sqrt()? / self.bias2_sqrt)? + self.eps)?;
        let value = p.var.as_detached_tensor().to_dtype(DType::F32)?;
        let value = ((value * self.decay)? - (&m * self.step_size)?.div(&denom)?)?;
        p.var.set(&value.to_dtype(p.var.dtype())?)?;
        slot.m.put(m);
        slot.v.put(v);
        Ok(())
    }
}

impl Kernel for Rule {
    fn run<P: Stored>(&self, p: &mut [P], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        let (decay, w1, b2, w2) =
            (self.decay as f32, self.one_minus_beta1 as f32, self.beta2 as f32, self.one_minus_beta2 as f32);
        let (bias2_sqrt, eps, step) = (self.bias2_sqrt as f32, self.eps as f32, self.step_size as f32);
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            *m += w1 * (g - *m);
            *v = *v * b2 + w2 * g * g;
            let denom = v.sqrt() / bias2_sqrt + eps;
            *p = P::store(p.load() * decay - step * *m / denom);
        }
    }
}

struct Fused<'a> {
    rule: Rule,
    state: RefCell<(&'a mut [f32], &'a mut [f32])>,
}

impl InplaceOp2 for Fused<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, p: &mut CpuStorage, pl: &Layout, g: &CpuStorage, gl: &Layout) -> candle_core::Result<()> {
        let mut state = self.state.borrow_mut();
        let (m, v) = &mut *state;
        run_cpu(&self.rule, p, pl, g, gl, m, v)
    }
}

#[cfg(test)]
#[path = "adamw_tests.rs"]
mod tests;
