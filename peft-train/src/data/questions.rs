//! Rows for a head that finds an answer: a question, a context, and where in it the answer stands (SQuAD, Rajpurkar et al. 2016,
//! arXiv:1606.05250).
//!
//! The label of a token has a bit for the first token of the answer and one for the last. Where a row has no answer (SQuAD 2.0), or its
//! answer was cut away with the end of a long context, both are the first token, `[CLS]`, as in transformers' `run_qa.py`.

use std::ops::Range;
use std::sync::Arc;

use peft_core::HeadKind;
use serde_json::Value;

use super::encode::{Encoder, Example, HeadRow, Predictor, Truncation};
use super::error::DataError;
use super::format::Format;
use super::source::Row;
use super::tokenizer::Framed;

/// The bit of an answer's first token.
pub(crate) const START: u32 = 1;
/// The bit of its last.
pub(crate) const END: u32 = 2;

/// The texts of a row, which scores are made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Where the answer is sought.
    pub context: String,
    /// The first of its tokens in the row.
    pub first: usize,
    /// The bytes of the context that each of its tokens stands for.
    pub spans: Vec<Range<usize>>,
    /// What is right, any of them; none where the context holds no answer.
    pub answers: Vec<String>,
}

/// An answer, and the bytes of the context that it is.
struct Answer {
    text: String,
    bytes: Range<usize>,
}

/// The answers of a row: `{"text": […], "answer_start": […]}` as on the hub, or `[{"text", "answer_start"}, …]` as in SQuAD's files;
/// starts are counted in characters.
fn answers_of(row: &Row, context: &str) -> Result<Vec<Answer>, DataError> {
    let value = row.required("answers")?;
    let expected = "{text: [...], answer_start: [...]}, or a list of {text, answer_start}";
    let wrong = || row.wrong_type("answers", expected, value);
    let pairs: Vec<(&Value, &Value)> = match value {
        Value::Object(both) => {
            let part = |name: &str| {
                both.get(name).map_or(&[][..], |part| part.as_array().map_or(std::slice::from_ref(part), |a| a))
            };
            let (texts, starts) = (part("text"), part("answer_start"));
            if texts.len() != starts.len() {
                let message =
                    format!("`answers` has {} texts and {} starts; each text has one", texts.len(), starts.len());
                return Err(DataError::row(&row.at, message));
            }
            texts.iter().zip(starts).collect()
        }
        Value::Array(answers) => {
            let both = |answer: &'_ Value| answer.get("text").is_some() && answer.get("answer_start").is_some();
            if !answers.iter().all(both) {
                return Err(wrong());
            }
            answers.iter().filter_map(|answer| Some((answer.get("text")?, answer.get("answer_start")?))).collect()
        }
        _ => return Err(wrong()),
    };
    let answer = |(i, (text, start)): (usize, (&Value, &Value))| {
        let text = text.as_str().ok_or_else(|| row.wrong_type(&format!("answers.text[{i}]"), "a string", text))?;
        let of = start.as_u64().and_then(|start| usize::try_from(start).ok());
        let start = of.ok_or_else(|| {
            row.wrong_type(&format!("answers.answer_start[{i}]"), "a whole number of characters", start)
        })?;
        let from = context.char_indices().map(|(at, _)| at).nth(start);
        match from.filter(|&from| !text.is_empty() && context.get(from..).is_some_and(|rest| rest.starts_with(text))) {
            Some(from) => Ok(Answer { text: text.to_owned(), bytes: from..from + text.len() }),
            None => {
                let there: String = context.chars().skip(start).take(text.chars().count().max(1)).collect();
                let message = format!(
                    "answer `{text}` is not in its context at character {start}, where it has `{there}`; `answer_start` counts \
                     characters from 0"
                );
                Err(DataError::row(&row.at, message))
            }
        }
    };
    pairs.into_iter().enumerate().map(answer).collect()
}

