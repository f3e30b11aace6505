//! Learning-rate schedules, with the formulas of `transformers.optimization` (`get_*_schedule*`): linear warm-up
//! from 0, then a decay. The rate at optimiser step `t` (0-based, so the first step of a warm-up runs at 0) is a pure
//! function of `t`; nothing needs saving for resume.

use std::f64::consts::PI;
use std::fmt;
use std::str::FromStr;

use peft_core::suggest::did_you_mean;
use serde::{Deserialize, Serialize};

/// What can be wrong with a schedule.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// No schedule of that name.
    #[error("unknown scheduler `{name}`{hint}; known: {known}")]
    Unknown {
        /// Name given.
        name: String,
        /// Nearest known names as a phrase, or nothing.
        hint: String,
        /// All names.
        known: String,
    },
    /// A setting is out of range, or does not belong to the schedule.
    #[error("scheduler `{kind}`: {what}")]
    Setting {
        /// The schedule.
        kind: ScheduleKind,
        /// What is wrong and what would be right.
        what: String,
    },
}

type Result<T, E = ScheduleError> = std::result::Result<T, E>;

/// The shape of the decay after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ScheduleKind {
    /// No decay. `constant_with_warmup` is the same: a warm-up acts wherever one is set.
    Constant,
    /// Straight line to 0 at the last step.
    Linear,
    /// Half a cosine to 0 (`num_cycles` 0.5).
    Cosine,
    /// `num_cycles` half cosines, each from the full rate to 0.
    CosineWithRestarts,
    /// Half a cosine to `min_lr` or `min_lr_rate` times the rate.
    CosineWithMinLr,
    /// `(1 − progress)^power` down to `lr_end`.
    Polynomial,
    /// `1/√(1 + (t − warmup)/timescale)`.
    InverseSqrt,
    /// Constant, then a decay over the last `num_decay_steps`.
    WarmupStableDecay,
}

impl ScheduleKind {
    /// Every schedule under the name that transformers' `lr_scheduler_type` uses; aliases follow.
    pub const NAMES: [(&'static str, Self); 10] = [
        ("constant", Self::Constant),
        ("linear", Self::Linear),
        ("cosine", Self::Cosine),
        ("cosine_with_restarts", Self::CosineWithRestarts),
        ("cosine_with_min_lr", Self::CosineWithMinLr),
        ("polynomial", Self::Polynomial),
        ("inverse_sqrt", Self::InverseSqrt),
        ("warmup_stable_decay", Self::WarmupStableDecay),
        ("constant_with_warmup", Self::Constant),
        ("wsd", Self::WarmupStableDecay),
    ];

    /// Name as recipes spell it.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, k)| *k == self).map_or("constant", |(n, _)| n)
    }
}

impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ScheduleKind {
    type Err = ScheduleError;

    fn from_str(s: &str) -> Result<Self> {
        let key = s.trim().to_ascii_lowercase().replace('-', "_");
        if let Some((_, kind)) = Self::NAMES.iter().find(|(n, _)| *n == key) {
            return Ok(*kind);
        }
        let names = Self::NAMES.map(|(n, _)| n);
        Err(ScheduleError::Unknown { name: s.to_owned(), hint: did_you_mean(&key, names), known: names.join(", ") })
    }
}

impl TryFrom<String> for ScheduleKind {
    type Error = ScheduleError;

    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<ScheduleKind> for String {
    fn from(k: ScheduleKind) -> Self {
        k.name().to_owned()
    }
}

/// Settings that only some schedules have, named as transformers' `lr_scheduler_kwargs`. `None` is its default.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleOptions {
    /// Cosine waves: 0.5 by default, 1 half wave for `cosine_with_restarts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_cycles: Option<f64>,
    /// Lowest rate of `cosine_with_min_lr`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_lr: Option<f64>,
    /// Lowest rate of `cosine_with_min_lr` as a share of the full one; 0.1 if neither is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_lr_rate: Option<f64>,
    /// Exponent of `polynomial`, 1 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub power: Option<f64>,
    /// Last rate of `polynomial`, 1e-7 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_end: Option<f64>,
    /// Time scale of `inverse_sqrt` in steps: the warm-up's length by default, 10,000 without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timescale: Option<u64>,
    /// Steps of the decay of `warmup_stable_decay`; a tenth of all steps by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_decay_steps: Option<u64>,
    /// Lowest rate of `warmup_stable_decay` as a share of the full one, 0 by default. Its warm-up starts there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_lr_ratio: Option<f64>,
}

