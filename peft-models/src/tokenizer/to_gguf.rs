//! GGUF metadata out of a tokenizer, under llama.cpp's keys.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::{Origin, Tokenizer, from_gguf::token_type, pre::PreTokenizer};
use crate::gguf::Value;

impl Tokenizer {
    /// The metadata that describes this tokenizer to llama.cpp, for a model with `rows` embeddings; rows without a
    /// token get an unused placeholder. The error is what GGUF cannot express.
    pub(crate) fn to_gguf_metadata(&self, rows: usize) -> Result<Vec<(String, Value)>, String> {
        let json = self.inner.to_string(false).map_err(|error| error.to_string())?;
        let json: Json = serde_json::from_str(&json).map_err(|error| error.to_string())?;
        let model = json.get("model").ok_or("its tokenizer has no model")?;
        if model.get("type").and_then(Json::as_str) != Some("BPE") {
            return Err("only BPE tokenizers can be written to GGUF".into());
        }
        let flag = |key: &str| model.get(key).and_then(Json::as_bool).unwrap_or(false);
        let merges = merges(model)?;
        let mut entries: Vec<(String, Value)> = Vec::new();
        let mut set = |name: &str, value: Value| entries.push((format!("tokenizer.ggml.{name}"), value));

        let sentence_piece = flag("byte_fallback");
        let (tokens, types) = self.tokens(&json, rows, sentence_piece)?;
        if sentence_piece {
            set("model", "llama".into());
            set("pre", "default".into());
            set("scores", scores(&tokens, &types, &merges).into());
            set("add_space_prefix", prepends_space(&json).into());
        } else {
            let named = match &self.origin {
                Origin::Gguf { pre } => pre.clone(),
                Origin::Folder(_) => None,
            };
            let name = match named {
                Some(name) => name,
                None => PreTokenizer::described(&json)
                    .and_then(|pre| pre.names.first())
                    .map(|name| (*name).to_owned())
                    .ok_or(
                        "llama.cpp has no name for the way its tokenizer cuts text (`pre_tokenizer` in tokenizer.json)",
                    )?,
            };
            set("model", "gpt2".into());
            set("pre", name.into());
            let merges: Vec<String> = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
            set("merges", merges.into());
        }
        set("tokens", tokens.into());
        set("token_type", types.into());
        for (name, id) in [
            ("bos_token_id", self.bos_token_id),
            ("eos_token_id", self.eos_token_id()),
            ("padding_token_id", self.pad_token_id),
            ("unknown_token_id", self.unk_token_id),
        ] {
            if let Some(id) = id {
                set(name, id.into());
            }
        }
        // What the post-processor puts around an empty text.
        let ends = self.encode("", true).map_err(|error| error.to_string())?;
        set("add_bos_token", (self.bos_token_id.is_some() && ends.first().copied() == self.bos_token_id).into());
        let eos = self.eos_token_id();
        set(
            "add_eos_token",
            (eos.is_some() && ends.last().copied() == eos && (ends.len() > 1 || eos != self.bos_token_id)).into(),
        );
        if let Some(template) = &self.chat_template {
            entries.push(("tokenizer.chat_template".into(), template.as_str().into()));
        }
        Ok(entries)
    }

    fn tokens(&self, json: &Json, rows: usize, sentence_piece: bool) -> Result<(Vec<String>, Vec<i32>), String> {
        let mut tokens: Vec<Option<String>> = vec![None; rows];
        for (token, id) in self.inner.get_vocab(true) {
            let slot = tokens.get_mut(id as usize).ok_or_else(|| {
                format!("its tokenizer has token {id} (`{token}`) and the model has {rows} embeddings")
            })?;
            *slot = Some(token);
        }
        let mut added: HashMap<u64, bool> = HashMap::new();
        for token in json.get("added_tokens").and_then(Json::as_array).into_iter().flatten() {
            if let Some(id) = token.get("id").and_then(Json::as_u64) {
                added.insert(id, token.get("special").and_then(Json::as_bool).unwrap_or(false));
            }
        }
        let kind = |id: usize, token: &str| match added.get(&(id as u64)) {
            _ if sentence_piece && self.unk_token_id == Some(id as u32) => token_type::UNKNOWN,
            Some(true) => token_type::CONTROL,
            Some(false) => token_type::USER_DEFINED,
            None if sentence_piece && is_byte(token) => token_type::BYTE,
            None => token_type::NORMAL,
        };
        let types = tokens
            .iter()
            .enumerate()
            .map(|(id, token)| token.as_deref().map_or(token_type::UNUSED, |token| kind(id, token)))
            .collect();
        let tokens =
            tokens.into_iter().enumerate().map(|(id, token)| token.unwrap_or_else(|| format!("[PAD{id}]"))).collect();
        Ok((tokens, types))
    }
}

/// `<0x0A>`, SentencePiece's spelling of a byte.
fn is_byte(token: &str) -> bool {
    token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'))
        .is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

/// Merges are pairs in newer files, and strings with a space in older ones; the library writes pairs.
fn merges(model: &Json) -> Result<Vec<(String, String)>, String> {
    let wrong = || "its tokenizer's merges are not pairs".to_owned();
    let items = model.get("merges").and_then(Json::as_array).ok_or_else(wrong)?;
    items
        .iter()
        .map(|item| match item {
            Json::String(text) => {
                text.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned())).ok_or_else(wrong)
            }
            _ => match (item.get(0).and_then(Json::as_str), item.get(1).and_then(Json::as_str)) {
                (Some(left), Some(right)) => Ok((left.to_owned(), right.to_owned())),
                _ => Err(wrong()),
            },
        })
        .collect()
}

/// llama.cpp merges the pair whose result has the highest score. The score is therefore minus the rank of the first
/// merge that makes the token; what no merge makes comes last.
fn scores(tokens: &[String], types: &[i32], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::with_capacity(merges.len());
    for (rank, (left, right)) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let last = merges.len() as f32;
    tokens
        .iter()
        .zip(types)
        .map(|(token, kind)| match (*kind, ranks.get(token)) {
            (token_type::NORMAL | token_type::USER_DEFINED, Some(rank)) => -(*rank as f32),
            (token_type::NORMAL, None) => -last,
            _ => 0.0,
        })
        .collect()
}

/// Whether a SentencePiece-like tokenizer puts a space before the text.
fn prepends_space(json: &Json) -> bool {
    let normalizer = json.get("normalizer").unwrap_or(&Json::Null);
    let steps =
        normalizer.get("normalizers").and_then(Json::as_array).map_or(std::slice::from_ref(normalizer), Vec::as_slice);
    let prepended = steps.iter().any(|step| step.get("type").and_then(Json::as_str) == Some("Prepend"));
    let scheme = json.pointer("/pre_tokenizer/prepend_scheme").and_then(Json::as_str);
    prepended || scheme.is_some_and(|scheme| scheme != "never")
}
