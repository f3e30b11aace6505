//! What the stacks of an encoder–decoder family are made of, and under which names.

/// One kind of sublayer: attention to the sequence itself, to the encoder, or the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SublayerNames {
    /// Its layers, in the block; empty where they are the block's own.
    pub layers: &'static str,
    /// Its norm, in the block.
    pub norm: &'static str,
}

const fn sublayer(layers: &'static str, norm: &'static str) -> SublayerNames {
    SublayerNames { layers, norm }
}

/// What a family's model is made of. Names of modules are those in transformers.
#[derive(Debug, Clone, Copy)]
pub struct Seq2SeqLayout {
    /// The module that holds everything but the head, with a dot behind it, or nothing.
    pub body: &'static str,
    /// The list of blocks, in a stack.
    pub blocks: &'static str,
    /// Attention to itself, of both stacks.
    pub own: SublayerNames,
    /// Attention to the encoder.
    pub cross: SublayerNames,
    /// The MLP of the encoder and of the decoder.
    pub mlp: [SublayerNames; 2],
    /// The layers of an attention: of queries, keys, values and behind.
    pub attention: [&'static str; 4],
    /// Whether linear layers have biases.
    pub biases: bool,
    /// Whether norms have a mean and a bias (layer norms), or neither (RMS norms).
    pub layer_norms: bool,
    /// Whether a norm stands behind its sublayer's sum with the residual stream, and not in front of the sublayer.
    pub post_norm: bool,
    /// Whether attention divides its logits by the root of a head's dimensions.
    pub scaled_attention: bool,
    /// The table of learned positions, in a stack, and how many of its rows stand in front of the first position's.
    pub positions: Option<(&'static str, usize)>,
    /// The norm behind the embeddings, in a stack.
    pub embedding_norm: Option<&'static str>,
    /// The norm behind the last block, in a stack.
    pub final_norm: Option<&'static str>,
    /// A bias of the logits, `[1, vocab]`, that files have room for.
    pub logits_bias: Option<&'static str>,
}

pub(super) const T5: Seq2SeqLayout = Seq2SeqLayout {
    body: "",
    blocks: "block",
    own: sublayer("layer.0.SelfAttention", "layer.0.layer_norm"),
    cross: sublayer("layer.1.EncDecAttention", "layer.1.layer_norm"),
    mlp: [
        sublayer("layer.1.DenseReluDense", "layer.1.layer_norm"),
        sublayer("layer.2.DenseReluDense", "layer.2.layer_norm"),
    ],
    attention: ["q", "k", "v", "o"],
    biases: false,
    layer_norms: false,
    post_norm: false,
    scaled_attention: false,
    positions: None,
    embedding_norm: None,
    final_norm: Some("final_layer_norm"),
    logits_bias: None,
};

pub(super) const BART: Seq2SeqLayout = Seq2SeqLayout {
    body: "model.",
    blocks: "layers",
    own: sublayer("self_attn", "self_attn_layer_norm"),
    cross: sublayer("encoder_attn", "encoder_attn_layer_norm"),
    mlp: [sublayer("", "final_layer_norm"); 2],
    attention: ["q_proj", "k_proj", "v_proj", "out_proj"],
    biases: true,
    layer_norms: true,
    post_norm: true,
    scaled_attention: true,
    positions: Some(("embed_positions", 2)),
    embedding_norm: Some("layernorm_embedding"),
    final_norm: None,
    logits_bias: Some("final_logits_bias"),
};
