//! The shared decoder skeleton: blocks of causal attention and an MLP, put together as a family's
//! [`DecoderLayout`](crate::config::DecoderLayout) says, every linear, norm and embedding a site under the name that
//! transformers gives it.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::{self, AttentionPlan, FrozenWeight, RotaryLayout, RotaryPlan, SequenceSpan};
use peft_core::{
    AdapterSet, BaseLayer, BaseModel, Context, Ctx, Error, FrozenEmbedding, FrozenLinear, FrozenNorm, NormKind,
    PromptDims, ReadRows, Result, Route, Segmented, SiteId, SiteKind, SiteTable, Stored, SublayerSite, Task,
    TokenBatch, VirtualSpans, sublayer_sites,
};

use self::block::Block;
use self::source::BodySource;
use crate::config::{DecoderConfig, Norm, RopeConfig};
use crate::kv_cache::LayerCache;
use crate::learned_positions::{LearnedPositions, check_length};
use crate::loader::Loader;
use crate::rope::RopeTable;
use crate::source::{Placement, WeightSource};
use crate::virtual_rows::{Layout, VirtualRows};

mod attention;
mod block;
mod mixture;
mod source;

/// A decoder-only language model, or one with a head on the last token or on every one (`LlamaForSequenceClassification`,
/// `LlamaForTokenClassification`).
#[derive(Debug)]
pub struct Decoder {
    config: DecoderConfig,
    sites: Arc<SiteTable>,
    embed: FrozenEmbedding,
    /// What embeddings are multiplied with, `[hidden]`.
    embedding_scale: Option<Tensor>,
    /// Learned positions.
    positions: Option<LearnedPositions>,
    blocks: Vec<Block>,
    norm: FrozenNorm,
    head: FrozenLinear,
    tied: bool,
    ropes: Vec<RopeTable>,
    /// Which of them each kind of layers has.
    rope_of_kind: Vec<Option<usize>>,
    device: Device,
    dtype: DType,
}

/// What all blocks share of one batch.
#[derive(Debug, Clone)]
pub struct DecoderInput {
    /// What the layers of each kind do with it.
    kinds: Vec<KindInput>,
    virtual_rows: VirtualRows,
}

impl DecoderInput {
    /// Where the rows of each sequence lie, which is the same for all kinds.
    fn sequences(&self) -> &[SequenceSpan] {
        self.kinds.first().map_or(&[], |kind| &kind.attention.sequences)
    }
}

#[derive(Debug, Clone)]
struct KindInput {
    attention: Arc<AttentionPlan>,
    rotary: Option<Arc<RotaryPlan>>,
}

/// A linear layer of a block.
fn linear(
    l: &mut Loader<'_>,
    c: &DecoderConfig,
    path: &str,
    inp: usize,
    out: usize,
    bias: bool,
) -> Result<FrozenLinear> {
    if c.family.layout.conv1d { l.conv1d(path, inp, out, bias) } else { l.linear(path, inp, out, bias) }
}

/// A norm of the family's kind.
fn norm(l: &mut Loader<'_>, c: &DecoderConfig, path: &str, dim: usize) -> Result<FrozenNorm> {
    let kind = match c.family.layout.norm {
        Norm::Rms => NormKind::Rms { offset: 0.0 },
        Norm::RmsFromOne => NormKind::Rms { offset: 1.0 },
        Norm::Layer => NormKind::Layer,
    };
    l.norm(path, dim, kind, c.norm_eps)
}

/// A prefix that takes no positions is seen by every token; one that is seen as far as a window reaches stands in these.
fn check_window(window: usize, sequences: &[SequenceSpan], rows: &VirtualRows) -> Result<()> {
    let beyond = |(i, span): (usize, &SequenceSpan)| {
        !span.prefix.is_empty() && !rows.moves_positions(i) && span.prefix.len() + span.keys.len() > window
    };
    match sequences.iter().enumerate().find(|(i, span)| beyond((*i, *span))) {
        None => Ok(()),
        Some((_, span)) => Err(Error::msg(format!(
            "a prefix of {} with moves_positions = false is seen by all tokens, and in this model they see no more than the last \
             {window}: cut rows to data.max_length = {}, or use a prefix that moves positions",
            span.prefix.len(),
            window.saturating_sub(span.prefix.len())
        ))),
    }
}

