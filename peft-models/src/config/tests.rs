#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use serde_json::json;

use super::*;
use crate::{gguf::Gguf, rope::RopeScaling};

fn base() -> Map<String, Value> {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "something_else": {"kept": true}
    })
    .as_object()
    .unwrap()
    .clone()
}

fn with(changes: Value) -> Result<DecoderConfig, ConfigError> {
    let mut map = base();
    for (key, value) in changes.as_object().unwrap() {
        map.insert(key.clone(), value.clone());
    }
    DecoderConfig::from_hf_map(map, Path::new("dir/config.json"))
}

#[test]
fn both_generations_of_spellings_say_the_same() {
    let v4 = with(json!({
        "rope_theta": 500000.0, "torch_dtype": "bfloat16", "eos_token_id": [2, 7], "pad_token_id": -1,
        "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    }))
    .unwrap();
    let v5 = with(json!({
        "dtype": "bfloat16", "eos_token_id": [2, 7], "pad_token_id": null,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128}
    }))
    .unwrap();
    assert_eq!(v4.rope(), v5.rope());
    assert_eq!((v4.dtype, v5.dtype), (Some(DType::BF16), Some(DType::BF16)));
    assert_eq!((v4.pad_token_id, v5.pad_token_id), (None, None));
    assert_eq!(v4.eos_token_ids, [2, 7]);
    assert_eq!(v4.head_dim, 16);
    assert_eq!((v4.query_size(), v4.key_value_size(), v4.rope().unwrap().rotary_dim(v4.head_dim)), (64, 32, 16));
}

#[test]
fn absent_keys_have_the_family_defaults() {
    let mut map = base();
    for key in
        ["num_key_value_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id"]
    {
        map.remove(key);
    }
    let config = DecoderConfig::from_hf_map(map, Path::new("config.json")).unwrap();
    assert_eq!((config.num_key_value_heads, config.max_position_embeddings), (4, 2048));
    assert_eq!((config.hidden_act, config.norm_eps, config.rope().unwrap().theta), (Activation::Silu, 1e-6, 10_000.0));
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), [2].as_slice()));
    assert_eq!(config.rope().unwrap().scaling, RopeScaling::Default);
    assert!(!config.tie_word_embeddings);
    assert_eq!((config.layer_kinds.len(), config.layer_kinds[0].window), (1, None));
    // An explicit null is "none", not the default.
    assert_eq!(with(json!({"eos_token_id": null})).unwrap().eos_token_ids, [0u32; 0]);
}

#[test]
fn what_cannot_be_honoured_is_an_error_with_its_key() {
    for (changes, wanted) in [
        (json!({"model_type": "llamma"}), vec!["model_type", "llamma", "known: llama", "did you mean `llama`"]),
        (json!({"model_type": "xlstm"}), vec!["model_type", "known: llama"]),
        (json!({"model_type": null}), vec!["`model_type` is missing"]),
        (json!({"hidden_size": null}), vec!["`hidden_size` is missing"]),
        (json!({"hidden_size": "64"}), vec!["hidden_size", "whole number"]),
        (json!({"hidden_size": 64.5}), vec!["hidden_size"]),
        (json!({"hidden_size": -64}), vec!["hidden_size"]),
        (json!({"hidden_size": 66}), vec!["hidden_size", "multiple", "4"]),
        (json!({"hidden_size": 1u64 << 62}), vec!["hidden_size", "outside"]),
        (json!({"vocab_size": 0}), vec!["vocab_size"]),
        (json!({"vocab_size": u64::MAX}), vec!["vocab_size"]),
        (json!({"num_hidden_layers": 1_000_000}), vec!["num_hidden_layers"]),
        (json!({"num_attention_heads": 0}), vec!["num_attention_heads"]),
        (json!({"num_key_value_heads": 3}), vec!["num_key_value_heads", "does not divide"]),
        (json!({"num_key_value_heads": 0}), vec!["num_key_value_heads"]),
        (json!({"head_dim": 7}), vec!["head_dim", "even"]),
        (json!({"hidden_act": "swiglu"}), vec!["hidden_act", "swiglu", "silu"]),
        (json!({"hidden_act": 3}), vec!["hidden_act", "string"]),
        (json!({"rms_norm_eps": -1.0}), vec!["rms_norm_eps"]),
        (json!({"rope_theta": 0}), vec!["rope_theta"]),
        (json!({"rope_theta": "big"}), vec!["rope_theta"]),
        (json!({"rope_scaling": {"type": "lineer", "factor": 2}}), vec!["rope_scaling.type", "did you mean `linear`"]),
        (json!({"rope_scaling": {"type": "linear"}}), vec!["`rope_scaling.factor` is missing"]),
        (json!({"rope_scaling": {"type": "linear", "factor": 0}}), vec!["factor", "positive"]),
        (json!({"rope_scaling": [1]}), vec!["rope_scaling", "object"]),
        (json!({"rope_parameters": {"rope_type": "mrope"}}), vec!["rope_parameters.rope_type", "mrope"]),
        (
            json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [1, 1], "long_factor": [1, 1], "factor": 2}}),
            vec!["short_factor", "8"],
        ),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}),
            vec!["high_freq_factor"],
        ),
        (json!({"partial_rotary_factor": 0.5}), vec!["partial_rotary_factor"]),
        (json!({"torch_dtype": "int8"}), vec!["torch_dtype", "int8"]),
        (json!({"eos_token_id": "</s>"}), vec!["eos_token_id"]),
        (json!({"eos_token_id": -5}), vec!["eos_token_id"]),
        (json!({"attention_bias": "yes"}), vec!["attention_bias"]),
        (json!({"quantization_config": {"quant_method": "gptq"}}), vec!["quantization_config", "gptq"]),
    ] {
        let error = with(changes.clone()).unwrap_err().to_string();
        assert!(error.starts_with("dir/config.json: "), "{error}");
        for wanted in wanted {
            assert!(error.contains(wanted), "{changes}: {error} does not say {wanted}");
        }
    }
}

