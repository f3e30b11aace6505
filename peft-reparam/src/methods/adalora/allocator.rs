//! AdaLoRA in training: A and B are kept orthogonal by a term of the loss, and a budget of ranks that falls by a cubic schedule
//! goes to the triplets of singular values and vectors that matter most (Zhang et al. 2023, §3; PEFT
//! `tuners/adalora/layer.py`, `RankAllocator`).

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};
use peft_core::adapter_keys::KEY_PREFIX;
use peft_core::{ConfigKeys, Context, Error, Parameter, Result, TrainingHook};
use serde_json::{Map, Value, json};

use crate::methods::{size, size_or_zero};

/// When the budget falls, and to what.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Schedule {
    /// Ranks that a layer begins with.
    pub(super) init_r: usize,
    /// Ranks that a layer is left with on average.
    pub(super) target_r: usize,
    /// Steps before the budget falls.
    tinit: u64,
    /// The step, counted from 0, at which the ranks are final.
    end: u64,
    /// Steps between two allocations.
    every: u64,
    /// Decay of the mean of the sensitivities, and of that of their deviations.
    betas: (f64, f64),
    /// Weight of the orthogonal regulariser.
    regulariser: f64,
}

impl Schedule {
    pub(super) fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        let Some(total) = keys.count("total_step", usize::MAX)? else {
            return Err(Error::config(
                "total_step",
                "is not given; PEFT loads no AdaLoRA without the steps of its run",
            ));
        };
        let (tinit, tfinal) = (size_or_zero(keys, "tinit", 0)?, size_or_zero(keys, "tfinal", 0)?);
        let end = total.saturating_sub(tfinal);
        if tinit >= end {
            let message = format!("{tinit} and tfinal {tfinal} leave none of total_step {total} to move ranks in");
            return Err(Error::config("tinit", message));
        }
        let beta = |key: &str| match keys.number(key, 0.85)? {
            beta if beta > 0.0 && beta < 1.0 => Ok(beta),
            beta => Err(Error::config(key, format!("{beta} is not between 0 and 1"))),
        };
        let regulariser = keys.number("orth_reg_weight", 0.5)?;
        if regulariser < 0.0 {
            return Err(Error::config("orth_reg_weight", format!("{regulariser} is negative")));
        }
        Ok(Self {
            init_r: size(keys, "init_r", 12)?,
            target_r: size(keys, "target_r", 8)?,
            tinit: tinit as u64,
            end: end as u64,
            every: keys.count("deltaT", usize::MAX)?.unwrap_or(1) as u64,
            betas: (beta("beta1")?, beta("beta2")?),
            regulariser,
        })
    }

    /// The ranks that `layers` layers together may have after a step between `tinit` and the end.
    fn budget(&self, step: u64, layers: usize) -> usize {
        let (init, target) = ((self.init_r * layers) as f64, (self.target_r * layers) as f64);
        let left = 1.0 - (step.saturating_sub(self.tinit)) as f64 / (self.end - self.tinit) as f64;
        ((init - target) * left.powi(3) + target) as usize
    }
}

/// A, B and E of one layer.
#[derive(Debug)]
struct Triplets {
    a: Parameter,
    b: Parameter,
    e: Parameter,
}

/// How much an element mattered lately: the running mean of `|value · gradient|`, and of its deviation from that.
#[derive(Debug, Clone)]
struct Importance {
    sensitivity: Tensor,
    uncertainty: Tensor,
}

#[derive(Debug, Default)]
struct State {
    /// By the parameters' names.
    importance: BTreeMap<String, Importance>,
    /// Which triplets are left, by the names of E.
    kept: BTreeMap<String, Vec<bool>>,
}

/// The regulariser and the allocator of one adapter.
#[derive(Debug)]
pub(super) struct Allocator {
    schedule: Schedule,
    layers: Vec<Triplets>,
    /// Whether ranks move: those of a file whose allocation is finished do not.
    moves: bool,
    state: Mutex<State>,
}

