//! Preference objectives: losses of the log-likelihoods of whole answers, of which one is preferred to the other.
//!
//! - DPO (Rafailov et al. 2023, arXiv:2305.18290): `−log σ(β·((π_c − ρ_c) − (π_r − ρ_r)))`, where `π` and `ρ` are the log-likelihoods of
//!   an answer under the model and under the reference, `c` the chosen and `r` the rejected.
//! - IPO (Azar et al. 2023, arXiv:2310.12036): `(h − 1/(2β))²`, with `h` as the difference in DPO but of means over an answer's tokens,
//!   as TRL has it after asking the authors.
//! - KTO (Ethayarajh et al. 2024, arXiv:2402.01306): `1 − σ(β·(π − ρ − z))` of a desirable answer, `1 − σ(β·(z − (π − ρ)))` of an undesirable
//!   one; `z`, from 0, is the mean of `π − ρ` over the step's answers behind prompts that are not theirs, and has no gradient.
//! - ORPO (Hong et al. 2024, arXiv:2403.07691): the chosen row's mean negative log-likelihood, prompt included, `− β·log σ(o_c − o_r)`
//!   with the log-odds `o = m − log(1 − eᵐ)` of the mean log-likelihoods `m`. It has no reference.
//! - SimPO (Meng et al. 2024, arXiv:2405.14734): `−log σ(β·(m_c − m_r) − γ)`. It has no reference.
//!
//! Names, defaults and rewards are TRL's. All of them are functions of sums of log-likelihoods, so that what reaches the logits of
//! a token is its own cross-entropy gradient times the derivative by its answer's sum; the model and its head know nothing of them.

use crate::data::{PreferenceBatch, Preferred};
use crate::driver::Measured;

/// How DPO turns a pair's difference of rewards into a loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DpoLoss {
    /// `−log σ`; with label smoothing ε, `−(1 − ε) log σ(x) − ε log σ(−x)` (conservative DPO).
    #[default]
    Sigmoid,
    /// `max(0, 1 − x)` (SLiC, arXiv:2305.10425).
    Hinge,
    /// `(−(1 − ε) log σ(x) + ε log σ(−x)) / (1 − 2ε)` (arXiv:2403.00409).
    Robust,
}

/// Which of the losses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PreferenceLoss {
    /// Direct preference optimisation.
    Dpo {
        /// What becomes of a pair's difference.
        loss: DpoLoss,
        /// The share of pairs that are taken to be the wrong way round, below 0.5.
        label_smoothing: f64,
    },
    /// Identity preference optimisation.
    Ipo,
    /// Kahneman–Tversky optimisation.
    Kto {
        /// Factor of the losses of desirable answers.
        desirable_weight: f64,
        /// Factor of those of undesirable ones.
        undesirable_weight: f64,
    },
    /// Odds-ratio preference optimisation.
    Orpo,
    /// Simple preference optimisation.
    Simpo {
        /// The margin of rewards that is aimed at.
        gamma: f64,
        /// As DPO's.
        label_smoothing: f64,
    },
}

/// A loss with its `β`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preference {
    /// Which loss.
    pub loss: PreferenceLoss,
    /// DPO, KTO: how dear it is to leave the reference; IPO: its `τ`; ORPO: its `λ`; SimPO: the rewards' scale. Above 0.
    pub beta: f64,
}

/// An answer's likelihood, and the reference's.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Answer {
    /// Sum of the log-likelihoods of its tokens, in nats.
    pub log_likelihood: f64,
    /// The same under the reference; 0 where the loss has none.
    pub reference: f64,
    /// Tokens, 1 or more.
    pub tokens: usize,
}

impl Answer {
    fn ratio(&self) -> f64 {
        self.log_likelihood - self.reference
    }

    fn per_token(&self, sum: f64) -> f64 {
        sum / self.tokens.max(1) as f64
    }

    fn mean(&self) -> f64 {
        self.per_token(self.log_likelihood)
    }
}

