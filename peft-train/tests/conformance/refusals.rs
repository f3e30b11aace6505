//! Files and recipes that cannot be followed: one error that names what is wrong.

use std::path::Path;

use candle_core::{Device, Tensor};
use peft_train::checkpoint::write_adapter_files;
use peft_train::methods;
use serde_json::{Map, Value, json};

use crate::model::{Kind, base};
use crate::{create, ensure, for_all};

#[test]
fn nan_in_a_file_is_refused_by_name() {
    for_all(|case, model| {
        let adapter = create(&case.method, model, 1)?;
        let dir = tempfile::tempdir()?;
        let last = *adapter.parameters().last().ok_or("no parameter")?;
        last.set(&Tensor::full(f32::NAN, last.value().shape(), &Device::Cpu)?)?;
        let (_, tensors) = adapter.exported()?;
        let (broken, _) =
            tensors.iter().find(|(name, t)| peft_core::check_finite(name, t).is_err()).ok_or("NaN is not written")?;
        let opened =
            write_adapter_files(dir.path(), &adapter).and_then(|()| methods::open(dir.path(), model).map(|_| ()));
        let text = opened.err().ok_or("NaN was accepted")?.to_string();
        ensure(text.contains(broken), text)
    });
}

fn edit_config(dir: &Path, key: &str, value: Value) {
    let path = dir.join("adapter_config.json");
    let mut config: Map<String, Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config.insert(key.into(), value);
    std::fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
}