const SENSITIVITY: &str = ".sensitivity";
const UNCERTAINTY: &str = ".uncertainty";
const KEPT: &str = ".kept";

impl Allocator {
    /// For layers whose parameters are A, B and E.
    pub(super) fn new(schedule: Schedule, layers: &[&[Parameter]], moves: bool) -> Result<Self> {
        let triplets = |parameters: &&[Parameter]| {
            let [a, b, e] = crate::change::exactly(parameters)?;
            Ok(Triplets { a: a.clone(), b: b.clone(), e: e.clone() })
        };
        let layers = layers.iter().map(triplets).collect::<Result<_>>()?;
        Ok(Self { schedule, layers, moves, state: Mutex::default() })
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, state: &mut State, gradients: &HashMap<&str, &Tensor>) -> Result<()> {
        let (beta1, beta2) = self.schedule.betas;
        for p in self.layers.iter().flat_map(|l| [&l.a, &l.b, &l.e]) {
            let Some(gradient) = gradients.get(p.name()) else { continue };
            let now = (p.value() * gradient.to_dtype(p.dtype())?)?.abs()?;
            let zeros = || now.zeros_like();
            let (sensitivity, uncertainty) = match state.importance.get(p.name()) {
                Some(before) => (before.sensitivity.clone(), before.uncertainty.clone()),
                None => (zeros()?, zeros()?),
            };
            let sensitivity = ((sensitivity * beta1)? + (&now * (1.0 - beta1))?)?;
            let deviation = (&now - &sensitivity)?.abs()?;
            let uncertainty = ((uncertainty * beta2)? + (deviation * (1.0 - beta2))?)?;
            state.importance.insert(p.name().to_owned(), Importance { sensitivity, uncertainty });
        }
        Ok(())
    }

    /// How much each triplet of a layer matters: its singular value, and the means of its vectors' elements.
    fn scores(layer: &Triplets, state: &State) -> Result<Vec<f32>> {
        let of = |p: &Parameter| match state.importance.get(p.name()) {
            Some(i) => Ok((&i.sensitivity * &i.uncertainty)?.to_dtype(DType::F32)?),
            None => Err(Error::msg(format!("{} had no gradient yet", p.name()))),
        };
        let vectors = (of(&layer.a)?.mean(1)? + of(&layer.b)?.mean(0)?)?;
        Ok((of(&layer.e)?.flatten_all()? + vectors)?.to_vec1()?)
    }

    /// Leaves the `budget` triplets that matter most, of all layers together.
    fn allocate(&self, state: &mut State, budget: usize) -> Result<()> {
        let scores = self.layers.iter().map(|l| Self::scores(l, state)).collect::<Result<Vec<_>>>()?;
        let mut ranked: Vec<f32> = scores.iter().flatten().copied().collect();
        ranked.sort_by(f32::total_cmp);
        let dropped = ranked.len().saturating_sub(budget);
        // As in PEFT, ties with the last that goes go too.
        let threshold = dropped.checked_sub(1).and_then(|last| ranked.get(last)).copied();
        for (layer, scores) in self.layers.iter().zip(scores) {
            let kept = scores.iter().map(|score| threshold.is_none_or(|threshold| *score > threshold)).collect();
            state.kept.insert(layer.e.name().to_owned(), kept);
        }
        self.mask(state)
    }

    /// Sets the singular values of dropped triplets to zero.
    fn mask(&self, state: &State) -> Result<()> {
        for layer in &self.layers {
            let Some(kept) = state.kept.get(layer.e.name()) else { continue };
            let kept: Vec<f32> = kept.iter().map(|kept| f32::from(u8::from(*kept))).collect();
            let e = layer.e.value();
            let kept = Tensor::from_vec(kept, e.shape(), e.device())?;
            layer.e.set(&(e * kept)?)?;
        }
        Ok(())
    }
}

