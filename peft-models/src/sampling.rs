//! Which token comes next: penalties on what was said, then the likeliest token or one that is drawn.

use std::collections::HashMap;

use peft_core::kernels::Stream;
use peft_core::{Error, Result};

/// How the next token is chosen from logits. The parts act in the order in which they stand here, as transformers' processors do.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Logits of tokens that were seen, in the prompt or since, are divided by it where positive and multiplied where negative
    /// (CTRL, Keskar et al. 2019, arXiv 1909.05858); 1 is none.
    pub repetition_penalty: f32,
    /// Taken from the logit of every token that was written.
    pub presence_penalty: f32,
    /// Taken from the logit of a token each time that it was written.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// 0 is greedy.
    pub temperature: f32,
    /// Sample from so many of the likeliest tokens; 0 is all.
    pub top_k: usize,
    /// Sample from the likeliest tokens that make up this share, in `(0, 1]` (Holtzman et al. 2020, arXiv 1904.09751).
    pub top_p: f32,
    /// Sample from tokens with at least this share of the likeliest one's probability, in `[0, 1]` (Nguyen et al. 2024,
    /// arXiv 2407.01082).
    pub min_p: f32,
    /// Seed of the drawing.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
        }
    }
}

/// The tokens of a text, and how often each was written.
#[derive(Debug, Clone, Default)]
pub struct Seen(HashMap<u32, u32>);

impl Seen {
    /// Those of a prompt, which nobody wrote.
    #[must_use]
    pub fn of_prompt(ids: &[u32]) -> Self {
        Self(ids.iter().map(|&id| (id, 0)).collect())
    }

    /// Counts a written token.
    pub fn wrote(&mut self, id: u32) {
        let count = self.0.entry(id).or_insert(0);
        *count = count.saturating_add(1);
    }
}

