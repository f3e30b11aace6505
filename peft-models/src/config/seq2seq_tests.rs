#![allow(clippy::unwrap_used)]
use super::*;

fn read(changes: &[(&str, Value)]) -> Result<Seq2SeqConfig, ConfigError> {
    let mut map = json!({
        "model_type": "t5", "vocab_size": 40, "d_model": 24, "d_kv": 5, "d_ff": 30, "num_layers": 3, "num_heads": 4,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0
    })
    .as_object()
    .unwrap()
    .clone();
    for (key, value) in changes {
        map.insert((*key).into(), value.clone());
    }
    Seq2SeqConfig::from_hf_map(map, Path::new("config.json"))
}

/// The distances at which `_relative_position_bucket` of transformers 5.23 changes, from −600 to 600, and to what.
#[test]
fn buckets_are_those_of_transformers() {
    let far = [(-600, 15), (-90, 14), (-63, 13), (-45, 12), (-31, 11), (-22, 10), (-15, 9), (-11, 8), (-7, 7)];
    let later = [(8, 24), (12, 25), (16, 26), (23, 27), (32, 28), (46, 29), (64, 30), (91, 31)];
    let near = (-6..=0).map(|d: isize| (d, d.unsigned_abs())).chain((1..8).map(|d: isize| (d, 16 + d.unsigned_abs())));
    let both: Vec<(isize, usize)> = far.into_iter().chain(near).chain(later).collect();
    let one = [
        (-600, 31),
        (-112, 30),
        (-98, 29),
        (-86, 28),
        (-76, 27),
        (-66, 26),
        (-58, 25),
        (-51, 24),
        (-45, 23),
        (-39, 22),
        (-34, 21),
        (-30, 20),
        (-26, 19),
        (-23, 18),
        (-20, 17),
        (-18, 16),
    ];
    let one: Vec<(isize, usize)> = one.into_iter().chain((-15..=0).map(|d: isize| (d, d.unsigned_abs()))).collect();
    let small = [(-600, 3), (-6, 2), (-1, 1), (0, 0), (1, 5), (2, 6), (7, 7)].to_vec();
    let odd = [(-600, 6), (-24, 5), (-12, 4), (-6, 3), (-2, 2), (-1, 1), (0, 0)].to_vec();
    for (both_sides, buckets, max_distance, changes) in
        [(true, 32, 128, both), (false, 32, 128, one), (true, 8, 20, small), (false, 7, 50, odd)]
    {
        let positions = RelativePositions { buckets, max_distance };
        let found = (-600..=600).map(|d| (d, positions.bucket(d, both_sides))).collect::<Vec<_>>();
        let found: Vec<_> = found.chunk_by(|a, b| a.1 == b.1).map(|same| same[0]).collect();
        assert_eq!(found, changes, "{buckets} buckets");
    }
}

#[test]
fn what_files_leave_unsaid() {
    let c = read(&[]).unwrap();
    assert_eq!((c.encoder_layers, c.decoder_layers, c.attention_size()), (3, 3, 20));
    assert_eq!((c.mlp, c.hidden_act), (MlpLayout::Plain(["wi", "wo"]), Activation::Relu));
    assert_eq!(c.positions, Seq2SeqPositions::Relative(RelativePositions { buckets: 32, max_distance: 128 }));
    assert!(c.tie_word_embeddings && c.scales_outputs);
    let gated = |name: &str| read(&[("feed_forward_proj", json!(name))]).unwrap();
    assert_eq!(gated("gated-gelu").hidden_act, Activation::GeluTanh);
    assert_eq!(gated("gated-silu").hidden_act, Activation::Silu);
    assert_eq!(gated("gelu").hidden_act, Activation::Gelu);
    assert!(gated("gated-gelu").mlp.is_gated() && !gated("gelu").mlp.is_gated());
    let mt5 = read(&[("model_type", json!("mt5")), ("eos_token_id", Value::Null)]).unwrap();
    assert!(mt5.mlp.is_gated() && !mt5.scales_outputs);
    assert_eq!(mt5.eos_token_ids, [1]);
}

