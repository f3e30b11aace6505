//! A LoRA as llama.cpp loads it with `--lora`.
//!
//! Two matrices for each adapted one, called like it with `.lora_a` (`[r, in]`) and `.lora_b` (`[out, r]`) behind; llama.cpp adds
//! `adapter.lora.alpha / r · B·A`, with `r` that of the matrix. Rows of B follow those of the model's weight, which llama.cpp
//! has in another order for queries and keys of some families. Conventions: `convert_lora_to_gguf.py` and
//! `src/llama-adapter.cpp` in ggml-org/llama.cpp.

use std::path::Path;

use candle_core::{DType, quantized::GgmlDType};
use peft_core::combine::LoraFactors;

use super::write::{Planned, header, permuted_head, write_planned};
use super::{GgufError, GgufTensorSpec, Value, gguf_name};
use crate::config::DecoderConfig;

/// Writes factors, `W ← W + B·A`, for a model with this config, in `f32`, and gives the number of tensors. The file appears
/// whole or not at all.
///
/// # Errors
/// A family or a module without a name in GGUF, a head that is tied to the embedding, values that are not finite, a disk that
/// cannot be written.
pub fn write_gguf_adapter(
    path: impl AsRef<Path>,
    config: &DecoderConfig,
    factors: &[LoraFactors],
) -> Result<usize, GgufError> {
    let path = path.as_ref();
    let inexpressible = |reason: String| GgufError::Inexpressible { path: path.into(), reason };
    let family = config.family.gguf_architecture().ok_or_else(|| {
        inexpressible(format!("there is no GGUF name here for the layers of a {} model", config.model_type()))
    })?;
    let ranks = || factors.iter().filter_map(|f| f.a.dims().first().copied());
    let alpha = ranks().max().unwrap_or(1);

    let (mut specs, mut tensors, mut names) = (Vec::new(), Vec::new(), Vec::new());
    for LoraFactors { path: site, a, b } in factors {
        let hf = format!("{site}.weight");
        if site == "lm_head" && config.tie_word_embeddings {
            return Err(inexpressible(
                "the output head is tied to the embedding, which llama.cpp would change too".into(),
            ));
        }
        let name = gguf_name(&hf).ok_or_else(|| inexpressible(format!("GGUF has no name for `{site}`")))?;
        let candle = |source| GgufError::Candle { path: path.into(), name: hf.clone(), source: Box::new(source) };
        let (rank, out) = (a.dim(0).map_err(candle)?, b.dim(0).map_err(candle)?);
        let head_rows = permuted_head(config, &hf, out).map_err(inexpressible)?;
        // alpha / r is 1 for the largest rank only.
        let b = (b.to_dtype(DType::F32).and_then(|b| b * (rank as f64 / alpha as f64))).map_err(candle)?;
        for (part, tensor, head_rows) in [("lora_a", a.clone(), None), ("lora_b", b, head_rows)] {
            specs.push(GgufTensorSpec { name: format!("{site}.{part}"), shape: tensor.dims().to_vec() });
            names.push((format!("{name}.{part}"), head_rows));
            tensors.push(tensor);
        }
    }
    let planned: Vec<Planned<'_>> = specs
        .iter()
        .zip(names)
        .map(|(spec, (name, head_rows))| {
            let bytes = spec.shape.iter().product::<usize>() as u64 * 4;
            Planned { spec, name, block_type: GgmlDType::F32, bytes, head_rows }
        })
        .collect();
    let metadata: Vec<(String, Value)> = [
        ("general.architecture", Value::from(family)),
        ("general.type", Value::from("adapter")),
        ("general.file_type", 0u32.into()),
        ("general.quantization_version", 2u32.into()),
        ("adapter.type", Value::from("lora")),
        ("adapter.lora.alpha", Value::F32(alpha as f32)),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect();
    let head = header(&metadata, &planned, None);
    let mut values = tensors.iter();
    write_planned(path, &head, &planned, |_| {
        values.next().cloned().ok_or_else(|| inexpressible("a tensor of the plan is missing".into()))
    })?;
    Ok(tensors.len())
}
