//! The shared encoder skeleton: summed embeddings, post-norm blocks of bidirectional attention and an MLP, and a head
//! on the first token or on every one (Devlin et al. 2018, arXiv:1810.04805). Every linear, norm and embedding is a site under the
//! name that transformers gives it.
//!
//! Virtual tokens stand where PEFT puts them. A prompt is put in front of the words' embeddings and takes the first positions, so
//! that the class is read from its first row instead of that of `[CLS]`; tokens see it both ways, and every sequence has rows of
//! its own for it. A prefix moves positions alone.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::{self, AttentionPlan, FrozenWeight, SequenceSpan, activation, attention};
use peft_core::{
    BaseLayer, BaseModel, Context, Ctx, Error, FrozenEmbedding, FrozenLinear, FrozenNorm, Join, NormKind, PromptDims,
    ReadRows, Result, Segmented, SiteId, SiteTable, SublayerSite, Task, TokenBatch, VirtualSpans, sublayer_sites,
};

use crate::config::{EncoderConfig, HeadActivation};
use crate::loader::Loader;
use crate::prompted::Prompted;
use crate::source::{Placement, RandomSource, WeightSource};
use crate::virtual_rows::VirtualRows;

/// An encoder with a head.
#[derive(Debug)]
pub struct Encoder {
    config: EncoderConfig,
    sites: Arc<SiteTable>,
    words: FrozenEmbedding,
    positions: FrozenEmbedding,
    types: Option<FrozenEmbedding>,
    norm: FrozenNorm,
    blocks: Vec<Block>,
    /// Of a head that reads a whole sequence.
    head_dense: Option<FrozenLinear>,
    head_out: FrozenLinear,
    fresh: Vec<String>,
    device: Device,
    dtype: DType,
}

#[derive(Debug)]
struct Block {
    layer: usize,
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
    virtual_rows: VirtualRows,
    /// The first token of each sequence, and how many rows of prompts stand in front of the sequence's own.
    moved: Vec<(u32, u32)>,
}

impl EncoderInput {
    /// `rows` of the batch, each at the same place of its sequence with the prompt.
    fn with_prompts(&self, rows: &ReadRows) -> ReadRows {
        rows.at(|row| {
            let behind = self.moved.partition_point(|(first, _)| *first <= row);
            let by = behind.checked_sub(1).and_then(|sequence| self.moved.get(sequence)).map_or(0, |(_, by)| *by);
            row.saturating_add(by)
        })
    }
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
            blocks.push(Block::load(&mut l, c, i, &format!("{body}.{}.{i}", names.blocks))?);
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
        let head_dense = c.head_dense().map(|path| head(path, hidden)).transpose()?;
        let head_out = head(c.head_out(), c.labels.len())?;
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
        self.blocks.iter().flat_map(Block::linears).chain(&self.head_dense).chain([&self.head_out])
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

    /// The row of the position table for each row of the sequences. RoBERTa counts from behind the padding token's, which
    /// padding tokens have themselves (`create_position_ids_from_input_ids`); behind a prompt it cannot tell them apart
    /// (`create_position_ids_from_inputs_embeds`).
    fn position_ids(&self, batch: TokenBatch<'_>, sequences: &Prompted<'_>) -> Vec<u32> {
        let (first, padding) = (self.config.first_position() as u32, self.config.pad_token_id);
        let mut positions = Vec::with_capacity(batch.ids.len());
        for (i, own) in sequences.tokens.iter().enumerate() {
            let prompt = sequences.prompt_length(i);
            if prompt > 0 {
                positions.extend((first..).take(prompt + own.len()));
                continue;
            }
            let mut next = first + sequences.prefix_positions(i) as u32;
            for &id in batch.ids.get(own.clone()).unwrap_or_default() {
                let is_padding = self.config.family.positions_after_padding && id == padding;
                positions.push(if is_padding { padding } else { next });
                next += u32::from(!is_padding);
            }
        }
        positions
    }
}

/// The type of each row of the sequences: 0 for those of prompts, and where the batch says none.
fn token_types(batch: TokenBatch<'_>, sequences: &Prompted<'_>) -> Vec<u32> {
    let mut types = Vec::with_capacity(batch.ids.len());
    for (i, own) in sequences.tokens.iter().enumerate() {
        types.extend(std::iter::repeat_n(0, sequences.prompt_length(i)));
        match batch.types.get(own.clone()) {
            Some(of_tokens) => types.extend_from_slice(of_tokens),
            None => types.extend(std::iter::repeat_n(0, own.len())),
        }
    }
    types
}

