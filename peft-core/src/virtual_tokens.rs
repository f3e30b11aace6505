//! Virtual tokens: what soft-prompt methods put in front of every sequence that goes through their adapter.
//!
//! There are two kinds. A *prefix* is keys and values for each layer, which the sequence's queries see and which see nothing
//! (prefix tuning). A *prompt* is embeddings that run through the model like tokens (prompt tuning, P-tuning). Nothing
//! comes before them, so in a causal model what they become does not depend on the sequence behind them: a pass computes them
//! once for each adapter, however many sequences use it, and the sequences share their keys and values. An encoder looks both
//! ways, and each of its sequences has rows of its own for a prompt; so has each sequence for a prefix with a gate, which
//! multiplies the prefix by what it makes of the sequence.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use crate::ctx::{Ctx, Route};
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::param::Parameter;

/// Keys and values in front of each layer's own.
pub trait PrefixModule: Send + Sync + Debug {
    /// Keys and values of layer `layer`, each `[virtual tokens, kv_heads · head_dim]`, as attention takes them: no rotary
    /// embedding is applied to them. Parameters are read through [`Parameter::get`].
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn keys_values(&self, layer: usize, ctx: &Ctx<'_>) -> Result<(Tensor, Tensor)>;

    /// What multiplies keys (by its first output) and values (by its last) of layer `layer` for each sequence, computed of what the
    /// attention there reads. Either all layers have one or none.
    fn gate(&self, _layer: usize) -> Option<&Gate> {
        None
    }

    /// The trainable parameters, in the order in which they are stored.
    fn parameters(&self) -> Vec<&Parameter>;

    /// The tensors that other programs are given, by their keys in the adapter file.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn exported(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(values(&self.parameters()))
    }
}

/// Embeddings in front of each sequence's own.
pub trait PromptModule: Send + Sync + Debug {
    /// Embeddings `[virtual tokens, hidden]`. Parameters are read through [`Parameter::get`].
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn embeddings(&self, ctx: &Ctx<'_>) -> Result<Tensor>;

    /// The embeddings as they are for one task, sharing all parameters; `None` where they are the same for every task. Whoever
    /// builds an adapter of such says so with [`crate::Adapter::set_tasks`].
    fn for_task(&self, _task: usize) -> Option<Arc<dyn PromptModule>> {
        None
    }

    /// The trainable parameters, in the order in which they are stored.
    fn parameters(&self) -> Vec<&Parameter>;

    /// Tensors that belong to the module and are not trained: checkpoints hold them, and other programs are not given them.
    fn frozen(&self) -> Vec<&Parameter> {
        Vec::new()
    }

    /// The tensors that other programs are given, by their keys in the adapter file.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn exported(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(values(&self.parameters()))
    }
}

fn values(parameters: &[&Parameter]) -> Vec<(String, Tensor)> {
    parameters.iter().map(|p| (p.name().to_string(), p.value())).collect()
}

/// What an adapter's virtual tokens are.
#[derive(Debug, Clone)]
pub enum VirtualModule {
    /// Keys and values of each layer.
    Prefix(Arc<dyn PrefixModule>),
    /// Embeddings.
    Prompt(Arc<dyn PromptModule>),
}

/// The virtual tokens of one adapter.
#[derive(Debug, Clone)]
pub struct VirtualTokens {
    /// How many: PEFT's `num_virtual_tokens`.
    pub count: usize,
    /// Whether the sequence's own positions begin after them, as in PEFT, or at 0 all the same.
    pub moves_positions: bool,
    /// Where they come from.
    pub module: VirtualModule,
}

impl VirtualTokens {
    /// The trainable parameters.
    #[must_use]
    pub fn parameters(&self) -> Vec<&Parameter> {
        match &self.module {
            VirtualModule::Prefix(m) => m.parameters(),
            VirtualModule::Prompt(m) => m.parameters(),
        }
    }

    /// How many positions the sequence's own begin after.
    #[must_use]
    pub fn positions(&self) -> usize {
        if self.moves_positions { self.count } else { 0 }
    }

    /// Whether they are another thing for each sequence.
    #[must_use]
    pub fn is_gated(&self) -> bool {
        matches!(&self.module, VirtualModule::Prefix(m) if m.gate(0).is_some())
    }

    /// These as they are for one task.
    pub(crate) fn for_task(&self, task: usize) -> Self {
        let module = match &self.module {
            VirtualModule::Prompt(m) => m.for_task(task).map(VirtualModule::Prompt),
            VirtualModule::Prefix(_) => None,
        };
        Self { module: module.unwrap_or_else(|| self.module.clone()), ..self.clone() }
    }

    /// Their tensors that are not trained and that a checkpoint restores.
    pub(crate) fn frozen(&self) -> Vec<&Parameter> {
        match &self.module {
            VirtualModule::Prefix(_) => Vec::new(),
            VirtualModule::Prompt(m) => m.frozen(),
        }
    }