/// `‖M‖` and its gradient by the factor that M is made of twice, for `M = P·Pᵀ − I`.
fn apart_from_orthogonal(p: &Tensor) -> Result<(f64, Tensor)> {
    let p = p.to_dtype(DType::F32)?;
    let m = (p.matmul(&p.t()?)? - Tensor::eye(p.dim(0)?, DType::F32, p.device())?)?;
    let norm = f64::from(m.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?);
    let gradient = m.matmul(&p)?;
    Ok((norm, if norm > 0.0 { (gradient * (2.0 / norm))? } else { gradient.zeros_like()? }))
}

impl TrainingHook for Allocator {
    fn penalty(&self) -> Result<(f64, Vec<(String, Tensor)>)> {
        let weight = self.schedule.regulariser / (2 * self.layers.len()).max(1) as f64;
        let (mut sum, mut gradients) = (0.0, Vec::new());
        if weight == 0.0 {
            return Ok((sum, gradients));
        }
        for layer in self.layers.iter().filter(|l| l.e.elem_count() > 0) {
            let (of_a, da) = apart_from_orthogonal(&layer.a.value())?;
            let (of_b, db) = apart_from_orthogonal(&layer.b.value().t()?.contiguous()?)?;
            sum += weight * (of_a + of_b);
            gradients.push((layer.a.name().to_owned(), (da * weight)?));
            gradients.push((layer.b.name().to_owned(), (db.t()?.contiguous()? * weight)?));
        }
        Ok((sum, gradients))
    }

