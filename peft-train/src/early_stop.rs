//! Early stopping on an evaluation metric, and the best step so far.

use serde::{Deserialize, Serialize};

/// Whether a smaller or a larger value of the metric is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Losses and perplexities.
    Lower,
    /// Accuracies, F1 and other scores.
    Higher,
}

impl Better {
    /// The direction that a metric's name implies: names that speak of a loss, perplexity or error are better lower, and so is what
    /// training lowers, the objective.
    pub fn of_metric(name: &str) -> Self {
        let name = name.to_ascii_lowercase();
        let lower = ["loss", "perplexity", "ppl", "nll", "error", "mae", "mse", "objective"];
        if lower.iter().any(|w| name.contains(w)) { Self::Lower } else { Self::Higher }
    }

    /// By how much `a` is better than `b`; negative if it is worse.
    fn gain(self, a: f64, b: f64) -> f64 {
        match self {
            Self::Lower => b - a,
            Self::Higher => a - b,
        }
    }
}

/// When to stop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EarlyStopConfig {
    /// Key of the evaluation row that is watched.
    #[serde(default = "default_metric")]
    pub metric: String,
    /// Direction; left out, the metric's name decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub better: Option<Better>,
    /// Evaluations in a row without progress before training stops; 0 never stops and only tracks the best.
    #[serde(default)]
    pub patience: u32,
    /// Progress is a gain of more than this over the value that last counted as progress.
    #[serde(default)]
    pub min_delta: f64,
}

fn default_metric() -> String {
    "eval_loss".to_owned()
}

impl Default for EarlyStopConfig {
    fn default() -> Self {
        Self { metric: default_metric(), better: None, patience: 0, min_delta: 0.0 }
    }
}

/// What a checkpoint keeps.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct EarlyStopState {
    /// Best value and its step; any gain counts.
    pub best: Option<Best>,
    /// The value that patience is measured against: it moves on gains above `min_delta` only, so that many small
    /// gains still add up to progress.
    pub reference: Option<f64>,
    /// Evaluations in a row without progress.
    pub bad_evals: u32,
}

/// The best evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Optimiser step after which it was measured.
    pub step: u64,
    /// The metric there.
    pub value: f64,
}

/// What one evaluation means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// This is the best value so far: keep this adapter.
    pub is_best: bool,
    /// Patience has run out.
    pub stop: bool,
}

/// Watches one metric.
#[derive(Debug, Clone, PartialEq)]
pub struct EarlyStop {
    config: EarlyStopConfig,
    better: Better,
    state: EarlyStopState,
}

impl EarlyStop {
    /// Starts without history. A `min_delta` that is negative or NaN acts as 0.
    pub fn new(mut config: EarlyStopConfig) -> Self {
        config.min_delta = config.min_delta.max(0.0);
        let better = config.better.unwrap_or_else(|| Better::of_metric(&config.metric));
        Self { config, better, state: EarlyStopState::default() }
    }

    /// Goes on from a checkpoint.
    pub fn resume(config: EarlyStopConfig, state: EarlyStopState) -> Self {
        Self { state, ..Self::new(config) }
    }

    /// What it was told to watch.
    pub fn config(&self) -> &EarlyStopConfig {
        &self.config
    }

    /// Takes one evaluation's value. A value that is not finite is never progress and never the best.
    pub fn observe(&mut self, step: u64, value: f64) -> Verdict {
        let s = &mut self.state;
        let finite = value.is_finite();
        let is_best = finite && s.best.is_none_or(|b| self.better.gain(value, b.value) > 0.0);
        if is_best {
            s.best = Some(Best { step, value });
        }
        if finite && s.reference.is_none_or(|r| self.better.gain(value, r) > self.config.min_delta) {
            s.reference = Some(value);
            s.bad_evals = 0;
        } else {
            s.bad_evals = s.bad_evals.saturating_add(1);
        }
        Verdict { is_best, stop: self.should_stop() }
    }

