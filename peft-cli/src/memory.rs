//! How much memory a training step takes, and how many blocks may keep their record within a budget.

use anyhow::{Result, bail};
use candle_core::DType;
use peft_core::{Adapter, BaseModel, Segmented, Task};
use peft_models::AnyModel;
use peft_train::{Checkpointing, Keep, LOGIT_ROWS};

use crate::sample;

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
    let sum = parts.fixed + optimizer + parts.records + parts.working + parts.logits;
    // Pages that the allocator holds between buffers of many sizes: up to 15 % in measured steps, and a budget must hold.
    sum + sum / 6
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
    let sum = whole.fixed + 4 * adapter.trainable_elements() as u64 + whole.working + whole.logits;
    sum + sum / 6
}

/// The policy that `gradient_checkpointing = "auto"` stands for: as many blocks keep their record as fit into the budget,
/// or into half of the memory that is free.
///
/// # Errors
/// When the budget is not a size, or not enough even if every block runs again.
pub(crate) fn auto_checkpointing(
    model: &AnyModel,
    adapter: &Adapter,
    batch: &LongestBatch,
    records: DType,
    budget: Option<&str>,
) -> Result<Checkpointing> {
    let peak = |n| estimate(model, adapter, batch, Keep { checkpointing: Checkpointing::KeepTop(n), records });
    let limit = match budget {
        Some(text) => parse_size(text)?,
        None => model.nbytes() as u64 + sample::available_memory().unwrap_or(u64::MAX / 2) / 2,
    };
    if budget.is_some() && peak(0) > limit {
        bail!(
            "`train.memory_budget` of {:.0} MB is too small: a step takes about {:.0} MB even with every block run again; \
             lower train.batch_size (and raise train.gradient_accumulation) or data.max_length",
            limit as f64 / 1e6,
            peak(0) as f64 / 1e6
        );
    }
    let blocks = model.num_blocks();
    Ok(match (0..=blocks).rev().find(|&n| peak(n) <= limit) {
        Some(n) if n == blocks => Checkpointing::Off,
        Some(n) if n > 0 => Checkpointing::KeepTop(n),
        _ => Checkpointing::Full,
    })
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
