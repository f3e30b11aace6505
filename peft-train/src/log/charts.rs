//! Curves as SVG for the report. Colours are CSS variables, so that the page's light and dark schemes apply.

use std::ops::Range;

use plotters::prelude::*;

use super::facts::{count, significant};
use super::{LogError, Result};

/// plotters places in whole units, so charts are drawn this much larger than they are shown.
const SCALE: u32 = 4;
const SIZE: (u32, u32) = (520 * SCALE, 250 * SCALE);
/// More points than this are thinned to each bucket's lowest and highest.
const MAX_POINTS: usize = 1200;
/// Values beyond this magnitude are drawn as gaps.
const MAX_VALUE: f64 = 1e30;

/// What a curve means; the page's style sheet gives it its colour (`--line`, `--line-soft`, `--mark`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// The curve to look at.
    Line,
    /// Raw values behind a smoothed curve.
    Soft,
    /// Evaluations: a line with dots.
    Mark,
}

#[derive(Debug, Clone)]
pub(super) struct Curve {
    pub(super) look: Look,
    /// (step, value); values that are not finite become gaps.
    pub(super) points: Vec<(f64, f64)>,
}

/// Draw colours that stand for CSS variables.
const GRID: RGBColor = RGBColor(1, 2, 3);
const TEXT: RGBColor = RGBColor(1, 2, 4);
const LINE: RGBColor = RGBColor(1, 2, 5);
const SOFT: RGBColor = RGBColor(1, 2, 6);
const MARK: RGBColor = RGBColor(1, 2, 7);
const VARIABLES: [(&str, &str); 5] =
    [("#010203", "grid"), ("#010204", "muted"), ("#010205", "line"), ("#010206", "line-soft"), ("#010207", "mark")];

/// Draws the curves into one `<svg>` element that scales with its container, or `None` if there is nothing to draw.
/// `label` is what a screen reader says.
pub(super) fn chart(name: &str, label: &str, curves: &[Curve]) -> Result<Option<String>> {
    let points = || curves.iter().flat_map(|c| &c.points).filter(|p| drawable(p));
    let Some((xs, ys)) = ranges(points()) else {
        return Ok(None);
    };
    let mut svg = String::new();
    draw(&mut svg, curves, xs, ys).map_err(|why| LogError::Chart { name: name.to_owned(), why: why.to_string() })?;
    for (colour, variable) in VARIABLES {
        for property in ["fill", "stroke"] {
            svg = svg.replace(&format!("{property}=\"{colour}\""), &format!("style=\"{property}:var(--{variable})\""));
        }
    }
    let label = super::report::escape(label);
    Ok(Some(svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{label}\" "), 1)))
}

fn draw(
    svg: &mut String,
    curves: &[Curve],
    xs: Range<f64>,
    ys: Range<f64>,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let height = ys.end - ys.start;
    let mut chart = ChartBuilder::on(&root)
        .margin_top(10 * SCALE)
        .margin_right(14 * SCALE)
        .x_label_area_size(26 * SCALE)
        .y_label_area_size(52 * SCALE)
        .build_cartesian_2d(xs, ys)?;
    let font = ("sans-serif", 16 * SCALE).into_font().color(&TEXT);
    chart
        .configure_mesh()
        .x_labels(6)
        .y_labels(5)
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID.stroke_width(SCALE))
        .axis_style(GRID.stroke_width(SCALE))
        .set_all_tick_mark_size(4 * SCALE)
        .x_label_formatter(&|x| {
            if x.fract() == 0.0 && *x >= 0.0 { count(*x as u64) } else { String::new() }
        })
        .y_label_formatter(&|y| tick(*y, height))
        .label_style(font)
        .draw()?;
    for curve in curves {
        let (colour, width) = match curve.look {
            Look::Line => (LINE, 2),
            Look::Soft => (SOFT, 1),
            Look::Mark => (MARK, 2),
        };
        let style = colour.stroke_width(width * SCALE);
        for part in curve.points.split(|p| !drawable(p)).filter(|p| !p.is_empty()) {
            let part = thin(part);
            if curve.look == Look::Mark || part.len() == 1 {
                chart.draw_series(part.iter().map(|&p| Circle::new(p, 3 * SCALE, colour.filled())))?;
            }
            chart.draw_series(LineSeries::new(part, style))?;
        }
    }
    root.present()?;
    drop(chart);
    drop(root);
    Ok(())
}

fn drawable(&(x, y): &(f64, f64)) -> bool {
    x.is_finite() && y.is_finite() && x.abs() < MAX_VALUE && y.abs() < MAX_VALUE
}

/// The axes' ranges: never empty, with a little room above and below.
fn ranges<'a>(points: impl Iterator<Item = &'a (f64, f64)>) -> Option<(Range<f64>, Range<f64>)> {
    let (mut x, mut y) = ((f64::MAX, f64::MIN), (f64::MAX, f64::MIN));
    for p in points {
        x = (x.0.min(p.0), x.1.max(p.0));
        y = (y.0.min(p.1), y.1.max(p.1));
    }
    if x.0 > x.1 {
        return None;
    }
    if x.1 - x.0 < 1.0 {
        x = (x.0 - 1.0, x.1 + 1.0);
    }
    let mut room = (y.1 - y.0) * 0.05;
    if room <= y.1.abs().max(y.0.abs()) * 1e-6 {
        room = (y.1.abs() * 0.1).max(1e-9);
    }
    // A curve that stays positive gets no axis below zero.
    let bottom = if y.0 >= 0.0 { (y.0 - room).max(0.0) } else { y.0 - room };
    Some((x.0..x.1, bottom..y.1 + room))
}

