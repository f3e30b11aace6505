#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use serde_json::{Value, json};

use super::*;
use crate::config::{DecoderConfig, ModelConfig};

fn with(base: Value, changes: Value) -> Result<EncoderConfig, ConfigError> {
    let mut map = base.as_object().unwrap().clone();
    map.extend(changes.as_object().unwrap().clone());
    EncoderConfig::from_hf_map(map, Path::new("dir/config.json"))
}

fn bert() -> Value {
    json!({
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 100, "hidden_size": 12, "intermediate_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 16, "something_else": {"kept": true}
    })
}

#[test]
fn absent_keys_have_the_defaults_of_transformers() {
    let c = with(bert(), json!({})).unwrap();
    assert_eq!((c.hidden_act, c.layer_norm_eps, c.type_vocab_size, c.pad_token_id), (Activation::Gelu, 1e-12, 2, 0));
    assert_eq!((c.max_length(), c.head_dim()), (16, 4));
    assert_eq!(c.labels, ["LABEL_0", "LABEL_1"]);
    let c = with(bert(), json!({"model_type": "roberta"})).unwrap();
    assert_eq!((c.pad_token_id, c.first_position(), c.max_length()), (1, 2, 14));
    let names =
        json!({"model_type": "distilbert", "vocab_size": 9, "dim": 8, "hidden_dim": 6, "n_layers": 1, "n_heads": 2});
    let c = with(names, json!({"num_labels": 3})).unwrap();
    assert_eq!((c.hidden_size, c.intermediate_size, c.type_vocab_size, c.labels.len()), (8, 6, 0, 3));
}

#[test]
fn classes_are_read_and_written_by_number() {
    let labels = json!({"id2label": {"1": "yes", "0": "no", "2": 7}});
    let mut c = with(bert(), labels).unwrap();
    assert_eq!(c.labels, ["no", "yes", "7"]);
    c.labels.pop();
    c.dtype = Some(DType::F16);
    let written = c.to_hf_json();
    assert_eq!(written["id2label"], json!({"0": "no", "1": "yes"}));
    assert_eq!(written["label2id"], json!({"no": 0, "yes": 1}));
    assert_eq!(written["architectures"], json!(["BertForSequenceClassification"]));
    assert_eq!((&written["something_else"], &written["torch_dtype"]), (&json!({"kept": true}), &json!("float16")));
}

#[test]
fn the_class_and_its_problem_say_what_the_head_is_for() {
    let class = |name: &str, more: Value| {
        let mut all = json!({"architectures": [name]});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        with(bert(), all).unwrap()
    };
    for (name, more, kind, paths, problem) in [
        (
            "BertForSequenceClassification",
            json!({}),
            HeadKind::Classification,
            (Some("bert.pooler.dense"), "classifier"),
            None,
        ),
        (
            "BertForSequenceClassification",
            json!({"num_labels": 1}),
            HeadKind::Regression,
            (Some("bert.pooler.dense"), "classifier"),
            Some("regression"),
        ),
        (
            "BertForSequenceClassification",
            json!({"problem_type": "regression"}),
            HeadKind::Regression,
            (Some("bert.pooler.dense"), "classifier"),
            Some("regression"),
        ),
        (
            "BertForSequenceClassification",
            json!({"problem_type": "multi_label_classification"}),
            HeadKind::MultiLabel,
            (Some("bert.pooler.dense"), "classifier"),
            Some("multi_label_classification"),
        ),
        (
            "BertForTokenClassification",
            json!({"num_labels": 9}),
            HeadKind::TokenClassification,
            (None, "classifier"),
            None,
        ),
        ("BertForQuestionAnswering", json!({}), HeadKind::QuestionAnswering, (None, "qa_outputs"), None),
    ] {
        let c = class(name, more);
        assert_eq!((c.kind, (c.head_dense(), c.head_out())), (kind, paths), "{name}");
        let written = c.to_hf_json();
        assert_eq!(written["architectures"], json!([name]));
        assert_eq!(written.get("problem_type").and_then(Value::as_str), problem, "{kind}");
    }
    let roberta = class("RobertaForTokenClassification", json!({"model_type": "roberta"}));
    assert_eq!((roberta.head_dense(), roberta.head_out()), (None, "classifier"));
}