impl Sampling {
    /// Refuses what means nothing.
    ///
    /// # Errors
    /// A value outside its range, by its name.
    pub fn check(&self) -> Result<()> {
        let within = |name: &str, value: f32, fits: bool, range: &str| match value.is_finite() && fits {
            true => Ok(()),
            false => Err(Error::config(name, format!("{value} is {range}"))),
        };
        within("temperature", self.temperature, self.temperature >= 0.0, "not a number from 0")?;
        within("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "outside (0, 1]")?;
        within("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "outside [0, 1]")?;
        within("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "not above 0")?;
        within("presence_penalty", self.presence_penalty, true, "not a number")?;
        within("frequency_penalty", self.frequency_penalty, true, "not a number")?;
        self.logit_bias.iter().try_for_each(|(_, bias)| within("logit_bias", *bias, true, "not a number"))
    }

    /// Whether the next token is the likeliest one of the model's own logits.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.temperature == 0.0 && !self.changes_logits()
    }

    /// Whether [`Sampling::choose`] looks at what was seen.
    #[must_use]
    pub fn looks_back(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    fn changes_logits(&self) -> bool {
        self.looks_back() || !self.logit_bias.is_empty()
    }

    /// The next token for a row of logits, which it may change; nothing where they are not numbers. `stream` gives the drawing's
    /// number.
    #[must_use]
    pub fn choose(&self, logits: &mut [f32], seen: &Seen, stream: Stream) -> Option<u32> {
        if logits.iter().any(|x| x.is_nan()) {
            return None;
        }
        if self.looks_back() {
            self.penalise(logits, seen);
        }
        for (id, bias) in &self.logit_bias {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit += bias;
            }
        }
        let best = first_of_the_largest(logits)?;
        Some(if self.temperature == 0.0 { best } else { self.draw(logits, best, stream) })
    }

    fn penalise(&self, logits: &mut [f32], seen: &Seen) {
        for (id, written) in &seen.0 {
            let Some(logit) = logits.get_mut(*id as usize) else { continue };
            let repeated =
                if *logit > 0.0 { *logit / self.repetition_penalty } else { *logit * self.repetition_penalty };
            let present = if *written > 0 { self.presence_penalty } else { 0.0 };
            *logit = repeated - present - self.frequency_penalty * *written as f32;
        }
    }

    /// A token from those that the cuts leave of one row of logits, which are numbers and whose likeliest is `best`.
    pub(crate) fn draw(&self, logits: &[f32], best: u32, stream: Stream) -> u32 {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut weights: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(i, x)| (i as u32, f64::from((x - max) / self.temperature).exp())).collect();
        let in_order = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if self.top_k > 0 && self.top_k < weights.len() {
            weights.select_nth_unstable_by(self.top_k, in_order);
            weights.truncate(self.top_k);
            weights.sort_unstable_by(in_order);
        }
        let mut nucleus: f64 = weights.iter().map(|w| w.1).sum();
        if self.top_p < 1.0 {
            let share = f64::from(self.top_p) * nucleus;
            nucleus = keep_share(&mut weights, share, in_order);
        }
        if self.min_p > 0.0 {
            // The likeliest has weight 1.
            weights.retain(|w| w.1 >= f64::from(self.min_p));
            nucleus = weights.iter().map(|w| w.1).sum();
        }
        let mut draw = f64::from(stream.uniform(0)) * nucleus;
        for (token, w) in &weights {
            draw -= w;
            if draw < 0.0 {
                return *token;
            }
        }
        weights.last().map_or(best, |w| w.0)
    }
}

/// Cuts `weights` down to the first ones in order that add up to `share`, and gives their sum. Only as many as it takes are put
/// in order: a vocabulary is long, and a nucleus mostly short.
fn keep_share(
    weights: &mut Vec<(u32, f64)>,
    share: f64,
    in_order: impl Fn(&(u32, f64), &(u32, f64)) -> std::cmp::Ordering + Copy,
) -> f64 {
    let (mut sorted, mut sum, mut keep) = (0, 0.0, 0);
    while keep < weights.len() {
        if keep == sorted {
            let rest = weights.get_mut(sorted..).unwrap_or_default();
            let next = (sorted * 7).max(64).min(rest.len());
            if next < rest.len() {
                rest.select_nth_unstable_by(next, in_order);
            }
            rest.get_mut(..next).unwrap_or_default().sort_unstable_by(in_order);
            sorted += next;
        }
        sum += weights.get(keep).map_or(0.0, |w| w.1);
        keep += 1;
        if sum >= share {
            break;
        }
    }
    weights.truncate(keep);
    sum
}

fn first_of_the_largest(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(usize, f32)> = None;
    for (i, &x) in logits.iter().enumerate() {
        if best.is_none_or(|(_, most)| x > most) {
            best = Some((i, x));
        }
    }
    best.map(|(i, _)| i as u32)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use super::*;

    fn stream(step: u32) -> Stream {
        Stream { seed: 1, step, site: 0 }
    }

    fn drawn(sampling: &Sampling, logits: &[f32], seen: &Seen) -> Vec<u32> {
        let all: BTreeSet<u32> =
            (0..400).map(|i| sampling.choose(&mut logits.to_vec(), seen, stream(i)).unwrap()).collect();
        all.into_iter().collect()
    }

    #[test]
    fn each_cut_leaves_its_tokens() {
        let warm = Sampling { temperature: 1.0, ..Sampling::default() };
        // Shares of about 0.52, 0.32, 0.12, 0.04.
        let logits = [0.0, 2.5, 2.0, 1.0];
        let none = Seen::default();
        assert_eq!(drawn(&warm, &logits, &none), [0, 1, 2, 3]);
        assert_eq!(drawn(&Sampling { top_k: 2, ..warm.clone() }, &logits, &none), [1, 2]);
        assert_eq!(drawn(&Sampling { top_p: 0.9, ..warm.clone() }, &logits, &none), [1, 2, 3]);
        assert_eq!(drawn(&Sampling { top_p: 0.5, ..warm.clone() }, &logits, &none), [1]);
        assert_eq!(drawn(&Sampling { min_p: 0.5, ..warm.clone() }, &logits, &none), [1, 2]);
        assert_eq!(drawn(&Sampling { top_k: 3, min_p: 0.3, ..warm.clone() }, &logits, &none), [1, 2]);
        assert_eq!(drawn(&Sampling { logit_bias: vec![(1, -100.0)], ..warm }, &logits, &none), [0, 2, 3]);
    }

    #[test]
    fn penalties_act_on_what_was_seen() {
        let mut seen = Seen::of_prompt(&[0, 1]);
        seen.wrote(1);
        seen.wrote(1);
        let changed = |sampling: Sampling| {
            let mut logits = vec![2.0, 2.0, -2.0, 1.5];
            let token = sampling.choose(&mut logits, &seen, stream(0));
            (logits, token.unwrap())
        };
        let none = Sampling::default();
        assert_eq!(changed(Sampling { repetition_penalty: 2.0, ..none.clone() }), (vec![1.0, 1.0, -2.0, 1.5], 3));
        assert_eq!(changed(Sampling { presence_penalty: 1.0, ..none.clone() }), (vec![2.0, 1.0, -2.0, 1.5], 0));
        assert_eq!(changed(Sampling { frequency_penalty: 1.0, ..none }), (vec![2.0, 0.0, -2.0, 1.5], 0));
    }

    #[test]
    fn a_nucleus_is_the_same_however_much_is_put_in_order() {
        let in_order = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let weights: Vec<(u32, f64)> =
            (0..5000u32).map(|i| (i, f64::from(i.wrapping_mul(2_654_435_761) >> 20) / 4096.0)).collect();
        let total: f64 = weights.iter().map(|w| w.1).sum();
        for share in [0.0, 0.01, 0.3, 0.9, 1.0, 1.1] {
            let mut want = weights.clone();
            want.sort_by(in_order);
            let (mut sum, mut keep) = (0.0, 0);
            for w in &want {
                sum += w.1;
                keep += 1;
                if sum >= share * total {
                    break;
                }
            }
            want.truncate(keep);
            let mut got = weights.clone();
            assert_eq!(keep_share(&mut got, share * total, in_order), sum, "{share}");
            assert_eq!(got, want, "{share}");
        }
    }

    #[test]
    fn what_means_nothing_is_refused() {
        let none = Sampling::default;
        for (name, wrong) in [
            ("temperature", Sampling { temperature: -1.0, ..none() }),
            ("top_p", Sampling { top_p: 0.0, ..none() }),
            ("min_p", Sampling { min_p: 1.5, ..none() }),
            ("repetition_penalty", Sampling { repetition_penalty: 0.0, ..none() }),
            ("presence_penalty", Sampling { presence_penalty: f32::NAN, ..none() }),
            ("logit_bias", Sampling { logit_bias: vec![(0, f32::INFINITY)], ..none() }),
        ] {
            assert!(wrong.check().unwrap_err().to_string().contains(name));
        }
        assert!(none().check().is_ok());
        assert_eq!(none().choose(&mut [0.0, f32::NAN], &Seen::default(), stream(0)), None);
    }
}
