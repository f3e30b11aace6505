//! The same step with candle's own operations, as its examples write models: a frozen weight is a plain tensor in a plain
//! matmul, norms and rotary embedding are the differentiable twins of the fused ones (those have no backward pass), one
//! graph over the whole model, one `backward`, `candle_nn::AdamW` on A and B.
//!
//! Only what the Llama family needs; nothing here is tuned for or against.

use anyhow::{Result, bail, ensure};
use candle_core::{D, DType, Device, Module, Tensor, Var};
use candle_nn::{AdamW, Linear, Optimizer, ParamsAdamW, loss, ops, rotary_emb};
use peft_models::ModelFiles;
use peft_models::config::{Activation, DecoderConfig};
use peft_models::rope::RopeScaling;
use serde_json::Value;

use crate::{LEARNING_RATE, LINEARS, SCALE, Settings, measure, random_tokens, start_a};

struct LoraLinear {
    base: Linear,
    a: Var,
    b: Var,
}

impl LoraLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let linear = |x: &Tensor, w: &Var| Linear::new(w.as_tensor().clone(), None).forward(x);
        self.base.forward(x)? + (linear(&linear(x, &self.a)?, &self.b)? * SCALE)?
    }
}

struct Block {
    /// In the order of [`LINEARS`].
    linears: Vec<LoraLinear>,
    input_norm: Tensor,
    post_norm: Tensor,
}

struct Model {
    config: DecoderConfig,
    embed: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Linear,
    cos: Tensor,
    sin: Tensor,
    /// 1 where a query may not see a key, `[seq, seq]`.
    mask: Tensor,
}

impl Model {
    fn load(files: &ModelFiles, settings: &Settings) -> Result<Self> {
        let config = files.decoder_config()?.clone();
        ensure!(config.model_type() == "llama", "the naive step knows Llama only, not {}", config.model_type());
        let theta = match config.rope() {
            Some(rope) if rope.scaling == RopeScaling::Default => rope.theta,
            _ => bail!("the naive step knows no rope scaling"),
        };
        ensure!(config.hidden_act == Activation::Silu, "the naive step knows silu only");
        let get = |name: &str| files.tensor(name, DType::F32);
        let mut blocks = Vec::new();
        for i in 0..config.num_hidden_layers {
            let prefix = format!("model.layers.{i}");
            let mut linears = Vec::new();
            for name in LINEARS {
                let path = format!("{prefix}.{name}");
                let weight = get(&format!("{path}.weight"))?;
                let has_bias = if name.starts_with("mlp") { config.mlp_bias } else { config.qkv_bias };
                let bias = if has_bias { Some(get(&format!("{path}.bias"))?) } else { None };
                let (out, inp) = weight.dims2()?;
                linears.push(LoraLinear {
                    a: Var::from_tensor(&start_a(&path, settings.rank, inp)?)?,
                    b: Var::zeros((out, settings.rank), DType::F32, &Device::Cpu)?,
                    base: Linear::new(weight, bias),
                });
            }
            blocks.push(Block {
                linears,
                input_norm: get(&format!("{prefix}.input_layernorm.weight"))?,
                post_norm: get(&format!("{prefix}.post_attention_layernorm.weight"))?,
            });
        }
        let embed = get("model.embed_tokens.weight")?;
        let head = if config.tie_word_embeddings { embed.clone() } else { get("lm_head.weight")? };
        let (half, seq) = (config.head_dim / 2, settings.seq);
        let angle = |p: usize, i: usize| p as f64 / theta.powf(i as f64 / half as f64);
        let table = |f: fn(f64) -> f64| -> candle_core::Result<Tensor> {
            let values = (0..seq).flat_map(|p| (0..half).map(move |i| f(angle(p, i)) as f32)).collect();
            Tensor::from_vec(values, (seq, half), &Device::Cpu)
        };
        let mask: Vec<u8> = (0..seq).flat_map(|q| (0..seq).map(move |k| u8::from(k > q))).collect();
        Ok(Self {
            cos: table(f64::cos)?,
            sin: table(f64::sin)?,
            mask: Tensor::from_vec(mask, (seq, seq), &Device::Cpu)?,
            norm: get("model.norm.weight")?,
            head: Linear::new(head, None),
            embed,
            blocks,
            config,
        })
    }

