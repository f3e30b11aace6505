//! torchtune's own names (`torchtune/models/convert_weights.py`): modules of its own, and for models that it reads from Hugging
//! Face's files into Meta's order, the rows of queries and keys as Meta's rotary embedding pairs them.

use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use peft_core::suggest::did_you_mean;
use peft_core::{AdapterFolder, BaseModel, ConfigKeys, Context, Error, Result, SafetensorsFile, read_keys};
use serde_json::Map;

use super::{CONFIG, Layers, near_sites, needs_base, only_weights};

/// Modules of a layer: torchtune's, and transformers' names.
const MODULES: [(&str, &str); 7] = [
    ("attn.q_proj", "self_attn.q_proj"),
    ("attn.k_proj", "self_attn.k_proj"),
    ("attn.v_proj", "self_attn.v_proj"),
    ("attn.output_proj", "self_attn.o_proj"),
    ("mlp.w1", "mlp.gate_proj"),
    ("mlp.w2", "mlp.down_proj"),
    ("mlp.w3", "mlp.up_proj"),
];
/// Factors of a layer.
const PARTS: [&str; 3] = ["lora_a.weight", "lora_b.weight", "magnitude"];

/// `(module, part)` of a name.
fn split(name: &str) -> Option<(&str, &str)> {
    PARTS.iter().find_map(|part| Some((name.strip_suffix(part)?.strip_suffix('.')?, *part)))
}

/// `(number, module)` of a layer's module.
fn in_layer(module: &str) -> Option<(&str, &str)> {
    let (number, module) = module.strip_prefix("layers.")?.split_once('.')?;
    (!number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())).then_some((number, module))
}

/// Whether a tensor is one of torchtune's.
pub(super) fn is_own(name: &str) -> bool {
    split(name).is_some_and(|(module, _)| module == "output" || in_layer(module).is_some())
}

pub(super) fn open(dir: &Path, base: Option<&dyn BaseModel>) -> Result<AdapterFolder> {
    if !dir.join(CONFIG).is_file() {
        return Err(Error::file(dir, format!("holds torchtune's tensors and no {CONFIG}, where r and lora_alpha are")));
    }
    let keys = read_keys(dir)?;
    let in_config = || dir.join(CONFIG).display().to_string();
    let scale = scale(ConfigKeys(&keys)).with_context(in_config)?;
    let Some(base) = base else {
        return Err(needs_base(dir, "is torchtune's, which orders the rows of queries and keys by the model's heads"));
    };
    let heads = Heads::of(base).with_context(|| dir.display().to_string())?;
    let Some(path) = only_weights(dir)? else {
        return Err(Error::file(dir, "does not hold one file of weights"));
    };
    let file = Arc::new(SafetensorsFile::open(&path)?);
    let mut layers = Layers::new(&file);
    for name in file.names() {
        let Some((module, part)) = split(name) else {
            return Err(layers.stranger(name, "is no factor of torchtune's", &did_you_mean(name, PARTS)));
        };
        let (path, rows) = match in_layer(module) {
            None if module == "output" => ("lm_head".to_owned(), None),
            None => return Err(layers.stranger(name, "is no module of torchtune's decoder", "")),
            Some((number, module)) => {
                let Some((_, theirs)) = MODULES.iter().find(|(own, _)| *own == module) else {
                    let near = did_you_mean(module, MODULES.iter().map(|(own, _)| *own));
                    return Err(layers.stranger(name, "is no module of a layer of torchtune's decoder", &near));
                };
                let rows = match module {
                    "attn.q_proj" => Some(heads.queries),
                    "attn.k_proj" => Some(heads.keys),
                    _ => None,
                };
                (format!("model.layers.{number}.{theirs}"), rows.filter(|_| heads.permuted))
            }
        };
        if base.sites().find(&path).is_none() {
            return Err(layers.stranger(
                name,
                &format!("is `{path}`, which the base model does not have"),
                &near_sites(Some(base), &path),
            ));
        }
        let tensor = layers.tensor(name, if part == "magnitude" { 1 } else { 2 })?;
        let tensor = match rows.filter(|_| part != "lora_a.weight") {
            Some(n) => heads.restore(&tensor, n).with_context(|| name.to_owned())?,
            None => tensor,
        };
        let factors = layers.of(&path);
        match part {
            "lora_a.weight" => factors.a = Some(tensor),
            "lora_b.weight" => factors.b = Some(tensor),
            _ => factors.magnitude = Some(tensor),
        }
    }
    layers.folder(dir, file.clone(), |rank| scale * rank as f64, Map::new())
}

/// What multiplies `B·A`.
fn scale(keys: ConfigKeys<'_>) -> Result<f64> {
    let missing = |key: &str| Error::config(key, "is not given, and the scale is made of it");
    let r = keys.count("r", 1 << 16)?.ok_or_else(|| missing("r"))?;
    if keys.get("lora_alpha").is_none() {
        return Err(missing("lora_alpha"));
    }
    Ok(keys.number("lora_alpha", 0.0)? / r as f64)
}

/// The heads of attention, by which rows are ordered.
struct Heads {
    queries: usize,
    keys: usize,
    head_dim: usize,
    /// Whether torchtune has the model in Meta's order.
    permuted: bool,
}

impl Heads {
    fn of(base: &dyn BaseModel) -> Result<Self> {
        let permuted = match base.model_type() {
            "llama" | "mistral" | "gemma" | "gemma2" => true,
            "qwen2" | "qwen3" => false,
            other => {
                let message = format!(
                    "a torchtune adapter for `{other}` is not read: its names are those of llama, mistral, gemma and qwen; save it in \
                     PEFT's format with torchtune's Hugging Face checkpointer"
                );
                return Err(Error::config("model_type", message));
            }
        };
        let dims = base.prompt_dims().ok_or_else(|| Error::config("model_type", "has no heads of attention"))?;
        Ok(Self { queries: dims.attention_heads, keys: dims.key_value_heads, head_dim: dims.head_dim, permuted })
    }

    /// Rows in transformers' order: of each head, those of the first halves of the pairs, then of the second.
    fn restore(&self, rows: &Tensor, heads: usize) -> Result<Tensor> {
        let (n, rest) = (rows.dim(0)?, rows.dims().get(1..).unwrap_or_default().iter().product::<usize>());
        if n != heads * self.head_dim || !self.head_dim.is_multiple_of(2) {
            return Err(Error::msg(format!("has {n} rows, and the base {heads} heads of {}", self.head_dim)));
        }
        let paired = rows.reshape((heads, self.head_dim / 2, 2, rest))?.transpose(1, 2)?.contiguous()?;
        Ok(paired.reshape(rows.shape())?)
    }
}