/// Optimiser steps that a share of the training takes, rounded up, as `TrainingArguments.get_warmup_steps` does. A
/// ratio outside `[0, 1]`, or NaN, is taken to the nearest end.
pub fn warmup_steps_from_ratio(warmup_ratio: f64, total_steps: u64) -> u64 {
    // NaN goes to 0 in the cast.
    ((total_steps as f64 * warmup_ratio.clamp(0.0, 1.0)).ceil() as u64).min(total_steps)
}

/// A learning rate for every optimiser step.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    kind: ScheduleKind,
    base_lr: f64,
    warmup: u64,
    total: u64,
    cycles: f64,
    floor: f64,
    power: f64,
    timescale: f64,
    decay: u64,
}

impl Schedule {
    /// A schedule that reaches `learning_rate` after `warmup_steps` and ends at `total_steps` (all optimiser steps of
    /// the run, warm-up included).
    ///
    /// # Errors
    /// A rate or option out of range, or an option that this schedule does not have.
    pub fn new(
        kind: ScheduleKind,
        learning_rate: f64,
        warmup_steps: u64,
        total_steps: u64,
        options: &ScheduleOptions,
    ) -> Result<Self> {
        use ScheduleKind as K;
        let err = |what: String| Err(ScheduleError::Setting { kind, what });
        if !learning_rate.is_finite() || learning_rate < 0.0 {
            return err(format!("learning_rate = {learning_rate} must be finite and not negative"));
        }
        let given = [
            (
                "num_cycles",
                options.num_cycles,
                &[K::Cosine, K::CosineWithRestarts, K::CosineWithMinLr, K::WarmupStableDecay][..],
            ),
            ("min_lr", options.min_lr, &[K::CosineWithMinLr]),
            ("min_lr_rate", options.min_lr_rate, &[K::CosineWithMinLr]),
            ("power", options.power, &[K::Polynomial]),
            ("lr_end", options.lr_end, &[K::Polynomial]),
            ("timescale", options.timescale.map(|v| v as f64), &[K::InverseSqrt]),
            ("num_decay_steps", options.num_decay_steps.map(|v| v as f64), &[K::WarmupStableDecay]),
            ("min_lr_ratio", options.min_lr_ratio, &[K::WarmupStableDecay]),
        ];
        for (name, value, kinds) in given {
            let Some(value) = value else { continue };
            if !kinds.contains(&kind) {
                let owners: Vec<_> = kinds.iter().map(|k| format!("`{k}`")).collect();
                return err(format!("{name} is a setting of {}; remove it or change the scheduler", owners.join(", ")));
            }
            if !value.is_finite() || value < 0.0 {
                return err(format!("{name} = {value} must be finite and not negative"));
            }
        }
        if options.min_lr.is_some() && options.min_lr_rate.is_some() {
            return err("set min_lr or min_lr_rate, not both".to_owned());
        }
        let floor = match kind {
            K::CosineWithMinLr => match options.min_lr {
                Some(_) if learning_rate == 0.0 => 0.0,
                Some(min_lr) => min_lr / learning_rate,
                None => options.min_lr_rate.unwrap_or(0.1),
            },
            K::Polynomial if learning_rate > 0.0 => options.lr_end.unwrap_or(1e-7) / learning_rate,
            K::WarmupStableDecay => options.min_lr_ratio.unwrap_or(0.0),
            _ => 0.0,
        };
        if floor > 1.0 {
            return err(format!(
                "the lowest rate, {:e}, is above learning_rate = {learning_rate:e}",
                floor * learning_rate
            ));
        }
        if options.timescale == Some(0) {
            return err("timescale must be at least 1".to_owned());
        }
        let decay = options.num_decay_steps.unwrap_or(total_steps.div_ceil(10));
        if kind == K::WarmupStableDecay && warmup_steps.saturating_add(decay) > total_steps {
            return err(format!(
                "warmup_steps {warmup_steps} + num_decay_steps {decay} exceed the {total_steps} steps of the run"
            ));
        }
        Ok(Self {
            kind,
            base_lr: learning_rate,
            warmup: warmup_steps,
            total: total_steps,
            cycles: options.num_cycles.unwrap_or(if kind == K::CosineWithRestarts { 1.0 } else { 0.5 }),
            floor,
            power: options.power.unwrap_or(1.0),
            timescale: options.timescale.unwrap_or(if warmup_steps == 0 { 10_000 } else { warmup_steps }) as f64,
            decay,
        })
    }

