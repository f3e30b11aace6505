//! RMSNorm and LayerNorm (`kernels/norm.cu`).

use crate::launch::{Args, Launch, Operand, aligned, count};

/// Rows up to this width are taken by a warp each, longer ones by a block.
const WARP_WIDTH: usize = 1024;
/// Rows that a block of warps takes.
const WARP_ROWS: usize = 4;
/// Bytes for one number of each warp.
const SCRATCH: u32 = 32 * 4;

/// The rows to normalise.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    /// LayerNorm rather than RMSNorm.
    pub centred: bool,
    /// How many rows.
    pub rows: usize,
    /// Elements of a row, and of the weight.
    pub width: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Added to the weight.
    pub offset: f32,
}

impl Norm {
    fn launch(&self, pass: &str, x: Operand, weight: Operand, vectors: &[Operand], args: Args) -> Launch {
        let kind = if self.centred { "layer_norm" } else { "rms_norm" };
        let vector = if aligned(self.width, &[&[x, weight], vectors].concat()) { "_vector" } else { "" };
        let by_warp = self.width <= WARP_WIDTH;
        let (blocks, threads) = if by_warp {
            (self.rows.div_ceil(WARP_ROWS), 32 * WARP_ROWS)
        } else {
            (self.rows, if self.width <= 4096 { 256 } else { 512 })
        };
        Launch {
            file: "norm",
            kernel: format!("{kind}_{pass}_{}_{}{vector}", x.element.name(), weight.element.name()),
            grid: [count(blocks), 1, 1],
            threads: count(threads),
            shared: SCRATCH,
            args: args.int(u32::from(by_warp)),
        }
    }

    fn size(&self, args: Args) -> Args {
        args.long(self.rows as u64).int(count(self.width)).float(self.eps).float(self.offset)
    }

    /// `out` (like `x`) from `x` and `weight`; `bias` (like `weight`) may be 0. `rounds`: the normalised value is rounded to the
    /// type of `x` before it meets the weight.
    #[must_use]
    pub fn forward(&self, x: Operand, weight: Operand, bias: u64, out: u64, rounds: bool) -> Launch {
        let args = self.size(Args::new().long(x.address).long(weight.address).long(bias).long(out));
        let like_x = Operand { address: out, element: x.element };
        self.launch("forward", x, weight, &[like_x], args.int(u32::from(rounds)))
    }

    /// The gradient of `x`, and each row's mean and 1/√(variance + eps), as far as the addresses are not 0.
    #[must_use]
    pub fn backward(&self, x: Operand, weight: Operand, grad: u64, dx: u64, means: u64, rstds: u64) -> Launch {
        let args = Args::new().long(x.address).long(weight.address).long(grad).long(dx).long(means).long(rstds);
        let like_x = |address| Operand { address, element: x.element };
        self.launch("backward", x, weight, &[like_x(grad), like_x(dx)], self.size(args))
    }
}
