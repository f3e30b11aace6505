//! How much memory a training step takes, and how many blocks may keep their record within a budget.

use anyhow::{Result, bail};
use candle_core::DType;
use peft_core::{Adapter, BaseModel, Segmented, Task};
use peft_models::AnyModel;
use peft_train::{Checkpointing, Keep, LOGIT_ROWS};

use crate::device;

/// Bytes that the record of one block keeps for `tokens` tokens, in `dtype`: what its operations read in the backward pass
/// and do not make again.
fn block_bytes(model: &AnyModel, tokens: usize, dtype: DType) -> u64 {
    let w = model.block_widths();
    // The residual stream before attention and before the MLP; rotated queries and keys, values, the attention's result;
    // gate and up.
    let activations = 2 * w.hidden + 2 * w.query + 2 * w.key_value + w.mlp;
    // Attention's row statistics stay f32.
    (tokens * (activations * dtype.size_in_bytes() + w.heads * 4)) as u64
}

/// Bytes that one block's backward pass has at a time besides its record: what is made again, and gradients.
fn working_bytes(model: &AnyModel, tokens: usize) -> u64 {
    let w = model.block_widths();
    let floats = 6 * w.hidden + 2 * w.query + 2 * w.key_value + 2 * w.mlp;
    (tokens * floats * 4) as u64
}

/// Bytes of one block's input as it waits.
fn input_bytes(model: &AnyModel, tokens: usize, dtype: DType) -> u64 {
    (tokens * model.block_widths().hidden * dtype.size_in_bytes()) as u64
}

/// The largest micro-batch of a run.
pub(crate) struct LongestBatch {
    pub(crate) tokens: usize,
    /// Rows of data, where they are not packed.
    pub(crate) sequences: usize,
}

/// Estimated peak of a training step in bytes: weights, adapter with gradients and two moments, kept records, and the
/// working memory of one block's backward pass and of the logits.
pub(crate) fn estimate(model: &AnyModel, adapter: &Adapter, batch: &LongestBatch, keep: Keep) -> u64 {
    let parts = estimate_parts(model, adapter, batch, keep);
    let optimizer = 4 * 4 * adapter.trainable_elements() as u64;
    parts.fixed + optimizer + parts.records + parts.working + parts.logits
}

/// What a budget has to have for such a peak: pages that the allocator holds between buffers of many sizes are up to 15 % of
/// measured steps, and a budget must hold.
fn with_headroom(peak: u64) -> u64 {
    peak + peak / 6
}

/// What a step's memory consists of, in bytes.
struct Parts {
    /// Weights and the process.
    fixed: u64,
    /// What waits for the backward pass, and one block's record that is made again.
    records: u64,
    /// One block's working memory.
    working: u64,
    logits: u64,
}

fn estimate_parts(model: &AnyModel, adapter: &Adapter, batch: &LongestBatch, keep: Keep) -> Parts {
    let blocks = model.num_blocks() as u64;
    let (tokens, prefixed) = match adapter.virtual_tokens() {
        // Where tokens look both ways, each sequence has rows of its own for a prompt.
        Some(prompt) if prompt.is_prompt() && !matches!(model, AnyModel::Decoder(_)) => {
            (batch.tokens.saturating_add(prompt.count.saturating_mul(batch.sequences)), false)
        }
        Some(virtual_tokens) => (batch.tokens + virtual_tokens.count, !virtual_tokens.is_prompt()),
        None => (batch.tokens, false),
    };
    // Attention keeps a second copy of keys and values, with those of a prefix behind.
    let key_value_size = model.prompt_dims().map_or(0, |d| d.key_value_size());
    let copies = if prefixed { (tokens * 2 * key_value_size * 4) as u64 } else { 0 };
    let record = block_bytes(model, tokens, keep.records) + copies;
    let kept = match keep.checkpointing {
        Checkpointing::Off => blocks,
        Checkpointing::Full => 0,
        Checkpointing::KeepTop(n) => (n as u64).min(blocks),
    };
    let records = kept * record + (blocks - kept.min(blocks)) * input_bytes(model, tokens, keep.records);
    // A block that runs again has its record only then.
    let again = if kept < blocks { block_bytes(model, tokens, DType::F32) + copies } else { 0 };
    let width = match model.task() {
        Task::CausalLm | Task::Seq2SeqLm => model.vocab_size(),
        Task::Head { outputs, .. } => outputs,
    };
    // Their gradient takes their place.
    let logits = (tokens.min(LOGIT_ROWS) * width * 4) as u64;
    Parts {
        fixed: model.nbytes() as u64 + (40 << 20),
        records: records + again,
        working: working_bytes(model, tokens),
        logits,
    }
}

