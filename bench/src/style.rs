//! What the pictures of this crate have in common.

use anyhow::{Result, anyhow};
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

pub(crate) const LINE: RGBColor = RGBColor(0x2f, 0x6f, 0xb3);
const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);
pub(crate) const TEXT: RGBColor = RGBColor(0x44, 0x44, 0x44);

/// Axes with whole numbers, and a light line at each of the upright one's.
pub(crate) fn axes<X, Y>(
    chart: &mut ChartContext<'_, SVGBackend<'_>, Cartesian2d<X, Y>>,
    x_title: &str,
    y_title: Option<&str>,
) -> Result<()>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let font = ("sans-serif", 13).into_font().color(&TEXT);
    let mut mesh = chart.configure_mesh();
    if let Some(title) = y_title {
        mesh.y_desc(title);
    }
    mesh.x_desc(x_title)
        .x_labels(7)
        .y_labels(5)
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .label_style(font.clone())
        .axis_desc_style(font)
        .draw()
        .map_err(failed)
}

pub(crate) fn failed(e: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("a picture: {e}")
}