fn merged(mut one: Value, other: Value) -> Value {
    one.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
    one
}

#[test]
fn models_of_one_type_that_are_made_in_several_ways() {
    let falcon = |changes: Value| {
        let own = json!({"model_type": "falcon", "ffn_hidden_size": null, "activation": "gelu", "num_kv_heads": 2});
        with(merged(own, changes))
    };
    let made = |changes: Value| {
        let config = falcon(changes).unwrap();
        let layout = config.family.layout;
        (config.num_key_value_heads, layout.attention_norms.before, layout.mlp_norms.before, config.parallel_residual)
    };
    // `num_kv_heads` is for the newer architecture.
    assert_eq!(made(json!({})), (1, Some("input_layernorm"), None, true));
    let newer = json!({"new_decoder_architecture": true});
    assert_eq!(made(newer.clone()), (2, Some("ln_attn"), Some("ln_mlp"), true));
    let one_norm = merged(newer, json!({"num_ln_in_parallel_attn": 1}));
    assert_eq!(made(one_norm), (2, Some("input_layernorm"), None, true));
    assert_eq!(falcon(json!({})).unwrap().intermediate_size, 4 * 64);
    for key in ["alibi", "multi_query", "parallel_attn"] {
        let other = key == "alibi";
        let error = falcon(json!({key: other})).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("not supported for falcon"), "{error}");
    }
}

#[test]
fn what_opt_models_may_not_be() {
    let opt = |changes: Value| {
        with(merged(json!({"model_type": "opt", "ffn_dim": 32, "activation_function": "relu"}), changes))
    };
    assert_eq!(opt(json!({"word_embed_proj_dim": 64})).unwrap().learned_positions(), Some(256));
    for (changes, wanted) in [
        (json!({"word_embed_proj_dim": 32}), ["word_embed_proj_dim", "only 64, the hidden size"]),
        (json!({"do_layer_norm_before": false}), ["do_layer_norm_before", "not supported for opt"]),
    ] {
        let error = opt(changes).unwrap_err().to_string();
        assert!(wanted.iter().all(|w| error.contains(w)), "{error}");
    }
}

