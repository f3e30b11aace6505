//! A tokenizer out of GGUF metadata.
//!
//! The metadata is turned into the `tokenizer.json` that describes the same tokenizer, which the `tokenizers` library
//! then loads: byte-level BPE for `tokenizer.ggml.model = "gpt2"`, SentencePiece's BPE with byte fallback for
//! `"llama"`. The latter has scores instead of merges; merges are recovered as transformers does
//! (`generate_merges` in `tokenization_utils_base.py`).

use std::{cmp::Reverse, collections::HashMap};

use serde_json::{Map, Value, json};

use super::{Origin, Tokenizer, TokenizerError, invalid, pre::PreTokenizer};
use crate::gguf::{Gguf, GgufError};

/// llama.cpp's `llama_token_type`.
pub(super) mod token_type {
    pub(in crate::tokenizer) const NORMAL: i32 = 1;
    pub(in crate::tokenizer) const UNKNOWN: i32 = 2;
    pub(in crate::tokenizer) const CONTROL: i32 = 3;
    pub(in crate::tokenizer) const USER_DEFINED: i32 = 4;
    pub(in crate::tokenizer) const UNUSED: i32 = 5;
    pub(in crate::tokenizer) const BYTE: i32 = 6;
}

/// Longer pieces than this are not searched for merges, so that a hostile file cannot make that quadratic.
const MAX_PIECE_CHARS: usize = 256;
/// A begin and an end token around a text, or neither.
type Ends<'a> = (Option<(&'a str, u32)>, Option<(&'a str, u32)>);

impl From<GgufError> for TokenizerError {
    fn from(error: GgufError) -> Self {
        match error {
            GgufError::Io { path, source } => Self::Io { path, source },
            GgufError::Write(error) => Self::Write(error),
            GgufError::Malformed { path, reason } | GgufError::Inexpressible { path, reason } => {
                Self::Invalid { path, reason }
            }
            GgufError::Metadata { path, key, reason } => {
                Self::Invalid { path, reason: format!("metadata `{key}`: {reason}") }
            }
            GgufError::Tensor { path, name, reason } => {
                Self::Invalid { path, reason: format!("tensor `{name}`: {reason}") }
            }
            GgufError::Candle { path, name, source } => {
                Self::Invalid { path, reason: format!("tensor `{name}`: {source}") }
            }
        }
    }
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// No tokenizer in the file, a model or pre-tokenizer that is not supported, or lists that contradict each other.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TokenizerError> {
        let wrong = |reason: String| invalid(gguf.path(), reason);
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let model = gguf
            .text(&key("model"))?
            .ok_or_else(|| wrong("no tokenizer (`tokenizer.ggml.model` is missing)".into()))?;
        let tokens = gguf.texts(&key("tokens"))?.ok_or_else(|| wrong("`tokenizer.ggml.tokens` is missing".into()))?;
        if tokens.is_empty() || tokens.len() > 1 << 24 {
            return Err(wrong(format!("`tokenizer.ggml.tokens` has {} entries", tokens.len())));
        }
        let types = match gguf.value(&key("token_type")) {
            None => vec![i64::from(token_type::NORMAL); tokens.len()],
            Some(value) => value
                .as_integers()
                .filter(|types| types.len() == tokens.len())
                .ok_or_else(|| wrong("`tokenizer.ggml.token_type` is not one number for each token".into()))?,
        };
        let special = |name: &str| -> Result<Option<u32>, TokenizerError> {
            let key = key(name);
            // Negative or 2³²−1 is how files say "none".
            let Some(id) =
                gguf.value(&key).and_then(crate::gguf::Value::as_u64).filter(|id| *id != u64::from(u32::MAX))
            else {
                return Ok(None);
            };
            match u32::try_from(id) {
                Ok(id) if (id as usize) < tokens.len() => Ok(Some(id)),
                _ => Err(wrong(format!("`{key}` is {id}, and there are {} tokens", tokens.len()))),
            }
        };
        let (bos, eos) = (special("bos_token_id")?, special("eos_token_id")?);
        let (pad, mut unk) = (special("padding_token_id")?, special("unknown_token_id")?);
        let text_of = |id: Option<u32>| id.and_then(|id| tokens.get(id as usize)).map(String::as_str);

        let vocabulary = Vocabulary::new(tokens, &types);
        let pre_name = gguf.text(&key("pre"))?;
        let add_bos_flag = gguf.flag(&key("add_bos_token"))?;
        let (mut json, add_bos) = match model {
            "gpt2" => {
                let pre = PreTokenizer::named(pre_name).map_err(wrong)?;
                let merges =
                    gguf.texts(&key("merges"))?.ok_or_else(|| wrong("`tokenizer.ggml.merges` is missing".into()))?;
                (byte_level(&vocabulary, merges, pre).map_err(wrong)?, pre.add_bos)
            }
            "llama" => {
                unk = unk.or_else(|| {
                    types.iter().position(|kind| *kind == i64::from(token_type::UNKNOWN)).map(|id| id as u32)
                });
                let merges = match gguf.texts(&key("merges"))? {
                    Some(merges) => split_merges(merges).map_err(wrong)?,
                    None => {
                        let scores = gguf.value(&key("scores")).and_then(crate::gguf::Value::as_f32s);
                        let scores = scores
                            .filter(|scores| scores.len() == tokens.len())
                            .ok_or_else(|| wrong("`tokenizer.ggml.scores` is not one number for each token".into()))?;
                        vocabulary.merges_from_scores(scores)
                    }
                };
                let prefix = gguf.flag(&key("add_space_prefix"))?.unwrap_or(true);
                (sentence_piece(&vocabulary, merges, text_of(unk), prefix), true)
            }
            other => return Err(wrong(format!("tokenizer model `{other}` is not supported (known: gpt2, llama)"))),
        };
        let add_bos = add_bos_flag.unwrap_or(add_bos) && bos.is_some();
        let add_eos = gguf.flag(&key("add_eos_token"))?.unwrap_or(false) && eos.is_some();
        let ends: Ends<'_> = (text_of(bos).zip(bos).filter(|_| add_bos), text_of(eos).zip(eos).filter(|_| add_eos));
        json.insert("post_processor".into(), post_processor(ends));
        json.insert("added_tokens".into(), vocabulary.added_tokens(&[bos, eos, pad, unk]));

        let bytes = serde_json::to_vec(&json).map_err(|error| wrong(error.to_string()))?;
        drop(json);
        let inner = super::parse(&bytes).map_err(|error| wrong(format!("its tokenizer is not usable: {error}")))?;
        let chat_template = gguf.text("tokenizer.chat_template")?.map(str::to_owned);
        let mut config = Map::new();
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        for (key, id) in [("bos_token", bos), ("eos_token", eos), ("pad_token", pad), ("unk_token", unk)] {
            if let Some(token) = text_of(id) {
                config.insert(key.into(), json!(token));
            }
        }
        if let Some(length) =
            gguf.architecture().ok().and_then(|name| gguf.count(&format!("{name}.context_length")).ok().flatten())
        {
            config.insert("model_max_length".into(), json!(length));
        }
        let mut eos_token_ids: Vec<u32> = eos.into_iter().collect();
        for name in ["eot_token_id", "eom_token_id"] {
            if let Some(id) = special(name)?.filter(|id| !eos_token_ids.contains(id)) {
                eos_token_ids.push(id);
            }
        }
        Ok(Self {
            inner: inner.into(),
            bos_token_id: bos,
            eos_token_ids,
            pad_token_id: pad,
            unk_token_id: unk,
            chat_template,
            config,
            origin: Origin::Gguf { pre: pre_name.map(str::to_owned) },
        })
    }
}

