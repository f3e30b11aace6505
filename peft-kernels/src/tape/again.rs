//! Running a block again for its backward pass alone, without what that does not read: a block that ends in
//! `x + down(act(gate, up))` needs neither the sum nor the product once its result has been handed on, since the gradients
//! are made of `gate` and `up`. In a decoder that product is a quarter of the block.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};

use super::{Entry, RECORDING, Record, recorded};

/// The operations of a block, in the order in which they ran, that need not run again: see [`Record::unread`].
#[derive(Debug, Default)]
pub struct Unread(Vec<Option<Skipped>>);

/// What stands in for an operation's result.
#[derive(Debug)]
struct Skipped {
    name: &'static str,
    shape: Shape,
    dtype: DType,
    device: Device,
}

impl Unread {
    /// Whether every operation has to run.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// Whether the operation at this place need not run.
    #[cfg(test)]
    pub(super) fn skips(&self, entry: usize) -> bool {
        self.0.get(entry).is_some_and(Option::is_some)
    }
}

impl Record {
    /// Operations whose result the backward pass does not read, or makes itself when it does, and of which nothing else was
    /// made but the results of such operations and the block's. What running them leaves beside the result is made again.
    ///
    /// There are none where candle's operations stand between: what they read is not known here.
    #[must_use]
    pub fn unread(&self) -> Unread {
        let (mut has_readers, mut is_read) = (vec![false; self.slots.len()], vec![false; self.slots.len()]);
        self.out.into_iter().for_each(|out| has_readers[out] = true);
        let skips = self.entries.iter().rev().map(|entry| {
            let Entry::Op { op, args, outs } = entry else { return None };
            let unread = |out: usize| self.slots[out].value.is_none() && has_readers[out] && !is_read[out];
            let skip = match outs.as_slice() {
                [out] if unread(*out) => Some(&self.slots[*out]),
                _ => None,
            };
            for &arg in args {
                has_readers[arg] = true;
                is_read[arg] |= skip.is_none() || op.remembers();
            }
            Some(skip.map(|slot| Skipped {
                name: op.name(),
                shape: slot.shape.clone(),
                dtype: slot.dtype,
                device: slot.device.clone(),
            }))
        });
        let mut skips = skips.collect::<Option<Vec<_>>>().unwrap_or_default();
        skips.reverse();
        Unread(skips)
    }
}

/// Runs a block again and records it, without the operations that are `unread`. `f` must be what was recorded then: it runs
/// the same operations on the same values. Its result is not made and must not be looked at.
///
/// # Errors
/// What `f` returns, or a tensor operation's.
pub fn record_again<E: From<candle_core::Error>>(
    unread: Unread,
    f: impl FnOnce() -> std::result::Result<Tensor, E>,
) -> std::result::Result<Record, E> {
    Ok(recorded(Record { unread, ..Record::default() }, f)?.1)
}

/// What stands in for the result of the operation that is to be written down next, if it need not be made.
pub(super) fn skipped(name: &str) -> Option<Result<Tensor>> {
    RECORDING.with_borrow(|record| {
        let record = record.as_ref()?;
        let skipped = record.unread.0.get(record.entries.len())?.as_ref().filter(|s| s.name == name)?;
        Some(Var::zeros(&skipped.shape, skipped.dtype, &skipped.device).map(Var::into_inner))
    })
}
