/*!
Differentiable operations for training small adapters over a frozen base model.

candle's own backward keeps dense gradients of frozen weights and of every broadcast constant, and most of its fused
operations cut the gradient without a word. The operations here know what is frozen: they are single graph nodes with a
hand-written backward that computes exactly the gradients that training needs.

Each operation has a fused CPU kernel (one pass over memory, parallel over rows) and a backend-neutral form in tensor
operations that runs on CUDA and Metal, some a CUDA kernel too; see `diff_op.rs` for how they become one node. Hidden states are packed,
`[tokens, hidden]`, the sequences of a batch one after another without padding.
*/

mod activation;
mod argmax;
mod attention;
mod bias;
mod blocks;
mod columns;
mod cpu;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod deferred;
mod diff_op;
mod dropout;
mod embedding;
mod experts;
mod frozen_gemm;
mod gaussian;
mod linear;
mod lora;
mod narrow;
mod norm;
mod philox;
mod reduce;
mod rotary;
mod rows;
mod serving;
mod shared;
mod siblings;
mod simd;
mod sparse;
mod stored;
mod tape;
#[cfg(test)]
mod test_support;
pub mod testing;
mod thin;
pub mod weight;

pub use activation::{Activation, UnknownActivation, activation, gated_activation};
pub use argmax::argmax_rows;
pub use attention::{AttentionPlan, SequenceSpan, attention, biased_attention};
pub use bias::{add, add_bias, scale_columns};
pub use columns::{Columns, columns};
pub use cpu::{on_pool, threads};
pub use cross_entropy::{
    CeRows, HeadLoss, HeadWeight, LossSpec, cross_entropy, cross_entropy_rows, linear_cross_entropy,
};
pub use deferred::Deferred;
pub use diff_op::seed;
pub use dropout::dropout;
pub use embedding::{embedding, replace_columns, replace_rows};
pub use experts::{ExpertPlan, combine_experts, expert_linear, expert_lora_linear, expert_weights};
pub use gaussian::add_normals;
pub use linear::{frozen_linear, trainable_linear};
pub use lora::{Dropout, lora_delta, lora_linear};
pub use narrow::convert;
pub use norm::{layer_norm, rms_norm};
pub use philox::{Stream, philox4x32};
pub use rotary::{RotaryLayout, RotaryPlan, rotary};
pub use rows::{select_rows, stack_rows};
pub use serving::{RoutedSpan, ServingForm, routed_linear};
pub use siblings::{Branch, LowRank, sibling_linears};
pub use sparse::sparse_matrix;
pub use tape::{Record, Unread, record, record_again};
pub use weight::{FrozenWeight, WeightStorage};
