//! Answers that have to be of a form: JSON, a JSON schema, a regular expression, a grammar.
//!
//! Before each token the form says which tokens may come; all others are taken out of the logits. llguidance does the parsing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use peft_core::{Error, Result};
use peft_models::tokenizer::Tokenizer;
use serde_json::{Value, json};

/// The form of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that fits a schema.
    JsonSchema(Value),
    /// A text that matches as a whole; Rust's syntax of regular expressions, without look-around.
    Regex(String),
    /// A context-free grammar in llguidance's form of Lark.
    Lark(String),
}

/// Grammars over the tokens of one tokenizer.
pub(crate) struct Grammars {
    factory: ParserFactory,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Grammars {
    /// For a tokenizer and a model with so many logits. It sorts the vocabulary by bytes: tens of milliseconds.
    pub(crate) fn new(tokenizer: &Tokenizer, vocabulary: usize) -> Result<Self> {
        let end = tokenizer.eos_token_ids().first().copied();
        let end = end.ok_or_else(|| Error::msg("the tokenizer has no end token, which an answer of a form needs"))?;
        let words = token_bytes(tokenizer.inner(), vocabulary)?;
        let trie = TokTrie::from(&TokRxInfo::new(vocabulary as u32, end), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|e| Error::msg(e.to_string()))?;
        factory.quiet();
        Ok(Self { factory })
    }

    /// The beginning of an answer of this form.
    ///
    /// # Errors
    /// What is wrong with the grammar, in words.
    pub(crate) fn begin(&self, grammar: &Grammar) -> Result<Constraint, String> {
        let grammar = match grammar {
            Grammar::JsonObject => TopLevelGrammar::from_json_schema(laid_out(json!({"type": "object"}))),
            Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(laid_out(schema.clone())),
            Grammar::Regex(pattern) => TopLevelGrammar::from_regex(pattern),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let matcher = Matcher::new(self.factory.create_parser(grammar));
        match matcher.get_error() {
            Some(message) => Err(message.lines().next().unwrap_or_default().to_owned()),
            None => Ok(Constraint(Mutex::new(matcher))),
        }
    }
}

/// A schema whose JSON has no more space between its parts than a person would write. JSON allows any, and a model that does not know
/// what comes next may write nothing else.
fn laid_out(mut schema: Value) -> Value {
    if let Some(keys) = schema.as_object_mut() {
        keys.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": r" |\n {0,40}"}));
    }
    schema
}

/// A place in a grammar: what has been written of it. [`crate::Engine::constraint`] makes one for each answer.
pub struct Constraint(Mutex<Matcher>);

impl Clone for Constraint {
    /// The same place, from which it goes on by itself.
    fn clone(&self) -> Self {
        Self(Mutex::new(self.with(|matcher| matcher.deep_clone())))
    }
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

impl Constraint {
    fn with<T>(&self, then: impl FnOnce(&mut Matcher) -> T) -> T {
        then(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Leaves in `logits` the tokens that may come next; those of `ends` where the answer may end here.
    pub(crate) fn allow(&self, logits: &mut [f32], ends: &[u32]) -> Result<()> {
        let mask = self.with(|matcher| {
            let mask = matcher.compute_mask()?;
            matcher.is_accepting().map(|may_end| (mask, may_end))
        });
        let (mut mask, may_end) = mask.map_err(|e| failed(&e.to_string()))?;
        ends.iter().for_each(|&end| if may_end { mask.allow_token(end) } else { mask.disallow_token(end) });
        if mask.is_zero() {
            return Err(failed("no token can go on"));
        }
        for (id, logit) in logits.iter_mut().enumerate() {
            if !mask.is_allowed(id as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Takes a token that was written. Whether the answer is complete, with nothing that could follow.
    pub(crate) fn wrote(&self, id: u32) -> Result<bool> {
        self.with(|matcher| {
            matcher.consume_token(id).map_err(|e| failed(&e.to_string()))?;
            Ok(matcher.is_stopped())
        })
    }
}

fn failed(why: &str) -> Error {
    Error::msg(format!("the answer's form cannot be kept: {}", why.lines().next().unwrap_or_default()))
}

/// What each token adds to a text, by its number; tokens that stand for no text (special ones, and rows of the model without a
/// token) have the mark that keeps them out of all grammars.
fn token_bytes(tokenizer: &tokenizers::Tokenizer, vocabulary: usize) -> Result<Vec<Vec<u8>>> {
    let spelling = Spelling::of(tokenizer)?;
    let added = tokenizer.get_added_tokens_decoder();
    let marked = |text: &str| [&[TokTrie::SPECIAL_TOKEN_MARKER], text.as_bytes()].concat();
    let bytes = |id: u32| match (added.get(&id), tokenizer.id_to_token(id)) {
        (Some(token), _) if token.special => marked(&token.content),
        (Some(token), _) => token.content.clone().into_bytes(),
        (None, Some(token)) => spelling.bytes(&token).unwrap_or_else(|| marked(&token)),
        (None, None) => marked(&format!("<{id}>")),
    };
    Ok((0..vocabulary as u32).map(bytes).collect())
}

/// How a vocabulary writes bytes.
enum Spelling {
    /// A character for each byte, as GPT-2 has it.
    ByteLevel(HashMap<char, u8>),
    /// Text in which one character stands for a space, and `<0x0A>` for a byte, as SentencePiece has it.
    Pieces(char),
}

impl Spelling {
    fn of(tokenizer: &tokenizers::Tokenizer) -> Result<Self> {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).map_err(|e| Error::msg(e.to_string()))?;
        let parts = match decoder.get("decoders").and_then(Value::as_array) {
            Some(parts) => parts.clone(),
            None => vec![decoder],
        };
        let kind = |kind: &str| parts.iter().find(|part| part.get("type").and_then(Value::as_str) == Some(kind));
        if kind("ByteLevel").is_some() {
            return Ok(Self::ByteLevel(byte_level()));
        }
        let replaced = kind("Replace").and_then(|part| part.pointer("/pattern/String"));
        let space = replaced.or_else(|| kind("Metaspace").and_then(|part| part.get("replacement")));
        match space.and_then(Value::as_str).and_then(|text| text.chars().next()) {
            Some(space) => Ok(Self::Pieces(space)),
            None => Err(Error::msg(
                "the tokens of this model's tokenizer do not say which bytes they are, so no form can be kept to",
            )),
        }
    }

    fn bytes(&self, token: &str) -> Option<Vec<u8>> {
        match self {
            Self::ByteLevel(byte) => token.chars().map(|c| byte.get(&c).copied()).collect(),
            Self::Pieces(space) => {
                let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match hex.filter(|hex| hex.len() == 2) {
                    Some(hex) => u8::from_str_radix(hex, 16).ok().map(|byte| vec![byte]),
                    None => Some(token.replace(*space, " ").into_bytes()),
                }
            }
        }
    }
}

/// GPT-2's characters for bytes: those that can be seen stand for themselves, the others for the characters from 256 on
/// (`bytes_to_unicode` in the paper's code).
fn byte_level() -> HashMap<char, u8> {
    let itself = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let seen = (0..=255).filter(itself).map(|byte| (char::from(byte), byte));
    let unseen = (256..).filter_map(char::from_u32).zip((0..=255).filter(|byte| !itself(byte)));
    seen.chain(unseen).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpt2s_characters_stand_for_all_bytes() {
        let byte = byte_level();
        assert_eq!(byte.len(), 256);
        assert_eq!((byte[&'Ġ'], byte[&'Ċ'], byte[&'a'], byte[&'é']), (b' ', b'\n', b'a', 0xE9));
    }

    #[test]
    fn pieces_are_text_with_spaces_and_bytes() {
        let pieces = Spelling::Pieces('▁');
        assert_eq!(pieces.bytes("▁a▁b"), Some(b" a b".to_vec()));
        assert_eq!(pieces.bytes("<0x0A>"), Some(b"\n".to_vec()));
        assert_eq!(pieces.bytes("<0xZZ>"), None);
    }
}
