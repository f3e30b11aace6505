//! The shared encoder–decoder skeleton: an encoder of the source, and a decoder of the target that attends to it
//! (Raffel et al. 2019, arXiv:1910.10683). Every linear, norm and embedding is a site under the name that transformers
//! gives it.
//!
//! Both are one chain of segments. The hidden states are the rows of all targets, then those of all sources; blocks of the
//! encoder change the latter and hand the former on, blocks of the decoder the other way round. So the block-wise backward
//! pass needs to know nothing of it, and the gradient of the encoder's result gathers on its rows from block to block.
//!
//! Virtual tokens stand where PEFT puts them: prompts in front of sources, where the encoder sees the source from them too, so
//! that every sequence has rows of its own for them; prefixes in the decoder's self-attention.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::{self, AttentionPlan, FrozenWeight, SequenceSpan};
use peft_core::{
    BaseLayer, BaseModel, Context, Ctx, Error, FrozenEmbedding, FrozenLinear, FrozenNorm, PromptDims, Result, Route,
    Segmented, SiteId, SiteKind, SiteTable, SublayerSite, Task, TokenBatch, VirtualSpans,
};

use self::attention::{Earlier, RelativeBias, SelfInput};
use self::block::{Block, Encoded, norm};
use self::sources::{halves, span};
use crate::config::Seq2SeqConfig;
use crate::kv_cache::LayerCache;
use crate::learned_positions::{LearnedPositions, check_length};
use crate::loader::Loader;
use crate::prompted::Prompted;
use crate::source::{Placement, WeightSource};
use crate::virtual_rows::VirtualRows;

mod attention;
mod block;
mod sources;

/// A model that writes a target for a source.
#[derive(Debug)]
pub struct EncoderDecoder {
    config: Seq2SeqConfig,
    sites: Arc<SiteTable>,
    embed: FrozenEmbedding,
    encoder: Stack,
    decoder: Stack,
    head: FrozenLinear,
    tied: bool,
    /// What embeddings of tokens are multiplied with, `[hidden]`.
    embedding_scale: Option<Tensor>,
    /// What hidden states are multiplied with in front of the head, `[hidden]`.
    output_scale: Option<Tensor>,
    device: Device,
    dtype: DType,
}

/// The encoder or the decoder.
#[derive(Debug)]
struct Stack {
    /// Learned positions.
    positions: Option<LearnedPositions>,
    embedding_norm: Option<FrozenNorm>,
    bias: Option<RelativeBias>,
    blocks: Vec<Block>,
    norm: Option<FrozenNorm>,
}

/// What all blocks share of one batch.
#[derive(Debug, Clone)]
pub struct EncoderDecoderInput {
    /// How many rows of the hidden states are targets.
    targets: usize,
    /// How many are sources, with the prompts in front of them.
    sources: usize,
    /// Self-attention within targets.
    own: SelfInput,
    /// Self-attention within sources.
    of_sources: SelfInput,
    /// Attention of targets to sources.
    cross: Arc<AttentionPlan>,
    virtual_rows: VirtualRows,
    /// The routes of targets and of sources, where they are not that of the batch.
    routes: Option<[Route; 2]>,
}

/// What a decoder sees of sources that were encoded once.
#[derive(Debug)]
pub struct EncodedSources {
    /// Keys and values of each block of the decoder.
    keys_values: Vec<[Tensor; 2]>,
    /// Which rows of these each source has.
    rows: Vec<Range<usize>>,
}

impl EncodedSources {
    /// The rows of a source.
    #[must_use]
    pub fn rows(&self, source: usize) -> Range<usize> {
        self.rows.get(source).cloned().unwrap_or(0..0)
    }
}

impl Stack {
    /// Loads the encoder or decoder under `path`; its first block is segment `first`. What is added to the embeddings belongs to
    /// these, the norm behind the encoder to its last block, that behind the decoder to the head.
    fn load(l: &mut Loader<'_>, c: &Seq2SeqConfig, path: &str, first: usize, in_decoder: bool) -> Result<Self> {
        let layout = &c.family.layout;
        let layers = if in_decoder { c.decoder_layers } else { c.encoder_layers };
        l.segment = 0;
        let positions = match (layout.positions, c.learned_positions()) {
            (Some((name, offset)), Some(most)) => {
                Some(LearnedPositions::load(l, &format!("{path}.{name}"), most, offset, c.hidden_size)?)
            }
            _ => None,
        };
        let optional =
            |l: &mut Loader<'_>, name: Option<&str>| name.map(|name| norm(l, c, &format!("{path}.{name}"))).transpose();
        let embedding_norm = optional(l, layout.embedding_norm)?;
        let (mut blocks, mut bias) = (Vec::with_capacity(layers), None);
        for i in 0..layers {
            l.segment = first + i;
            let (block, of_stack) = Block::load(l, c, &format!("{path}.{}.{i}", layout.blocks), in_decoder, i == 0)?;
            blocks.push(block);
            bias = bias.or(of_stack);
        }
        l.segment += usize::from(in_decoder);
        let norm = optional(l, layout.final_norm)?;
        Ok(Self { positions, embedding_norm, bias, blocks, norm })
    }

