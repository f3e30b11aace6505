//! Normalisation over the last dimension.

mod layer;
mod rms;

pub use layer::layer_norm;
pub use rms::rms_norm;
