//! Adapter folders of every kind that is read, under PEFT's names.

use std::path::Path;

use peft_adapters::adapterhub;
use peft_core::{AdapterFolder, BaseModel, Result};

/// Opens an adapter folder of PEFT's, ours or AdapterHub's. Formats that store a copy of the model's head beside the adapter
/// are rid of it where it is that of `base`.
///
/// # Errors
/// What makes the folder unreadable, by the file and the key.
pub fn open(folder: &Path, base: Option<&dyn BaseModel>) -> Result<AdapterFolder> {
    if adapterhub::is_adapterhub(folder)? { adapterhub::open(folder, base) } else { AdapterFolder::open(folder) }
}
