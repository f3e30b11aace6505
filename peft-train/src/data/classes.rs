//! Rows for a class head: a text or a pair of texts, and one class.
//!
//! A text is framed by the tokenizer's post-processor as transformers frames it (`[CLS] text [SEP] text_pair [SEP]`). The
//! class is the label of the token whose hidden state reaches the head; no other token counts.

use std::collections::BTreeSet;

use peft_core::ClassToken;
use serde_json::Value;

use super::encode::{Encoder, Example, IGNORE_INDEX, Predictor, Truncation};
use super::error::{DataError, nearest};
use super::format::Format;
use super::render::Rendered;
use super::source::{DataSpec, Row, data_files, read_rows};
use super::tokenizer::Framed;

/// Data with more different names than this holds no classes.
const MOST_NAMES: usize = 1000;
/// A class number beyond this is a mistake in the data.
const MOST_CLASSES: u64 = 1 << 20;

/// The classes of a model's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassHead {
    /// Names of the classes, by their number.
    pub labels: Vec<String>,
    /// The token whose hidden state reaches the head.
    pub reads: ClassToken,
}

impl ClassHead {
    /// The number of the class that `label` means: its name, or its number.
    ///
    /// # Errors
    /// In words: a class that the head does not have, or a value that is no class.
    pub fn class_of(&self, label: &Value) -> Result<u32, String> {
        let named = |name: &str| self.labels.iter().position(|l| l == name);
        let inside = |n: u64| usize::try_from(n).ok().filter(|n| *n < self.labels.len());
        let found = match label {
            Value::Bool(b) => named(if *b { "true" } else { "false" }).or_else(|| inside(u64::from(*b))),
            Value::Number(n) => match whole(label) {
                Some(n) => inside(n),
                None if n.as_i64().is_some() => None,
                None => return Err(format!("{n} is not a class: a head with classes takes whole numbers or names")),
            },
            Value::String(s) => named(s).or_else(|| s.trim().parse().ok().and_then(inside)),
            other => return Err(format!("{} is not a class", super::source::kind_of(other))),
        };
        found.and_then(|n| u32::try_from(n).ok()).ok_or_else(|| self.unknown(label))
    }

    fn unknown(&self, label: &Value) -> String {
        let shown: Vec<String> = self.labels.iter().take(12).map(|l| format!("`{l}`")).collect();
        let more = if self.labels.len() > shown.len() { ", …" } else { "" };
        let hint = label.as_str().and_then(|l| nearest(l, self.labels.iter().map(String::as_str)));
        let hint = hint.map_or_else(String::new, |n| format!("; did you mean `{n}`?"));
        format!(
            "label {label} is outside the head, which has {} classes: {}{more} (numbers 0 to {}){hint}; data.labels names \
             the classes in the order of their numbers",
            self.labels.len(),
            shown.join(", "),
            self.labels.len().saturating_sub(1)
        )
    }
}

/// A number that is whole and not negative, `1.0` included, which tables make of 1 where a column has gaps.
fn whole(value: &Value) -> Option<u64> {
    let as_float = |x: f64| (x >= 0.0 && x.fract() == 0.0 && x <= MOST_CLASSES as f64).then_some(x as u64);
    value.as_u64().or_else(|| value.as_f64().and_then(as_float))
}

/// The column that holds a row's class.
fn class_column(row: &Row, format: Format) -> &'static str {
    let in_labels = format == Format::Tokens && !row.fields.contains_key("label") && row.fields.contains_key("labels");
    if in_labels { "labels" } else { "label" }
}

/// The class of a row.
pub(crate) fn row_class(row: &Row, format: Format, head: &ClassHead) -> Result<u32, DataError> {
    let column = class_column(row, format);
    head.class_of(row.required(column)?).map_err(|why| DataError::row(&row.at, format!("`{column}`: {why}")))
}

/// The classes that occur in the data, for a head that is to be made: as many as the largest number says, called
/// `LABEL_0`, `LABEL_1`, …, or the names in alphabetical order.
///
/// # Errors
/// Rows that cannot be read or have no label; numbers that are no classes; more names than classes can be.
pub fn labels_in(spec: &DataSpec) -> Result<Vec<String>, DataError> {
    let (paths, _) = spec.parts()?;
    let (mut names, mut largest, mut numbers_only) = (BTreeSet::new(), 0, true);
    for path in paths {
        for file in data_files(path)? {
            for row in read_rows(&file)? {
                let row = row?;
                let format = if row.fields.contains_key("input_ids") { Format::Tokens } else { Format::Classification };
                let label = row.required(class_column(&row, format))?;
                let number = whole(label).or_else(|| label.as_str().and_then(|s| s.trim().parse().ok()));
                match (number.filter(|n| *n < MOST_CLASSES), label) {
                    (Some(n), _) => largest = largest.max(n),
                    (None, Value::String(_) | Value::Bool(_)) => numbers_only = false,
                    (None, other) => {
                        return Err(DataError::row(
                            &row.at,
                            format!(
                                "label {other} is not a class: classes are names, or numbers from 0; regression is not \
                                 supported"
                            ),
                        ));
                    }
                }
                names.insert(label.as_str().map_or_else(|| label.to_string(), str::to_owned));
                if !numbers_only && names.len() > MOST_NAMES {
                    return Err(DataError::row(
                        &row.at,
                        format!("more than {MOST_NAMES} different labels: `label` does not hold classes"),
                    ));
                }
            }
        }
    }
    Ok(if numbers_only { (0..=largest).map(|i| format!("LABEL_{i}")).collect() } else { names.into_iter().collect() })
}

