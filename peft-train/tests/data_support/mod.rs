//! Shared by the data tests: the tiny tokenizer, and files in a temporary folder.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code, unreachable_pub)]

use std::path::PathBuf;

use peft_train::data::{DataError, DataSpec, Dataset, EncodeOptions, Format, HfTextTokenizer, TextTokenizer};

/// What `fixtures/make_data_chat.py` wrote.
pub fn fixture() -> serde_json::Value {
    serde_json::from_str(include_str!("../fixtures/data_chat.json")).unwrap()
}

/// Byte-level BPE with `<s>` put in front by its post-processor and `</s>` as end token.
pub fn tokenizer(chat_template: Option<&str>) -> HfTextTokenizer {
    let json = fixture()["tokenizer"].to_string();
    let inner = tokenizers::Tokenizer::from_bytes(json).unwrap();
    HfTextTokenizer::new(inner, Some("<s>".into()), Some("</s>".into()), chat_template.map(str::to_string)).unwrap()
}

/// Template in ChatML's style.
pub const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\
     {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

pub struct Folder(pub tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

pub fn load(path: &std::path::Path, options: &EncodeOptions, format: Option<Format>) -> Result<Dataset, DataError> {
    let tokenizer = tokenizer(Some(CHATML));
    Dataset::load(&DataSpec::from(path), format, Some(&tokenizer), options).map(|(d, _)| d)
}

/// Encodes a JSONL text with the format that its columns speak for.
pub fn jsonl(content: &str, set: impl FnOnce(&mut EncodeOptions)) -> Result<Dataset, String> {
    let folder = Folder::new();
    let path = folder.write("d.jsonl", content);
    let mut options = EncodeOptions::new(Format::Text);
    set(&mut options);
    load(&path, &options, None).map_err(|e| e.to_string())
}

/// Text of the counted tokens and of the others of a row.
pub fn parts(dataset: &Dataset, row: usize) -> (String, String) {
    let tokenizer = tokenizer(None);
    let decode = |keep: bool| {
        let ids: Vec<u32> = dataset
            .input_ids(row)
            .iter()
            .zip(dataset.labels(row))
            .filter(|(_, l)| (*l != -100) == keep)
            .map(|(i, _)| *i)
            .collect();
        tokenizer.inner().decode(&ids, false).unwrap()
    };
    (decode(false), decode(true))
}

pub fn ids(text: &str) -> Vec<u32> {
    tokenizer(None).encode(text, false).unwrap()
}
