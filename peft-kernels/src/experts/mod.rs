//! Layers of which each token goes through a few of many: mixture of experts.
//!
//! A router's logits decide (`plan.rs`), and weigh (`router.rs`), which `top_k` experts a token goes to. The rows of all tokens are
//! then gathered once for each of their experts, sorted by expert ([`ExpertPlan::gather`]); each expert is one product over its rows
//! (`linear.rs`), and the results are added back to their tokens (`combine.rs`). Experts without a token cost nothing, and
//! memory is that of `tokens · top_k` rows.

mod combine;
mod linear;
mod plan;
mod router;

pub use combine::combine_experts;
pub use linear::{expert_linear, expert_lora_linear};
pub use plan::ExpertPlan;
pub use router::expert_weights;
