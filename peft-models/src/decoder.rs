//! The shared decoder skeleton: pre-norm blocks of causal attention and a gated MLP, every linear, norm and embedding a
//! site under the name that transformers gives it.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::{
    self, AttentionPlan, FrozenWeight, RotaryLayout, RotaryPlan, SequenceSpan, attention, gated_activation, rotary,
};
use peft_core::{
    BaseLayer, BaseModel, Context, Ctx, Error, FrozenEmbedding, FrozenLinear, FrozenNorm, Join, NormKind, PromptDims, Result,
    Segmented, SiteId, SiteKind, SiteTable, SublayerSite, Task, TokenBatch, VirtualSpans, sublayer_sites,
};

use crate::config::DecoderConfig;
use crate::kv_cache::LayerCache;
use crate::loader::Loader;
use crate::rope::RopeTable;
use crate::source::{Placement, WeightSource};
use crate::virtual_rows::{Layout, VirtualRows};

/// A decoder-only language model, or one with a class head on the last token (`LlamaForSequenceClassification`).
#[derive(Debug)]
pub struct Decoder {
    config: DecoderConfig,
    sites: Arc<SiteTable>,
    embed: FrozenEmbedding,
    blocks: Vec<Block>,
    norm: FrozenNorm,
    head: FrozenLinear,
    tied: bool,
    rope: RopeTable,
    device: Device,
    dtype: DType,
}

#[derive(Debug)]
struct Block {
    index: usize,
    input_norm: FrozenNorm,
    q: FrozenLinear,
    k: FrozenLinear,
    v: FrozenLinear,
    o: FrozenLinear,
    post_norm: FrozenNorm,
    gate: FrozenLinear,
    up: FrozenLinear,
    down: FrozenLinear,
}

/// What all blocks share of one batch.
#[derive(Debug, Clone)]
pub struct DecoderInput {
    attention: Arc<AttentionPlan>,
    rotary: Arc<RotaryPlan>,
    virtual_rows: VirtualRows,
}

impl Decoder {
    /// Loads the model that `config` describes from `source`.
    ///
    /// # Errors
    /// A missing tensor or a wrong shape, by its name.
    pub fn load(config: DecoderConfig, source: &dyn WeightSource, placement: &Placement) -> Result<Self> {
        let c = &config;
        let mut l = Loader::new(source, placement);

        let (vocab, dim) = (c.vocab_size, c.hidden_size);
        let embed = l.embedding("model.embed_tokens", vocab, dim)?;

        let mut blocks = Vec::with_capacity(c.num_hidden_layers);
        for i in 0..c.num_hidden_layers {
            l.segment = i + 1;
            blocks.push(Block::load(&mut l, c, i, &format!("model.layers.{i}"))?);
        }

        l.segment = c.num_hidden_layers + 1;
        let norm = l.norm("model.norm", dim, NormKind::Rms { offset: 0.0 }, c.rms_norm_eps)?;
        let tied = c.tie_word_embeddings && c.labels.is_none();
        let head = match &c.labels {
            Some(labels) => l.linear("score", dim, labels.len(), false)?,
            None => {
                let weight =
                    if tied { embed.weight().clone() } else { source.weight("lm_head.weight", (vocab, dim))? };
                let kind = SiteKind::Linear { in_features: dim, out_features: vocab, bias: false };
                let site = l.sites.register("lm_head", kind, l.segment);
                l.sites.mark_output_head(site);
                FrozenLinear::new(site, "lm_head", weight, None)?
            }
        };

        let rope = RopeTable::new(c, 0, &placement.device)?;
        Ok(Self {
            sites: Arc::new(l.sites),
            embed,
            blocks,
            norm,
            head,
            tied,
            rope,
            device: placement.device.clone(),
            dtype: placement.activations,
            config,
        })
    }

