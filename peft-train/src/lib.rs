/*!
Training: rows to tokens to batches, the block-wise step, optimisers, checkpoints and logs. Nothing here serves.
*/

pub mod adapter_files;
pub mod audit;
pub mod bbt;
pub mod bdpl;
mod catalogue;
pub mod checkpoint;
pub mod class_labels;
mod classify;
pub mod cma_es;
pub mod combine;
mod correlation;
pub mod data;
mod driver;
pub mod early_stop;
pub mod eva;
pub mod fnv;
mod grads;
mod head_loss;
pub mod log;
pub mod methods;
pub mod mezo;
mod objective;
pub mod optim;
mod preference;
mod preference_eval;
mod prefix_start;
pub mod recipe;
mod recipe_combinations;
mod recipe_preferences;
mod reference;
mod run_loop;
pub mod schedule;
mod scores;
mod side_by_side;
mod spans;
mod step;
mod t_few;
mod trainer;
mod update_rule;

pub use classify::{ChoicesMeasured, Confusion, evaluate_choices, evaluate_head};
pub use driver::{
    Checkpointing, Keep, LOGIT_ROWS, LossOf, Measured, evaluate, forward_backward, predict, token_losses,
};
pub use grads::Grads;
pub use objective::{MicroBatch, Objective, measure};
pub use preference::{Answer, DpoLoss, Preference, PreferenceLoss, PreferenceStep, Rewards, Scored, Weighed};
pub use preference_eval::{PreferencesMeasured, evaluate_preferences};
pub use prefix_start::start_prefix;
pub use reference::Reference;
pub use run_loop::Resumable;
pub use scores::{Named, Numbers, Scores, Several};
pub use side_by_side::{OfAdapter, evaluate_each};
pub use spans::SpanScores;
pub use t_few::{Counts, TFew};
pub use trainer::{Ended, Outcome, Plan, PreferenceRows, Trainer, evaluate_dataset, opt_params};
pub use update_rule::UpdateRule;