impl Encoder<'_> {
    /// Tokens and class of one row.
    pub(super) fn classified(&self, row: &Row, head: &ClassHead) -> Result<Example, DataError> {
        let (framed, class) = match self.renderer.render(row)? {
            Rendered::Classified { text, pair, class } => {
                let tokenizer =
                    self.tokenizer.ok_or_else(|| DataError::row(&row.at, "this format needs a tokenizer"))?;
                let framed = tokenizer.encode_framed(&text, pair.as_deref());
                (framed.map_err(|e| DataError::row(&row.at, format!("tokenizer: {e}")))?, class)
            }
            Rendered::ClassifiedTokens { input_ids, class } => (Framed::of(input_ids), class),
            _ => return Err(DataError::row(&row.at, "this row has no class")),
        };
        let Some((framed, cut)) = framed.cut_to(self.max_length.unwrap_or(usize::MAX)) else {
            return Err(DataError::row(&row.at, "data.max_length leaves no room beside the special tokens; raise it"));
        };
        let Framed { ids: input_ids, types, .. } = framed;
        if input_ids.is_empty() {
            return Err(DataError::row(&row.at, "the row has no tokens"));
        }
        self.check_vocabulary(&input_ids, row)?;
        let mut labels = vec![IGNORE_INDEX; input_ids.len()];
        let place = match head.reads {
            ClassToken::First => labels.first_mut(),
            ClassToken::Last => labels.last_mut(),
        };
        if let (Some(place), Ok(class)) = (place, i32::try_from(class)) {
            *place = class;
        }
        let truncation = Truncation { prompt_tokens: cut, ..Truncation::default() };
        let predictor = Predictor::Own;
        Ok(Example {
            input_ids,
            labels,
            types,
            source_tokens: 0,
            task: None,
            predictor,
            source: row.at.clone(),
            truncation,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    #[test]
    fn labels_are_names_or_numbers() {
        let labels = ["negative", "positive"].map(str::to_string).to_vec();
        let head = ClassHead { labels, reads: ClassToken::First };
        for (label, class) in
            [(json!("positive"), 1), (json!(0), 0), (json!("1"), 1), (json!(1.0), 1), (json!(true), 1)]
        {
            assert_eq!(head.class_of(&label).unwrap(), class, "{label}");
        }
        for (label, says) in [
            (json!("postive"), "did you mean `positive`"),
            (json!(2), "numbers 0 to 1"),
            (json!(-1), "outside the head"),
            (json!(0.5), "whole numbers"),
            (json!([1]), "not a class"),
            (json!(null), "not a class"),
        ] {
            let e = head.class_of(&label).unwrap_err();
            assert!(e.contains(says), "{label}: {e}");
        }
    }

    fn labels_of(rows: &str) -> Result<Vec<String>, DataError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rows.jsonl");
        std::fs::write(&file, rows).unwrap();
        labels_in(&DataSpec::from(file.as_path()))
    }

    #[test]
    fn classes_are_found_in_the_data() {
        let rows = |labels: &[Value]| {
            labels.iter().map(|l| format!("{}\n", json!({"text": "a", "label": l}))).collect::<String>()
        };
        assert_eq!(labels_of(&rows(&[json!("b"), json!("a"), json!("b")])).unwrap(), ["a", "b"]);
        assert_eq!(labels_of(&rows(&[json!(2), json!(0)])).unwrap(), ["LABEL_0", "LABEL_1", "LABEL_2"]);
        assert_eq!(labels_of(&rows(&[json!("1"), json!("0")])).unwrap(), ["LABEL_0", "LABEL_1"]);
        for bad in [json!(0.25), json!(-3), json!({"a": 1}), json!(null)] {
            let e = labels_of(&rows(&[json!("a"), bad.clone()])).unwrap_err().to_string();
            assert!(e.contains("rows.jsonl:2"), "{bad}: {e}");
        }
        assert!(labels_of("{\"text\": \"a\"}\n").unwrap_err().to_string().contains("label"));
    }
}
