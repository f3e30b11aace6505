//! A model of the same shape as another, but for one or two numbers, with random weights.

use anyhow::{Context, Result};
use peft_models::ModelFiles;
use peft_models::config::DecoderConfig;

/// The shape of `config` with other numbers of blocks or of tokens in the vocabulary.
///
/// # Errors
/// When the shape is not one that the model family has.
pub fn random(config: &DecoderConfig, layers: Option<usize>, vocab: Option<usize>) -> Result<ModelFiles> {
    let mut json = config.to_hf_json();
    for (key, value) in [("num_hidden_layers", layers), ("vocab_size", vocab)] {
        if let Some(n) = value {
            json.insert(key.into(), n.into());
        }
    }
    // Its one file is read at once, so the folder need not stay.
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("config.json"), serde_json::to_vec(&json)?)?;
    ModelFiles::open_random(dir.path()).context("a model of that shape")
}
