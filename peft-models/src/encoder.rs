//! The shared encoder skeleton: summed embeddings, post-norm blocks of bidirectional attention and an MLP, and a class
//! head on the first token (Devlin et al. 2018, arXiv:1810.04805). Every linear, norm and embedding is a site under the
//! name that transformers gives it.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::{self, AttentionPlan, FrozenWeight, SequenceSpan, activation, attention};
use peft_core::{
    BaseLayer, BaseModel, Context, Ctx, Error, FrozenEmbedding, FrozenLinear, FrozenNorm, Join, NormKind, ReadRows,
    Result, Segmented, SiteId, SiteTable, SublayerSite, Task, TokenBatch, sublayer_sites,
};

use crate::config::{EncoderConfig, HeadActivation};
use crate::loader::Loader;
use crate::source::{Placement, RandomSource, WeightSource};

/// An encoder with a class head.
#[derive(Debug)]
pub struct Encoder {
    config: EncoderConfig,
    sites: Arc<SiteTable>,
    words: FrozenEmbedding,
    positions: FrozenEmbedding,
    types: Option<FrozenEmbedding>,
    norm: FrozenNorm,
    blocks: Vec<Block>,
    head_dense: FrozenLinear,
    head_out: FrozenLinear,
    fresh: Vec<String>,
    device: Device,
    dtype: DType,
}

#[derive(Debug)]
struct Block {
    q: FrozenLinear,
    k: FrozenLinear,
    v: FrozenLinear,
    o: FrozenLinear,
    attention_norm: FrozenNorm,
    up: FrozenLinear,
    down: FrozenLinear,
    mlp_norm: FrozenNorm,
}

/// What all blocks share of one batch.
#[derive(Debug, Clone)]
pub struct EncoderInput {
    attention: Arc<AttentionPlan>,
}

/// A checkpoint's names beside those of the sequence classification model: encoders that were saved alone leave the
/// name of the body out, and TensorFlow's layer norms have `gamma` and `beta`.
#[derive(Debug)]
struct EncoderSource<'a> {
    inner: &'a dyn WeightSource,
    body: &'static str,
}

impl EncoderSource<'_> {
    fn stored<'n>(&self, name: &'n str) -> Cow<'n, str> {
        let alone = name.strip_prefix(self.body).and_then(|rest| rest.strip_prefix('.'));
        for name in std::iter::once(name).chain(alone) {
            if self.inner.contains(name) {
                return Cow::Borrowed(name);
            }
            let old = match (name.strip_suffix("LayerNorm.weight"), name.strip_suffix("LayerNorm.bias")) {
                (Some(path), _) => format!("{path}LayerNorm.gamma"),
                (_, Some(path)) => format!("{path}LayerNorm.beta"),
                _ => continue,
            };
            if self.inner.contains(&old) {
                return Cow::Owned(old);
            }
        }
        Cow::Borrowed(name)
    }
}

