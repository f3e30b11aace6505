//! `labels.json` beside an adapter: the names of its classes by their number, as a JSON list.
//!
//! PEFT's files do not say what the classes of a trained head are called, and a base that was saved without a head does not
//! even say how many there are. PEFT ignores the file.

use std::path::Path;

use peft_adapters::adapterhub;
use peft_core::{Error, Result, atomic};
use peft_lora::foreign::Layout;

use crate::adapter_files;

/// The file's name.
pub const FILE: &str = "labels.json";

/// Weights of output layers, as PEFT stores those of the class heads there are.
const OUTPUT_LAYERS: [&str; 3] = ["classifier.weight", "classifier.out_proj.weight", "score.weight"];

/// A list of names is a few kilobytes; anything larger than this is not one.
const MOST_BYTES: u64 = 16 << 20;

/// Writes the names of the classes into `dir`, making it if need be.
///
/// # Errors
/// When the disk refuses.
pub fn write(dir: &Path, labels: &[String]) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::write(dir, e))?;
    let text = serde_json::to_string_pretty(labels).map_err(|e| Error::msg(e.to_string()))? + "\n";
    atomic::write_file(dir.join(FILE), text.as_bytes())
}

/// Names of the classes of the head that an adapter folder holds: those of its `labels.json` or of AdapterHub's head, or
/// else `LABEL_0`, `LABEL_1`, … as many as its output layer has rows. None where it holds no head.
///
/// # Errors
/// A file that is no list of names, or an adapter that cannot be opened.
pub fn read(folder: &Path) -> Result<Option<Vec<String>>> {
    let file = folder.join(FILE);
    if file.is_file() {
        let length = std::fs::metadata(&file).map_err(|e| Error::io(&file, e))?.len();
        if length > MOST_BYTES {
            return Err(Error::file(&file, "is too large for a list of names"));
        }
        let text = std::fs::read(&file).map_err(|e| Error::io(&file, e))?;
        let wrong = |e: serde_json::Error| Error::file(&file, format!("is not a list of the classes' names: {e}"));
        return serde_json::from_slice(&text).map(Some).map_err(wrong);
    }
    // Adapters of linear layers alone.
    if Layout::of(folder)?.is_some() {
        return Ok(None);
    }
    if adapterhub::is_adapterhub(folder)?
        && let Some(labels) = adapterhub::labels(folder)?
    {
        return Ok(Some(labels));
    }
    let files = adapter_files::open(folder, None)?;
    let is_output =
        |key: &&str| OUTPUT_LAYERS.iter().any(|end| key.strip_suffix(end).is_some_and(|p| p.ends_with('.')));
    let classes =
        files.keys().find(is_output).and_then(|key| files.shape(key)).and_then(|shape| shape.first().copied());
    Ok(classes.map(|n| (0..n).map(|i| format!("LABEL_{i}")).collect()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let labels = ["negative", "positive"].map(str::to_string).to_vec();
        write(dir.path(), &labels).unwrap();
        assert_eq!(read(dir.path()).unwrap(), Some(labels));
        for bad in ["", "{}", "[1]", "[\"a\""] {
            std::fs::write(dir.path().join(FILE), bad).unwrap();
            assert!(read(dir.path()).unwrap_err().to_string().contains("labels.json"), "{bad}");
        }
    }
}
