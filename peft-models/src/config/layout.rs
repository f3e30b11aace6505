//! What the blocks of a decoder family are made of, and under which names: facts that no `config.json` states, since
//! they are in the code of the family's classes in transformers.

/// The normalisation of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// Root mean square.
    Rms,
    /// Root mean square with weights stored as their distance from one (Gemma).
    RmsFromOne,
    /// Mean and variance, with a bias.
    Layer,
}

/// The norms around one sublayer (attention or MLP), by their names in the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SublayerNorms {
    /// In front of it.
    pub before: Option<&'static str>,
    /// Behind it, before the residual sum.
    pub after: Option<&'static str>,
}

impl SublayerNorms {
    const fn before(name: &'static str) -> Self {
        Self { before: Some(name), after: None }
    }

    const fn after(name: &'static str) -> Self {
        Self { before: None, after: Some(name) }
    }

    const fn around(before: &'static str, after: &'static str) -> Self {
        Self { before: Some(before), after: Some(after) }
    }
}

/// How queries, keys and values are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projections {
    /// By a layer each: the names of `q`, `k` and `v`.
    Split([&'static str; 3]),
    /// By one layer whose outputs are all queries, then all keys, then all values.
    Fused(&'static str),
    /// By one layer whose outputs are the queries, the key and the value of the first group of heads (those that share a key), then of
    /// the second, and so on.
    FusedByGroup(&'static str),
}

/// What the norms on queries and keys (`q_norm`, `k_norm`) range over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryKeyNorm {
    /// Each head by itself.
    Head,
    /// All heads of a token.
    Token,
}

/// The layers of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpLayout {
    /// `down(act(gate x) ⊙ up x)`: names of gate, up and down.
    Gated([&'static str; 3]),
    /// The same with gate and up made by one layer, the gate's outputs first: names of both and of down.
    FusedGate([&'static str; 2]),
    /// `down(act(up x))`: names of up and down.
    Plain([&'static str; 2]),
}

impl MlpLayout {
    /// Whether there is a gate.
    #[must_use]
    pub fn is_gated(self) -> bool {
        !matches!(self, Self::Plain(_))
    }
}

/// A mixture of experts: `gate` chooses, `experts.gate_up_proj` and `experts.down_proj` are parameters with the weights of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertsLayout {
    /// The module, in the block.
    pub path: &'static str,
    /// Its name in checkpoints.
    pub stored: &'static str,
    /// The layers of an expert in checkpoints that make gate and up.
    pub gate_up: &'static [&'static str],
    /// The one behind them.
    pub down: &'static [&'static str],
    /// The layers of the expert that all tokens go through, in `shared_expert`, where there is one.
    pub shared: MlpLayout,
}

/// What a family's model is made of. Names of modules are those in transformers.
#[derive(Debug, Clone, Copy)]
pub struct DecoderLayout {
    /// The module that holds everything but the head.
    pub body: &'static str,
    /// The token embedding, in the body.
    pub embedding: &'static str,
    /// The table of learned positions, in the body, where the family has one.
    pub positions: Option<&'static str>,
    /// Rows of that table in front of the first position's.
    pub position_offset: usize,
    /// Whether embeddings are multiplied by the square root of the hidden size.
    pub scaled_embeddings: bool,
    /// The list of blocks, in the body.
    pub blocks: &'static str,
    /// The norm behind the last block, in the body.
    pub final_norm: &'static str,
    /// Which normalisation all norms are.
    pub norm: Norm,
    /// The norms around attention.
    pub attention_norms: SublayerNorms,
    /// The norms around the MLP. Where attention and MLP read the same input and there is none here, they share attention's.
    pub mlp_norms: SublayerNorms,
    /// Queries, keys and values.
    pub projections: Projections,
    /// Norms on queries and keys, before they are rotated.
    pub query_key_norm: Option<QueryKeyNorm>,
    /// The layer behind attention.
    pub output: &'static str,
    /// The MLP.
    pub mlp: MlpLayout,
    /// The mixture of experts in the place of an MLP, where the family has one.
    pub experts: Option<ExpertsLayout>,
    /// Whether the linear layers of the blocks are `Conv1D`, whose weights are `[in, out]` in files.
    pub conv1d: bool,
    /// Another name under which checkpoints have the output head's weight.
    pub head_alias: Option<&'static str>,
}

/// Llama's: pre-norm blocks, split projections, a gated MLP.
pub(super) const LLAMA: DecoderLayout = DecoderLayout {
    body: "model",
    embedding: "embed_tokens",
    positions: None,
    position_offset: 0,
    scaled_embeddings: false,
    blocks: "layers",
    final_norm: "norm",
    norm: Norm::Rms,
    attention_norms: SublayerNorms::before("input_layernorm"),
    mlp_norms: SublayerNorms::before("post_attention_layernorm"),
    projections: Projections::Split(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    query_key_norm: None,
    output: "self_attn.o_proj",
    mlp: MlpLayout::Gated(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    experts: None,
    conv1d: false,
    head_alias: None,
};

/// With norms on the queries and keys of each head.
pub(super) const QWEN3: DecoderLayout = DecoderLayout { query_key_norm: Some(QueryKeyNorm::Head), ..LLAMA };

pub(super) const PHI3: DecoderLayout = DecoderLayout {
    projections: Projections::Fused("self_attn.qkv_proj"),
    mlp: MlpLayout::FusedGate(["mlp.gate_up_proj", "mlp.down_proj"]),
    ..LLAMA
};

pub(super) const GEMMA: DecoderLayout = DecoderLayout { scaled_embeddings: true, norm: Norm::RmsFromOne, ..LLAMA };

pub(super) const GEMMA2: DecoderLayout = DecoderLayout {
    attention_norms: SublayerNorms::around("input_layernorm", "post_attention_layernorm"),
    mlp_norms: SublayerNorms::around("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ..GEMMA
};

pub(super) const GEMMA3: DecoderLayout = DecoderLayout { query_key_norm: Some(QueryKeyNorm::Head), ..GEMMA2 };

/// Norms behind the sublayers, none in front.
pub(super) const OLMO2: DecoderLayout = DecoderLayout {
    attention_norms: SublayerNorms::after("post_attention_layernorm"),
    mlp_norms: SublayerNorms::after("post_feedforward_layernorm"),
    query_key_norm: Some(QueryKeyNorm::Token),
    ..LLAMA
};

pub(super) const GPT2: DecoderLayout = DecoderLayout {
    body: "transformer",
    embedding: "wte",
    positions: Some("wpe"),
    blocks: "h",
    final_norm: "ln_f",
    norm: Norm::Layer,
    attention_norms: SublayerNorms::before("ln_1"),
    mlp_norms: SublayerNorms::before("ln_2"),
    projections: Projections::Fused("attn.c_attn"),
    output: "attn.c_proj",
    mlp: MlpLayout::Plain(["mlp.c_fc", "mlp.c_proj"]),
    conv1d: true,
    ..LLAMA
};

pub(super) const GPT_NEOX: DecoderLayout = DecoderLayout {
    body: "gpt_neox",
    embedding: "embed_in",
    final_norm: "final_layer_norm",
    norm: Norm::Layer,
    projections: Projections::FusedByGroup("attention.query_key_value"),
    output: "attention.dense",
    mlp: MlpLayout::Plain(["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
    // Its name before transformers 5.
    head_alias: Some("embed_out"),
    ..LLAMA
};

/// Llama's blocks with layer norms.
pub(super) const STABLELM: DecoderLayout = DecoderLayout { norm: Norm::Layer, ..LLAMA };

pub(super) const OPT: DecoderLayout = DecoderLayout {
    body: "model.decoder",
    positions: Some("embed_positions"),
    position_offset: 2,
    final_norm: "final_layer_norm",
    norm: Norm::Layer,
    attention_norms: SublayerNorms::before("self_attn_layer_norm"),
    mlp_norms: SublayerNorms::before("final_layer_norm"),
    output: "self_attn.out_proj",
    mlp: MlpLayout::Plain(["fc1", "fc2"]),
    ..LLAMA
};

pub(super) const FALCON: DecoderLayout = DecoderLayout {
    body: "transformer",
    embedding: "word_embeddings",
    blocks: "h",
    final_norm: "ln_f",
    norm: Norm::Layer,
    mlp_norms: SublayerNorms { before: None, after: None },
    projections: Projections::Fused("self_attention.query_key_value"),
    output: "self_attention.dense",
    mlp: MlpLayout::Plain(["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
    ..LLAMA
};

pub(super) const FALCON_GROUPED: DecoderLayout =
    DecoderLayout { projections: Projections::FusedByGroup("self_attention.query_key_value"), ..FALCON };

pub(super) const FALCON_TWO_NORMS: DecoderLayout = DecoderLayout {
    attention_norms: SublayerNorms::before("ln_attn"),
    mlp_norms: SublayerNorms::before("ln_mlp"),
    ..FALCON_GROUPED
};

const EXPERTS: ExpertsLayout = ExpertsLayout {
    path: "mlp",
    stored: "mlp",
    gate_up: &["gate_proj", "up_proj"],
    down: &["down_proj"],
    shared: MlpLayout::Gated(["gate_proj", "up_proj", "down_proj"]),
};

pub(super) const MIXTRAL: DecoderLayout = DecoderLayout {
    experts: Some(ExpertsLayout { stored: "block_sparse_moe", gate_up: &["w1", "w3"], down: &["w2"], ..EXPERTS }),
    ..LLAMA
};

pub(super) const QWEN2_MOE: DecoderLayout = DecoderLayout { experts: Some(EXPERTS), ..LLAMA };

pub(super) const QWEN3_MOE: DecoderLayout = DecoderLayout { experts: Some(EXPERTS), ..QWEN3 };

pub(super) const OLMOE: DecoderLayout =
    DecoderLayout { experts: Some(EXPERTS), query_key_norm: Some(QueryKeyNorm::Token), ..LLAMA };