#[test]
fn differences_between_config_and_file_are_listed() {
    let model = base(Default::default(), Kind::F32);
    let adapter = create(&json!({"r": 2, "target_modules": ["q_proj", "v_proj"]}), &model, 1).unwrap();
    for (key, value, expect) in [
        ("target_modules", json!(["q_proj", "v_proj", "o_proj"]), vec!["4 missing", "self_attn.o_proj.lora_A.weight"]),
        ("target_modules", json!(["q_proj"]), vec!["4 unexpected", "self_attn.v_proj.lora_B.weight"]),
        ("r", json!(3), vec!["8 of another shape", "[2, 32], expected [3, 32]"]),
        ("use_dora", json!(true), vec!["4 missing", "q_proj.lora_magnitude_vector"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_adapter_files(dir.path(), &adapter).unwrap();
        edit_config(dir.path(), key, value);
        let text = methods::open(dir.path(), &model).unwrap_err().to_string();
        for part in expect {
            assert!(text.contains(part), "{key}: {text}\nlacks {part}");
        }
    }
}

#[test]
fn a_prefix_for_another_model_is_refused_by_the_key_that_says_so() {
    let model = base(Default::default(), Kind::F32);
    let adapter = create(&json!({"type": "prefix", "num_virtual_tokens": 4}), &model, 1).unwrap();
    for (key, value, expect) in [
        ("num_virtual_tokens", json!(5), "prompt_embeddings is [4, 64], expected [5, 64]"),
        ("num_virtual_tokens", json!(null), "num_virtual_tokens"),
        ("num_virtual_tokens", json!(4_000_000), "64 positions"),
        ("num_layers", json!(3), "this base model has 2"),
        ("token_dim", json!(32), "this base model has 16"),
        ("num_attention_heads", json!(4), "this base model has 2"),
        ("num_transformer_submodules", json!(2), "this base model has 1"),
        ("modules_to_save", json!(["lm_head"]), "missing: base_model.lm_head.weight"),
        ("init_weights", json!("ones"), "init_weights"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_adapter_files(dir.path(), &adapter).unwrap();
        edit_config(dir.path(), key, value);
        let text = methods::open(dir.path(), &model).unwrap_err().to_string();
        assert!(text.contains(expect), "{key}: {text}\nlacks {expect}");
    }
}

#[test]
fn a_llama_adapter_for_another_model_is_refused() {
    let model = base(Default::default(), Kind::F32);
    let method = json!({"type": "adaption_prompt", "adapter_len": 3, "adapter_layers": 1});
    let adapter = create(&method, &model, 1).unwrap();
    for (key, value, expect) in [
        ("adapter_len", json!(4), "adaption_prompt is [1, 3, 32], expected [1, 4, 32]"),
        ("adapter_len", json!(1 << 24), "64 positions"),
        ("adapter_len", json!(null), "adapter_len"),
        ("adapter_layers", json!(2), "missing: base_model.model.model.layers.0.self_attn.adaption_prompt"),
        ("adapter_layers", json!("1"), "adapter_layers"),
        ("target_modules", json!("attention"), "target_modules"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_adapter_files(dir.path(), &adapter).unwrap();
        edit_config(dir.path(), key, value);
        let text = methods::open(dir.path(), &model).unwrap_err().to_string();
        assert!(text.contains(expect), "{key}: {text}\nlacks {expect}");
    }
}

#[test]
fn a_mixture_that_is_not_whole_is_refused() {
    let model = base(Default::default(), Kind::F32);
    let dir = tempfile::tempdir().unwrap();
    let folders = ["a", "b"].map(|name| dir.path().join(name));
    for folder in &folders {
        let method = json!({"r": 2, "target_modules": ["q_proj"], "init_lora_weights": false});
        write_adapter_files(folder, &create(&method, &model, 1).unwrap()).unwrap();
    }
    let method = json!({"type": "xlora", "adapters": folders, "xlora_depth": 3, "xlora_size": 4});
    let adapter = create(&method, &model, 1).unwrap();
    for (key, value, expect) in [
        ("xlora_size", json!(65_536), "layers.0.weight is [4, 32], expected [65536, 32]"),
        ("xlora_depth", json!(64), "layers.6.weight is [2, 4], expected [4, 4]"),
        ("xlora_dropout_p", json!(0.0), "missing: base_model.internal_xlora_classifier.layers.2.weight"),
        ("layerwise_scalings", json!(true), "[2, 4], expected [4, 4]"),
        ("hidden_size", json!(16), "this model's is 32"),
        ("adapters", json!({"0": "0"}), "[2, 4], expected [1, 4]"),
        ("adapters", json!({"0": "0", "1": "1", "2": "2"}), "no folder `2`"),
        ("adapters", json!({"law": "0", "code": "1"}), "numbers them"),
        ("scaling_pass_value", json!(0.5), "scaling_pass_value"),
        ("modules_to_save", json!(["norm"]), "missing: base_model.model.model.norm.weight"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_adapter_files(dir.path(), &adapter).unwrap();
        edit_config(dir.path(), key, value);
        let text = methods::open(dir.path(), &model).unwrap_err().to_string();
        assert!(text.contains(expect), "{key}: {text}\nlacks {expect}");
    }
    // As PEFT writes it.
    let dir = tempfile::tempdir().unwrap();
    write_adapter_files(dir.path(), &adapter).unwrap();
    let weights = dir.path().join("adapter_model.safetensors");
    let file = peft_core::SafetensorsFile::open(&weights).unwrap();
    let kept: Vec<_> = file.names().filter(|name| !name.contains(".0.")).map(str::to_owned).collect();
    let kept: Vec<_> = kept.into_iter().map(|name| (file.tensor(&name, &Device::Cpu).unwrap(), name)).collect();
    peft_core::write_safetensors(&weights, kept.iter().map(|(t, name)| (name.as_str(), t)), &Default::default())
        .unwrap();
    let text = methods::open(dir.path(), &model).unwrap_err().to_string();
    assert!(text.contains("layers.0.weight") && text.contains("PEFT up to 0.21"), "{text}");
    // An expert of another rank than its config says.
    write_adapter_files(dir.path(), &adapter).unwrap();
    edit_config(&dir.path().join("1"), "r", json!(3));
    let text = methods::open(dir.path(), &model).unwrap_err().to_string();
    assert!(text.contains("q_proj.expert_1.lora_A.weight") && text.contains("expected [3, 32]"), "{text}");
}

#[test]
fn recipes_that_no_method_can_follow_name_the_key() {
    let model = base(Default::default(), Kind::F32);
    for (method, expect) in [
        (json!({"type": "ia3", "feedforward_modules": ["up_proj"]}), "`up_proj` is not among `target_modules`"),
        (
            json!({"type": "ia3", "target_modules": ".*_proj", "feedforward_modules": ".*dwn_proj"}),
            "feedforward_modules",
        ),
        (json!({"type": "ia3", "target_modules": ["embed_tokens"], "feedforward_modules": []}), "IA³ adapts"),
        (json!({"type": "prefix"}), "num_virtual_tokens"),
        (json!({"type": "prefix", "num_virtual_tokens": 0}), "num_virtual_tokens"),
        (json!({"type": "prefix", "num_virtual_tokens": 64}), "64 positions"),
        (json!({"type": "prefix", "num_virtual_tokens": 4, "prefix_projektion": true}), "`prefix_projection`"),
        (json!({"type": "prompt", "num_virtual_tokens": 4, "prompt_tuning_init": "VOCAB"}), "SAMPLE_VOCAB"),
        (json!({"type": "prompt", "num_virtual_tokens": 4, "prompt_tuning_init": "TEXT"}), "prompt_tuning_init_text"),
        (json!({"type": "prompt", "num_virtual_tokens": 4, "prompt_tuning_init_text": "Say"}), "TEXT"),
        (
            json!({"type": "prompt", "num_virtual_tokens": 4, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Say"}),
            "tokenizer_name_or_path",
        ),
        (json!({"type": "p_tuning", "num_virtual_tokens": 4, "encoder_dropout": 0.1}), "encoder_dropout"),
        (json!({"type": "prefix", "num_virtual_tokens": 4, "modules_to_save": ["lm_hed"]}), "lm_head"),
        (json!({"type": "prompt", "num_virtual_tokens": 4, "modules_to_save": ["embed_tokens"]}), "token embedding"),
        (json!({"type": "p_tuning", "num_virtual_tokens": 4, "modules_to_save": ["model"]}), "`model`"),
        (json!({"type": "prompt", "num_virtual_tokens": 4, "task_type": "SEQ_CLS"}), "CAUSAL_LM"),
        (json!({"type": "adaption_prompt", "adapter_layers": 1}), "10 tokens"),
        (json!({"type": "adaption_prompt", "adapter_len": 3}), "adapter_layers"),
        (json!({"type": "adaption_prompt", "adapter_len": 3, "adapter_layers": 0}), "adapter_layers"),
        (json!({"type": "adaption_prompt", "adapter_len": 3, "adapter_layers": 3}), "more than the 2 layers"),
        (json!({"type": "adaption_prompt", "adapter_len": 65, "adapter_layers": 1}), "64 positions"),
        (json!({"type": "adaption_prompt", "adapter_len": 3, "adapter_layer": 1}), "`adapter_layers`"),
        (
            json!({"type": "adaption_prompt", "adapter_len": 3, "adapter_layers": 1, "target_modules": "attn"}),
            "has \"self_attn\" there",
        ),
        (
            json!({"type": "adaption_prompt", "adapter_len": 3, "adapter_layers": 1, "task_type": "SEQ_CLS"}),
            "CAUSAL_LM",
        ),
        (json!({"type": "ln", "target_modules": ["input_layer_norm"]}), "input_layernorm"),
        (json!({"type": "bitfit"}), "add_biases = true"),
        (json!({"type": "bitfit", "target_modules": ["q_prj"]}), "q_proj"),
        (json!({"type": "bitfit", "target_modules": ["input_layernorm"], "add_biases": true}), "name linear layers"),
        (
            json!({"type": "bitfit", "target_modules": ["q_proj", "input_layernorm"], "add_biases": true}),
            "`input_layernorm` of `target_modules` has none",
        ),
        (json!({"type": "bitfit", "add_bias": true}), "`add_biases`"),
        (json!({"type": "last_layers"}), "the model's 2 blocks"),
        (json!({"type": "last_layers", "num_layers": 0}), "num_layers"),
        (json!({"type": "last_layers", "num_layers": 3}), "this model has 2 blocks"),
        (json!({"type": "last_layers", "num_layer": 1}), "`num_layers`"),
        (json!({"type": "trainable_tokens"}), "token_indices"),
        (json!({"type": "trainable_tokens", "token_indices": [1, 48]}), "token id 48"),
        (json!({"type": "trainable_tokens", "token_indices": [1], "target_modules": ["q_proj"]}), "target_modules"),
        (json!({"type": "vera", "projection_prng_key": "0x1"}), "projection_prng_key"),
        (json!({"type": "fourierft", "n_frequency": 1025, "target_modules": ["q_proj"]}), "n_frequency"),
        (json!({"type": "shira", "r": 17, "target_modules": ["q_proj"]}), "`r`"),
        (json!({"type": "shira", "r": 1, "mask_type": "snip", "target_modules": ["q_proj"]}), "mask_type"),
        (json!({"type": "vblora", "vector_length": 7, "target_modules": ["q_proj"]}), "vector_length"),
        (json!({"type": "vblora", "num_vectors": 3, "topk": 4}), "topk"),
        (json!({"type": "adalora", "total_step": 9, "tfinal": 9}), "tinit"),
    ] {
        let text = create(&method, &model, 1).unwrap_err().to_string();
        assert!(text.contains(expect), "{method}: {text}\nlacks {expect}");
    }
}

/// Whole numbers in files are places to write to.
#[test]
fn indices_that_point_nowhere_are_refused_by_name() {
    let model = base(Default::default(), Kind::F32);
    let vblora = json!({"type": "vblora", "vector_length": 8, "num_vectors": 4, "save_only_topk_weights": true,
        "target_modules": ["q_proj"]});
    for (method, bad, expect) in [
        (json!({"type": "shira", "r": 1, "target_modules": ["q_proj"]}), 32f32, "shira_indices holds"),
        (json!({"type": "shira", "r": 1, "target_modules": ["q_proj"]}), -1.0, "shira_indices holds"),
        (vblora, 4.0, "vblora_logits_A_topk_indices holds 4"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_adapter_files(dir.path(), &create(&method, &model, 1).unwrap()).unwrap();
        let opened = methods::open(dir.path(), &model).unwrap().adapter;
        let indices = &opened.fixed()[0];
        indices.set(&Tensor::full(bad, indices.value().shape(), &Device::Cpu).unwrap()).unwrap();
        write_adapter_files(dir.path(), &opened).unwrap();
        let text = methods::open(dir.path(), &model).unwrap_err().to_string();
        assert!(text.contains(expect), "{text}\nlacks {expect}");
    }
}

/// RandLoRA's files hold the random matrices once more for each layer.
#[test]
fn repeated_tensors_that_differ_are_refused() {
    let model = base(Default::default(), Kind::F32);
    let method = json!({"type": "randlora", "r": 8, "target_modules": ["q_proj"]});
    let (config, mut tensors) = create(&method, &model, 1).unwrap().exported().unwrap();
    let (name, last) = tensors.last_mut().unwrap();
    assert!(name.contains("layers.1.self_attn.q_proj.randlora_"), "{name}");
    *last = last.affine(2.0, 0.0).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let config = peft_core::AdapterConfig::new(config).unwrap();
    peft_core::write_adapter(dir.path(), &config, tensors.iter().map(|(n, t)| (n.as_str(), t))).unwrap();
    let text = methods::open(dir.path(), &model).unwrap_err().to_string();
    assert!(text.contains("stand for one tensor"), "{text}");
}
