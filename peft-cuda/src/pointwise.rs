//! Activations, dropout and vectors beside rows (`kernels/pointwise.cu`).

use crate::launch::{Args, Element, Launch, Operand, aligned, count};

const THREADS: usize = 256;

/// An activation function, in the order of the kernel's `Act`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// `x·σ(x)`.
    Silu,
    /// `x·Φ(x)`.
    Gelu,
    /// GELU by tanh.
    GeluTanh,
    /// `x·σ(1.702·x)`.
    QuickGelu,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²`.
    ReluSquared,
    /// `σ(x)`.
    Sigmoid,
    /// `tanh(x)`.
    Tanh,
}

fn launch(kernel: String, elements: usize, per_thread: usize, args: Args) -> Launch {
    // A loop takes what a grid does not reach.
    let blocks = elements.div_ceil(THREADS * per_thread).min(1 << 20);
    Launch { file: "pointwise", kernel, grid: [count(blocks), 1, 1], threads: count(THREADS), shared: 0, args }
}

fn whole(name: &str, element: Element, n: usize, args: Args) -> Launch {
    launch(format!("{name}_{}", element.name()), n, element.per_access(), args)
}

/// `out = act(x)` of `n` elements, or with `grad` not 0 `out = act'(x)·grad`. All addresses are multiples of 16.
#[must_use]
pub fn activation(act: Act, x: Operand, grad: u64, out: u64, n: usize) -> Launch {
    let args = Args::new().long(x.address).long(grad).long(out).long(n as u64).int(act as u32);
    whole("activation", x.element, n, args)
}

/// `out = act(gate)·up`. All addresses are multiples of 16.
#[must_use]
pub fn gated_forward(act: Act, gate: Operand, up: u64, out: u64, n: usize) -> Launch {
    let args = Args::new().long(gate.address).long(up).long(out).long(n as u64).int(act as u32);
    whole("gated_forward", gate.element, n, args)
}

/// Gradients of gate and up, each where its address is not 0. All addresses are multiples of 16.
#[must_use]
pub fn gated_backward(act: Act, gate: Operand, up: u64, grad: u64, (d_gate, d_up): (u64, u64), n: usize) -> Launch {
    let args = Args::new().long(gate.address).long(up).long(grad).long(d_gate).long(d_up);
    whole("gated_backward", gate.element, n, args.long(n as u64).int(act as u32))
}

/// A mask of dropout: element `i` stays where word `i` of the stream is at least `threshold`, times `scale`.
#[derive(Debug, Clone, Copy)]
pub struct Mask {
    /// The run's seed.
    pub seed: u64,
    /// The optimiser step.
    pub step: u32,
    /// The site.
    pub site: u32,
    /// `p·2³²`.
    pub threshold: u32,
    /// `1 / (1 − p)`.
    pub scale: f32,
}

/// `out = mask ⊙ x`. Both addresses are multiples of 16.
#[must_use]
pub fn dropout(mask: Mask, x: Operand, out: u64, n: usize) -> Launch {
    let args = Args::new().long(x.address).long(out).long(n as u64).int(mask.threshold).float(mask.scale);
    whole("dropout", x.element, n, args.long(mask.seed).int(mask.step).int(mask.site))
}

/// `to += from`. Both addresses are multiples of 16.
#[must_use]
pub fn add_in_place(to: Operand, from: u64, n: usize) -> Launch {
    whole("add_in_place", to.element, n, Args::new().long(to.address).long(from).long(n as u64))
}

/// What becomes of a row and a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beside {
    /// Their sum.
    Add,
    /// Their product.
    Multiply,
}

/// `out` from the rows of `x` (`[rows, width]`) and `v` (`[width]`).
#[must_use]
pub fn beside(how: Beside, x: Operand, v: Operand, out: u64, rows: usize, width: usize) -> Launch {
    let vector = aligned(width, &[x, v, Operand { address: out, element: x.element }]);
    let (ending, per_thread) = if vector { ("_vector", x.element.per_access()) } else { ("", 1) };
    let n = rows * width;
    let args = Args::new().long(x.address).long(v.address).long(out).long(n as u64).int(count(width));
    let kernel = format!("beside_{}_{}{ending}", x.element.name(), v.element.name());
    launch(kernel, n, per_thread, args.int(u32::from(how == Beside::Multiply)))
}
