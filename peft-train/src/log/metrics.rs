//! `metrics.jsonl`: one JSON object a line, one line an optimiser step or evaluation.
//!
//! JSON has no NaN or infinity; such values are written as `null` and read back as NaN.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use peft_core::atomic::write_file_with;

use super::{Result, io_error};

/// A line longer than this is not ours.
const MAX_LINE: u64 = 1 << 16;

/// One optimiser step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepRow {
    /// Number of updates done, this one included (the first row is step 1).
    pub step: u64,
    /// Mean loss over the step's counted tokens.
    pub loss: f64,
    /// What the step lowered, where that is not the loss.
    pub objective: Option<f64>,
    /// Scheduled learning rate of this update.
    pub learning_rate: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Input tokens of the step, over all its micro-batches.
    pub tokens: u64,
    /// Wall time of the step in seconds.
    pub seconds: f64,
    /// Passes over the data so far, if known.
    pub epoch: Option<f64>,
    /// Further values, by name: rewards of preference objectives.
    pub metrics: BTreeMap<String, f64>,
}

impl StepRow {
    /// The columns that every row may have.
    const COLUMNS: [&str; 8] =
        ["step", "loss", "objective", "learning_rate", "grad_norm", "tokens", "seconds", "epoch"];

    /// Input tokens a second, if the step took measurable time.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let v = self.tokens as f64 / self.seconds;
        (v.is_finite() && self.seconds > 0.0).then_some(v)
    }

    fn to_map(&self) -> Map<String, Value> {
        let mut m = Map::new();
        m.insert("step".into(), self.step.into());
        m.insert("loss".into(), self.loss.into());
        if let Some(objective) = self.objective {
            m.insert("objective".into(), objective.into());
        }
        m.insert("learning_rate".into(), self.learning_rate.into());
        m.insert("grad_norm".into(), self.grad_norm.into());
        m.insert("tokens".into(), self.tokens.into());
        m.insert("seconds".into(), self.seconds.into());
        if let Some(epoch) = self.epoch {
            m.insert("epoch".into(), epoch.into());
        }
        m.extend(self.metrics.iter().map(|(k, v)| (k.clone(), (*v).into())));
        m
    }

    fn from_map(step: u64, m: &Map<String, Value>) -> Self {
        let get = |k: &str| m.get(k).and_then(Value::as_f64).unwrap_or(f64::NAN);
        Self {
            step,
            loss: get("loss"),
            objective: m.get("objective").and_then(Value::as_f64),
            learning_rate: get("learning_rate"),
            grad_norm: get("grad_norm"),
            tokens: m.get("tokens").and_then(Value::as_u64).unwrap_or(0),
            seconds: get("seconds"),
            epoch: m.get("epoch").and_then(Value::as_f64),
            metrics: m
                .iter()
                .filter(|(k, _)| !Self::COLUMNS.contains(&k.as_str()))
                .map(|(k, v)| (k.clone(), v.as_f64().unwrap_or(f64::NAN)))
                .collect(),
        }
    }
}

/// One evaluation.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalRow {
    /// Number of updates done before it.
    pub step: u64,
    /// Mean loss over the evaluation set's counted tokens.
    pub eval_loss: f64,
    /// Further metrics; a key without the prefix `eval_` is written with it.
    pub metrics: BTreeMap<String, f64>,
}

impl EvalRow {
    /// `eval_loss` and all further metrics, as they are named in the file's row.
    pub fn values(&self) -> impl Iterator<Item = (&str, f64)> {
        let more = self.metrics.iter().map(|(k, v)| (k.as_str(), *v));
        std::iter::once(("eval_loss", self.eval_loss)).chain(more)
    }

    /// The metric of that name, with or without its `eval_`.
    pub fn get(&self, name: &str) -> Option<f64> {
        fn bare(k: &str) -> &str {
            k.strip_prefix("eval_").unwrap_or(k)
        }
        self.values().find(|(k, _)| bare(k) == bare(name)).map(|(_, v)| v)
    }

    fn to_map(&self) -> Map<String, Value> {
        let mut m = Map::new();
        m.insert("step".into(), self.step.into());
        for (k, v) in self.values() {
            let key = if k.starts_with("eval_") { k.to_owned() } else { format!("eval_{k}") };
            m.insert(key, v.into());
        }
        m
    }

    fn from_map(step: u64, m: &Map<String, Value>) -> Self {
        let get = |v: &Value| v.as_f64().unwrap_or(f64::NAN);
        let metrics = m.iter().filter(|(k, _)| k.starts_with("eval_") && *k != "eval_loss");
        Self {
            step,
            eval_loss: m.get("eval_loss").map_or(f64::NAN, get),
            metrics: metrics.map(|(k, v)| (k.clone(), get(v))).collect(),
        }
    }
}