/// The tokens among `spans` that hold `bytes`, or None where they do not hold all of it.
fn tokens_of(bytes: &Range<usize>, spans: &[Range<usize>]) -> Option<(usize, usize)> {
    let inside = spans.first()?.start <= bytes.start && spans.last()?.end >= bytes.end;
    let first = spans.iter().rposition(|span| span.start <= bytes.start)?;
    let last = spans.iter().position(|span| span.end >= bytes.end)?;
    (inside && first <= last).then_some((first, last))
}

impl Encoder<'_> {
    /// Tokens of one row, and the first and last of its answer.
    pub(super) fn asked(&self, row: &Row) -> Result<Example, DataError> {
        if self.renderer.format == Format::Tokens {
            return self.asked_in_tokens(row);
        }
        let tokenizer = self.tokenizer.ok_or_else(|| DataError::row(&row.at, "this format needs a tokenizer"))?;
        let (question, context) = (row.string("question")?, row.string("context")?);
        let answers = answers_of(row, context)?;
        let encoded = tokenizer.encode_question(question, context);
        let (framed, mut spans) = encoded.map_err(|e| DataError::row(&row.at, format!("tokenizer: {e}")))?;
        self.check_vocabulary(&framed.ids, row)?;
        let (framed, gone) = framed
            .cut_last(self.max_length.unwrap_or(usize::MAX))
            .filter(|(framed, _)| framed.texts.last().is_some_and(|text| !text.is_empty()))
            .ok_or_else(|| {
                let message = "no token of the context is left: it is empty, or data.max_length leaves no room beside the question; \
                               raise it";
                DataError::row(&row.at, message)
            })?;
        let cut = gone.len();
        spans.drain(gone);
        let context_tokens = framed.texts.last().cloned().unwrap_or_default();
        let first = context_tokens.start;
        let spans = spans.get(context_tokens).unwrap_or_default().to_vec();
        let found = answers.first().and_then(|answer| tokens_of(&answer.bytes, &spans));
        let lost = !answers.is_empty() && found.is_none();
        let answer = found.map_or((0, 0), |(from, to)| (first + from, first + to));
        let kept = || Question {
            context: context.to_owned(),
            first,
            spans,
            answers: answers.into_iter().map(|answer| answer.text).collect(),
        };
        let question = self.keep_answers.then(|| Arc::new(kept()));
        let truncation = Truncation { prompt_tokens: cut, target_tokens: usize::from(lost), ..Truncation::default() };
        Ok(example(row, framed, answer, question, truncation))
    }

    fn asked_in_tokens(&self, row: &Row) -> Result<Example, DataError> {
        let ids = self.renderer.input_ids(row)?;
        let most = self.max_length.unwrap_or(usize::MAX).min(ids.len());
        let place = |name: &str| {
            let value = row.required(name)?;
            let place = value.as_u64().and_then(|place| usize::try_from(place).ok());
            let place = place.ok_or_else(|| row.wrong_type(name, "the number of a token", value))?;
            if place >= most {
                let message = format!("`{name}` is {place}, and the row has {most} tokens, counted from 0");
                return Err(DataError::row(&row.at, message));
            }
            Ok(place)
        };
        let (from, to) = (place("start_positions")?, place("end_positions")?);
        if from > to {
            let message = format!("the answer starts at token {from} and ends before it, at {to}");
            return Err(DataError::row(&row.at, message));
        }
        let cut = ids.len() - most;
        let framed = Framed { ids: ids.into_iter().take(most).collect(), ..Framed::default() };
        Ok(example(row, framed, (from, to), None, Truncation { prompt_tokens: cut, ..Truncation::default() }))
    }
}

fn example(
    row: &Row,
    framed: Framed,
    (from, to): (usize, usize),
    question: Option<Arc<Question>>,
    truncation: Truncation,
) -> Example {
    let bits = |t: usize| i32::from(t == from) * START as i32 + i32::from(t == to) * END as i32;
    Example {
        labels: (0..framed.ids.len()).map(bits).collect(),
        input_ids: framed.ids,
        types: framed.types,
        source_tokens: 0,
        task: None,
        predictor: Predictor::Own,
        head: HeadRow { kind: HeadKind::QuestionAnswering, values: Vec::new(), question },
        source: row.at.clone(),
        truncation,
    }
}
