//! What waits between the forward and the backward pass: which records, and in which type.

use candle_core::{DType, Tensor};
use peft_core::Result;
use peft_core::kernels::{self, Record, Unread};

/// Which blocks keep their record between forward and backward; the others are run again (gradient checkpointing).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checkpointing {
    /// All blocks keep theirs.
    Off,
    /// None does.
    Full,
    /// The topmost `n` blocks keep theirs: they are the first that the backward pass needs.
    KeepTop(usize),
}

/// What waits between the forward and the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// The blocks that keep their record.
    pub checkpointing: Checkpointing,
    /// The type in which activations wait, where they were made in a wider one: those of a record, and a block's input, which
    /// is rounded before the block runs. So a record that is made again is the one that would have been kept.
    pub records: DType,
}

impl From<Checkpointing> for Keep {
    /// Records hold activations as they were made on a CPU.
    fn from(checkpointing: Checkpointing) -> Self {
        Self { checkpointing, records: DType::F32 }
    }
}

impl Keep {
    /// Runs a block on its `input` and records it.
    pub(crate) fn record(
        self,
        block: impl FnOnce(&Tensor) -> Result<Tensor>,
        input: &Tensor,
    ) -> Result<(Tensor, Record)> {
        let (out, record) = kernels::record(|| block(input))?;
        Ok((out, self.held(record, input)?))
    }

    /// Runs a block again on the same input, without what its backward pass does not read.
    pub(crate) fn record_again(
        self,
        unread: Unread,
        block: impl FnOnce(&Tensor) -> Result<Tensor>,
        input: &Tensor,
    ) -> Result<Record> {
        self.held(kernels::record_again(unread, || block(input))?, input)
    }

    fn held(self, mut record: Record, input: &Tensor) -> Result<Record> {
        if self.narrows(input.dtype()) {
            record.hold_in(self.records, input.id())?;
        }
        Ok(record)
    }

    fn narrows(self, dtype: DType) -> bool {
        self.records.size_in_bytes() < dtype.size_in_bytes()
    }

    /// A block's input as it waits for the backward pass, where that is in another type.
    pub(crate) fn narrowed(self, hidden: &Tensor) -> Result<Option<Tensor>> {
        Ok(if self.narrows(hidden.dtype()) { Some(kernels::convert(hidden, self.records)?) } else { None })
    }
}

impl Checkpointing {
    pub(crate) fn keeps(self, block: usize, blocks: usize) -> bool {
        match self {
            Self::Off => true,
            Self::Full => false,
            Self::KeepTop(n) => blocks - block <= n,
        }
    }
}