#[test]
fn mixtures_of_experts() {
    let of = |model_type: &str, changes: Value| with(merged(json!({"model_type": model_type}), changes));
    let mixtral = of("mixtral", json!({})).unwrap().experts.unwrap();
    assert_eq!((mixtral.num_experts, mixtral.num_experts_per_tok, mixtral.intermediate_size), (8, 2, 96));
    assert!(mixtral.norm_topk_prob && mixtral.is_sparse(0) && mixtral.is_sparse(1) && !mixtral.is_sparse(2));
    // transformers writes the one name, and older files have the other.
    for key in ["num_experts", "num_local_experts"] {
        let config = of("qwen3_moe", json!({key: 5, "num_experts_per_tok": 3, "mlp_only_layers": [0]})).unwrap();
        let experts = config.experts.clone().unwrap();
        assert_eq!((experts.num_experts, experts.num_experts_per_tok, experts.intermediate_size), (5, 3, 768));
        assert!(!experts.norm_topk_prob && !experts.is_sparse(0) && experts.is_sparse(1));
        assert_eq!(config.mlp_width(), 3 * 768);
    }
    let stepped = of("qwen2_moe", json!({"decoder_sparse_step": 2, "norm_topk_prob": true})).unwrap().experts.unwrap();
    assert_eq!((stepped.is_sparse(0), stepped.is_sparse(1), stepped.norm_topk_prob), (false, true, true));
    assert_eq!((stepped.shared_intermediate_size, stepped.num_experts), (Some(5632), 60));
    assert_eq!(of("qwen3_moe", json!({"num_experts": 0})).unwrap().experts, None);
    assert_eq!(of("qwen3_moe", json!({"decoder_sparse_step": 9})).unwrap().experts, None);
    assert_eq!(of("qwen3_moe", json!({"use_sliding_window": true})).unwrap().layer_kinds[0].window, Some(4096));
    for (model_type, changes, wanted) in [
        (
            "mixtral",
            json!({"num_local_experts": 2, "num_experts_per_tok": 3}),
            ["num_experts_per_tok", "3 of 2 experts"],
        ),
        ("mixtral", json!({"num_experts_per_tok": 0}), ["num_experts_per_tok", "0 of 8"]),
        ("mixtral", json!({"num_local_experts": 0}), ["num_local_experts", "outside 1.."]),
        ("mixtral", json!({"num_local_experts": 1 << 20}), ["num_local_experts", "outside 1.."]),
        ("mixtral", json!({"output_router_logits": true}), ["output_router_logits", "router_aux_loss_coef"]),
        ("mixtral", json!({"router_jitter_noise": 0.1}), ["router_jitter_noise", "0.0"]),
        ("qwen3_moe", json!({"moe_intermediate_size": 0}), ["moe_intermediate_size", "outside"]),
        ("qwen3_moe", json!({"decoder_sparse_step": 0}), ["decoder_sparse_step", "period"]),
        ("qwen3_moe", json!({"mlp_only_layers": [2]}), ["mlp_only_layers", "none of the 2 layers"]),
        ("qwen3_moe", json!({"mlp_only_layers": 1}), ["mlp_only_layers", "list of layers"]),
        ("qwen2_moe", json!({"use_sliding_window": true}), ["use_sliding_window", "not supported for qwen2_moe"]),
        ("olmoe", json!({"clip_qkv": 8.0}), ["clip_qkv", "clipped"]),
    ] {
        let error = of(model_type, changes).unwrap_err().to_string();
        assert!(wanted.iter().all(|w| error.contains(w)), "{error}");
    }
}

#[test]
fn files_that_are_no_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let error = DecoderConfig::from_hf_json(folder.path()).unwrap_err();
    assert!(matches!(&error, ConfigError::Io { .. }) && error.to_string().contains("config.json"), "{error}");
    for text in ["", "{", "[]", "null", "{\"a\": 1} x", &"[".repeat(100_000)] {
        std::fs::write(folder.path().join("config.json"), text).unwrap();
        assert!(matches!(DecoderConfig::from_hf_json(folder.path()).unwrap_err(), ConfigError::Json { .. }));
    }
    std::fs::write(folder.path().join("config.json"), serde_json::to_vec(&base()).unwrap()).unwrap();
    assert_eq!(DecoderConfig::from_hf_json(folder.path()).unwrap().vocab_size, 100);
}

#[test]
fn a_configuration_is_written_back_with_everything_it_had() {
    let mut config = with(json!({"torch_dtype": "float32"})).unwrap();
    assert_eq!(config.to_hf_json(), config.raw.clone());
    config.vocab_size = 101;
    config.dtype = Some(DType::F16);
    let written = config.to_hf_json();
    assert_eq!(written["something_else"], json!({"kept": true}));
    assert_eq!((&written["vocab_size"], &written["torch_dtype"]), (&json!(101), &json!("float16")));
    assert!(!written.contains_key("tie_word_embeddings"));
}

#[test]
fn a_gguf_configuration_survives_config_json() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny.gguf");
    let gguf = Gguf::open(path).unwrap();
    let config = DecoderConfig::from_gguf(&gguf).unwrap();
    let expected: Value = serde_json::from_str(include_str!("../../fixtures/tiny.json")).unwrap();
    let written = config.to_hf_json();
    for (key, value) in expected["config"].as_object().unwrap() {
        match (written[key].as_f64(), value.as_f64()) {
            // 1e-5 is 9.999999747378752e-06 to transformers, which reads the f32 as it is.
            (Some(ours), Some(theirs)) => assert_eq!(ours as f32, theirs as f32, "{key}"),
            _ => assert_eq!(&written[key], value, "{key}"),
        }
    }
    let mut back = DecoderConfig::from_hf_map(written, Path::new("config.json")).unwrap();
    back.raw.clear();
    assert_eq!(format!("{back:?}"), format!("{config:?}"));
}
