/*!
Methods that write one linear layer's weight as a function of a few parameters: frozen projections, scaled (VeRA, RandLoRA),
products (LoHa, LoKr), sums of blocks (MiSS, C³A, GraLoRA), bounded (DeLoRA), a few frequencies (FourierFT) or
elements (SHiRA), a singular value decomposition (AdaLoRA) and rotations of input or output (OFT, BOFT, HRA, RoAd). With PEFT's config keys, defaults and files.

A method is one file in `methods`: the keys of its config and a formula from parameters to a [`Change`]. Training, merging,
serving and files are written once, for [`ReparamLinear`]. [`ReparamConfig`] is read from a recipe or an
`adapter_config.json`; [`ReparamConfig::build`] selects sites and makes the modules.
*/

mod build;
mod change;
mod config;
mod methods;
mod start;
mod torch_random;

pub use change::{Change, ReparamLinear};
pub use config::ReparamConfig;