#[test]
fn what_cannot_be_honoured_is_an_error_with_its_key() {
    for (changes, wanted) in [
        (json!({"model_type": "bertt"}), vec!["model_type", "did you mean `bert`"]),
        (json!({"hidden_size": 13}), vec!["hidden_size", "multiple", "3"]),
        (json!({"hidden_size": null}), vec!["`hidden_size` is missing"]),
        (json!({"num_attention_heads": 0}), vec!["num_attention_heads", "outside"]),
        (json!({"vocab_size": u64::MAX}), vec!["vocab_size"]),
        (json!({"type_vocab_size": 0}), vec!["type_vocab_size"]),
        (json!({"layer_norm_eps": -1.0}), vec!["layer_norm_eps"]),
        (json!({"hidden_act": "mish"}), vec!["hidden_act", "gelu"]),
        (json!({"position_embedding_type": "relative_key"}), vec!["position_embedding_type", "absolute"]),
        (json!({"is_decoder": true}), vec!["is_decoder"]),
        (json!({"quantization_config": {"quant_method": "gptq"}}), vec!["gptq"]),
        (
            json!({"problem_type": "regresion"}),
            vec!["problem_type", "multi_label_classification, regression", "single_label_classification"],
        ),
        (json!({"problem_type": "single_label_classification", "num_labels": 1}), vec!["id2label", "regression"]),
        (json!({"architectures": ["BertForQuestionAnswering"], "num_labels": 3}), vec!["id2label", "two"]),
        (json!({"num_labels": u64::MAX}), vec!["num_labels"]),
        (json!({"id2label": {"0": "a", "2": "b"}}), vec!["id2label", "gaps"]),
        (json!({"id2label": ["a"]}), vec!["id2label"]),
        (json!({"id2label": {}}), vec!["id2label"]),
        (json!({"model_type": "roberta", "pad_token_id": 15}), vec!["max_position_embeddings", "15"]),
    ] {
        let error = with(bert(), changes.clone()).unwrap_err().to_string();
        assert!(error.starts_with("dir/config.json: "), "{error}");
        for wanted in wanted {
            assert!(error.contains(wanted), "{changes}: {error} does not say {wanted}");
        }
    }
}

#[test]
fn the_model_type_decides_what_a_folder_holds() {
    let dir = tempfile::tempdir().unwrap();
    let read = |config: Value| {
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        ModelConfig::from_hf_json(dir.path())
    };
    assert!(matches!(read(bert()).unwrap(), ModelConfig::Encoder(_)));
    let llama = json!({
        "architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "vocab_size": 9, "hidden_size": 8,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 4
    });
    let ModelConfig::Decoder(config) = read(llama.clone()).unwrap() else { panic!("a decoder") };
    let task = Task::Head { kind: HeadKind::Classification, outputs: 4, reads: ClassToken::Last };
    assert_eq!(config.task(), task);
    let mut tokens = llama.as_object().unwrap().clone();
    tokens["architectures"] = json!(["LlamaForTokenClassification"]);
    let config = DecoderConfig::from_hf_map(tokens.clone(), Path::new("config.json")).unwrap();
    assert_eq!((config.kind, config.head_out()), (HeadKind::TokenClassification, ("score", true)));
    tokens["architectures"] = json!(["LlamaForQuestionAnswering"]);
    let message = DecoderConfig::from_hf_map(tokens, Path::new("config.json")).unwrap_err().to_string();
    assert!(message.contains("architectures") && message.contains("with encoders"), "{message}");
    let mut causal = llama.as_object().unwrap().clone();
    causal["architectures"] = json!(["LlamaForCausalLM"]);
    let config = DecoderConfig::from_hf_map(causal, Path::new("config.json")).unwrap();
    assert_eq!((config.task(), config.labels), (Task::CausalLm, None));
    let message = read(json!({"model_type": "distilbret"})).unwrap_err().to_string();
    assert!(message.contains("did you mean `distilbert`") && message.contains("llama"), "{message}");
}
