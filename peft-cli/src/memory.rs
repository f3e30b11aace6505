//! How much memory a training step takes, and how many blocks may keep their graph within a budget.

use anyhow::{Result, bail};
use peft_core::{Adapter, Segmented};
use peft_models::Decoder;
use peft_train::Checkpointing;

use crate::sample;

/// Bytes that the graph of one block keeps for `tokens` tokens: what each operation holds for its backward pass.
fn block_bytes(model: &Decoder, tokens: usize) -> u64 {
    let c = model.config();
    // Residual stream: leaf, two normed inputs, two projections and two sums; queries and keys before and after the
    // rotation, values, the attention's result and its row statistics; gate, up and their product.
    let floats = 7 * c.hidden_size
        + 3 * c.query_size()
        + 3 * c.key_value_size()
        + c.num_attention_heads
        + 3 * c.intermediate_size;
    (tokens * floats * 4) as u64
}

/// Bytes of one block's input.
fn input_bytes(model: &Decoder, tokens: usize) -> u64 {
    (tokens * model.config().hidden_size * 4) as u64
}

/// Estimated peak of a training step in bytes: weights, adapter with gradients and two moments, kept graphs, and the
/// working memory of one block's backward pass and of the logits.
pub(crate) fn estimate(model: &Decoder, adapter: &Adapter, tokens: usize, checkpointing: Checkpointing) -> u64 {
    let blocks = model.num_blocks() as u64;
    let kept = match checkpointing {
        Checkpointing::Off => blocks,
        Checkpointing::Full => 0,
        Checkpointing::KeepTop(n) => n as u64,
    };
    let graphs = kept * block_bytes(model, tokens) + (blocks - kept.min(blocks)) * input_bytes(model, tokens);
    let logits = 2 * (tokens.min(256) * model.vocab_size() * 4) as u64;
    let optimizer = 4 * 4 * adapter.trainable_elements() as u64;
    let process = 40 << 20;
    model.nbytes() as u64 + optimizer + graphs + 2 * block_bytes(model, tokens) + logits + process
}

/// The policy that `gradient_checkpointing = "auto"` stands for: as many blocks keep their graph as fit.
///
/// # Errors
/// When the budget is not a size.
pub(crate) fn auto_checkpointing(model: &Decoder, tokens: usize, budget: Option<&str>) -> Result<Checkpointing> {
    let budget = match budget {
        Some(text) => parse_size(text)?.saturating_sub(model.nbytes() as u64),
        None => sample::available_memory().unwrap_or(u64::MAX) / 2,
    };
    let blocks = model.num_blocks() as u64;
    let (graph, input) = (block_bytes(model, tokens).max(1), input_bytes(model, tokens));
    let room = budget.saturating_sub(2 * graph + blocks * input);
    let kept = room / graph.saturating_sub(input).max(1);
    Ok(match kept {
        n if n >= blocks => Checkpointing::Off,
        0 => Checkpointing::Full,
        n => Checkpointing::KeepTop(n as usize),
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
