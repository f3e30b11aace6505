//! peft-core

// Files, errors and target matching.
pub mod adapter_config;
pub mod adapter_file;
pub mod adapter_keys;
pub mod atomic;
pub mod checkpoint;
pub mod error;
mod python_json;
mod python_regex;
pub mod safetensors_file;
pub mod select;
pub mod select_defaults;
pub mod select_spec;
pub mod shard_writer;
mod st_header;
pub mod suggest;
mod tensor_bytes;
pub use adapter_config::AdapterConfig;
pub use adapter_file::{AdapterFolder, ExpectedTensor, write_adapter};
pub use checkpoint::Checkpoint;
pub use error::{Context, Error, Result};
pub use safetensors_file::{SafetensorsFile, write_safetensors};
pub use select::{Candidate, ModuleKind, SelectRules, Selection, Unmatched, select};
pub use select_spec::{TargetModules, TargetSpec};
pub use shard_writer::{PlannedTensor, ShardWriter};
pub use st_header::TensorMeta;
pub use tensor_bytes::check_finite;
