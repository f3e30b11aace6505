//! LoRA on the weights of experts: `target_parameters`, and the names that experts had before transformers 5.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_core::kernels::{ExpertPlan, expert_lora_linear};
use peft_core::select::{ModuleKind, saved_target_modules, target_matches};
use peft_core::{
    BaseModel, Candidate, Ctx, Error, ExpertsModule, FrozenExperts, Parameter, Result, SiteKind, TargetModules,
    candidates,
};
use serde_json::{Map, Value};

use crate::config::LoraConfig;
use crate::init::Init;

/// `W_e + s·B_e·A_e` for each expert `e`, with A and B packed as in PEFT: `lora_A: [experts · r, in]` expert by expert, `lora_B:
/// [out, r · experts]` direction by direction (`ParamWrapper` in `tuners/lora/layer.py`).
#[derive(Debug)]
pub struct LoraExperts {
    pub(crate) a: Parameter,
    pub(crate) b: Parameter,
    pub(crate) experts: usize,
    pub(crate) scale: f32,
}

impl ExpertsModule for LoraExperts {
    fn forward(&self, base: &FrozenExperts, x: &Tensor, plan: &Arc<ExpertPlan>, ctx: &Ctx<'_>) -> Result<Tensor> {
        Ok(expert_lora_linear(x, base.weights(), plan, &self.a.get(ctx), &self.b.get(ctx), self.scale)?)
    }

    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.a, &self.b]
    }

    fn delta(&self, expert: usize) -> Result<Tensor> {
        let (a, b) = (self.a.value().to_dtype(DType::F32)?, self.b.value().to_dtype(DType::F32)?);
        let (out, columns) = b.dims2()?;
        let rank = columns.checked_div(self.experts).unwrap_or(0);
        let b = b.reshape((out, rank, self.experts))?.narrow(2, expert, 1)?.squeeze(2)?.contiguous()?;
        Ok((b.matmul(&a.narrow(0, expert * rank, rank)?)? * f64::from(self.scale))?)
    }
}

/// What the layers of a mixture were called as modules, and the parameters that hold them now (PEFT's
/// `utils/transformers_weight_conversion.py`). Names of `FUSED` go together.
type OldNames = [(&'static str, &'static str); 4];

const MIXTRAL: OldNames = [("gate", "gate.weight"), ("w1", FUSED), ("w3", FUSED), ("w2", "down_proj")];
const OTHERS: OldNames =
    [("gate", "gate.weight"), ("gate_proj", FUSED), ("up_proj", FUSED), ("down_proj", "down_proj")];

/// The parameter that gate and up have together.
const FUSED: &str = "gate_up_proj";