    /// Whether they are embeddings that run through the model.
    #[must_use]
    pub fn is_prompt(&self) -> bool {
        matches!(self.module, VirtualModule::Prompt(_))
    }

    pub(crate) fn exported(&self) -> Result<Vec<(String, Tensor)>> {
        match &self.module {
            VirtualModule::Prefix(m) => m.exported(),
            VirtualModule::Prompt(m) => m.exported(),
        }
    }

    /// The lowest segment that the gradient has to reach.
    pub(crate) fn segment(&self) -> usize {
        usize::from(!self.is_prompt())
    }
}

/// What a soft prompt has to know of a base model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptDims {
    /// Layers with attention.
    pub layers: usize,
    /// Width of the embeddings.
    pub hidden_size: usize,
    /// Query heads.
    pub attention_heads: usize,
    /// Key and value heads.
    pub key_value_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Positions that the model was made for.
    pub max_positions: usize,
    /// Transformers that the model is made of, as PEFT counts them: 2 for an encoder–decoder.
    pub submodules: usize,
    /// Whether its layers take keys and values in front of their own. PEFT hands them over as a cache, for which the model in
    /// transformers must have a place.
    pub prefixes: bool,
}

impl PromptDims {
    /// Width of the keys of one layer, and of its values.
    #[must_use]
    pub fn key_value_size(&self) -> usize {
        self.key_value_heads * self.head_dim
    }
}

/// The virtual tokens of one slot in one pass.
#[derive(Debug, Clone)]
pub struct VirtualSpan {
    /// The slot of the adapter.
    pub slot: usize,
    /// Its virtual tokens.
    pub tokens: VirtualTokens,
}

impl VirtualSpan {
    /// Its module, where it is a prefix.
    fn prefix(&self) -> Option<&dyn PrefixModule> {
        match &self.tokens.module {
            VirtualModule::Prefix(module) => Some(module.as_ref()),
            VirtualModule::Prompt(_) => None,
        }
    }
}

/// Keys and values of a layer, by slot.
type OfSlots = BTreeMap<usize, (Tensor, Tensor)>;

/// The virtual tokens of one pass: those of each slot once, or once for each sequence where a gate makes them another thing for each;
/// and which sequence has which.
#[derive(Debug, Clone, Default)]
pub struct VirtualSpans {
    spans: Vec<VirtualSpan>,
    of_sequence: Vec<Option<usize>>,
}

impl VirtualSpans {
    /// The virtual tokens of a packed batch whose sequence `i` holds tokens `bounds[i]..bounds[i + 1]`.
    ///
    /// # Errors
    /// When a sequence goes through several adapters one of which has virtual tokens.
    pub fn of(bounds: &[usize], ctx: &Ctx<'_>) -> Result<Self> {
        if *ctx.route == Route::Base || ctx.adapters.adapters().all(|a| a.virtual_tokens().is_none()) {
            return Ok(Self::default());
        }
        let mut found = Self::default();
        for sequence in bounds.windows(2) {
            let mut tokens_of = ctx.route.slots_of(sequence[0]..sequence[1]).map(|slot| {
                let tokens = slot.and_then(|s| ctx.adapters.adapter(s)).and_then(|a| a.virtual_tokens());
                tokens.and_then(|tokens| Some(VirtualSpan { slot: slot?, tokens: tokens.clone() }))
            });
            let first = tokens_of.next().flatten();
            if tokens_of.any(|other| other.map(|o| o.slot) != first.as_ref().map(|f| f.slot)) {
                return Err(Error::msg(
                    "a sequence goes through several adapters, and virtual tokens stand in front of whole sequences",
                ));
            }
            found.of_sequence.push(first.map(|span| {
                let shares = !span.tokens.is_gated();
                found.spans.iter().position(|s| shares && s.slot == span.slot).unwrap_or_else(|| {
                    found.spans.push(span);
                    found.spans.len() - 1
                })
            }));
        }
        Ok(found)
    }

