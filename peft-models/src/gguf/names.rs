//! Tensor names: llama.cpp's and Hugging Face's, and the row order that differs between them.

/// Names outside the blocks.
const OUTER: &[(&str, &str)] = &[
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
    ("output.bias", "lm_head.bias"),
];

/// Module names inside a block: `blk.N.…` and `model.layers.N.…`.
const INNER: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Tensors that hold configuration rather than weights; `DecoderConfig::from_gguf` reads them.
pub(super) const CONFIGURATION_TENSORS: &[&str] =
    &["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];

/// The name in a GGUF file of a Hugging Face tensor, if it has one.
pub fn gguf_name(hf: &str) -> Option<String> {
    if let Some((gguf, _)) = OUTER.iter().find(|(_, name)| *name == hf) {
        return Some((*gguf).to_owned());
    }
    let (layer, rest) = hf.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let (gguf, _) = INNER.iter().find(|(_, name)| *name == module)?;
    is_layer(layer, kind).then(|| format!("blk.{layer}.{gguf}.{kind}"))
}

/// The Hugging Face name of a tensor in a GGUF file, if it has one.
pub fn hf_name(gguf: &str) -> Option<String> {
    if let Some((_, hf)) = OUTER.iter().find(|(name, _)| *name == gguf) {
        return Some((*hf).to_owned());
    }
    let (layer, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let (_, hf) = INNER.iter().find(|(name, _)| *name == module)?;
    is_layer(layer, kind).then(|| format!("model.layers.{layer}.{hf}.{kind}"))
}

fn is_layer(layer: &str, kind: &str) -> bool {
    // A number as we write it: no sign, no leading zero.
    layer.parse::<u32>().is_ok_and(|n| n.to_string() == layer) && matches!(kind, "weight" | "bias")
}

/// A projection whose rows llama.cpp reorders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Projection {
    Query,
    Key,
}

/// Whether a Hugging Face tensor is one that llama.cpp reorders in families with interleaved rotary embeddings.
pub(super) fn permuted_projection(hf: &str) -> Option<Projection> {
    let module = hf.strip_suffix(".weight").or_else(|| hf.strip_suffix(".bias"))?;
    if module.ends_with(".self_attn.q_proj") {
        Some(Projection::Query)
    } else if module.ends_with(".self_attn.k_proj") {
        Some(Projection::Key)
    } else {
        None
    }
}

/// Where row `row` of Hugging Face's order lies in llama.cpp's: Hugging Face has the two halves of a head one after
/// the other (rotate-half), llama.cpp has the pairs that are rotated together side by side.
pub(super) fn interleaved_row(row: usize, head_rows: usize) -> usize {
    let (head, within) = (row / head_rows, row % head_rows);
    let half = head_rows / 2;
    head * head_rows + (within % half) * 2 + within / half
}

/// The inverse of [`interleaved_row`].
pub(super) fn halved_row(row: usize, head_rows: usize) -> usize {
    let (head, within) = (row / head_rows, row % head_rows);
    head * head_rows + (within % 2) * (head_rows / 2) + within / 2
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for (gguf, hf) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
            ("blk.17.attn_k.bias", "model.layers.17.self_attn.k_proj.bias"),
            ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"),
            ("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
        ] {
            assert_eq!(hf_name(gguf).unwrap(), hf);
            assert_eq!(gguf_name(hf).unwrap(), gguf);
        }
        for name in [
            "blk.01.attn_q.weight",
            "blk.-1.attn_q.weight",
            "blk.1.attn_qq.weight",
            "blk.1.attn_q.scale",
            "blk..weight",
            "blk.1",
            "",
        ] {
            assert_eq!(hf_name(name), None, "{name}");
        }
    }

    #[test]
    fn row_orders_are_inverse_permutations() {
        for head_rows in [2, 4, 6, 64] {
            for row in 0..3 * head_rows {
                assert_eq!(halved_row(interleaved_row(row, head_rows), head_rows), row);
            }
        }
        // llama.cpp's permute of one head of 6: reshape(2, 3).swapaxes(0, 1) puts HF rows in the order 0 3 1 4 2 5.
        assert_eq!((0..6).map(|row| halved_row(row, 6)).collect::<Vec<_>>(), [0, 3, 1, 4, 2, 5]);
    }
}
