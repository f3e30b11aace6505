//! A recording of the operations of one block, for a backward pass that costs no more than the operations' own.
//!
//! candle's `backward` starts every gradient as a tensor of zeros and adds to it, and its graph keeps the arguments of
//! every operation. While [`record`] runs, operations of this crate are written down here instead:
//!
//! - what the backward pass does not read is dropped as soon as the block is done, and results that are cheaper to make
//!   again than to keep (norms, activations, dropout) are made again when they are needed;
//! - the first gradient of a tensor is taken as it is, further ones are added in place.
//!
//! Results are variables in candle's eyes, without a history. So candle's own operations may stand between: their results
//! are tracked and no variables, and where such a tensor meets an operation of this crate, the part of candle's graph
//! that made it becomes one entry of the recording, differentiated by candle. Nothing can be cut off unseen.

mod again;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Result, Shape, Tensor, TensorId, Var};

pub use self::again::{Unread, record_again};
use crate::cpu::{self, View};
use crate::diff_op::{DiffOp, Value, compute, gradients, is_cpu_f32, seed};
use crate::narrow;

thread_local! {
    static RECORDING: RefCell<Option<Record>> = const { RefCell::new(None) };
}

/// What of an operation its backward pass reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keeps {
    /// Neither arguments nor result, beyond their shapes.
    Nothing,
    /// The arguments.
    Arguments,
    /// The arguments and the result.
    All,
}

/// The operations of a block in the order in which they ran.
#[derive(Debug, Default)]
pub struct Record {
    entries: Vec<Entry>,
    slots: Vec<Slot>,
    index: HashMap<TensorId, usize>,
    out: Option<usize>,
    /// What need not run, where the block runs again.
    unread: Unread,
}

#[derive(Clone)]
enum Entry {
    Op {
        op: Arc<dyn Recorded>,
        args: Vec<usize>,
        outs: Vec<usize>,
    },
    /// A part of candle's graph, from variables to the tensor in this slot.
    Foreign(usize),
}

/// A tensor of the recording.
#[derive(Debug)]
struct Slot {
    id: TensorId,
    value: Option<Tensor>,
    shape: Shape,
    dtype: DType,
    device: Device,
    tracked: bool,
    /// The entry that makes it.
    from: Option<usize>,
}

/// An operation with several results, which only a recording can hold: candle's graph knows operations with one.
pub(crate) trait MultiOp: Send + Sync + 'static {
    /// The name that errors show.
    const NAME: &'static str;

    /// The results for untracked contiguous arguments.
    fn forward(&self, args: &[Tensor]) -> Result<Vec<Value>>;

    /// Gradients of the arguments for which `needs` is true, for the gradients of those results that have one. Reads the
    /// arguments and no result. All tensors are untracked and contiguous.
    fn backward(&self, args: &[Tensor], grads: &[Option<Tensor>], needs: &[bool]) -> Result<Vec<Option<Tensor>>>;
}

/// A [`DiffOp`] or [`MultiOp`] whose type is forgotten.
trait Recorded: Send + Sync {
    fn name(&self) -> &'static str;
    fn keeps(&self) -> Keeps;
    fn is_cheap(&self) -> bool;
    fn remembers(&self) -> bool;
    fn forward(&self, args: &[Tensor]) -> Result<Vec<Tensor>>;
    fn backward(
        &self,
        args: &[Tensor],
        results: &[Tensor],
        grads: &[Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>>;
}

impl<T: DiffOp> Recorded for T {
    fn name(&self) -> &'static str {
        T::NAME
    }
    fn keeps(&self) -> Keeps {
        T::KEEPS
    }
    fn is_cheap(&self) -> bool {
        T::CHEAP
    }
    fn remembers(&self) -> bool {
        T::REMEMBERS
    }
    fn forward(&self, args: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![compute(self, args)?.tensor()?])
    }
    fn backward(
        &self,
        args: &[Tensor],
        results: &[Tensor],
        grads: &[Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        match (results, grads) {
            ([result], [Some(grad)]) => gradients(self, args, result, grad, needs),
            _ => candle_core::bail!("{}: {} results of an operation with one", T::NAME, results.len()),
        }
    }
}

struct Multi<T>(T);

impl<T: MultiOp> Recorded for Multi<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }
    fn keeps(&self) -> Keeps {
        Keeps::Arguments
    }
    fn is_cheap(&self) -> bool {
        false
    }
    fn remembers(&self) -> bool {
        false
    }
    fn forward(&self, args: &[Tensor]) -> Result<Vec<Tensor>> {
        self.0.forward(args)?.into_iter().map(Value::tensor).collect()
    }
    fn backward(
        &self,
        args: &[Tensor],
        _: &[Tensor],
        grads: &[Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        self.0.backward(args, grads, needs)
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Op { op, args, outs } => write!(f, "{} {args:?} → {outs:?}", op.name()),
            Self::Foreign(slot) => write!(f, "candle → {slot}"),
        }
    }
}

