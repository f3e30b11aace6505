//! Rows as texts: for a model that is asked over an API and tokenises by itself, and for words that prompts are made of.

use super::choices::{answer_column, of_row};
use super::dataset::{Dataset, first_format};
use super::encode::{EncodeOptions, Example, HeadRow, IGNORE_INDEX, Predictor, Truncation};
use super::error::{DataError, Location};
use super::format::Format;
use super::render::{Rendered, Renderer};
use super::source::{DataSpec, Row, data_files, read_rows};
use super::template::RowTemplate;

/// A row with its possible answers.
#[derive(Clone, Debug, PartialEq)]
pub struct TextRow {
    /// What comes before the answer.
    pub prompt: String,
    /// The answers, or the row's own alone.
    pub answers: Vec<String>,
    /// The number of the right one.
    pub right: usize,
    /// File and line.
    pub source: Location,
}

/// All rows of a training or evaluation set, as texts.
#[derive(Clone, Debug)]
pub struct TextRows {
    /// The rows in file order.
    pub rows: Vec<TextRow>,
    /// How many answers there are, where all rows have the same, in the same order: then they are classes.
    pub classes: Option<usize>,
}

impl TextRows {
    /// Reads everything that `spec` names; without `format`, the first row's columns decide it. Rows have the answers of their column `choices`, or those `given`; where there are none,
    /// their own alone.
    ///
    /// # Errors
    /// A format that is no prompt with an answer, an answer that begins another (an API does not tell where an answer ends), and all
    /// that a row can be refused for.
    pub fn load(
        spec: &DataSpec,
        format: Option<Format>,
        options: &EncodeOptions,
        given: &[String],
    ) -> Result<(Self, Format), DataError> {
        let format = match format {
            Some(format) => format,
            None => {
                let files = spec.parts()?.0.into_iter().map(data_files).collect::<Result<Vec<_>, _>>()?;
                first_format(&files, options)?
            }
        };
        let column = answer_column(format)?;
        let renderer = renderer(format, options)?;
        let (mut rows, mut classes) = (Vec::new(), (given.len() > 1).then_some(given.len()));
        let pair = |row: &Row| match renderer.render(row)? {
            Rendered::Prompted { prompt, completion } => Ok((prompt, completion)),
            _ => Err(DataError::row(&row.at, "is no prompt with an answer")),
        };
        each_row(spec, |row| {
            let has_own = row.fields.get("choices").is_some_and(|v| !v.is_null());
            let (pairs, right) = if given.is_empty() && !has_own {
                (vec![pair(&row)?], 0)
            } else {
                let of_row = of_row(&row, column, given, pair)?;
                if of_row.own {
                    classes = None;
                }
                (of_row.examples, of_row.right)
            };
            let answers: Vec<String> = pairs.iter().map(|(_, answer)| answer.clone()).collect();
            let begins = |a: &String| answers.iter().find(|b| *b != a && b.starts_with(a.as_str()));
            if let Some((a, b)) = answers.iter().find_map(|a| Some((a, begins(a)?))) {
                let message =
                    format!("the answer {a:?} is the beginning of {b:?}, and an endpoint does not say where one ends");
                return Err(DataError::row(&row.at, message));
            }
            let prompt = pairs.into_iter().next().map(|(prompt, _)| prompt).unwrap_or_default();
            rows.push(TextRow { prompt, answers, right, source: row.at.clone() });
            Ok(())
        })?;
        match rows.is_empty() {
            true => Err(DataError::Config("the data has no rows".into())),
            false => Ok((Self { rows, classes }, format)),
        }
    }

    /// As many rows of one token each: what puts rows into an order asks for no more.
    #[must_use]
    pub fn placeholders(&self) -> Dataset {
        let one = |row: &TextRow| Example {
            input_ids: vec![0],
            labels: vec![IGNORE_INDEX],
            types: Vec::new(),
            source_tokens: 0,
            predictor: Predictor::default(),
            head: HeadRow::default(),
            task: None,
            source: row.source.clone(),
            truncation: Truncation::default(),
        };
        let rows: Vec<Example> = self.rows.iter().map(one).collect();
        Dataset::from_examples(&rows)
    }
}