    fn vars(&self) -> Vec<Var> {
        self.blocks.iter().flat_map(|b| &b.linears).flat_map(|l| [l.a.clone(), l.b.clone()]).collect()
    }

    fn norm(&self, x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
        ops::rms_norm_slow(x, weight, self.config.norm_eps as f32)
    }

    /// Logits `[batch, seq, vocab]` of `ids: [batch, seq]`.
    fn forward(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        let (batch, seq) = ids.dims2()?;
        let flat = self.embed.index_select(&ids.flatten_all()?, 0)?;
        let mut hidden = flat.reshape((batch, seq, self.config.hidden_size))?;
        for block in &self.blocks {
            let [q, k, v, o, gate, up, down] = block.linears.as_slice() else {
                candle_core::bail!("a block has seven linear layers")
            };
            let x = self.norm(&hidden, &block.input_norm)?;
            let attended = self.attend(&q.forward(&x)?, &k.forward(&x)?, &v.forward(&x)?)?;
            hidden = (hidden + o.forward(&attended)?)?;
            let x = self.norm(&hidden, &block.post_norm)?;
            let inner = (ops::silu(&gate.forward(&x)?)? * up.forward(&x)?)?;
            hidden = (hidden + down.forward(&inner)?)?;
        }
        self.head.forward(&self.norm(&hidden, &self.norm)?)
    }

    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
        let c = &self.config;
        let (batch, seq, _) = q.dims3()?;
        let split =
            |t: &Tensor, heads: usize| t.reshape((batch, seq, heads, c.head_dim))?.transpose(1, 2)?.contiguous();
        let q = rotary_emb::rope_slow(&split(q, c.num_attention_heads)?, &self.cos, &self.sin)?;
        let k = rotary_emb::rope_slow(&split(k, c.num_key_value_heads)?, &self.cos, &self.sin)?;
        let v = split(v, c.num_key_value_heads)?;
        let groups = c.num_attention_heads / c.num_key_value_heads;
        // Key head j serves query heads j·groups..(j + 1)·groups.
        let repeat =
            |t: &Tensor| Tensor::cat(&vec![t; groups], 2)?.reshape((batch, c.num_attention_heads, seq, c.head_dim));
        let (k, v) = (repeat(&k)?, repeat(&v)?);
        let scores = (q.matmul(&k.t()?)? / (c.head_dim as f64).sqrt())?;
        let blocked = Tensor::new(f32::NEG_INFINITY, &Device::Cpu)?.broadcast_as(scores.shape())?;
        let scores = self.mask.broadcast_as(scores.shape())?.where_cond(&blocked, &scores)?;
        let attended = ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        attended.transpose(1, 2)?.reshape((batch, seq, c.query_size()))
    }
}

/// Loads `files` and trains `settings.steps` steps.
///
/// # Errors
/// When the model is not plain Llama, cannot be loaded, or a step fails.
pub fn run(files: &ModelFiles, settings: &Settings) -> Result<(Vec<f64>, Value)> {
    let model = Model::load(files, settings)?;
    let params = ParamsAdamW { lr: LEARNING_RATE, weight_decay: 0.0, ..ParamsAdamW::default() };
    let mut optimizer = AdamW::new(model.vars(), params)?;
    let (batch, seq, vocab) = (settings.batch, settings.seq, model.config.vocab_size);
    let ids = Tensor::from_vec(random_tokens(batch * seq, vocab), (batch, seq), &Device::Cpu)?;
    let targets = ids.narrow(1, 1, seq - 1)?.flatten_all()?;
    measure(settings, || {
        let logits = model.forward(&ids)?.narrow(1, 0, seq - 1)?.reshape((batch * (seq - 1), vocab))?;
        let loss = loss::cross_entropy(&logits, &targets)?;
        optimizer.step(&loss.backward()?)?;
        Ok(f64::from(loss.to_scalar::<f32>()?))
    })
}
