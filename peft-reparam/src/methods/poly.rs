//! Polytropon (Ponti et al. 2022, arXiv:2202.13914) and its multi-head routing (Caccia et al. 2022, arXiv:2211.03831; PEFT
//! `tuners/poly`): LoRA whose factors are mixed of several skills', by weights of each task.

use candle_core::{D, Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::{ConfigKeys, Ctx, Error, FrozenLinear, Mode, Result, Role};
use serde_json::json;

use super::{Kind, Made, Method, size};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;

pub(crate) const KIND: Kind = Kind {
    name: "poly",
    peft_type: "POLY",
    label: "Poly",
    keys: || {
        json!({"exclude_modules": null, "init_weights": true, "n_skills": 4, "n_splits": 1, "n_tasks": 1,
            "poly_type": "poly", "r": 8})
    },
    only_default: &["poly_type"],
    patterns: &[],
    read: |keys| Ok(Box::new(Poly::read(keys)?)),
};

/// Added to the sum that mixing weights are divided by.
const EPS: f64 = 1e-12;

#[derive(Debug)]
struct Poly {
    r: usize,
    tasks: usize,
    skills: usize,
    splits: usize,
    identity: bool,
}

impl Poly {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        Ok(Self {
            r: size(keys, "r", 8)?,
            tasks: size(keys, "n_tasks", 1)?,
            skills: size(keys, "n_skills", 4)?,
            splits: size(keys, "n_splits", 1)?,
            identity: keys.flag("init_weights", true)?,
        })
    }
}

impl Method for Poly {
    fn tasks(&self) -> Option<usize> {
        Some(self.tasks)
    }

    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let ((out, inp), splits, skills, r) = (start.dims(), self.splits, self.skills, self.r);
        for (n, what) in [(inp, "inputs"), (out, "outputs")] {
            if !n.is_multiple_of(splits) {
                return Err(start.misfit("n_splits", format!("{splits} does not divide its {n} {what}")));
            }
        }
        // PEFT's own files are of sizes that fit a memory; a config may ask for anything.
        let elements = skills.checked_mul(r).and_then(|n| n.checked_mul(inp.max(out)));
        if elements.is_none_or(|n| n > 1 << 32) || self.tasks.checked_mul(splits * skills).is_none_or(|n| n > 1 << 32) {
            return Err(
                start.misfit("n_skills", format!("{skills} skills of rank {r} for {} tasks are too large", self.tasks))
            );
        }
        let role = if self.identity { Role::ZeroAtStart } else { Role::Plain };
        // Each skill's as torch starts a linear layer, by what it reads.
        start.uniform("poly_lora_A", 1.0 / ((inp / splits) as f64).sqrt(), (splits, skills, inp / splits, r), role)?;
        let shape = (splits, skills, r, out / splits);
        match self.identity {
            true => start.constant("poly_lora_B", 0.0, shape, Role::Plain)?,
            false => start.uniform("poly_lora_B", 1.0 / (r as f64).sqrt(), shape, Role::Plain)?,
        }
        start.uniform("poly_router.module_logits", 1e-3, (self.tasks, splits * skills), role)?;
        Ok((start.finish(Skills { task: None, tasks: self.tasks }, 0.0), Vec::new()))
    }
}

/// `ΔW = (A·B)ᵀ/r`, where run `q` of A's inputs and of B's outputs is `Σ_s w[q, s]·A[q, s]` of the skills `s`. The weights are the
/// sigmoids of the task's logits over their sum.
#[derive(Debug)]
struct Skills {
    /// `None` before it is settled.
    task: Option<usize>,
    tasks: usize,
}

impl Skills {
    /// With `noise: [1, splits·skills]` added to the logits.
    fn mixed(&self, parameters: &[Tensor], noise: Option<Tensor>) -> Result<Change> {
        let [a, b, logits] = exactly(parameters)?;
        let Some(task) = self.task.or((self.tasks == 1).then_some(0)) else {
            return Err(Error::config("task_id", format!("is not given, and the adapter has {} tasks", self.tasks)));
        };
        let ((splits, skills, width, r), out) = (a.dims4()?, b.dim(3)?);
        let mut logits = logits.narrow(0, task, 1)?;
        if let Some(noise) = noise {
            logits = (logits + noise)?;
        }
        let shares = (logits.neg()?.exp()? + 1.0)?.recip()?.reshape((splits, 1, skills))?;
        let shares = shares.broadcast_div(&(shares.sum_keepdim(D::Minus1)? + EPS)?)?;
        let a = shares.matmul(&a.reshape((splits, skills, width * r))?)?.reshape((splits * width, r))?;
        let b = shares.matmul(&b.reshape((splits, skills, r * out))?)?.reshape((splits, r, out))?;
        let b = b.transpose(1, 2)?.reshape((splits * out, r))?;
        Ok(Change::LowRank { a: a.t()?.contiguous()?, b: (b * (1.0 / r as f64))? })
    }
}

impl Formula for Skills {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        self.mixed(parameters, None)
    }

    /// In training the weights are drawn: relaxed Bernoulli variables of temperature 1, anew for each sequence.
    fn drawn(&self, parameters: &[Tensor], base: &FrozenLinear, ctx: &Ctx<'_>) -> Result<Change> {
        if ctx.mode == Mode::Eval {
            return self.mixed(parameters, None);
        }
        let [_, _, logits] = exactly(parameters)?;
        let (count, rng) = (logits.dim(1)?, ctx.rng);
        let stream = Stream { seed: rng.seed, step: rng.step, site: base.site().0 };
        let first = u64::from(rng.run) * count as u64;
        let logistic = |i: u64| {
            let u = stream.uniform(first + i).clamp(f32::EPSILON, 1.0 - f32::EPSILON);
            u.ln() - (-u).ln_1p()
        };
        let noise: Vec<f32> = (0..count as u64).map(logistic).collect();
        let noise = Tensor::from_vec(noise, (1, count), &Device::Cpu)?.to_device(logits.device())?;
        self.mixed(parameters, Some(noise.to_dtype(logits.dtype())?))
    }

    fn for_task(&self, task: usize) -> Option<Box<dyn Formula>> {
        Some(Box::new(Self { task: Some(task), tasks: self.tasks }))
    }

    fn unmergeable(&self) -> Option<String> {
        let open = self.task.is_none() && self.tasks > 1;
        open.then(|| {
            format!(
                "it changes the weights in another way for each of {} tasks; choose one of them (--task-id)",
                self.tasks
            )
        })
    }
}