    fn norms(&self) -> impl Iterator<Item = &FrozenNorm> {
        self.embedding_norm.iter().chain(self.blocks.iter().flat_map(Block::norms)).chain(&self.norm)
    }

    fn tables(&self) -> impl Iterator<Item = &FrozenEmbedding> {
        self.positions.iter().map(LearnedPositions::table).chain(self.bias.as_ref().map(RelativeBias::table))
    }
}

impl EncoderDecoder {
    /// Loads the model that `config` describes from `source`. The head shares the embedding where `source` has no weight of
    /// its own for it, or the same one and `config` says so, as transformers 5 decides it.
    ///
    /// # Errors
    /// A missing tensor or a wrong shape, by its name.
    pub fn load(config: Seq2SeqConfig, source: &dyn WeightSource, placement: &Placement) -> Result<Self> {
        let c = &config;
        let (vocab, dim) = (c.vocab_size, c.hidden_size);
        let mut l = Loader::new(source, placement);
        let body = c.family.layout.body;
        let embed = l.embedding(&format!("{body}shared"), vocab, dim)?;
        let encoder = Stack::load(&mut l, c, &format!("{body}encoder"), 1, false)?;
        let decoder = Stack::load(&mut l, c, &format!("{body}decoder"), 1 + c.encoder_layers, true)?;
        if let Some(name) = c.family.layout.logits_bias.filter(|name| source.contains(name)) {
            refuse_logits_bias(source.weight(name, (1, vocab))?, name)?;
        }
        let own = match source.contains("lm_head.weight") {
            true => Some(source.weight("lm_head.weight", (vocab, dim))?),
            false => None,
        };
        let own = match own {
            Some(own) if c.tie_word_embeddings && is_same(&own, embed.weight())? => None,
            own => own,
        };
        let tied = own.is_none();
        let kind = SiteKind::Linear { in_features: dim, out_features: vocab, bias: false };
        let site = l.sites.register("lm_head", kind, l.segment);
        l.sites.mark_output_head(site);
        let head = FrozenLinear::new(site, "lm_head", own.unwrap_or_else(|| embed.weight().clone()), None)?;
        let scale = |on: bool, power: f64| match on {
            true => Tensor::full((dim as f64).powf(power) as f32, dim, &placement.device).map(Some),
            false => Ok(None),
        };
        let (embedding_scale, output_scale) = (scale(c.scales_embeddings, 0.5)?, scale(c.scales_outputs, -0.5)?);
        Ok(Self {
            sites: Arc::new(l.sites),
            embed,
            encoder,
            decoder,
            head,
            tied,
            embedding_scale,
            output_scale,
            device: placement.device.clone(),
            dtype: placement.activations,
            config,
        })
    }

    /// The model's configuration.
    #[must_use]
    pub fn config(&self) -> &Seq2SeqConfig {
        &self.config
    }

    fn stacks(&self) -> [&Stack; 2] {
        [&self.encoder, &self.decoder]
    }

    fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.stacks().into_iter().flat_map(|s| &s.blocks)
    }

    fn embeddings(&self) -> impl Iterator<Item = &FrozenEmbedding> {
        std::iter::once(&self.embed).chain(self.stacks().into_iter().flat_map(Stack::tables))
    }

    fn norms(&self) -> impl Iterator<Item = &FrozenNorm> {
        self.stacks().into_iter().flat_map(Stack::norms)
    }

    /// Every matrix once: a tied head is the embedding's.
    fn matrices(&self) -> impl Iterator<Item = &FrozenWeight> {
        let head = Some(&self.head).filter(|_| !self.tied);
        let linears = self.blocks().flat_map(Block::linears).chain(head).map(FrozenLinear::weight);
        self.embeddings().map(FrozenEmbedding::weight).chain(linears)
    }

    /// Bytes of all frozen matrices; a tied table counts once.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        self.matrices().map(FrozenWeight::nbytes).sum()
    }

    /// Elements of each norm and bias.
    fn vectors(&self) -> impl Iterator<Item = usize> {
        let norms = self.norms().count() * if self.config.family.layout.layer_norms { 2 } else { 1 };
        let biases = self.blocks().flat_map(Block::linears).filter_map(FrozenLinear::bias).map(Tensor::elem_count);
        biases.chain([norms * self.config.hidden_size])
    }

    /// Parameters of the base; a tied table counts once.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.matrices().map(|w| w.out_features() * w.in_features()).sum::<usize>() + self.vectors().sum::<usize>()
    }

    /// Self-attention over `sequences`.
    fn own_attention(&self, causal: bool, sequences: Vec<SequenceSpan>) -> SelfInput {
        SelfInput::new(AttentionPlan { causal, ..self.attention_plan(sequences) }, &self.config.positions)
    }

    /// Attention of targets to their sources, which are the keys of `sequences`.
    fn cross_attention(&self, sequences: Vec<SequenceSpan>) -> Arc<AttentionPlan> {
        Arc::new(self.attention_plan(sequences))
    }

    fn attention_plan(&self, sequences: Vec<SequenceSpan>) -> AttentionPlan {
        AttentionPlan {
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_attention_heads,
            head_dim: self.config.head_dim,
            scale: if self.config.family.layout.scaled_attention {
                (self.config.head_dim as f64).powf(-0.5) as f32
            } else {
                1.0
            },
            causal: false,
            window: None,
            softcap: None,
            sequences,
        }
    }

    /// Self-attention within sources, each with its prompt.
    fn source_attention(&self, rows: &[Range<usize>]) -> SelfInput {
        self.own_attention(false, rows.iter().map(|rows| span(rows.clone(), rows.clone())).collect())
    }

    /// Encodes the sources of a batch that holds nothing else, each through its own adapter.
    ///
    /// # Errors
    /// When an id is outside the vocabulary or a tensor operation fails.
    pub fn encode(&self, sources: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<EncodedSources> {
        let tokens = sources.sequences()?.collect();
        let virtual_tokens = VirtualSpans::of(sources.bounds, ctx)?;
        let of_batch = Prompted { tokens, virtual_tokens: &virtual_tokens };
        let rows = of_batch.rows();
        let own = self.source_attention(&rows);
        let mut hidden = of_batch.with_prompts(self.embed_tokens(sources.ids, ctx)?, ctx)?;
        let route = of_batch.route(ctx.route, 0);
        let ctx = Ctx { route: route.as_ref().unwrap_or(ctx.route), sequences: own.sequences(), ..*ctx };
        for i in 0..self.encoder.blocks.len() {
            hidden = self.encoder_block(i, &hidden, &own, &ctx)?;
        }
        let seen = self.decoder.blocks.iter().filter_map(|block| block.keys_values(&hidden, &ctx).transpose());
        Ok(EncodedSources { keys_values: seen.collect::<Result<_>>()?, rows })
    }

    /// Hidden states `[ids.len(), hidden]` of further target tokens behind the decoder's last block. The tokens are the
    /// queries of `own`, at the end of whose keys, rows of `caches`, they are put, and stand at `positions`; `cross` has the same queries and the
    /// rows of their sources as keys.
    ///
    /// # Errors
    /// When an id is outside the vocabulary or a tensor operation fails.
    pub fn decode_cached(
        &self,
        (ids, positions): (&[u32], &[u32]),
        [own, cross]: [Vec<SequenceSpan>; 2],
        sources: &EncodedSources,
        caches: &mut [LayerCache],
        ctx: &Ctx<'_>,
    ) -> Result<Tensor> {
        let bounds: Vec<usize> = std::iter::once(0).chain(own.iter().map(|span| span.queries.end)).collect();
        let rows = VirtualRows::new(VirtualSpans::of(&bounds, ctx)?, None, None);
        let (own, cross) = (self.own_attention(true, own), self.cross_attention(cross));
        let last = positions.iter().max().map_or(0, |&p| p as usize + 1);
        check_length(last, self.config.learned_positions())?;
        let mut hidden = self.embedded(&self.decoder, self.embed_tokens(ids, ctx)?, positions, ctx)?;
        let blocks = self.decoder.blocks.iter().zip(&sources.keys_values).zip(caches).enumerate();
        for (layer, ((block, keys_values), cache)) in blocks {
            let encoder = Some((Encoded::KeysValues(keys_values), &cross));
            let earlier = Earlier::Cache(cache, &rows, layer);
            hidden = block.forward(&hidden, (&own, self.decoder.bias.as_ref()), encoder, ctx, earlier)?;
        }
        Ok(hidden)
    }

    /// Runs block `i` of the encoder on the rows of sources; the last one ends with the encoder's norm.
    fn encoder_block(&self, i: usize, source: &Tensor, own: &SelfInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        let stack = &self.encoder;
        let block = stack.blocks.get(i).ok_or_else(|| Error::msg(format!("the encoder has no block {i}")))?;
        let hidden = block.forward(source, (own, stack.bias.as_ref()), None, ctx, Earlier::Nothing)?;
        match &stack.norm {
            Some(norm) if i + 1 == stack.blocks.len() => norm.forward(&hidden, ctx),
            _ => Ok(hidden),
        }
    }

    /// Embeddings `[ids.len(), hidden]` of tokens alone.
    fn embed_tokens(&self, ids: &[u32], ctx: &Ctx<'_>) -> Result<Tensor> {
        let rows = self.embed.forward(ids, ctx)?;
        match &self.embedding_scale {
            Some(scale) => Ok(kernels::scale_columns(&rows, scale)?),
            None => Ok(rows),
        }
    }

    /// What goes into the first block of `stack`: `rows` with their learned positions, and the norm behind them.
    fn embedded(&self, stack: &Stack, mut rows: Tensor, positions: &[u32], ctx: &Ctx<'_>) -> Result<Tensor> {
        if let Some(learned) = &stack.positions {
            rows = learned.add_to(&rows, positions, ctx)?;
        }
        match &stack.embedding_norm {
            Some(norm) => norm.forward(&rows, ctx),
            None => Ok(rows),
        }
    }
}