/// The tokens of a file; of a token that occurs twice the first id counts.
struct Vocabulary<'a> {
    tokens: &'a [String],
    types: &'a [i64],
    ids: HashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    fn new(tokens: &'a [String], types: &'a [i64]) -> Self {
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            ids.entry(token.as_str()).or_insert(id as u32);
        }
        Self { tokens, types, ids }
    }

    fn is(&self, id: usize, kind: i32) -> bool {
        self.types.get(id).is_some_and(|given| *given == i64::from(kind))
    }

    fn json(&self) -> Value {
        let entry = |(id, token): (usize, &String)| {
            (self.ids.get(token.as_str()) == Some(&(id as u32))).then(|| (token.clone(), json!(id)))
        };
        Value::Object(self.tokens.iter().enumerate().filter_map(entry).collect())
    }

    /// Control tokens and the named special ones are special, user-defined ones are found in text before it is cut.
    fn added_tokens(&self, special: &[Option<u32>]) -> Value {
        let mut added = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            let is_special = self.is(id, token_type::CONTROL)
                || self.is(id, token_type::UNKNOWN)
                || special.contains(&Some(id as u32));
            let listed = is_special || self.is(id, token_type::USER_DEFINED);
            if !listed || token.is_empty() || self.ids.get(token.as_str()) != Some(&(id as u32)) {
                continue;
            }
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": is_special,
            }));
        }
        Value::Array(added)
    }

    /// Each way to put a token together from two others, best score first.
    fn merges_from_scores(&self, scores: &[f32]) -> Vec<(String, String)> {
        let mut merges: Vec<(f32, usize, usize, &str, &str)> = Vec::new();
        for (id, (token, score)) in self.tokens.iter().zip(scores).enumerate() {
            let composed = self.is(id, token_type::NORMAL) || self.is(id, token_type::USER_DEFINED);
            let chars = token.chars().take(MAX_PIECE_CHARS + 1).count();
            if !composed || chars > MAX_PIECE_CHARS || self.ids.get(token.as_str()) != Some(&(id as u32)) {
                continue;
            }
            let start = merges.len();
            for (left_chars, (at, _)) in token.char_indices().enumerate().skip(1) {
                let (left, right) = token.split_at(at);
                if self.ids.contains_key(left) && self.ids.contains_key(right) {
                    merges.push((*score + 0.0, left_chars, chars - left_chars, left, right));
                }
            }
            if let Some(ways) = merges.get_mut(start..) {
                ways.sort_by_key(|(.., left, right)| (self.ids.get(left), self.ids.get(right)));
            }
        }
        // Stable, so that equal keys stay in the order of the vocabulary.
        merges.sort_by(|a, b| {
            b.0.total_cmp(&a.0).then_with(|| (Reverse(a.1), Reverse(a.2)).cmp(&(Reverse(b.1), Reverse(b.2))))
        });
        merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect()
    }
}

