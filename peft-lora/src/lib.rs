/*!
LoRA and its variants: low-rank deltas on linear layers and embeddings, with PEFT's config keys and files.

[`LoraConfig`] is read from a recipe or an `adapter_config.json`; [`LoraConfig::build`] selects sites and makes the
modules: [`LoraLinear`] (LoRA, rsLoRA, a bias on B, DoRA; PiSSA, OLoRA and EVA as starts), [`GatedLora`], [`LoraEmbedding`], [`LoraExperts`], [`peft_core::TrainedTokens`].
[`xlora`] weighs several such adapters token by token. [`foreign`] reads the files of mlx-lm, torchtune and kohya, and [`mlx`] writes mlx-lm's.
*/

mod build;
pub mod combine;
mod config;
mod dora;
mod embedding;
pub mod eva;
mod experts;
pub mod foreign;
mod gated;
mod init;
mod linalg;
mod linear;
pub mod mlx;
pub mod xlora;

pub use config::{BiasTraining, LoraConfig, TrainableTokens};
pub use dora::weight_norm;
pub use embedding::LoraEmbedding;
pub use experts::LoraExperts;
pub use gated::GatedLora;
pub use init::Init;
pub use linear::LoraLinear;