    /// Which decay this is.
    pub fn kind(&self) -> ScheduleKind {
        self.kind
    }

    /// Steps of the warm-up.
    pub fn warmup_steps(&self) -> u64 {
        self.warmup
    }

    /// The learning rate of optimiser step `step`, 0-based. Past the last step it keeps the value of the end.
    pub fn lr(&self, step: u64) -> f64 {
        self.base_lr * self.factor(step)
    }

    /// Share of the full rate at `step`, in `[0, 1]`.
    pub fn factor(&self, step: u64) -> f64 {
        use ScheduleKind as K;
        if step < self.warmup {
            let f = step as f64 / self.warmup as f64;
            return if self.kind == K::WarmupStableDecay { f * (1.0 - self.floor) + self.floor } else { f };
        }
        let after = (step - self.warmup) as f64;
        let length = self.total.saturating_sub(self.warmup);
        let progress = (after / length.max(1) as f64).min(1.0);
        let cosine = |progress: f64| 0.5 * (1.0 + (PI * self.cycles * 2.0 * progress).cos());
        let above = |f: f64| f * (1.0 - self.floor) + self.floor;
        let f = match self.kind {
            K::Constant => 1.0,
            // One division of integers, as transformers has it, so that the rates agree to the last bit.
            K::Linear => self.total.saturating_sub(step) as f64 / length.max(1) as f64,
            K::Cosine => cosine(progress),
            K::CosineWithRestarts if progress >= 1.0 => 0.0,
            K::CosineWithRestarts => 0.5 * (1.0 + (PI * (self.cycles * progress).fract()).cos()),
            K::CosineWithMinLr => above(cosine(progress)),
            K::Polynomial => above((1.0 - progress).powf(self.power)),
            K::InverseSqrt => 1.0 / ((after + self.timescale) / self.timescale).sqrt(),
            K::WarmupStableDecay => {
                let stable = self.total.saturating_sub(self.warmup).saturating_sub(self.decay) as f64;
                let progress = (after - stable) / self.decay.max(1) as f64;
                match progress {
                    p if p < 0.0 || self.decay == 0 && after < stable => 1.0,
                    p if p < 1.0 && self.decay > 0 => above(cosine(p)),
                    _ => self.floor,
                }
            }
        };
        f.clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[derive(Deserialize)]
    struct Case {
        kind: String,
        lr: f64,
        warmup: u64,
        total: u64,
        options: ScheduleOptions,
        want: Vec<f64>,
    }

    #[test]
    fn equals_transformers() {
        let cases: Vec<Case> =
            serde_json::from_str(include_str!("../tests/fixtures/transformers_schedules.json")).unwrap();
        assert!(cases.len() > 20);
        for c in cases {
            let s = Schedule::new(c.kind.parse().unwrap(), c.lr, c.warmup, c.total, &c.options).unwrap();
            for (t, want) in c.want.iter().enumerate() {
                let got = s.lr(t as u64);
                assert!(
                    (got - want).abs() <= 1e-12 * c.lr,
                    "{} warmup {} of {}, step {t}: {got} vs {want}",
                    c.kind,
                    c.warmup,
                    c.total
                );
            }
        }
    }

    #[test]
    fn names() {
        for (name, kind) in ScheduleKind::NAMES {
            assert_eq!(name.parse::<ScheduleKind>().unwrap(), kind);
            assert_eq!(kind.to_string().parse::<ScheduleKind>().unwrap(), kind);
        }
        assert_eq!("Cosine ".parse::<ScheduleKind>().unwrap(), ScheduleKind::Cosine);
        for (bad, hint) in [
            ("cosin", "`cosine`"),
            ("liner", "`linear`"),
            ("polynomal", "`polynomial`"),
            ("inv_sqrt", "`inverse_sqrt`"),
        ] {
            let e = bad.parse::<ScheduleKind>().unwrap_err().to_string();
            assert!(e.contains(&format!("did you mean {hint}")), "{e}");
        }
        assert!(!"zzz".parse::<ScheduleKind>().unwrap_err().to_string().contains("did you mean"));
        assert_eq!(serde_json::to_string(&ScheduleKind::CosineWithMinLr).unwrap(), "\"cosine_with_min_lr\"");
        assert!(serde_json::from_str::<ScheduleKind>("\"cosin\"").unwrap_err().to_string().contains("cosine"));
    }

    #[test]
    fn warmup_ratio_rounds_up() {
        assert_eq!(warmup_steps_from_ratio(0.03, 100), 3);
        assert_eq!(warmup_steps_from_ratio(0.03, 101), 4);
        assert_eq!(warmup_steps_from_ratio(0.0, 101), 0);
        assert_eq!(warmup_steps_from_ratio(2.0, 7), 7);
        assert_eq!(warmup_steps_from_ratio(f64::NAN, 7), 0);
        assert_eq!(warmup_steps_from_ratio(-1.0, 7), 0);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let none = ScheduleOptions::default();
        let new = |kind, lr, warmup, total, o: ScheduleOptions| Schedule::new(kind, lr, warmup, total, &o);
        use ScheduleKind as K;
        assert!(new(K::Linear, f64::NAN, 0, 10, none).is_err());
        assert!(new(K::Linear, -1.0, 0, 10, none).is_err());
        let e = new(K::Linear, 1.0, 0, 10, ScheduleOptions { power: Some(2.0), ..none }).unwrap_err().to_string();
        assert!(e.contains("`polynomial`"), "{e}");
        let both = ScheduleOptions { min_lr: Some(0.1), min_lr_rate: Some(0.1), ..none };
        assert!(new(K::CosineWithMinLr, 1.0, 0, 10, both).is_err());
        assert!(new(K::CosineWithMinLr, 1.0, 0, 10, ScheduleOptions { min_lr: Some(2.0), ..none }).is_err());
        assert!(new(K::Polynomial, 1e-8, 0, 10, none).is_err(), "lr_end above the rate");
        assert!(new(K::InverseSqrt, 1.0, 0, 10, ScheduleOptions { timescale: Some(0), ..none }).is_err());
        assert!(new(K::WarmupStableDecay, 1.0, 5, 10, ScheduleOptions { num_decay_steps: Some(6), ..none }).is_err());
        assert!(new(K::WarmupStableDecay, 1.0, u64::MAX, 10, none).is_err());
    }

    #[test]
    fn every_rate_is_finite_and_in_range() {
        for (_, kind) in ScheduleKind::NAMES {
            for (warmup, total) in [(0, 0), (0, 1), (1, 1), (3, 10), (10, 10), (0, u64::MAX), (u64::MAX, 5)] {
                let Ok(s) = Schedule::new(kind, 1e-3, warmup, total, &ScheduleOptions::default()) else {
                    continue;
                };
                for step in [0, 1, 2, 9, 10, 11, 1000, u64::MAX / 2, u64::MAX] {
                    let lr = s.lr(step);
                    assert!((0.0..=1e-3).contains(&lr), "{kind} {warmup}/{total} step {step}: {lr}");
                }
            }
        }
    }
}
