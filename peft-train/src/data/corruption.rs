//! Plain text of which a part is hidden: fill-in-the-middle for decoders, span corruption for encoder–decoders.
//!
//! What is hidden is a function of the seed and the text, so that a run that is resumed reads the same rows.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::encode::Encoder;
use super::error::DataError;
use super::rng::Rng;
use super::source::Row;
use super::tokenizer::TextTokenizer;
use crate::fnv::Fnv;

/// What is hidden of the rows of format `text`.
#[derive(Clone, Debug, PartialEq)]
pub enum Corruption {
    /// For a causal language model.
    Middle(FillInTheMiddle),
    /// For an encoder–decoder.
    Spans(SpanCorruption),
}

/// Fill-in-the-middle (Bavarian et al., arXiv:2207.14255): a text is cut at two of its characters, and the middle is written last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FillInTheMiddle {
    /// Share of the rows; the others stay as they are.
    pub rate: f64,
    /// Share of those in which the suffix comes before the prefix (SPM) and not after it (PSM).
    pub spm_rate: f64,
    /// Counts the middle alone, and not what stands before it.
    pub middle_only: bool,
    /// The token in front of the prefix; left out, that of a family that the tokenizer knows.
    pub prefix: Option<String>,
    /// The token in front of the middle.
    pub middle: Option<String>,
    /// The token in front of the suffix.
    pub suffix: Option<String>,
}

impl Default for FillInTheMiddle {
    fn default() -> Self {
        Self { rate: 0.5, spm_rate: 0.5, middle_only: false, prefix: None, middle: None, suffix: None }
    }
}

/// Span corruption (Raffel et al., arXiv:1910.10683): spans of the source are replaced by sentinels, and the target is each sentinel with its
/// span.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpanCorruption {
    /// Share of the tokens that are hidden.
    pub density: f64,
    /// Mean length of a span, in tokens.
    pub mean_length: f64,
}

impl Default for SpanCorruption {
    fn default() -> Self {
        Self { density: 0.15, mean_length: 3.0 }
    }
}

/// Tokens in front of prefix, middle and suffix, as model families call them: StarCoder and SantaCoder, Qwen2.5-Coder, CodeGemma,
/// Code Llama, DeepSeek-Coder.
const FAMILIES: [[&str; 3]; 6] = [
    ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"],
    ["<fim-prefix>", "<fim-middle>", "<fim-suffix>"],
    ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"],
    ["<|fim▁begin|>", "<|fim▁end|>", "<|fim▁hole|>"],
    ["▁<PRE>", "▁<MID>", "▁<SUF>"],
    ["<PRE>", "<MID>", "<SUF>"],
];
/// T5 has a hundred.
const SENTINELS: usize = 100;

/// [`Corruption`] with the tokens that it needs.
#[derive(Clone, Debug)]
pub(super) enum Hiding {
    Middle { how: FillInTheMiddle, marks: [u32; 3], end: u32 },
    Spans { how: SpanCorruption, sentinels: Vec<u32> },
}

