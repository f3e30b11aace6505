//! Configuration from the metadata of a GGUF file, and the metadata from a configuration.

use peft_core::HeadKind;
use peft_core::suggest::did_you_mean;
use serde_json::Map;

use super::{ConfigError, DecoderConfig, FAMILIES, LayerKind, MOST_LAYERS, RopeConfig};
use crate::{
    gguf::{Gguf, GgufError, Value},
    rope::{LongRope, RopeScaling, Yarn, inverse_frequencies},
};

/// Frequencies in `rope_freqs.weight` are at most this many.
const MAX_FREQUENCIES: usize = 1 << 14;

/// A configuration as GGUF has it.
pub(crate) struct GgufDescription {
    /// Keys and values.
    pub(crate) metadata: Vec<(String, Value)>,
    /// The tensor `rope_freqs.weight`, if rope scaling needs one.
    pub(crate) frequency_factors: Option<Vec<f32>>,
}

impl From<GgufError> for ConfigError {
    fn from(error: GgufError) -> Self {
        match error {
            GgufError::Metadata { path, key, reason } => Self::Invalid { path, key, reason },
            GgufError::Tensor { path, name, reason } => Self::Invalid { path, key: name, reason },
            GgufError::Io { path, source } => Self::Io { path, source },
            GgufError::Write(error) => Self::Core(error),
            GgufError::Candle { path, name, source } => Self::Invalid { path, key: name, reason: source.to_string() },
            GgufError::Malformed { path, reason } | GgufError::Inexpressible { path, reason } => {
                Self::Invalid { path, key: "header".into(), reason }
            }
        }
    }
}