/// v1.1 says by `tie_word_embeddings` that it does not scale; transformers 5 writes both keys, the first one always true.
#[test]
fn scaling_is_said_in_two_ways() {
    let scales = |changes: &[(&str, Value)]| read(changes).unwrap().scales_outputs;
    let (tie, scale) = ("tie_word_embeddings", "scale_decoder_outputs");
    assert!(!scales(&[(tie, json!(false))]));
    assert!(!scales(&[(tie, json!(true)), (scale, json!(false))]));
    assert!(scales(&[(tie, json!(false)), (scale, json!(true))]));
    let written = read(&[(tie, json!(false))]).unwrap().to_hf_json(true);
    assert_eq!((&written[tie], &written[scale]), (&json!(true), &json!(false)));
    let again = Seq2SeqConfig::from_hf_map(written, Path::new("config.json")).unwrap();
    assert!(!again.scales_outputs);
}

#[test]
fn what_cannot_be_is_refused_by_its_key() {
    for (key, value) in [
        ("num_heads", json!(0)),
        ("d_model", json!(-3)),
        ("num_layers", json!(100_000)),
        ("num_decoder_layers", json!(0)),
        ("d_kv", json!("x")),
        ("feed_forward_proj", json!("gated-gleu")),
        ("relative_attention_num_buckets", json!(2)),
        ("relative_attention_max_distance", json!(16)),
        ("layer_norm_epsilon", json!(-1.0)),
        ("decoder_start_token_id", json!(40)),
        ("architectures", json!(["T5EncoderModel"])),
        ("quantization_config", json!({"quant_method": "gptq"})),
    ] {
        let e = read(&[(key, value.clone())]).unwrap_err().to_string();
        assert!(e.contains(&format!("`{key}`")), "{key} = {value}: {e}");
    }
    let e = read(&[("model_type", json!("t6"))]).unwrap_err().to_string();
    assert!(e.contains("`t6` is not supported") && e.contains("t5, mt5"), "{e}");
}

#[test]
fn bart_has_keys_of_its_own() {
    let bart = |changes: Value| {
        let mut map = json!({
            "model_type": "bart", "vocab_size": 40, "d_model": 24, "encoder_layers": 3, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 30, "decoder_ffn_dim": 30
        });
        map.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Seq2SeqConfig::from_hf_map(map.as_object().unwrap().clone(), Path::new("config.json"))
    };
    let c = bart(json!({})).unwrap();
    assert_eq!((c.encoder_layers, c.decoder_layers, c.attention_size(), c.head_dim), (3, 2, 24, 6));
    assert_eq!((c.learned_positions(), c.scales_embeddings, c.hidden_act), (Some(1024), false, Activation::Gelu));
    assert_eq!((c.decoder_start_token_id, c.pad_token_id, c.eos_token_ids), (2, 1, vec![2]));
    for (changes, wanted) in [
        (json!({"decoder_ffn_dim": 31}), ["decoder_ffn_dim", "only 30"]),
        (json!({"decoder_attention_heads": 2}), ["decoder_attention_heads", "only 4"]),
        (json!({"d_model": 26}), ["d_model", "not a multiple"]),
        (json!({"encoder_attention_heads": 0, "decoder_attention_heads": 0}), ["d_model", "not a multiple"]),
        (json!({"max_position_embeddings": 0}), ["max_position_embeddings", "outside"]),
        (json!({"encoder_layers": null}), ["encoder_layers", "missing"]),
        (json!({"architectures": ["BartForSequenceClassification"]}), ["architectures", "not supported for bart"]),
        (json!({"activation_function": "gelo"}), ["activation_function", "gelo"]),
    ] {
        let error = bart(changes).unwrap_err().to_string();
        assert!(wanted.iter().all(|w| error.contains(w)), "{error}");
    }
}
