//! Text as its tokens come, and where it stops.

use peft_core::{Error, Result};
use peft_models::tokenizer::Tokenizer;

/// What the tokens of one answer say so far.
#[derive(Debug, Default)]
pub(crate) struct Text {
    ids: Vec<u32>,
    /// Tokens from here on are decoded together, since what one says depends on those before it.
    from: usize,
    /// Tokens before this have been said.
    said: usize,
    /// Text that may be the beginning of a stop string.
    held: String,
}

/// What a token added.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Text that no later token changes.
    pub(crate) text: String,
    /// Whether a stop string came, behind `text`.
    pub(crate) stopped: bool,
}

impl Text {
    /// Takes the next token. A character of several tokens comes with the last of them.
    pub(crate) fn push(&mut self, id: u32, tokenizer: &Tokenizer, stop: &[String]) -> Result<Piece> {
        self.ids.push(id);
        let new = self.new_text(tokenizer)?.filter(|new| !new.ends_with('\u{FFFD}'));
        if let Some(new) = new {
            (self.from, self.said) = (self.said, self.ids.len());
            self.held.push_str(&new);
        }
        Ok(self.release(stop, false))
    }

    /// All that is left when no more tokens come.
    pub(crate) fn finish(&mut self, tokenizer: &Tokenizer, stop: &[String]) -> Result<Piece> {
        if let Some(new) = self.new_text(tokenizer)? {
            self.held.push_str(&new);
        }
        Ok(self.release(stop, true))
    }

    fn new_text(&self, tokenizer: &Tokenizer) -> Result<Option<String>> {
        let decode = |ids: Option<&[u32]>| {
            tokenizer.decode(ids.unwrap_or_default(), true).map_err(|e| Error::msg(e.to_string()))
        };
        let said = decode(self.ids.get(self.from..self.said))?;
        let all = decode(self.ids.get(self.from..))?;
        Ok(all.get(said.len()..).filter(|new| !new.is_empty()).map(str::to_owned))
    }

    fn release(&mut self, stop: &[String], all: bool) -> Piece {
        if let Some(at) = stop.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return Piece { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = if all { 0 } else { longest_beginning(&self.held, stop) };
        let rest = self.held.split_off(self.held.len() - keep);
        Piece { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }
}

/// Bytes at the end of `text` with which one of `stop` begins.
fn longest_beginning(text: &str, stop: &[String]) -> usize {
    let of = |stop: &String| {
        let most = text.len().min(stop.len().saturating_sub(1));
        (1..=most).rev().find(|&n| stop.is_char_boundary(n) && text.as_bytes().ends_with(&stop.as_bytes()[..n]))
    };
    stop.iter().filter_map(of).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn said(text: &mut Text, new: &str, stop: &[&str]) -> (String, bool) {
        text.held.push_str(new);
        let piece = text.release(&stop.iter().map(|s| s.to_string()).collect::<Vec<_>>(), false);
        (piece.text, piece.stopped)
    }

    #[test]
    fn what_may_begin_a_stop_string_is_held_back() {
        let stop = ["\n\nUser", "END", "né"];
        let mut text = Text::default();
        assert_eq!(said(&mut text, "one\n", &stop), ("one".into(), false));
        assert_eq!(said(&mut text, "two", &stop), ("\ntwo".into(), false));
        assert_eq!(said(&mut text, " E", &stop), (" ".into(), false));
        assert_eq!(said(&mut text, "EN", &stop), ("E".into(), false));
        assert_eq!(said(&mut text, "ough", &stop), ("ENough".into(), false));
        assert_eq!(said(&mut text, "n", &stop), (String::new(), false));
        assert_eq!(said(&mut text, "\n", &stop), ("n".into(), false));
        assert_eq!(said(&mut text, "\n", &stop), (String::new(), false));
        assert_eq!(said(&mut text, "User: END", &stop), (String::new(), true));
        let mut text = Text::default();
        assert_eq!(said(&mut text, "the END\n\nUser", &stop), ("the ".into(), true));
    }
}
