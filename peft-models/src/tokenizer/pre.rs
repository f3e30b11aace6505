//! Pre-tokenizers by llama.cpp's names (`tokenizer.ggml.pre`; `llama-vocab.cpp` in ggml-org/llama.cpp).
//!
//! How text is cut before byte-pair merges apply is not in a GGUF file: only a name is. Each name here has the
//! `tokenizer.json` pieces of the models that carry it. An unknown name is refused, because a wrong cut gives plausible
//! but wrong ids.

use peft_core::suggest::did_you_mean;
use serde_json::{Value, json};

/// How text is cut into words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Split {
    /// GPT-2's expression, built into the byte-level pre-tokenizer.
    Gpt2,
    /// Every digit alone, then GPT-2's expression.
    Digits,
    /// An expression of its own.
    Regex(&'static str),
}

/// One way of pre-tokenising and the names it goes by; the first name is the one that is written.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    pub(super) names: &'static [&'static str],
    pub(super) split: Split,
    /// A word that is a token as a whole is taken as that token.
    pub(super) ignore_merges: bool,
    /// Text is normalised to NFC.
    pub(super) nfc: bool,
    /// Whether a begin token is added where the file does not say.
    pub(super) add_bos: bool,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Every known pre-tokenizer.
pub(super) const PRE_TOKENIZERS: &[PreTokenizer] = &[
    PreTokenizer {
        names: &[
            "gpt-2",
            "default",
            "phi-2",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "gigachat",
            "mpt",
            "olmo",
            "a.x-4.0",
        ],
        split: Split::Gpt2,
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        split: Split::Digits,
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        split: Split::Regex(LLAMA3),
        ignore_merges: true,
        nfc: false,
        add_bos: true,
    },
    PreTokenizer {
        names: &["dbrx", "smaug-bpe"],
        split: Split::Regex(LLAMA3),
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen", "megrez"],
        split: Split::Regex(QWEN2),
        ignore_merges: false,
        nfc: true,
        add_bos: false,
    },
    PreTokenizer {
        names: &["stablelm2", "hunyuan"],
        split: Split::Regex(QWEN2),
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
    PreTokenizer { names: &["tekken"], split: Split::Regex(TEKKEN), ignore_merges: true, nfc: false, add_bos: true },
    PreTokenizer {
        names: &["gpt-4o", "llama4"],
        split: Split::Regex(GPT4O),
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
];

impl PreTokenizer {
    /// The pre-tokenizer that a file names; one that names none has GPT-2's, as in transformers.
    pub(super) fn named(name: Option<&str>) -> Result<&'static Self, String> {
        let name = name.unwrap_or("default");
        PRE_TOKENIZERS.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
            let known: Vec<&str> = PRE_TOKENIZERS.iter().flat_map(|pre| pre.names).copied().collect();
            format!(
                "pre-tokenizer `{name}` is not supported (known: {}){}; a Hugging Face folder of the same model works",
                known.join(", "),
                did_you_mean(name, &known)
            )
        })
    }

    /// The `normalizer` of a `tokenizer.json`.
    pub(super) fn normalizer(&self) -> Value {
        if self.nfc { json!({ "type": "NFC" }) } else { Value::Null }
    }

    /// The `pre_tokenizer` of a `tokenizer.json`.
    pub(super) fn pre_tokenizer(&self) -> Value {
        let bytes = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
        let sequence = |first: Value, second: Value| json!({ "type": "Sequence", "pretokenizers": [first, second] });
        match self.split {
            Split::Gpt2 => bytes(true),
            Split::Digits => sequence(json!({ "type": "Digits", "individual_digits": true }), bytes(true)),
            Split::Regex(regex) => sequence(
                json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false }),
                bytes(false),
            ),
        }
    }

    /// The pre-tokenizer that a `tokenizer.json` describes, if llama.cpp has a name for it.
    pub(super) fn described(tokenizer: &Value) -> Option<&'static Self> {
        let ignore_merges = tokenizer.pointer("/model/ignore_merges").and_then(Value::as_bool).unwrap_or(false);
        let nfc = match tokenizer.get("normalizer") {
            None | Some(Value::Null) => false,
            Some(normalizer) if normalizer.get("type").and_then(Value::as_str) == Some("NFC") => true,
            Some(_) => return None,
        };
        let steps = steps(tokenizer.get("pre_tokenizer")?);
        PRE_TOKENIZERS.iter().find(|pre| {
            // NFC does not change how words are cut, and llama.cpp never normalises.
            (pre.nfc == nfc || nfc)
                && pre.ignore_merges == ignore_merges
                && same_steps(&self::steps(&pre.pre_tokenizer()), &steps)
        })
    }
}

/// The steps of a pre-tokenizer, without what does not change ids.
fn steps(pre_tokenizer: &Value) -> Vec<Value> {
    let mut steps = match pre_tokenizer.get("pretokenizers").and_then(Value::as_array) {
        Some(steps) => steps.clone(),
        None => vec![pre_tokenizer.clone()],
    };
    for step in &mut steps {
        if let Some(step) = step.as_object_mut() {
            step.remove("trim_offsets");
        }
    }
    steps
}

fn same_steps(a: &[Value], b: &[Value]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b)
}
