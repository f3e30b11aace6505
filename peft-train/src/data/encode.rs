//! Rendered rows as token ids and labels.
//!
//! - `text`: the tokens as the tokenizer frames a sequence, all counted. No end token is added: the contract closes
//!   completions only, and a perplexity over `text` rows is then that of `tokenizer(text)` in transformers. `text_eos` closes
//!   each text, as TRL's `SFTTrainer` does; pretraining wants that.
//! - `completion`, `alpaca`, `classification`: front tokens that the post-processor puts (`<s>`), prompt, completion, end
//!   token. Prompt and completion are tokenised apart. The completion and the end token count.
//! - `chat`: the rendered conversation in one piece without further special tokens (the template writes them), as
//!   `apply_chat_template` does. Every token that shares a byte with an assistant turn counts, end of turn included.
//! - `tokens`: as they are.
//! - `preference`: each answer as one of these (`preferred_rows.rs`); a row's own is the chosen one.
//!
//! Rows for a head of its own are in `classes.rs`, `words.rs` and `questions.rs`, those for an encoder–decoder in `pairs.rs`.
//!
//! Labels are aligned with the ids: the label at `t` is what position `t − 1` predicts, so that of position 0 never counts.
//! With a class head or a decoder that reads shifted targets it is what position `t` itself predicts ([`Predictor`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use peft_core::HeadKind;

use super::chat::ChatTemplate;
use super::classes::ClassHead;
use super::corruption::{Corruption, Hiding};
use super::error::{DataError, Location};
use super::format::Format;
use super::pairs::DecoderInputs;
use super::questions::Question;
use super::render::{Rendered, Renderer};
use super::source::Row;
use super::tasks::task_of;
use super::template::RowTemplate;
use super::tokenizer::TextTokenizer;

/// Label of a token that does not count, PyTorch's `ignore_index`.
pub const IGNORE_INDEX: i32 = -100;

/// How rows become examples.
#[derive(Clone, Debug)]
pub struct EncodeOptions {
    /// What the columns mean.
    pub format: Format,
    /// `data.template`: minijinja over the columns; the whole text of `text` rows, the prompt of others.
    pub template: Option<String>,
    /// `data.chat_template`: path or text, instead of the tokenizer's own.
    pub chat_template: Option<String>,
    /// `data.label_words`: the words for labels of `classification` rows; empty: the labels themselves.
    pub label_words: BTreeMap<String, String>,
    /// `data.max_length` in tokens; longer rows are truncated (see [`Truncation`]).
    pub max_length: Option<usize>,
    /// Closes `text` rows with the end token.
    pub text_eos: bool,
    /// The model's vocabulary; ids outside are errors.
    pub vocab_size: Option<usize>,
    /// The head of a model that has one of its own; rows then hold what it is for.
    pub class_head: Option<ClassHead>,
    /// Keeps the texts of question answering rows, which its scores are made of.
    pub keep_answers: bool,
    /// What the decoder of an encoder–decoder reads; rows then hold a source and a target each.
    pub decoder: Option<DecoderInputs>,
    /// How many tasks the adapter has, where it depends on them; rows then name theirs.
    pub tasks: Option<usize>,
    /// Takes rows of format `preference`, of which the chosen answer, or the only one, is then the row's own.
    pub preferences: bool,
    /// What is hidden of rows of format `text`.
    pub corruption: Option<Corruption>,
    /// Seed of what is hidden.
    pub seed: u64,
}

impl EncodeOptions {
    /// Plain options for a format: no template, no length limit, no vocabulary check.
    pub fn new(format: Format) -> Self {
        Self {
            format,
            template: None,
            chat_template: None,
            label_words: BTreeMap::new(),
            max_length: None,
            text_eos: false,
            vocab_size: None,
            class_head: None,
            keep_answers: false,
            decoder: None,
            tasks: None,
            preferences: false,
            corruption: None,
            seed: 0,
        }
    }
}

