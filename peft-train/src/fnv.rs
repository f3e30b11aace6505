//! FNV-1a over 64 bits: tells things apart by accident, and not under attack.

use std::fmt;

/// A hash under way; shown as 16 hexadecimal digits.
#[derive(Debug, Clone, Copy)]
pub struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    /// Takes a word in, of which the published form has bytes alone.
    pub fn word(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    }

    /// The hash of what was taken in.
    #[must_use]
    pub fn value(self) -> u64 {
        self.0
    }

    /// Takes a text in, byte by byte.
    pub fn text(&mut self, text: &str) {
        text.bytes().for_each(|byte| self.word(byte.into()));
    }
}

impl fmt::Display for Fnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of the reference (Fowler, Noll, Vo: `test_fnv.c`).
    #[test]
    fn the_hash_is_the_published_one() {
        for (text, hash) in [("", "cbf29ce484222325"), ("a", "af63dc4c8601ec8c"), ("foobar", "85944171f73967e8")] {
            let mut fnv = Fnv::default();
            fnv.text(text);
            assert_eq!(fnv.to_string(), hash, "{text}");
        }
    }
}