impl Corruption {
    /// Finds the tokens in the tokenizer.
    pub(super) fn resolve(&self, tokenizer: &dyn TextTokenizer) -> Result<Hiding, DataError> {
        let config = |message: String| DataError::Config(message);
        let share = |key: &str, value: f64| match (0.0..=1.0).contains(&value) {
            true => Ok(()),
            false => Err(config(format!("{key} is {value}, and a share is between 0 and 1"))),
        };
        match self {
            Self::Middle(how) => {
                share("data.fill_in_the_middle.rate", how.rate)?;
                share("data.fill_in_the_middle.spm_rate", how.spm_rate)?;
                let given = [&how.prefix, &how.middle, &how.suffix];
                let marks = match given {
                    [None, None, None] => FAMILIES.iter().find_map(|names| ids(tokenizer, names)).ok_or_else(|| {
                        config(
                            "the tokenizer has none of the known tokens for fill-in-the-middle; name its own as \
                             data.fill_in_the_middle.prefix, .middle and .suffix, or use a model that was trained with them"
                                .into(),
                        )
                    })?,
                    [Some(prefix), Some(middle), Some(suffix)] => {
                        let names = [prefix.as_str(), middle, suffix];
                        let unknown = names.iter().find(|name| id(tokenizer, name).is_none()).unwrap_or(&"");
                        ids(tokenizer, &names).ok_or_else(|| {
                            config(format!("data.fill_in_the_middle: `{unknown}` is not one token of the tokenizer"))
                        })?
                    }
                    _ => return Err(config("data.fill_in_the_middle takes prefix, middle and suffix, or none of them".into())),
                };
                let end = tokenizer.eos_id().ok_or_else(|| {
                    config("fill-in-the-middle ends with the end token, and the tokenizer names none".into())
                })?;
                Ok(Hiding::Middle { how: how.clone(), marks, end })
            }
            Self::Spans(how) => {
                if !(how.density > 0.0 && how.density < 1.0 && how.mean_length >= 1.0 && how.mean_length.is_finite()) {
                    let message = "data.span_corruption: density lies between 0 and 1, mean_length is 1 or more";
                    return Err(config(message.into()));
                }
                let sentinels: Vec<u32> =
                    (0..SENTINELS).map_while(|i| id(tokenizer, &format!("<extra_id_{i}>"))).collect();
                if sentinels.is_empty() {
                    return Err(config(
                        "the tokenizer has no sentinels (`<extra_id_0>`, …), which span corruption needs; T5's have them".into(),
                    ));
                }
                Ok(Hiding::Spans { how: *how, sentinels })
            }
        }
    }
}

fn id(tokenizer: &dyn TextTokenizer, token: &str) -> Option<u32> {
    match tokenizer.encode(token, false).ok()?[..] {
        [id] => Some(id),
        _ => None,
    }
}

fn ids(tokenizer: &dyn TextTokenizer, names: &[&str; 3]) -> Option<[u32; 3]> {
    let [prefix, middle, suffix] = names;
    Some([id(tokenizer, prefix)?, id(tokenizer, middle)?, id(tokenizer, suffix)?])
}

/// Tokens, and which of them count.
type Counted = (Vec<u32>, Range<usize>);

impl Encoder<'_> {
    fn stream(&self, text: &str) -> Rng {
        let mut hash = Fnv::default();
        hash.text(text);
        Rng::new(&[self.seed, hash.value()])
    }

    /// The tokens of a text whose middle is written last, and which of them count; nothing for a row that stays as it is.
    pub(super) fn with_middle_last(
        &self,
        text: &str,
        row: &Row,
        tokenizer: &dyn TextTokenizer,
    ) -> Result<Option<Counted>, DataError> {
        let Some(Hiding::Middle { how, marks, end }) = &self.hiding else { return Ok(None) };
        let mut rng = self.stream(text);
        if rng.share() >= how.rate {
            return Ok(None);
        }
        // Ends of characters, the beginning included.
        let ends: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
        let mut at = || ends.get(rng.below(ends.len() as u64) as usize).copied().unwrap_or_default();
        let (a, b) = (at(), at());
        let (from, to) = (a.min(b), a.max(b));
        let encode = |part: Option<&str>| {
            let ids = tokenizer.encode(part.unwrap_or_default(), false);
            ids.map_err(|e| DataError::row(&row.at, format!("tokenizer: {e}")))
        };
        let mut prefix = encode(text.get(..from))?;
        let mut middle = encode(text.get(from..to))?;
        let mut suffix = encode(text.get(to..))?;
        let front = self.front().to_vec();
        // What lies farthest from the hole is cut first.
        let fixed = front.len() + 4;
        let room = self.max_length.unwrap_or(usize::MAX).saturating_sub(fixed);
        let mut excess = (prefix.len() + middle.len() + suffix.len()).saturating_sub(room);
        let mut spend = |length: usize| {
            let cut = excess.min(length);
            excess -= cut;
            cut
        };
        suffix.truncate(suffix.len() - spend(suffix.len()));
        prefix.drain(..spend(prefix.len()));
        middle.truncate(middle.len() - spend(middle.len()));
        let [before, hole, behind] = *marks;
        let mut ids = front;
        let counted = if rng.share() < how.spm_rate {
            ids.extend([before, behind].into_iter().chain(suffix).chain([hole]).chain(prefix));
            ids.len()
        } else {
            ids.extend([before].into_iter().chain(prefix).chain([behind]).chain(suffix).chain([hole]));
            ids.len()
        };
        ids.extend(middle.into_iter().chain([*end]));
        let counted = if how.middle_only { counted..ids.len() } else { 0..ids.len() };
        Ok(Some((ids, counted)))
    }

    /// Source and target of a text of which spans are hidden: token ids without the end token that closes both.
    pub(super) fn with_hidden_spans(&self, ids: &[u32], text: &str) -> Option<(Vec<u32>, Vec<u32>)> {
        let Some(Hiding::Spans { how, sentinels }) = &self.hiding else { return None };
        let (mut source, mut target) = (Vec::new(), Vec::new());
        let mut at = 0;
        for ((seen, hidden), sentinel) in
            spans(ids.len(), *how, sentinels.len(), &mut self.stream(text)).into_iter().zip(sentinels)
        {
            source.extend_from_slice(ids.get(at..at + seen).unwrap_or_default());
            source.push(*sentinel);
            target.push(*sentinel);
            target.extend_from_slice(ids.get(at + seen..at + seen + hidden).unwrap_or_default());
            at += seen + hidden;
        }
        source.extend_from_slice(ids.get(at..).unwrap_or_default());
        Some((source, target))
    }
}