    /// The virtual tokens that are apart, in the order in which the batch meets them.
    pub fn iter(&self) -> impl Iterator<Item = &VirtualSpan> {
        self.spans.iter()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The index in [`VirtualSpans::iter`] of the virtual tokens of a sequence.
    #[must_use]
    pub fn of_sequence(&self, sequence: usize) -> Option<usize> {
        self.of_sequence.get(sequence).copied().flatten()
    }

    /// The rows of a sequence's virtual tokens among `rows`, which are in the order of [`VirtualSpans::iter`]; empty where it has
    /// none.
    #[must_use]
    pub fn rows_of_sequence(&self, sequence: usize, rows: &[Range<usize>]) -> Range<usize> {
        self.of_sequence(sequence).and_then(|at| rows.get(at)).cloned().unwrap_or(0..0)
    }

    /// How many positions those of a sequence begin after.
    #[must_use]
    pub fn positions_of_sequence(&self, sequence: usize) -> usize {
        let span = self.of_sequence(sequence).and_then(|at| self.spans.get(at));
        span.map_or(0, |span| span.tokens.positions())
    }

    /// Keys and values of layer `layer` of all prefixes of this pass, in the order of their rows; the attention there reads `x`
    /// `[tokens, hidden]`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn prefixes(&self, layer: usize, x: &Tensor, ctx: &Ctx<'_>) -> Result<Vec<(Tensor, Tensor)>> {
        let mut of_slots = OfSlots::new();
        let modules = self.spans.iter().enumerate().filter_map(|(at, span)| Some((at, span.slot, span.prefix()?)));
        modules.map(|(at, slot, module)| self.prefix((at, slot, module), layer, x, ctx, &mut of_slots)).collect()
    }

    /// Of the prefixes of [`VirtualSpans::prefixes`], those that are another thing for each sequence, with the sequence.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn gated_prefixes(&self, layer: usize, x: &Tensor, ctx: &Ctx<'_>) -> Result<Vec<(usize, Tensor, Tensor)>> {
        let mut of_slots = OfSlots::new();
        let mut found = Vec::new();
        for (sequence, at) in self.of_sequence.iter().enumerate().filter_map(|(i, at)| Some((i, (*at)?))) {
            let Some(span) = self.spans.get(at).filter(|span| span.tokens.is_gated()) else { continue };
            let Some(module) = span.prefix() else { continue };
            let (keys, values) = self.prefix((at, span.slot, module), layer, x, ctx, &mut of_slots)?;
            found.push((sequence, keys, values));
        }
        Ok(found)
    }

    /// Keys and values of one of the prefixes. Those of a slot are made once.
    fn prefix(
        &self,
        (at, slot, module): (usize, usize, &dyn PrefixModule),
        layer: usize,
        x: &Tensor,
        ctx: &Ctx<'_>,
        of_slots: &mut OfSlots,
    ) -> Result<(Tensor, Tensor)> {
        let (keys, values) = match of_slots.get(&slot) {
            Some(made) => made.clone(),
            None => {
                let made = module.keys_values(layer, ctx)?;
                of_slots.insert(slot, made.clone());
                made
            }
        };
        let Some(gate) = module.gate(layer) else { return Ok((keys, values)) };
        let sequence = self.of_sequence.iter().position(|of| *of == Some(at));
        let Some(rows) = sequence.and_then(|i| ctx.sequences.get(i)).map(|span| span.queries.clone()) else {
            return Err(Error::msg("the sequence of a prefix with a gate is not known"));
        };
        let open = gate.of_sequence(&x.narrow(0, rows.start, rows.len())?, ctx)?;
        let last = open.dim(1)?.saturating_sub(1);
        Ok((keys.broadcast_mul(&open.narrow(1, 0, 1)?)?, values.broadcast_mul(&open.narrow(1, last, 1)?)?))
    }

    /// Whether a prefix is another thing for each sequence.
    #[must_use]
    pub fn any_gated(&self) -> bool {
        self.spans.iter().any(|span| span.tokens.is_gated())
    }

    /// The embeddings of all prompts of this pass, in the order of their rows.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn prompts(&self, ctx: &Ctx<'_>) -> Result<Vec<Tensor>> {
        self.spans
            .iter()
            .filter_map(|span| match &span.tokens.module {
                VirtualModule::Prompt(module) => Some(module.embeddings(ctx)),
                VirtualModule::Prefix(_) => None,
            })
            .collect()
    }

    /// Where the rows of each prefix lie among keys and values, in the order of [`VirtualSpans::iter`], when they
    /// follow `tokens` others; none where a slot has a prompt.
    #[must_use]
    pub fn prefix_rows(&self, tokens: usize) -> Vec<Range<usize>> {
        let mut end = tokens;
        let rows = self.spans.iter().map(|span| {
            let start = end;
            end += if span.tokens.is_prompt() { 0 } else { span.tokens.count };
            start..end
        });
        rows.collect()
    }

    /// Where their rows lie, in the order of [`VirtualSpans::iter`]: those of prompts follow the `tokens` of the
    /// batch in the hidden states; those of prefixes follow all of these among the keys and values.
    #[must_use]
    pub fn rows(&self, tokens: usize) -> Vec<Range<usize>> {
        let mut rows = vec![0..0; self.spans.len()];
        let mut end = tokens;
        for prompts in [true, false] {
            for (span, rows) in self.spans.iter().zip(&mut rows) {
                if span.tokens.is_prompt() == prompts {
                    *rows = end..end + span.tokens.count;
                    end = rows.end;
                }
            }
        }
        rows
    }
}
