//! `adapter_config.json`, kept whole: keys that are unknown here survive reading and writing.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::atomic::write_file;
use crate::error::{Error, Result};
use crate::python_json::to_python_json;
use crate::st_header::what_it_is;
use crate::suggest::did_you_mean;

/// Name of the config in an adapter folder.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// A config larger than this is not a config.
const MAX_BYTES: u64 = 64 << 20;
/// Tables whose order decides (the first match wins); PEFT sorts them when it saves, and so changes their meaning.
const ORDERED: [&str; 2] = ["rank_pattern", "alpha_pattern"];

/// The contents of `adapter_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    map: Map<String, Value>,
    path: Option<PathBuf>,
}

impl AdapterConfig {
    /// A config made of these keys; `peft_type` must be among them.
    ///
    /// # Errors
    /// `peft_type` is absent or not a text.
    pub fn new(map: Map<String, Value>) -> Result<Self> {
        let config = Self { map, path: None };
        match config.map.get("peft_type") {
            Some(Value::String(_)) => Ok(config),
            Some(other) => Err(Error::config("peft_type", format!("{other} is not a text"))),
            None => Err(Error::config(
                "peft_type",
                format!("is missing (\"LORA\", for example){}", did_you_mean("peft_type", config.map.keys())),
            )),
        }
    }

    /// Reads `adapter_config.json` of an adapter folder.
    ///
    /// # Errors
    /// There is none (the message says if a subfolder has one), it is not a JSON table, it has no `peft_type`, or it
    /// is one of AdapterHub's, whose files have the same name and another content.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join(ADAPTER_CONFIG);
        let map = read_keys(dir)?;
        let wrong = |message: String| Error::file(&path, message);
        if !map.contains_key("peft_type") && map.contains_key("config") {
            return Err(wrong(
                "is an AdapterHub config (it has `config` and no `peft_type`), and PEFT's is needed here; `peft-cli convert --to \
                 peft` makes one of it"
                    .to_owned(),
            ));
        }
        let mut config = Self::new(map).map_err(|error| wrong(error.to_string()))?;
        config.path = Some(path);
        Ok(config)
    }

    /// `peft_type`, such as `LORA`.
    pub fn peft_type(&self) -> &str {
        self.map.get("peft_type").and_then(Value::as_str).unwrap_or_default()
    }

    /// The file that it was read from.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// All keys, in the order of the file.
    pub fn map(&self) -> &Map<String, Value> {
        &self.map
    }

    /// The value of a key; `None` if it is absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Sets a key.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        self.map.insert(key.into(), value.into());
    }

    /// The bytes that PEFT would write: keys sorted, indented by two, `inference_mode` true. Only `rank_pattern`
    /// and `alpha_pattern` keep their order, which decides between entries that both match.
    ///
    /// # Errors
    /// None in practice; JSON that cannot be written.
    pub fn to_json(&self) -> Result<String> {
        let mut map = self.map.clone();
        map.insert("inference_mode".to_owned(), Value::Bool(true));
        to_python_json(&map, &ORDERED).map_err(|error| Error::msg(format!("{ADAPTER_CONFIG}: {error}")))
    }

    /// Writes `adapter_config.json` atomically; the folder must exist.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn write(&self, dir: impl AsRef<Path>) -> Result<()> {
        write_file(dir.as_ref().join(ADAPTER_CONFIG), self.to_json()?.as_bytes())
    }
}

/// The keys of the `adapter_config.json` in `dir`, whichever program wrote it.
///
/// # Errors
/// There is none (the message says if a subfolder has one), or it is not a JSON table.
pub fn read_keys(dir: impl AsRef<Path>) -> Result<Map<String, Value>> {
    let dir = dir.as_ref();
    let path = dir.join(ADAPTER_CONFIG);
    let info = match std::fs::metadata(&path) {
        Ok(info) => info,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Err(no_config(dir)),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotADirectory => {
            return Err(Error::file(dir, "is a file; give the folder that holds adapter_config.json"));
        }
        Err(cause) => return Err(Error::io(&path, cause)),
    };
    read_json_table(&path, info.len())
}

