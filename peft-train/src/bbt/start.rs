//! Where a search begins: the adapter's prompt, or hidden states of one in front of every block.

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::{Adapter, Error, Parameter, Result, Segmented};
use peft_prompt::{PROMPT_EMBEDDINGS, word_embedding};

use super::{Bbt, BbtConfig, Depth, PURPOSE, StartRows};
use crate::prefix_start::{embed, set_keys_values};

/// Tokens of the vocabulary whose embeddings and hidden states stand for those of all.
const SAMPLE: usize = 256;

/// The search for the virtual tokens of `adapter`. A prompt starts where it is. A prefix becomes the keys and values of a prompt in
/// front of every block, whose start are the hidden states of `text` (cut or repeated to the number of virtual tokens) or, if that
/// has no tokens, of random ones: before the first generation it does what a prompt of these tokens' embeddings does. The adapter is
/// set to it.
///
/// # Errors
/// An adapter that trains something else than virtual tokens, a base without deep prompts, a setting out of range; the message names
/// the key.
pub fn start<M: Segmented>(model: &M, adapter: &Adapter, config: BbtConfig, text: &[u32]) -> Result<Bbt> {
    let parameter = prompt_of(adapter)?;
    let tokens = adapter.virtual_tokens().filter(|tokens| tokens.count > 0);
    let tokens = tokens.ok_or_else(|| Error::config("num_virtual_tokens", "is 0; bbt searches virtual tokens"))?;
    let table = word_embedding(model)?;
    let drawn = Stream { seed: config.seed ^ PURPOSE, step: u32::MAX, site: 0 };
    let vocabulary = table.weight().out_features() as u64;
    // The word scaled down: every token as likely as another up to 2⁻³².
    let draw = |i: usize| ((u64::from(drawn.word(i as u64)) * vocabulary) >> 32) as u32;
    let most = model.prompt_dims().map_or(SAMPLE, |dims| dims.max_positions.min(SAMPLE));
    let sample: Vec<u32> = (0..most).map(draw).collect();
    if tokens.is_prompt() {
        let deviation = deviation(&table.base(&sample)?)?;
        return Bbt::new(config, Depth::Embeddings, &[StartRows { rows: parameter.value(), deviation }]);
    }
    let ids: Vec<u32> = match text {
        [] => (most..most + tokens.count).map(draw).collect(),
        text => text.iter().copied().cycle().take(tokens.count).collect(),
    };
    let mut others = embed(model, &sample)?;
    let mut starts = Vec::with_capacity(model.num_blocks());
    for (block, rows) in set_keys_values(model, parameter, &ids)?.into_iter().enumerate() {
        starts.push(StartRows { rows, deviation: deviation(&others)? });
        [others, _, _] = model.keys_values(block, &others)?;
    }
    Bbt::new(config, Depth::EveryBlock, &starts)
}

/// Puts what a block makes of `rows` into the keys and values of a prefix `[tokens, layers · 2 · width]`.
///
/// # Errors
/// When a tensor operation fails.
pub(crate) fn write_block<M: Segmented>(model: &M, prefix: &Parameter, block: usize, rows: &Tensor) -> Result<()> {
    let [_, keys, values] = model.keys_values(block, &rows.to_device(model.device())?)?;
    let both = Tensor::cat(&[keys, values], 1)?.to_dtype(DType::F32)?.contiguous()?;
    let at = block * both.dim(1)?;
    Ok(prefix.var().slice_set(&both, 1, at)?)
}

/// The one parameter of an adapter of virtual tokens.
pub(crate) fn prompt_of(adapter: &Adapter) -> Result<&Parameter> {
    match adapter.parameters().as_slice() {
        [only] if only.name() == PROMPT_EMBEDDINGS => Ok(*only),
        all => {
            let what = match all.iter().find(|p| p.name() != PROMPT_EMBEDDINGS) {
                Some(other) => format!("this adapter trains `{}`", other.name()),
                None => "this adapter has none".to_owned(),
            };
            let message = format!(
                "train.optimizer = \"bbt\" searches virtual tokens alone, and {what}: use method.type = \"prompt\", or \"prefix\" \
                 (without prefix_projection) for a prompt in front of every block, and no modules_to_save"
            );
            Err(Error::config("method.type", message))
        }
    }
}

/// The standard deviation of all elements, those cut off that are farther than three of it from their mean: the few huge elements
/// of a decoder's first token say nothing of the others.
fn deviation(rows: &Tensor) -> Result<f64> {
    let all = rows.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let moments = |low: f64, high: f64| {
        let cut = all.iter().map(|&x| f64::from(x).clamp(low, high));
        let count = all.len().max(1) as f64;
        let mean = cut.clone().sum::<f64>() / count;
        (mean, (cut.map(|x| (x - mean).powi(2)).sum::<f64>() / count).sqrt())
    };
    let (mean, first) = moments(f64::MIN, f64::MAX);
    Ok(moments(mean - 3.0 * first, mean + 3.0 * first).1)
}
