//! Rows for a head over tokens: words that are split already, and a class for each.
//!
//! The first token of a word carries its class, the others none, as transformers' examples have it (`run_ner.py`).

use serde_json::Value;

use super::classes::ClassHead;
use super::encode::{Encoder, Example, HeadRow, IGNORE_INDEX, Predictor, Truncation};
use super::error::DataError;
use super::format::Format;
use super::source::Row;
use super::tokenizer::Framed;

/// The column that holds the classes of a row's words.
fn column(row: &Row, format: Format) -> &'static str {
    match format {
        Format::TokenClassification if !row.fields.contains_key("labels") && row.fields.contains_key("ner_tags") => {
            "ner_tags"
        }
        _ => "labels",
    }
}

/// The list in a column.
fn list<'r>(row: &'r Row, name: &str, expected: &str) -> Result<&'r [Value], DataError> {
    let value = row.required(name)?;
    value.as_array().map(Vec::as_slice).ok_or_else(|| row.wrong_type(name, expected, value))
}

/// The labels of a row's words or tokens as they stand there.
pub(super) fn labels_of(row: &Row, format: Format) -> Result<(&'static str, &[Value]), DataError> {
    let name = column(row, format);
    Ok((name, list(row, name, "a list of classes, one a word")?))
}

impl Encoder<'_> {
    /// Tokens of one row, and a class for those that carry one.
    pub(super) fn worded(&self, row: &Row, head: &ClassHead) -> Result<Example, DataError> {
        let format = self.renderer.format;
        let (name, given) = labels_of(row, format)?;
        let class = |(i, label): (usize, &Value)| match label.as_i64() {
            Some(ignored) if ignored == i64::from(IGNORE_INDEX) => Ok(IGNORE_INDEX),
            _ => match head.class_of(label) {
                Ok(class) => Ok(class as i32),
                Err(why) => Err(DataError::row(&row.at, format!("`{name}[{i}]`: {why}"))),
            },
        };
        let classes = given.iter().enumerate().map(class).collect::<Result<Vec<i32>, _>>()?;
        let unequal = |of: &str, n: usize| {
            let message = format!(
                "`{name}` has {} entries, `{of}` {n}; there is one for each, and -100 where nothing counts",
                classes.len()
            );
            DataError::row(&row.at, message)
        };
        let (framed, mut labels) = if format == Format::Tokens {
            let ids = self.renderer.input_ids(row)?;
            if ids.len() != classes.len() {
                return Err(unequal("input_ids", ids.len()));
            }
            (Framed::of(ids), classes)
        } else {
            let words = list(row, "tokens", "a list of words")?;
            let word = |(i, w): (usize, &'_ Value)| match w {
                Value::String(_) => Ok(()),
                other => Err(row.wrong_type(&format!("tokens[{i}]"), "a word", other)),
            };
            words.iter().enumerate().try_for_each(word)?;
            let words: Vec<&str> = words.iter().filter_map(Value::as_str).collect();
            if words.len() != classes.len() {
                return Err(unequal("tokens", words.len()));
            }
            let tokenizer = self.tokenizer.ok_or_else(|| DataError::row(&row.at, "this format needs a tokenizer"))?;
            let (framed, words) =
                tokenizer.encode_words(&words).map_err(|e| DataError::row(&row.at, format!("tokenizer: {e}")))?;
            self.check_vocabulary(&framed.ids, row)?;
            let mut last = None;
            let mut carried = |word: Option<usize>| {
                let first = word.filter(|_| word != last);
                last = word;
                first.and_then(|word| classes.get(word)).copied().unwrap_or(IGNORE_INDEX)
            };
            (framed, words.into_iter().map(&mut carried).collect())
        };
        let counts = |labels: &[i32]| labels.iter().filter(|l| **l != IGNORE_INDEX).count();
        let all = counts(&labels);
        if all == 0 {
            return Err(DataError::row(&row.at, format!("no token of this row counts: `{name}` holds no class")));
        }
        let cut = framed.cut_last(self.max_length.unwrap_or(usize::MAX));
        let Some((framed, gone)) = cut else {
            return Err(DataError::row(&row.at, "data.max_length leaves no room beside the special tokens; raise it"));
        };
        labels.drain(gone);
        let target_tokens = all - counts(&labels);
        if target_tokens == all {
            let message = "no token of this row counts once it is cut to data.max_length; raise it or shorten the row";
            return Err(DataError::row(&row.at, message));
        }
        Ok(Example {
            input_ids: framed.ids,
            labels,
            types: framed.types,
            source_tokens: 0,
            task: None,
            predictor: Predictor::Own,
            head: HeadRow { kind: head.kind, ..HeadRow::default() },
            source: row.at.clone(),
            truncation: Truncation { target_tokens, ..Truncation::default() },
        })
    }
}
