//! What the pictures of this crate have in common.

use anyhow::anyhow;
use plotters::style::RGBColor;

pub(crate) const LINE: RGBColor = RGBColor(0x2f, 0x6f, 0xb3);
pub(crate) const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);
pub(crate) const TEXT: RGBColor = RGBColor(0x44, 0x44, 0x44);

pub(crate) fn failed(e: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("a picture: {e}")
}
