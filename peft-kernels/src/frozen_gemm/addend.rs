//! What is added to a product while its tiles are in the first-level cache: a product of low rank and a bias. Made apart, each
//! would take a pass over the result in memory, which costs a multiple of its arithmetic.

use candle_core::Result;
use rayon::prelude::*;

use super::{COLS, Kernel, Panel, ROWS, Tile, Word, room};
use crate::cpu::{self, Mat};

/// `scale·X·W + bias`, either of which may be missing.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Addend<'a> {
    pub(crate) low_rank: Option<LowRankProduct<'a>>,
    /// As long as a row of the result.
    pub(crate) bias: Option<&'a [f32]>,
}

/// `scale·X·W`, where the contraction is short.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LowRankProduct<'a> {
    /// `[tokens, r]`.
    pub(crate) x: Mat<'a>,
    /// `[r, columns]`.
    pub(crate) w: Mat<'a>,
    pub(crate) scale: f32,
}

impl LowRankProduct<'_> {
    /// The product by itself.
    ///
    /// # Errors
    /// When the factors do not fit each other.
    pub(crate) fn product(&self) -> Result<Vec<f32>> {
        cpu::gemm(self.x, self.w, self.scale)
    }
}

impl Addend<'_> {
    /// Adds the bias to rows of a result.
    pub(crate) fn add_bias(&self, y: &mut [f32]) {
        let Some(bias) = self.bias.filter(|b| !b.is_empty()) else { return };
        cpu::for_row_blocks(y, bias.len(), bias.len(), |_, rows| {
            for row in rows.chunks_mut(bias.len()) {
                row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        });
    }

    /// It alone, `[tokens, columns]`.
    pub(super) fn alone(&self, tokens: usize, columns: usize) -> Result<Vec<f32>> {
        let mut y = self.low_rank.map_or_else(|| Ok(vec![0.0; tokens * columns]), |l| l.product())?;
        self.add_bias(&mut y);
        Ok(y)
    }

    /// Whether there is nothing to add.
    pub(super) fn is_empty(&self) -> bool {
        self.words() == 0
    }

    /// That it fits a result `[tokens, columns]`.
    pub(super) fn check(&self, tokens: usize, columns: usize) -> Result<()> {
        if let Some(LowRankProduct { x, w, .. }) = &self.low_rank {
            cpu::check_factors(*x, *w)?;
            if (x.rows(), w.cols()) != (tokens, columns) {
                candle_core::bail!("a low-rank [{}, {}] on a product [{tokens}, {columns}]", x.rows(), w.cols());
            }
        }
        match self.bias {
            Some(bias) if bias.len() != columns => {
                candle_core::bail!("a bias of {} on a product with {columns} columns", bias.len())
            }
            _ => Ok(()),
        }
    }

    /// Length of the contraction; a bias is a row of it that meets ones.
    fn words(&self) -> usize {
        self.low_rank.map_or(0, |l| l.x.cols()) + usize::from(self.bias.is_some())
    }
}

/// An addend whose activations are laid out for a kernel in `f32`.
pub(super) struct LaidOut<'a> {
    addend: Addend<'a>,
    kernel: Kernel,
    panels: &'a [[Word; ROWS]],
}

impl<'a> LaidOut<'a> {
    pub(super) fn new(addend: Addend<'a>, tokens: usize, kernel: Kernel, buffer: &'a mut Vec<[Word; ROWS]>) -> Self {
        let words = addend.words();
        let panels = room(buffer, tokens.div_ceil(ROWS) * words, [0; ROWS]);
        panels.par_chunks_mut(words).with_min_len(16).enumerate().for_each(|(i, panel)| {
            for (k, word) in panel.iter_mut().enumerate() {
                for (r, word) in word.iter_mut().enumerate() {
                    let number = match &addend.low_rank {
                        Some(l) if k < l.x.cols() => l.scale * l.x.at(i * ROWS + r, k),
                        _ => 1.0,
                    };
                    *word = number.to_bits();
                }
            }
        });
        Self { addend, kernel, panels }
    }

    /// Length of the contraction.
    pub(super) fn words(&self) -> usize {
        self.addend.words()
    }

    /// Lays out columns from `first` on in as many slabs as there is room for.
    pub(super) fn lay_out_columns(&self, first: usize, slabs: &mut [[Word; COLS]]) {
        for (i, slab) in slabs.chunks_mut(self.words()).enumerate() {
            let first = first + i * COLS;
            for (k, word) in slab.iter_mut().enumerate() {
                for (c, word) in word.iter_mut().enumerate() {
                    let number = match &self.addend.low_rank {
                        Some(l) if k < l.x.cols() => l.w.at(k, first + c),
                        _ => self.addend.bias.and_then(|bias| bias.get(first + c)).copied().unwrap_or(0.0),
                    };
                    *word = number.to_bits();
                }
            }
        }
    }

    /// Adds what a panel and a slab make to a tile.
    #[inline(always)]
    pub(super) fn add(&self, panel: usize, slab: &[[Word; COLS]], tile: &mut Tile) {
        let mut own = [[0f32; COLS]; ROWS];
        let words = self.words();
        (self.kernel)(Panel::LaidOut(&self.panels[panel * words..(panel + 1) * words]), slab, &mut own);
        for (sums, own) in tile.iter_mut().zip(&own) {
            sums.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
        }
    }
}
