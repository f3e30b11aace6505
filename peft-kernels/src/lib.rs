/*!
Differentiable operations for training small adapters over a frozen base model.

candle's own backward keeps dense gradients of frozen weights and of every broadcast constant, and most of its fused
operations cut the gradient without a word. The operations here know what is frozen: they are single graph nodes with a
hand-written backward that computes exactly the gradients that training needs.

Each operation has a fused CPU kernel (one pass over memory, parallel over rows) and a backend-neutral form in tensor
operations that runs on CUDA and Metal; see `diff_op.rs` for how the two become one node. Hidden states are packed,
`[tokens, hidden]`, the sequences of a batch one after another without padding.
*/

mod attention;
mod cpu;
mod diff_op;
mod philox;
mod rotary;
pub mod testing;

pub use attention::{AttentionPlan, SequenceSpan, attention};
pub use diff_op::seed;
pub use philox::{Stream, philox4x32};
pub use rotary::{RotaryLayout, RotaryPlan, rotary};