impl DecoderConfig {
    /// Reads the configuration out of a GGUF file's metadata and tensor list.
    ///
    /// What the metadata does not say is read off the tensors: biases from their presence, a tied head from the
    /// absence of `output.weight`, Llama 3 rope scaling from `rope_freqs.weight`, the vocabulary size from the embedding.
    ///
    /// # Errors
    /// An architecture that is not known, an absent key, and a value that is impossible or not supported.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ConfigError> {
        let invalid =
            |key: &str, reason: String| ConfigError::Invalid { path: gguf.path().into(), key: key.into(), reason };
        let architecture = gguf.architecture()?;
        let family = FAMILIES.iter().find(|family| family.gguf_architecture() == Some(architecture)).ok_or_else(|| {
            let mut known: Vec<&str> = FAMILIES.iter().filter_map(|family| family.gguf_architecture()).collect();
            known.dedup();
            let hint = did_you_mean(architecture, &known);
            invalid(
                "general.architecture",
                format!(
                    "`{architecture}` is not supported in GGUF files (known: {}){hint}; a folder in Hugging Face layout may be",
                    known.join(", ")
                ),
            )
        })?;
        let key = |name: &str| format!("{architecture}.{name}");
        if gguf.count(&key("expert_count"))?.is_some_and(|experts| experts > 0) {
            return Err(invalid(&key("expert_count"), "mixture-of-experts models are not supported".into()));
        }
        let hidden_size = gguf.required_count(&key("embedding_length"))?;
        let num_attention_heads = gguf.required_count(&key("attention.head_count"))?;
        if num_attention_heads == 0 {
            return Err(invalid(&key("attention.head_count"), "0 heads".into()));
        }
        let head_dim = match gguf.count(&key("attention.key_length"))? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => {
                let reason = format!("{hidden_size} is not a multiple of {num_attention_heads} heads");
                return Err(invalid(&key("embedding_length"), reason));
            }
        };
        if gguf.count(&key("attention.value_length"))?.is_some_and(|length| length != head_dim) {
            return Err(invalid(&key("attention.value_length"), format!("differs from the keys' {head_dim}")));
        }
        let rotary_dim = gguf.count(&key("rope.dimension_count"))?.unwrap_or(head_dim);
        let (theta, rotates_part) = family.rope.map_or((10_000.0, false), |rope| (rope.theta, rope.partial.is_some()));
        if rotary_dim > head_dim || (rotary_dim != head_dim && !rotates_part) {
            return Err(invalid(
                &key("rope.dimension_count"),
                format!("{rotary_dim} of {head_dim} dimensions of a head"),
            ));
        }
        let max_position_embeddings = gguf.required_count(&key("context_length"))?;
        let theta = gguf.number(&key("rope.freq_base"))?.unwrap_or(theta);
        let rows = |name: &str| gguf.tensor(name).and_then(|info| info.shape.first().copied());
        let vocab_size = match rows("token_embd.weight") {
            Some(rows) => rows,
            None => gguf.required_count(&key("vocab_size"))?,
        };
        let token = |name: &str| -> Result<Option<u32>, ConfigError> {
            let key = format!("tokenizer.ggml.{name}");
            // −1 and 2³²−1 are how files say "none".
            match gguf.value(&key) {
                Some(Value::I32(-1) | Value::I64(-1) | Value::U32(u32::MAX)) => Ok(None),
                _ => {
                    let id = gguf.count(&key)?;
                    id.map(|id| u32::try_from(id).map_err(|_| invalid(&key, format!("{id} is not a token id"))))
                        .transpose()
                }
            }
        };
        let num_hidden_layers = gguf.required_count(&key("block_count"))?;
        let rope = RopeConfig {
            theta: shortest(theta),
            scaling: scaling(gguf, architecture, theta, rotary_dim, max_position_embeddings)?,
            partial_rotary_factor: rotary_dim as f64 / head_dim.max(1) as f64,
        };
        Self {
            family,
            vocab_size,
            hidden_size,
            intermediate_size: gguf.required_count(&key("feed_forward_length"))?,
            experts: None,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: gguf.count(&key("attention.head_count_kv"))?.unwrap_or(num_attention_heads),
            head_dim,
            // GGUF names no activation: it is part of the architecture.
            hidden_act: family.hidden_act,
            norm_eps: gguf.number(&key("attention.layer_norm_rms_epsilon"))?.map_or(family.norm_eps, shortest),
            layer_kinds: vec![LayerKind { window: None, rope: Some(rope) }],
            kind_of_layer: vec![0; num_hidden_layers.min(MOST_LAYERS)],
            query_pre_attn_scalar: None,
            max_position_embeddings,
            tie_word_embeddings: gguf.tensor("output.weight").is_none(),
            qkv_bias: gguf.tensor("blk.0.attn_q.bias").is_some(),
            output_bias: gguf.tensor("blk.0.attn_output.bias").is_some(),
            mlp_bias: gguf.tensor("blk.0.ffn_gate.bias").is_some(),
            parallel_residual: false,
            attn_logit_softcapping: None,
            final_logit_softcapping: None,
            bos_token_id: token("bos_token_id")?,
            eos_token_ids: token("eos_token_id")?.into_iter().collect(),
            pad_token_id: token("padding_token_id")?,
            kind: HeadKind::default(),
            labels: None,
            dtype: None,
            raw: Map::new(),
        }
        .check(gguf.path())
    }

    /// What describes this model to llama.cpp. The error is what GGUF cannot express.
    pub(crate) fn to_gguf_metadata(&self) -> Result<GgufDescription, String> {
        let model_type = self.family.model_type;
        let Some(architecture) = self.family.gguf_architecture() else {
            return Err(format!("GGUF files of {model_type} models are not written; write safetensors"));
        };
        let [LayerKind { window, rope: Some(rope) }] = self.layer_kinds.as_slice() else {
            return Err(format!("GGUF cannot express layers of several kinds in {architecture} models"));
        };
        if let Some(window) = window.filter(|window| *window < self.max_position_embeddings) {
            return Err(format!(
                "GGUF cannot express the sliding window of {window} positions in {architecture} models; write safetensors"
            ));
        }
        if self.hidden_act != self.family.hidden_act {
            return Err(format!(
                "GGUF has no key for `hidden_act`, and {architecture} models have `{}`, not `{}`",
                self.family.hidden_act.name(),
                self.hidden_act.name()
            ));
        }
        let count =
            |value: usize| u32::try_from(value).map(Value::U32).map_err(|_| format!("{value} does not fit 32 bits"));
        let mut entries = vec![("general.architecture".to_owned(), Value::from(architecture))];
        let mut set = |name: &str, value: Value| entries.push((format!("{architecture}.{name}"), value));
        set("vocab_size", count(self.vocab_size)?);
        set("context_length", count(self.max_position_embeddings)?);
        set("embedding_length", count(self.hidden_size)?);
        set("block_count", count(self.num_hidden_layers)?);
        set("feed_forward_length", count(self.intermediate_size)?);
        set("attention.head_count", count(self.num_attention_heads)?);
        set("attention.head_count_kv", count(self.num_key_value_heads)?);
        set("attention.key_length", count(self.head_dim)?);
        set("attention.value_length", count(self.head_dim)?);
        set("attention.layer_norm_rms_epsilon", Value::F32(self.norm_eps as f32));
        let rotary_dim = rope.rotary_dim(self.head_dim);
        set("rope.dimension_count", count(rotary_dim)?);
        set("rope.freq_base", Value::F32(rope.theta as f32));
        let mut factors = None;
        match &rope.scaling {
            // Dynamic NTK changes nothing up to the context length, and GGUF has no word for what it does beyond.
            RopeScaling::Default | RopeScaling::Dynamic { .. } => {}
            RopeScaling::Linear { factor } => {
                set("rope.scaling.type", "linear".into());
                set("rope.scaling.factor", Value::F32(*factor as f32));
            }
            RopeScaling::Yarn(yarn) => {
                let derived = Yarn { attention_factor: None, mscale: None, mscale_all_dim: None, ..yarn.clone() };
                let attention =
                    |scaling: Yarn| inverse_frequencies(&RopeScaling::Yarn(scaling), rope.theta, rotary_dim, 0).1;
                let (derived, actual) = (attention(derived), attention(yarn.clone()));
                set("rope.scaling.type", "yarn".into());
                set("rope.scaling.factor", Value::F32(yarn.factor as f32));
                set("rope.scaling.original_context_length", count(yarn.original_max_position_embeddings)?);
                set("rope.scaling.attn_factor", Value::F32(actual / derived));
                set("rope.scaling.yarn_beta_fast", Value::F32(yarn.beta_fast as f32));
                set("rope.scaling.yarn_beta_slow", Value::F32(yarn.beta_slow as f32));
            }
            scaling @ RopeScaling::Llama3 { .. } => factors = Some(frequency_factors(rope, scaling, rotary_dim)),
            RopeScaling::LongRope(long) => {
                // One set of divisors without a factor on cos and sin is what `rope_freqs.weight` says.
                if long.short_factor != long.long_factor || long.attention_factor != Some(1.0) {
                    return Err("GGUF cannot express `longrope` scaling of this architecture".into());
                }
                factors = Some(long.short_factor.iter().map(|factor| *factor as f32).collect());
            }
        }
        Ok(GgufDescription { metadata: entries, frequency_factors: factors })
    }
}