/// Appends rows to `metrics.jsonl`. Each row is handed to the system whole before the call returns.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
    len: u64,
}

impl MetricsWriter {
    /// Starts an empty file.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(io_error(path))?;
        Ok(Self { path: path.to_owned(), file, len: 0 })
    }

    /// Opens the file of an interrupted run that goes on after optimiser step `step`: rows of later steps, a torn
    /// last line and lines that are no rows are removed (atomically); the rest stays byte for byte. A missing file
    /// starts empty.
    ///
    /// # Errors
    /// The file cannot be read or rewritten.
    pub fn resume(path: &Path, step: u64) -> Result<Self> {
        let old = match File::open(path) {
            Ok(f) => f,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Self::create(path),
            Err(e) => return Err(io_error(path)(e)),
        };
        write_file_with(path, |new| {
            let mut result = Ok(());
            for_each_line(BufReader::new(old), |line| {
                let keep = parse(line).is_some_and(|(s, _)| s <= step);
                if keep && result.is_ok() {
                    result = new.write_all(line).and_then(|()| new.write_all(b"\n"));
                }
            })?;
            result
        })?;
        let mut file = OpenOptions::new().write(true).open(path).map_err(io_error(path))?;
        let len = file.seek(SeekFrom::End(0)).map_err(io_error(path))?;
        Ok(Self { path: path.to_owned(), file, len })
    }

    /// Appends a training row.
    ///
    /// # Errors
    /// The write failed (disk full, say); the file then ends with the last whole row.
    pub fn write_step(&mut self, row: &StepRow) -> Result<()> {
        self.write(row.to_map())
    }

    /// Appends an evaluation row.
    ///
    /// # Errors
    /// As [`write_step`](Self::write_step).
    pub fn write_eval(&mut self, row: &EvalRow) -> Result<()> {
        self.write(row.to_map())
    }

    /// Makes the rows survive a power cut.
    ///
    /// # Errors
    /// The system refused.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(io_error(&self.path))
    }

    fn write(&mut self, row: Map<String, Value>) -> Result<()> {
        let mut line = Value::Object(row).to_string();
        line.push('\n');
        match self.file.write_all(line.as_bytes()) {
            Ok(()) => {
                self.len += line.len() as u64;
                Ok(())
            }
            Err(e) => {
                let _ = self.file.set_len(self.len);
                let _ = self.file.seek(SeekFrom::Start(self.len));
                Err(io_error(&self.path)(e))
            }
        }
    }
}

/// The rows of a metrics file.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Metrics {
    /// Training rows in the file's order.
    pub steps: Vec<StepRow>,
    /// Evaluation rows in the file's order.
    pub evals: Vec<EvalRow>,
    /// Lines that are neither (a torn last line, for one).
    pub skipped: usize,
}

/// Reads a metrics file; lines that are no rows are counted, not refused.
///
/// # Errors
/// The file cannot be read.
pub fn read_metrics(path: &Path) -> Result<Metrics> {
    let file = File::open(path).map_err(io_error(path))?;
    let mut out = Metrics::default();
    for_each_line(BufReader::new(file), |line| match parse(line) {
        Some((step, m)) if m.contains_key("loss") => out.steps.push(StepRow::from_map(step, &m)),
        Some((step, m)) if m.contains_key("eval_loss") => out.evals.push(EvalRow::from_map(step, &m)),
        _ => out.skipped += 1,
    })
    .map_err(io_error(path))?;
    Ok(out)
}

fn parse(line: &[u8]) -> Option<(u64, Map<String, Value>)> {
    let Ok(Value::Object(m)) = serde_json::from_slice(line) else {
        return None;
    };
    Some((m.get("step")?.as_u64()?, m))
}

