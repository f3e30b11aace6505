//! A LoRA in the files of mlx-lm (`mlx_lm/tuner/lora.py`, `utils.py`): `adapters.safetensors` with `lora_a: [in, r]` and
//! `lora_b: [r, out]`, and an `adapter_config.json` of its own. Its `scale` multiplies `B·A` as it is, without a rank.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::Tensor;
use peft_core::combine::Combined;
use peft_core::{Error, Result, atomic, to_python_json, write_safetensors};
use serde_json::{Map, Value, json};

/// Writes a LoRA of scale 1 as a folder that mlx-lm loads, there whole or not at all, and gives the number of tensors.
///
/// # Errors
/// What is no factor of a linear layer in one of the model's numbered layers, or a disk that refuses.
pub fn write(out: &Path, lora: &Combined) -> Result<usize> {
    let (mut tensors, mut keys) = (Vec::<(String, Tensor)>::new(), BTreeSet::new());
    let factors = lora.plain_factors("mlx-lm")?;
    for f in &factors {
        // mlx-lm wraps modules by their name inside a layer, in all layers.
        let key = inside_layer(&f.path).ok_or_else(|| {
            Error::site(&f.path, "is in none of the model's layers, where mlx-lm has its adapters; merge the adapter")
        })?;
        keys.insert(key);
        tensors.push((format!("{}.lora_a", f.path), f.a.t()?.contiguous()?));
        tensors.push((format!("{}.lora_b", f.path), f.b.t()?.contiguous()?));
    }
    let rank = factors.iter().filter_map(|f| f.a.dims().first().copied()).max().unwrap_or(1);
    // A layer that the file has nothing for starts with B = 0 there, which changes nothing.
    let config = json!({
        "fine_tune_type": "lora", "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
    });
    let config: Map<String, Value> = config.as_object().cloned().unwrap_or_default();
    let text = to_python_json(&config, &[]).map_err(|e| Error::msg(e.to_string()))?;
    atomic::replace_dir(out, |dir| -> Result<()> {
        write_safetensors(
            dir.join("adapters.safetensors"),
            tensors.iter().map(|(k, t)| (k.as_str(), t)),
            &BTreeMap::new(),
        )?;
        atomic::write_file(dir.join("adapter_config.json"), text.as_bytes())
    })?;
    Ok(tensors.len())
}

/// `self_attn.q_proj` of `model.layers.3.self_attn.q_proj`.
fn inside_layer(path: &str) -> Option<&str> {
    let (number, rest) = path.strip_prefix("model.layers.")?.split_once('.')?;
    (!number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())).then_some(rest)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::Device;
    use peft_core::combine::CombinedSite;
    use peft_core::kernels::testing::randn;
    use peft_core::{SafetensorsFile, parameter_name};

    fn lora(paths: &[&str], more: Option<&str>) -> Combined {
        let mut tensors = Vec::new();
        for path in paths {
            tensors.push((parameter_name(path, "lora_A.weight"), randn(1, (2, 5), 1.0).unwrap()));
            tensors.push((parameter_name(path, "lora_B.weight"), randn(2, (3, 2), 1.0).unwrap()));
        }
        tensors.extend(more.map(|key| (key.to_owned(), randn(3, 3, 1.0).unwrap())));
        let site = |path: &&str| CombinedSite { path: (*path).to_owned(), rank: 2, norm: 1.0, error: 0.0 };
        Combined { config: Map::new(), tensors, sites: paths.iter().map(site).collect(), notes: Vec::new() }
    }

    #[test]
    fn factors_are_transposed_under_their_own_names() {
        let dir = tempfile::tempdir().unwrap();
        let (out, path) = (dir.path().join("out"), "model.layers.12.self_attn.q_proj");
        assert_eq!(write(&out, &lora(&[path], None)).unwrap(), 2);
        let file = SafetensorsFile::open(out.join("adapters.safetensors")).unwrap();
        let get = |part: &str| file.tensor(&format!("{path}.{part}"), &Device::Cpu).unwrap();
        let product = get("lora_a").matmul(&get("lora_b")).unwrap();
        let wanted = randn(2, (3, 2), 1.0).unwrap().matmul(&randn(1, (2, 5), 1.0).unwrap()).unwrap().t().unwrap();
        let apart = (product - wanted).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(apart < 1e-6);
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
        assert_eq!(config["lora_parameters"]["keys"], json!(["self_attn.q_proj"]));
        assert_eq!((&config["lora_parameters"]["scale"], &config["num_layers"]), (&json!(1.0), &json!(-1)));
    }

    #[test]
    fn what_has_no_place_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        for (lora, says) in [
            (lora(&["lm_head"], None), "lm_head"),
            (lora(&["model.layers.x.q"], None), "model.layers.x.q"),
            (lora(&["model.layers.0.q"], Some("base_model.model.model.norm.weight")), "model.norm.weight"),
        ] {
            let error = write(&out, &lora).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("mlx-lm"), "{error}");
        }
        assert!(!out.exists());
    }
}
