//! `peft-cli inspect`: what a model or an adapter is.

use std::path::Path;

use anyhow::Result;
use peft_adapters::adapterhub;
use peft_core::BaseModel;
use peft_core::adapter_keys::{KEY_PREFIX, SOFT_PROMPT_KEY_PREFIX};
use peft_lora::foreign::Layout;
use peft_models::ModelFiles;
use peft_models::config::ModelConfig;
use peft_train::adapter_files;
use serde_json::{Value, json};

use crate::args::InspectArgs;
use crate::open;

pub(crate) fn run(args: &InspectArgs) -> Result<()> {
    let path = Path::new(&args.path);
    let is_adapter =
        path.join("adapter_config.json").exists() || adapterhub::is_setup(path) || Layout::of(path)?.is_some();
    let base = args.model.as_deref();
    let facts = if is_adapter {
        adapter(path, base)?
    } else if path.exists() {
        model(&ModelFiles::open(path)?)?
    } else {
        match open::model(&args.path) {
            Ok(files) => model(&files)?,
            Err(of_model) => match open::adapter(&args.path) {
                Ok(folder) => adapter(&folder, base)?,
                Err(_) => return Err(of_model),
            },
        }
    };
    if args.json {
        out!("{facts}");
        return Ok(());
    }
    if let Value::Object(map) = &facts {
        for (key, value) in map {
            match value {
                Value::String(s) => out!("{key:<22} {s}"),
                Value::Array(items) => {
                    out!("{key:<22} {}", items.len());
                    for item in items {
                        out!("  {}", item.as_str().map_or_else(|| item.to_string(), str::to_string));
                    }
                }
                other => out!("{key:<22} {other}"),
            }
        }
    }
    Ok(())
}

fn adapter(path: &Path, base: Option<&str>) -> Result<Value> {
    let base = base.map(|spec| open::base(spec, [path])).transpose()?;
    let folder = adapter_files::open(path, base.as_ref().map(|model| model as &dyn BaseModel))?;
    let config = folder.config();
    let mut parameters = 0usize;
    let mut sites: std::collections::BTreeMap<String, Vec<String>> = std::collections::BTreeMap::new();
    let mut ranks = std::collections::BTreeSet::new();
    let prefix = match folder.contains("prompt_embeddings") {
        true => SOFT_PROMPT_KEY_PREFIX,
        false => KEY_PREFIX,
    };
    for key in folder.keys() {
        let shape = folder.shape(key).unwrap_or_default().to_vec();
        parameters += shape.iter().product::<usize>();
        let (site, part) = split_key(key, prefix);
        if part.ends_with("lora_A.weight") || part == "lora_embedding_A" {
            ranks.extend(shape.first().copied());
        }
        sites.entry(site.to_string()).or_default().push(format!("{part} {shape:?}"));
    }
    let listed: Vec<String> = sites.iter().map(|(site, parts)| format!("{site}: {}", parts.join(", "))).collect();
    let value = |key: &str| config.get(key).cloned().unwrap_or(Value::Null);
    Ok(json!({
        "kind": "adapter", "method": config.peft_type(), "base": value("base_model_name_or_path"),
        "task_type": value("task_type"), "r": value("r"), "lora_alpha": value("lora_alpha"),
        "num_virtual_tokens": value("num_virtual_tokens"), "ranks": ranks, "parameters": parameters, "bytes": folder.bytes(),
        "target_modules": value("target_modules"), "sites": listed
    }))
}

/// `<prefix><site>.<part>`: the site is the module's path, the part what PEFT stores for it.
fn split_key<'k>(key: &'k str, prefix: &str) -> (&'k str, &'k str) {
    let key = key.strip_prefix(prefix).unwrap_or(key);
    for mark in [
        ".adapters.",
        ".fusion.",
        ".expert_",
        ".lora_",
        ".ia3_",
        ".ln_tuning_layers.",
        ".base_layer.",
        ".token_adapter.",
        ".adapter_",
    ] {
        if let Some(at) = key.find(mark) {
            return (&key[..at], &key[at + 1..]);
        }
    }
    key.rsplit_once('.').unwrap_or(("every sequence", key))
}

fn model(files: &ModelFiles) -> Result<Value> {
    let mut parameters = 0usize;
    let names = files.tensor_names();
    for name in &names {
        parameters += files.tensor_shape(name)?.iter().product::<usize>();
    }
    let dtype = match files.gguf() {
        Some(gguf) => {
            let mut types: Vec<String> =
                gguf.tensors().iter().filter_map(|t| t.block_type()).map(|d| format!("{d:?}").to_lowercase()).collect();
            types.sort();
            types.dedup();
            types.join(", ")
        }
        None => files.stored_dtype()?.as_str().to_string(),
    };
    let c = match files.config() {
        ModelConfig::Decoder(c) => c,
        ModelConfig::Encoder(c) => {
            let classes: &[String] = if files.lacks_class_head() { &[] } else { &c.labels };
            return Ok(json!({
                "kind": "model", "model_type": c.family.model_type, "parameters": parameters, "dtype": dtype,
                "layers": c.num_hidden_layers, "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
                "attention_heads": c.num_attention_heads, "head_dim": c.head_dim(), "vocab_size": c.vocab_size,
                "max_length": c.max_length(), "task_type": c.task().peft_name(), "head": c.kind.name(),
                "classes": classes,
                "class_head": if files.lacks_class_head() { "none yet: training makes one" } else { "in the checkpoint" },
                "tensors": names.len()
            }));
        }
        ModelConfig::Seq2Seq(c) => {
            return Ok(json!({
                "kind": "model", "model_type": c.family.model_type, "parameters": parameters, "dtype": dtype,
                "task_type": c.task().peft_name(), "encoder_layers": c.encoder_layers, "decoder_layers": c.decoder_layers,
                "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
                "attention_heads": c.num_attention_heads, "head_dim": c.head_dim, "vocab_size": c.vocab_size,
                "tensors": names.len()
            }));
        }
    };
    let mut described = json!({
        "kind": "model", "model_type": c.model_type(), "parameters": parameters, "dtype": dtype,
        "task_type": c.task().peft_name(), "head": c.labels.as_ref().map(|_| c.kind.name()), "classes": c.labels.as_deref().unwrap_or_default(),
        "layers": c.num_hidden_layers, "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "attention_heads": c.num_attention_heads, "key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim,
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings, "tensors": names.len()
    });
    if let (Some(e), Some(map)) = (&c.experts, described.as_object_mut()) {
        map.insert("experts".into(), e.num_experts.into());
        map.insert("experts_per_token".into(), e.num_experts_per_tok.into());
        map.insert("expert_intermediate_size".into(), e.intermediate_size.into());
    }
    Ok(described)
}