/// What comes before the answers of all rows, or the whole of rows without one.
///
/// # Errors
/// Rows of tokens, which hold no text, and all that a row can be refused for.
pub fn contexts(spec: &DataSpec, format: Format, options: &EncodeOptions) -> Result<Vec<String>, DataError> {
    let renderer = renderer(format, options)?;
    let mut texts = Vec::new();
    each_row(spec, |row| {
        if renderer.class_head.is_some() {
            if format != Format::Classification {
                return Err(no_text(&row));
            }
            let (text, pair) = renderer.texts(&row)?;
            texts.push(text);
            texts.extend(pair);
            return Ok(());
        }
        match renderer.render(&row)? {
            Rendered::Text(text) | Rendered::Chat { text, .. } | Rendered::Prompted { prompt: text, .. } => {
                texts.push(text)
            }
            Rendered::Tokens { .. } => return Err(no_text(&row)),
        }
        Ok(())
    })?;
    Ok(texts)
}

fn no_text(row: &Row) -> DataError {
    DataError::row(&row.at, "holds no plain text, and prompts are made of the words of texts")
}

fn renderer(format: Format, options: &EncodeOptions) -> Result<Renderer, DataError> {
    let renderer = Renderer {
        format,
        template: options.template.as_deref().map(RowTemplate::new).transpose()?,
        chat: None,
        label_words: options.label_words.clone(),
        class_head: options.class_head.clone(),
        decoder: options.decoder,
        vocab_size: options.vocab_size,
        preferences: options.preferences,
        hides_spans: false,
    };
    renderer.check()?;
    Ok(renderer)
}

fn each_row(spec: &DataSpec, mut f: impl FnMut(Row) -> Result<(), DataError>) -> Result<(), DataError> {
    for path in spec.parts()?.0 {
        for file in data_files(path)? {
            read_rows(&file)?.try_for_each(|row| f(row?))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn load(text: &str, given: &[&str]) -> Result<TextRows, DataError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rows.jsonl");
        std::fs::write(&file, text).unwrap();
        let given: Vec<String> = given.iter().map(ToString::to_string).collect();
        let (rows, format) = TextRows::load(&DataSpec::Path(file), None, &EncodeOptions::new(Format::Text), &given)?;
        assert_eq!((format, rows.placeholders().len()), (Format::Completion, rows.rows.len()));
        Ok(rows)
    }

    #[test]
    fn rows_have_given_answers_or_their_own() {
        let two = "{\"prompt\": \"a\", \"completion\": \" no\"}\n{\"prompt\": \"b\", \"completion\": \" yes\"}\n";
        let rows = load(two, &[" yes", " no"]).unwrap();
        assert_eq!((rows.rows[0].right, rows.rows[1].right, rows.classes), (1, 0, Some(2)));
        assert_eq!(rows.rows[1].answers, [" yes", " no"]);
        let plain = load(two, &[]).unwrap();
        assert_eq!((plain.rows[1].answers.as_slice(), plain.classes), ([" yes".to_string()].as_slice(), None));
        let own = load("{\"prompt\": \"a\", \"completion\": \"x\", \"choices\": [\"y\", \"x\"]}\n", &[]).unwrap();
        assert_eq!((own.rows[0].right, own.classes), (1, None));
    }

    #[test]
    fn what_an_endpoint_cannot_tell_apart_is_refused() {
        let row = "{\"prompt\": \"a\", \"completion\": \" no\"}\n";
        let e = load(row, &[" no", " not"]).unwrap_err().to_string();
        assert!(e.contains("beginning of") && e.contains("rows.jsonl:1"), "{e}");
        assert!(load(row, &[" yes", " si"]).unwrap_err().to_string().contains("none of the choices"));
        assert!(load("", &[]).unwrap_err().to_string().contains("rows.jsonl"));
    }
}