/// Puts back what was being recorded before, however the block ends.
struct Outer(Option<Record>);

impl Drop for Outer {
    fn drop(&mut self) {
        RECORDING.set(self.0.take());
    }
}

/// Runs a block and records it. The result is a variable where any tracked tensor went into it, so that it can be the
/// tracked input of the next block as it is.
///
/// # Errors
/// What `f` returns, or a tensor operation's.
pub fn record<E: From<candle_core::Error>>(
    f: impl FnOnce() -> std::result::Result<Tensor, E>,
) -> std::result::Result<(Tensor, Record), E> {
    recorded(Record::default(), f)
}

fn recorded<E: From<candle_core::Error>>(
    record: Record,
    f: impl FnOnce() -> std::result::Result<Tensor, E>,
) -> std::result::Result<(Tensor, Record), E> {
    let outer = Outer(RECORDING.replace(Some(record)));
    let out = f();
    let record = RECORDING.take().unwrap_or_default();
    drop(outer);
    Ok(record.finished(out?)?)
}

/// Whether operations of this thread are being written down.
pub(crate) fn is_recording() -> bool {
    RECORDING.with_borrow(Option::is_some)
}

/// Writes an operation down and runs it, if a recording is under way.
pub(crate) fn run<T: DiffOp>(op: T, args: &[Tensor]) -> std::result::Result<Result<Tensor>, T> {
    // The recording is not borrowed while the operation runs: one may be made of others.
    if !is_recording() {
        return Err(op);
    }
    let run = || match again::skipped(T::NAME) {
        Some(standing_in) if T::REMEMBERS => op.remember(&detached(args)).and(standing_in),
        Some(standing_in) => standing_in,
        None => compute(&op, &detached(args))?.variable(),
    };
    Ok(run().inspect(|out| write_down(Arc::new(op), args, std::slice::from_ref(out))))
}

/// Runs an operation with several results, and writes it down where a recording is under way.
pub(crate) fn run_multi<T: MultiOp>(op: T, args: &[Tensor]) -> Result<Vec<Tensor>> {
    if !is_recording() || !args.iter().any(Tensor::track_op) {
        return op.forward(&detached(args))?.into_iter().map(Value::tensor).collect();
    }
    let outs = op.forward(&detached(args))?.into_iter().map(Value::variable).collect::<Result<Vec<_>>>()?;
    write_down(Arc::new(Multi(op)), args, &outs);
    Ok(outs)
}

fn detached(args: &[Tensor]) -> Vec<Tensor> {
    args.iter().map(Tensor::detach).collect()
}

fn write_down(op: Arc<dyn Recorded>, args: &[Tensor], outs: &[Tensor]) {
    RECORDING.with_borrow_mut(|record| {
        if let Some(record) = record {
            let args = args.iter().map(|a| record.slot(a)).collect();
            let entry = record.entries.len();
            let outs = outs.iter().map(|out| record.insert(out, out.detach(), true, Some(entry))).collect();
            record.entries.push(Entry::Op { op, args, outs });
        }
    });
}

impl Record {
    fn insert(&mut self, tensor: &Tensor, value: Tensor, tracked: bool, from: Option<usize>) -> usize {
        let slot = self.slots.len();
        self.index.insert(tensor.id(), slot);
        let (shape, dtype, device) = (tensor.shape().clone(), tensor.dtype(), tensor.device().clone());
        self.slots.push(Slot { id: tensor.id(), value: Some(value), shape, dtype, device, tracked, from });
        slot
    }

    fn slot(&mut self, t: &Tensor) -> usize {
        if let Some(&slot) = self.index.get(&t.id()) {
            return slot;
        }
        if !t.track_op() || t.is_variable() {
            return self.insert(t, t.detach(), t.track_op(), None);
        }
        let entry = self.entries.len();
        let slot = self.insert(t, t.clone(), true, Some(entry));
        self.entries.push(Entry::Foreign(slot));
        slot
    }

