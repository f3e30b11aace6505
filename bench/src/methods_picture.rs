//! Accuracy over trained parameters, from what `bench/methods` measured.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use plotters::prelude::*;
use serde_json::Value;

use crate::style::{LINE, TEXT, axes, failed};

const SIZE: (u32, u32) = (1000, 560);
/// Least distance of two labels, in pixels.
const LABEL: (i32, i32) = (150, 13);

struct Point {
    name: String,
    parameters: f64,
    accuracy: f64,
}

/// The picture as SVG of our side's lines of `model` in `results`, JSON lines.
///
/// # Errors
/// When the file cannot be read or holds no such line, or what plotters says.
pub fn draw(results: &Path, model: &str) -> Result<String> {
    let text = std::fs::read_to_string(results).with_context(|| results.display().to_string())?;
    let mut points = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let row: Value =
            serde_json::from_str(line).with_context(|| format!("{}, line {}", results.display(), i + 1))?;
        let is = |key: &str, value: &str| row.get(key).and_then(Value::as_str) == Some(value);
        if !is("model", model) || !is("side", "ours") {
            continue;
        }
        let number =
            |key: &str| row.get(key).and_then(Value::as_f64).with_context(|| format!("line {}: no `{key}`", i + 1));
        let name = row.get("line").and_then(Value::as_str).unwrap_or_default().to_owned();
        points.push(Point { name, parameters: number("trainable_parameters")?, accuracy: number("accuracy")? });
    }
    ensure!(!points.is_empty(), "{} has nothing of {model}", results.display());
    points.sort_by(|a, b| b.accuracy.total_cmp(&a.accuracy));
    picture(&points)
}

/// The smallest range that holds all values, a little wider.
fn range(values: impl Iterator<Item = f64>, margin: impl Fn(f64, f64) -> (f64, f64)) -> Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    let (low, high) = margin(low, high);
    low..high
}

fn picture(points: &[Point]) -> Result<String> {
    // Labels stand at the right of their points.
    let xs = range(points.iter().map(|p| p.parameters.max(1.0)), |low, high| (low / 2.0, high * 12.0));
    let ys = range(points.iter().map(|p| p.accuracy * 100.0), |low, high| (low - 1.0, high + 1.0));
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(failed)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(8)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(xs.log_scale(), ys)
        .map_err(failed)?;
    axes(&mut chart, "trained parameters", Some("accuracy, %"))?;
    let at = |p: &Point| (p.parameters.max(1.0), p.accuracy * 100.0);
    chart.draw_series(points.iter().map(|p| Circle::new(at(p), 3, LINE.filled()))).map_err(failed)?;
    let places: Vec<(i32, i32)> = points.iter().map(|p| chart.backend_coord(&at(p))).collect();
    let small = ("sans-serif", 11).into_font().color(&TEXT);
    let mut taken: Vec<(i32, i32)> = Vec::new();
    for (point, (x, y)) in points.iter().zip(places) {
        let y = free(&taken, x, y);
        taken.push((x, y));
        root.draw(&Text::new(point.name.as_str(), (x + 6, y - 5), small.clone())).map_err(failed)?;
    }
    root.present().map_err(failed)?;
    drop((chart, root));
    Ok(svg)
}

/// The height nearest below `y` at which a label does not stand on another.
fn free(taken: &[(i32, i32)], x: i32, mut y: i32) -> i32 {
    while let Some(other) = taken.iter().find(|t| (t.0 - x).abs() < LABEL.0 && (t.1 - y).abs() < LABEL.1) {
        y = other.1 + LABEL.1;
    }
    y
}
