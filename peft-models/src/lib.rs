/*!
Base models as segments with adapter sites: configurations, weights, tokenizers, and the shared decoder and encoder
skeletons.
*/

mod any_model;
pub mod config;
mod decoder;
mod encoder;
pub mod generate;
pub mod gguf;
mod kv_cache;
mod loader;
pub mod merge;
mod model_files;
pub mod rope;
pub mod source;
pub mod tokenizer;
mod virtual_rows;

pub use any_model::{AnyInput, AnyModel, BlockWidths};
pub use decoder::{Decoder, DecoderInput};
pub use encoder::{Encoder, EncoderInput};
pub use kv_cache::LayerCache;
pub use model_files::ModelFiles;