    fn after_step(&self, step: u64, gradients: &HashMap<&str, &Tensor>) -> Result<()> {
        let Schedule { tinit, end, every, target_r, .. } = self.schedule;
        if !self.moves {
            return Ok(());
        }
        let (mut state, layers) = (self.locked(), self.layers.len());
        if step < end {
            self.update(&mut state, gradients)?;
            if step > tinit && step.is_multiple_of(every) {
                self.allocate(&mut state, self.schedule.budget(step, layers))?;
            }
        } else if step == end {
            self.allocate(&mut state, target_r * layers)?;
            state.importance.clear();
        } else {
            self.mask(&state)?;
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let state = self.locked();
        let mut tensors = Vec::new();
        for (name, importance) in &state.importance {
            tensors.push((format!("{name}{SENSITIVITY}"), importance.sensitivity.clone()));
            tensors.push((format!("{name}{UNCERTAINTY}"), importance.uncertainty.clone()));
        }
        for (name, kept) in &state.kept {
            let flags: Vec<u8> = kept.iter().map(|kept| u8::from(*kept)).collect();
            tensors.push((format!("{name}{KEPT}"), Tensor::new(flags, &Device::Cpu)?));
        }
        Ok(tensors)
    }

    fn load_state(&self, tensors: &HashMap<String, Tensor>) -> Result<()> {
        let mut state = State::default();
        let mut used = 0;
        for p in self.layers.iter().flat_map(|l| [&l.a, &l.b, &l.e]) {
            let of = |suffix: &str| tensors.get(&format!("{}{suffix}", p.name()));
            if let (Some(sensitivity), Some(uncertainty)) = (of(SENSITIVITY), of(UNCERTAINTY)) {
                let like = p.value();
                if sensitivity.dims() != like.dims() || uncertainty.dims() != like.dims() {
                    return Err(Error::msg(format!("the importance of {} has another shape than it", p.name())));
                }
                let (sensitivity, uncertainty) =
                    (sensitivity.to_device(like.device())?, uncertainty.to_device(like.device())?);
                state.importance.insert(p.name().to_owned(), Importance { sensitivity, uncertainty });
                used += 2;
            }
            if let Some(kept) = of(KEPT) {
                let kept: Vec<bool> =
                    kept.to_vec1::<u8>().with_context(|| p.name())?.into_iter().map(|kept| kept != 0).collect();
                if kept.len() != p.elem_count() {
                    return Err(Error::msg(format!("{} flags for the ranks of {}", kept.len(), p.name())));
                }
                state.kept.insert(p.name().to_owned(), kept);
                used += 1;
            }
        }
        if used != tensors.len() {
            return Err(Error::msg(format!("{} tensors, of which {used} are AdaLoRA's", tensors.len())));
        }
        *self.locked() = state;
        Ok(())
    }

    /// Takes out the triplets that were dropped and have not come back since, and says so in `rank_pattern`.
    fn export(&self, config: &mut Map<String, Value>, tensors: &mut [(String, Tensor)]) -> Result<()> {
        let state = self.locked();
        if state.kept.is_empty() {
            return Ok(());
        }
        let mut pattern = Map::new();
        for layer in &self.layers {
            let Some(kept) = state.kept.get(layer.e.name()) else { continue };
            let values = layer.e.value().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let kept: Vec<bool> = kept.iter().zip(values).map(|(kept, value)| *kept || value != 0.0).collect();
            let left: Vec<u32> = (0..).zip(&kept).filter(|(_, kept)| **kept).map(|(i, _)| i).collect();
            for (name, dim) in [(layer.a.name(), 0), (layer.b.name(), 1), (layer.e.name(), 0)] {
                if let Some((_, tensor)) = tensors.iter_mut().find(|(key, _)| key == name) {
                    *tensor = match left.is_empty() {
                        true => tensor.narrow(dim, 0, 0)?,
                        false => {
                            let left = Tensor::new(left.as_slice(), tensor.device())?;
                            tensor.contiguous()?.index_select(&left, dim)?
                        }
                    };
                }
            }
            let name = layer.e.name();
            pattern.insert(name.strip_prefix(KEY_PREFIX).unwrap_or(name).to_owned(), json!(kept));
        }
        config.insert("rank_pattern".into(), pattern.into());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn schedule(value: Value) -> Result<Schedule> {
        Schedule::read(ConfigKeys(value.as_object().unwrap()))
    }

    /// `RankAllocator.budget_schedule` of peft 0.21.2 for three layers.
    #[test]
    fn the_budget_falls_as_pefts() {
        let s = schedule(json!({"init_r": 6, "target_r": 4, "tinit": 2, "tfinal": 3, "total_step": 12})).unwrap();
        let budgets: Vec<usize> = (3..9).map(|step| s.budget(step, 3)).collect();
        assert_eq!(budgets, [15, 14, 13, 12, 12, 12]);
    }

    #[test]
    fn schedules_that_leave_no_room_are_refused() {
        for (value, key) in [
            (json!({}), "total_step"),
            (json!({"total_step": 10, "tinit": 6, "tfinal": 4}), "tinit"),
            (json!({"total_step": 10, "beta1": 1.0}), "beta1"),
            (json!({"total_step": 10, "orth_reg_weight": -0.1}), "orth_reg_weight"),
            (json!({"total_step": 10, "deltaT": 0}), "deltaT"),
        ] {
            let error = schedule(value).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }

    /// The term and its gradient against differences.
    #[test]
    fn the_regulariser_has_its_gradient() {
        let p = Tensor::new(&[[0.3f32, -0.2, 0.5], [0.1, 0.4, -0.6]], &Device::Cpu).unwrap();
        let (_, gradient) = apart_from_orthogonal(&p).unwrap();
        let gradient = gradient.to_vec2::<f32>().unwrap();
        for (row, gradient) in gradient.iter().enumerate() {
            for (column, gradient) in gradient.iter().enumerate() {
                let moved = |by: f32| {
                    let mut values = p.to_vec2::<f32>().unwrap();
                    values[row][column] += by;
                    apart_from_orthogonal(&Tensor::new(values, &Device::Cpu).unwrap()).unwrap().0
                };
                let numeric = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                assert!((numeric - f64::from(*gradient)).abs() < 1e-3, "{numeric} and {gradient}");
            }
        }
    }
}
