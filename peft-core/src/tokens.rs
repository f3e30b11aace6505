//! Rows of a table of tokens that are trained themselves, in place of the table's own (PEFT `tuners/trainable_tokens`).

use candle_core::{DType, Tensor};
use peft_kernels::{self as kernels, ServingForm};
use serde_json::Value;

use crate::ctx::Ctx;
use crate::error::{Error, Result};
use crate::layers::{FrozenEmbedding, FrozenLinear};
use crate::module::{Delta, EmbeddingModule, FrozenLogits, PeftModule};
use crate::param::Parameter;

/// The ids in a config's list of tokens.
///
/// # Errors
/// What is no list of ids, is empty, or names a token twice; the message names `key`.
pub fn token_ids(key: &str, value: &Value) -> Result<Vec<u32>> {
    let list = value.as_array().ok_or_else(|| Error::config(key, format!("{value} is not a list of token ids")))?;
    let ids = list.iter().map(|x| {
        let id = x.as_u64().and_then(|x| u32::try_from(x).ok());
        id.ok_or_else(|| Error::config(key, format!("{x} is not a token id")))
    });
    let ids = ids.collect::<Result<Vec<u32>>>()?;
    let mut seen = std::collections::HashSet::new();
    match ids.iter().find(|id| !seen.insert(**id)) {
        Some(twice) => Err(Error::config(key, format!("lists token {twice} twice"))),
        None if ids.is_empty() => Err(Error::config(key, "is empty; leave it out, or name the tokens to train")),
        None => Ok(ids),
    }
}

/// `weight: [tokens, dim]` with the rows of `ids` replaced, in `f32`.
fn with_rows(weight: &Tensor, ids: &[u32], rows: &Parameter) -> Result<Tensor> {
    let which: Vec<(usize, usize)> = ids.iter().enumerate().map(|(row, &id)| (id as usize, row)).collect();
    Ok(kernels::replace_rows(weight, &rows.value().to_dtype(DType::F32)?, &which)?)
}

/// `logits: [rows, tokens]` of a frozen table with those of `ids` made by trained rows from `hidden: [rows, dim]`.
fn with_columns(logits: &Tensor, hidden: &Tensor, ids: &[u32], rows: &Tensor) -> Result<Tensor> {
    let which: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
    Ok(kernels::replace_columns(logits, &kernels::trainable_linear(hidden, rows)?, &which)?)
}

/// Chosen rows of an embedding, replaced by trained ones (PEFT calls the replacement rows `trainable_tokens_delta`).
/// A head that is tied to the embedding follows them.
#[derive(Debug)]
pub struct TrainedTokens {
    ids: Vec<u32>,
    rows: Parameter,
    tied: bool,
}

impl TrainedTokens {
    /// `rows: [ids.len(), dim]` in place of the rows `ids`; with `tied`, the output head shares the embedding's table.
    #[must_use]
    pub fn new(ids: Vec<u32>, rows: Parameter, tied: bool) -> Self {
        Self { ids, rows, tied }
    }
}

impl EmbeddingModule for TrainedTokens {
    fn forward(&self, base: &FrozenEmbedding, ids: &[u32], ctx: &Ctx<'_>) -> Result<Tensor> {
        let y = base.base(ids)?;
        let which: Vec<(usize, usize)> = ids
            .iter()
            .enumerate()
            .filter_map(|(token, id)| self.ids.iter().position(|t| t == id).map(|row| (token, row)))
            .collect();
        Ok(kernels::replace_rows(&y, &self.rows.get(ctx), &which)?)
    }

    fn tied_logits(&self, hidden: &Tensor, frozen: &FrozenLogits<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        with_columns(&frozen()?, hidden, &self.ids, &self.rows.get(ctx))
    }

    fn changes_tied_head(&self) -> bool {
        self.tied
    }

    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.rows]
    }

    fn merge(&self, weight: &Tensor) -> Result<Tensor> {
        with_rows(weight, &self.ids, &self.rows)
    }
}

/// Chosen rows of an output head without a bias, replaced by trained ones.
#[derive(Debug)]
pub struct TrainedHeadRows {
    ids: Vec<u32>,
    rows: Parameter,
}

impl TrainedHeadRows {
    /// `rows: [ids.len(), in]` in place of the weight's rows `ids`.
    #[must_use]
    pub fn new(ids: Vec<u32>, rows: Parameter) -> Self {
        Self { ids, rows }
    }
}

impl PeftModule for TrainedHeadRows {
    fn forward(&self, base: &FrozenLinear, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        with_columns(&base.base(x)?, x, &self.ids, &self.rows.get(ctx))
    }

    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.rows]
    }

    fn delta(&self, base: &FrozenLinear) -> Result<Delta> {
        let weight = with_rows(&base.weight().to_dense(DType::F32)?, &self.ids, &self.rows)?;
        Ok(Delta::Replace { weight, bias: None })
    }

    fn lower(&self, _: &FrozenLinear) -> Result<Option<ServingForm>> {
        Ok(None)
    }
}
