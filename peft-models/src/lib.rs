/*!
Base models as segments with adapter sites: configurations, weights, tokenizers, and the shared decoder, encoder
and encoder–decoder skeletons.
*/

mod any_model;
pub mod cached_step;
pub mod config;
mod decoder;
mod encoder;
mod encoder_decoder;
pub mod generate;
pub mod gguf;
mod kv_cache;
mod learned_positions;
mod loader;
pub mod merge;
mod mlp;
mod model_files;
pub mod pooling;
mod prompted;
pub mod rope;
pub mod sampling;
pub mod source;
pub mod tokenizer;
mod virtual_rows;

pub use any_model::{AnyInput, AnyModel, BlockWidths};
pub use decoder::{Decoder, DecoderInput};
pub use encoder::{Encoder, EncoderInput};
pub use encoder_decoder::{EncodedSources, EncoderDecoder, EncoderDecoderInput};
pub use kv_cache::LayerCache;
pub use model_files::ModelFiles;