    /// Whether patience has run out; true again right after a resume.
    pub fn should_stop(&self) -> bool {
        self.config.patience > 0 && self.state.bad_evals >= self.config.patience
    }

    /// Name of the watched metric.
    pub fn metric(&self) -> &str {
        &self.config.metric
    }

    /// Best value and step so far.
    pub fn best(&self) -> Option<Best> {
        self.state.best
    }

    /// What a checkpoint must keep.
    pub fn state(&self) -> EarlyStopState {
        self.state
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn config(patience: u32, min_delta: f64) -> EarlyStopConfig {
        EarlyStopConfig { patience, min_delta, ..Default::default() }
    }

    #[test]
    fn stops_after_patience_and_keeps_the_best() {
        let mut e = EarlyStop::new(config(2, 0.0));
        let got: Vec<_> = [3.0, 2.0, 2.5, 2.0].iter().enumerate().map(|(i, &v)| e.observe(i as u64 * 10, v)).collect();
        assert_eq!(got.iter().map(|v| v.is_best).collect::<Vec<_>>(), [true, true, false, false]);
        assert_eq!(got.iter().map(|v| v.stop).collect::<Vec<_>>(), [false, false, false, true]);
        assert_eq!(e.best(), Some(Best { step: 10, value: 2.0 }));
    }

    #[test]
    fn small_gains_are_the_best_but_only_add_up_to_progress() {
        let mut e = EarlyStop::new(config(3, 0.1));
        for (i, v) in [1.0, 0.95, 0.91, 0.89, 0.88].into_iter().enumerate() {
            let verdict = e.observe(i as u64, v);
            assert!(verdict.is_best);
            assert!(!verdict.stop);
        }
        assert_eq!(e.state().reference, Some(0.89));
        assert_eq!(e.state().bad_evals, 1);
    }

    #[test]
    fn higher_is_better_and_nan_is_never_good() {
        assert_eq!(Better::of_metric("eval_accuracy"), Better::Higher);
        assert_eq!(Better::of_metric("eval_loss"), Better::Lower);
        assert_eq!(Better::of_metric("eval_perplexity"), Better::Lower);
        let mut e = EarlyStop::new(EarlyStopConfig { metric: "eval_f1".into(), patience: 2, ..Default::default() });
        assert!(!e.observe(0, f64::NAN).is_best);
        assert!(e.observe(1, 0.5).is_best);
        assert!(!e.observe(2, f64::INFINITY).is_best);
        assert!(e.observe(3, f64::NAN).stop);
        assert_eq!(e.best().unwrap().step, 1);
    }

    #[test]
    fn patience_zero_only_tracks() {
        let mut e = EarlyStop::new(EarlyStopConfig::default());
        assert!((0..50).all(|i| !e.observe(i, i as f64).stop));
        assert_eq!(e.best(), Some(Best { step: 0, value: 0.0 }));
    }

    #[test]
    fn resume_is_exact() {
        let values = [3.0, 2.9, 3.1, 2.85, 3.0, f64::NAN, 4.0];
        let mut straight = EarlyStop::new(config(3, 0.07));
        let want: Vec<_> = values.iter().enumerate().map(|(i, &v)| straight.observe(i as u64, v)).collect();
        for cut in 0..values.len() {
            let mut e = EarlyStop::new(config(3, 0.07));
            for (i, &v) in values[..cut].iter().enumerate() {
                e.observe(i as u64, v);
            }
            let json = serde_json::to_string(&e.state()).unwrap();
            let mut e = EarlyStop::resume(config(3, 0.07), serde_json::from_str(&json).unwrap());
            let rest: Vec<_> = values[cut..].iter().enumerate().map(|(i, &v)| e.observe((cut + i) as u64, v)).collect();
            assert_eq!(rest, want[cut..]);
            assert_eq!(e, straight);
        }
    }
}