impl Decoder {
    /// Loads the model that `config` describes from `source`.
    ///
    /// # Errors
    /// A missing tensor or a wrong shape, by its name.
    pub fn load(config: DecoderConfig, source: &dyn WeightSource, placement: &Placement) -> Result<Self> {
        let c = &config;
        let layout = &c.family.layout;
        // What transformers calls the base model: all of the body's path but for OPT, whose body is in it.
        let source = BodySource::new(source, layout.body.split('.').next().unwrap_or_default());
        let mut l = Loader::new(&source, placement);

        let (vocab, dim, body) = (c.vocab_size, c.hidden_size, layout.body);
        let embed = l.embedding(&format!("{body}.{}", layout.embedding), vocab, dim)?;
        let embedding_scale = match layout.scaled_embeddings {
            true => Some(Tensor::full((dim as f64).sqrt() as f32, dim, &placement.device)?),
            false => None,
        };
        let positions = layout.positions.map(|name| {
            let path = format!("{body}.{name}");
            LearnedPositions::load(&mut l, &path, c.max_position_embeddings, layout.position_offset, dim)
        });

        let mut blocks = Vec::with_capacity(c.num_hidden_layers);
        for i in 0..c.num_hidden_layers {
            l.segment = i + 1;
            blocks.push(Block::load(&mut l, c, i, &format!("{body}.{}.{i}", layout.blocks))?);
        }

        l.segment = c.num_hidden_layers + 1;
        let norm = norm(&mut l, c, &format!("{body}.{}", layout.final_norm), dim)?;
        let tied = c.tie_word_embeddings && c.labels.is_none();
        let head = match &c.labels {
            Some(labels) => {
                let (path, bias) = c.head_out();
                l.linear(path, dim, labels.len(), bias)?
            }
            None => {
                let alias = layout.head_alias.map(|name| format!("{name}.weight")).filter(|name| source.contains(name));
                let name = alias.as_deref().unwrap_or("lm_head.weight");
                let weight = if tied { embed.weight().clone() } else { source.weight(name, (vocab, dim))? };
                let kind = SiteKind::Linear { in_features: dim, out_features: vocab, bias: false };
                let site = l.sites.register("lm_head", kind, l.segment);
                l.sites.mark_output_head(site);
                l.sites.set_stored(site, Stored { name: layout.head_alias.map(Cow::Borrowed), ..Stored::default() });
                FrozenLinear::new(site, "lm_head", weight, None)?
            }
        };

        let mut ropes: Vec<(&RopeConfig, RopeTable)> = Vec::new();
        let mut rope_of_kind = Vec::with_capacity(c.layer_kinds.len());
        for kind in &c.layer_kinds {
            rope_of_kind.push(match &kind.rope {
                None => None,
                Some(rope) => match ropes.iter().position(|(known, _)| *known == rope) {
                    Some(known) => Some(known),
                    None => {
                        ropes.push((rope, RopeTable::new(rope, c.head_dim, 0, &placement.device)?));
                        Some(ropes.len() - 1)
                    }
                },
            });
        }
        let ropes = ropes.into_iter().map(|(_, table)| table).collect();
        Ok(Self {
            sites: Arc::new(l.sites),
            embed,
            embedding_scale,
            positions: positions.transpose()?,
            blocks,
            norm,
            head,
            tied,
            ropes,
            rope_of_kind,
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
        let positions = self.positions.as_ref().map_or(0, |p| p.table().weight().nbytes());
        let experts = self.blocks.iter().flat_map(Block::experts).flat_map(|e| e.weights().iter());
        self.embed.weight().nbytes() + positions + blocks + head + experts.map(FrozenWeight::nbytes).sum::<usize>()
    }

    /// Parameters of the base; a tied table counts once.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        let size = |w: &FrozenWeight| w.out_features() * w.in_features();
        let vector = |bias: Option<&Tensor>| bias.map_or(0, Tensor::elem_count);
        let linear = |l: &FrozenLinear| size(l.weight()) + vector(l.bias());
        let norm = |n: &FrozenNorm| n.weight().elem_count() + vector(n.bias());
        let head = if self.tied { 0 } else { linear(&self.head) };
        let tables = self.tables().map(|e| size(e.weight())).sum::<usize>();
        let norms = self.blocks.iter().flat_map(Block::norms).chain([&self.norm]).map(norm).sum::<usize>();
        let experts = self.blocks.iter().flat_map(Block::experts).flat_map(|e| e.weights().iter());
        tables
            + head
            + norms
            + experts.map(size).sum::<usize>()
            + self.blocks.iter().flat_map(Block::linears).map(linear).sum::<usize>()
    }

    /// The embedding, and the table of positions.
    fn tables(&self) -> impl Iterator<Item = &FrozenEmbedding> {
        std::iter::once(&self.embed).chain(self.positions.as_ref().map(LearnedPositions::table))
    }

    /// What rotary frequencies depend on in a pass whose longest sequence has `length` positions, virtual ones among them
    /// ([`RopeTable::regime`]): sequences of different regimes have to run in passes of their own to be turned as each is alone.
    #[must_use]
    pub fn rope_regime(&self, length: usize) -> Vec<usize> {
        self.ropes.iter().map(|table| table.regime(length)).collect()
    }

    /// Prepares a step of cached decoding: the new tokens are the `queries` of the sequences, at the end of their `keys`,
    /// which are, like their `prefix`, ranges of the cache's rows. Positions count virtual tokens. Prefixes that are another thing
    /// for each sequence are written by the blocks; the others are there.
    ///
    /// # Errors
    /// When a position is beyond what the rope table can hold.
    pub fn prepare_cached(
        &self,
        positions: &[u32],
        sequences: Vec<SequenceSpan>,
        virtual_tokens: VirtualSpans,
    ) -> Result<DecoderInput> {
        self.input(positions, sequences, VirtualRows::new(virtual_tokens, None, None))
    }

    fn input(
        &self,
        positions: &[u32],
        sequences: Vec<SequenceSpan>,
        virtual_rows: VirtualRows,
    ) -> Result<DecoderInput> {
        let c = &self.config;
        let longest = positions.iter().max().map_or(0, |&p| p as usize + 1);
        check_length(longest, c.learned_positions())?;
        if let Some(window) = c.layer_kinds.iter().filter_map(|kind| kind.window).min() {
            check_window(window, &sequences, &virtual_rows)?;
        }
        let turned = |table: &RopeTable| {
            let table = table.up_to(longest)?;
            RotaryPlan::new(&table.cos, &table.sin, positions, c.head_dim, RotaryLayout::Half)
        };
        let turned = self.ropes.iter().map(turned).collect::<candle_core::Result<Vec<_>>>()?;
        let kinds = c.layer_kinds.iter().zip(&self.rope_of_kind).map(|(kind, rope)| {
            let attention = AttentionPlan {
                heads: c.num_attention_heads,
                kv_heads: c.num_key_value_heads,
                head_dim: c.head_dim,
                scale: c.attention_scale() as f32,
                causal: true,
                window: kind.window,
                softcap: c.attn_logit_softcapping.map(|x| x as f32),
                sequences: sequences.clone(),
            };
            KindInput { attention: Arc::new(attention), rotary: rope.and_then(|i| turned.get(i)).cloned() }
        });
        Ok(DecoderInput { kinds: kinds.collect(), virtual_rows })
    }

    /// Embeddings `[ids.len(), hidden]` of tokens alone, without prompts and learned positions.
    ///
    /// # Errors
    /// When an id is outside the vocabulary or a tensor operation fails.
    pub fn embed_tokens(&self, ids: &[u32], ctx: &Ctx<'_>) -> Result<Tensor> {
        let rows = self.embed.forward(ids, ctx)?;
        match &self.embedding_scale {
            Some(scale) => Ok(kernels::scale_columns(&rows, scale)?),
            None => Ok(rows),
        }
    }

    /// `rows` with learned positions added, where the model has them; `ctx` is that of all rows, prompts among them.
    ///
    /// # Errors
    /// When a position is outside the model's table or a tensor operation fails.
    pub fn add_positions(&self, rows: Tensor, positions: &[u32], ctx: &Ctx<'_>) -> Result<Tensor> {
        match &self.positions {
            Some(learned) => learned.add_to(&rows, positions, ctx),
            None => Ok(rows),
        }
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
        self.block_at(i)?.forward(hidden, input, ctx, Some(cache))
    }

    /// The cap on logits over the vocabulary; transformers caps no class head's.
    fn logit_cap(&self) -> Option<f64> {
        self.config.final_logit_softcapping.filter(|_| self.config.labels.is_none())
    }

    fn block_path(&self, i: usize) -> String {
        format!("{}.{}.{i}", self.config.family.layout.body, self.config.family.layout.blocks)
    }

    fn block_at(&self, i: usize) -> Result<&Block> {
        self.blocks.get(i).ok_or_else(|| Error::msg(format!("block {i} of a model with {}", self.blocks.len())))
    }
}

impl BaseModel for Decoder {
    fn sites(&self) -> &Arc<SiteTable> {
        &self.sites
    }