/// What each plain frequency is divided by under `scaling`.
fn frequency_factors(rope: &RopeConfig, scaling: &RopeScaling, rotary_dim: usize) -> Vec<f32> {
    let plain = inverse_frequencies(&RopeScaling::Default, rope.theta, rotary_dim, 0).0;
    let scaled = inverse_frequencies(scaling, rope.theta, rotary_dim, 0).0;
    plain.iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect()
}

/// The shortest decimal that is the same f32: 1e-5 instead of 9.999999747378752e-06, so that a written `config.json`
/// says what the model's first one said.
fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

/// A factor that came out of a division in f32, without the error of that division.
fn tidy(factor: f64) -> f64 {
    let rounded = (factor * 1000.0).round() / 1000.0;
    if (rounded / factor - 1.0).abs() < 1e-6 { rounded } else { shortest(factor) }
}

fn scaling(
    gguf: &Gguf,
    architecture: &str,
    theta: f64,
    rotary_dim: usize,
    context: usize,
) -> Result<RopeScaling, ConfigError> {
    let key = |name: &str| format!("{architecture}.rope.{name}");
    let invalid = |key: String, reason: String| ConfigError::Invalid { path: gguf.path().into(), key, reason };
    if let Some(factors) = gguf.small_f32("rope_freqs.weight", MAX_FREQUENCIES)? {
        return Ok(from_factors(&factors, theta, rotary_dim, context));
    }
    let original = gguf.count(&key("scaling.original_context_length"))?.unwrap_or(context);
    let factor = match gguf.number(&key("scaling.factor"))? {
        Some(factor) => Some(factor),
        None => gguf.number(&key("scale_linear"))?,
    };
    match gguf.text(&key("scaling.type"))? {
        Some("none") => Ok(RopeScaling::Default),
        None | Some("linear") => Ok(match factor.filter(|factor| *factor != 1.0 && *factor != 0.0) {
            Some(factor) => RopeScaling::Linear { factor },
            None => RopeScaling::Default,
        }),
        Some("yarn") => {
            let mut yarn = Yarn {
                factor: factor.unwrap_or(context as f64 / original.max(1) as f64),
                original_max_position_embeddings: original,
                attention_factor: None,
                beta_fast: gguf.number(&key("scaling.yarn_beta_fast"))?.unwrap_or(32.0),
                beta_slow: gguf.number(&key("scaling.yarn_beta_slow"))?.unwrap_or(1.0),
                mscale: None,
                mscale_all_dim: None,
                truncate: true,
            };
            // llama.cpp multiplies its own derived factor by this one.
            if let Some(times) = gguf.number(&key("scaling.attn_factor"))?.filter(|times| *times != 1.0) {
                let derived = inverse_frequencies(&RopeScaling::Yarn(yarn.clone()), theta, rotary_dim, 0).1;
                yarn.attention_factor = Some(times * f64::from(derived));
            }
            Ok(RopeScaling::Yarn(yarn))
        }
        Some("longrope") => {
            let factors = |name: &str| -> Result<Vec<f64>, ConfigError> {
                let values = gguf.small_f32(name, MAX_FREQUENCIES)?;
                let values = values
                    .ok_or_else(|| invalid(key("scaling.type"), format!("is longrope and `{name}` is missing")))?;
                Ok(values.into_iter().map(f64::from).collect())
            };
            Ok(RopeScaling::LongRope(LongRope {
                short_factor: factors("rope_factors_short.weight")?,
                long_factor: factors("rope_factors_long.weight")?,
                factor: context as f64 / original.max(1) as f64,
                attention_factor: gguf.number(&key("scaling.attn_factor"))?,
                original_max_position_embeddings: original,
            }))
        }
        Some(other) => Err(invalid(
            key("scaling.type"),
            format!("`{other}` is not supported (known: none, linear, yarn, longrope)"),
        )),
    }
}