/// Whose hidden state predicts the label at a position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Predictor {
    /// That of the position before: causal language models.
    #[default]
    Previous,
    /// That of the position itself: class heads, and decoders that read shifted targets.
    Own,
}

impl Predictor {
    /// How many positions a label lies behind its predictor.
    pub fn distance(self) -> usize {
        match self {
            Self::Previous => 1,
            Self::Own => 0,
        }
    }
}

/// What a row holds for a head of its own, besides labels.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadRow {
    /// What the head is for.
    pub kind: HeadKind,
    /// The numbers of a regression, or of each class whether it is the row's (1 or 0), `[outputs]`; empty for other heads.
    pub values: Vec<f32>,
    /// The texts of a question, where they are kept.
    pub question: Option<Arc<Question>>,
}

/// One row as tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// Aligned with `input_ids`; [`IGNORE_INDEX`] where nothing counts.
    pub labels: Vec<i32>,
    /// Token types, aligned with `input_ids`; empty where all are 0.
    pub types: Vec<u32>,
    /// How many tokens in front are the source of an encoder–decoder; the others are what its decoder reads.
    pub source_tokens: usize,
    /// The task of the row, where the adapter depends on it.
    pub task: Option<u32>,
    /// Whose hidden state predicts a label.
    pub predictor: Predictor,
    /// What the row holds for a head of its own.
    pub head: HeadRow,
    /// File and line.
    pub source: Location,
    /// What the length limit took away.
    pub truncation: Truncation,
}

/// What the length limit took away from a row: first context from the left of what stands before the first target (a
/// begin token stays), then tokens from the right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Truncation {
    /// Context tokens cut before the first target.
    pub prompt_tokens: usize,
    /// Counted tokens cut.
    pub target_tokens: usize,
    /// Targets cut as a whole: later turns of a conversation that is too long.
    pub whole_targets: usize,
}

/// Turns rows into examples. Shared by threads.
pub struct Encoder<'a> {
    pub(super) tokenizer: Option<&'a dyn TextTokenizer>,
    pub(super) renderer: Renderer,
    front: Vec<u32>,
    pub(super) max_length: Option<usize>,
    text_eos: bool,
    pub(super) keep_answers: bool,
    vocab_size: Option<usize>,
    pub(super) tasks: Option<usize>,
    pub(super) hiding: Option<Hiding>,
    pub(super) seed: u64,
}

impl std::fmt::Debug for Encoder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder")
            .field("renderer", &self.renderer)
            .field("front", &self.front)
            .field("max_length", &self.max_length)
            .finish_non_exhaustive()
    }
}

