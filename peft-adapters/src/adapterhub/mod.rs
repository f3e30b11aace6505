//! AdapterHub's own files (`adapters` 1.3, `loading.py`), both ways: a folder with its `adapter_config.json`, which shares the
//! name with PEFT's and nothing else, `adapter.safetensors`, and for a prediction head `head_config.json` and
//! `model_head.safetensors`; of adapters that are put together, a folder with one such folder each. Its pickles are not read.

use std::path::Path;

use peft_core::{Result, read_keys};
use serde_json::{Map, Value};

mod head;
mod lora;
mod names;
mod prefix;
mod read;
mod setup;
mod write;

pub use read::open;
pub use setup::is_setup;
pub use write::{HubModel, write};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter.safetensors";
const PICKLE: &str = "pytorch_adapter.bin";
/// The version whose files these are.
const VERSION: &str = "adapters.1.3.0";

/// Whether `dir` holds an adapter of AdapterHub's and not one of PEFT's.
///
/// # Errors
/// Its `adapter_config.json` cannot be read.
pub fn is_adapterhub(dir: &Path) -> Result<bool> {
    if setup::is_setup(dir) {
        return Ok(true);
    }
    let of_theirs = |keys: &Map<String, Value>| !keys.contains_key("peft_type") && keys.contains_key("config");
    read_keys(dir).map(|keys| of_theirs(&keys))
}

/// Names of the classes, by their number, of the head beside an adapter of AdapterHub's.
///
/// # Errors
/// A head's config that cannot be read.
pub fn labels(dir: &Path) -> Result<Option<Vec<String>>> {
    if setup::is_setup(dir) { setup::labels(dir) } else { head::labels(dir) }
}
