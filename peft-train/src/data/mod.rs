//! From rows on disk to packed batches: row → tokens + label mask → batch.
//!
//! [`source`] reads rows with their place in a file, [`mod@format`] says what columns mean, [`render`] turns a row into text
//! parts ([`classes`], `words` and `questions` those for heads of their own, [`pairs`] those for an encoder–decoder, [`preferences`] answers of
//! which one is preferred, [`corruption`] texts of which a part is hidden; [`template`] and [`chat`] hold the Jinja engines), [`encode`] makes tokens and labels of them, [`dataset`] keeps
//! them flat in memory, [`sampler`] decides which rows form a batch, [`batch`] packs these rows, and [`mod@preview`] shows the
//! result to a person. [`text_rows`] stops at the text, for models that tokenise by themselves.

pub mod batch;
pub mod chat;
pub mod choices;
pub mod classes;
pub mod corruption;
pub mod dataset;
pub mod encode;
pub mod error;
pub mod format;
pub mod pairs;
pub mod preferences;
pub mod preview;
pub mod render;
pub mod sampler;
pub mod source;
pub mod template;
pub mod text_rows;
pub mod tokenizer;

mod labels;
mod preferred_rows;
mod pyjson;
mod questions;
mod rng;
mod structured;
mod tasks;
mod words;

pub use batch::{Batch, Targets};
pub use chat::ChatTemplate;
pub use choices::{ChoiceBatch, ChoiceRow, Choices, Score};
pub use classes::{ClassHead, labels_in};
pub use corruption::{Corruption, FillInTheMiddle, SpanCorruption};
pub use dataset::{Dataset, DatasetStats, format_of};
pub use encode::{EncodeOptions, Encoder, Example, HeadRow, IGNORE_INDEX, Predictor, Truncation};
pub use error::{DataError, Location};
pub use format::Format;
pub use pairs::DecoderInputs;
pub use preferences::{Mismatched, PreferenceBatch, Preferences, Preferred, single_answers_in};
pub use preview::{RowPreview, preview};
pub use questions::Question;
pub use sampler::{Sampler, SamplerOptions, SamplerState};
pub use source::{DataSpec, MixturePart, Row};
pub use text_rows::{TextRow, TextRows, contexts};
pub use tokenizer::{Framed, HfTextTokenizer, TextTokenizer};