    fn layer(&self, site: SiteId) -> Result<BaseLayer<'_>> {
        let mut tables = self.tables();
        let found = if let Some(table) = tables.find(|e| e.site() == site) {
            Some(BaseLayer::Embedding(table))
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
            submodules: 1,
            prefixes: true,
        })
    }

    fn sublayers(&self) -> Vec<SublayerSite> {
        // A method that stands at the ends stands at those of all blocks, or of none.
        let ends: Option<Vec<_>> = self.blocks.iter().map(Block::ends).collect();
        sublayer_sites(ends.into_iter().flatten(), self.config.hidden_size)
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
        for prompt in &mut rows {
            *prompt = prompt.to_dtype(own.dtype())?;
        }
        rows.insert(0, own);
        let rows = match rows.as_slice() {
            [own] => own.clone(),
            rows => Tensor::cat(rows, 0)?,
        };
        if self.positions.is_none() {
            return Ok(rows);
        }
        let layout = Layout::of(batch, ctx)?;
        self.add_positions(rows, &layout.positions, &layout.rows.ctx(ctx))
    }

    fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, i: usize, hidden: &Tensor, input: &DecoderInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        let ctx = input.virtual_rows.ctx(ctx);
        let block = self.block_at(i)?.forward(hidden, input, &ctx, None);
        block.with_context(|| self.block_path(i))
    }

    fn last_block(&self, hidden: &Tensor, rows: &ReadRows, input: &DecoderInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        let (last, ctx) = (self.blocks.len().saturating_sub(1), input.virtual_rows.ctx(ctx));
        let block = self.block_at(last)?;
        let made = if block.reads_sequences(&ctx) {
            block.forward(hidden, input, &ctx, None).and_then(|made| rows.of(&made))
        } else {
            block.forward_rows(hidden, rows, input, &ctx)
        };
        made.with_context(|| self.block_path(last))
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
        match self.logit_cap() {
            Some(cap) => Ok(((logits / cap)?.tanh()? * cap)?),
            None => Ok(logits),
        }
    }

    fn plain_head(&self, ctx: &Ctx<'_>) -> Option<(&FrozenWeight, Option<f32>)> {
        let plain = self.head.is_plain(ctx) && !(self.tied && self.embed.changes_tied_head(ctx));
        plain.then(|| (self.head.weight(), self.logit_cap().map(|c| c as f32)))
    }

    fn keys_values(&self, i: usize, hidden: &Tensor) -> Result<[Tensor; 3]> {
        let rows = hidden.dim(0)?;
        let positions: Vec<u32> = (0..rows as u32).collect();
        let sequence = SequenceSpan { queries: 0..rows, keys: 0..rows, prefix: 0..0 };
        let input = self.prepare_cached(&positions, vec![sequence], VirtualSpans::default())?;
        let mut cache = LayerCache::new(rows, self.config.key_value_size(), self.dtype, &self.device)?;
        let set = AdapterSet::empty();
        let ctx = Ctx::eval(&set, &Route::Base);
        let above = self.block_cached(i, &hidden.to_dtype(self.dtype)?, &input, &ctx, &mut cache)?;
        Ok([above, cache.keys().clone(), cache.values().clone()])
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }
}