impl Preference {
    /// TRL's defaults of the loss of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let loss = match name {
            "dpo" => PreferenceLoss::Dpo { loss: DpoLoss::Sigmoid, label_smoothing: 0.0 },
            "ipo" => PreferenceLoss::Ipo,
            "kto" => PreferenceLoss::Kto { desirable_weight: 1.0, undesirable_weight: 1.0 },
            "orpo" => PreferenceLoss::Orpo,
            "simpo" => PreferenceLoss::Simpo { gamma: 0.5, label_smoothing: 0.0 },
            _ => return None,
        };
        Some(Self { loss, beta: 0.1 })
    }

    /// The name in recipes.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.loss {
            PreferenceLoss::Dpo { .. } => "dpo",
            PreferenceLoss::Ipo => "ipo",
            PreferenceLoss::Kto { .. } => "kto",
            PreferenceLoss::Orpo => "orpo",
            PreferenceLoss::Simpo { .. } => "simpo",
        }
    }

    /// Whether it compares with a reference model.
    #[must_use]
    pub fn has_reference(&self) -> bool {
        !matches!(self.loss, PreferenceLoss::Orpo | PreferenceLoss::Simpo { .. })
    }

    /// Whether it is a loss of single answers, so that rows may have one.
    #[must_use]
    pub fn takes_single_answers(&self) -> bool {
        matches!(self.loss, PreferenceLoss::Kto { .. })
    }

    /// Whether the tokens of the chosen row's prompt have a loss too.
    #[must_use]
    pub fn counts_prompts(&self) -> bool {
        matches!(self.loss, PreferenceLoss::Orpo)
    }

    /// An answer's reward: `β` times what the loss compares, or times the ratio to the reference where that is a mean of it.
    #[must_use]
    pub fn reward(&self, answer: &Answer) -> f64 {
        self.beta * if self.has_reference() { answer.ratio() } else { answer.mean() }
    }

    /// The loss of a pair, without ORPO's likelihood of the chosen row, and its derivatives by the log-likelihood of the chosen and of
    /// the rejected answer. KTO's is that of both answers.
    #[must_use]
    pub fn pair(&self, chosen: &Answer, rejected: &Answer, kl: f64) -> (f64, f64, f64) {
        let beta = self.beta;
        match self.loss {
            PreferenceLoss::Dpo { loss, label_smoothing: smoothing } => {
                let x = beta * (chosen.ratio() - rejected.ratio());
                let (value, d) = match loss {
                    DpoLoss::Sigmoid => smoothed(x, smoothing),
                    DpoLoss::Hinge => ((1.0 - x).max(0.0), if x < 1.0 { -1.0 } else { 0.0 }),
                    DpoLoss::Robust => {
                        let (value, d) = smoothed(x, -smoothing / (1.0 - 2.0 * smoothing));
                        (value, d)
                    }
                };
                (value, beta * d, -beta * d)
            }
            PreferenceLoss::Ipo => {
                let (c, r) = (chosen.per_token(chosen.ratio()), rejected.per_token(rejected.ratio()));
                let x = c - r - 1.0 / (2.0 * beta);
                (x * x, chosen.per_token(2.0 * x), -rejected.per_token(2.0 * x))
            }
            PreferenceLoss::Kto { .. } => {
                let (c, d_c) = self.single(chosen, true, kl);
                let (r, d_r) = self.single(rejected, false, kl);
                (c + r, d_c, d_r)
            }
            PreferenceLoss::Orpo => {
                let odds = |m: f64| m - log_1m_exp(m);
                let (value, d) = smoothed(odds(chosen.mean()) - odds(rejected.mean()), 0.0);
                // d/dm (m − log(1 − eᵐ)) = 1/(1 − eᵐ)
                let by_sum = |answer: &Answer| answer.per_token(1.0 / -least_below_one(answer.mean()).exp_m1());
                (beta * value, beta * d * by_sum(chosen), -beta * d * by_sum(rejected))
            }
            PreferenceLoss::Simpo { gamma, label_smoothing } => {
                let (value, d) = smoothed(beta * (chosen.mean() - rejected.mean()) - gamma, label_smoothing);
                (value, chosen.per_token(beta * d), -rejected.per_token(beta * d))
            }
        }
    }

    /// KTO's loss of one answer and its derivative by the answer's log-likelihood, for a step's `kl`; 0 of other losses.
    #[must_use]
    pub fn single(&self, answer: &Answer, desirable: bool, kl: f64) -> (f64, f64) {
        let PreferenceLoss::Kto { desirable_weight, undesirable_weight } = self.loss else { return (0.0, 0.0) };
        let (weight, sign) = if desirable { (desirable_weight, 1.0) } else { (undesirable_weight, -1.0) };
        let p = sigmoid(sign * self.beta * (answer.ratio() - kl));
        (weight * (1.0 - p), -weight * sign * self.beta * p * (1.0 - p))
    }

    /// This micro-batch's part of the loss of a step, and its derivative by the negative log-likelihood `nll` of each of its counted
    /// tokens.
    #[must_use]
    pub fn weigh(&self, nll: &[f32], batch: &PreferenceBatch, step: &PreferenceStep) -> Weighed {
        let answers = batch.answers(nll);
        let answer = |i: usize| answers.get(i).copied().unwrap_or_default();
        let mut found = Weighed { value: 0.0, weights: vec![0.0; nll.len()], scored: Scored::default() };
        // Of each sequence, the derivatives by the log-likelihood of its answer and of all its tokens.
        let mut by_sums = vec![(0.0, 0.0); answers.len()];
        let mut put = |i: usize, d: (f64, f64)| by_sums.get_mut(i).into_iter().for_each(|sum| *sum = d);
        let losses = step.losses.max(1) as f64;
        for row in &batch.rows {
            match *row {
                Preferred::Pair { chosen: c, rejected: r } => {
                    let (chosen, rejected) = (answer(c), answer(r));
                    let (value, d_chosen, d_rejected) = self.pair(&chosen, &rejected, step.kl);
                    found.value += value / losses;
                    let mut whole = 0.0;
                    if self.counts_prompts() {
                        let tokens = step.tokens.max(1) as f64;
                        let span = batch.spans.get(c).cloned().unwrap_or_default();
                        let row = nll.get(span).unwrap_or_default();
                        found.value += row.iter().map(|&x| f64::from(x)).sum::<f64>() / tokens;
                        whole = -1.0 / tokens;
                    }
                    put(c, (d_chosen / losses, whole));
                    put(r, (d_rejected / losses, 0.0));
                    found.scored.rewards.pair(self.reward(&chosen), self.reward(&rejected));
                    found.scored.own += own(&chosen);
                }
                Preferred::One { answer: i, desirable } => {
                    let one = answer(i);
                    let (value, d) = self.single(&one, desirable, step.kl);
                    found.value += value / losses;
                    put(i, (d / losses, 0.0));
                    found.scored.rewards.one(self.reward(&one), desirable);
                    found.scored.own += own(&one);
                }
            }
        }
        for (span, (of_answer, of_all)) in batch.spans.iter().zip(&by_sums) {
            let weights = found.weights.get_mut(span.clone()).unwrap_or_default().iter_mut();
            for (weight, &counts) in weights.zip(batch.in_answer.get(span.clone()).unwrap_or_default()) {
                *weight = -of_all - if counts { *of_answer } else { 0.0 };
            }
        }
        found
    }
}

