//! What a launch is.

/// A float type in which tensors are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Element {
    /// Bytes of an element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// What kernels' names end in.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Elements that one access of 16 bytes holds.
    pub(crate) fn per_access(self) -> usize {
        16 / self.size()
    }
}

/// A tensor's address and element type.
#[derive(Debug, Clone, Copy)]
pub struct Operand {
    /// Where it lies: on the device, or on the host under emulation. 0 is an absent one.
    pub address: u64,
    /// How it is stored.
    pub element: Element,
}

/// Arguments of a kernel in the order of its parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Args(Vec<u64>);

impl Args {
    /// No arguments yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An address, or a 64-bit number.
    #[must_use]
    pub fn long(mut self, value: u64) -> Self {
        self.0.push(value);
        self
    }

    /// A 32-bit number.
    #[must_use]
    pub fn int(mut self, value: u32) -> Self {
        self.0.push(u64::from(value));
        self
    }

    /// A signed 32-bit number.
    #[must_use]
    pub fn signed(self, value: i32) -> Self {
        self.int(value.cast_unsigned())
    }

    /// A float.
    #[must_use]
    pub fn float(self, value: f32) -> Self {
        self.int(value.to_bits())
    }

    /// A double.
    #[must_use]
    pub fn double(self, value: f64) -> Self {
        self.long(value.to_bits())
    }

    /// The arguments, each in the low bytes of a word: a pointer to a word is a pointer to its argument on the
    /// little-endian machines that CUDA runs on.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.0
    }
}

/// One launch of one kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The source file that the kernel is in, without its ending.
    pub file: &'static str,
    /// The kernel's name.
    pub kernel: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Arguments.
    pub args: Args,
}

impl Launch {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }
}

/// A count as kernels take it. Beyond 31 bits it saturates; launches are for tensors whose rows fit.
pub(crate) fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX).min(i32::MAX as u32)
}

/// Whether rows of `width` elements can be read in accesses of 16 bytes.
pub(crate) fn aligned(width: usize, operands: &[Operand]) -> bool {
    operands.iter().all(|o| o.address % 16 == 0 && width.is_multiple_of(o.element.per_access()))
}