impl<'a> Encoder<'a> {
    /// Checks that format, templates and tokenizer go together. Only format `tokens` does without a tokenizer.
    ///
    /// # Errors
    /// Settings that do not fit, template syntax errors, a tokenizer without end token where one closes the rows.
    pub fn new(tokenizer: Option<&'a dyn TextTokenizer>, options: &EncodeOptions) -> Result<Self, DataError> {
        let format = options.format;
        let config = |message: String| DataError::Config(message);
        if options.max_length.is_some_and(|m| m < 2) {
            return Err(config("data.max_length must be 2 or more".into()));
        }
        // Rows of preferences may hold tokens, too.
        if tokenizer.is_none() && !matches!(format, Format::Tokens | Format::Preference) {
            return Err(config(format!(
                "format {format} needs a tokenizer and the model has none; put its tokenizer.json beside the model, or use \
                 format tokens"
            )));
        }
        let template = options.template.as_deref().map(RowTemplate::new).transpose()?;
        let chat = match (format, tokenizer) {
            (Format::Chat | Format::Preference, Some(tokenizer)) => {
                let own = options.chat_template.as_deref().map(ChatTemplate::source_of).transpose();
                let source =
                    own.map_err(|e| config(e.to_string()))?.or_else(|| tokenizer.chat_template().map(str::to_string));
                source
                    .map(|s| ChatTemplate::new(&s, tokenizer.bos_token(), tokenizer.eos_token()))
                    .transpose()
                    .map_err(|e| config(e.to_string()))?
            }
            _ => None,
        };
        let renderer = Renderer {
            format,
            template,
            chat,
            label_words: options.label_words.clone(),
            class_head: options.class_head.clone(),
            decoder: options.decoder,
            vocab_size: options.vocab_size,
            preferences: options.preferences,
            hides_spans: matches!(options.corruption, Some(Corruption::Spans(_))),
        };
        renderer.check()?;
        let hiding = match (&options.corruption, tokenizer) {
            (Some(corruption), Some(tokenizer)) => {
                let (name, model, fits) = match corruption {
                    Corruption::Middle(_) => {
                        ("fill_in_the_middle", "a causal language model", options.decoder.is_none())
                    }
                    Corruption::Spans(_) => ("span_corruption", "an encoder-decoder", options.decoder.is_some()),
                };
                if format != Format::Text || !fits || options.class_head.is_some() {
                    return Err(config(format!("data.{name} goes with rows of format text and {model}")));
                }
                Some(corruption.resolve(tokenizer)?)
            }
            _ => None,
        };
        let closes = match format {
            Format::Completion | Format::Alpaca => true,
            Format::Classification => options.class_head.is_none(),
            Format::Text => options.text_eos,
            _ => false,
        };
        if closes && tokenizer.is_some_and(|t| t.eos_id().is_none()) {
            return Err(config(format!(
                "format {format} closes a row with the end token, and the tokenizer names none; set `eos_token` in \
                 tokenizer_config.json"
            )));
        }
        Ok(Self {
            front: tokenizer.map(front_tokens).transpose()?.unwrap_or_default(),
            tokenizer,
            renderer,
            max_length: options.max_length,
            text_eos: options.text_eos,
            keep_answers: options.keep_answers,
            vocab_size: options.vocab_size,
            tasks: options.tasks,
            hiding,
            seed: options.seed,
        })
    }

    /// Tokens and labels of one row.
    ///
    /// # Errors
    /// With file and line: missing or ill-typed columns, template failures, ids outside the vocabulary, and rows in which
    /// no token counts.
    pub fn encode(&self, row: &Row) -> Result<Example, DataError> {
        let task = self.tasks.map(|tasks| task_of(row, tasks)).transpose()?;
        Ok(Example { task, ..self.tokens(row)? })
    }

    fn tokens(&self, row: &Row) -> Result<Example, DataError> {
        if let Some(head) = &self.renderer.class_head {
            return self.headed(row, head);
        }
        if let Some(decoder) = self.renderer.decoder {
            return self.paired(row, decoder);
        }
        if self.renderer.format == Format::Preference {
            self.renderer.check()?;
            return Ok(self.preferred(row)?.own());
        }
        self.of_rendered(self.renderer.render(row)?, row)
    }

    /// Tokens and labels of what a row was rendered to, for a causal language model.
    pub(super) fn of_rendered(&self, rendered: Rendered, row: &Row) -> Result<Example, DataError> {
        let (mut input_ids, mut labels) = match rendered {
            Rendered::Tokens { input_ids, labels } => (input_ids, labels),
            rendered => self.tokenise(rendered, row)?,
        };
        let counted = |labels: &[i32]| labels.iter().skip(1).any(|&l| l != IGNORE_INDEX);
        if !counted(&labels) {
            let why = match labels.len() {
                0 => "it has no tokens",
                1 => "it has one token, and the first has nothing before it to be predicted from",
                _ => "all its labels are -100 (that of the first token never counts)",
            };
            return Err(DataError::row(&row.at, format!("no token of this row counts: {why}")));
        }
        let front = self.kept_in_front(&input_ids);
        let truncation = match self.max_length {
            Some(max) => truncate(&mut input_ids, &mut labels, front, max),
            None => Truncation::default(),
        };
        if !counted(&labels) {
            return Err(DataError::row(
                &row.at,
                format!(
                    "no token of this row counts once it is cut to data.max_length = {}; raise it or shorten the row",
                    input_ids.len()
                ),
            ));
        }
        let (types, predictor) = (Vec::new(), Predictor::Previous);
        Ok(Example {
            input_ids,
            labels,
            types,
            source_tokens: 0,
            task: None,
            predictor,
            head: HeadRow::default(),
            source: row.at.clone(),
            truncation,
        })
    }

