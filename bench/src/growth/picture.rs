//! A sweep as SVG: speed at the left over a logarithmic axis, peak memory at the right over a linear one, on which memory
//! that grows linearly is a straight line.

use anyhow::{Result, anyhow, ensure};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use super::{Point, Sweep};
use crate::style::{LINE, TEXT, axes, failed};

const SIZE: (u32, u32) = (1000, 300);

/// The picture of `points`, at least one.
///
/// # Errors
/// Without points, or what plotters says.
pub(super) fn draw(sweep: &Sweep, points: &[Point]) -> Result<String> {
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        return Err(anyhow!("{}: there is no point to draw", sweep.name));
    };
    let top = |values: &[(f64, f64)]| values.iter().fold(0.0, |most: f64, p| most.max(p.1)) * 1.08;
    let speeds: Vec<(f64, f64)> = points.iter().map(|p| (p.value as f64, p.tokens_per_second)).collect();
    let peaks: Vec<(f64, f64)> = points.iter().map(|p| (p.value as f64, p.peak_mb)).collect();
    ensure!(top(&speeds) > 0.0 && top(&peaks) > 0.0, "{}: nothing was measured", sweep.name);
    // A range is never empty, and the outer points do not lie on the frame.
    let (low, high) = (first.value as f64 * 0.85, last.value as f64 * 1.15);

    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(failed)?;
    let (left, right) = root.split_horizontally(SIZE.0 / 2);
    panel(&left, "tokens/s", sweep.axis, (low..high).log_scale(), 0.0..top(&speeds), &speeds)?;
    panel(&right, "peak memory, MB", sweep.axis, 0.0..high, 0.0..top(&peaks), &peaks)?;
    root.present().map_err(failed)?;
    drop((left, right, root));
    Ok(svg)
}

fn panel<X>(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    axis: &str,
    xs: X,
    ys: std::ops::Range<f64>,
    points: &[(f64, f64)],
) -> Result<()>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
{
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 15).into_font().color(&TEXT))
        .margin(8)
        .margin_right(18)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(xs, ys)
        .map_err(failed)?;
    axes(&mut chart, axis, None)?;
    chart.draw_series(LineSeries::new(points.iter().copied(), LINE.stroke_width(2))).map_err(failed)?;
    chart.draw_series(points.iter().map(|&p| Circle::new(p, 3, LINE.filled()))).map_err(failed)?;
    Ok(())
}