/// Calls `f` with every line without its newline. A last line without a newline is torn, and a line that is too long
/// is not ours: both are passed as empty.
fn for_each_line(mut r: impl BufRead, mut f: impl FnMut(&[u8])) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        let n = (&mut r).take(MAX_LINE).read_until(b'\n', &mut line)?;
        if n == 0 {
            return Ok(());
        }
        if line.last() == Some(&b'\n') {
            line.pop();
            f(&line);
            continue;
        }
        // Torn, or too long: skip to the next newline without keeping anything.
        while line.last() != Some(&b'\n') {
            line.clear();
            if (&mut r).take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
                break;
            }
        }
        f(&[]);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    fn row(step: u64) -> StepRow {
        StepRow {
            step,
            loss: 1.0 / step as f64,
            objective: None,
            learning_rate: 2e-4,
            grad_norm: 0.5,
            tokens: 1024,
            seconds: 0.25,
            epoch: None,
            metrics: BTreeMap::new(),
        }
    }

    fn eval(step: u64) -> EvalRow {
        EvalRow { step, eval_loss: 2.0, metrics: BTreeMap::from([("eval_accuracy".to_owned(), 0.5)]) }
    }

    #[test]
    fn rows_have_the_contract_keys() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut w = MetricsWriter::create(&path).unwrap();
        w.write_step(&row(1)).unwrap();
        let extra = BTreeMap::from([("accuracy".to_owned(), 0.5)]);
        w.write_eval(&EvalRow { step: 1, eval_loss: 2.0, metrics: extra }).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "{\"step\":1,\"loss\":1.0,\"learning_rate\":0.0002,\"grad_norm\":0.5,\"tokens\":1024,\"seconds\":0.25}\n\
             {\"step\":1,\"eval_loss\":2.0,\"eval_accuracy\":0.5}\n"
        );
        let m = read_metrics(&path).unwrap();
        assert_eq!(m, Metrics { steps: vec![row(1)], evals: vec![eval(1)], skipped: 0 });
        assert_eq!(m.evals[0].get("accuracy"), Some(0.5));
        assert_eq!(m.evals[0].get("eval_loss"), Some(2.0));
        assert_eq!(m.evals[0].get("f1"), None);
        assert_eq!(row(1).tokens_per_second(), Some(4096.0));
        let rewards =
            StepRow { metrics: BTreeMap::from([("rewards_margin".to_owned(), -0.25)]), objective: Some(0.5), ..row(2) };
        w.write_step(&rewards).unwrap();
        assert!(fs::read_to_string(&path).unwrap().ends_with(",\"rewards_margin\":-0.25}\n"));
        assert_eq!(read_metrics(&path).unwrap().steps, [row(1), rewards]);
    }

    #[test]
    fn non_finite_values_stay_valid_json() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut w = MetricsWriter::create(&path).unwrap();
        w.write_step(&StepRow { loss: f64::NAN, grad_norm: f64::INFINITY, ..row(1) }).unwrap();
        w.write_eval(&EvalRow { eval_loss: f64::NEG_INFINITY, ..eval(1) }).unwrap();
        for line in fs::read_to_string(&path).unwrap().lines() {
            serde_json::from_str::<Value>(line).unwrap();
        }
        let m = read_metrics(&path).unwrap();
        assert!(m.steps[0].loss.is_nan() && m.steps[0].grad_norm.is_nan() && m.evals[0].eval_loss.is_nan());
    }

    #[test]
    fn resume_cuts_at_the_step_and_appends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut w = MetricsWriter::create(&path).unwrap();
        for s in 1..=6 {
            w.write_step(&row(s)).unwrap();
            if s % 2 == 0 {
                w.write_eval(&eval(s)).unwrap();
            }
        }
        drop(w);
        let whole = fs::read(&path).unwrap();
        let cut_rows = fs::read_to_string(&path).unwrap().lines().take(6).map(|l| format!("{l}\n")).collect::<String>();
        // A kill may have torn the file anywhere after step 4.
        for end in cut_rows.len()..=whole.len() {
            fs::write(&path, &whole[..end]).unwrap();
            let mut w = MetricsWriter::resume(&path, 4).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), cut_rows);
            w.write_step(&row(5)).unwrap();
            let m = read_metrics(&path).unwrap();
            assert_eq!((m.steps, m.evals.len(), m.skipped), ((1..=5).map(row).collect(), 2, 0));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
        MetricsWriter::resume(&dir.path().join("none.jsonl"), 3).unwrap().write_step(&row(4)).unwrap();
    }

    #[test]
    fn foreign_lines_and_endless_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut text = String::from("\u{0}\n[1]\n{\"step\":-1}\n{\"step\":1,\"loss\":3}\n");
        text.push_str(&"x".repeat(3 * MAX_LINE as usize));
        text.push_str("\n{\"step\":2,\"loss\":2}\n");
        text.push_str(&"y".repeat(MAX_LINE as usize));
        fs::write(&path, text).unwrap();
        let m = read_metrics(&path).unwrap();
        assert_eq!((m.steps.len(), m.skipped), (2, 5));
        MetricsWriter::resume(&path, 9).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1,\"loss\":3}\n{\"step\":2,\"loss\":2}\n");
        assert!(read_metrics(&dir.path().join("missing")).unwrap_err().to_string().contains("missing"));
        assert!(MetricsWriter::create(&dir.path().join("no/such/folder")).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_bytes_can_be_resumed(bytes in prop::collection::vec(any::<u8>(), 0..400), step: u64) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("m.jsonl");
            fs::write(&path, bytes).unwrap();
            let mut w = MetricsWriter::resume(&path, step).unwrap();
            w.write_step(&row(1)).unwrap();
            let back = read_metrics(&path).unwrap();
            prop_assert_eq!(back.steps.last(), Some(&row(1)));
        }
    }
}
