//! `report.html`: one self-contained page about a run, readable without a network. It holds no script, and its
//! content policy forbids any, so nothing in a recipe or a generated sample can act in the reader's browser.

use std::path::Path;

use super::charts::{Curve, Look, chart, smooth};
use super::facts::{RunFacts, Sample, count, duration, number};
use super::metrics::{EvalRow, StepRow};
use peft_core::atomic::write_file;

use super::Result;

const STYLE: &str = include_str!("report.css");
/// Rows of the evaluation table; more are thinned evenly, the best and the last always shown.
const MAX_EVALS: usize = 60;

/// All that the page shows.
#[derive(Debug, Clone, Copy)]
pub struct Report<'a> {
    /// Heading, usually the output folder's name.
    pub title: &'a str,
    /// The run's facts.
    pub facts: &'a RunFacts,
    /// The recipe as resolved (TOML).
    pub recipe: &'a str,
    /// Training rows ([`read_metrics`](super::read_metrics) gives them).
    pub steps: &'a [StepRow],
    /// Evaluation rows.
    pub evals: &'a [EvalRow],
    /// Generations before and after training.
    pub samples: &'a [Sample],
    /// Commands to run next.
    pub next: &'a [String],
}

impl Report<'_> {
    /// Writes the page, atomically.
    ///
    /// # Errors
    /// A chart cannot be drawn or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let html = self.to_html()?;
        Ok(write_file(path, html.as_bytes())?)
    }

    /// The page.
    ///
    /// # Errors
    /// A chart cannot be drawn.
    pub fn to_html(&self) -> Result<String> {
        let mut h = String::with_capacity(1 << 16);
        let title = escape(self.title);
        h += "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n";
        h += "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n";
        h +=
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n";
        h += &format!("<title>{title} · training report</title>\n<style>\n{STYLE}</style></head><body><main>\n");
        h += &format!("<h1>{title}</h1>\n<p class=\"sub\">{}</p>\n", escape(&self.subtitle()));
        if let Some(ended) = &self.facts.ended {
            h += &format!("<p class=\"note\">{}</p>\n", escape(ended));
        }
        self.tiles(&mut h);
        self.charts(&mut h)?;
        self.samples(&mut h);
        self.eval_table(&mut h);
        h += "<h2>Run</h2>\n<div class=\"card scroll\"><table>\n";
        for (k, v) in self.facts.rows() {
            h += &format!("<tr><th>{}</th><td>{}</td></tr>\n", escape(k), escape(&v));
        }
        h += "</table></div>\n";
        if !self.next.is_empty() {
            h += &format!("<h2>Next</h2>\n<pre>{}</pre>\n", escape(&self.next.join("\n")));
        }
        if !self.recipe.trim().is_empty() {
            h += &format!("<h2>Recipe, as resolved</h2>\n<pre>{}</pre>\n", escape(self.recipe.trim_end()));
        }
        h += &format!("<footer>Written by peft-train {}.</footer>\n", env!("CARGO_PKG_VERSION"));
        h += "</main></body></html>\n";
        Ok(h)
    }

    fn subtitle(&self) -> String {
        let f = self.facts;
        let base = if f.base_model.is_empty() { String::new() } else { format!("on {}", f.base_model) };
        let steps = format!("{} steps", count(f.steps));
        let parts = [format!("{} {base}", f.method), steps, f.device.clone(), f.dtype.clone()];
        parts.iter().map(|s| s.trim()).filter(|s| !s.is_empty()).collect::<Vec<_>>().join(" · ")
    }

    fn tiles(&self, h: &mut String) {
        let f = self.facts;
        let mut tiles: Vec<(String, String)> = Vec::new();
        if let (Some(first), Some(loss)) = (self.steps.first(), f.final_loss) {
            tiles.push((number(loss), format!("final loss, from {}", number(first.loss))));
        }
        if let Some(b) = f.best {
            let metric = f.best_metric.as_deref().unwrap_or("eval_loss");
            tiles.push((number(b.value), format!("best {metric}, step {}", count(b.step))));
        }
        tiles.push((compact(f.trainable_parameters), "trainable parameters".into()));
        tiles.push((duration(f.seconds), "training time".into()));
        if let Some(v) = f.tokens_per_second() {
            tiles.push((count(v.round() as u64), "tokens per second".into()));
        }
        if let Some(m) = f.peak_memory {
            tiles.push((super::facts::bytes(m), "peak memory".into()));
        }
        *h += "<div class=\"tiles\">\n";
        for (value, label) in tiles {
            *h += &format!("<div class=\"card tile\"><b>{}</b><span>{}</span></div>\n", escape(&value), escape(&label));
        }
        *h += "</div>\n";
    }

    fn charts(&self, h: &mut String) -> Result<()> {
        let of = |f: fn(&StepRow) -> f64| self.steps.iter().map(|r| (r.step as f64, f(r))).collect::<Vec<_>>();
        let eval_loss: Vec<_> = self.evals.iter().map(|r| (r.step as f64, r.eval_loss)).collect();
        let mut loss = with_smoothed(of(|r| r.loss));
        if !eval_loss.is_empty() {
            loss.push(("eval_loss", Curve { look: Look::Mark, points: eval_loss }));
        }
        let speed = of(|r| r.tokens_per_second().unwrap_or(f64::NAN));
        let rate = vec![("", Curve { look: Look::Line, points: of(|r| r.learning_rate) })];
        let cards = [
            ("Loss", loss),
            ("Learning rate", rate),
            ("Gradient norm, before clipping", with_smoothed(of(|r| r.grad_norm))),
            ("Tokens per second", with_smoothed(speed)),
        ];
        *h += "<div class=\"charts\">\n";
        for (title, curves) in cards {
            *h += &format!("<section class=\"card\"><h3>{title}");
            for (name, c) in curves.iter().filter(|(n, _)| !n.is_empty() && curves.len() > 1) {
                let variable = match c.look {
                    Look::Line => "line",
                    Look::Soft => "line-soft",
                    Look::Mark => "mark",
                };
                *h += &format!("<span class=\"key\"><i style=\"background:var(--{variable})\"></i>{name}</span>");
            }
            *h += "</h3>\n";
            let curves: Vec<Curve> = curves.into_iter().map(|(_, c)| c).collect();
            match chart(title, &format!("{title} over optimiser steps"), &curves)? {
                Some(svg) => *h += &svg,
                None => *h += "<p class=\"none\">no values</p>",
            }
            *h += "</section>\n";
        }
        *h += "</div>\n";
        Ok(())
    }

    fn samples(&self, h: &mut String) {
        if self.samples.is_empty() {
            return;
        }
        *h += "<h2>Before and after</h2>\n";
        for s in self.samples {
            *h += &format!(
                "<div class=\"card sample\"><p>Prompt</p><pre>{}</pre><div class=\"two\"><div><p>Base model</p><pre>{}\
                 </pre></div><div class=\"after\"><p>With the adapter</p><pre>{}</pre></div></div></div>\n",
                escape(&s.prompt),
                escape(&s.before),
                escape(&s.after)
            );
        }
    }

    fn eval_table(&self, h: &mut String) {
        if self.evals.is_empty() {
            return;
        }
        let mut keys: Vec<&str> = Vec::new();
        for (k, _) in self.evals.iter().flat_map(EvalRow::values) {
            if !keys.contains(&k) {
                keys.push(k);
            }
        }
        let best = self.facts.best.map(|b| b.step);
        let every = self.evals.len().div_ceil(MAX_EVALS);
        *h += "<h2>Evaluations</h2>\n<div class=\"card scroll\"><table>\n<tr><th>Step</th>";
        for k in &keys {
            *h += &format!("<th>{}</th>", escape(k));
        }
        *h += "</tr>\n";
        for (i, row) in self.evals.iter().enumerate() {
            let is_best = best == Some(row.step);
            if i % every != 0 && i + 1 != self.evals.len() && !is_best {
                continue;
            }
            let class = if is_best { " class=\"best\"" } else { "" };
            let mark = if is_best { " · best" } else { "" };
            *h += &format!("<tr><td{class}>{}{mark}</td>", count(row.step));
            for k in &keys {
                let value = row.values().find(|(n, _)| n == k).map(|(_, v)| number(v)).unwrap_or_default();
                *h += &format!("<td{class}>{}</td>", escape(&value));
            }
            *h += "</tr>\n";
        }
        *h += "</table></div>\n";
    }
}

/// Raw values behind their running mean, or the values alone where there are few.
fn with_smoothed(points: Vec<(f64, f64)>) -> Vec<(&'static str, Curve)> {
    if points.len() < 12 {
        return vec![("each step", Curve { look: Look::Line, points })];
    }
    let smoothed = smooth(&points, (points.len() / 20).clamp(5, 100));
    vec![("each step", Curve { look: Look::Soft, points }), ("smoothed", Curve { look: Look::Line, points: smoothed })]
}

/// `4.88 M` and the like.
fn compact(n: u64) -> String {
    let v = n as f64;
    let (v, unit) = match n {
        0..10_000 => return count(n),
        10_000..1_000_000 => (v / 1e3, " K"),
        1_000_000..1_000_000_000 => (v / 1e6, " M"),
        _ => (v / 1e9, " B"),
    };
    format!("{}{unit}", super::facts::significant(v, 3))
}

/// Text for element content and quoted attributes. Control characters that HTML does not allow become `�`.
pub(super) fn escape(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