fn own(answer: &Answer) -> Measured {
    Measured { nll: -answer.log_likelihood, counted: answer.tokens, hits: 0 }
}

/// What a micro-batch gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighed {
    /// Its part of the loss.
    pub value: f64,
    /// The derivatives by its tokens' negative log-likelihoods.
    pub weights: Vec<f64>,
    /// What it measured besides.
    pub scored: Scored,
}

/// Rewards of answers, and the likelihood of the rows' own.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Scored {
    /// The likelihood of chosen answers, and of the only answer of a row.
    pub own: Measured,
    /// The rewards.
    pub rewards: Rewards,
}

impl std::ops::AddAssign for Scored {
    fn add_assign(&mut self, other: Self) {
        self.own += other.own;
        self.rewards += other.rewards;
    }
}

/// What the means of a step divide by, and what all its micro-batches share.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PreferenceStep {
    /// Losses: pairs, or answers with KTO.
    pub losses: usize,
    /// Counted tokens of chosen rows, prompts included.
    pub tokens: usize,
    /// KTO's `z`.
    pub kl: f64,
}

impl PreferenceStep {
    /// Of micro-batches together, without their `kl`.
    pub fn of<'b>(objective: &Preference, batches: impl IntoIterator<Item = &'b PreferenceBatch>) -> Self {
        let mut step = Self::default();
        for batch in batches {
            for row in &batch.rows {
                step.losses += match row {
                    Preferred::Pair { .. } if objective.takes_single_answers() => 2,
                    _ => 1,
                };
                if let Preferred::Pair { chosen, .. } = row {
                    step.tokens += batch.spans.get(*chosen).map_or(0, ExactSizeIterator::len);
                }
            }
        }
        step
    }
}