impl LoraConfig {
    /// This config with the old names of experts in `target_modules` (`w1`, `gate_proj`, and what `all-linear` or a pattern finds of
    /// them) as `target_parameters`. As in PEFT, what gate and up had each is twice the rank, and twice the alpha, of both together.
    ///
    /// # Errors
    /// One of gate and up without the other.
    pub(crate) fn for_experts(&self, base: &dyn BaseModel) -> Result<Cow<'_, Self>> {
        let has_experts = base.sites().iter().any(|site| matches!(site.kind, SiteKind::Experts { .. }));
        // PEFT's table has the types that are like `qwen2_moe`, and not itself.
        if !has_experts || base.model_type() == "qwen2_moe" {
            return Ok(Cow::Borrowed(self));
        }
        let old = if base.model_type() == "mixtral" { MIXTRAL } else { OTHERS };
        let Some(names) = self.target_names(&candidates(base.sites()), &old)? else { return Ok(Cow::Borrowed(self)) };
        let (mut modules, mut parameters) = (Vec::new(), BTreeSet::new());
        let mut fused = BTreeSet::new();
        parameters.extend(self.targets.target_parameters.iter().cloned());
        for name in names {
            let is = |old: &str| name == old || name.strip_suffix(old).is_some_and(|rest| rest.ends_with('.'));
            match old.iter().find(|(old, _)| is(old)) {
                None => modules.push(name),
                Some((old, new)) => {
                    parameters.insert((*new).to_owned());
                    if *new == FUSED {
                        fused.insert(*old);
                    }
                }
            }
        }
        let mut keys = Map::new();
        let parts = old.iter().filter(|(_, new)| *new == FUSED).map(|(old, _)| *old);
        let missing: Vec<&str> = parts.clone().filter(|part| !fused.contains(part)).collect();
        match (fused.len(), missing.as_slice()) {
            (0, _) => {}
            (count, []) => self.widen(count, &mut keys),
            (_, missing) => {
                let named = fused.iter().copied().collect::<Vec<_>>().join("`, `");
                let message = format!(
                    "`{named}` is one parameter, `{FUSED}`, with `{}` in this model: name both, or neither",
                    missing.join("`, `")
                );
                return Err(Error::config("target_modules", message));
            }
        }
        keys.insert("target_modules".into(), modules.into());
        keys.insert("target_parameters".into(), parameters.into_iter().collect::<Vec<_>>().into());
        let mut raw = self.raw().clone();
        raw.extend(keys);
        let mut converted = Self::parse(&raw, Init::of_file)?;
        converted.init = self.init;
        Ok(Cow::Owned(converted))
    }

    /// Rank and alpha of `count` layers in one parameter.
    pub(crate) fn widen(&self, count: usize, keys: &mut Map<String, Value>) {
        let pattern = format!(r".*\.{FUSED}");
        let alpha = self.lora_alpha * count as f64;
        // Whole numbers stay whole, as PEFT writes them.
        let alpha = if alpha.fract() == 0.0 && alpha.abs() < 1e15 { Value::from(alpha as i64) } else { alpha.into() };
        for (key, value) in [("rank_pattern", Value::from(self.r * count)), ("alpha_pattern", alpha)] {
            let mut patterns = self.raw().get(key).and_then(Value::as_object).cloned().unwrap_or_default();
            patterns.insert(pattern.clone(), value);
            keys.insert(key.into(), patterns.into());
        }
    }

    /// `target_modules` as names; `None` where they are the defaults, or a pattern that matches nothing.
    fn target_names(&self, candidates: &[Candidate<'_>], old: &OldNames) -> Result<Option<Vec<String>>> {
        let leaf = |path: &str| path.rsplit('.').next().unwrap_or(path).to_owned();
        let names: BTreeSet<String> = match &self.targets.target_modules {
            None => return Ok((!self.targets.target_parameters.is_empty()).then(Vec::new)),
            Some(TargetModules::Names(names)) => return Ok(Some(names.clone())),
            // What were linear layers are no longer, and are meant all the same.
            Some(TargetModules::AllLinear) => {
                let linears = match saved_target_modules(&self.targets, "LORA", candidates) {
                    Some(TargetModules::Names(names)) => names,
                    _ => Vec::new(),
                };
                let old = old.iter().map(|(old, _)| (*old).to_owned());
                linears.iter().map(|path| leaf(path)).chain(old).collect()
            }
            Some(TargetModules::Regex(_)) => {
                let mut found = BTreeSet::new();
                for path in candidates.iter().map(|c| c.path) {
                    let containers = path.match_indices('.').filter_map(|(dot, _)| path.get(..dot));
                    for name in containers.chain([path]) {
                        if target_matches(&self.targets, name)? {
                            found.insert(leaf(name));
                        }
                    }
                }
                for experts in candidates.iter().filter(|c| c.kind == ModuleKind::Experts) {
                    let Some((container, name)) = experts.path.rsplit_once('.') else { continue };
                    for (old, _) in old.iter().filter(|(_, new)| *new == name) {
                        if target_matches(&self.targets, &format!("{container}.{old}"))? {
                            found.insert((*old).to_owned());
                        }
                    }
                }
                if found.is_empty() {
                    return Ok(None);
                }
                found
            }
        };
        Ok(Some(names.into_iter().collect()))
    }

    /// Refuses what PEFT refuses beside `target_parameters`: the change of a weight knows no input.
    pub(crate) fn check_parameters(&self) -> Result<()> {
        let refuse = |key: &str, reason: &str| {
            Err(Error::config(
                key,
                format!(
                    "{reason} target_parameters (experts and \
            routers of a mixture, where target_modules names them)"
                ),
            ))
        };
        if self.lora_dropout > 0.0 {
            return refuse("lora_dropout", "must be 0.0 beside");
        }
        for (key, is) in [("use_dora", self.use_dora), ("lora_bias", self.lora_bias), ("use_gating", self.use_gating)] {
            if is {
                return refuse(key, "does not go with");
            }
        }
        Ok(())
    }
}

/// The prefix of the keys of each of these parameters: PEFT nests a wrapper for each parameter of a module, so that the first are
/// the innermost.
pub(crate) fn key_prefixes(paths: &[&str]) -> Vec<String> {
    let parent = |path: &str| path.rsplit_once('.').map_or(String::new(), |(parent, _)| parent.to_owned());
    let mut behind: BTreeMap<String, usize> = BTreeMap::new();
    let mut prefixes: Vec<String> = Vec::with_capacity(paths.len());
    for path in paths.iter().rev() {
        let depth = behind.entry(parent(path)).or_insert(0);
        prefixes.push(format!("{}{}", parent(path), ".base_layer".repeat(*depth)));
        *depth += 1;
    }
    prefixes.reverse();
    prefixes
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use peft_core::Role;
    use peft_core::kernels::testing::{close, randn};

    #[test]
    fn wrappers_nest_from_the_first_parameter_on() {
        let paths = ["l.0.experts.gate_up_proj", "l.0.experts.down_proj", "l.1.experts.down_proj"];
        assert_eq!(key_prefixes(&paths), ["l.0.experts.base_layer", "l.0.experts", "l.1.experts"]);
        assert_eq!(key_prefixes(&paths[..1]), ["l.0.experts"]);
    }

    /// `einsum("o r e, e r i -> e o i") · s`.
    #[test]
    fn the_change_of_a_weight_is_pefts() {
        let (experts, r, inp, out) = (3, 2, 4, 5);
        let parameter =
            |seed, shape: (usize, usize)| Parameter::new("p", &randn(seed, shape, 1.0).unwrap(), Role::Plain);
        let (a, b) = (parameter(1, (experts * r, inp)).unwrap(), parameter(2, (out, r * experts)).unwrap());
        let module = LoraExperts { a: a.clone(), b: b.clone(), experts, scale: 1.5 };
        let (a, b) = (a.value().to_vec2::<f32>().unwrap(), b.value().to_vec2::<f32>().unwrap());
        for e in 0..experts {
            let at = |o: usize, i: usize| (0..r).map(|j| b[o][j * experts + e] * a[e * r + j][i]).sum::<f32>() * 1.5;
            let want: Vec<Vec<f32>> = (0..out).map(|o| (0..inp).map(|i| at(o, i)).collect()).collect();
            let want = Tensor::new(want, &candle_core::Device::Cpu).unwrap();
            close("delta", &module.delta(e).unwrap(), &want, 1e-5).unwrap();
        }
    }
}
