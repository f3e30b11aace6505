//! Rows for a head that reads a whole sequence: a text or a pair of texts, and one class, several, or numbers.
//!
//! A text is framed by the tokenizer's post-processor as transformers frames it (`[CLS] text [SEP] text_pair [SEP]`). The
//! class is the label of the token whose hidden state reaches the head; no other token counts. What is no single class stands beside
//! the labels ([`HeadRow::values`]), and the label says only which token is read.

use std::collections::BTreeSet;

use peft_core::{ClassToken, HeadKind};
use serde_json::Value;

use super::encode::{Encoder, Example, HeadRow, IGNORE_INDEX, Predictor, Truncation};
use super::error::{DataError, nearest};
use super::format::Format;
use super::source::{DataSpec, Row, data_files, read_rows};
use super::tokenizer::Framed;
use super::words::labels_of;

/// Data with more different names than this holds no classes.
const MOST_NAMES: usize = 1000;
/// A class number beyond this is a mistake in the data.
const MOST_CLASSES: u64 = 1 << 20;

/// A model's own head, as rows are made for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassHead {
    /// Names of the classes (of the numbers of a regression), by their number.
    pub labels: Vec<String>,
    /// The tokens whose hidden states reach the head.
    pub reads: ClassToken,
    /// What it is for.
    pub kind: HeadKind,
}

/// What one row asks of a head that reads a whole sequence.
enum Wanted {
    Class(i32),
    Values(Vec<f32>),
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

/// The column that holds what a head should say of a whole row: `label`, or `labels` where there is none.
pub(super) fn label_column(row: &Row) -> &'static str {
    let in_labels = !row.fields.contains_key("label") && row.fields.contains_key("labels");
    if in_labels { "labels" } else { "label" }
}

impl ClassHead {
    fn wanted(&self, row: &Row) -> Result<Wanted, DataError> {
        let column = label_column(row);
        let label = row.required(column)?;
        let made = match self.kind {
            HeadKind::Regression => self.numbers(label).map(Wanted::Values),
            HeadKind::MultiLabel => self.several(label).map(Wanted::Values),
            _ => self.class_of(label).map(|class| Wanted::Class(class as i32)),
        };
        made.map_err(|why| DataError::row(&row.at, format!("`{column}`: {why}")))
    }

    /// The numbers of a regression, as many as the head has outputs.
    fn numbers(&self, label: &Value) -> Result<Vec<f32>, String> {
        let n = self.labels.len();
        let numbers = match label {
            Value::Array(list) => list.iter().map(number).collect::<Result<Vec<f32>, _>>()?,
            one => vec![number(one)?],
        };
        if numbers.len() != n {
            return Err(format!("holds {} numbers, and the head has {n} outputs", numbers.len()));
        }
        Ok(numbers)
    }

    /// Which classes are the row's: their names, or a 0 or 1 for each class.
    fn several(&self, label: &Value) -> Result<Vec<f32>, String> {
        let n = self.labels.len();
        let list = label.as_array().ok_or_else(|| {
            let found = super::source::kind_of(label);
            format!("expected a list, of the names of the row's classes or of a 0 or 1 for each of {n}, found {found}")
        })?;
        if list.iter().all(Value::is_string) {
            let mut values = vec![0.0; n];
            for name in list {
                if let Some(value) = values.get_mut(self.class_of(name)? as usize) {
                    *value = 1.0;
                }
            }
            return Ok(values);
        }
        let flags = list.iter().map(number).collect::<Result<Vec<f32>, _>>()?;
        if flags.len() != n {
            return Err(format!("holds {} flags, and the head has {n} classes", flags.len()));
        }
        match flags.iter().find(|flag| ![0.0, 1.0].contains(*flag)) {
            Some(flag) => Err(format!("{flag} is neither 0 nor 1")),
            None => Ok(flags),
        }
    }
}

