//! How the cost of a step grows: `peft-bench step` over one dimension at a time, each point in a process of its own.

mod picture;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// What is measured and where pictures go.
#[derive(Debug, Clone)]
pub struct GrowthOptions {
    /// A model folder or a .gguf file.
    pub model: PathBuf,
    /// Folder of the pictures, one a sweep.
    pub out: PathBuf,
    /// Names of sweeps; empty for all.
    pub only: Vec<String>,
    /// Measurements a point.
    pub rounds: usize,
    /// Points beyond this value are left out.
    pub up_to: Option<usize>,
}

/// One dimension that moves while the others stay.
#[derive(Debug)]
struct Sweep {
    /// The option of `peft-bench step`, but for `threads`.
    name: &'static str,
    /// What the axis says.
    axis: &'static str,
    values: &'static [usize],
    /// Options that differ from the defaults of `peft-bench step` (4 × 256 tokens, rank 16).
    fixed: &'static [(&'static str, usize)],
}

const SWEEPS: &[Sweep] = &[
    Sweep {
        name: "seq",
        axis: "tokens a sequence (batch 1)",
        values: &[128, 256, 512, 1024, 2048, 4096, 8192],
        fixed: &[("batch", 1)],
    },
    Sweep {
        name: "batch",
        axis: "sequences a batch (128 tokens each)",
        values: &[1, 2, 4, 8, 16, 32],
        fixed: &[("seq", 128)],
    },
    Sweep { name: "rank", axis: "LoRA rank", values: &[1, 4, 16, 64, 256], fixed: &[] },
    Sweep { name: "layers", axis: "blocks (random weights)", values: &[4, 8, 16, 32, 64], fixed: &[] },
    Sweep {
        name: "vocab",
        axis: "tokens of the vocabulary (random weights)",
        values: &[8192, 16_384, 32_768, 65_536, 131_072, 262_144],
        fixed: &[],
    },
    Sweep { name: "threads", axis: "threads", values: &[1, 2], fixed: &[] },
];

/// The cost of a step at one value of the dimension.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Point {
    value: usize,
    tokens_per_second: f64,
    /// Peak resident memory in 10⁶ bytes.
    peak_mb: f64,
}

/// Measures, prints a table a sweep and draws its picture, `OUT/NAME.svg`.
///
/// # Errors
/// An unknown sweep, a measurement that fails, or a folder that cannot be written.
pub fn run(options: &GrowthOptions) -> Result<()> {
    ensure!(options.rounds > 0, "nothing to measure: --rounds is 0");
    let sweeps: Vec<&Sweep> =
        SWEEPS.iter().filter(|s| options.only.is_empty() || options.only.iter().any(|name| name == s.name)).collect();
    if let Some(name) = options.only.iter().find(|name| sweeps.iter().all(|s| s.name != **name)) {
        bail!("`{name}` is not a sweep; there are {}", SWEEPS.iter().map(|s| s.name).collect::<Vec<_>>().join(", "));
    }
    std::fs::create_dir_all(&options.out).with_context(|| options.out.display().to_string())?;
    for sweep in sweeps {
        println!("\n| {} | tokens/s | peak MB | MB more for each more |\n|---|---|---|---|", sweep.axis);
        let mut points: Vec<Point> = Vec::new();
        for &value in sweep.values.iter().filter(|&&v| options.up_to.is_none_or(|most| v <= most)) {
            let point = measure(options, sweep, value)?;
            println!("{}", row(points.last(), &point));
            points.push(point);
        }
        let file = options.out.join(format!("{}.svg", sweep.name));
        std::fs::write(&file, picture::draw(sweep, &points)?).with_context(|| file.display().to_string())?;
    }
    Ok(())
}

/// A row of the table. The last column is constant where memory is linear.
fn row(before: Option<&Point>, p: &Point) -> String {
    let slope = before.map(|b| (p.peak_mb - b.peak_mb) / (p.value as f64 - b.value as f64));
    let slope = slope.map_or_else(String::new, |s| if s.abs() < 0.1 { format!("{s:.4}") } else { format!("{s:.2}") });
    format!("| {} | {:.0} | {:.0} | {slope} |", p.value, p.tokens_per_second, p.peak_mb)
}

/// The medians of `options.rounds` measurements.
fn measure(options: &GrowthOptions, sweep: &Sweep, value: usize) -> Result<Point> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["step", "--steps", "3", "--model"]).arg(&options.model).stderr(Stdio::inherit());
    for (name, value) in sweep.fixed.iter().copied().chain([(sweep.name, value)]) {
        match name {
            "threads" => command.env("RAYON_NUM_THREADS", value.to_string()),
            _ => command.args([format!("--{name}"), value.to_string()]),
        };
    }
    let what = || format!("{} {value}", sweep.name);
    let (mut speeds, mut peaks) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        let output = command.output().with_context(what)?;
        ensure!(output.status.success(), "{}: the measurement failed ({})", what(), output.status);
        let report: Value = serde_json::from_slice(&output.stdout).with_context(what)?;
        let number = |key: &str| {
            report.get(key).and_then(Value::as_f64).with_context(|| format!("{}: no {key} was measured", what()))
        };
        speeds.push(number("tokens_per_second")?);
        peaks.push(number("peak_rss_mb")?);
    }
    Ok(Point { value, tokens_per_second: median(speeds), peak_mb: median(peaks) })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.get((values.len().saturating_sub(1)) / 2), values.get(values.len() / 2));
    low.zip(high).map_or(f64::NAN, |(a, b)| (a + b) / 2.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn medians_and_rows() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
        let point = |value, peak_mb| Point { value, tokens_per_second: 100.4, peak_mb };
        assert_eq!(row(None, &point(128, 900.0)), "| 128 | 100 | 900 |  |");
        assert_eq!(row(Some(&point(128, 900.0)), &point(256, 1028.0)), "| 256 | 100 | 1028 | 1.00 |");
        assert_eq!(row(Some(&point(1000, 900.0)), &point(2000, 905.0)), "| 2000 | 100 | 905 | 0.0050 |");
    }

    #[test]
    fn pictures_are_small_and_say_what_they_show() {
        for sweep in SWEEPS {
            let points: Vec<Point> = (sweep.values.iter())
                .map(|&value| Point {
                    value,
                    tokens_per_second: 4e5 / (1000.0 + value as f64),
                    peak_mb: 900.0 + value as f64,
                })
                .collect();
            let svg = picture::draw(sweep, &points).unwrap();
            assert!(svg.contains("tokens/s") && svg.contains(sweep.axis), "{svg}");
            assert!(svg.len() < 16_000, "{} is {} bytes", sweep.name, svg.len());
        }
        let alone = [Point { value: 128, tokens_per_second: 1.0, peak_mb: 1.0 }];
        assert!(picture::draw(&SWEEPS[0], &alone).unwrap().contains("circle"));
        assert!(picture::draw(&SWEEPS[0], &[]).is_err());
    }
}