/// Lengths of what is seen and what is hidden, in turn, as `random_spans_noise_mask` of T5's code has them: the first span is seen, the last
/// hidden. A text of one token has nothing to hide.
fn spans(length: usize, how: SpanCorruption, most: usize, rng: &mut Rng) -> Vec<(usize, usize)> {
    if length < 2 {
        return Vec::new();
    }
    let hidden = ((length as f64 * how.density).round() as usize).clamp(1, length - 1);
    let count = ((hidden as f64 / how.mean_length).round() as usize).clamp(1, hidden).min(length - hidden).min(most);
    let (seen, hidden) = (parts(length - hidden, count, rng), parts(hidden, count, rng));
    seen.into_iter().zip(hidden).collect()
}

/// Positive lengths of `count` parts of `length`, all such lists as likely as each other.
fn parts(length: usize, count: usize, rng: &mut Rng) -> Vec<usize> {
    let mut begins: Vec<bool> = (1..length).map(|i| i < count).collect();
    rng.shuffle(&mut begins);
    let mut parts = vec![1];
    for begins in begins {
        match (begins, parts.last_mut()) {
            (false, Some(last)) => *last += 1,
            _ => parts.push(1),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_positive_and_add_up() {
        for seed in 0..200 {
            let mut rng = Rng::new(&[seed]);
            let (length, count) = (1 + seed as usize % 17, 1 + seed as usize % 5);
            let count = count.min(length);
            let found = parts(length, count, &mut rng);
            assert_eq!((found.len(), found.iter().sum::<usize>()), (count, length));
            assert!(found.iter().all(|&part| part > 0));
        }
    }

    #[test]
    fn spans_have_the_density_and_the_mean_length() {
        let how = SpanCorruption::default();
        let found = spans(1000, how, 100, &mut Rng::new(&[1]));
        assert_eq!(found.len(), 50);
        assert_eq!(found.iter().map(|(_, hidden)| hidden).sum::<usize>(), 150);
        assert_eq!(found.iter().map(|(seen, hidden)| seen + hidden).sum::<usize>(), 1000);
        assert_eq!(spans(1, how, 100, &mut Rng::new(&[1])), []);
        assert_eq!(spans(2, how, 100, &mut Rng::new(&[1])), [(1, 1)]);
        // As many as there are sentinels, however long the text.
        assert_eq!(spans(1000, how, 7, &mut Rng::new(&[1])).len(), 7);
    }
}
