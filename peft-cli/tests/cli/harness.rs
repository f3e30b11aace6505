//! A folder to work in, the program, and a tiny base model that the program itself pretrained.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::byte_tokenizer::write_tokenizer;
use serde_json::{Value, json};

/// What a run of the program left behind.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Status 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// The last line of stdout.
    #[track_caller]
    pub fn json(self) -> Value {
        let ran = self.ok();
        let line = ran.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|e| panic!("{e} in {line:?}"))
    }

    /// Status 1 and one line `error: …`; it, or the list below it, names each of `names`.
    #[track_caller]
    pub fn fails(self, names: &[&str]) {
        let errors: Vec<&str> = self.stderr.lines().filter(|l| l.starts_with("error:")).collect();
        assert_eq!(self.code, Some(1), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        let [error] = errors[..] else { panic!("not one error line:\n{}", self.stderr) };
        let message = &self.stderr[self.stderr.find(error).unwrap_or_default()..];
        for name in names {
            assert!(message.contains(name), "`{name}` is not in: {message}");
        }
    }

    /// Status 2 and a message that names each of `names`.
    #[track_caller]
    pub fn misused(self, names: &[&str]) {
        assert_eq!(self.code, Some(2), "{}", self.stderr);
        assert!(self.stderr.starts_with("error:"), "{}", self.stderr);
        for name in names {
            assert!(self.stderr.contains(name), "`{name}` is not in: {}", self.stderr);
        }
    }
}

/// A temporary folder that the program runs in.
pub struct Dir(tempfile::TempDir);

impl Dir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peft-cli"));
        command.args(args).current_dir(self.0.path()).stdin(Stdio::null());
        command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", self.path("hf")).env_remove("RUST_LOG");
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        let out = self.command(args).output().unwrap();
        Ran {
            code: out.status.code(),
            stdout: String::from_utf8(out.stdout).unwrap(),
            stderr: String::from_utf8(out.stderr).unwrap(),
        }
    }

    /// `train` of LoRA on [`rows`] over the tiny base, with `more` arguments.
    pub fn train(&self, more: &[&str]) -> Ran {
        self.run(&self.train_args(more).iter().map(String::as_str).collect::<Vec<_>>())
    }

    pub fn train_args(&self, more: &[&str]) -> Vec<String> {
        self.write("rows.jsonl", &rows());
        let mut args = vec!["train".to_string()];
        let given = |flag: &str| more.contains(&flag);
        for (flag, value) in [
            ("--model", base().display().to_string()),
            ("--data", "rows.jsonl".into()),
            ("--format", "completion".into()),
            ("--output", "out".into()),
        ] {
            if !given(flag) {
                args.extend([flag.to_string(), value]);
            }
        }
        if !given("--adapter") {
            args.extend(["--set", "method.r=4", "--set", "method.lora_dropout=0.1"].map(String::from));
        }
        for setting in ["train.batch_size=4", "train.learning_rate=1e-2", "train.max_steps=6"] {
            args.extend(["--set".to_string(), setting.to_string()]);
        }
        args.extend(more.iter().map(|s| s.to_string()));
        args
    }

    /// A copy of the tiny base to damage.
    pub fn copy_of_base(&self, name: &str) -> PathBuf {
        copy(base(), &self.path(name));
        self.path(name)
    }
}

pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// Completion rows: a rule that the base has not seen.
pub fn rows() -> String {
    let mut text = String::new();
    for i in 0..24 {
        let (a, b) = ((b'a' + i % 8) as char, (b'a' + (i + 3) % 8) as char);
        writeln!(text, "{}", json!({"prompt": format!("say {a} "), "completion": format!("{b}{b}{b}!")})).unwrap();
    }
    text
}

/// `hidden_size` 32 makes the base; another makes a base that its adapters do not fit.
pub fn config(hidden_size: usize) -> String {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 257, "hidden_size": hidden_size,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "initializer_range": 0.1, "tie_word_embeddings": false, "eos_token_id": 0, "torch_dtype": "float32"
    })
    .to_string()
}

/// Pretrains a tiny model in `dir` and gives its folder.
pub fn pretrain(dir: &Dir, hidden_size: usize) -> PathBuf {
    dir.write("blank/config.json", &config(hidden_size));
    write_tokenizer(&dir.path("blank"));
    let text: String = (0..16).map(|i| json!({"text": format!("say {i} say {}", i * 7)}).to_string() + "\n").collect();
    dir.write("text.jsonl", &text);
    dir.run(&[
        "train",
        "--model",
        "blank",
        "--data",
        "text.jsonl",
        "--format",
        "text",
        "--method",
        "full",
        "--output",
        "pretrained",
        "--set",
        "model.init=random",
        "--set",
        "train.max_steps=10",
        "--set",
        "train.learning_rate=1e-2",
    ])
    .ok();
    dir.path("pretrained/model")
}

/// The base that the tests share.
pub fn base() -> &'static Path {
    static BASE: OnceLock<(Dir, PathBuf)> = OnceLock::new();
    let (_, path) = BASE.get_or_init(|| {
        let dir = Dir::new();
        let path = pretrain(&dir, 32);
        (dir, path)
    });
    path
}

/// The loss that `eval` gives for the rows.
#[track_caller]
pub fn eval_loss(dir: &Dir, model: &str, adapter: Option<&str>) -> f64 {
    let mut args = vec!["eval", "--model", model, "--data", "rows.jsonl", "--json"];
    if let Some(adapter) = adapter {
        args.extend(["--adapter", adapter]);
    }
    let result = dir.run(&args).json();
    for key in ["perplexity", "tokens", "examples"] {
        assert!(result[key].is_number(), "{key} in {result}");
    }
    assert_eq!(result["examples"], 24);
    result["loss"].as_f64().unwrap()
}

/// The rows of `metrics.jsonl` that are optimiser steps.
pub fn steps(dir: &Dir, output: &str) -> Vec<Value> {
    let text = String::from_utf8(dir.read(&format!("{output}/metrics.jsonl"))).unwrap();
    let rows = text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
    rows.filter(|r| r.get("loss").is_some()).collect()
}
