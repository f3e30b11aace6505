//! Methods that train a part of the model's own parameters: which part, under which names, and how far back that reaches.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod model_support;

use std::path::Path;
use std::sync::Arc;

use peft_core::kernels::testing::close;
use peft_core::{Adapter, AdapterSet, BaseModel, Ctx, Route, Segmented, TokenBatch};
use peft_models::Decoder;
use peft_models::config::DecoderConfig;
use peft_models::source::{Placement, RandomSource};
use serde_json::json;

use self::model_support::encoders::encoder;
use self::model_support::{adapter, moved};

/// GPT-2 has a bias nearly everywhere; Llama has none.
fn decoder(family: &str) -> Decoder {
    let config = match family {
        "gpt2" => json!({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 32, "n_embd": 16,
            "n_layer": 3, "n_head": 2, "n_positions": 24, "activation_function": "gelu_new"}),
        _ => json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 16,
            "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": "silu"}),
    };
    let config = DecoderConfig::from_hf_map(config.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
    let placement = Placement::cpu(None);
    let source = RandomSource { seed: 0, std: 0.2, untied_head: family != "gpt2", placement: placement.clone() };
    Decoder::load(config, &source, &placement).unwrap()
}

fn names(adapter: &Adapter) -> Vec<&str> {
    adapter.parameters().into_iter().map(|p| p.name()).collect()
}

fn logits(model: &Decoder, adapter: &Arc<Adapter>) -> candle_core::Tensor {
    let set = AdapterSet::one("a", adapter.clone());
    let (ids, positions) = ([3u32, 9, 1, 30, 7], [0u32, 1, 2, 3, 4]);
    let tokens = TokenBatch { ids: &ids, positions: &positions, bounds: &[0, 5], types: &[] };
    let ctx = Ctx::eval(&set, &Route::Uniform(0));
    let input = model.prepare(tokens, &ctx).unwrap();
    let embedded = model.embed(tokens, &ctx).unwrap();
    let hidden = (0..3).fold(embedded, |h, i| model.block(i, &h, &input, &ctx).unwrap());
    model.logits(&model.final_norm(&hidden, &ctx).unwrap(), &ctx).unwrap()
}

/// PEFT's LoRA with `bias = "all"` and B at zero is BitFit with a rank that does nothing: the same names, the same logits.
#[test]
fn biases_are_those_of_a_lora_that_trains_all() {
    let model = decoder("gpt2");
    let bitfit = moved(&model, &json!({"type": "bitfit"}));
    let lora = adapter(&model, &json!({"r": 1, "target_modules": ["c_attn"], "bias": "all"}));
    let mut of_lora: Vec<String> = Vec::new();
    for p in lora.parameters().into_iter().filter(|p| p.name().ends_with(".bias")) {
        // On an adapted layer PEFT's name has the wrapper in it.
        let name = p.name().replace(".base_layer.bias", ".bias");
        let ours = bitfit.parameters().into_iter().find(|q| q.name() == name).unwrap_or_else(|| panic!("{name}"));
        p.set(&ours.value()).unwrap();
        of_lora.push(name);
    }
    assert_eq!(of_lora.len(), bitfit.parameters().len());
    assert_eq!(of_lora.len(), 3 * 6 + 1);
    close("logits", &logits(&model, &bitfit), &logits(&model, &Arc::new(lora)), 1e-6).unwrap();
}

#[test]
fn groups_of_biases_and_added_ones() {
    let bert = encoder("bert", "-");
    // The paper's best subset, and the head.
    let some = adapter(&bert, &json!({"type": "bitfit", "target_modules": ["query", "intermediate.dense"]}));
    let biases = names(&some).into_iter().filter(|n| n.contains("encoder")).count();
    assert_eq!(biases, 2 * 2);
    assert!(names(&some).contains(&"base_model.model.classifier.weight"));
    assert_eq!(some.config["task_type"], json!("SEQ_CLS"));

    let llama = decoder("llama");
    let added = adapter(&llama, &json!({"type": "bitfit", "add_biases": true}));
    assert_eq!(added.parameters().len(), 3 * 7);
    assert!(added.parameters().iter().all(|p| p.name().ends_with("_proj.bias")));
    let named = adapter(&llama, &json!({"type": "bitfit", "add_biases": true, "target_modules": ["lm_head"]}));
    assert_eq!(names(&named), ["base_model.model.lm_head.bias"]);
    assert_eq!(named.lowest_segment(llama.sites()), Some(4));
}

#[test]
fn last_layers_reach_back_to_their_first_block() {
    let model = decoder("llama");
    let of = |k: usize| adapter(&model, &json!({"type": "last_layers", "num_layers": k}));
    for k in 1..=3 {
        assert_eq!(of(k).parameters().len(), 9 * k);
        assert_eq!(of(k).lowest_segment(model.sites()), Some(4 - k));
    }
    let more = adapter(
        &model,
        &json!({"type": "last_layers", "num_layers": 1, "final_norm": true, "output_head": true, "exclude_modules": ["down_proj"]}),
    );
    assert_eq!(more.parameters().len(), 9 + 2 - 1);
    let bert = encoder("bert", "-");
    let classes = adapter(&bert, &json!({"type": "last_layers", "num_layers": 1}));
    assert!(names(&classes).iter().any(|n| n.contains("classifier")));
    let refused = json!({"type": "last_layers", "num_layers": 1, "final_norm": true});
    let e = peft_train::methods::create(refused.as_object().unwrap(), &bert, 1).unwrap_err().to_string();
    assert!(e.contains("final_norm") && e.contains("`bert`"), "{e}");
}
