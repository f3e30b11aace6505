//! AdamW over many tensors, clipped by the norm of all gradients (`kernels/adamw.cu`).

use crate::launch::{Args, Element, Launch, Operand, count};

/// Elements that a block takes; a multiple of four.
const CHUNK: usize = 16 << 10;
const THREADS: u32 = 256;
/// Bytes for one `f64` of each warp.
const SCRATCH: u32 = THREADS / 32 * 8;

/// A parameter, its gradient and its moments: all at multiples of 16 bytes.
#[derive(Debug, Clone, Copy)]
pub struct Tensor {
    /// What is updated.
    pub param: Operand,
    /// Its gradient, of the parameter's type or `f32`.
    pub grad: Operand,
    /// The first moment, `f32`.
    pub m: u64,
    /// The second moment, `f32`.
    pub v: u64,
    /// Elements of each of them.
    pub len: usize,
    /// Factor of the learning rate.
    pub lr_scale: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// What kernels read of a list of tensors: two tables that the caller copies to the device. They change when an address does.
#[derive(Debug, Clone, PartialEq)]
pub struct Tables {
    /// Of each tensor 8 words.
    pub entries: Vec<u64>,
    /// Of each chunk the tensor (low half) and the chunk's number in it.
    pub chunks: Vec<u64>,
}

impl Tables {
    /// For the tensors whose step is taken; others keep their values.
    #[must_use]
    pub fn new(tensors: &[Tensor]) -> Self {
        let code = |element: Element| match element {
            Element::F32 => 0u64,
            Element::Bf16 => 1,
            Element::F16 => 2,
        };
        let entry = |t: &Tensor| {
            let types = code(t.param.element) | code(t.grad.element) << 32;
            let numbers = [t.lr_scale.to_bits(), t.weight_decay.to_bits()];
            [t.param.address, t.grad.address, t.m, t.v, t.len as u64, numbers[0], numbers[1], types]
        };
        let chunks = |(i, t): (usize, &Tensor)| {
            let of_tensor = t.len.div_ceil(CHUNK) as u64;
            (0..of_tensor).map(move |chunk| i as u64 | chunk << 32)
        };
        Self {
            entries: tensors.iter().flat_map(entry).collect(),
            chunks: tensors.iter().enumerate().flat_map(chunks).collect(),
        }
    }

    /// How many tensors.
    #[must_use]
    pub fn tensors(&self) -> usize {
        self.entries.len() / 8
    }
}

/// Addresses of what a step reads and writes besides the tensors.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// [`Tables::entries`].
    pub entries: u64,
    /// [`Tables::chunks`].
    pub chunks: u64,
    /// Of each tensor the number of updates so far, `u32`; the step counts them up.
    pub steps: u64,
    /// Room for an `f64` of each chunk.
    pub partial: u64,
    /// Room for three `f32` of each tensor.
    pub rates: u64,
    /// Three `f64` that the step leaves behind: the norm before clipping, what gradients were multiplied with, and 1 if nothing
    /// was updated since the norm is not finite, else 0.
    pub status: u64,
}

/// One step's numbers.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// The norm that gradients are scaled down to; 0 is none.
    pub max_norm: f64,
}

impl Step {
    /// The launches of a step, in order.
    #[must_use]
    pub fn launches(&self, tables: &Tables, memory: Memory) -> [Launch; 3] {
        let chunks = count(tables.chunks.len());
        let launch = |kernel: &str, blocks, shared, args| Launch {
            file: "adamw",
            kernel: kernel.into(),
            grid: [blocks, 1, 1],
            threads: THREADS,
            shared,
            args,
        };
        let Memory { entries, chunks: list, steps, partial, rates, status } = memory;
        let squares = Args::new().long(entries).long(list).long(partial).long(CHUNK as u64);
        let norm = Args::new().long(partial).int(chunks).long(entries).int(count(tables.tensors())).long(steps);
        let norm = norm.long(rates).long(status).double(self.max_norm).double(self.lr);
        let update = Args::new().long(entries).long(list).long(rates).long(status).long(CHUNK as u64);
        let update = update.float((1.0 - self.beta1) as f32).float(self.beta2 as f32);
        let update = update.float((1.0 - self.beta2) as f32).float(self.eps as f32);
        [
            launch("adamw_squares", chunks, SCRATCH, squares),
            launch("adamw_norm", 1, SCRATCH, norm.double(self.beta1).double(self.beta2)),
            launch("adamw_update", chunks, 0, update),
        ]
    }
}