/// Refuses a bias of the logits that does something; in all files that are known it is zero.
fn refuse_logits_bias(bias: FrozenWeight, name: &str) -> Result<()> {
    let largest = bias.to_dense(DType::F32)?.abs()?.max_all()?.to_scalar::<f32>()?;
    if largest == 0.0 { Ok(()) } else { Err(Error::msg(format!("`{name}` is not zero, which is not supported"))) }
}

fn is_same(a: &FrozenWeight, b: &FrozenWeight) -> Result<bool> {
    let difference = (a.to_dense(DType::F32)? - b.to_dense(DType::F32)?)?.abs()?.max_all()?;
    Ok(difference.to_scalar::<f32>()? == 0.0)
}

impl BaseModel for EncoderDecoder {
    fn sites(&self) -> &Arc<SiteTable> {
        &self.sites
    }

    fn layer(&self, site: SiteId) -> Result<BaseLayer<'_>> {
        let mut linears = self.blocks().flat_map(Block::linears).chain([&self.head]);
        let linear = linears.find(|l| l.site() == site).map(BaseLayer::Linear);
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
        self.tied.then(|| self.embed.path())
    }

    fn task(&self) -> Task {
        self.config.task()
    }

    fn sublayers(&self) -> Vec<SublayerSite> {
        let hidden_size = self.config.hidden_size;
        let of_block = |(block, layers): (usize, &Block)| {
            let ends: Vec<_> = layers.ends().collect();
            ends.into_iter().map(move |(kind, end)| SublayerSite { block, kind, end, hidden_size })
        };
        self.blocks().enumerate().flat_map(of_block).collect()
    }

    /// Of the decoder, where prefixes stand; none where it has not as many blocks as the encoder, whose number PEFT counts.
    fn prompt_dims(&self) -> Option<PromptDims> {
        let c = &self.config;
        (c.encoder_layers == c.decoder_layers).then_some(PromptDims {
            layers: c.encoder_layers,
            hidden_size: c.hidden_size,
            attention_heads: c.num_attention_heads,
            key_value_heads: c.num_attention_heads,
            head_dim: c.head_dim,
            max_positions: c.learned_positions().unwrap_or(usize::MAX),
            submodules: 2,
            prefixes: true,
        })
    }
}

impl Segmented for EncoderDecoder {
    type Input = EncoderDecoderInput;