    /// Refuses a token of the tokenizer that the model has no embedding for.
    pub(super) fn check_vocabulary(&self, ids: &[u32], row: &Row) -> Result<(), DataError> {
        let outside = |id: &&u32| i32::try_from(**id).is_err() || self.vocab_size.is_some_and(|v| **id as usize >= v);
        match ids.iter().find(outside) {
            None => Ok(()),
            Some(id) => Err(DataError::row(
                &row.at,
                format!(
                    "the tokenizer gives id {id}, the model's vocabulary has {}; tokenizer and model do not belong together",
                    self.vocab_size.unwrap_or_default()
                ),
            )),
        }
    }

    fn tokenise(&self, rendered: Rendered, row: &Row) -> Result<(Vec<u32>, Vec<i32>), DataError> {
        let failed = |e: super::tokenizer::TokenizerError| DataError::row(&row.at, format!("tokenizer: {e}"));
        let tokenizer = self.tokenizer.ok_or_else(|| {
            let message = "this row needs a tokenizer, and the model has none; put its tokenizer.json beside the model, or give \
                           token ids";
            DataError::row(&row.at, message)
        })?;
        let close = |ids: &mut Vec<u32>| {
            if let Some(eos) = tokenizer.eos_id().filter(|eos| ids.last() != Some(eos)) {
                ids.push(eos);
            }
        };
        let (ids, counted): (Vec<u32>, Vec<std::ops::Range<usize>>) = match rendered {
            Rendered::Text(text)
                if self.hiding.is_some()
                    && let Some((ids, counted)) = self.with_middle_last(&text, row, tokenizer)? =>
            {
                (ids, vec![counted])
            }
            Rendered::Text(text) => {
                let mut ids = tokenizer.encode(&text, true).map_err(failed)?;
                if self.text_eos {
                    close(&mut ids);
                }
                let all = 0..ids.len();
                (ids, vec![all])
            }
            Rendered::Prompted { prompt, completion } => {
                let mut ids = self.front.clone();
                ids.extend(tokenizer.encode(&prompt, false).map_err(failed)?);
                let start = ids.len();
                let mut target = tokenizer.encode(&completion, false).map_err(failed)?;
                close(&mut target);
                ids.extend(target);
                let target = start..ids.len();
                (ids, vec![target])
            }
            Rendered::Chat { text, targets } => {
                let (ids, spans) = tokenizer.encode_with_spans(&text).map_err(failed)?;
                let counted = targets
                    .iter()
                    .filter_map(|target| {
                        let shares = |s: &std::ops::Range<usize>| s.start < target.end && s.end > target.start;
                        let first = spans.iter().position(shares)?;
                        let last = spans.iter().rposition(shares)?;
                        Some(first..last + 1)
                    })
                    .collect();
                (ids, counted)
            }
            Rendered::Tokens { .. } => (Vec::new(), Vec::new()),
        };
        self.check_vocabulary(&ids, row)?;
        let mut labels = vec![IGNORE_INDEX; ids.len()];
        for span in counted {
            for (label, &id) in labels.iter_mut().zip(&ids).take(span.end).skip(span.start) {
                *label = id as i32;
            }
        }
        Ok((ids, labels))
    }

    /// The special tokens that the post-processor puts before a sequence.
    pub(super) fn front(&self) -> &[u32] {
        &self.front
    }