/// A merge is two tokens with a space between; the first one may begin with that space.
fn split_merges(merges: &[String]) -> Result<Vec<(String, String)>, String> {
    merges
        .iter()
        .map(|merge| {
            let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
            at.and_then(|at| Some((merge.get(..at)?.to_owned(), merge.get(at + 1..)?.to_owned())))
                .ok_or_else(|| format!("`tokenizer.ggml.merges` has `{merge}`, which is not two tokens"))
        })
        .collect()
}

fn bpe(
    vocabulary: &Vocabulary<'_>,
    merges: Vec<(String, String)>,
    unk: Option<&str>,
    sentence_piece: bool,
    ignore_merges: bool,
) -> Value {
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": unk,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": sentence_piece,
        "byte_fallback": sentence_piece,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary.json(),
        "merges": merges.into_iter().map(|(left, right)| json!([left, right])).collect::<Vec<_>>(),
    })
}

fn byte_level(
    vocabulary: &Vocabulary<'_>,
    merges: &[String],
    pre: &PreTokenizer,
) -> Result<Map<String, Value>, String> {
    let mut json = Map::new();
    json.insert("version".into(), json!("1.0"));
    json.insert("normalizer".into(), pre.normalizer());
    json.insert("pre_tokenizer".into(), pre.pre_tokenizer());
    json.insert(
        "decoder".into(),
        json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true }),
    );
    json.insert("model".into(), bpe(vocabulary, split_merges(merges)?, None, false, pre.ignore_merges));
    Ok(json)
}

/// SentencePiece as the Llama models have it: spaces become ▁, one is put before every stretch of text between special
/// tokens.
fn sentence_piece(
    vocabulary: &Vocabulary<'_>,
    merges: Vec<(String, String)>,
    unk: Option<&str>,
    prefix: bool,
) -> Map<String, Value> {
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        normalizers.push(json!({ "type": "Prepend", "prepend": "▁" }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    normalizers.push(json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" }));
    let mut json = Map::new();
    json.insert("version".into(), json!("1.0"));
    json.insert("normalizer".into(), json!({ "type": "Sequence", "normalizers": normalizers }));
    json.insert("pre_tokenizer".into(), Value::Null);
    json.insert("decoder".into(), json!({ "type": "Sequence", "decoders": decoders }));
    json.insert("model".into(), bpe(vocabulary, merges, unk, true, false));
    json
}

fn post_processor((bos, eos): Ends<'_>) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let sequence = |name: &str, type_id: u32| {
        let end = |token: &Option<(&str, u32)>| {
            token.map(|(token, _)| json!({ "SpecialToken": { "id": token, "type_id": type_id } }))
        };
        end(&bos)
            .into_iter()
            .chain([json!({ "Sequence": { "id": name, "type_id": type_id } })])
            .chain(end(&eos))
            .collect::<Vec<_>>()
    };
    let pair: Vec<Value> = sequence("A", 0).into_iter().chain(sequence("B", 1)).collect();
    let special: Map<String, Value> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|(token, id)| (token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] })))
        .collect();
    json!({ "type": "TemplateProcessing", "single": sequence("A", 0), "pair": pair, "special_tokens": special })
}
