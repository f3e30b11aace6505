//! The model card: `README.md` in the adapter folder, with the front matter that PEFT's
//! `create_or_update_model_card` writes (`base_model`, `library_name`, `pipeline_tag`, `tags`) and this run's facts.

use std::path::Path;

use super::facts::{RunFacts, Sample};
use peft_core::atomic::write_file;

use super::Result;

/// Samples that the card shows.
const MAX_SAMPLES: usize = 3;

/// All that the card shows.
#[derive(Debug, Clone, Copy)]
pub struct ModelCard<'a> {
    /// Heading, usually the output folder's name.
    pub title: &'a str,
    /// The run's facts.
    pub facts: &'a RunFacts,
    /// The recipe as resolved (TOML); empty leaves it out.
    pub recipe: &'a str,
    /// Generations before and after training.
    pub samples: &'a [Sample],
    /// Whether Hugging Face PEFT can load the adapter.
    pub loads_in_peft: bool,
}

impl ModelCard<'_> {
    /// Writes the card, atomically.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = self.to_markdown();
        Ok(write_file(path, text.as_bytes())?)
    }

    /// The card.
    pub fn to_markdown(&self) -> String {
        let f = self.facts;
        let mut m = String::from("---\n");
        if !f.base_model.is_empty() {
            m += &format!("base_model: {}\n", yaml(&f.base_model));
        }
        m += "library_name: peft\n";
        let task = f.task_type.as_deref().and_then(task);
        if let Some(t) = task {
            m += &format!("pipeline_tag: {}\n", t.pipeline_tag);
        }
        m += "tags:\n";
        for tag in self.tags() {
            m += &format!("- {}\n", yaml(&tag));
        }
        m += &format!("---\n\n# {}\n\n", line(self.title));
        m += &format!("A `{}` adapter for {}.\n\n", code(&f.method), base(&f.base_model));
        m += "## Training\n\n| | |\n|---|---|\n";
        for (k, v) in f.rows() {
            m += &format!("| {k} | {} |\n", line(&v));
        }
        m += "\nCurves: `report.html`. Every step: `metrics.jsonl`.\n\n## Use\n\n";
        if self.loads_in_peft {
            m += "With Hugging Face PEFT, in this folder:\n\n";
            m += &fenced("python", &self.python(task));
        }
        m += "With peft-cli, in this folder:\n\n";
        m += &fenced("sh", &self.shell());
        if !self.samples.is_empty() {
            m += "## Before and after\n\n";
            for s in self.samples.iter().take(MAX_SAMPLES) {
                m += &format!(
                    "Prompt:\n\n{}Base model:\n\n{}With the adapter:\n\n{}",
                    fenced("text", &s.prompt),
                    fenced("text", &s.before),
                    fenced("text", &s.after)
                );
            }
        }
        if !self.recipe.trim().is_empty() {
            m += &format!("## Recipe\n\n{}", fenced("toml", self.recipe));
        }
        m
    }

    fn tags(&self) -> Vec<String> {
        let f = self.facts;
        let mut tags = vec!["transformers".to_owned()];
        if !f.base_model.is_empty() {
            tags.push(format!("base_model:adapter:{}", f.base_model));
        }
        if !f.method.is_empty() {
            tags.push(f.method.clone());
        }
        tags.sort();
        tags.dedup();
        tags
    }

    fn python(&self, task: Option<&'static Task>) -> String {
        let model = literal(&self.facts.base_model);
        let class = task.map_or("AutoModel", |t| t.auto_model);
        let more = if task.is_some_and(|t| t.generates) {
            "\ninputs = tokenizer(\"…\", return_tensors=\"pt\")\n\
             output = model.generate(**inputs, max_new_tokens=64)\n\
             print(tokenizer.decode(output[0], skip_special_tokens=True))\n"
        } else {
            ""
        };
        // PEFT's X-LoRA has no cache.
        let cache = if self.facts.method == "xlora" { "model.config.use_cache = False\n" } else { "" };
        format!(
            "from peft import PeftModel\nfrom transformers import {class}, AutoTokenizer\n\n\
             model = {class}.from_pretrained({model})\n{cache}model = PeftModel.from_pretrained(model, \".\")\n\
             tokenizer = AutoTokenizer.from_pretrained({model})\n{more}"
        )
    }

    fn shell(&self) -> String {
        let model = shell_quote(&self.facts.base_model);
        let generates = self.facts.task_type.as_deref().and_then(task).is_none_or(|t| t.generates);
        let mut s = String::new();
        if generates {
            s += &format!("peft-cli generate --model {model} --adapter . --prompt '…'\n");
        }
        s += &format!("peft-cli eval --model {model} --adapter . --data test.jsonl\n");
        s += &format!("peft-cli merge --model {model} --adapter . --output merged\n");
        s
    }
}

struct Task {
    name: &'static str,
    pipeline_tag: &'static str,
    auto_model: &'static str,
    generates: bool,
}

/// PEFT's `TaskType` values with the hub's pipeline tags.
const TASKS: [Task; 6] = [
    Task { name: "CAUSAL_LM", pipeline_tag: "text-generation", auto_model: "AutoModelForCausalLM", generates: true },
    Task {
        name: "SEQ_2_SEQ_LM",
        pipeline_tag: "text2text-generation",
        auto_model: "AutoModelForSeq2SeqLM",
        generates: true,
    },
    Task {
        name: "SEQ_CLS",
        pipeline_tag: "text-classification",
        auto_model: "AutoModelForSequenceClassification",
        generates: false,
    },
    Task {
        name: "TOKEN_CLS",
        pipeline_tag: "token-classification",
        auto_model: "AutoModelForTokenClassification",
        generates: false,
    },
    Task {
        name: "QUESTION_ANS",
        pipeline_tag: "question-answering",
        auto_model: "AutoModelForQuestionAnswering",
        generates: false,
    },
    Task { name: "FEATURE_EXTRACTION", pipeline_tag: "feature-extraction", auto_model: "AutoModel", generates: false },
];

