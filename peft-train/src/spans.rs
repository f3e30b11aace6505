//! Answers found in a context, and how right they are: SQuAD's exact match and F1 (its `evaluate-v2.0.py`).

use std::collections::HashMap;

use peft_core::{Error, Result};

use crate::data::{Batch, Dataset, Question};

/// The longest answer in tokens, `max_answer_length` of transformers' `run_qa.py`.
const MOST_TOKENS: usize = 30;

/// Shares of questions that were answered right, and how far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SpanScores {
    questions: usize,
    exact: f64,
    f1: f64,
}

impl SpanScores {
    /// Share of questions whose answer is one of the right ones.
    #[must_use]
    pub fn exact_match(&self) -> f64 {
        self.exact / self.questions.max(1) as f64
    }

    /// Mean over the questions of the F1 of the answer's words, with the right answer that is the nearest.
    #[must_use]
    pub fn f1(&self) -> f64 {
        self.f1 / self.questions.max(1) as f64
    }

    /// Adds the questions of a batch. Where their texts are at hand the answers' texts are compared, else their tokens' places.
    pub(crate) fn add(&mut self, batch: &Batch, bits: &[u32], data: Option<&Dataset>, outputs: &[f32]) -> Result<()> {
        let may_be_none = data.is_some_and(Dataset::has_unanswerable);
        for (pair, &row) in batch.bounds.windows(2).zip(&batch.rows) {
            let &[from, to] = pair else { continue };
            let (Some(bits), Some(logits)) = (bits.get(from..to), outputs.get(2 * from..2 * to)) else {
                return Err(Error::msg("predictions do not line up with the batch"));
            };
            let (exact, f1) = match data.and_then(|data| data.question(row)) {
                Some(question) => of_texts(question, logits, may_be_none),
                None => of_tokens(bits, logits),
            };
            self.questions += 1;
            self.exact += exact;
            self.f1 += f1;
        }
        Ok(())
    }
}

/// The first and last of the best answer among so many tokens from `first` on, and its score.
fn best(logits: &[f32], first: usize, tokens: usize) -> Option<(usize, usize, f32)> {
    let at = |t: usize, column: usize| logits.get(2 * t + column).copied();
    let mut best: Option<(usize, usize, f32)> = None;
    for from in first..first + tokens {
        for to in from..(first + tokens).min(from + MOST_TOKENS) {
            let score = at(from, 0)? + at(to, 1)?;
            if best.is_none_or(|(_, _, most)| score > most) {
                best = Some((from, to, score));
            }
        }
    }
    best
}

/// Exact match and F1 of the answer's text.
fn of_texts(question: &Question, logits: &[f32], may_be_none: bool) -> (f64, f64) {
    let found = best(logits, question.first, question.spans.len());
    let none = logits.first().zip(logits.get(1)).map(|(start, end)| start + end);
    let found = found.filter(|(_, _, score)| !(may_be_none && none.is_some_and(|none| none > *score)));
    let span = |t: usize| t.checked_sub(question.first).and_then(|t| question.spans.get(t));
    let text = found.and_then(|(from, to, _)| question.context.get(span(from)?.start..span(to)?.end));
    compare(text.unwrap_or_default(), &question.answers)
}

/// Exact match and F1 of the answer's places.
fn of_tokens(bits: &[u32], logits: &[f32]) -> (f64, f64) {
    let place = |bit: u32| bits.iter().position(|bits| bits & bit != 0);
    let (Some((from, to, _)), Some(first), Some(last)) = (best(logits, 0, bits.len()), place(1), place(2)) else {
        return (0.0, 0.0);
    };
    let shared = (to.min(last) + 1).saturating_sub(from.max(first));
    let both = (to + 1 - from) + (last + 1).saturating_sub(first);
    (f64::from(u8::from((from, to) == (first, last))), 2.0 * shared as f64 / both.max(1) as f64)
}

/// Exact match and F1 of an answer with the nearest of the right ones; without one the right answer is empty.
fn compare(answer: &str, right: &[String]) -> (f64, f64) {
    let answer = words(answer);
    let right: Vec<Vec<String>> = right.iter().map(|right| words(right)).filter(|words| !words.is_empty()).collect();
    if right.is_empty() {
        let same = f64::from(u8::from(answer.is_empty()));
        return (same, same);
    }
    let one = |right: &Vec<String>| (f64::from(u8::from(answer == *right)), f1(&answer, right));
    right.iter().map(one).fold((0.0, 0.0), |best, one| (best.0.max(one.0), best.1.max(one.1)))
}