    fn prepare(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<EncoderDecoderInput> {
        let (targets, sources, virtual_tokens) = halves(batch, ctx)?;
        let of_batch = Prompted { tokens: sources, virtual_tokens: &virtual_tokens };
        let (source_rows, first) = (of_batch.rows(), targets.last().map_or(0, |t| t.end));
        let routes =
            of_batch.route(ctx.route, first).map(|route| [ctx.route.select(&(0..first).collect::<Vec<_>>()), route]);
        let prefixes = virtual_tokens.prefix_rows(first);
        let own = targets.iter().enumerate().map(|(i, target)| {
            let prefix = virtual_tokens.rows_of_sequence(i, &prefixes);
            SequenceSpan { prefix, ..span(target.clone(), target.clone()) }
        });
        Ok(EncoderDecoderInput {
            targets: first,
            sources: source_rows.last().map_or(0, |rows| rows.end),
            own: self.own_attention(true, own.collect()),
            of_sources: self.source_attention(&source_rows),
            cross: self.cross_attention(
                targets.iter().zip(&source_rows).map(|(target, source)| span(target.clone(), source.clone())).collect(),
            ),
            virtual_rows: VirtualRows::new(virtual_tokens, None, None),
            routes,
        })
    }

    fn embed(&self, batch: TokenBatch<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let rows = self.embed_tokens(batch.ids, ctx)?;
        let (targets, tokens, virtual_tokens) = halves(batch, ctx)?;
        let plain = self.stacks().iter().all(|stack| stack.positions.is_none() && stack.embedding_norm.is_none());
        if virtual_tokens.is_empty() && plain {
            return Ok(rows);
        }
        let first = targets.last().map_or(0, |t| t.end);
        let of_batch = Prompted { tokens, virtual_tokens: &virtual_tokens };
        let sources = rows.narrow(0, first, batch.ids.len() - first)?;
        let (mut target, mut source) = (rows.narrow(0, 0, first)?, of_batch.with_prompts(sources, ctx)?);
        if !plain {
            let of_target = ctx.route.select(&(0..first).collect::<Vec<_>>());
            let of_source = of_batch.route(ctx.route, first);
            let (mut in_target, mut in_source) = (Vec::new(), Vec::new());
            for (i, (own, source)) in targets.iter().zip(of_batch.rows()).enumerate() {
                let before = of_batch.prefix_positions(i);
                check_length((before + own.len()).max(source.len()), self.config.learned_positions())?;
                in_target.extend((before as u32..).take(own.len()));
                in_source.extend(0..source.len() as u32);
            }
            target = self.embedded(&self.decoder, target, &in_target, &Ctx { route: &of_target, ..*ctx })?;
            let of_source = Ctx { route: of_source.as_ref().unwrap_or(ctx.route), ..*ctx };
            source = self.embedded(&self.encoder, source, &in_source, &of_source)?;
        }
        Ok(kernels::stack_rows(&target, &source)?)
    }

    fn num_blocks(&self) -> usize {
        self.encoder.blocks.len() + self.decoder.blocks.len()
    }

    fn block(&self, i: usize, hidden: &Tensor, input: &EncoderDecoderInput, ctx: &Ctx<'_>) -> Result<Tensor> {
        let target = hidden.narrow(0, 0, input.targets)?;
        let source = hidden.narrow(0, input.targets, input.sources)?;
        let [of_target, of_source] = match &input.routes {
            Some(routes) => routes.each_ref().map(|route| Ctx { route, ..*ctx }),
            None => [*ctx; 2],
        };
        let of_source = Ctx { sequences: input.of_sources.sequences(), ..of_source };
        let [target, source] = match i.checked_sub(self.encoder.blocks.len()) {
            None => [target, self.encoder_block(i, &source, &input.of_sources, &of_source)?],
            Some(i) => {
                let stack = &self.decoder;
                let block = stack.blocks.get(i).ok_or_else(|| Error::msg(format!("the decoder has no block {i}")))?;
                let encoder = Some((Encoded::Hidden(&source, &of_source), &input.cross));
                let earlier = Earlier::Prefixes(&input.virtual_rows, i);
                let target = block.forward(&target, (&input.own, stack.bias.as_ref()), encoder, &of_target, earlier);
                [target.with_context(|| format!("decoder.block.{i}"))?, source]
            }
        };
        Ok(kernels::stack_rows(&target, &source)?)
    }

    fn final_norm(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let normed = match &self.decoder.norm {
            Some(norm) => norm.forward(hidden, ctx)?,
            None => hidden.clone(),
        };
        match &self.output_scale {
            Some(scale) => Ok(kernels::scale_columns(&normed, scale)?),
            None => Ok(normed),
        }
    }

    fn logits(&self, hidden: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        if self.tied { self.embed.tied_logits(&self.head, hidden, ctx) } else { self.head.forward(hidden, ctx) }
    }

    fn plain_head(&self, ctx: &Ctx<'_>) -> Option<(&FrozenWeight, Option<f32>)> {
        let plain = self.head.is_plain(ctx) && !(self.tied && self.embed.changes_tied_head(ctx));
        plain.then(|| (self.head.weight(), None))
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }
}
