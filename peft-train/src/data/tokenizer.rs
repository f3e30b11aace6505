//! What the data road needs of a tokenizer.

use std::ops::Range;
use std::sync::Arc;

use tokenizers::PreTokenizerWrapper;

/// Tokens with the bytes of the text that each stands for.
pub type TokenSpans = (Vec<u32>, Vec<Range<usize>>);

/// One or two texts between special tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Framed {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Token types, aligned with `ids`; empty where all are 0.
    pub types: Vec<u32>,
    /// Where in `ids` the texts are.
    pub texts: Vec<Range<usize>>,
}

impl Framed {
    /// Tokens of one text without special tokens.
    pub fn of(ids: Vec<u32>) -> Self {
        let text = 0..ids.len();
        Self { ids, types: Vec::new(), texts: vec![text] }
    }

    /// At most `max` tokens, and which were cut: from the right of the last text. None where that is not long enough.
    pub fn cut_last(mut self, max: usize) -> Option<(Self, Range<usize>)> {
        let (cut, text) = (self.ids.len().saturating_sub(max), self.texts.last_mut()?);
        let gone = text.end.checked_sub(cut).filter(|from| *from >= text.start)?..text.end;
        text.end = gone.start;
        self.ids.drain(gone.clone());
        if !self.types.is_empty() {
            self.types.drain(gone.clone());
        }
        Some((self, gone))
    }

    /// At most `max` tokens, and how many were cut: from the right of the longer text, token by token, as transformers'
    /// `longest_first` does. Special tokens stay. None where they alone are too many.
    pub fn cut_to(mut self, max: usize) -> Option<(Self, usize)> {
        let cut = self.ids.len().saturating_sub(max);
        let mut lengths: Vec<usize> = self.texts.iter().map(ExactSizeIterator::len).collect();
        if cut > lengths.iter().sum::<usize>() {
            return None;
        }
        for _ in 0..cut {
            // Of texts of equal length the last is cut.
            let longest = lengths.iter_mut().max_by_key(|n| **n)?;
            *longest -= 1;
        }
        for (text, length) in self.texts.iter().zip(lengths).rev() {
            let gone = text.start + length..text.end;
            self.ids.drain(gone.clone());
            if !self.types.is_empty() {
                self.types.drain(gone);
            }
        }
        self.texts.clear();
        Some((self, cut))
    }
}

/// Failure inside a tokenizer.
pub type TokenizerError = Box<dyn std::error::Error + Send + Sync>;

/// What a tokenizer made of so many texts.
fn framed(encoding: &tokenizers::Encoding, texts: usize) -> Framed {
    let (types, sequences) = (encoding.get_type_ids(), encoding.get_sequence_ids());
    let range = |i: usize| match sequences.iter().position(|s| *s == Some(i)) {
        Some(start) => start..sequences.iter().rposition(|s| *s == Some(i)).map_or(start, |last| last + 1),
        None => 0..0,
    };
    Framed {
        ids: encoding.get_ids().to_vec(),
        types: if types.iter().any(|t| *t != 0) { types.to_vec() } else { Vec::new() },
        texts: (0..texts).map(range).collect(),
    }
}

/// Text to token ids. Implemented by [`HfTextTokenizer`]; a trait so that data does not depend on how a model is loaded.
pub trait TextTokenizer: Send + Sync {
    /// Token ids of `text`; with `add_special` as the post-processor frames one sequence (`<s>` in front and the like).
    ///
    /// # Errors
    /// Whatever stops the tokenizer.
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError>;

    /// Token ids of `text` without framing, and the byte range of `text` that each token stands for.
    ///
    /// # Errors
    /// Whatever stops the tokenizer.
    fn encode_with_spans(&self, text: &str) -> Result<TokenSpans, TokenizerError>;

    /// `text`, or `text` and `pair`, as the post-processor frames them.
    ///
    /// # Errors
    /// Whatever stops the tokenizer.
    fn encode_framed(&self, text: &str, pair: Option<&str>) -> Result<Framed, TokenizerError>;

    /// `question` and `context` as the post-processor frames them, and for each token the bytes of its text that it stands for.
    ///
    /// # Errors
    /// Whatever stops the tokenizer.
    fn encode_question(&self, question: &str, context: &str) -> Result<(Framed, Vec<Range<usize>>), TokenizerError>;

