//! Labels of many rows, flat in memory.

use std::ops::Range;

use super::encode::IGNORE_INDEX;

/// Labels, aligned with the token ids of a data set.
#[derive(Clone, Debug)]
pub(super) enum Labels {
    /// Those that count are their tokens: a bit a token says whether it does, 64 to a word.
    Tokens(Vec<u64>),
    /// As they are: classes, a decoder's targets, labels that somebody else made.
    Own(Vec<i32>),
}

impl Default for Labels {
    fn default() -> Self {
        Self::Tokens(Vec::new())
    }
}

impl Labels {
    /// Adds the labels of a row whose tokens are `ids`, behind rows with the tokens `before`.
    pub(super) fn extend(&mut self, labels: &[i32], ids: &[u32], before: &[u32]) {
        let is_token = |(&label, &id): (&i32, &u32)| label == IGNORE_INDEX || u32::try_from(label) == Ok(id);
        if matches!(self, Self::Tokens(_)) && !labels.iter().zip(ids).all(is_token) {
            *self = Self::Own(self.get(0..before.len(), before));
        }
        match self {
            Self::Own(own) => own.extend_from_slice(labels),
            Self::Tokens(counted) => {
                counted.resize((before.len() + labels.len()).div_ceil(64), 0);
                for (at, &label) in (before.len()..).zip(labels) {
                    if let Some(word) = counted.get_mut(at / 64) {
                        *word |= u64::from(label != IGNORE_INDEX) << (at % 64);
                    }
                }
            }
        }
    }

    /// Labels of the tokens in `range` of `ids`, the tokens of all rows.
    pub(super) fn get(&self, range: Range<usize>, ids: &[u32]) -> Vec<i32> {
        match self {
            Self::Own(own) => own.get(range).unwrap_or_default().to_vec(),
            Self::Tokens(counted) => {
                let counts = |at: usize| counted.get(at / 64).is_some_and(|word| (word >> (at % 64)) & 1 == 1);
                let label = |(at, &id): (usize, &u32)| if counts(at) { id as i32 } else { IGNORE_INDEX };
                (range.start..).zip(ids.get(range).unwrap_or_default()).map(label).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of random lengths, across the words' borders; from row `own` on, labels are no tokens.
    fn rows(own: usize) -> Vec<(Vec<u32>, Vec<i32>)> {
        let ids = |row: u32| (0..(row * 37) % 90).map(move |t| row * 100 + t).collect::<Vec<u32>>();
        let label = |row: usize, t: usize, id: u32| match (t * t + row) % 3 {
            0 => IGNORE_INDEX,
            _ => id as i32 + i32::from(row >= own && t == 5),
        };
        let labelled = |row: usize| {
            let ids = ids(row as u32);
            let labels = ids.iter().enumerate().map(|(t, &id)| label(row, t, id)).collect();
            (ids, labels)
        };
        (0..12).map(labelled).collect()
    }

    #[test]
    fn what_was_added_comes_back() {
        for own in [0, 7, 12] {
            let (mut labels, mut ids, mut bounds) = (Labels::default(), Vec::new(), vec![0]);
            let rows = rows(own);
            for (row, given) in &rows {
                labels.extend(given, row, &ids);
                ids.extend_from_slice(row);
                bounds.push(ids.len());
            }
            assert_eq!(matches!(labels, Labels::Tokens(_)), own == 12);
            for (bounds, (_, given)) in bounds.windows(2).zip(&rows) {
                assert_eq!(&labels.get(bounds[0]..bounds[1], &ids), given);
            }
        }
    }
}