    /// How many leading tokens truncation leaves: the post-processor's front tokens, where a row begins with them.
    fn kept_in_front(&self, ids: &[u32]) -> usize {
        if ids.starts_with(&self.front) { self.front.len() } else { 0 }
    }
}

/// The special tokens that the post-processor puts before a sequence.
fn front_tokens(tokenizer: &dyn TextTokenizer) -> Result<Vec<u32>, DataError> {
    let probe = |special| tokenizer.encode("a", special).map_err(|e| DataError::Config(format!("tokenizer: {e}")));
    let (bare, framed) = (probe(false)?, probe(true)?);
    if bare.is_empty() {
        return Ok(Vec::new());
    }
    let start = framed.windows(bare.len()).position(|w| w == bare).unwrap_or(0);
    Ok(framed.get(..start).unwrap_or_default().to_vec())
}

fn truncate(ids: &mut Vec<u32>, labels: &mut Vec<i32>, front: usize, max: usize) -> Truncation {
    let excess = ids.len().saturating_sub(max);
    if excess == 0 {
        return Truncation::default();
    }
    let counted = |l: &i32| *l != IGNORE_INDEX;
    let first = labels.iter().position(counted).unwrap_or(labels.len());
    // One token of context stays, so that the first token of the target still counts.
    let keep = front.max(1);
    let cut = excess.min(first.saturating_sub(keep));
    let from = keep.min(first) - usize::from(front == 0 && cut > 0);
    ids.drain(from..from + cut);
    labels.drain(from..from + cut);
    let lost = labels.get(max..).unwrap_or_default();
    let last_kept = max.checked_sub(1).and_then(|i| labels.get(i)).is_some_and(counted);
    let mut whole_targets = 0;
    let mut inside = last_kept;
    for label in lost {
        if counted(label) && !inside {
            whole_targets += 1;
        }
        inside = counted(label);
    }
    let truncation =
        Truncation { prompt_tokens: cut, target_tokens: lost.iter().filter(|l| counted(l)).count(), whole_targets };
    ids.truncate(max);
    labels.truncate(max);
    truncation
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(labels: &[i32], front: usize, max: usize) -> (Vec<u32>, Vec<i32>, Truncation) {
        let mut ids: Vec<u32> = (0..labels.len() as u32).collect();
        let mut labels = labels.to_vec();
        let t = truncate(&mut ids, &mut labels, front, max);
        (ids, labels, t)
    }

    #[test]
    fn context_goes_first_from_the_left() {
        let row = [-100, -100, -100, -100, 4, 5];
        assert_eq!(cut(&row, 0, 6).0, [0, 1, 2, 3, 4, 5]);
        assert_eq!(cut(&row, 0, 4).0, [2, 3, 4, 5]);
        assert_eq!(cut(&row, 1, 4).0, [0, 3, 4, 5]);
        let (ids, labels, t) = cut(&row, 0, 2);
        assert_eq!((ids, labels), (vec![3, 4], vec![-100, 4]));
        assert_eq!((t.prompt_tokens, t.target_tokens, t.whole_targets), (3, 1, 0));
        let (ids, _, t) = cut(&row, 1, 2);
        assert_eq!((ids, t.prompt_tokens), (vec![0, 4], 3));
        // Front tokens that leave no room: the caller sees that nothing counts.
        assert_eq!(cut(&row, 3, 2).1, [-100, -100]);
    }

    #[test]
    fn later_targets_are_reported() {
        let (ids, _, t) = cut(&[-100, 1, -100, 3, -100, 5, 6], 0, 3);
        assert_eq!(ids, [0, 1, 2]);
        assert_eq!((t.prompt_tokens, t.target_tokens, t.whole_targets), (0, 3, 2));
        let (ids, _, t) = cut(&[0, 1, 2, 3], 0, 3);
        assert_eq!(ids, [0, 1, 2]);
        assert_eq!((t.target_tokens, t.whole_targets), (1, 0));
    }
}