/// The table in a JSON file of `bytes` bytes.
fn read_json_table(path: &Path, bytes: u64) -> Result<Map<String, Value>> {
    if bytes > MAX_BYTES {
        return Err(Error::file(path, format!("is no config: it has {bytes} bytes")));
    }
    let bytes = std::fs::read(path).map_err(|cause| Error::io(path, cause))?;
    let wrong = |message: String| Error::file(path, message);
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|error| wrong(format!("is not a JSON file: {error}{}", what_it_is(&bytes))))?;
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(wrong("is not a JSON table".to_owned())),
    }
}

/// The table in the JSON file at `path`, or `None` where there is no such file.
///
/// # Errors
/// It cannot be read, or is not a JSON table.
pub fn read_json_file(path: &Path) -> Result<Option<Map<String, Value>>> {
    match std::fs::metadata(path) {
        Ok(info) => read_json_table(path, info.len()).map(Some),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(Error::io(path, cause)),
    }
}

fn no_config(dir: &Path) -> Error {
    if !dir.exists() {
        return Error::file(
            dir,
            "does not exist; give a folder with adapter_config.json and adapter_model.safetensors",
        );
    }
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut inner: Vec<String> = entries
        .filter(|entry| entry.path().join(ADAPTER_CONFIG).exists())
        .map(|entry| entry.path().display().to_string())
        .collect();
    inner.sort();
    let advice = match inner.as_slice() {
        [] if dir.join("config.json").exists() => "; it holds a base model, which goes to --model".to_owned(),
        [] => "; give a folder with adapter_config.json and adapter_model.safetensors".to_owned(),
        [one] => format!("; did you mean `{one}`?"),
        [first, ..] => format!("; {} of its subfolders have one, for example `{first}`", inner.len()),
    };
    Error::file(dir, format!("has no {ADAPTER_CONFIG}{advice}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn read(text: &str) -> Result<AdapterConfig> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(ADAPTER_CONFIG), text).unwrap();
        AdapterConfig::read(dir.path())
    }

    #[test]
    fn unknown_keys_survive_and_inference_mode_is_forced() {
        let config =
            read(r#"{"peft_type":"LORA","zzz":{"b":[1.0,null],"a":"ü"},"inference_mode":false,"r":8}"#).unwrap();
        assert_eq!(config.peft_type(), "LORA");
        assert_eq!(config.get("r").and_then(Value::as_u64), Some(8));
        let text = config.to_json().unwrap();
        assert!(text.contains("\"inference_mode\": true"), "{text}");
        assert!(text.contains(r#""a": "\u00fc""#), "{text}");
        let dir = tempfile::tempdir().unwrap();
        config.write(dir.path()).unwrap();
        let again = AdapterConfig::read(dir.path()).unwrap();
        assert_eq!(again.to_json().unwrap(), text);
        assert_eq!(again.map()["zzz"], config.map()["zzz"]);
    }

    #[test]
    fn wrong_configs_are_explained() {
        for (text, reason) in [
            ("", "is not a JSON file"),
            ("version https://git-lfs.github.com/spec/v1", "git lfs pull"),
            ("[]", "is not a JSON table"),
            ("{}", "`peft_type`: is missing"),
            (r#"{"peft_typ":"LORA"}"#, "did you mean `peft_typ`?"),
            (r#"{"peft_type":null}"#, "is not a text"),
            (r#"{"config":{"mh_adapter":false},"model_class":"BertModel","name":"a"}"#, "AdapterHub"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains(ADAPTER_CONFIG), "{text}: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let error = AdapterConfig::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("has no adapter_config.json"), "{error}");
        std::fs::create_dir(dir.path().join("mine")).unwrap();
        std::fs::write(dir.path().join("mine").join(ADAPTER_CONFIG), "{}").unwrap();
        let error = AdapterConfig::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("did you mean") && error.contains("mine"), "{error}");
        let error = AdapterConfig::read(dir.path().join("no")).unwrap_err().to_string();
        assert!(error.contains("does not exist"), "{error}");
        let error = AdapterConfig::read(dir.path().join("mine").join(ADAPTER_CONFIG)).unwrap_err().to_string();
        assert!(error.contains("is a file"), "{error}");
    }
}