/// Rewards of chosen (or desirable) and rejected (or undesirable) answers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rewards {
    chosen: (f64, usize),
    rejected: (f64, usize),
    /// Pairs whose chosen answer has the larger reward, and all pairs.
    right: (usize, usize),
    /// KTO's `z`, where it was made.
    kl: Option<f64>,
}

impl Rewards {
    /// Adds a pair.
    pub fn pair(&mut self, chosen: f64, rejected: f64) {
        self.one(chosen, true);
        self.one(rejected, false);
        self.right.0 += usize::from(chosen > rejected);
        self.right.1 += 1;
    }

    /// Adds an answer by itself.
    pub fn one(&mut self, reward: f64, desirable: bool) {
        let side = if desirable { &mut self.chosen } else { &mut self.rejected };
        side.0 += reward;
        side.1 += 1;
    }

    /// With KTO's `z` beside them.
    #[must_use]
    pub fn with_kl(self, kl: f64) -> Self {
        Self { kl: Some(kl), ..self }
    }

    /// Means by name: `rewards_chosen`, `rewards_rejected`, `rewards_margin` where there are both, `rewards_accuracy` (the share of pairs
    /// whose chosen answer has the larger reward) where there are pairs, and `kl`.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let mean = |(sum, n): (f64, usize)| (n > 0).then(|| sum / n as f64);
        let (chosen, rejected) = (mean(self.chosen), mean(self.rejected));
        let (right, pairs) = self.right;
        let all = [
            ("rewards_chosen", chosen),
            ("rewards_rejected", rejected),
            ("rewards_margin", chosen.zip(rejected).map(|(c, r)| c - r)),
            ("rewards_accuracy", (pairs > 0).then(|| right as f64 / pairs as f64)),
            ("kl", self.kl),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?)))
    }
}

