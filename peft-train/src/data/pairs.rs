//! Rows for an encoder–decoder: a source that the encoder reads, and a target that the decoder learns to write.
//!
//! Both are framed by the tokenizer's post-processor, as `tokenizer(source, text_target=target)` in transformers, and the
//! target ends with the end token. The decoder reads the target one place later (`shift_tokens_right`): its start token
//! first, and the padding token where a target does not count. So the hidden state of each of its tokens predicts the label
//! at its own place.

use super::encode::{Encoder, Example, HeadRow, IGNORE_INDEX, Predictor, Truncation};
use super::error::DataError;
use super::format::Format;
use super::render::{Rendered, Renderer};
use super::source::Row;
use super::tokenizer::Framed;

/// The tokens that a decoder reads besides those of its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderInputs {
    /// What it begins with: `decoder_start_token_id`.
    pub start: u32,
    /// What stands for a target that does not count: `pad_token_id`.
    pub padding: u32,
}

impl DecoderInputs {
    /// What the decoder reads when it learns `labels`: the start token, then all but the last of them.
    #[must_use]
    pub fn of(self, labels: &[i32]) -> Vec<u32> {
        let read = |label: &i32| u32::try_from(*label).unwrap_or(self.padding);
        std::iter::once(self.start).chain(labels.iter().map(read)).take(labels.len()).collect()
    }
}

impl Renderer {
    /// Refuses formats without a source and a target.
    pub(super) fn check_pairs(&self) -> Result<(), DataError> {
        match self.format {
            Format::Text if self.hides_spans => Ok(()),
            Format::Text | Format::Chat | Format::Preference => Err(DataError::Config(format!(
                "the model writes a target for a source, which format {} does not tell apart; use format seq2seq (`source`, \
                 `target`), completion, alpaca or tokens; data.span_corruption makes a source and a target of a text",
                self.format
            ))),
            Format::Classification if self.template.is_none() => Err(DataError::Config(
                "format classification on an encoder-decoder needs `data.template`, which renders the source that the label \
                 answers, such as \"sentiment: {{ text }}\""
                    .into(),
            )),
            Format::Tokens if self.template.is_some() => {
                Err(DataError::Config("format tokens takes no `data.template`: its rows hold token ids".into()))
            }
            _ => Ok(()),
        }
    }
}

impl Encoder<'_> {
    /// Source and target of one row.
    pub(super) fn paired(&self, row: &Row, decoder: DecoderInputs) -> Result<Example, DataError> {
        let max = self.max_length.unwrap_or(usize::MAX);
        let cut = |framed: Framed| {
            let cut = framed.cut_to(max).map(|(framed, cut)| (framed.ids, cut));
            cut.ok_or_else(|| {
                DataError::row(&row.at, "data.max_length leaves no room beside the special tokens; raise it")
            })
        };
        let ((source, prompt_tokens), labels, target_tokens) = match self.renderer.render(row)? {
            Rendered::Prompted { prompt, completion } => {
                let (source, mut target) = (self.framed(&prompt, row)?, self.framed(&completion, row)?);
                let end = self.tokenizer.and_then(|t| t.eos_id());
                target.ids.extend(end.filter(|end| target.ids.last() != Some(end)));
                let (target, lost) = cut(target)?;
                self.check_vocabulary(&target, row)?;
                (cut(source)?, target.into_iter().map(|id| id as i32).collect(), lost)
            }
            Rendered::Tokens { input_ids, mut labels } => {
                let lost = labels.iter().skip(max).filter(|l| **l != IGNORE_INDEX).count();
                labels.truncate(max);
                (cut(Framed::of(input_ids))?, labels, lost)
            }
            Rendered::Text(text) => {
                let whole = self.framed(&text, row)?;
                let (inside, end) =
                    (whole.texts.first().cloned().unwrap_or_default(), self.tokenizer.and_then(|t| t.eos_id()));
                // A sentinel takes the place of a span of one or more tokens, so the source is no longer than the text.
                let room = max.saturating_sub(1);
                let ids = whole.ids.get(inside).unwrap_or_default();
                let kept = ids.get(..room.min(ids.len())).unwrap_or_default();
                let (mut source, mut target) = self
                    .with_hidden_spans(kept, &text)
                    .filter(|(_, target)| !target.is_empty())
                    .ok_or_else(|| DataError::row(&row.at, "a text of fewer than two tokens has nothing to hide"))?;
                source.extend(end);
                target.extend(end);
                let lost = target.len().saturating_sub(max);
                target.truncate(max);
                self.check_vocabulary(&target, row)?;
                ((source, ids.len() - kept.len()), target.into_iter().map(|id| id as i32).collect(), lost)
            }
            _ => return Err(DataError::row(&row.at, "this row has no source and target")),
        };
        self.check_vocabulary(&source, row)?;
        if source.is_empty() {
            return Err(DataError::row(&row.at, "the source has no tokens"));
        }
        if labels.iter().all(|l: &i32| *l == IGNORE_INDEX) {
            return Err(DataError::row(&row.at, "no token of this row's target counts"));
        }
        let source_tokens = source.len();
        let mut input_ids = source;
        input_ids.extend(decoder.of(&labels));
        Ok(Example {
            input_ids,
            labels: std::iter::repeat_n(IGNORE_INDEX, source_tokens).chain(labels).collect(),
            types: Vec::new(),
            source_tokens,
            task: None,
            predictor: Predictor::Own,
            head: HeadRow::default(),
            source: row.at.clone(),
            truncation: Truncation { prompt_tokens, target_tokens, whole_targets: 0 },
        })
    }

    fn framed(&self, text: &str, row: &Row) -> Result<Framed, DataError> {
        let tokenizer = self.tokenizer.ok_or_else(|| DataError::row(&row.at, "this format needs a tokenizer"))?;
        tokenizer.encode_framed(text, None).map_err(|e| DataError::row(&row.at, format!("tokenizer: {e}")))
    }
}
