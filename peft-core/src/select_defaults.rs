//! Which modules PEFT adapts when `target_modules` is left out, by PEFT type and model type.
//!
//! The facts are those of peft 0.21.2 (`utils/constants.py`); `tests/fixtures/select.json` holds PEFT's own
//! tables and the test below compares every entry.

use crate::select_spec::TargetModules;

#[derive(Debug, Clone, Copy)]
enum Entry {
    Names(&'static [&'static str]),
    Regex(&'static str),
}

type Table = &'static [(&'static str, Entry)];

/// LoRA and every method that follows it.
const LORA: Table = &[
    ("t5", Entry::Names(&["q", "v"])),
    ("mt5", Entry::Names(&["q", "v"])),
    ("bart", Entry::Names(&["q_proj", "v_proj"])),
    ("gpt2", Entry::Names(&["c_attn"])),
    ("bloom", Entry::Names(&["query_key_value"])),
    ("blip-2", Entry::Names(&["q", "v", "q_proj", "v_proj"])),
    ("opt", Entry::Names(&["q_proj", "v_proj"])),
    ("gptj", Entry::Names(&["q_proj", "v_proj"])),
    ("gpt_neox", Entry::Names(&["query_key_value"])),
    ("gpt_neo", Entry::Names(&["q_proj", "v_proj"])),
    ("bert", Entry::Names(&["query", "value"])),
    ("roberta", Entry::Names(&["query", "value"])),
    ("xlm-roberta", Entry::Names(&["query", "value"])),
    ("electra", Entry::Names(&["query", "value"])),
    ("deberta-v2", Entry::Names(&["query_proj", "value_proj"])),
    ("deberta", Entry::Names(&["in_proj"])),
    ("layoutlm", Entry::Names(&["query", "value"])),
    ("llama", Entry::Names(&["q_proj", "v_proj"])),
    ("llama4", Entry::Names(&["q_proj", "v_proj"])),
    ("chatglm", Entry::Names(&["query_key_value"])),
    ("gpt_bigcode", Entry::Names(&["c_attn"])),
    ("mpt", Entry::Names(&["Wqkv"])),
    ("RefinedWebModel", Entry::Names(&["query_key_value"])),
    ("RefinedWeb", Entry::Names(&["query_key_value"])),
    ("falcon", Entry::Names(&["query_key_value"])),
    ("btlm", Entry::Names(&["c_proj", "c_attn"])),
    ("codegen", Entry::Names(&["qkv_proj"])),
    ("mistral", Entry::Names(&["q_proj", "v_proj"])),
    ("mixtral", Entry::Names(&["q_proj", "v_proj"])),
    ("stablelm", Entry::Names(&["q_proj", "v_proj"])),
    ("phi", Entry::Names(&["q_proj", "v_proj", "fc1", "fc2"])),
    ("gemma", Entry::Names(&["q_proj", "v_proj"])),
    ("gemma2", Entry::Names(&["q_proj", "v_proj"])),
    ("gemma3_text", Entry::Names(&["q_proj", "v_proj"])),
    ("gemma4", Entry::Regex(r".*language_model\..*\.(q_proj|v_proj)")),
    ("qwen2", Entry::Names(&["q_proj", "v_proj"])),
    ("qwen3", Entry::Names(&["q_proj", "v_proj"])),
    ("nemotron_h", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj"])),
    ("rwkv", Entry::Names(&["key", "value", "receptance", "output"])),
    ("rwkv7", Entry::Names(&["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"])),
];

/// Own table of `LN_TUNING`.
const LN_TUNING: Table = &[
    ("llama", Entry::Names(&["input_layernorm", "post_attention_layernorm", "norm"])),
    ("bloom", Entry::Names(&["input_layernorm", "post_attention_layernorm", "ln_f"])),
    (
        "llava",
        Entry::Names(&[
            "multi_modal_projector",
            "input_layernorm",
            "post_attention_layernorm",
            "norm",
            "embed_tokens",
            "lm_head",
        ]),
    ),
    ("t5", Entry::Names(&["layer_norm", "final_layer_norm"])),
    ("mt5", Entry::Names(&["layer_norm", "final_layer_norm"])),
    ("bart", Entry::Names(&["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"])),
    ("gpt2", Entry::Names(&["ln_1", "ln_2", "ln_f"])),
    ("blip-2", Entry::Names(&["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"])),
    ("gptj", Entry::Names(&["ln_1", "ln_f"])),
    ("falcon", Entry::Names(&["input_layernorm", "post_attention_layernorm", "ln_f"])),
    ("mistral", Entry::Names(&["input_layernorm", "post_attention_layernorm", "norm"])),
    ("phi", Entry::Names(&["input_layernorm", "final_layernorm"])),
    ("gemma", Entry::Names(&["input_layernorm", "post_attention_layernorm", "norm"])),
    (
        "gemma2",
        Entry::Names(&[
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "norm",
        ]),
    ),
    (
        "gemma3_text",
        Entry::Names(&[
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "norm",
        ]),
    ),
    ("qwen2", Entry::Names(&["post_attention_layernorm"])),
    ("qwen3", Entry::Names(&["post_attention_layernorm"])),
];

/// Own table of `IA3`.
const IA3: Table = &[
    ("t5", Entry::Names(&["k", "v", "wo"])),
    ("mt5", Entry::Names(&["k", "v", "wi_1"])),
    ("gpt2", Entry::Names(&["c_attn", "mlp.c_proj"])),
    ("bloom", Entry::Names(&["query_key_value", "mlp.dense_4h_to_h"])),
    ("roberta", Entry::Names(&["key", "value", "output.dense"])),
    ("opt", Entry::Names(&["q_proj", "k_proj", "fc2"])),
    ("gptj", Entry::Names(&["q_proj", "v_proj", "fc_out"])),
    ("gpt_neox", Entry::Names(&["query_key_value", "dense_4h_to_h"])),
    ("gpt_neo", Entry::Names(&["q_proj", "v_proj", "c_proj"])),
    ("bart", Entry::Names(&["q_proj", "v_proj", "fc2"])),
    ("gpt_bigcode", Entry::Names(&["c_attn", "mlp.c_proj"])),
    ("llama", Entry::Names(&["k_proj", "v_proj", "down_proj"])),
    ("llama4", Entry::Names(&["q_proj", "v_proj", "down_proj"])),
    ("mistral", Entry::Names(&["k_proj", "v_proj", "down_proj"])),
    ("mixtral", Entry::Names(&["k_proj", "v_proj", "w2"])),
    ("bert", Entry::Names(&["key", "value", "output.dense"])),
    ("deberta-v2", Entry::Names(&["key_proj", "value_proj", "output.dense"])),
    ("deberta", Entry::Names(&["in_proj", "output.dense"])),
    ("RefinedWebModel", Entry::Names(&["query_key_value", "dense_4h_to_h"])),
    ("RefinedWeb", Entry::Names(&["query_key_value", "dense_4h_to_h"])),
    ("falcon", Entry::Names(&["query_key_value", "dense_4h_to_h"])),
    ("phi", Entry::Names(&["q_proj", "v_proj", "fc2"])),
    ("gemma", Entry::Names(&["q_proj", "v_proj", "down_proj"])),
    ("gemma2", Entry::Names(&["q_proj", "v_proj", "down_proj"])),
    ("gemma3_text", Entry::Names(&["q_proj", "v_proj", "down_proj"])),
    ("qwen2", Entry::Names(&["q_proj", "v_proj", "down_proj"])),
    ("qwen3", Entry::Names(&["q_proj", "v_proj", "down_proj"])),
];

/// Own table of `IA3_FEEDFORWARD`.
const IA3_FEEDFORWARD: Table = &[
    ("t5", Entry::Names(&["wo"])),
    ("mt5", Entry::Names(&[])),
    ("gpt2", Entry::Names(&["mlp.c_proj"])),
    ("bloom", Entry::Names(&["mlp.dense_4h_to_h"])),
    ("roberta", Entry::Names(&["output.dense"])),
    ("opt", Entry::Names(&["fc2"])),
    ("gptj", Entry::Names(&["fc_out"])),
    ("gpt_neox", Entry::Names(&["dense_4h_to_h"])),
    ("gpt_neo", Entry::Names(&["c_proj"])),
    ("bart", Entry::Names(&["fc2"])),
    ("gpt_bigcode", Entry::Names(&["mlp.c_proj"])),
    ("llama", Entry::Names(&["down_proj"])),
    ("llama4", Entry::Names(&["down_proj"])),
    ("mistral", Entry::Names(&["down_proj"])),
    ("mixtral", Entry::Names(&["w2"])),
    ("bert", Entry::Names(&["output.dense"])),
    ("deberta-v2", Entry::Names(&["output.dense"])),
    ("deberta", Entry::Names(&["output.dense"])),
    ("RefinedWeb", Entry::Names(&["dense_4h_to_h"])),
    ("RefinedWebModel", Entry::Names(&["dense_4h_to_h"])),
    ("falcon", Entry::Names(&["dense_4h_to_h"])),
    ("phi", Entry::Names(&["fc2"])),
    ("gemma", Entry::Names(&["down_proj"])),
    ("gemma2", Entry::Names(&["down_proj"])),
    ("gemma3_text", Entry::Names(&["down_proj"])),
    ("qwen2", Entry::Names(&["down_proj"])),
    ("qwen3", Entry::Names(&["down_proj"])),
];

/// Own table of `BEFT`.
const BEFT: Table = &[
    ("t5", Entry::Names(&["v"])),
    ("mt5", Entry::Names(&["v"])),
    ("roberta", Entry::Names(&["value"])),
    ("opt", Entry::Names(&["v_proj"])),
    ("gptj", Entry::Names(&["v_proj"])),
    ("gpt_neo", Entry::Names(&["v_proj"])),
    ("bart", Entry::Names(&["v_proj"])),
    ("llama", Entry::Names(&["v_proj"])),
    ("llama4", Entry::Names(&["v_proj"])),
    ("mistral", Entry::Names(&["v_proj"])),
    ("mixtral", Entry::Names(&["v_proj"])),
    ("bert", Entry::Names(&["value"])),
    ("deberta-v2", Entry::Names(&["value_proj"])),
    ("phi", Entry::Names(&["v_proj"])),
    ("gemma", Entry::Names(&["v_proj"])),
    ("gemma2", Entry::Names(&["v_proj"])),
    ("gemma3_text", Entry::Names(&["v_proj"])),
    ("qwen2", Entry::Names(&["v_proj"])),
    ("qwen3", Entry::Names(&["v_proj"])),
];

/// Own table of `ADALORA`.
const ADALORA: Table = &[
    ("t5", Entry::Names(&["q", "k", "v", "o", "wi", "wo"])),
    ("mt5", Entry::Names(&["q", "k", "v", "o", "wi_0", "wi_1", "wo"])),
    ("bart", Entry::Names(&["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])),
    ("gpt2", Entry::Names(&["c_attn"])),
    ("bloom", Entry::Names(&["query_key_value"])),
    ("opt", Entry::Names(&["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])),
    ("gptj", Entry::Names(&["q_proj", "v_proj"])),
    ("gpt_neox", Entry::Names(&["query_key_value"])),
    ("gpt_neo", Entry::Names(&["q_proj", "v_proj"])),
    ("llama", Entry::Names(&["q_proj", "v_proj"])),
    ("llama4", Entry::Names(&["q_proj", "v_proj"])),
    ("bert", Entry::Names(&["query", "value"])),
    ("roberta", Entry::Names(&["query", "key", "value", "dense"])),
    ("deberta-v2", Entry::Names(&["query_proj", "key_proj", "value_proj", "dense"])),
    ("gpt_bigcode", Entry::Names(&["c_attn"])),
    ("deberta", Entry::Names(&["in_proj"])),
    ("gemma", Entry::Names(&["q_proj", "v_proj"])),
    ("gemma2", Entry::Names(&["q_proj", "v_proj"])),
    ("gemma3_text", Entry::Names(&["q_proj", "v_proj"])),
    ("gemma4", Entry::Regex(r".*language_model\..*\.(q_proj|v_proj)")),
    ("qwen2", Entry::Names(&["q_proj", "v_proj"])),
    ("qwen3", Entry::Names(&["q_proj", "v_proj"])),
    ("nemotron_h", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj"])),
];

/// Own table of `VBLORA`.
const VBLORA: Table = &[
    ("t5", Entry::Names(&["q", "k", "v", "o", "wi", "wo"])),
    ("mt5", Entry::Names(&["q", "k", "v", "o", "wi_0", "wi_1", "wo"])),
    ("bart", Entry::Names(&["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])),
    ("gpt2", Entry::Names(&["c_attn"])),
    ("bloom", Entry::Names(&["query_key_value"])),
    ("opt", Entry::Names(&["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])),
    ("gptj", Entry::Names(&["q_proj", "v_proj"])),
    ("gpt_neox", Entry::Names(&["query_key_value"])),
    ("gpt_neo", Entry::Names(&["q_proj", "v_proj"])),
    ("llama", Entry::Names(&["q_proj", "v_proj"])),
    ("llama4", Entry::Names(&["q_proj", "v_proj"])),
    ("bert", Entry::Names(&["query", "value"])),
    ("roberta", Entry::Names(&["query", "value"])),
    ("deberta-v2", Entry::Names(&["query_proj", "key_proj", "value_proj", "dense"])),
    ("gpt_bigcode", Entry::Names(&["c_attn"])),
    ("deberta", Entry::Names(&["in_proj"])),
    ("gemma", Entry::Names(&["q_proj", "v_proj"])),
    ("gemma2", Entry::Names(&["q_proj", "v_proj"])),
    ("gemma3_text", Entry::Names(&["q_proj", "v_proj"])),
    ("gemma4", Entry::Regex(r".*language_model\..*\.(q_proj|v_proj)")),
    ("qwen2", Entry::Names(&["q_proj", "v_proj"])),
    ("qwen3", Entry::Names(&["q_proj", "v_proj"])),
    ("nemotron_h", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj"])),
];

/// Own table of `OSF`.
const OSF: Table = &[
    ("llama", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"])),
    ("llama4", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"])),
    ("mistral", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"])),
    ("mixtral", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"])),
    ("gemma", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"])),
    ("gemma2", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"])),
    ("gemma3_text", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"])),
    ("qwen2", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"])),
    ("qwen3", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"])),
    ("phi", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"])),
    ("gpt2", Entry::Names(&["c_attn", "c_proj"])),
    ("bloom", Entry::Names(&["query_key_value", "dense_4h_to_h"])),
    ("opt", Entry::Names(&["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])),
    ("gptj", Entry::Names(&["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"])),
    ("gpt_neox", Entry::Names(&["query_key_value", "dense_4h_to_h"])),
    ("falcon", Entry::Names(&["query_key_value", "dense_4h_to_h"])),
    ("gpt_bigcode", Entry::Names(&["c_attn", "c_proj"])),
];

/// Own table of `WAVEFT`.
const WAVEFT: Table = &[
    ("t5", Entry::Names(&["q", "v"])),
    ("mt5", Entry::Names(&["q", "v"])),
    ("bart", Entry::Names(&["q_proj", "v_proj"])),
    ("gpt2", Entry::Names(&["mlp.c_proj"])),
    ("bloom", Entry::Names(&["query_key_value"])),
    ("blip-2", Entry::Names(&["q", "v", "q_proj", "v_proj"])),
    ("opt", Entry::Names(&["q_proj", "v_proj"])),
    ("gptj", Entry::Names(&["q_proj", "v_proj"])),
    ("gpt_neox", Entry::Names(&["query_key_value"])),
    ("gpt_neo", Entry::Names(&["q_proj", "v_proj"])),
    ("bert", Entry::Names(&["query", "value"])),
    ("roberta", Entry::Names(&["query", "value"])),
    ("xlm-roberta", Entry::Names(&["query", "value"])),
    ("electra", Entry::Names(&["query", "value"])),
    ("deberta-v2", Entry::Names(&["query_proj", "value_proj"])),
    ("deberta", Entry::Names(&["in_proj"])),
    ("layoutlm", Entry::Names(&["query", "value"])),
    ("llama", Entry::Names(&["q_proj", "v_proj"])),
    ("llama4", Entry::Names(&["q_proj", "v_proj"])),
    ("chatglm", Entry::Names(&["query_key_value"])),
    ("gpt_bigcode", Entry::Names(&["mlp.c_proj"])),
    ("mpt", Entry::Names(&["Wqkv"])),
    ("RefinedWebModel", Entry::Names(&["query_key_value"])),
    ("RefinedWeb", Entry::Names(&["query_key_value"])),
    ("falcon", Entry::Names(&["query_key_value"])),
    ("codegen", Entry::Names(&["qkv_proj"])),
    ("mistral", Entry::Names(&["q_proj", "v_proj"])),
    ("mixtral", Entry::Names(&["q_proj", "v_proj"])),
    ("stablelm", Entry::Names(&["q_proj", "v_proj"])),
    ("phi", Entry::Names(&["q_proj", "v_proj", "fc1", "fc2"])),
    ("gemma", Entry::Names(&["q_proj", "v_proj"])),
    ("gemma2", Entry::Names(&["q_proj", "v_proj"])),
    ("gemma3_text", Entry::Names(&["q_proj", "v_proj"])),
    ("gemma4", Entry::Regex(r".*language_model\..*\.(q_proj|v_proj)")),
    ("qwen2", Entry::Names(&["q_proj", "v_proj"])),
    ("qwen3", Entry::Names(&["q_proj", "v_proj"])),
    ("nemotron_h", Entry::Names(&["q_proj", "k_proj", "v_proj", "o_proj"])),
];

/// Methods that follow [`LORA`] except for these model types.
const OVERRIDES: &[(&str, Table)] = &[
    ("ADAMSS", &[("vit", Entry::Names(&["query", "value"]))]),
    ("C3A", &[("gpt2", Entry::Names(&["mlp.c_proj"])), ("gpt_bigcode", Entry::Names(&["mlp.c_proj"]))]),
    ("FOURIERFT", &[("gpt2", Entry::Names(&["mlp.c_proj"])), ("gpt_bigcode", Entry::Names(&["mlp.c_proj"]))]),
    ("FROD", &[("phi", Entry::Names(&["q_proj", "v_proj"])), ("vit", Entry::Names(&["query", "value"]))]),
    ("SHIRA", &[("phi", Entry::Names(&["q_proj", "v_proj"]))]),
    ("PVERA", &[("phi", Entry::Names(&["q_proj", "v_proj"])), ("dinov2", Entry::Names(&["query", "value"]))]),
    ("VERA", &[("phi", Entry::Names(&["q_proj", "v_proj"]))]),
];

/// PEFT types that use [`LORA`], with or without [`OVERRIDES`].
const FOLLOW_LORA: &[&str] = &[
    "ADAMSS",
    "BOFT",
    "C3A",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "FROD",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "LILY",
    "LOHA",
    "LOKR",
    "LORA",
    "MISS",
    "OFT",
    "PEANUT",
    "POLY",
    "PSOFT",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "UNILORA",
    "VERA",
];

fn find(table: Table, model_type: &str) -> Option<Entry> {
    table.iter().find(|(name, _)| *name == model_type).map(|(_, entry)| *entry)
}

/// PEFT's default `target_modules` for a method (`peft_type`, such as `LORA`, `IA3`, `LN_TUNING`) on a model
/// family (`model_type` of config.json), or `None` where PEFT has no default and demands an explicit list.
///
/// The pseudo type `IA3_FEEDFORWARD` gives IA³'s default `feedforward_modules`.
pub fn default_target_modules(peft_type: &str, model_type: &str) -> Option<TargetModules> {
    let entry = match peft_type {
        "LN_TUNING" => find(LN_TUNING, model_type),
        "IA3" => find(IA3, model_type),
        "IA3_FEEDFORWARD" => find(IA3_FEEDFORWARD, model_type),
        "BEFT" => find(BEFT, model_type),
        "ADALORA" => find(ADALORA, model_type),
        "VBLORA" => find(VBLORA, model_type),
        "OSF" => find(OSF, model_type),
        "WAVEFT" => find(WAVEFT, model_type),
        other if FOLLOW_LORA.contains(&other) => OVERRIDES
            .iter()
            .find(|(name, _)| *name == other)
            .and_then(|(_, table)| find(table, model_type))
            .or_else(|| find(LORA, model_type)),
        _ => None,
    }?;
    Some(match entry {
        Entry::Names(names) => TargetModules::Names(names.iter().map(|name| (*name).to_owned()).collect()),
        Entry::Regex(pattern) => TargetModules::Regex(pattern.to_owned()),
    })
}

/// Model types for which a method has a default, in PEFT's order.
pub fn default_model_types(peft_type: &str) -> Vec<&'static str> {
    let names = |table: Table| table.iter().map(|(name, _)| *name).collect::<Vec<_>>();
    match peft_type {
        "LN_TUNING" => names(LN_TUNING),
        "IA3" => names(IA3),
        "IA3_FEEDFORWARD" => names(IA3_FEEDFORWARD),
        "BEFT" => names(BEFT),
        "ADALORA" => names(ADALORA),
        "VBLORA" => names(VBLORA),
        "OSF" => names(OSF),
        "WAVEFT" => names(WAVEFT),
        other if FOLLOW_LORA.contains(&other) => {
            let mut all = names(LORA);
            for (_, table) in OVERRIDES.iter().filter(|(name, _)| *name == other) {
                all.extend(names(table).into_iter().filter(|name| find(LORA, name).is_none()));
            }
            all
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use serde_json::Value;

    #[test]
    fn tables_equal_those_of_peft() {
        let fixture: Value = serde_json::from_str(include_str!("../tests/fixtures/select.json")).unwrap();
        let tables = fixture["tables"].as_object().unwrap();
        assert!(tables.len() > 30);
        for (peft_type, table) in tables {
            let table = table.as_object().unwrap();
            let mut ours = default_model_types(peft_type);
            let mut theirs: Vec<&str> = table.keys().map(String::as_str).collect();
            ours.sort_unstable();
            theirs.sort_unstable();
            assert_eq!(ours, theirs, "{peft_type}");
            for (model_type, expected) in table {
                let expected = match expected {
                    Value::String(pattern) => TargetModules::Regex(pattern.clone()),
                    other => TargetModules::Names(serde_json::from_value(other.clone()).unwrap()),
                };
                assert_eq!(default_target_modules(peft_type, model_type), Some(expected), "{peft_type} {model_type}");
            }
        }
        assert_eq!(default_target_modules("LORA", "no-such-model"), None);
        assert_eq!(default_target_modules("PREFIX_TUNING", "llama"), None);
    }
}
