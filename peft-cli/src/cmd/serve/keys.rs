//! The keys of `serve`: those of the command line for every model, those of a file for the models that it names.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use peft_serve::http::ApiKey;
use serde::Deserialize;

use crate::args::ServeArgs;

/// `--key-file`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    keys: Vec<KeyEntry>,
}

/// A key, or its SHA-256 in hexadecimal digits, and what it may ask for; every model if left out.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyEntry {
    key: Option<String>,
    sha256: Option<String>,
    models: Option<Vec<String>>,
}

impl KeyEntry {
    fn read(self) -> Result<ApiKey> {
        let key = match (self.key, self.sha256) {
            (Some(key), None) => plain(&key)?,
            (None, Some(digits)) => {
                let digest = digest_of(&digits).context("`sha256` is not 64 hexadecimal digits (see sha256sum)")?;
                ApiKey::from_sha256(digest)
            }
            _ => bail!("has to have either `key` or `sha256`"),
        };
        let Some(models) = self.models else { return Ok(key) };
        ensure!(!models.is_empty(), "`models` is empty, so the key is of no use: name some, or leave it out for all");
        for model in &models {
            let name = model.strip_suffix('*').unwrap_or(model);
            ensure!(!name.contains('*'), "`{model}`: a `*` may stand at the end alone");
        }
        Ok(key.only_for(models))
    }
}

fn plain(key: &str) -> Result<ApiKey> {
    ensure!(!key.trim().is_empty(), "an API key is empty");
    ensure!(key.trim() == key, "an API key begins or ends with a space");
    Ok(ApiKey::new(key))
}

fn digest_of(digits: &str) -> Option<[u8; 32]> {
    let digits = digits.as_bytes();
    let mut digest = [0; 32];
    if digits.len() != 64 {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(digits.chunks_exact(2)) {
        let value = |c: u8| char::from(c).to_digit(16);
        let [high, low] = pair else { return None };
        *byte = u8::try_from(value(*high)? * 16 + value(*low)?).ok()?;
    }
    Some(digest)
}

/// All keys that may ask.
pub(super) fn read(args: &ServeArgs) -> Result<Vec<ApiKey>> {
    let mut keys = Vec::new();
    for key in &args.api_key {
        keys.push(plain(key).context("--api-key")?);
    }
    if let Some(path) = &args.key_file {
        keys.extend(of_file(path).with_context(|| format!("--key-file {}", path.display()))?);
    }
    for (i, key) in keys.iter().enumerate() {
        ensure!(!keys.iter().take(i).any(|other| other.is_same_key(key)), "an API key is there twice");
    }
    ensure!(args.admin_key.as_ref().is_none_or(|key| !key.trim().is_empty()), "--admin-key is empty");
    Ok(keys)
}

fn of_file(path: &Path) -> Result<Vec<ApiKey>> {
    let text = std::fs::read_to_string(path)?;
    // What stands in the file is secret: of an error, where it is and not what.
    let file: KeyFile = toml::from_str(&text).map_err(|e| {
        let line = e.span().map_or(1, |span| text.get(..span.start).map_or(1, |before| before.lines().count().max(1)));
        anyhow::anyhow!("line {line}: {}", e.message())
    })?;
    ensure!(!file.keys.is_empty(), "holds no [[keys]], and a server without keys lets everybody ask");
    let read = |(i, entry): (usize, KeyEntry)| entry.read().with_context(|| format!("[[keys]] number {}", i + 1));
    file.keys.into_iter().enumerate().map(read).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn of(text: &str) -> Result<Vec<ApiKey>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.toml");
        std::fs::write(&path, text).unwrap();
        of_file(&path).map_err(|e| format!("{e:#}"))
    }

    #[test]
    fn a_key_is_written_out_or_as_its_digest() {
        // printf secret | sha256sum
        let digest = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";
        let keys =
            of(&format!("[[keys]]\nkey = \"secret\"\n[[keys]]\nsha256 = \"{digest}\"\nmodels = [\"a\", \"b-*\"]\n"));
        let keys = keys.unwrap();
        assert!(keys.len() == 2 && keys[0].is_same_key(&keys[1]) && keys[0] != keys[1]);
        assert!(!format!("{keys:?}").contains("secret"));
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_without_its_secrets() {
        for (text, says) in [
            ("", "keys"),
            ("keys = []", "no [[keys]]"),
            ("[[keys]]\nmodels = [\"a\"]\n", "number 1: has to have either"),
            ("[[keys]]\nkey = \"hidden\"\nsha256 = \"00\"\n", "either"),
            ("[[keys]]\nkey = \"hidden\"\n[[keys]]\nsha256 = \"zz\"\n", "number 2: `sha256`"),
            ("[[keys]]\nkey = \" \"\n", "empty"),
            ("[[keys]]\nkey = \"hidden\"\nmodels = []\n", "`models` is empty"),
            ("[[keys]]\nkey = \"hidden\"\nmodels = [\"*a\"]\n", "`*a`"),
            ("[[keys]]\nkey = \"hidden\"\nmodel = [\"a\"]\n", "model"),
            ("[[keys]]\nkey = \"hidden\n", "line 2"),
        ] {
            let e = of(text).unwrap_err();
            assert!(e.contains(says) && !e.contains("hidden"), "{text:?}: {e}");
        }
    }
}