    /// Words as one framed sequence, and for each token the number of its word. What splits texts splits each word by itself.
    ///
    /// # Errors
    /// Whatever stops the tokenizer.
    fn encode_words(&self, words: &[&str]) -> Result<(Framed, Vec<Option<usize>>), TokenizerError>;

    /// The end-of-text token that closes a completion (`eos_token`).
    fn eos_id(&self) -> Option<u32>;

    /// Text of the begin token, `bos_token` in chat templates.
    fn bos_token(&self) -> Option<&str>;

    /// Text of the end token, `eos_token` in chat templates.
    fn eos_token(&self) -> Option<&str>;

    /// The chat template of the tokenizer's files (Jinja source).
    fn chat_template(&self) -> Option<&str>;
}

/// A `tokenizers` tokenizer with the strings of `tokenizer_config.json` beside it.
#[derive(Clone, Debug)]
pub struct HfTextTokenizer {
    tokenizer: Arc<tokenizers::Tokenizer>,
    eos_id: Option<u32>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    chat_template: Option<String>,
}

impl HfTextTokenizer {
    /// Wraps `tokenizer`; truncation and padding that its file may ask for are switched off, as both are done here.
    /// The end token's id is looked up in the vocabulary.
    ///
    /// # Errors
    /// An `eos_token` that the vocabulary lacks.
    pub fn new(
        tokenizer: impl Into<Arc<tokenizers::Tokenizer>>,
        bos_token: Option<String>,
        eos_token: Option<String>,
        chat_template: Option<String>,
    ) -> Result<Self, TokenizerError> {
        let mut tokenizer = tokenizer.into();
        if tokenizer.get_truncation().is_some() || tokenizer.get_padding().is_some() {
            let own = Arc::make_mut(&mut tokenizer);
            own.with_truncation(None)?;
            own.with_padding(None);
        }
        let eos_id = match &eos_token {
            Some(token) => Some(
                tokenizer
                    .token_to_id(token)
                    .ok_or_else(|| format!("eos_token `{token}` is not in the tokenizer's vocabulary"))?,
            ),
            None => None,
        };
        Ok(Self { tokenizer, eos_id, bos_token, eos_token, chat_template })
    }

    /// The tokenizer inside.
    pub fn inner(&self) -> &Arc<tokenizers::Tokenizer> {
        &self.tokenizer
    }
}

impl TextTokenizer for HfTextTokenizer {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        Ok(self.tokenizer.encode_fast(text, add_special)?.get_ids().to_vec())
    }

    fn encode_with_spans(&self, text: &str) -> Result<TokenSpans, TokenizerError> {
        let encoding = self.tokenizer.encode(text, false)?;
        let spans = encoding.get_offsets().iter().map(|&(from, to)| from..to).collect();
        Ok((encoding.get_ids().to_vec(), spans))
    }

    fn encode_framed(&self, text: &str, pair: Option<&str>) -> Result<Framed, TokenizerError> {
        Ok(match pair {
            Some(pair) => framed(&self.tokenizer.encode_fast((text, pair), true)?, 2),
            None => framed(&self.tokenizer.encode_fast(text, true)?, 1),
        })
    }

    fn encode_question(&self, question: &str, context: &str) -> Result<(Framed, Vec<Range<usize>>), TokenizerError> {
        let encoding = self.tokenizer.encode((question, context), true)?;
        let spans = encoding.get_offsets().iter().map(|&(from, to)| from..to).collect();
        Ok((framed(&encoding, 2), spans))
    }

    fn encode_words(&self, words: &[&str]) -> Result<(Framed, Vec<Option<usize>>), TokenizerError> {
        // A vocabulary of bytes holds words with the space in front of them; transformers asks for `add_prefix_space` here.
        let spaced: Vec<String>;
        let (spaced, words) = match self.tokenizer.get_pre_tokenizer() {
            Some(PreTokenizerWrapper::ByteLevel(bytes)) if !bytes.add_prefix_space => {
                spaced =
                    words.iter().map(|w| if w.starts_with(' ') { (*w).to_owned() } else { format!(" {w}") }).collect();
                (spaced.iter().map(String::as_str).collect(), words)
            }
            _ => (words.to_vec(), words),
        };
        let encoding = self.tokenizer.encode(spaced, true)?;
        let of = |word: &Option<u32>| word.map(|word| word as usize).filter(|word| *word < words.len());
        Ok((framed(&encoding, 1), encoding.get_word_ids().iter().map(of).collect()))
    }

    fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_deref()
    }

    fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_deref()
    }

    fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }
}
