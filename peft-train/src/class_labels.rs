//! `labels.json` beside an adapter: the names of its head's outputs by their number, as a JSON list; where PEFT's `task_type` does not
//! tell what they are for, `{"problem_type": "regression", "labels": […]}` with transformers' word for it.
//!
//! PEFT's files do not say what the classes of a trained head are called, and a base that was saved without a head does not
//! even say how many there are. PEFT ignores the file.

use std::path::Path;

use peft_adapters::adapterhub;
use peft_core::adapter_config::ADAPTER_CONFIG;
use peft_core::{Error, HeadKind, Labels, Result, atomic, read_keys};
use peft_lora::foreign::Layout;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::adapter_files;

/// The file's name.
pub const FILE: &str = "labels.json";

/// Weights of output layers, as PEFT stores those of the heads there are.
const OUTPUT_LAYERS: [&str; 4] =
    ["classifier.weight", "classifier.out_proj.weight", "score.weight", "qa_outputs.weight"];

/// A list of names is a few kilobytes; anything larger than this is not one.
const MOST_BYTES: u64 = 16 << 20;

#[derive(Deserialize)]
#[serde(untagged)]
enum Stored {
    Names(Vec<String>),
    Problem { problem_type: String, labels: Vec<String> },
}

/// Writes the outputs of a head into `dir`, making it if need be.
///
/// # Errors
/// When the disk refuses.
pub fn write(dir: &Path, labels: &Labels) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::write(dir, e))?;
    let stored = match labels.kind {
        HeadKind::MultiLabel | HeadKind::Regression => {
            json!({"problem_type": labels.kind.problem_type(), "labels": labels.names})
        }
        _ => json!(labels.names),
    };
    let text = serde_json::to_string_pretty(&stored).map_err(|e| Error::msg(e.to_string()))? + "\n";
    atomic::write_file(dir.join(FILE), text.as_bytes())
}

/// The outputs of the head that an adapter folder holds: those of its `labels.json` or of AdapterHub's head, or
/// else `LABEL_0`, `LABEL_1`, … as many as its output layer has rows. What they are for is what the file or `task_type` says, and of one
/// output alone a regression, as in transformers. None where the folder holds no head.
///
/// # Errors
/// A file that is no list of names, or an adapter that cannot be opened.
pub fn read(folder: &Path) -> Result<Option<Labels>> {
    let file = folder.join(FILE);
    if file.is_file() {
        let length = std::fs::metadata(&file).map_err(|e| Error::io(&file, e))?.len();
        if length > MOST_BYTES {
            return Err(Error::file(&file, "is too large for a list of names"));
        }
        let text = std::fs::read(&file).map_err(|e| Error::io(&file, e))?;
        let wrong = |e: serde_json::Error| Error::file(&file, format!("is not a list of the classes' names: {e}"));
        return match serde_json::from_slice(&text).map_err(wrong)? {
            Stored::Names(names) => Ok(Some(Labels { kind: kind(folder, names.len())?, names })),
            Stored::Problem { problem_type, labels } => {
                let kind = HeadKind::ALL.into_iter().find(|kind| kind.problem_type() == Some(&problem_type));
                let unknown = || Error::file(&file, format!("has the unknown problem_type `{problem_type}`"));
                Ok(Some(Labels { kind: kind.ok_or_else(unknown)?, names: labels }))
            }
        };
    }
    // Adapters of linear layers alone.
    if Layout::of(folder)?.is_some() {
        return Ok(None);
    }
    if adapterhub::is_adapterhub(folder)?
        && let Some(labels) = adapterhub::labels(folder)?
    {
        return Ok(Some(labels.into()));
    }
    let files = adapter_files::open(folder, None)?;
    let is_output =
        |key: &&str| OUTPUT_LAYERS.iter().any(|end| key.strip_suffix(end).is_some_and(|p| p.ends_with('.')));
    let outputs =
        files.keys().find(is_output).and_then(|key| files.shape(key)).and_then(|shape| shape.first().copied());
    let Some(n) = outputs else { return Ok(None) };
    Ok(Some(Labels { kind: kind(folder, n)?, names: (0..n).map(|i| format!("LABEL_{i}")).collect() }))
}

/// What a head of so many outputs is for where nothing but `task_type` says so.
fn kind(folder: &Path, outputs: usize) -> Result<HeadKind> {
    let keys = if folder.join(ADAPTER_CONFIG).is_file() { Some(read_keys(folder)?) } else { None };
    let task = keys.as_ref().and_then(|keys| keys.get("task_type")).and_then(Value::as_str);
    let of_tokens = HeadKind::ALL.into_iter().find(|kind| kind.is_of_tokens() && Some(kind.peft_name()) == task);
    Ok(of_tokens.unwrap_or(if outputs == 1 { HeadKind::Regression } else { HeadKind::Classification }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let names = ["negative", "positive"].map(str::to_string).to_vec();
        for kind in [HeadKind::Classification, HeadKind::Regression, HeadKind::MultiLabel] {
            let labels = Labels { names: names.clone(), kind };
            write(dir.path(), &labels).unwrap();
            assert_eq!(read(dir.path()).unwrap(), Some(labels));
        }
        write(dir.path(), &names[..1].to_vec().into()).unwrap();
        assert_eq!(read(dir.path()).unwrap().unwrap().kind, HeadKind::Regression);
        for bad in ["", "{}", "[1]", "[\"a\"", "{\"problem_type\": \"x\", \"labels\": [\"a\"]}"] {
            std::fs::write(dir.path().join(FILE), bad).unwrap();
            assert!(read(dir.path()).unwrap_err().to_string().contains("labels.json"), "{bad}");
        }
    }
}