/// A finite number, which tables may hold as text.
fn number(value: &Value) -> Result<f32, String> {
    let read = match value {
        Value::Number(n) => n.as_f64(),
        Value::String(s) => s.trim().parse().ok(),
        _ => None,
    };
    let small = read.map(|x| x as f32).filter(|x| x.is_finite());
    small.ok_or_else(|| format!("{value} is not a number, which the head asks for"))
}

/// Names found in data.
#[derive(Default)]
struct Found {
    names: BTreeSet<String>,
    largest: u64,
    has_names: bool,
}

impl Found {
    /// Adds a class: a name, or a number.
    fn add(&mut self, label: &Value, row: &Row) -> Result<(), DataError> {
        let number = whole(label).or_else(|| label.as_str().and_then(|s| s.trim().parse().ok()));
        match (number.filter(|n| *n < MOST_CLASSES), label) {
            (Some(n), _) => self.largest = self.largest.max(n),
            (None, Value::String(_) | Value::Bool(_)) => self.has_names = true,
            (None, other) => {
                let message = format!(
                    "label {other} is not a class: classes are names, or numbers from 0; a model for numbers is made with \
                     model.head = \"regression\", one for several classes a row with \"multi_label\""
                );
                return Err(DataError::row(&row.at, message));
            }
        }
        self.names.insert(label.as_str().map_or_else(|| label.to_string(), str::to_owned));
        if self.has_names && self.names.len() > MOST_NAMES {
            let message = format!("more than {MOST_NAMES} different labels: the column does not hold classes");
            return Err(DataError::row(&row.at, message));
        }
        Ok(())
    }
}

fn numbered(n: u64) -> Vec<String> {
    (0..n).map(|i| format!("LABEL_{i}")).collect()
}

/// The classes that occur in the data, for a head that is to be made: as many as the largest number says, called
/// `LABEL_0`, `LABEL_1`, …, or the names in alphabetical order. A regression has as many outputs as the first row has numbers.
///
/// # Errors
/// Rows that cannot be read or have no label; numbers that are no classes; more names than classes can be.
pub fn labels_in(spec: &DataSpec, kind: HeadKind) -> Result<Vec<String>, DataError> {
    let (paths, _) = spec.parts()?;
    let mut found = Found::default();
    for path in paths {
        for file in data_files(path)? {
            for row in read_rows(&file)? {
                let row = row?;
                let label = || row.required(label_column(&row));
                match kind {
                    HeadKind::QuestionAnswering => return Ok(numbered(2)),
                    HeadKind::Regression => return Ok(numbered(label()?.as_array().map_or(1, |l| l.len() as u64))),
                    HeadKind::Classification => found.add(label()?, &row)?,
                    HeadKind::MultiLabel => {
                        let label = label()?;
                        let list =
                            label.as_array().ok_or_else(|| row.wrong_type(label_column(&row), "a list", label))?;
                        if list.iter().any(|flag| !flag.is_string()) {
                            return Ok(numbered(list.len() as u64));
                        }
                        list.iter().try_for_each(|name| found.add(name, &row))?;
                    }
                    HeadKind::TokenClassification => {
                        let tokens = row.fields.contains_key("input_ids");
                        let format = if tokens { Format::Tokens } else { Format::TokenClassification };
                        let counts = |label: &&Value| label.as_i64() != Some(i64::from(IGNORE_INDEX));
                        labels_of(&row, format)?
                            .1
                            .iter()
                            .filter(counts)
                            .try_for_each(|label| found.add(label, &row))?;
                    }
                }
            }
        }
    }
    Ok(if found.has_names { found.names.into_iter().collect() } else { numbered(found.largest + 1) })
}

