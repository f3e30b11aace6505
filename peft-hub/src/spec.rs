//! What a spec's text says, before anything is looked up: a path, or a hub id.

use std::path::{Path, PathBuf};

use crate::error::{HubError, Result};

/// A hub repository at a revision, perhaps one file of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HubId {
    /// `org/name`.
    pub(crate) repo: String,
    /// Branch, tag or commit; `main` where the spec names none.
    pub(crate) revision: String,
    /// One GGUF file within the repository.
    pub(crate) file: Option<String>,
}

/// A spec, read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Spec {
    /// A path that exists.
    Local(PathBuf),
    /// A hub id; nothing is known yet about whether it exists.
    Hub(HubId),
}

/// Tell paths from hub ids. A path that exists wins; what looks like a path but does not exist is an error here rather
/// than a confusing 404 later.
pub(crate) fn parse(spec: &str) -> Result<Spec> {
    let path = Path::new(spec);
    if !spec.is_empty() && path.exists() {
        return Ok(Spec::Local(path.to_owned()));
    }
    match hub_id(spec) {
        Some(id) => Ok(Spec::Hub(id)),
        None => Err(HubError::NoSuchFolder { spec: spec.to_owned(), hint: hint(path) }),
    }
}

/// `org/name[@revision]` or `org/name/path/file.gguf[@revision]`.
fn hub_id(spec: &str) -> Option<HubId> {
    let (id, revision) = spec.split_once('@').unwrap_or((spec, "main"));
    let mut parts = id.splitn(3, '/');
    let (org, name, file) = (parts.next()?, parts.next()?, parts.next());
    let gguf = |name: &str| name.to_ascii_lowercase().ends_with(".gguf");
    if !is_id_part(org) || !is_id_part(name) || !is_revision(revision) {
        return None;
    }
    match file {
        // `folder/model.gguf` is a path that is missing, not a repository.
        None if gguf(name) => None,
        Some(file) if !gguf(file) || !is_safe_file(file) => None,
        file => {
            Some(HubId { repo: format!("{org}/{name}"), revision: revision.to_owned(), file: file.map(str::to_owned) })
        }
    }
}

/// The hub's rule for names: letters, digits, `-`, `_`, `.`; at most 96; no `--` or `..`; neither end `-` or `.`.
fn is_id_part(part: &str) -> bool {
    (1..=96).contains(&part.len())
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && !part.starts_with(['-', '.'])
        && !part.ends_with(['-', '.'])
        && !part.contains("--")
        && !part.contains("..")
}

/// A git revision that is also safe as a path under `refs/`.
fn is_revision(revision: &str) -> bool {
    (1..=200).contains(&revision.len())
        && revision.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/' | b'+'))
        && revision.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
}

/// A relative path of plain components, safe to join to a folder of the cache.
pub(crate) fn is_safe_file(file: &str) -> bool {
    !file.is_empty()
        && file.len() <= 512
        && !file.contains(['\\', '\0', ':'])
        && file.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

/// The nearest name beside the missing path, or advice on `~`.
fn hint(path: &Path) -> String {
    if path.starts_with("~") {
        return "; `~` was not expanded by the shell, use $HOME".to_owned();
    }
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        return String::new();
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let Ok(entries) = std::fs::read_dir(parent) else {
        return String::new();
    };
    let nearest = entries
        .take(10_000)
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .map(|other| (strsim::damerau_levenshtein(name, &other), other))
        .filter(|(distance, _)| *distance <= 1 + name.len() / 4)
        .min();
    match nearest {
        Some((_, other)) => format!("; did you mean {}?", parent.join(other).display()),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn id(repo: &str, revision: &str, file: Option<&str>) -> Spec {
        Spec::Hub(HubId { repo: repo.to_owned(), revision: revision.to_owned(), file: file.map(str::to_owned) })
    }

    #[test]
    fn hub_ids() {
        assert_eq!(parse("org/name").unwrap(), id("org/name", "main", None));
        assert_eq!(parse("Qwen/Qwen2.5-0.5B@refs/pr/3").unwrap(), id("Qwen/Qwen2.5-0.5B", "refs/pr/3", None));
        assert_eq!(parse("org/name/sub/m-Q4_K.gguf@v1.0").unwrap(), id("org/name", "v1.0", Some("sub/m-Q4_K.gguf")));
    }

    #[test]
    fn what_is_no_path_and_no_id() {
        for spec in [
            "",
            "./modle",
            "../x",
            "/no/such",
            "~/model",
            "modle",
            "a/b/c",
            "org/name@",
            "org/name@../../x",
            "org/name@/etc",
            "org/name@a b",
            "org/na me",
            "org/..",
            "org/-name",
            "org/a--b",
            "folder/model.gguf",
            "org/name/../../x.gguf",
            "C:\\model",
            "https://huggingface.co/org/name",
        ] {
            let error = parse(spec).unwrap_err().to_string();
            assert!(error.contains("no such folder, and not a hub id"), "{spec}: {error}");
        }
    }

    #[test]
    fn an_existing_path_wins_and_a_near_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        std::fs::create_dir(&model).unwrap();
        assert_eq!(parse(model.to_str().unwrap()).unwrap(), Spec::Local(model.clone()));
        let typo = folder.path().join("modle");
        let error = parse(typo.to_str().unwrap()).unwrap_err().to_string();
        assert!(error.ends_with(&format!("; did you mean {}?", model.display())), "{error}");
    }

    #[test]
    fn files_that_leave_their_folder_are_not_safe() {
        for file in ["", "/etc/passwd", "../x", "a/../x", "a//b", ".", "a\\b", "c:x", "a\0b"] {
            assert!(!is_safe_file(file), "{file:?}");
        }
        for file in ["config.json", "sub/model-00001-of-00002.safetensors", ".hidden"] {
            assert!(is_safe_file(file), "{file:?}");
        }
    }
}
