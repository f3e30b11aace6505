//! Text to token ids and back.
//!
//! A [`Tokenizer`] comes from a Hugging Face folder (`tokenizer.json` and the files beside it) or from the metadata of
//! a GGUF file, and always runs on the `tokenizers` library, so that ids are those of transformers. What transformers
//! keeps in the files beside `tokenizer.json` (special tokens, the chat template, generation's end tokens) is kept here
//! too. Truncation and padding settings inside `tokenizer.json` are switched off: callers decide about both.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

mod folder;
mod from_gguf;
mod pre;
mod to_gguf;

/// Why a tokenizer could not be loaded, used or saved.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] peft_core::Error),
    /// A file cannot be read, or a folder not made.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file is absent, corrupt, or says something that cannot be honoured.
    #[error("{}: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The `tokenizers` library refused a text or a list of ids.
    #[error("tokenizer: {reason}")]
    Tokenizers {
        /// The library's message.
        reason: String,
    },
}

/// Where a tokenizer came from, which decides what saving writes.
#[derive(Debug, Clone)]
enum Origin {
    /// A folder; its files are copied.
    Folder(PathBuf),
    /// A GGUF file with this `tokenizer.ggml.pre`; files are made from memory.
    Gguf { pre: Option<String> },
}

/// A tokenizer with what transformers knows about it.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    bos_token_id: Option<u32>,
    eos_token_ids: Vec<u32>,
    pad_token_id: Option<u32>,
    unk_token_id: Option<u32>,
    chat_template: Option<String>,
    /// `tokenizer_config.json` as read or as it will be written.
    config: Map<String, Value>,
    origin: Origin,
}

impl Tokenizer {
    /// The token ids of `text`. With `add_special`, the tokens that the tokenizer's post-processor puts around a
    /// sequence (a begin token for Llama, none for most others) are added.
    ///
    /// Special tokens written out in the text, such as `<|im_start|>`, become their ids.
    ///
    /// # Errors
    /// The text cannot be tokenised.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(failure)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, without special tokens if `skip_special`. Ids without a token are skipped.
    ///
    /// # Errors
    /// The decoder refuses the tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.inner.decode(ids, skip_special).map_err(failure)
    }

    /// The id of the token that begins a sequence.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos_token_id
    }

    /// The id of the token that closes a completion.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos_token_ids.first().copied()
    }

    /// Ids that end generation: the tokenizer's own first, then those of `generation_config.json`.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// The id of the padding token.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.pad_token_id
    }

    /// The id that stands for what the vocabulary cannot express.
    pub fn unk_token_id(&self) -> Option<u32> {
        self.unk_token_id
    }

    /// The token that begins a sequence, as chat templates name it.
    pub fn bos_token(&self) -> Option<String> {
        self.token(self.bos_token_id?)
    }

    /// The token that closes a completion, as chat templates name it.
    pub fn eos_token(&self) -> Option<String> {
        self.token(self.eos_token_id()?)
    }

    /// The padding token.
    pub fn pad_token(&self) -> Option<String> {
        self.token(self.pad_token_id?)
    }

    /// The unknown token.
    pub fn unk_token(&self) -> Option<String> {
        self.token(self.unk_token_id?)
    }

    /// The chat template in Jinja, if the tokenizer has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The token behind an id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Number of tokens, added ones included. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The `tokenizers` object, for streaming decoders and offsets. A vocabulary is megabytes: clone the pointer.
    pub fn inner(&self) -> &Arc<tokenizers::Tokenizer> {
        &self.inner
    }
}

/// Parses a `tokenizer.json`; the error is the reason.
fn parse(bytes: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    // The library panics on some malformed files: on most of them because it expects JSON to be well-formed.
    serde_json::from_slice::<serde::de::IgnoredAny>(bytes).map_err(|error| error.to_string())?;
    std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes))
        .map_err(|_| "the tokenizers library cannot handle it".to_owned())?
        .map_err(|error| error.to_string())
}

fn failure(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Tokenizers { reason: error.to_string() }
}

fn invalid(path: &Path, reason: impl Into<String>) -> TokenizerError {
    TokenizerError::Invalid { path: path.into(), reason: reason.into() }
}

#[cfg(test)]
mod tests;
