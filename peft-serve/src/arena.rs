//! Rows of the cache, given out in contiguous regions.

use std::collections::BTreeMap;
use std::ops::Range;

/// Which rows of a cache are free. A sequence has one region for its whole life, as long as it may become; a freed region joins
/// its free neighbours. There are no pages: a long request may wait for a gap while there is enough room in pieces.
#[derive(Debug)]
pub(crate) struct Arena {
    capacity: usize,
    used: usize,
    /// Start and end of each gap.
    gaps: BTreeMap<usize, usize>,
}

impl Arena {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, used: 0, gaps: [(0, capacity)].into_iter().filter(|(_, end)| *end > 0).collect() }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// The smallest gap that has room gives `rows` of its rows.
    pub(crate) fn take(&mut self, rows: usize) -> Option<Range<usize>> {
        if rows == 0 {
            return Some(0..0);
        }
        let fits = self.gaps.iter().filter(|(start, end)| *end - *start >= rows);
        let (start, end) = fits.min_by_key(|(start, end)| *end - *start).map(|(s, e)| (*s, *e))?;
        self.gaps.remove(&start);
        if start + rows < end {
            self.gaps.insert(start + rows, end);
        }
        self.used += rows;
        Some(start..start + rows)
    }

    /// Takes back a region that it gave.
    pub(crate) fn free(&mut self, region: Range<usize>) {
        if region.is_empty() {
            return;
        }
        self.used = self.used.saturating_sub(region.len());
        let (mut start, mut end) = (region.start, region.end);
        if let Some(after) = self.gaps.remove(&end) {
            end = after;
        }
        if let Some((&before, _)) = self.gaps.range(..start).next_back().filter(|(_, end)| **end == region.start) {
            start = before;
        }
        self.gaps.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn regions_do_not_overlap_and_come_back_whole() {
        let mut arena = Arena::new(100);
        assert_eq!(arena.take(0), Some(0..0));
        let mut held: Vec<Range<usize>> = Vec::new();
        let mut state = 7u32;
        for _ in 0..2000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let (what, n) = (state >> 31, (state >> 20) as usize % 40);
            if what == 0 {
                if let Some(region) = arena.take(n) {
                    assert!(region.end <= 100 && region.len() == n);
                    assert!(held.iter().all(|h| h.end <= region.start || region.end <= h.start || region.is_empty()));
                    held.push(region);
                } else {
                    let mut rows = [false; 100];
                    held.iter().for_each(|h| rows[h.clone()].fill(true));
                    let longest = rows.split(|taken| *taken).map(<[bool]>::len).max().unwrap();
                    assert!(longest < n, "a gap of {longest} was not found for {n}");
                }
            } else if !held.is_empty() {
                let i = n % held.len();
                arena.free(held.swap_remove(i));
            }
            assert_eq!(arena.used(), held.iter().map(Range::len).sum::<usize>());
        }
        held.drain(..).for_each(|region| arena.free(region));
        assert_eq!((arena.take(101), arena.take(100)), (None, Some(0..100)));
        assert_eq!(arena.take(1), None);
    }
}
