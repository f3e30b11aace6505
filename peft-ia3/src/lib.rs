/*!
IA³ (Liu et al. 2022, arXiv:2205.05638): one learned factor for each element of a layer's output, or, at feed-forward
modules, of its input. With PEFT's config keys, defaults and files; `target_modules = "paper"` in a recipe takes the paper's
three places (keys, values, inner activations) where PEFT's default for a family differs from them.

[`Ia3Config`] is read from a recipe or an `adapter_config.json`; [`Ia3Config::build`] selects sites and puts an
[`Ia3Linear`] at each. The losses of T-Few, IA³'s recipe for few examples, are not here.
*/

mod build;
pub mod combine;
mod config;
mod linear;
mod targets;

pub use config::Ia3Config;
pub use linear::{Ia3Linear, Scaled};