    /// Drops what the backward pass will not read.
    fn finished(mut self, out: Tensor) -> Result<(Tensor, Self)> {
        if !out.track_op() {
            return Ok((out, Self::default()));
        }
        self.out = Some(self.slot(&out));
        let out = if out.is_variable() { out } else { Var::from_tensor(&out.detach())?.into_inner() };
        let mut read = vec![false; self.slots.len()];
        let mut again = vec![false; self.slots.len()];
        for entry in self.entries.iter().rev() {
            match entry {
                Entry::Foreign(slot) => read[*slot] = true,
                Entry::Op { op, args, outs } => {
                    let mut remakes = false;
                    for &out in outs {
                        again[out] = op.is_cheap() && (read[out] || op.keeps() == Keeps::All);
                        read[out] |= op.keeps() == Keeps::All;
                        remakes |= again[out];
                    }
                    for &arg in args {
                        read[arg] |= op.keeps() != Keeps::Nothing || remakes;
                    }
                }
            }
        }
        for ((slot, read), again) in self.slots.iter_mut().zip(read).zip(again) {
            if slot.tracked && (!read || again) {
                slot.value = None;
            }
        }
        Ok((out, self))
    }

    /// Holds what the backward pass will read in `dtype` from now on: what operations made of tracked tensors, and `input`,
    /// the variable that the block was called with. Parameters stay as they are. What is read is widened again to its own
    /// type, so that a coarser `dtype` costs digits and no operation knows of it.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn hold_in(&mut self, dtype: DType, input: TensorId) -> Result<()> {
        for slot in &mut self.slots {
            let made = slot.from.is_some_and(|entry| matches!(self.entries[entry], Entry::Op { .. }));
            if let Some(value) = slot.value.as_mut().filter(|v| (made || slot.id == input) && v.dtype() != dtype) {
                *value = narrow::convert(value, dtype)?;
            }
        }
        Ok(())
    }

    /// Whether anything tracked went into the result.
    #[must_use]
    pub fn is_tracked(&self) -> bool {
        self.out.is_some()
    }

    /// The gradients of all variables that went into the block, by their ids, for the gradient `grad` of its result.
    /// Variables that nothing flowed to are left out.
    ///
    /// # Errors
    /// When `grad` has another shape than the result, or a tensor operation fails.
    pub fn backward(mut self, grad: &Tensor) -> Result<Vec<(TensorId, Tensor)>> {
        let Some(out) = self.out else { return Ok(Vec::new()) };
        if grad.shape() != &self.slots[out].shape {
            candle_core::bail!("backward: a gradient {:?} of a result {:?}", grad.shape(), self.slots[out].shape);
        }
        let mut grads: Vec<Option<Gradient>> = Vec::new();
        grads.resize_with(self.slots.len(), || None);
        grads[out] = Some(Gradient { value: grad.detach().contiguous()?, owned: false });
        let mut found = Vec::new();
        for entry in self.entries.clone().into_iter().rev() {
            match entry {
                Entry::Foreign(slot) => {
                    let gradient = grads[slot].take();
                    if let (Some(gradient), Some(value)) = (gradient, self.slots[slot].value.take()) {
                        self.through_candle(&value, &gradient.value, &mut grads, &mut found)?;
                    }
                }
                Entry::Op { op, args, outs } => {
                    let gradients: Vec<_> = outs.iter().map(|&out| grads[out].take()).collect();
                    if gradients.iter().any(Option::is_some) {
                        self.through(op.as_ref(), &args, &outs, gradients, &mut grads)?;
                    }
                    // All that read them came later and are done.
                    for out in outs {
                        self.slots[out].value = None;
                    }
                }
            }
        }
        found.extend(self.slots.iter().zip(grads).filter_map(|(slot, g)| Some((slot.id, g?.value))));
        Ok(found)
    }

    fn through_candle(
        &self,
        value: &Tensor,
        grad: &Tensor,
        grads: &mut [Option<Gradient>],
        found: &mut Vec<(TensorId, Tensor)>,
    ) -> Result<()> {
        let store = seed(value, grad)?.backward()?;
        for (id, grad) in store.get_ids().filter_map(|id| Some((*id, store.get_id(*id)?.detach()))) {
            match self.index.get(&id) {
                Some(&slot) if self.slots[slot].tracked => {
                    // It may share its memory with another gradient.
                    Gradient { value: grad.contiguous()?, owned: false }.add_to(&mut grads[slot])?;
                }
                Some(_) => {}
                // A variable that candle's operations alone read may be reached by several parts of its graph.
                None => match found.iter_mut().find(|(known, _)| *known == id) {
                    Some((_, sum)) => *sum = crate::add(sum, &grad)?,
                    None => found.push((id, grad)),
                },
            }
        }
        Ok(())
    }

    fn through(
        &mut self,
        op: &dyn Recorded,
        args: &[usize],
        outs: &[usize],
        gradients: Vec<Option<Gradient>>,
        grads: &mut [Option<Gradient>],
    ) -> Result<()> {
        let needs: Vec<bool> = args.iter().map(|&a| self.slots[a].tracked).collect();
        let reads = op.keeps() != Keeps::Nothing;
        let values = args.iter().map(|&a| self.value(a, reads)).collect::<Result<Vec<Tensor>>>()?;
        let reads = op.keeps() == Keeps::All;
        let made = outs.iter().map(|&out| self.value(out, reads)).collect::<Result<Vec<Tensor>>>()?;
        let upstream: Vec<Option<Tensor>> = gradients.into_iter().map(|g| g.map(|g| g.value)).collect();
        let results = op.backward(&values, &made, &upstream, &needs)?;
        if results.len() != args.len() {
            candle_core::bail!("{}: {} gradients for {} arguments", op.name(), results.len(), args.len());
        }
        // A gradient may be handed through, to several arguments even; then none of them owns it.
        let memory: Vec<Option<usize>> = results.iter().map(|r| r.as_ref().map(address)).collect();
        let handed: Vec<usize> = upstream.iter().flatten().map(address).collect();
        drop(upstream);
        for (i, ((&arg, need), result)) in args.iter().zip(needs).zip(results).enumerate() {
            let Some(value) = result.filter(|_| need) else { continue };
            let alone = memory.iter().filter(|m| **m == memory[i]).count() == 1;
            let owned = alone && memory[i].is_none_or(|m| !handed.contains(&m));
            Gradient { value: value.detach().contiguous()?, owned }.add_to(&mut grads[arg])?;
        }
        Ok(())
    }

    /// The value in a slot, made again if it was dropped; something of its shape and of no memory where it is not read.
    fn value(&mut self, slot: usize, read: bool) -> Result<Tensor> {
        let Slot { value, shape, dtype, device, from, .. } = &self.slots[slot];
        if let Some(value) = value {
            let value = narrow::convert(value, *dtype)?;
            return Ok(value);
        }
        if !read {
            return Tensor::zeros((), *dtype, device)?.broadcast_as(shape.clone());
        }
        let Some(Entry::Op { op, args, outs }) = from.and_then(|entry| self.entries.get(entry)).cloned() else {
            candle_core::bail!("tape: a tensor that is read was dropped")
        };
        let args = args.into_iter().map(|a| self.value(a, true)).collect::<Result<Vec<_>>>()?;
        let made = outs
            .iter()
            .position(|&out| out == slot)
            .and_then(|i| op.forward(&args).map(|r| r.get(i).cloned()).transpose());
        let Some(value) = made.transpose()? else { candle_core::bail!("{}: a result is missing", op.name()) };
        self.slots[slot].value = Some(value.detach());
        Ok(value)
    }
}