/// The F1 of two bags of words.
fn f1(answer: &[String], right: &[String]) -> f64 {
    if answer.is_empty() || right.is_empty() {
        return f64::from(u8::from(answer == right));
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    right.iter().for_each(|word| *left.entry(word).or_default() += 1);
    let mut shared = 0;
    for word in answer {
        if let Some(n) = left.get_mut(word.as_str()).filter(|n| **n > 0) {
            *n -= 1;
            shared += 1;
        }
    }
    2.0 * f64::from(shared) / (answer.len() + right.len()) as f64
}

/// The words of a text as SQuAD compares them: in lower case, without punctuation, without articles.
fn words(text: &str) -> Vec<String> {
    let plain: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let mut kept = String::with_capacity(plain.len());
    let mut rest = plain.as_str();
    // Articles are words of a regular expression, so that they end at any sign that is neither letter nor digit.
    while let Some(first) = rest.chars().next() {
        let is_word = first.is_alphanumeric();
        let end = rest.find(|c: char| c.is_alphanumeric() != is_word).unwrap_or(rest.len());
        let (run, behind) = rest.split_at(end);
        kept.push_str(if ["a", "an", "the"].contains(&run) { " " } else { run });
        rest = behind;
    }
    kept.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Against `compute_exact` and `compute_f1` of SQuAD's `evaluate-v2.0.py`.
    #[test]
    fn texts_are_compared_as_squad_does() {
        for (answer, right, exact, f1) in [
            ("The Norman army.", &["norman army"][..], 1.0, 1.0),
            ("a norman", &["the Norman army"], 0.0, 2.0 / 3.0),
            ("army army", &["army"], 0.0, 2.0 / 3.0),
            ("in 1066", &["1066", "the year 1066"], 0.0, 2.0 / 3.0),
            ("Saxon", &["Norman"], 0.0, 0.0),
            ("the–end", &["end"], 0.0, 0.0),
            ("anthem", &["them"], 0.0, 0.0),
            ("U.S.", &["us"], 1.0, 1.0),
            ("", &[], 1.0, 1.0),
            ("the", &[], 1.0, 1.0),
            ("x", &[], 0.0, 0.0),
        ] {
            let right: Vec<String> = right.iter().map(|s| s.to_string()).collect();
            let (e, f) = compare(answer, &right);
            assert!(e == exact && (f - f1).abs() < 1e-12, "{answer}: {e} {f}");
        }
    }

    fn question(answers: &[&str]) -> Question {
        let answers = answers.iter().map(|s| s.to_string()).collect();
        Question { context: "ab cd ef".into(), first: 2, spans: vec![0..2, 3..5, 6..8], answers }
    }

    #[test]
    fn the_best_answer_stands_in_the_context() {
        // Start, end of each token: what lies outside the context, or ends before it starts, is no answer.
        let logits = [9.0, 9.0, 8.0, 8.0, 0.0, 3.0, 2.0, 1.0, 1.0, 2.0];
        assert_eq!(best(&logits, 2, 3).unwrap(), (3, 4, 4.0));
        assert_eq!(of_texts(&question(&["cd ef"]), &logits, false), (1.0, 1.0));
        assert_eq!(of_texts(&question(&["ab", "cd"]), &logits, false), (0.0, 2.0 / 3.0));
        // Where some question has no answer, the first token stands for none.
        assert_eq!(of_texts(&question(&[]), &logits, true), (1.0, 1.0));
        assert_eq!(of_texts(&question(&["cd ef"]), &logits, true), (0.0, 0.0));
        assert_eq!(of_tokens(&[0, 0, 0, 1, 2], &[0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 2.0, 1.0, 1.0, 2.0]), (1.0, 1.0));
        assert_eq!(of_tokens(&[3, 0, 0], &[0.0, 0.0, 5.0, 0.0, 0.0, 5.0]), (0.0, 0.0));
        assert_eq!(of_tokens(&[0, 1, 2], &[5.0, 0.0, 0.0, 0.0, 0.0, 5.0]), (0.0, 0.8));
    }

    #[test]
    fn no_answer_is_longer_than_thirty_tokens() {
        let mut logits = vec![0.0; 80];
        (logits[0], logits[79]) = (5.0, 5.0);
        let (from, to, score) = best(&logits, 0, 40).unwrap();
        assert!(to - from < MOST_TOKENS && (score - 5.0).abs() < 1e-6);
    }
}
