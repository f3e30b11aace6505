//! Tokenizer files of a Hugging Face folder: reading and writing.

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::AddedToken;

use super::{Origin, Tokenizer, TokenizerError, invalid};

/// Larger than any published tokenizer.json (Gemma's is 33 MB).
const MAX_FILE_BYTES: u64 = 1 << 29;

/// Files that belong to a tokenizer and are copied when it is saved elsewhere.
const FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
];

impl Tokenizer {
    /// Loads the tokenizer of a model folder, or the one beside a `tokenizer.json`.
    ///
    /// `tokenizer.json` must be there; `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja` and
    /// `generation_config.json` are read where they are.
    ///
    /// # Errors
    /// `tokenizer.json` is absent or corrupt, or one of the others is corrupt.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let folder = folder.as_ref();
        let folder = if folder.is_file() { folder.parent().unwrap_or(folder) } else { folder };
        let path = folder.join("tokenizer.json");
        let Some(bytes) = read(&path)? else {
            let hint = if folder.join("tokenizer.model").exists() || folder.join("vocab.json").exists() {
                "; this folder has an older kind of tokenizer, which transformers converts: \
                 AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            } else {
                ""
            };
            return Err(invalid(&path, format!("not found{hint}")));
        };
        let mut inner = super::parse(&bytes).map_err(|error| invalid(&path, format!("not a tokenizer: {error}")))?;
        drop(bytes);
        inner.with_truncation(None).map_err(|error| invalid(&path, error.to_string()))?;
        inner.with_padding(None);

        let config_path = folder.join("tokenizer_config.json");
        let config = read_object(&config_path)?.unwrap_or_default();
        add_tokens(&mut inner, &config, &config_path)?;
        let special_map = read_object(&folder.join("special_tokens_map.json"))?.unwrap_or_default();
        let special = |key: &str| -> Result<Option<u32>, TokenizerError> {
            let value = config.get(key).filter(|value| !value.is_null()).or_else(|| special_map.get(key));
            let Some(token) = value.and_then(token_text) else { return Ok(None) };
            match inner.token_to_id(token) {
                Some(id) => Ok(Some(id)),
                None => Err(invalid(&config_path, format!("`{key}` is `{token}`, which is not in tokenizer.json"))),
            }
        };
        let (bos_token_id, eos_token_id) = (special("bos_token")?, special("eos_token")?);
        let (pad_token_id, unk_token_id) = (special("pad_token")?, special("unk_token")?);

        let mut eos_token_ids: Vec<u32> = eos_token_id.into_iter().collect();
        // What generation stops at; config.json is where older folders keep it.
        for name in ["generation_config.json", "config.json"] {
            let from_file =
                read_object(&folder.join(name))?.map(|map| token_ids(map.get("eos_token_id"))).unwrap_or_default();
            for id in &from_file {
                if !eos_token_ids.contains(id) && inner.id_to_token(*id).is_some() {
                    eos_token_ids.push(*id);
                }
            }
            if !from_file.is_empty() {
                break;
            }
        }
        let chat_template = chat_template(folder, &config)?;
        Ok(Self {
            inner: inner.into(),
            bos_token_id,
            eos_token_ids,
            pad_token_id,
            unk_token_id,
            chat_template,
            config,
            origin: Origin::Folder(folder.into()),
        })
    }

    /// Writes the tokenizer into a folder, so that transformers loads it from there: files of a Hugging Face folder are
    /// copied unchanged, a GGUF tokenizer is written as `tokenizer.json` and `tokenizer_config.json`. Each file appears
    /// whole or not at all.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<(), TokenizerError> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(|source| TokenizerError::Io { path: folder.into(), source })?;
        let write = |name: &str, bytes: &[u8]| {
            peft_core::atomic::write_file(folder.join(name), bytes).map_err(TokenizerError::from)
        };
        if let Origin::Folder(source) = &self.origin
            && source.join("tokenizer.json").is_file()
        {
            let same = matches!((source.canonicalize(), folder.canonicalize()), (Ok(a), Ok(b)) if a == b);
            if !same {
                for name in FILES {
                    if let Some(bytes) = read(&source.join(name))? {
                        write(name, &bytes)?;
                    }
                }
            }
            return Ok(());
        }
        let json = self.inner.to_string(false).map_err(super::failure)?;
        write("tokenizer.json", json.as_bytes())?;
        let mut config = self.config.clone();
        if let Some(template) = &self.chat_template {
            config.insert("chat_template".into(), json!(template));
        }
        let config = serde_json::to_vec_pretty(&config).map_err(|error| invalid(folder, error.to_string()))?;
        write("tokenizer_config.json", &config)
    }
}

