//! The facts of a finished run that the report, the model card and `--json` show, and how numbers are written there.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::early_stop::Best;

/// What happened in a run. Fields that are empty or `None` are left out where they would be shown.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RunFacts {
    /// Base model as the user named it: a hub id, a folder or a `.gguf` file.
    pub base_model: String,
    /// Method as recipes spell it (`lora`).
    pub method: String,
    /// PEFT's `task_type` (`CAUSAL_LM`), if the method has one.
    pub task_type: Option<String>,
    /// Trainable parameters.
    pub trainable_parameters: u64,
    /// All parameters, base included.
    pub total_parameters: u64,
    /// Optimiser steps done.
    pub steps: u64,
    /// Optimiser steps planned.
    pub planned_steps: u64,
    /// Passes over the training data.
    pub epochs: f64,
    /// Training rows.
    pub train_examples: u64,
    /// Input tokens trained on.
    pub tokens: u64,
    /// Loss of the last step.
    pub final_loss: Option<f64>,
    /// Name of the metric that picks the best adapter (`eval_loss`).
    pub best_metric: Option<String>,
    /// Its best value and step.
    pub best: Option<Best>,
    /// Wall time of the training in seconds, earlier parts of a resumed run included.
    pub seconds: f64,
    /// Peak memory in bytes, if it was measured.
    pub peak_memory: Option<u64>,
    /// Device (`cpu`, `cuda:0`).
    pub device: String,
    /// Dtype or quantisation of the frozen base.
    pub dtype: String,
    /// Seed of the run.
    pub seed: u64,
    /// How the run ended, where it is not the planned end ("early stop at step 300", "interrupted").
    pub ended: Option<String>,
}

impl RunFacts {
    /// Label and value of each fact, in the order of a table.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = Vec::new();
        let mut push = |k, v: String| {
            if !v.is_empty() {
                rows.push((k, v));
            }
        };
        push("Base model", self.base_model.clone());
        push("Method", self.method.clone());
        push("Trainable parameters", self.parameters());
        push(
            "Steps",
            match self.planned_steps > self.steps {
                true => format!("{} of {}", count(self.steps), count(self.planned_steps)),
                false => count(self.steps),
            },
        );
        if self.epochs > 0.0 && self.epochs.is_finite() {
            push("Epochs", number(self.epochs));
        }
        if self.train_examples > 0 {
            push("Training examples", count(self.train_examples));
        }
        push("Tokens", count(self.tokens));
        push("Final loss", self.final_loss.map(number).unwrap_or_default());
        if let Some(b) = self.best {
            let metric = self.best_metric.as_deref().unwrap_or("eval_loss");
            push("Best evaluation", format!("{metric} {} at step {}", number(b.value), count(b.step)));
        }
        push("Training time", duration(self.seconds));
        push("Tokens per second", self.tokens_per_second().map(|v| count(v.round() as u64)).unwrap_or_default());
        push("Peak memory", self.peak_memory.map(bytes).unwrap_or_default());
        push("Device", self.device.clone());
        push("Base dtype", self.dtype.clone());
        push("Seed", self.seed.to_string());
        push("Ended", self.ended.clone().unwrap_or_default());
        rows
    }

    /// Input tokens a second over the whole run.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let v = self.tokens as f64 / self.seconds;
        (self.seconds > 0.0 && v.is_finite()).then_some(v)
    }

    /// "1,234 of 5,678 (0.02 %)".
    pub(super) fn parameters(&self) -> String {
        let share = 100.0 * self.trainable_parameters as f64 / self.total_parameters as f64;
        match self.total_parameters {
            0 => count(self.trainable_parameters),
            n => format!("{} of {} ({} %)", count(self.trainable_parameters), count(n), significant(share, 3)),
        }
    }
}

/// The same prompt before and after training.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Sample {
    /// What the model was given.
    pub prompt: String,
    /// What the base model made of it.
    pub before: String,
    /// What the adapted model makes of it.
    pub after: String,
}

/// `1234567` → `1,234,567`.
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Four significant digits.
pub(super) fn number(v: f64) -> String {
    significant(v, 4)
}

/// `v` with `digits` significant digits, in scientific notation where a plain number would be long.
pub(super) fn significant(v: f64, digits: usize) -> String {
    if !v.is_finite() {
        return if v.is_nan() { "NaN".to_owned() } else { format!("{}∞", if v < 0.0 { "−" } else { "" }) };
    }
    if v == 0.0 {
        return "0".to_owned();
    }
    let magnitude = v.abs().log10().floor() as i32;
    if !(-3..6).contains(&magnitude) {
        let s = format!("{v:.*e}", digits.saturating_sub(1));
        return match s.split_once('e') {
            Some((m, e)) if m.contains('.') => {
                format!("{}e{e}", m.trim_end_matches('0').trim_end_matches('.'))
            }
            _ => s,
        };
    }
    let decimals = (digits as i32 - 1 - magnitude).max(0) as usize;
    let s = format!("{v:.decimals$}");
    if s.contains('.') { s.trim_end_matches('0').trim_end_matches('.').to_owned() } else { s }
}

/// `1.4 GB` and the like, in powers of 1000.
pub(super) fn bytes(n: u64) -> String {
    let mut v = n as f64;
    for unit in ["B", "kB", "MB", "GB", "TB"] {
        if v < 999.5 || unit == "TB" {
            return format!("{} {unit}", significant(v, 3));
        }
        v /= 1000.0;
    }
    String::new()
}

/// `12.3 s`, `4:05`, `1:02:03`.
pub(super) fn duration(seconds: f64) -> String {
    let Ok(d) = Duration::try_from_secs_f64(seconds) else {
        return "unknown".to_owned();
    };
    if seconds < 60.0 {
        return format!("{} s", significant(seconds, 3));
    }
    let s = d.as_secs();
    match s / 3600 {
        0 => format!("{}:{:02}", s / 60, s % 60),
        h => format!("{h}:{:02}:{:02}", s / 60 % 60, s % 60),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(["0", "12", "123", "1,234", "1,234,567"], [0, 12, 123, 1234, 1_234_567].map(count));
        let want = ["0", "1.235", "2e-4", "0.05", "123457", "1.235e7", "NaN", "−∞", "100"];
        let got = [0.0, 1.23456, 2e-4, 0.05, 123_456.7, 12_345_678.0, f64::NAN, f64::NEG_INFINITY, 100.0];
        assert_eq!(want, got.map(number).each_ref().map(String::as_str));
        assert_eq!(["999 B", "1 kB", "1.2 GB"], [999, 1000, 1_200_000_000].map(bytes).each_ref().map(String::as_str));
        let got = [0.0, 5.25, 65.0, 3723.0, -1.0, f64::NAN, f64::INFINITY].map(duration);
        assert_eq!(
            ["0 s", "5.25 s", "1:05", "1:02:03", "unknown", "unknown", "unknown"],
            got.each_ref().map(String::as_str)
        );
        assert_eq!(bytes(u64::MAX), "1.84e7 TB");
    }

    #[test]
    fn empty_facts_are_left_out() {
        let rows = RunFacts { steps: 5, planned_steps: 9, ..Default::default() }.rows();
        assert!(rows.iter().all(|(_, v)| !v.is_empty()));
        assert!(rows.contains(&("Steps", "5 of 9".to_owned())));
        assert!(!rows.iter().any(|(k, _)| *k == "Base model" || *k == "Peak memory"));
        let json = serde_json::to_string(&RunFacts::default()).unwrap();
        assert_eq!(serde_json::from_str::<RunFacts>(&json).unwrap(), RunFacts::default());
    }
}