impl std::ops::AddAssign for Rewards {
    fn add_assign(&mut self, other: Self) {
        for (own, other) in [(&mut self.chosen, other.chosen), (&mut self.rejected, other.rejected)] {
            own.0 += other.0;
            own.1 += other.1;
        }
        self.right.0 += other.right.0;
        self.right.1 += other.right.1;
        self.kl = self.kl.or(other.kl);
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `log σ(x)`, without overflow.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// `−(1 − ε) log σ(x) − ε log σ(−x)` and its derivative by `x`.
fn smoothed(x: f64, smoothing: f64) -> (f64, f64) {
    let value = -(1.0 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x);
    (value, smoothing * sigmoid(x) - (1.0 - smoothing) * sigmoid(-x))
}

/// A mean log-likelihood below 0: of an answer that is certain the odds are infinite.
fn least_below_one(mean: f64) -> f64 {
    mean.min(-1e-7)
}

/// `log(1 − eˣ)` of a mean log-likelihood.
fn log_1m_exp(x: f64) -> f64 {
    let x = least_below_one(x);
    if x > -std::f64::consts::LN_2 { (-x.exp_m1()).ln() } else { (-x.exp()).ln_1p() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn all() -> Vec<Preference> {
        let dpo = |loss, label_smoothing| PreferenceLoss::Dpo { loss, label_smoothing };
        [
            dpo(DpoLoss::Sigmoid, 0.0),
            dpo(DpoLoss::Sigmoid, 0.2),
            dpo(DpoLoss::Hinge, 0.0),
            dpo(DpoLoss::Robust, 0.3),
            PreferenceLoss::Ipo,
            PreferenceLoss::Kto { desirable_weight: 1.3, undesirable_weight: 0.7 },
            PreferenceLoss::Orpo,
            PreferenceLoss::Simpo { gamma: 0.5, label_smoothing: 0.0 },
            PreferenceLoss::Simpo { gamma: 1.5, label_smoothing: 0.1 },
        ]
        .into_iter()
        .flat_map(|loss| [0.1, 0.7].map(|beta| Preference { loss, beta }))
        .collect()
    }

    #[test]
    fn derivatives_are_those_of_the_losses() {
        let answers = [(-3.0, -4.5, 2), (-41.0, -38.0, 7), (-0.2, -0.1, 3), (-9.0, -9.5, 1)]
            .map(|(log_likelihood, reference, tokens)| Answer { log_likelihood, reference, tokens });
        for objective in all() {
            for (chosen, rejected) in answers.iter().flat_map(|c| answers.iter().map(move |r| (c, r))) {
                let moved = |answer: &Answer, h: f64| Answer { log_likelihood: answer.log_likelihood + h, ..*answer };
                let at = |c: f64, r: f64| objective.pair(&moved(chosen, c), &moved(rejected, r), 0.4).0;
                let (_, by_chosen, by_rejected) = objective.pair(chosen, rejected, 0.4);
                let h = 1e-5;
                for (what, analytic, numeric) in [
                    ("chosen", by_chosen, (at(h, 0.0) - at(-h, 0.0)) / (2.0 * h)),
                    ("rejected", by_rejected, (at(0.0, h) - at(0.0, -h)) / (2.0 * h)),
                ] {
                    let close = (analytic - numeric).abs() < 1e-6 * (1.0 + numeric.abs());
                    assert!(close, "{objective:?} {chosen:?} {rejected:?} by {what}: {analytic}, not {numeric}");
                }
            }
        }
    }

    /// Values computed by hand from the papers' formulae.
    #[test]
    fn losses_at_the_start_are_known() {
        let answer = Answer { log_likelihood: -2.0, reference: -2.0, tokens: 2 };
        let value = |name: &str| Preference::named(name).unwrap().pair(&answer, &answer, 0.0).0;
        let ln2 = std::f64::consts::LN_2;
        for (name, expected) in [
            ("dpo", ln2),
            ("ipo", 25.0),
            ("kto", 1.0),
            ("orpo", 0.1 * ln2),
            // −log σ(−1/2)
            ("simpo", 1.0f64.exp().sqrt().ln_1p()),
        ] {
            assert!((value(name) - expected).abs() < 1e-12, "{name}: {}, not {expected}", value(name));
        }
        assert!(Preference::named("ppo").is_none());
    }

    #[test]
    fn extreme_likelihoods_stay_finite() {
        let answers = [(-1e6, -1.0), (-1.0, -1e6), (0.0, 0.0), (-1e-30, 0.0)]
            .map(|(log_likelihood, reference)| Answer { log_likelihood, reference, tokens: 3 });
        for objective in all() {
            for (chosen, rejected) in answers.iter().flat_map(|c| answers.iter().map(move |r| (c, r))) {
                let (value, c, r) = objective.pair(chosen, rejected, 0.0);
                assert!([value, c, r].iter().all(|x| x.is_finite()), "{objective:?} {chosen:?} {rejected:?}");
            }
        }
    }

    #[test]
    fn rewards_have_their_means() {
        let mut rewards = Rewards::default();
        assert_eq!(rewards.named().count(), 0);
        rewards.pair(1.0, 0.0);
        rewards.pair(-1.0, 2.0);
        let named: Vec<_> = rewards.named().collect();
        let expected =
            [("rewards_chosen", 0.0), ("rewards_rejected", 1.0), ("rewards_margin", -1.0), ("rewards_accuracy", 0.5)];
        assert_eq!(named, expected);
        let mut other = Rewards::default();
        other.one(3.0, true);
        rewards += other.with_kl(0.25);
        assert_eq!(rewards.named().next(), Some(("rewards_chosen", 1.0)));
        assert_eq!(rewards.named().last(), Some(("kl", 0.25)));
    }
}