    /// The model's configuration.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Bytes of all frozen weights; a tied table counts once.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        let head = if self.tied { 0 } else { self.head.weight().nbytes() };
        let blocks: usize = self.blocks.iter().flat_map(Block::linears).map(|l| l.weight().nbytes()).sum();
        self.embed.weight().nbytes() + blocks + head
    }

    /// Parameters of the base; a tied table counts once.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        let size = |w: &FrozenWeight| w.out_features() * w.in_features();
        let linear = |l: &FrozenLinear| size(l.weight()) + l.bias().map_or(0, Tensor::elem_count);
        let head = if self.tied { 0 } else { linear(&self.head) };
        let norms = (2 * self.blocks.len() + 1) * self.config.hidden_size;
        size(self.embed.weight())
            + head
            + norms
            + self.blocks.iter().flat_map(Block::linears).map(linear).sum::<usize>()
    }

    /// Prepares a step of cached decoding: the new tokens are the `queries` of the sequences, at the end of their `keys`,
    /// which are, like their `prefix`, ranges of the cache's rows. Positions count virtual tokens.
    ///
    /// # Errors
    /// When a position is beyond what the rope table can hold.
    pub fn prepare_cached(&self, positions: &[u32], sequences: Vec<SequenceSpan>) -> Result<DecoderInput> {
        self.input(positions, sequences, VirtualRows::default())
    }

    fn input(
        &self,
        positions: &[u32],
        sequences: Vec<SequenceSpan>,
        virtual_rows: VirtualRows,
    ) -> Result<DecoderInput> {
        let c = &self.config;
        let longest = positions.iter().max().map_or(0, |&p| p as usize + 1);
        let table = self.rope.up_to(longest)?;
        let rotary = RotaryPlan::new(&table.cos, &table.sin, positions, c.head_dim, RotaryLayout::Half)?;
        let attention = AttentionPlan {
            heads: c.num_attention_heads,
            kv_heads: c.num_key_value_heads,
            head_dim: c.head_dim,
            scale: 1.0 / (c.head_dim as f32).sqrt(),
            causal: true,
            window: c.sliding_window,
            softcap: c.attn_logit_softcapping.map(|x| x as f32),
            sequences,
        };
        Ok(DecoderInput { attention: Arc::new(attention), rotary, virtual_rows })
    }

    /// Embeddings `[ids.len(), hidden]` of tokens alone, without prompts.
    ///
    /// # Errors
    /// When an id is outside the vocabulary or a tensor operation fails.
    pub fn embed_tokens(&self, ids: &[u32], ctx: &Ctx<'_>) -> Result<Tensor> {
        self.embed.forward(ids, ctx)
    }

    /// Runs block `i` with its keys and values appended to `cache`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn block_cached(
        &self,
        i: usize,
        hidden: &Tensor,
        input: &DecoderInput,
        ctx: &Ctx<'_>,
        cache: &mut LayerCache,
    ) -> Result<Tensor> {
        self.block_at(i)?.forward(hidden, input, &self.config, ctx, Some(cache))
    }

    fn block_at(&self, i: usize) -> Result<&Block> {
        self.blocks.get(i).ok_or_else(|| Error::msg(format!("block {i} of a model with {}", self.blocks.len())))
    }
}

impl Block {
    fn load(l: &mut Loader<'_>, c: &DecoderConfig, index: usize, path: &str) -> Result<Self> {
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let (rms, eps) = (NormKind::Rms { offset: 0.0 }, c.rms_norm_eps);
        let (query, key_value) = (c.query_size(), c.key_value_size());
        Ok(Self {
            index,
            input_norm: l.norm(&format!("{path}.input_layernorm"), hidden, rms, eps)?,
            q: l.linear(&format!("{path}.self_attn.q_proj"), hidden, query, c.attention_bias)?,
            k: l.linear(&format!("{path}.self_attn.k_proj"), hidden, key_value, c.attention_bias)?,
            v: l.linear(&format!("{path}.self_attn.v_proj"), hidden, key_value, c.attention_bias)?,
            o: l.linear(&format!("{path}.self_attn.o_proj"), query, hidden, c.attention_bias)?,
            post_norm: l.norm(&format!("{path}.post_attention_layernorm"), hidden, rms, eps)?,
            gate: l.linear(&format!("{path}.mlp.gate_proj"), hidden, inner, c.mlp_bias)?,
            up: l.linear(&format!("{path}.mlp.up_proj"), hidden, inner, c.mlp_bias)?,
            down: l.linear(&format!("{path}.mlp.down_proj"), inner, hidden, c.mlp_bias)?,
        })
    }

    fn linears(&self) -> [&FrozenLinear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    fn layer(&self, site: SiteId) -> Option<BaseLayer<'_>> {
        let linear = self.linears().into_iter().find(|l| l.site() == site).map(BaseLayer::Linear);
        let norms = [&self.input_norm, &self.post_norm];
        linear.or_else(|| norms.into_iter().find(|n| n.site() == site).map(BaseLayer::Norm))
    }

    fn forward(
        &self,
        hidden: &Tensor,
        input: &DecoderInput,
        c: &DecoderConfig,
        ctx: &Ctx<'_>,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let x = self.input_norm.forward(hidden, ctx)?;
        let attended = self.attend(&x, input, ctx, cache)?;
        let hidden = self.o.join(&Join { output: &attended, residual: hidden, norm: None }, ctx)?;
        let x = self.post_norm.forward(&hidden, ctx)?;
        let [gate, up] = FrozenLinear::forward_siblings([&self.gate, &self.up], &x, ctx)?;
        let inner = gated_activation(&gate, &up, c.hidden_act.into())?;
        let output = self.down.forward(&inner, ctx)?;
        self.down.join(&Join { output: &output, residual: &hidden, norm: None }, ctx)
    }