/// A tick's label, with as many digits as the axis' height needs to tell ticks apart.
fn tick(v: f64, height: f64) -> String {
    if v.abs() < height * 1e-9 {
        return "0".to_owned();
    }
    let digits = (v.abs() / height).log10().floor().clamp(0.0, 12.0) as usize + 3;
    significant(v, digits)
}

fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    let mut out = Vec::with_capacity(MAX_POINTS + 2);
    for bucket in points.chunks((2 * points.len()).div_ceil(MAX_POINTS)) {
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        if let (Some(&low), Some(&high)) = (bucket.iter().min_by(by_value), bucket.iter().max_by(by_value)) {
            out.extend(if low.0 <= high.0 { [low, high] } else { [high, low] });
        }
    }
    out
}

/// A mean over `window` points around each point, narrower towards the ends, so that it neither lags behind a curve nor
/// bends at its ends. Gaps stay gaps.
pub(super) fn smooth(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let last = points.len().saturating_sub(1);
    let mean = |(i, p): (usize, &(f64, f64))| {
        if !drawable(p) {
            return *p;
        }
        // A few points at the very ends are worth a little lag.
        let side = (window / 2).min(i.min(last - i).max(3));
        let around = points.iter().take(i + side + 1).skip(i.saturating_sub(side)).filter(|p| drawable(p));
        let (sum, n) = around.fold((0.0, 0.0), |(sum, n), p| (sum + p.1, n + 1.0));
        (p.0, sum / n)
    };
    points.iter().enumerate().map(mean).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn line(points: Vec<(f64, f64)>) -> Result<Option<String>> {
        chart("c", "a <label>", &[Curve { look: Look::Line, points }])
    }

    #[test]
    fn colours_are_variables_and_labels_escaped() {
        let svg = line(vec![(1.0, 2.0), (2.0, 1.0)]).unwrap().unwrap();
        assert!(svg.contains("style=\"stroke:var(--line)\"") && svg.contains("style=\"fill:var(--muted)\""));
        assert!(!svg.contains("#0102"), "{svg}");
        assert!(svg.contains("aria-label=\"a &lt;label&gt;\""));
        assert!(svg.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn odd_data_draws_or_says_nothing() {
        assert!(line(vec![]).unwrap().is_none());
        assert!(line(vec![(1.0, f64::NAN), (2.0, f64::INFINITY), (3.0, 1e300)]).unwrap().is_none());
        for points in [
            vec![(1.0, 5.0)],
            vec![(1.0, 0.0), (2.0, 0.0)],
            vec![(1.0, 2e-4); 3],
            vec![(1.0, -3.0), (2.0, f64::NAN), (3.0, 4.0), (4.0, 4.5)],
            vec![(0.0, 1e29), (1e18, -1e29)],
            vec![(1.0, 1.0), (2.0, 1.0 + 1e-15)],
            vec![(1.0, 1e-300), (2.0, 2e-300)],
            vec![(u64::MAX as f64, 1.0), (u64::MAX as f64, 2.0)],
        ] {
            assert!(line(points.clone()).unwrap().unwrap().len() < 40_000, "{points:?}");
        }
        let long: Vec<_> = (0..100_000).map(|i| (i as f64, f64::from(i).sin())).collect();
        assert!(line(long).unwrap().unwrap().len() < 60_000);
    }

    #[test]
    fn thinning_keeps_spikes() {
        let mut p: Vec<_> = (0..50_000).map(|i| (i as f64, 1.0)).collect();
        p[33_333].1 = 9.0;
        p[40_001].1 = -9.0;
        let t = thin(&p);
        assert!(t.len() <= MAX_POINTS + 2 && t.contains(&(33_333.0, 9.0)) && t.contains(&(40_001.0, -9.0)));
        assert!(t.is_sorted_by(|a, b| a.0 <= b.0));
    }

    #[test]
    fn smoothing_does_not_lag() {
        let p: Vec<_> = (0..50).map(|i| (f64::from(i), 3.0 - 2.0 * f64::from(i))).collect();
        assert!(smooth(&p, 9).iter().zip(&p).skip(3).take(44).all(|(s, p)| (s.1 - p.1).abs() < 1e-9));
        let s = smooth(&[(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0), (3.0, 4.0), (4.0, 2.0)], 5);
        assert!(s[1].1.is_nan());
        assert_eq!((s[0].1, s[2].1, s[3].1, s[4].1), (2.0, 2.5, 3.0, 3.0));
        assert!(smooth(&[], 5).is_empty());
        assert_eq!(
            [tick(0.0, 1.0), tick(2.5, 5.0), tick(100.001, 0.01), tick(2e-4, 2e-4)],
            ["0", "2.5", "100.001", "2e-4"]
        );
    }
}
