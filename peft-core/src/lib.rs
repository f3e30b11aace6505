/*!
Adapters over a frozen base model: sites, target matching, parameters, PEFT files and merging.

A base model is immutable and shared. Every place that a method may touch is a [`Site`] with a dense [`SiteId`] and the
path that transformers gives it. Adapters live apart, in an [`AdapterSet`] that a forward pass receives in its [`Ctx`]
together with the [`Route`] that says which tokens use which adapter. Swapping publishes another `Arc<AdapterSet>`;
nothing in the model changes, and no lock is taken.

A method implements [`PeftModule`] for linear sites (and its sisters for embeddings and norms); this crate knows no
method and no model.
*/

mod build;
mod ctx;
mod experts;
mod first_pass;
mod gate;
mod head;
mod heads;
mod layers;
mod module;
mod param;
mod read_rows;
mod saved;
mod segmented;
pub mod sequences;
mod set;
mod site;
mod sublayer;
mod tokens;
mod training_hook;
mod virtual_tokens;

pub use build::{Built, candidates, insert_saved, parameter_name, selected_site, task_keys};
pub use ctx::{Ctx, Mode, Route, StepRng};
pub use experts::FrozenExperts;
pub use first_pass::first_pass;
pub use gate::Gate;
pub use head::{HeadKind, Labels};
pub use heads::{AttentionModule, FrozenKeysValues, Heads};
pub use layers::{FrozenEmbedding, FrozenLinear, FrozenNorm, NormKind};
pub use module::{Delta, EmbeddingModule, ExpertsModule, FrozenLogits, NormModule, PeftModule};
pub use param::{Parameter, Role};
pub use read_rows::ReadRows;
pub use saved::{TrainedEmbedding, TrainedLinear, TrainedNorm, trained_copy, untrained};
pub use segmented::{BaseLayer, BaseModel, ClassToken, Segmented, Task, TokenBatch};
pub use set::{Adapter, AdapterSet, Exported, SiteAdapter, SiteModule, UNION, UNION_PARTS};
pub use site::{Site, SiteId, SiteKind, SiteTable, Stored};
pub use sublayer::{Join, SublayerKind, SublayerModule, SublayerSite, sublayer_sites};
pub use tokens::{TrainedHeadRows, TrainedTokens, token_ids};
pub use training_hook::{PromptTarget, TrainingHook};

pub use virtual_tokens::{
    PrefixModule, PromptDims, PromptModule, VirtualModule, VirtualSpan, VirtualSpans, VirtualTokens,
};

pub use peft_kernels as kernels;

// Files, errors and target matching.
pub mod adapter_config;
pub mod adapter_file;
pub mod adapter_keys;
pub mod atomic;
pub mod checkpoint;
pub mod combine;
pub mod config_keys;
pub mod error;
pub mod mapping;
mod python_json;
pub mod python_regex;
pub mod safetensors_file;
pub mod select;
pub mod select_defaults;
mod select_layers;
mod select_missed;
mod select_modules;
mod select_parameters;
mod select_saved;
pub mod select_spec;
pub mod shard_writer;
mod st_header;
pub mod suggest;
mod task;
mod tensor_bytes;
pub use adapter_config::{AdapterConfig, read_json_file, read_keys};
pub use adapter_file::{AdapterFolder, ExpectedTensor, StoredTensor, only_a_pickle, write_adapter};
pub use checkpoint::Checkpoint;
pub use config_keys::ConfigKeys;
pub use error::{Context, Error, Result};
pub use python_json::to_python_json;
pub use safetensors_file::{SafetensorsFile, write_safetensors};
pub use select::{Candidate, ModuleKind, SelectRules, Selection, Unmatched, select, select_saved};
pub use select_spec::{TargetModules, TargetSpec};
pub use shard_writer::{PlannedTensor, ShardWriter};
pub use st_header::TensorMeta;
pub use task::ByTask;
pub use tensor_bytes::check_finite;