    fn attend(
        &self,
        x: &Tensor,
        input: &DecoderInput,
        ctx: &Ctx<'_>,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let [q, k, v] = FrozenLinear::forward_siblings([&self.q, &self.k, &self.v], x, ctx)?;
        let q = rotary(&q, &input.rotary)?;
        let k = rotary(&k, &input.rotary)?;
        let out = match cache {
            None => {
                let (k, v) = input.virtual_rows.extend(self.index, k, v, ctx)?;
                attention(&q, &k, &v, &input.attention)?
            }
            Some(cache) => {
                cache.append(&k, &v, &input.attention.sequences)?;
                attention(&q, cache.keys(), cache.values(), &input.attention)?
            }
        };
        self.o.forward(&out, ctx)
    }
}

impl BaseModel for Decoder {
    fn sites(&self) -> &Arc<SiteTable> {
        &self.sites
    }

    fn layer(&self, site: SiteId) -> Result<BaseLayer<'_>> {
        let found = if self.embed.site() == site {
            Some(BaseLayer::Embedding(&self.embed))
        } else if self.norm.site() == site {
            Some(BaseLayer::Norm(&self.norm))
        } else if self.head.site() == site {
            Some(BaseLayer::Linear(&self.head))
        } else {
            let segment = self.sites.get(site).map_or(0, |s| s.segment);
            segment.checked_sub(1).and_then(|i| self.blocks.get(i)).and_then(|b| b.layer(site))
        };
        found.ok_or_else(|| Error::msg(format!("site {} is not one of the model's", site.0)))
    }

    fn model_type(&self) -> &str {
        self.config.model_type()
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn tied_embedding(&self) -> Option<&str> {
        self.tied.then(|| self.embed.path())
    }

    fn prompt_dims(&self) -> Option<PromptDims> {
        let c = &self.config;
        Some(PromptDims {
            layers: c.num_hidden_layers,
            hidden_size: c.hidden_size,
            attention_heads: c.num_attention_heads,
            key_value_heads: c.num_key_value_heads,
            head_dim: c.head_dim,
            max_positions: c.max_position_embeddings,
        })
    }

    fn sublayers(&self) -> Vec<SublayerSite> {
        let ends = self.blocks.iter().map(|b| (b.o.site(), b.down.site()));
        sublayer_sites(ends, self.config.hidden_size)
    }

    fn task(&self) -> Task {
        self.config.task()
    }
}

impl Segmented for Decoder {
    type Input = DecoderInput;

    fn prepare(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<DecoderInput> {
        let Layout { positions, sequences, rows } = Layout::of(batch, ctx)?;
        self.input(&positions, sequences, rows)
    }

    fn embed(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let own = self.embed_tokens(batch.ids, ctx)?;
        let mut rows = VirtualSpans::of(batch.bounds, ctx)?.prompts(ctx)?;
        if rows.is_empty() {
            return Ok(own);
        }
        for prompt in &mut rows {
            *prompt = prompt.to_dtype(own.dtype())?;
        }
        rows.insert(0, own);
        Ok(Tensor::cat(&rows, 0)?)
    }

    fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, i: usize, hidden: &Tensor, input: &DecoderInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        let ctx = input.virtual_rows.ctx(ctx);
        self.block_at(i)?.forward(hidden, input, &self.config, &ctx, None).with_context(|| format!("model.layers.{i}"))
    }

    fn final_norm(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        self.norm.forward(hidden, ctx)
    }

    fn logits(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let logits = if self.tied {
            self.embed.tied_logits(&self.head, hidden, ctx)?
        } else {
            self.head.forward(hidden, ctx)?
        };
        match self.config.final_logit_softcapping {
            Some(cap) => Ok(((logits / cap)?.tanh()? * cap)?),
            None => Ok(logits),
        }
    }

    fn plain_head(&self, ctx: &Ctx<'_>) -> Option<(&FrozenWeight, Option<f32>)> {
        let plain = self.head.is_plain(ctx) && !(self.tied && self.embed.changes_tied_head(ctx));
        plain.then(|| (self.head.weight(), self.config.final_logit_softcapping.map(|c| c as f32)))
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }
}

impl From<crate::config::Activation> for kernels::Activation {
    fn from(a: crate::config::Activation) -> Self {
        use crate::config::Activation as A;
        match a {
            A::Silu => Self::Silu,
            A::Gelu => Self::Gelu,
            A::GeluTanh => Self::GeluTanh,
            A::Relu => Self::Relu,
            A::ReluSquared => Self::ReluSquared,
            A::QuickGelu => Self::QuickGelu,
        }
    }
}
