//! Stochastic gradient descent with momentum, as `torch.optim.SGD` computes it (weight decay is added to the gradient,
//! the momentum buffer starts as the first gradient).

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Tensor};
use serde::{Deserialize, Serialize};

use super::buffer::{Buffer, Kernel, Stored, run_cpu};
use super::{OptParam, OptimError, Optimizer, Result, check_lists, check_names, in_range};

const MOMENTUM_BUFFER: &str = "momentum_buffer";

/// Hyper-parameters; the defaults are torch's. Weight decay is a property of the parameter ([`OptParam`]).
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SgdConfig {
    /// Momentum; 0 keeps no state.
    pub momentum: f64,
    /// Damping of the gradient that enters the momentum buffer.
    pub dampening: f64,
    /// Nesterov's momentum; needs `momentum > 0` and `dampening = 0`.
    pub nesterov: bool,
}

/// SGD with saveable state.
#[derive(Debug)]
pub struct Sgd {
    config: SgdConfig,
    slots: BTreeMap<String, Buffer>,
    names_checked: bool,
    fused: bool,
}

impl Sgd {
    /// # Errors
    /// Negative or non-finite momentum, or Nesterov without plain momentum.
    pub fn new(config: SgdConfig) -> Result<Self> {
        in_range("momentum", config.momentum, config.momentum >= 0.0, "must be finite and not negative")?;
        in_range("dampening", config.dampening, true, "must be finite")?;
        if config.nesterov {
            in_range("momentum", config.momentum, config.momentum > 0.0, "nesterov needs a momentum above 0")?;
            in_range("dampening", config.dampening, config.dampening == 0.0, "nesterov needs dampening = 0")?;
        }
        Ok(Self { config, slots: BTreeMap::new(), names_checked: false, fused: true })
    }
}

impl Optimizer for Sgd {
    fn step(&mut self, params: &[OptParam], grads: &[Option<Tensor>], lr: f64) -> Result<()> {
        check_lists(params, grads, lr)?;
        if !self.names_checked {
            check_names(params, self.slots.keys())?;
            self.names_checked = true;
        }
        for p in params {
            if let Some(b) = self.slots.get(&p.name) {
                b.check(&p.name, MOMENTUM_BUFFER, p.var.shape())?;
            }
        }
        for (p, g) in params.iter().zip(grads) {
            let Some(g) = g else { continue };
            let g = g.detach().to_dtype(DType::F32)?.contiguous()?;
            let with_momentum = self.config.momentum != 0.0;
            let first = with_momentum && !self.slots.contains_key(&p.name);
            let rule = Rule { c: self.config, lr: lr * p.lr_scale, weight_decay: p.weight_decay, first };
            let buffer =
                with_momentum.then(|| self.slots.entry(p.name.clone()).or_insert_with(|| Buffer::zeros(p.var.shape())));
            if self.fused && p.var.device().is_cpu() {
                let mut none = [];
                let state = RefCell::new(match buffer {
                    Some(b) => b.host()?,
                    None => &mut none,
                });
                p.var.inplace_op2(&g, &Fused { rule, state })?;
            } else {
                rule.tensors(p, &g, buffer)?;
            }
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        self.slots.iter().map(|(name, b)| Ok((format!("{name}.{MOMENTUM_BUFFER}"), b.save()?))).collect()
    }

    fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let mut slots = BTreeMap::new();
        for (key, t) in state {
            match key.rsplit_once('.') {
                Some((name, MOMENTUM_BUFFER)) if self.config.momentum != 0.0 => {
                    slots.insert(name.to_owned(), Buffer::load(key, t)?);
                }
                _ => {
                    let why = "is not a key that SGD writes with this momentum".to_owned();
                    return Err(OptimError::State { key: key.clone(), why });
                }
            }
        }
        self.slots = slots;
        self.names_checked = false;
        Ok(())
    }

    fn name(&self) -> &'static str {
        "sgd"
    }
}

#[derive(Debug, Clone, Copy)]
struct Rule {
    c: SgdConfig,
    lr: f64,
    weight_decay: f64,
    /// The buffer is new: it takes the gradient undamped.
    first: bool,
}

impl Rule {
    fn tensors(&self, p: &OptParam, g: &Tensor, buffer: Option<&mut Buffer>) -> Result<()> {
        let value = p.var.as_detached_tensor().to_dtype(DType::F32)?;
        let mut g = if self.weight_decay == 0.0 { g.clone() } else { (g + (&value * self.weight_decay)?)? };
        if let Some(buffer) = buffer {
            let b = match self.first {
                true => g.clone(),
                false => ((buffer.tensor(p.var.device())? * self.c.momentum)? + (&g * (1.0 - self.c.dampening))?)?,
            };
            g = if self.c.nesterov { (g + (&b * self.c.momentum)?)? } else { b.clone() };
            buffer.put(b);
        }
        let value = (value - (g * self.lr)?)?;
        p.var.set(&value.to_dtype(p.var.dtype())?)?;
        Ok(())
    }
}

impl Kernel for Rule {
    fn run<P: Stored>(&self, p: &mut [P], g: &[f32], b: &mut [f32], _: &mut [f32]) {
        let (lr, decay, momentum) = (self.lr as f32, self.weight_decay as f32, self.c.momentum as f32);
        if b.is_empty() {
            for (p, &g) in p.iter_mut().zip(g) {
                let x = p.load();
                *p = P::store(x - lr * (g + decay * x));
            }
            return;
        }
        let (keep, take) = if self.first { (0.0, 1.0) } else { (momentum, (1.0 - self.c.dampening) as f32) };
        for ((p, &g), b) in p.iter_mut().zip(g).zip(b) {
            let x = p.load();
            let g = g + decay * x;
            *b = *b * keep + take * g;
            let g = if self.c.nesterov { g + momentum * *b } else { *b };
            *p = P::store(x - lr * g);
        }
    }
}

struct Fused<'a> {
    rule: Rule,
    state: RefCell<&'a mut [f32]>,
}

impl InplaceOp2 for Fused<'_> {
    fn name(&self) -> &'static str {
        "sgd"
    }

    fn cpu_fwd(&self, p: &mut CpuStorage, pl: &Layout, g: &CpuStorage, gl: &Layout) -> candle_core::Result<()> {
        let mut state = self.state.borrow_mut();
        run_cpu(&self.rule, p, pl, g, gl, &mut state, &mut [])
    }
}

#[cfg(test)]
#[path = "sgd_tests.rs"]
mod tests;
