//! mlx-lm (`mlx_lm/tuner/lora.py`, `dora.py`): see [`crate::mlx`], which writes the same.

use std::path::Path;
use std::sync::Arc;

use peft_core::{AdapterFolder, ConfigKeys, Context, Error, Result, SafetensorsFile, read_keys};
use serde_json::{Map, Value};

use super::{CONFIG, Layers};

const WEIGHTS: &str = "adapters.safetensors";

pub(super) fn open(dir: &Path) -> Result<AdapterFolder> {
    let keys = read_keys(dir)?;
    let in_config = || dir.join(CONFIG).display().to_string();
    let scale = scale(&keys).with_context(in_config)?;
    let path = dir.join(WEIGHTS);
    if !path.is_file() {
        return Err(Error::file(dir, format!("has mlx-lm's {CONFIG} and no {WEIGHTS}")));
    }
    let file = Arc::new(SafetensorsFile::open(&path)?);
    let mut layers = Layers::new(&file);
    for name in file.names() {
        let (path, part) = name.rsplit_once('.').unwrap_or(("", name));
        match part {
            "lora_a" => {
                let a = layers.tensor(name, 2)?.t()?;
                layers.of(path).a = Some(a);
            }
            "lora_b" => {
                let b = layers.tensor(name, 2)?.t()?;
                layers.of(path).b = Some(b);
            }
            "m" => {
                let magnitude = layers.tensor(name, 1)?;
                layers.of(path).magnitude = Some(magnitude);
            }
            _ => return Err(layers.stranger(name, "is neither `lora_a`, `lora_b` nor `m` of a layer", "")),
        }
    }
    layers.folder(dir, file.clone(), |r| scale * r as f64, Map::new())
}

/// What multiplies `B·A`.
fn scale(keys: &Map<String, Value>) -> Result<f64> {
    match ConfigKeys(keys).text("fine_tune_type")? {
        None | Some("lora" | "dora") => {}
        Some("full") => {
            let message = "is \"full\": the folder holds whole weights and no adapter; fuse it with mlx_lm.fuse";
            return Err(Error::config("fine_tune_type", message));
        }
        Some(other) => {
            return Err(Error::config("fine_tune_type", format!("\"{other}\" is none of \"lora\", \"dora\"")));
        }
    }
    let Some(Value::Object(parameters)) = keys.get("lora_parameters") else {
        return Err(Error::config("lora_parameters", "is not given, and the scale is in it"));
    };
    let scale = parameters.get("scale").and_then(Value::as_f64).filter(|scale| scale.is_finite());
    scale.ok_or_else(|| {
        let given = parameters.get("scale").map_or("not given".to_owned(), Value::to_string);
        Error::config("lora_parameters.scale", format!("is {given}, and should be what multiplies B·A"))
    })
}
