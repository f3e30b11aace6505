/*!
Methods that train parameters of the base itself: [`ln`], its norms; [`tokens`], rows of its embedding; [`full`], every parameter, which is the baseline that
adapters are measured against and the way to pretrain a model from its config.
*/

pub mod full;
pub mod ln;
pub mod tokens;

pub use ln::LnConfig;
pub use tokens::TokensConfig;
