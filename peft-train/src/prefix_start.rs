//! A prefix that starts from what the base makes of a text.

use candle_core::{DType, Tensor};
use peft_core::{Adapter, AdapterSet, Ctx, Error, Parameter, Result, Route, Segmented, TokenBatch};
use peft_prompt::PROMPT_EMBEDDINGS;

/// Sets a prefix to the keys and values that the base has for the first tokens of `text`, as PEFT's `initialize_kv_prefix_from_text`
/// (`peft/tuners/prefix_tuning`) does: a fresh adapter then acts as if the text stood in front of every sequence.
///
/// # Errors
/// An adapter that is no prefix, or one made by a network; a text with fewer tokens than the prefix; a base without keys and values of its
/// own for such rows. The message names the key.
pub fn start_prefix<M: Segmented>(model: &M, adapter: &Adapter, text: &[u32]) -> Result<()> {
    let no_prefix = || Error::config("method.init_text", "is for method.type = \"prefix\" without prefix_projection");
    let prefix = adapter.virtual_tokens().filter(|tokens| !tokens.is_prompt()).ok_or_else(no_prefix)?;
    let parameters = adapter.parameters();
    let rows = parameters.iter().find(|p| p.name() == PROMPT_EMBEDDINGS).ok_or_else(no_prefix)?;
    let Some(ids) = text.get(..prefix.count) else {
        let message = format!(
            "has {} tokens and num_virtual_tokens is {}: give a longer text, or a smaller number",
            text.len(),
            prefix.count
        );
        return Err(Error::config("method.init_text", message));
    };
    set_keys_values(model, rows, ids).map(drop)
}

/// Sets `prefix` (`[tokens, layers · 2 · width]`) to the keys and values of `ids`, and gives the hidden states before every block.
pub(crate) fn set_keys_values<M: Segmented>(model: &M, prefix: &Parameter, ids: &[u32]) -> Result<Vec<Tensor>> {
    let (mut before, mut both) = (vec![embed(model, ids)?], Vec::new());
    for block in 0..model.num_blocks() {
        let [above, keys, values] = model.keys_values(block, &before[block])?;
        both.extend([keys, values]);
        before.push(above);
    }
    before.pop();
    prefix.set(&Tensor::cat(&both, 1)?.to_dtype(DType::F32)?)?;
    Ok(before)
}

/// Hidden states before the first block of a sequence.
pub(crate) fn embed<M: Segmented>(model: &M, ids: &[u32]) -> Result<Tensor> {
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    let set = AdapterSet::empty();
    let batch = TokenBatch { ids, positions: &positions, bounds: &[0, ids.len()], types: &[] };
    model.embed(batch, &Ctx::eval(&set, &Route::Base))
}