/// Where a tensor's elements lie.
fn address(t: &Tensor) -> usize {
    let (storage, _) = t.storage_and_layout();
    std::ptr::from_ref(&*storage).addr()
}

/// A gradient under way, and whether it may be added to in place.
struct Gradient {
    value: Tensor,
    owned: bool,
}

impl Gradient {
    fn add_to(self, to: &mut Option<Self>) -> Result<()> {
        *to = Some(match to.take() {
            None => self,
            Some(sum) if sum.owned => sum.plus(&self.value)?,
            Some(sum) if self.owned => self.plus(&sum.value)?,
            Some(sum) => Self { value: crate::add(&sum.value, &self.value)?, owned: true },
        });
        Ok(())
    }

    fn plus(self, other: &Tensor) -> Result<Self> {
        if is_cpu_f32(&self.value) && is_cpu_f32(other) {
            self.value.inplace_op2(other, &AddInPlace)?;
            return Ok(self);
        }
        Ok(Self { value: (&self.value + other)?.detach(), owned: true })
    }
}

struct AddInPlace;

impl InplaceOp2 for AddInPlace {
    fn name(&self) -> &'static str {
        "add_in_place"
    }

    fn cpu_fwd(&self, to: &mut CpuStorage, to_layout: &Layout, from: &CpuStorage, layout: &Layout) -> Result<()> {
        let Some((start, end)) = to_layout.contiguous_offsets() else {
            candle_core::bail!("add_in_place: a gradient is not contiguous")
        };
        let CpuStorage::F32(to) = to else { candle_core::bail!("add_in_place: not f32") };
        let (to, from) = (&mut to[start..end], View::new(from, layout)?.data);
        cpu::for_row_blocks(to, 1, 2, |first, block| {
            block.iter_mut().zip(&from[first..]).for_each(|(t, f)| *t += f);
        });
        Ok(())
    }
}
