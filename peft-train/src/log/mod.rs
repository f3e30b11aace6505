//! What a run writes down: `metrics.jsonl`, TensorBoard events, a progress bar, `report.html` and the model card.

pub mod card;
mod charts;
pub mod facts;
pub mod metrics;
pub mod progress;
pub mod report;
pub mod tensorboard;

pub use card::ModelCard;
pub use facts::{RunFacts, Sample};
pub use metrics::{EvalRow, Metrics, MetricsWriter, StepRow, read_metrics};
pub use progress::Progress;
pub use report::Report;
pub use tensorboard::EventWriter;

use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong while logging.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A whole file could not be written.
    #[error(transparent)]
    Write(#[from] peft_core::Error),
    /// A chart could not be drawn.
    #[error("chart `{name}`: {why}")]
    Chart {
        /// Name of the chart.
        name: String,
        /// What plotters said.
        why: String,
    },
}

/// Result of a logging call.
pub type Result<T, E = LogError> = std::result::Result<T, E>;

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> LogError {
    let path = path.to_owned();
    |source| LogError::Io { path, source }
}

/// The metrics file and the TensorBoard events of one run, kept in step.
#[derive(Debug)]
pub struct RunLogger {
    metrics: MetricsWriter,
    events: EventWriter,
}

impl RunLogger {
    /// Name of the metrics file in the output folder.
    pub const METRICS: &str = "metrics.jsonl";
    /// Folder of the TensorBoard events in the output folder.
    pub const EVENTS: &str = "runs";

    /// Starts the logs of a fresh run in `output`; an older run's metrics are replaced.
    ///
    /// # Errors
    /// The files cannot be created.
    pub fn create(output: &Path) -> Result<Self> {
        Ok(Self {
            metrics: MetricsWriter::create(&output.join(Self::METRICS))?,
            events: EventWriter::create(&output.join(Self::EVENTS), None)?,
        })
    }

    /// Goes on after optimiser step `step`: rows after it are cut off, and TensorBoard is told to forget them.
    ///
    /// # Errors
    /// The files cannot be read or written.
    pub fn resume(output: &Path, step: u64) -> Result<Self> {
        Ok(Self {
            metrics: MetricsWriter::resume(&output.join(Self::METRICS), step)?,
            events: EventWriter::create(&output.join(Self::EVENTS), Some(step))?,
        })
    }

    /// Logs an optimiser step; on disk when this returns.
    ///
    /// # Errors
    /// A write failed.
    pub fn step(&mut self, row: &StepRow) -> Result<()> {
        self.metrics.write_step(row)?;
        let mut scalars = vec![
            ("train/loss", row.loss),
            ("train/learning_rate", row.learning_rate),
            ("train/grad_norm", row.grad_norm),
        ];
        scalars.extend(row.objective.map(|v| ("train/objective", v)));
        scalars.extend(row.tokens_per_second().map(|v| ("train/tokens_per_second", v)));
        scalars.extend(row.epoch.map(|v| ("train/epoch", v)));
        let named: Vec<(String, f64)> = row.metrics.iter().map(|(k, v)| (format!("train/{k}"), *v)).collect();
        scalars.extend(named.iter().map(|(k, v)| (k.as_str(), *v)));
        self.events.scalars(row.step, &scalars)
    }

    /// Logs an evaluation; on disk when this returns.
    ///
    /// # Errors
    /// A write failed.
    pub fn eval(&mut self, row: &EvalRow) -> Result<()> {
        self.metrics.write_eval(row)?;
        let named: Vec<(String, f64)> =
            row.values().map(|(k, v)| (format!("eval/{}", k.strip_prefix("eval_").unwrap_or(k)), v)).collect();
        let scalars: Vec<(&str, f64)> = named.iter().map(|(k, v)| (k.as_str(), *v)).collect();
        self.events.scalars(row.step, &scalars)
    }

    /// Shows text (the resolved recipe, a sample) in TensorBoard; `text` is Markdown.
    ///
    /// # Errors
    /// The write failed.
    pub fn text(&mut self, tag: &str, step: u64, text: &str) -> Result<()> {
        self.events.text(tag, step, text)
    }

    /// Makes what was written survive a power cut; for use beside a checkpoint.
    ///
    /// # Errors
    /// The system refused.
    pub fn sync(&mut self) -> Result<()> {
        self.metrics.sync()?;
        self.events.sync()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::fs;

    use super::*;

    fn row(step: u64) -> StepRow {
        StepRow {
            step,
            loss: 3.0 / step as f64,
            objective: None,
            learning_rate: 1e-4,
            grad_norm: 1.0,
            tokens: 64,
            seconds: 0.5,
            epoch: Some(0.1),
            metrics: Default::default(),
        }
    }

    /// Interrupted after step 5, resumed from step 3; `PEFT_EVENTS_OUT=folder` keeps the output for TensorBoard itself.
    #[test]
    fn metrics_and_events_go_together() {
        let dir = tempfile::tempdir().unwrap();
        let out = std::env::var_os("PEFT_EVENTS_OUT").map_or_else(|| dir.path().to_owned(), PathBuf::from);
        fs::create_dir_all(&out).unwrap();
        let mut log = RunLogger::create(&out).unwrap();
        log.text("recipe", 0, "```toml\nr = 16\n```").unwrap();
        for s in 1..=5 {
            log.step(&row(s)).unwrap();
        }
        let mut log = RunLogger::resume(&out, 3).unwrap();
        for s in 4..=6 {
            log.step(&StepRow { loss: 9.0, ..row(s) }).unwrap();
        }
        let metrics = [("eval_accuracy".to_owned(), 0.5)].into();
        log.eval(&EvalRow { step: 6, eval_loss: 1.5, metrics }).unwrap();
        log.sync().unwrap();
        let m = read_metrics(&out.join(RunLogger::METRICS)).unwrap();
        assert_eq!(
            m.steps.iter().map(|r| (r.step, r.loss)).collect::<Vec<_>>(),
            [(1, 3.0), (2, 1.5), (3, 1.0), (4, 9.0), (5, 9.0), (6, 9.0)]
        );
        assert_eq!(m.evals.len(), 1);
        assert_eq!(fs::read_dir(out.join(RunLogger::EVENTS)).unwrap().count(), 2);
    }
}
