/*!
Methods that train parameters of the base itself: [`bitfit`], its biases; [`ln`], its norms; [`tokens`], rows of its embedding;
[`last_layers`], its last blocks; [`full`], every parameter, which is the baseline that adapters are measured against and the way to
pretrain a model from its config.
*/

pub mod bitfit;
pub mod full;
pub mod last_layers;
pub mod ln;
mod select_paths;
pub mod tokens;

pub use bitfit::BitfitConfig;
pub use last_layers::LastLayersConfig;
pub use ln::LnConfig;
pub use tokens::TokensConfig;