impl WeightSource for EncoderSource<'_> {
    fn contains(&self, name: &str) -> bool {
        self.inner.contains(&self.stored(name))
    }

    fn weight(&self, name: &str, dims: (usize, usize)) -> Result<FrozenWeight> {
        self.inner.weight(&self.stored(name), dims)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        self.inner.vector(&self.stored(name), len)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

impl Encoder {
    /// Loads the model that `config` describes from `source`. Layers of the head that `source` has no weights for start
    /// at random, as a function of `seed` ([`BaseModel::fresh_layers`]).
    ///
    /// # Errors
    /// A missing tensor of the body or a wrong shape, by its name.
    pub fn load(config: EncoderConfig, source: &dyn WeightSource, placement: &Placement, seed: u64) -> Result<Self> {
        let (c, names) = (&config, &config.family.names);
        let source = EncoderSource { inner: source, body: names.body };
        let mut l = Loader::new(&source, placement);
        let (hidden, body) = (c.hidden_size, names.body);

        let words = l.embedding(&format!("{body}.embeddings.word_embeddings"), c.vocab_size, hidden)?;
        let positions =
            l.embedding(&format!("{body}.embeddings.position_embeddings"), c.max_position_embeddings, hidden)?;
        let types = match c.type_vocab_size {
            0 => None,
            n => Some(l.embedding(&format!("{body}.embeddings.token_type_embeddings"), n, hidden)?),
        };
        let norm = l.norm(&format!("{body}.embeddings.LayerNorm"), hidden, NormKind::Layer, c.layer_norm_eps)?;
        let mut blocks = Vec::with_capacity(c.num_hidden_layers);
        for i in 0..c.num_hidden_layers {
            l.segment = i + 1;
            blocks.push(Block::load(&mut l, c, &format!("{body}.{}.{i}", names.blocks))?);
        }

        l.segment = c.num_hidden_layers + 1;
        let std = c.raw.get("initializer_range").and_then(serde_json::Value::as_f64).unwrap_or(0.02) as f32;
        let random = RandomSource { seed, std, untied_head: true, placement: placement.clone() };
        let mut fresh = Vec::new();
        let mut head = |path: &str, out: usize| {
            if source.contains(&format!("{path}.weight")) {
                return l.linear(path, hidden, out, true);
            }
            fresh.push(path.to_owned());
            l.linear_from(&random, path, hidden, out, true)
        };
        let (head_dense, head_out) = (head(names.head_dense, hidden)?, head(names.head_out, c.labels.len())?);
        Ok(Self {
            sites: Arc::new(l.sites),
            words,
            positions,
            types,
            norm,
            blocks,
            head_dense,
            head_out,
            fresh,
            device: placement.device.clone(),
            dtype: placement.activations,
            config,
        })
    }

    /// The model's configuration.
    #[must_use]
    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    fn embeddings(&self) -> impl Iterator<Item = &FrozenEmbedding> {
        [&self.words, &self.positions].into_iter().chain(&self.types)
    }

    fn linears(&self) -> impl Iterator<Item = &FrozenLinear> {
        self.blocks.iter().flat_map(Block::linears).chain([&self.head_dense, &self.head_out])
    }

    fn norms(&self) -> impl Iterator<Item = &FrozenNorm> {
        std::iter::once(&self.norm).chain(self.blocks.iter().flat_map(Block::norms))
    }

    /// Bytes of all frozen matrices.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        self.embeddings().map(|e| e.weight().nbytes()).chain(self.linears().map(|l| l.weight().nbytes())).sum()
    }

    /// Parameters of the model, its head included.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        let size = |w: &FrozenWeight| w.out_features() * w.in_features();
        let linear = |l: &FrozenLinear| size(l.weight()) + l.bias().map_or(0, Tensor::elem_count);
        self.embeddings().map(|e| size(e.weight())).sum::<usize>()
            + self.linears().map(linear).sum::<usize>()
            + self.norms().count() * 2 * self.config.hidden_size
    }

    /// The row of the position table for each token. RoBERTa counts from behind the padding token's, which padding
    /// tokens have themselves (`create_position_ids_from_input_ids`).
    fn position_ids(&self, batch: TokenBatch<'_>) -> Result<Vec<u32>> {
        if !self.config.family.positions_after_padding {
            return Ok(batch.positions.to_vec());
        }
        let padding = self.config.pad_token_id;
        let mut ids = Vec::with_capacity(batch.ids.len());
        for sequence in batch.sequences()? {
            let mut last = padding;
            for &id in batch.ids.get(sequence).unwrap_or_default() {
                last += u32::from(id != padding);
                ids.push(if id == padding { padding } else { last });
            }
        }
        Ok(ids)
    }
}

impl Block {
    fn load(l: &mut Loader<'_>, c: &EncoderConfig, path: &str) -> Result<Self> {
        let (hidden, inner, names) = (c.hidden_size, c.intermediate_size, &c.family.names);
        let [q, k, v, o] = names.attention;
        let [up, down] = names.mlp;
        Ok(Self {
            q: l.linear(&format!("{path}.{q}"), hidden, hidden, true)?,
            k: l.linear(&format!("{path}.{k}"), hidden, hidden, true)?,
            v: l.linear(&format!("{path}.{v}"), hidden, hidden, true)?,
            o: l.linear(&format!("{path}.{o}"), hidden, hidden, true)?,
            attention_norm: l.norm(
                &format!("{path}.{}", names.attention_norm),
                hidden,
                NormKind::Layer,
                c.layer_norm_eps,
            )?,
            up: l.linear(&format!("{path}.{up}"), hidden, inner, true)?,
            down: l.linear(&format!("{path}.{down}"), inner, hidden, true)?,
            mlp_norm: l.norm(&format!("{path}.{}", names.mlp_norm), hidden, NormKind::Layer, c.layer_norm_eps)?,
        })
    }

    fn linears(&self) -> [&FrozenLinear; 6] {
        [&self.q, &self.k, &self.v, &self.o, &self.up, &self.down]
    }

    fn norms(&self) -> [&FrozenNorm; 2] {
        [&self.attention_norm, &self.mlp_norm]
    }

    fn forward(&self, hidden: &Tensor, input: &EncoderInput, c: &EncoderConfig, ctx: &Ctx<'_>) -> Result<Tensor> {
        let [q, k, v] = FrozenLinear::forward_siblings([&self.q, &self.k, &self.v], hidden, ctx)?;
        self.behind_attention(&attention(&q, &k, &v, &input.attention)?, hidden, c, ctx)
    }

    /// `rows` of what [`Block::forward`] makes.
    fn forward_rows(
        &self,
        hidden: &Tensor,
        rows: &ReadRows,
        input: &EncoderInput,
        c: &EncoderConfig,
        ctx: &Ctx<'_>,
    ) -> Result<Tensor> {
        let (own, of_own) = (rows.of(hidden)?, rows.ctx(ctx));
        let q = self.q.forward(&own, &of_own)?;
        let [k, v] = FrozenLinear::forward_siblings([&self.k, &self.v], hidden, ctx)?;
        // Every query sees all keys of its sequence, wherever it stands.
        let queries = |s: &SequenceSpan| SequenceSpan { queries: rows.within(&s.queries), ..s.clone() };
        let sequences = input.attention.sequences.iter().map(queries).collect();
        let plan = Arc::new(AttentionPlan { sequences, ..(*input.attention).clone() });
        self.behind_attention(&attention(&q, &k, &v, &plan)?, &own, c, &of_own)
    }

