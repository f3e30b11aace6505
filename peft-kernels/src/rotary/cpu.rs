//! One pass over the rows.

use super::RotaryLayout;
use crate::cpu::new_rows;

/// The shape of a head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) layout: RotaryLayout,
    pub(super) dim: usize,
    /// Pairs that turn.
    pub(super) half: usize,
}

/// Turns rows of `width` elements by the angles in the rows of `cos` and `sin`, or back.
pub(super) fn turn(x: &[f32], width: usize, cos: &[f32], sin: &[f32], heads: Heads, back: bool) -> Vec<f32> {
    let Heads { layout, dim, half } = heads;
    let sign = if back { -1.0 } else { 1.0 };
    new_rows(x.len(), width, 2 * width, |first, rows| {
        let x = &x[first * width..][..rows.len()];
        for (i, (x, y)) in x.chunks_exact(width).zip(rows.chunks_exact_mut(width)).enumerate() {
            let angles = (first + i) * half..(first + i + 1) * half;
            let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
            for (x, y) in x.chunks_exact(dim).zip(y.chunks_exact_mut(dim)) {
                match layout {
                    RotaryLayout::Half => {
                        let (a, b) = x[..2 * half].split_at(half);
                        let (ya, yb) = y[..2 * half].split_at_mut(half);
                        for j in 0..half {
                            let (c, s) = (cos[j], sign * sin[j]);
                            ya[j] = a[j] * c - b[j] * s;
                            yb[j] = b[j] * c + a[j] * s;
                        }
                    }
                    RotaryLayout::Interleaved => {
                        let pairs = x.chunks_exact(2).zip(y.chunks_exact_mut(2));
                        for ((x, y), (c, s)) in pairs.zip(cos.iter().zip(sin)) {
                            let s = sign * s;
                            y[0] = x[0] * c - x[1] * s;
                            y[1] = x[1] * c + x[0] * s;
                        }
                    }
                }
                y[2 * half..].copy_from_slice(&x[2 * half..]);
            }
        }
    })
}
