//! Rows as a person sees them: tokens with their label mask.

use std::fmt;
use std::ops::RangeInclusive;

use peft_core::HeadKind;

use super::dataset::Dataset;
use super::encode::IGNORE_INDEX;
use super::questions::{END, START};

/// One row, token by token.
#[derive(Clone, Debug, PartialEq)]
pub struct RowPreview {
    /// File and line.
    pub source: String,
    /// Id, text, and whether it counts towards the loss.
    pub tokens: Vec<(u32, String, bool)>,
    /// The row's class, where rows have one.
    pub class: Option<i32>,
    /// What a row holds instead of one class.
    pub values: Vec<f32>,
}

/// The first `rows` rows of a data set. `decode` gives the text of one token.
pub fn preview(dataset: &Dataset, rows: usize, decode: &dyn Fn(&[u32]) -> String) -> Vec<RowPreview> {
    let distance = dataset.predictor().distance();
    let has_class = distance == 0 && !dataset.is_paired() && dataset.kind() == HeadKind::Classification;
    let one = |row: usize| {
        let answer = answer(dataset, row);
        RowPreview {
            source: dataset.source(row).map(|s| s.to_string()).unwrap_or_default(),
            tokens: dataset
                .input_ids(row)
                .iter()
                .zip(dataset.labels(row))
                .enumerate()
                .map(|(t, (&id, label))| {
                    // A decoder reads its target one place later; a person sees the target itself.
                    let id = u32::try_from(label).ok().filter(|_| dataset.is_paired()).unwrap_or(id);
                    let counts = match &answer {
                        Some(answer) => answer.contains(&t),
                        None => t >= distance && label != IGNORE_INDEX,
                    };
                    (id, decode(&[id]), counts)
                })
                .collect(),
            class: dataset.labels(row).into_iter().find(|l| has_class && *l != IGNORE_INDEX),
            values: dataset.values(row).to_vec(),
        }
    };
    (0..dataset.len().min(rows)).map(one).collect()
}

/// The tokens of a row's answer, for a head that finds one.
fn answer(dataset: &Dataset, row: usize) -> Option<RangeInclusive<usize>> {
    if dataset.kind() != HeadKind::QuestionAnswering {
        return None;
    }
    let labels = dataset.labels(row);
    let has = |bit: u32| labels.iter().position(|label| label & bit as i32 != 0);
    Some(has(START)?..=has(END)?)
}

impl RowPreview {
    /// Number of tokens that count.
    pub fn counted(&self) -> usize {
        self.tokens.iter().filter(|(_, _, counts)| *counts).count()
    }
}

/// The source and counts on one line, then the tokens with `|` between them and what counts in `⟦…⟧`; control characters
/// are escaped. Of a row of more than 200 tokens, 200 around the first counted one are shown.
impl fmt::Display for RowPreview {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 200;
        let class = match (self.class, self.values.as_slice()) {
            (Some(class), _) => format!(", class {class}"),
            (None, []) => String::new(),
            (None, [value]) => format!(", value {value}"),
            (None, values) => format!(", values {values:?}"),
        };
        writeln!(f, "{}  {} tokens, {} counted in ⟦ ⟧{class}", self.source, self.tokens.len(), self.counted())?;
        let first = self.tokens.iter().position(|(_, _, c)| *c).unwrap_or(0);
        let from =
            if self.tokens.len() <= SHOWN { 0 } else { first.saturating_sub(SHOWN / 2).min(self.tokens.len() - SHOWN) };
        let shown = self.tokens.get(from..).unwrap_or_default();
        f.write_str("  ")?;
        if from > 0 {
            write!(f, "({from} tokens) … ")?;
        }
        let mut inside = false;
        for (i, (_, text, counts)) in shown.iter().take(SHOWN).enumerate() {
            match (*counts, inside) {
                (true, false) => f.write_str("⟦")?,
                (false, true) => f.write_str("⟧")?,
                _ if i > 0 => f.write_str("|")?,
                _ => {}
            }
            inside = *counts;
            for c in text.chars() {
                if c.is_control() {
                    write!(f, "{}", c.escape_default())?;
                } else {
                    write!(f, "{c}")?;
                }
            }
        }
        if inside {
            f.write_str("⟧")?;
        }
        if shown.len() > SHOWN {
            write!(f, " … ({} tokens)", shown.len() - SHOWN)?;
        }
        Ok(())
    }
}
