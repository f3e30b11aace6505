/*!
Base models as segments with adapter sites: configurations, weights, tokenizers, and the shared decoder skeleton.
*/

pub mod config;
mod decoder;
pub mod generate;
pub mod gguf;
mod kv_cache;
pub mod merge;
mod model_files;
pub mod rope;
pub mod source;
pub mod tokenizer;
mod virtual_rows;

pub use decoder::{Decoder, DecoderInput};
pub use kv_cache::LayerCache;
pub use model_files::ModelFiles;