fn task(name: &str) -> Option<&'static Task> {
    TASKS.iter().find(|t| t.name == name)
}

/// A YAML scalar: plain where that is safe in every YAML version, double-quoted otherwise.
fn yaml(s: &str) -> String {
    let words = ["true", "false", "yes", "no", "on", "off", "null", "y", "n", "~"];
    let plain = s.chars().next().is_some_and(|c| c.is_ascii_alphabetic())
        && s.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c))
        && !words.contains(&s.to_ascii_lowercase().as_str());
    // Colons inside are safe in tags like `base_model:adapter:org/name`, a space after one is not.
    let tag = s.starts_with("base_model:adapter:")
        && s.chars().all(|c| c.is_ascii_alphanumeric() || "/._-:".contains(c))
        && !s.ends_with(':');
    if plain || tag { s.to_owned() } else { literal(s) }
}

/// A string literal that YAML and Python read alike: all but printable ASCII, letters and digits is escaped.
fn literal(s: &str) -> String {
    let mut out = String::from("\"");
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            ' '..='~' => out.push(c),
            c if c.is_alphanumeric() => out.push(c),
            c => out.push_str(&format!("\\U{:08x}", c as u32)),
        }
    }
    out.push('"');
    out
}

/// Text for one Markdown line or table cell.
fn line(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        match c {
            '|' | '\\' | '`' | '*' | '[' | ']' | '<' | '>' | '#' => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// Text inside single backticks.
fn code(s: &str) -> String {
    s.chars().filter(|c| !c.is_control() && *c != '`').collect()
}

fn base(model: &str) -> String {
    let mut parts = model.split('/');
    let hub = |p: Option<&str>| {
        p.is_some_and(|p| {
            p.starts_with(|c: char| c.is_ascii_alphanumeric())
                && p.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        })
    };
    let is_hub = hub(parts.next()) && hub(parts.next()) && parts.next().is_none() && !model.ends_with(".gguf");
    match model {
        "" => "its base model".to_owned(),
        m if is_hub => format!("[{m}](https://huggingface.co/{m})"),
        m => format!("`{}`", code(m)),
    }
}

/// A fenced block whose fence is longer than any run of backticks inside.
fn fenced(language: &str, text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    let text: String = text.trim_end().chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    format!("{fence}{language}\n{text}\n{fence}\n\n")
}

fn shell_quote(s: &str) -> String {
    if !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric() || "/._-@".contains(c)) {
        return s.to_owned();
    }
    format!("'{}'", s.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn facts(base_model: &str) -> RunFacts {
        RunFacts {
            base_model: base_model.into(),
            method: "lora".into(),
            task_type: Some("CAUSAL_LM".into()),
            steps: 10,
            ..Default::default()
        }
    }

    #[test]
    fn front_matter_is_peft_s() {
        let facts = facts("HuggingFaceTB/SmolLM2-135M");
        let card = ModelCard { title: "movies", facts: &facts, recipe: "[model]\n", samples: &[], loads_in_peft: true };
        let text = card.to_markdown();
        let want = "---\nbase_model: HuggingFaceTB/SmolLM2-135M\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n\
                    - base_model:adapter:HuggingFaceTB/SmolLM2-135M\n- lora\n- transformers\n---\n\n# movies\n";
        assert!(text.starts_with(want), "{text}");
        assert!(text.contains("PeftModel.from_pretrained(model, \".\")"));
        assert!(text.contains("peft-cli generate --model HuggingFaceTB/SmolLM2-135M --adapter ."));
        assert!(text.contains("[HuggingFaceTB/SmolLM2-135M](https://huggingface.co/HuggingFaceTB/SmolLM2-135M)"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("README.md");
        card.write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        if let Ok(out) = std::env::var("PEFT_CARD_OUT") {
            card.write(Path::new(&out)).unwrap();
        }
    }

    #[test]
    fn hostile_names_stay_in_their_place() {
        let evil = "a: \"b\"\n---\n# c | d `e` ```` 'f' $(g) \u{2028}\u{85}";
        let facts = RunFacts { method: evil.into(), ..facts(evil) };
        let sample = Sample { prompt: "````\n# heading".into(), before: "`".into(), after: String::new() };
        let card = ModelCard { title: evil, facts: &facts, recipe: evil, samples: &[sample], loads_in_peft: true };
        let text = card.to_markdown();
        assert!(
            text.contains("base_model: \"a: \\\"b\\\"\\n---\\n# c | d `e` ```` 'f' $(g) \\U00002028\\U00000085\"\n"),
            "{text}"
        );
        assert!(text.contains("`````text\n````\n# heading\n`````\n"));
        assert!(text.contains("'\\''f'\\''"));
        if let Ok(out) = std::env::var("PEFT_CARD_OUT") {
            card.write(Path::new(&format!("{out}.evil.md"))).unwrap();
        }
    }

    #[test]
    fn scalars() {
        assert_eq!(yaml("no"), "\"no\"");
        assert_eq!(yaml("/tmp/my model"), "\"/tmp/my model\"");
        assert_eq!(yaml("é"), "\"é\"");
        assert_eq!(yaml(""), "\"\"");
        assert_eq!(base("./models/x"), "`./models/x`");
        assert_eq!(base("models/x.gguf"), "`models/x.gguf`");
        assert_eq!(shell_quote(""), "''");
    }
}