impl Encoder<'_> {
    /// Tokens of one row, and what the head should say of them.
    pub(super) fn headed(&self, row: &Row, head: &ClassHead) -> Result<Example, DataError> {
        match head.kind {
            HeadKind::TokenClassification => return self.worded(row, head),
            HeadKind::QuestionAnswering => return self.asked(row),
            HeadKind::Classification | HeadKind::MultiLabel | HeadKind::Regression => {}
        }
        let wanted = head.wanted(row)?;
        let framed = if self.renderer.format == Format::Tokens {
            Framed::of(self.renderer.input_ids(row)?)
        } else {
            let (text, pair) = self.renderer.texts(row)?;
            let tokenizer = self.tokenizer.ok_or_else(|| DataError::row(&row.at, "this format needs a tokenizer"))?;
            let framed = tokenizer.encode_framed(&text, pair.as_deref());
            framed.map_err(|e| DataError::row(&row.at, format!("tokenizer: {e}")))?
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
            ClassToken::First | ClassToken::Every => labels.first_mut(),
            ClassToken::Last => labels.last_mut(),
        };
        let (class, values) = match wanted {
            Wanted::Class(class) => (class, Vec::new()),
            Wanted::Values(values) => (0, values),
        };
        if let Some(place) = place {
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
            head: HeadRow { kind: head.kind, values, question: None },
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
        let head = ClassHead { labels, reads: ClassToken::First, kind: HeadKind::Classification };
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

    #[test]
    fn several_classes_and_numbers() {
        let labels = ["a", "b", "c"].map(str::to_string).to_vec();
        let head = ClassHead { labels, reads: ClassToken::First, kind: HeadKind::MultiLabel };
        assert_eq!(head.several(&json!(["c", "a"])).unwrap(), [1.0, 0.0, 1.0]);
        assert_eq!(head.several(&json!([])).unwrap(), [0.0; 3]);
        assert_eq!(head.several(&json!([0, 1.0, 0])).unwrap(), [0.0, 1.0, 0.0]);
        assert_eq!(head.numbers(&json!([0, "1.5", -2e1])).unwrap(), [0.0, 1.5, -20.0]);
        for (label, says) in [
            (json!("a"), "list"),
            (json!(["d"]), "outside the head"),
            (json!([1, 0]), "2 flags"),
            (json!([1, 0, 2]), "neither 0 nor 1"),
            (json!([1, "a", 0]), "not a number"),
        ] {
            let e = head.several(&label).unwrap_err();
            assert!(e.contains(says), "{label}: {e}");
        }
        for (label, says) in [
            (json!(1), "1 numbers"),
            (json!(["x", 1, 1]), "not a number"),
            (json!([1e99, 1, 1]), "not a number"),
            (json!(null), "not a number"),
        ] {
            let e = head.numbers(&label).unwrap_err();
            assert!(e.contains(says), "{label}: {e}");
        }
    }

    fn labels_of(rows: &str) -> Result<Vec<String>, DataError> {
        labels_for(rows, HeadKind::Classification)
    }

    fn labels_for(rows: &str, kind: HeadKind) -> Result<Vec<String>, DataError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rows.jsonl");
        std::fs::write(&file, rows).unwrap();
        labels_in(&DataSpec::from(file.as_path()), kind)
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
        assert_eq!(labels_for("{\"text\": \"a\", \"label\": 0.5}\n", HeadKind::Regression).unwrap(), ["LABEL_0"]);
        assert_eq!(labels_for("{\"labels\": [1, 2.5]}\n", HeadKind::Regression).unwrap().len(), 2);
        assert_eq!(
            labels_for("{\"labels\": [\"b\"]}\n{\"labels\": [\"a\", \"b\"]}\n", HeadKind::MultiLabel).unwrap(),
            ["a", "b"]
        );
        assert_eq!(labels_for("{\"labels\": [0, 1, 0]}\n", HeadKind::MultiLabel).unwrap().len(), 3);
        let tags = "{\"tokens\": [\"x\", \"y\"], \"ner_tags\": [4, -100]}\n";
        assert_eq!(labels_for(tags, HeadKind::TokenClassification).unwrap().len(), 5);
    }
}