/// `rope_freqs.weight` as the Llama 3 scaling that made it, or, for factors of any other origin, as LongRoPE with the
/// same divisors at every length, which says the same to transformers.
fn from_factors(factors: &[f32], theta: f64, rotary_dim: usize, context: usize) -> RopeScaling {
    let largest = factors.iter().copied().fold(1.0f32, f32::max);
    let plain = inverse_frequencies(&RopeScaling::Default, theta, rotary_dim, 0).0;
    let same = |scaling: &RopeScaling| {
        let scaled = inverse_frequencies(scaling, theta, rotary_dim, 0).0;
        scaled.len() == factors.len()
            && plain
                .iter()
                .zip(&scaled)
                .zip(factors)
                .all(|((plain, scaled), factor)| (plain / scaled / factor - 1.0).abs() < 1e-4)
    };
    if same(&RopeScaling::Default) {
        return RopeScaling::Default;
    }
    for original_max_position_embeddings in [8192, 4096, 16384, 2048, 32768, 65536, 1024, 512, 256, 128] {
        let llama3 = RopeScaling::Llama3 {
            factor: tidy(f64::from(largest)),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings,
        };
        if same(&llama3) {
            return llama3;
        }
    }
    let divisors: Vec<f64> = factors.iter().map(|factor| f64::from(*factor)).collect();
    RopeScaling::LongRope(LongRope {
        short_factor: divisors.clone(),
        long_factor: divisors,
        factor: 1.0,
        attention_factor: Some(1.0),
        original_max_position_embeddings: context.max(2),
    })
}
