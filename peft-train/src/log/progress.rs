//! Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::facts::{count, number, significant};
use super::metrics::{EvalRow, StepRow};

/// Steps that the speed and the time left are measured over.
const WINDOW: usize = 32;
/// Share of the old value in the running loss.
const LOSS_KEEP: f64 = 0.9;
/// How often a plain line is written unless the caller says otherwise.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// Shows how far a run is. Dropping it clears nothing; call [`finish`](Self::finish) at the end.
#[derive(Debug)]
pub struct Progress {
    meter: Meter,
    sink: Sink,
}

enum Sink {
    Off,
    Bar(ProgressBar),
    Plain { out: Box<dyn Write + Send>, every: Duration, last: Option<Duration> },
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Off => "Off",
            Self::Bar(_) => "Bar",
            Self::Plain { .. } => "Plain",
        })
    }
}

impl Progress {
    /// On stderr: a bar if it is a terminal, plain lines otherwise. `start_step` steps were done before (resume).
    pub fn stderr(start_step: u64, total_steps: u64) -> Self {
        if !io::stderr().is_terminal() {
            return Self::plain(start_step, total_steps, PLAIN_EVERY, Box::new(io::stderr()));
        }
        let bar = ProgressBar::with_draw_target(Some(total_steps), ProgressDrawTarget::stderr_with_hz(10));
        if let Ok(style) = ProgressStyle::with_template("{bar:24.cyan/dim} {pos}/{len} {wide_msg}") {
            bar.set_style(style.progress_chars("━━─"));
        }
        bar.set_position(start_step);
        Self { meter: Meter::new(start_step, total_steps), sink: Sink::Bar(bar) }
    }

    /// Plain lines to `out`, at most one every `every`.
    pub fn plain(start_step: u64, total_steps: u64, every: Duration, out: Box<dyn Write + Send>) -> Self {
        Self { meter: Meter::new(start_step, total_steps), sink: Sink::Plain { out, every, last: None } }
    }

    /// Shows nothing; for quiet runs and tests.
    pub fn off() -> Self {
        Self { meter: Meter::new(0, 0), sink: Sink::Off }
    }

    /// Shows an optimiser step.
    pub fn step(&mut self, row: &StepRow) {
        let now = self.meter.started.elapsed();
        self.meter.step(now, row);
        let text = self.meter.text(now, row.learning_rate);
        let done = row.step >= self.meter.total;
        match &mut self.sink {
            Sink::Off => {}
            Sink::Bar(bar) => {
                bar.set_position(row.step);
                bar.set_message(text);
            }
            Sink::Plain { out, every, last } => {
                if done || last.is_none_or(|l| now.saturating_sub(l) >= *every) {
                    *last = Some(now);
                    let _ = writeln!(out, "step {}/{}  {text}", row.step, self.meter.total);
                }
            }
        }
    }

    /// Shows an evaluation on its own line.
    pub fn eval(&mut self, row: &EvalRow, is_best: bool) {
        let values: Vec<String> = row.values().map(|(k, v)| format!("{k} {}", number(v))).collect();
        let best = if is_best { "  (best)" } else { "" };
        self.message(&format!("step {}  {}{best}", row.step, values.join("  ")));
    }

    /// Writes a line above the bar.
    pub fn message(&mut self, text: &str) {
        match &mut self.sink {
            Sink::Off => {}
            Sink::Bar(bar) => bar.println(text),
            Sink::Plain { out, .. } => {
                let _ = writeln!(out, "{text}");
            }
        }
    }

    /// Runs `f` with the bar out of the way, for output that others write.
    pub fn suspend<T>(&mut self, f: impl FnOnce() -> T) -> T {
        match &self.sink {
            Sink::Bar(bar) => bar.suspend(f),
            _ => f(),
        }
    }

    /// Ends the bar where it stands and writes a last line, if there is one.
    pub fn finish(&mut self, text: &str) {
        if let Sink::Bar(bar) = &self.sink {
            bar.abandon();
        }
        if !text.is_empty() {
            match &mut self.sink {
                Sink::Off => {}
                Sink::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
                Sink::Plain { out, .. } => {
                    let _ = writeln!(out, "{text}");
                }
            }
        }
        if let Sink::Plain { out, .. } = &mut self.sink {
            let _ = out.flush();
        }
    }

    /// Running loss: an unbiased moving average over about the last ten steps.
    pub fn running_loss(&self) -> Option<f64> {
        self.meter.loss()
    }
}

/// The numbers behind the display.
#[derive(Debug)]
struct Meter {
    started: Instant,
    total: u64,
    loss_sum: f64,
    loss_weight: f64,
    /// Time since the start, step and tokens so far at the end of the last steps; the first entry is the start.
    recent: VecDeque<(Duration, u64, u64)>,
    tokens: u64,
}

impl Meter {
    fn new(start_step: u64, total: u64) -> Self {
        let recent = VecDeque::from([(Duration::ZERO, start_step, 0)]);
        Self { started: Instant::now(), total, loss_sum: 0.0, loss_weight: 0.0, recent, tokens: 0 }
    }