impl Block {
    /// Loads layer `layer`, whose modules are under `path`, in the order of the forward pass.
    fn load(l: &mut Loader<'_>, c: &EncoderConfig, layer: usize, path: &str) -> Result<Self> {
        let (hidden, inner, names) = (c.hidden_size, c.intermediate_size, &c.family.names);
        let [q, k, v, o] = names.attention;
        let [up, down] = names.mlp;
        Ok(Self {
            layer,
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
        let ctx = &Ctx { sequences: &input.attention.sequences, ..*ctx };
        let [q, k, v] = FrozenLinear::forward_siblings([&self.q, &self.k, &self.v], hidden, ctx)?;
        let (k, v) = input.virtual_rows.extend(self.layer, hidden, (k, v), ctx)?;
        let attended = attention(&q, &k, &v, &input.attention)?;
        self.behind_attention(&attended, hidden, c, ctx)
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
        let ctx = &Ctx { sequences: &input.attention.sequences, ..*ctx };
        let [k, v] = FrozenLinear::forward_siblings([&self.k, &self.v], hidden, ctx)?;
        let (k, v) = input.virtual_rows.extend(self.layer, hidden, (k, v), ctx)?;
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

    fn prompt_dims(&self) -> Option<PromptDims> {
        let c = &self.config;
        Some(PromptDims {
            layers: c.num_hidden_layers,
            hidden_size: c.hidden_size,
            attention_heads: c.num_attention_heads,
            key_value_heads: c.num_attention_heads,
            head_dim: c.head_dim(),
            max_positions: c.max_length(),
            submodules: 1,
            prefixes: c.family.prefixes,
        })
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

    fn prepare(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<EncoderInput> {
        let c = &self.config;
        let virtual_tokens = VirtualSpans::of(batch.bounds, ctx)?;
        let prompted = Prompted { tokens: batch.sequences()?.collect(), virtual_tokens: &virtual_tokens };
        let rows = prompted.rows();
        let prefixes = virtual_tokens.prefix_rows(rows.last().map_or(0, |last| last.end));
        let mut sequences = Vec::with_capacity(rows.len());
        let mut moved = Vec::with_capacity(rows.len());
        for (i, (tokens, rows)) in prompted.tokens.iter().zip(&rows).enumerate() {
            let prefix = virtual_tokens.rows_of_sequence(i, &prefixes);
            let (length, most) = (prompted.prefix_positions(i) + rows.len(), c.max_length());
            if length > most {
                let (of_them, room) = match length - tokens.len() {
                    0 => (String::new(), most),
                    n => (format!(" ({n} virtual ones among them)"), most.saturating_sub(n)),
                };
                return Err(Error::msg(format!(
                    "a sequence of {length} tokens{of_them} is longer than the model's {most} positions; cut rows to \
                     data.max_length = {room}"
                )));
            }
            if c.kind.is_of_tokens() && rows.len() > tokens.len() {
                return Err(Error::msg(format!(
                    "a head for {} reads every token, and a prompt in front of them has no labels (PEFT does not line them up \
                     either): use a prefix or another method",
                    c.kind
                )));
            }
            moved.push((tokens.start as u32, (rows.start - tokens.start) as u32));
            sequences.push(SequenceSpan { queries: rows.clone(), keys: rows.clone(), prefix });
        }
        let (route, first) = (prompted.route(ctx.route, 0), prompted.first_pass(ctx.first)?);
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
        Ok(EncoderInput {
            attention: Arc::new(attention),
            virtual_rows: VirtualRows::new(virtual_tokens, route, first),
            moved,
        })
    }

    fn embed(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let virtual_tokens = VirtualSpans::of(batch.bounds, ctx)?;
        let prompted = Prompted { tokens: batch.sequences()?.collect(), virtual_tokens: &virtual_tokens };
        let words = prompted.with_prompts(self.words.forward(batch.ids, ctx)?, ctx)?;
        let route = prompted.route(ctx.route, 0);
        let ctx = Ctx { route: route.as_ref().unwrap_or(ctx.route), ..*ctx };
        let positions = self.position_ids(batch, &prompted);
        let mut sum = kernels::add(&words, &self.positions.forward(&positions, &ctx)?)?;
        if let Some(types) = &self.types {
            sum = kernels::add(&sum, &types.forward(&token_types(batch, &prompted), &ctx)?)?;
        }
        self.norm.forward(&sum, &ctx)
    }

    fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, i: usize, hidden: &Tensor, input: &EncoderInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        let block =
            self.blocks.get(i).ok_or_else(|| Error::msg(format!("block {i} of a model with {}", self.blocks.len())))?;
        let ctx = input.virtual_rows.ctx(ctx);
        block.forward(hidden, input, &self.config, &ctx).with_context(|| format!("block {i}"))
    }

    fn last_block(&self, hidden: &Tensor, rows: &ReadRows, input: &EncoderInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        let block = self.blocks.last().ok_or_else(|| Error::msg("a model without blocks"))?;
        let (rows, ctx, c) = (input.with_prompts(rows), input.virtual_rows.ctx(ctx), &self.config);
        let made = if block.linears().iter().any(|layer| layer.reads_sequences(&ctx)) {
            block.forward(hidden, input, c, &ctx).and_then(|made| rows.of(&made))
        } else {
            block.forward_rows(hidden, &rows, input, c, &ctx)
        };
        made.context("the last block")
    }

    fn final_norm(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let act = match self.config.family.head_activation {
            HeadActivation::Tanh => kernels::Activation::Tanh,
            HeadActivation::Relu => kernels::Activation::Relu,
        };
        let Some(dense) = &self.head_dense else { return Ok(hidden.clone()) };
        Ok(activation(&dense.forward(hidden, ctx)?, act)?)
    }

    fn last_hidden_state(&self, hidden: &Tensor, _: &Ctx<'_>) -> Result<Tensor> {
        Ok(hidden.clone())
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
