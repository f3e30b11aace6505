//! A path that exists: is it what was asked for?

use std::path::{Path, PathBuf};

use crate::error::{HubError, Result};
use crate::{Kind, Location};

/// Files of which an adapter folder has one: an adapter's own config, or what AdapterHub writes of several that are put together.
const ADAPTER_FILES: [&str; 3] = ["adapter_config.json", "adapter_setup.json", "adapter_fusion_config.json"];

/// Check that a folder or file can be the model or adapter that it was named as, by the names of its files only.
pub(crate) fn check(path: &Path, kind: Kind) -> Result<Location> {
    let unsuitable = |why: String| HubError::Unsuitable { path: path.to_owned(), why };
    if !path.is_dir() {
        return match (kind, has_extension(path, "gguf")) {
            (Kind::Model, true) => Ok(Location::Gguf(path.to_owned())),
            _ if has_extension(path, "safetensors") || has_extension(path, "json") => {
                let folder = path.parent().unwrap_or(path);
                Err(unsuitable(format!(
                    "a file; give the folder that holds it ({})",
                    if folder.as_os_str().is_empty() { "." } else { folder.to_str().unwrap_or("its parent") }
                )))
            }
            (Kind::Model, false) => Err(unsuitable(
                "neither a folder nor a .gguf file; give a folder with config.json and safetensors, or a .gguf file"
                    .to_owned(),
            )),
            (Kind::Adapter, _) => Err(unsuitable(
                "a file; an adapter is a folder with adapter_config.json and adapter_model.safetensors".to_owned(),
            )),
        };
    }
    let has = |file: &str| path.join(file).is_file();
    match kind {
        Kind::Model if has("config.json") => Ok(Location::Folder(path.to_owned())),
        Kind::Adapter if ADAPTER_FILES.iter().any(|file| has(file)) => Ok(Location::Folder(path.to_owned())),
        // Some programs keep an adapter in one file of weights and nothing beside it.
        Kind::Adapter if !has("config.json") && list(path, |entry| has_extension(entry, "safetensors"))?.len() == 1 => {
            Ok(Location::Folder(path.to_owned()))
        }
        Kind::Model => {
            let mut gguf = list(path, |entry| has_extension(entry, "gguf"))?;
            match (gguf.pop(), gguf.len()) {
                (Some(only), 0) => Ok(Location::Gguf(only)),
                (Some(one), more) => Err(unsuitable(format!(
                    "no config.json, and {} .gguf files; name one of them, such as {}",
                    more + 1,
                    one.display()
                ))),
                (None, _) if has("adapter_config.json") => Err(unsuitable(
                    "an adapter, not a model; give it with --adapter, and its base with --model".to_owned(),
                )),
                (None, _) => Err(unsuitable(format!("no config.json, so not a model folder{}", contents(path)?))),
            }
        }
        Kind::Adapter => {
            let mut inner = list(path, |entry| entry.join("adapter_config.json").is_file())?;
            inner.sort();
            Err(unsuitable(match inner.first() {
                Some(folder) => {
                    format!("no adapter_config.json; did you mean {}?", folder.display())
                }
                None if has("config.json") => "a model, not an adapter; give it with --model".to_owned(),
                None => format!("no adapter_config.json, so not an adapter folder{}", contents(path)?),
            }))
        }
    }
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

/// The entries of `folder` that `wanted` picks.
fn list(folder: &Path, wanted: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|source| HubError::io(folder, source))? {
        let path = entry.map_err(|source| HubError::io(folder, source))?.path();
        if wanted(&path) {
            found.push(path);
        }
    }
    Ok(found)
}

/// A few names out of a folder, to show what is there instead.
fn contents(folder: &Path) -> Result<String> {
    let mut names: Vec<String> = list(folder, |_| true)?
        .iter()
        .filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .collect();
    if names.is_empty() {
        return Ok(" (it is empty)".to_owned());
    }
    names.sort();
    let more = names.len().saturating_sub(6);
    names.truncate(6);
    Ok(format!(
        " (it holds {}{})",
        names.join(", "),
        if more > 0 { format!(" and {more} more") } else { String::new() }
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        }
        folder
    }

    #[test]
    fn folders_and_gguf_files() {
        let model = folder(&["config.json", "model.safetensors"]);
        assert_eq!(check(model.path(), Kind::Model).unwrap(), Location::Folder(model.path().to_owned()));
        let adapter = folder(&["adapter_config.json"]);
        assert!(matches!(check(adapter.path(), Kind::Adapter), Ok(Location::Folder(_))));
        let weights = folder(&["trained.safetensors"]);
        assert!(matches!(check(weights.path(), Kind::Adapter), Ok(Location::Folder(_))));
        let gguf = folder(&["m.GGUF"]);
        let file = gguf.path().join("m.GGUF");
        assert_eq!(check(&file, Kind::Model).unwrap(), Location::Gguf(file.clone()));
        assert_eq!(check(gguf.path(), Kind::Model).unwrap(), Location::Gguf(file));
    }

    #[test]
    fn the_wrong_thing_is_named_for_what_it_is() {
        let says = |files: &[&str], sub: &str, kind, text: &str| {
            let folder = folder(files);
            let path = folder.path().join(sub);
            let error = check(&path, kind).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        };
        says(&["adapter_config.json"], "", Kind::Model, "--adapter");
        says(&["config.json"], "", Kind::Adapter, "--model");
        says(&[], "", Kind::Model, "it is empty");
        says(&["x.txt"], "", Kind::Adapter, "it holds x.txt");
        says(&["a.gguf", "b.gguf"], "", Kind::Model, "2 .gguf files");
        says(&["default/adapter_config.json"], "", Kind::Adapter, "did you mean");
        says(&["model.safetensors"], "model.safetensors", Kind::Model, "give the folder");
        says(&["m.gguf"], "m.gguf", Kind::Adapter, "an adapter is a folder");
        says(&["m.bin"], "m.bin", Kind::Model, "neither a folder");
    }
}
