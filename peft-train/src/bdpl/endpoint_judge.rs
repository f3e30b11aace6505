//! Prompts judged by a model behind an API.

use std::collections::BTreeMap;
use std::path::Path;

use peft_core::{Error, Result};

use super::endpoint::Question;
use super::run::{Judge, Readings};
use super::{Endpoint, EndpointError};
use crate::data::{Score, TextRow, TextRows};
use crate::driver::Measured;
use crate::objective::{Objective, Tally};

/// A model behind an API with the rows that it is asked about.
#[derive(Debug)]
pub struct EndpointJudge {
    endpoint: Endpoint,
    objective: Objective,
    train: TextRows,
    eval: Option<TextRows>,
}

impl EndpointJudge {
    /// A judge; nothing is asked yet.
    ///
    /// # Errors
    /// An objective that rows of these answers do not have.
    pub fn new(endpoint: Endpoint, objective: Objective, train: TextRows, eval: Option<TextRows>) -> Result<Self> {
        let unfit = |message: &str| Err(Error::config("train.objective", format!("is \"{objective}\", {message}")));
        let choices = train.rows.iter().all(|row| row.answers.len() > 1);
        match objective {
            Objective::TFew(_) | Objective::Preference(_) => {
                unfit("which needs the likelihood of single tokens; use loss, accuracy or f1 at an endpoint")
            }
            Objective::Pearson | Objective::Spearman => unfit("which is a score of a regression"),
            Objective::Accuracy | Objective::F1 | Objective::Mcc if !choices => {
                unfit("which compares answers: name them in data.choices, data.label_words or a column `choices`")
            }
            Objective::F1 | Objective::Mcc if train.classes.is_none() => {
                unfit("and the rows do not all have the same answers")
            }
            _ => Ok(Self { endpoint, objective, train, eval }),
        }
    }

    fn tally<'r>(
        &self,
        prompt: &str,
        rows: impl Iterator<Item = &'r TextRow>,
        classes: Option<usize>,
    ) -> Result<Tally> {
        let rows: Vec<&TextRow> = rows.collect();
        let question =
            |row: &&TextRow| Question { prompt: format!("{prompt}{}", row.prompt), answers: row.answers.clone() };
        let scores = self.endpoint.scores(&rows.iter().map(question).collect::<Vec<_>>());
        let mut tally = Tally::new(classes);
        for (row, scores) in rows.iter().zip(scores.map_err(message)?) {
            let own = scores.get(row.right).copied().unwrap_or_default();
            let likeliest = likeliest(&scores);
            let pair: &[(u32, u32)] = if scores.len() > 1 { &[(row.right as u32, likeliest)] } else { &[] };
            tally.add(Measured { nll: own.nll, counted: own.tokens, hits: 0 }, pair);
        }
        Ok(tally)
    }
}

fn likeliest(scores: &[Score]) -> u32 {
    scores.iter().enumerate().min_by(|a, b| a.1.nll.total_cmp(&b.1.nll)).map_or(0, |(i, _)| i as u32)
}

fn message(e: EndpointError) -> Error {
    Error::msg(e.to_string())
}

impl Judge for EndpointJudge {
    fn judge(&mut self, prompts: &[String], rows: &[Vec<usize>]) -> Result<Vec<(Measured, f64)>> {
        let judged = prompts.iter().map(|prompt| {
            let rows = rows.iter().flatten().filter_map(|&row| self.train.rows.get(row));
            let tally = self.tally(prompt, rows, self.train.classes)?;
            let value = match self.objective {
                Objective::Loss | Objective::TFew(_) | Objective::Preference(_) => tally.loss(),
                score => -score.score().and_then(|name| tally.get(name)).unwrap_or_default(),
            };
            Ok((tally.measured, value))
        });
        judged.collect()
    }

    fn evaluate(&mut self, prompt: &str) -> Result<Option<Readings>> {
        let Some(eval) = &self.eval else { return Ok(None) };
        let tally = self.tally(prompt, eval.rows.iter(), eval.classes)?;
        let mut metrics = BTreeMap::new();
        if eval.rows.iter().any(|row| row.answers.len() > 1) {
            metrics.insert("accuracy".to_owned(), tally.accuracy());
        }
        if eval.classes.is_some() {
            metrics.insert("f1".to_owned(), tally.f1());
        }
        Ok(Some(Readings { measured: tally.measured, metrics }))
    }

    fn tokens(&self, _: &[Vec<usize>]) -> u64 {
        0
    }

    fn write(&self, _: &str, _: &Path) -> Result<()> {
        Ok(())
    }
}