/// Estimated peak of a step of forward passes alone: weights, adapter, one block's activations and the logits.
pub(crate) fn estimate_forward(model: &AnyModel, adapter: &Adapter, batch: &LongestBatch) -> u64 {
    let keep = Keep { checkpointing: Checkpointing::KeepTop(usize::MAX), records: DType::F32 };
    let whole = estimate_parts(model, adapter, batch, keep);
    whole.fixed + 4 * adapter.trainable_elements() as u64 + whole.working + whole.logits
}

/// What a step may hold, and what is to be found out about it.
pub(crate) struct Wanted<'a> {
    /// Which blocks keep their record; `None` is `gradient_checkpointing = "auto"`.
    pub(crate) checkpointing: Option<Checkpointing>,
    /// The type of records.
    pub(crate) records: DType,
    /// `train.memory_budget`.
    pub(crate) budget: Option<&'a str>,
    /// Rows of a micro-batch.
    pub(crate) rows: usize,
    /// Whether its loss is a sum over them, so that they may go in parts.
    pub(crate) in_parts: bool,
}

/// How a step fits into its budget, or into what is free of a card's memory or half of a machine's: as many rows at a time as there is
/// room for if no more is kept than has to be, then as many blocks that keep their record. Neither changes a step's result. `longest` is the largest batch of so many
/// rows. Returns what is kept, and the rows at a time.
///
/// # Errors
/// When the budget is not a size, or not enough for one row.
pub(crate) fn fit(
    model: &AnyModel,
    adapter: &Adapter,
    wanted: &Wanted<'_>,
    longest: impl Fn(usize) -> LongestBatch,
) -> Result<(Keep, usize)> {
    let keep = |checkpointing| Keep { checkpointing, records: wanted.records };
    let peak = |rows, checkpointing| with_headroom(estimate(model, adapter, &longest(rows), keep(checkpointing)));
    let free = || device::free_memory(model.device());
    let limit = match wanted.budget {
        Some(text) => Some(parse_size(text)?),
        // What the driver and other processes take between now and then.
        None if model.device().is_cuda() => free().map(|free| model.nbytes() as u64 + free / 10 * 9),
        None => free().map(|free| model.nbytes() as u64 + free / 2),
    };
    let limit = limit.unwrap_or(u64::MAX / 2);
    let least = wanted.checkpointing.unwrap_or(Checkpointing::Full);
    // On a CPU what is free now says little about later, and a batch in parts is slower.
    let may_part = wanted.in_parts && (wanted.budget.is_some() || model.device().is_cuda());
    let parts = 1..=if may_part { wanted.rows.max(1) } else { 1 };
    let rows = parts.map(|parts| wanted.rows.div_ceil(parts)).find(|&rows| peak(rows, least) <= limit);
    let rows = match rows {
        Some(rows) => rows,
        None if wanted.budget.is_some() => {
            let (at_a_time, way_out) = match may_part {
                true => ("one row at a time", "lower data.max_length"),
                false => ("", "lower train.batch_size (and raise train.gradient_accumulation) or data.max_length"),
            };
            let again = if least == Checkpointing::Full { "with every block run again" } else { "" };
            let even = [again, at_a_time].into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(", ");
            bail!(
                "`train.memory_budget` of {:.0} MB is too small: a step wants about {:.0} MB{}{even}; {way_out}",
                limit as f64 / 1e6,
                peak(if may_part { 1 } else { wanted.rows }, least) as f64 / 1e6,
                if even.is_empty() { "" } else { " even " },
            )
        }
        // It may go well all the same, and where it doesn't the step is made again with less.
        None => wanted.rows,
    };
    let blocks = model.num_blocks();
    let checkpointing = wanted.checkpointing.unwrap_or_else(|| {
        match (0..=blocks).rev().find(|&n| peak(rows, Checkpointing::KeepTop(n)) <= limit) {
            Some(n) if n == blocks => Checkpointing::Off,
            Some(n) if n > 0 => Checkpointing::KeepTop(n),
            _ => Checkpointing::Full,
        }
    });
    Ok((keep(checkpointing), rows))
}

fn parse_size(text: &str) -> Result<u64> {
    let units = [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("GB", 1_000_000_000), ("MB", 1_000_000)];
    for (unit, bytes) in units {
        if let Some(number) = text.trim().strip_suffix(unit)
            && let Ok(n) = number.trim().parse::<f64>()
            && n.is_finite()
            && n > 0.0
        {
            return Ok((n * bytes as f64) as u64);
        }
    }
    bail!("`train.memory_budget` = \"{text}\" is not a size; write for example \"4GiB\"")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("2GiB").unwrap(), 2 << 30);
        assert_eq!(parse_size("1.5 MB").unwrap(), 1_500_000);
        for bad in ["2", "GiB", "-1GiB", "nanGiB", "2TiB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
