//! Rows of words into columns: how both factors come into the kernel's order where the contraction lies along their rows.

use super::Word;

/// Rows that are turned together.
pub(super) const GROUP: usize = 8;

/// `columns[c][at + r] = rows[r][c]` for as many rows of a group as there is room for beyond `at`, and as many columns as there are.
/// To be called inside of [`crate::simd::run`].
#[inline(always)]
pub(super) fn turn<const N: usize>(rows: &[&[Word]; GROUP], columns: &mut [[Word; N]], at: usize) {
    let len = columns.len();
    assert!(rows.iter().all(|row| row.len() >= len) && at < N, "rows shorter than {len} words");
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        #[allow(unsafe_code)]
        // SAFETY: the feature that it enables was found just above, and the rows are long enough.
        return unsafe { avx2::turn(rows, columns, at) };
    }
    plain(rows, columns, at, 0);
}

/// The same from column `first` on.
#[inline(always)]
fn plain<const N: usize>(rows: &[&[Word]; GROUP], columns: &mut [[Word; N]], at: usize, first: usize) {
    for (c, column) in columns.iter_mut().enumerate().skip(first) {
        for (to, row) in column[at..].iter_mut().zip(rows) {
            *to = row[c];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _mm_castps_pd, _mm_storel_pd, _mm_storeu_ps, _mm256_castps256_ps128, _mm256_extractf128_ps,
        _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_storeu_ps,
        _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };

    use super::{GROUP, Word, plain};

    /// # Safety
    /// Every row is at least as long as there are columns.
    #[allow(unsafe_code)]
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn turn<const N: usize>(rows: &[&[Word]; GROUP], columns: &mut [[Word; N]], at: usize) {
        let whole = columns.len() / GROUP * GROUP;
        for (i, square) in columns.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let mut block = [_mm256_setzero_ps(); GROUP];
            for (to, row) in block.iter_mut().zip(rows) {
                // SAFETY: eight words that the row has, as the caller promises.
                *to = unsafe { _mm256_loadu_ps(row.as_ptr().add(i * GROUP).cast()) };
            }
            for (column, words) in square.iter_mut().zip(turned(block)) {
                put(&mut column[at..], words);
            }
        }
        plain(rows, columns, at, whole);
    }

    /// The transpose of eight vectors.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn turned(rows: [__m256; GROUP]) -> [__m256; GROUP] {
        let [a, b, c, d, e, f, g, h] = rows;
        let pairs = |x, y| [_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y)];
        let ([ab0, ab1], [cd0, cd1], [ef0, ef1], [gh0, gh1]) = (pairs(a, b), pairs(c, d), pairs(e, f), pairs(g, h));
        let fours = |x, y| [_mm256_shuffle_ps::<0x44>(x, y), _mm256_shuffle_ps::<0xee>(x, y)];
        let [low0, low1] = fours(ab0, cd0);
        let [low2, low3] = fours(ab1, cd1);
        let [high0, high1] = fours(ef0, gh0);
        let [high2, high3] = fours(ef1, gh1);
        let first = |x, y| _mm256_permute2f128_ps::<0x20>(x, y);
        let second = |x, y| _mm256_permute2f128_ps::<0x31>(x, y);
        [
            first(low0, high0),
            first(low1, high1),
            first(low2, high2),
            first(low3, high3),
            second(low0, high0),
            second(low1, high1),
            second(low2, high2),
            second(low3, high3),
        ]
    }

    /// Writes as many of the words as there is room for.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn put(to: &mut [Word], words: __m256) {
        #[allow(unsafe_code)]
        // SAFETY: each store has room, as its branch says; an array of eight words is a vector.
        unsafe {
            if to.len() >= GROUP {
                _mm256_storeu_ps(to.as_mut_ptr().cast(), words);
            } else if to.len() == 6 {
                _mm_storeu_ps(to.as_mut_ptr().cast(), _mm256_castps256_ps128(words));
                _mm_storel_pd(to.as_mut_ptr().add(4).cast(), _mm_castps_pd(_mm256_extractf128_ps::<1>(words)));
            } else {
                let words: [Word; GROUP] = std::mem::transmute(words);
                to.iter_mut().zip(words).for_each(|(to, word)| *to = word);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<const N: usize>(at: usize, count: usize) {
        let rows: Vec<Vec<Word>> =
            (0..GROUP as Word).map(|r| (0..count as Word).map(|c| 100 * r + c).collect()).collect();
        let views = std::array::from_fn(|r| rows[r].as_slice());
        let mut columns = vec![[Word::MAX; N]; count];
        turn(&views, &mut columns, at);
        for (c, column) in columns.iter().enumerate() {
            for (i, &word) in column.iter().enumerate() {
                let inside = i >= at && i < at + GROUP;
                assert_eq!(word, if inside { (100 * (i - at) + c) as Word } else { Word::MAX }, "{c}, {i}");
            }
        }
    }

    #[test]
    fn rows_become_columns_and_nothing_else_is_written() {
        for count in [0, 1, 7, 8, 9, 32, 37] {
            check::<32>(0, count);
            check::<32>(24, count);
            check::<14>(8, count);
            check::<14>(0, count);
            check::<11>(8, count);
        }
    }
}