    /// From what the heads of attention gave, `[tokens, hidden]`, and the block's input to its result.
    fn behind_attention(&self, attended: &Tensor, hidden: &Tensor, c: &EncoderConfig, ctx: &Ctx<'_>) -> Result<Tensor> {
        let attended = self.o.forward(attended, ctx)?;
        let norm = Some(&self.attention_norm);
        let hidden = self.o.join(&Join { output: &attended, residual: hidden, norm }, ctx)?;
        let inner = activation(&self.up.forward(&hidden, ctx)?, c.hidden_act.into())?;
        let output = self.down.forward(&inner, ctx)?;
        self.down.join(&Join { output: &output, residual: &hidden, norm: Some(&self.mlp_norm) }, ctx)
    }
}

impl BaseModel for Encoder {
    fn sites(&self) -> &Arc<SiteTable> {
        &self.sites
    }

    fn layer(&self, site: SiteId) -> Result<BaseLayer<'_>> {
        let linear = self.linears().find(|l| l.site() == site).map(BaseLayer::Linear);
        linear
            .or_else(|| self.norms().find(|n| n.site() == site).map(BaseLayer::Norm))
            .or_else(|| self.embeddings().find(|e| e.site() == site).map(BaseLayer::Embedding))
            .ok_or_else(|| Error::msg(format!("site {} is not one of the model's", site.0)))
    }

    fn model_type(&self) -> &str {
        self.config.family.model_type
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn tied_embedding(&self) -> Option<&str> {
        None
    }

    fn task(&self) -> Task {
        self.config.task()
    }

    fn sublayers(&self) -> Vec<SublayerSite> {
        let ends = self.blocks.iter().map(|b| (b.o.site(), b.down.site()));
        sublayer_sites(ends, self.config.hidden_size)
    }

    fn fresh_layers(&self) -> &[String] {
        &self.fresh
    }
}

impl Segmented for Encoder {
    type Input = EncoderInput;

    fn prepare(&self, batch: TokenBatch<'_>, _: &Ctx<'_>) -> Result<EncoderInput> {
        let c = &self.config;
        let mut sequences = Vec::with_capacity(batch.bounds.len());
        for tokens in batch.sequences()? {
            if tokens.len() > c.max_length() {
                return Err(Error::msg(format!(
                    "a sequence of {} tokens is longer than the model's {} positions; cut rows to data.max_length = {}",
                    tokens.len(),
                    c.max_length(),
                    c.max_length()
                )));
            }
            sequences.push(SequenceSpan { queries: tokens.clone(), keys: tokens, prefix: 0..0 });
        }
        let attention = AttentionPlan {
            heads: c.num_attention_heads,
            kv_heads: c.num_attention_heads,
            head_dim: c.head_dim(),
            scale: 1.0 / (c.head_dim() as f32).sqrt(),
            causal: false,
            window: None,
            softcap: None,
            sequences,
        };
        Ok(EncoderInput { attention: Arc::new(attention) })
    }

    fn embed(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let mut sum = kernels::add(
            &self.words.forward(batch.ids, ctx)?,
            &self.positions.forward(&self.position_ids(batch)?, ctx)?,
        )?;
        if let Some(types) = &self.types {
            let zeros: Vec<u32>;
            let ids = if batch.types.is_empty() {
                zeros = vec![0; batch.ids.len()];
                zeros.as_slice()
            } else {
                batch.types
            };
            sum = kernels::add(&sum, &types.forward(ids, ctx)?)?;
        }
        self.norm.forward(&sum, ctx)
    }

    fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, i: usize, hidden: &Tensor, input: &EncoderInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        let block =
            self.blocks.get(i).ok_or_else(|| Error::msg(format!("block {i} of a model with {}", self.blocks.len())))?;
        block.forward(hidden, input, &self.config, ctx).with_context(|| format!("block {i}"))
    }

    fn last_block(&self, hidden: &Tensor, rows: &ReadRows, input: &EncoderInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        let block = self.blocks.last().ok_or_else(|| Error::msg("a model without blocks"))?;
        block.forward_rows(hidden, rows, input, &self.config, ctx).context("the last block")
    }

    fn final_norm(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let act = match self.config.family.head_activation {
            HeadActivation::Tanh => kernels::Activation::Tanh,
            HeadActivation::Relu => kernels::Activation::Relu,
        };
        Ok(activation(&self.head_dense.forward(hidden, ctx)?, act)?)
    }

    fn logits(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        self.head_out.forward(hidden, ctx)
    }

    /// None: the output layer has a bias, and is trained whole in nearly every run.
    fn plain_head(&self, _: &Ctx<'_>) -> Option<(&FrozenWeight, Option<f32>)> {
        None
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }
}