/// The bytes of a file, or `None` if there is none.
fn read(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    let io = |source| TokenizerError::Io { path: path.into(), source };
    let length = match std::fs::metadata(path) {
        Ok(meta) => meta.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    if length > MAX_FILE_BYTES {
        return Err(invalid(path, format!("{length} bytes are too many for a tokenizer file")));
    }
    std::fs::read(path).map(Some).map_err(io)
}

fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, TokenizerError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| invalid(path, format!("not a JSON object: {error}")))
}

/// A special token is a string, or an object with its `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content").and_then(Value::as_str))
}

fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(items)) => items.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// Tokens that only `added_tokens_decoder` knows are added as transformers does, under the ids that it gives them.
fn add_tokens(
    inner: &mut tokenizers::Tokenizer,
    config: &Map<String, Value>,
    path: &Path,
) -> Result<(), TokenizerError> {
    let Some(decoder) = config.get("added_tokens_decoder").and_then(Value::as_object) else { return Ok(()) };
    let mut missing: Vec<(u32, &str, &Value)> = Vec::new();
    for (id, token) in decoder {
        let (Ok(id), Some(content)) = (id.parse(), token_text(token)) else {
            return Err(invalid(path, format!("`added_tokens_decoder` entry `{id}` is not an id with a token")));
        };
        if inner.token_to_id(content).is_none() {
            missing.push((id, content, token));
        }
    }
    missing.sort_by_key(|(id, ..)| *id);
    for (id, content, token) in missing {
        let flag = |key: &str| token.get(key).and_then(Value::as_bool).unwrap_or(false);
        let added = AddedToken::from(content, flag("special"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .single_word(flag("single_word"))
            .normalized(flag("normalized"));
        let result = if flag("special") { inner.add_special_tokens([added]) } else { inner.add_tokens([added]) };
        result.map_err(|error| invalid(path, error.to_string()))?;
        if inner.token_to_id(content) != Some(id) {
            return Err(invalid(
                path,
                format!(
                    "`added_tokens_decoder` gives `{content}` the id {id}, which tokenizer.json does not have free"
                ),
            ));
        }
    }
    Ok(())
}

/// `chat_template.jinja` before the `chat_template` of `tokenizer_config.json`, which is one template or a list of named
/// ones.
fn chat_template(folder: &Path, config: &Map<String, Value>) -> Result<Option<String>, TokenizerError> {
    let path = folder.join("chat_template.jinja");
    if let Some(bytes) = read(&path)? {
        return String::from_utf8(bytes).map(Some).map_err(|_| invalid(&path, "not UTF-8"));
    }
    Ok(match config.get("chat_template") {
        Some(Value::String(template)) => Some(template.clone()),
        Some(Value::Array(templates)) => {
            let named =
                |name: &str| templates.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some(name));
            named("default")
                .or(templates.first())
                .and_then(|entry| entry.get("template").and_then(Value::as_str))
                .map(str::to_owned)
        }
        _ => read_object(&folder.join("chat_template.json"))?
            .and_then(|map| map.get("chat_template").and_then(Value::as_str).map(str::to_owned)),
    })
}