    fn step(&mut self, now: Duration, row: &StepRow) {
        if row.loss.is_finite() {
            self.loss_sum = self.loss_sum * LOSS_KEEP + row.loss;
            self.loss_weight = self.loss_weight * LOSS_KEEP + 1.0;
        }
        self.tokens = self.tokens.saturating_add(row.tokens);
        self.recent.push_back((now, row.step, self.tokens));
        while self.recent.len() > WINDOW + 1 {
            self.recent.pop_front();
        }
    }

    fn loss(&self) -> Option<f64> {
        (self.loss_weight > 0.0).then(|| self.loss_sum / self.loss_weight)
    }

    /// Tokens a second and seconds a step over the last steps.
    fn speed(&self) -> Option<(f64, f64)> {
        let (first, last) = (self.recent.front()?, self.recent.back()?);
        let seconds = last.0.saturating_sub(first.0).as_secs_f64();
        let steps = last.1.checked_sub(first.1).filter(|n| *n > 0)? as f64;
        (seconds > 0.0).then(|| (last.2.saturating_sub(first.2) as f64 / seconds, seconds / steps))
    }

    fn text(&self, now: Duration, lr: f64) -> String {
        let loss = self.loss().map_or_else(|| "—".to_owned(), number);
        let mut text = format!("loss {loss}  lr {}", significant(lr, 3));
        if let Some((tokens, step)) = self.speed() {
            let at = self.recent.back().map_or(0, |r| r.1);
            let left = step * self.total.saturating_sub(at) as f64;
            text += &format!(
                "  {} tok/s  {}  left {}",
                count(tokens.round() as u64),
                clock(now.as_secs_f64()),
                clock(left)
            );
        } else {
            text += &format!("  {}", clock(now.as_secs_f64()));
        }
        text
    }
}

/// `0:05`, `12:34`, `1:02:03`, `3d 4:05:06`.
fn clock(seconds: f64) -> String {
    // Saturates for huge values, 0 for NaN.
    let s = seconds.round() as u64;
    let (d, h, m, s) = (s / 86_400, s / 3600 % 24, s / 60 % 60, s % 60);
    match (d, h) {
        (0, 0) => format!("{m}:{s:02}"),
        (0, h) => format!("{h}:{m:02}:{s:02}"),
        (d, h) => format!("{d}d {h}:{m:02}:{s:02}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, b: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(b)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn row(step: u64, loss: f64) -> StepRow {
        StepRow {
            step,
            loss,
            objective: None,
            learning_rate: 2e-4,
            grad_norm: 1.0,
            tokens: 1000,
            seconds: 2.0,
            epoch: None,
            metrics: Default::default(),
        }
    }

    #[test]
    fn speed_and_time_left_count_only_this_process() {
        let mut m = Meter::new(100, 200);
        for i in 1..=50 {
            m.step(Duration::from_secs(2 * i), &row(100 + i, 1.5));
        }
        assert_eq!(m.speed(), Some((500.0, 2.0)));
        assert_eq!(m.recent.len(), WINDOW + 1);
        assert_eq!(m.text(Duration::from_secs(100), 2e-4), "loss 1.5  lr 2e-4  500 tok/s  1:40  left 1:40");
    }

    #[test]
    fn running_loss_skips_what_is_not_finite() {
        let mut m = Meter::new(0, 10);
        assert_eq!(m.loss(), None);
        m.step(Duration::ZERO, &row(1, f64::NAN));
        assert_eq!(m.loss(), None);
        assert!(m.text(Duration::ZERO, 0.0).contains("loss —"));
        m.step(Duration::ZERO, &row(2, 2.0));
        assert_eq!(m.loss(), Some(2.0));
        assert_eq!(m.speed(), None);
    }

    #[test]
    fn plain_lines_are_rare_and_the_last_step_is_always_shown() {
        let out = Shared::default();
        let mut p = Progress::plain(0, 50, Duration::from_secs(3600), Box::new(out.clone()));
        for s in 1..=50 {
            p.step(&row(s, 2.0));
        }
        p.eval(&EvalRow { step: 50, eval_loss: 1.25, metrics: [("eval_accuracy".to_owned(), 0.5)].into() }, true);
        p.message("saved");
        p.finish("done");
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert!(lines[0].starts_with("step 1/50  loss 2") && lines[1].starts_with("step 50/50"));
        assert_eq!(lines[2..], ["step 50  eval_loss 1.25  eval_accuracy 0.5  (best)", "saved", "done"]);
        Progress::off().step(&row(1, 1.0));
        assert_eq!(Progress::off().suspend(|| 3), 3);
    }

    #[test]
    fn clocks() {
        let got = [0.4, 65.0, 3723.0, 90_061.0, f64::NAN, -5.0].map(clock);
        assert_eq!(got, ["0:00", "1:05", "1:02:03", "1d 1:01:01", "0:00", "0:00"]);
        clock(f64::INFINITY);
    }
}
