//! Rotary embedding, sums over rows, argmax, the gradient of an embedding (`kernels/rows.cu`).

use crate::launch::{Args, Element, Launch, Operand, count};

/// Rows that a block of [`column_sums`] adds up.
const RUN: usize = 64;

fn launch(name: &str, element: Element, grid: [usize; 2], threads: u32, shared: u32, args: Args) -> Launch {
    Launch {
        file: "rows",
        kernel: format!("{name}_{}", element.name()),
        grid: [count(grid[0]), count(grid[1]), 1],
        threads,
        shared,
        args,
    }
}

/// The heads that turn.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Tokens.
    pub tokens: usize,
    /// Heads of a token.
    pub heads: usize,
    /// Elements of a head.
    pub dim: usize,
    /// Pairs of a head that turn.
    pub half: usize,
    /// Pairs `(2i, 2i + 1)` rather than `(i, i + half)`.
    pub interleaved: bool,
}

/// `out` (like `x`) is `x` turned by the angles of `cos` and `sin` (`[tokens, half]`, `f32`), or back.
#[must_use]
pub fn rotary(heads: Heads, x: Operand, (cos, sin): (u64, u64), out: u64, back: bool) -> Launch {
    let n = heads.tokens * heads.heads * (heads.dim - heads.half);
    let args = Args::new().long(x.address).long(cos).long(sin).long(out).long(n as u64).int(count(heads.heads));
    let args = args.int(count(heads.dim)).int(count(heads.half)).int(u32::from(heads.interleaved));
    let args = args.float(if back { -1.0 } else { 1.0 });
    launch("rotary", x.element, [n.div_ceil(256).min(1 << 20), 1], 256, 0, args)
}

/// Rows of partial sums that [`column_sums`] needs for so many rows.
#[must_use]
pub fn partial_rows(rows: usize) -> usize {
    rows.div_ceil(RUN).max(1)
}

/// What is summed over the rows of `grad`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Factor {
    /// Like `grad`: it is multiplied with this first; 0 for none.
    pub x: u64,
    /// Of each row, `f32`: subtracted from `x`; 0 for none.
    pub means: u64,
    /// Of each row, `f32`: multiplied into `x`; 0 for none.
    pub rstds: u64,
}

/// Sums over the rows of `grad` (`[rows, width]`) times `factor` into `out` (`[width]`), in two launches; `partial` has room for
/// [`partial_rows`]`(rows) · width` values in `f32`.
#[must_use]
pub fn column_sums(
    grad: Operand,
    factor: Factor,
    partial: u64,
    out: Operand,
    (rows, width): (usize, usize),
) -> [Launch; 2] {
    let runs = partial_rows(rows);
    let args = Args::new().long(grad.address).long(factor.x).long(factor.means).long(factor.rstds).long(partial);
    let args = args.long(rows as u64).int(count(width)).int(count(RUN));
    let first = launch("column_sums", grad.element, [width.div_ceil(32), runs], 256, 256 * 4, args);
    let args = Args::new().long(partial).long(out.address).int(count(runs)).int(count(width));
    [first, launch("sum_rows", out.element, [width.div_ceil(256), 1], 256, 0, args)]
}

/// For each row of `x` (`[rows, width]`) the index of its first largest element into `out` (`u32`), `u32::MAX` where there is a
/// NaN.
#[must_use]
pub fn argmax(x: Operand, out: u64, rows: usize, width: usize) -> Launch {
    let args = Args::new().long(x.address).long(out).int(count(width));
    launch("argmax", x.element, [rows, 1], 512, 16 * 12, args)
}

/// Rows `rows[b]` of `out` (`[vocab, width]`, zeros elsewhere beforehand) as sums of the rows `tokens[starts[b]..starts[b + 1]]`
/// of `grad`; the lists are `u32`, and there are `distinct` rows.
#[must_use]
pub fn embedding_backward(
    grad: Operand,
    [rows, starts, tokens]: [u64; 3],
    out: u64,
    distinct: usize,
    width: usize,
) -> Launch {
    let args = Args::new().long(grad.address).long(rows).long(starts).long(tokens).long(out).int(count(width));
    launch("embedding_backward", grad.element, [distinct, 1], 256, 0, args)
}
