//! The config keys that all soft prompts share (`PromptLearningConfig` in `peft/config.py`).

use peft_core::config_keys::{completed, peft_defaults};
use peft_core::{
    Adapter, BaseLayer, BaseModel, Built, ConfigKeys, Error, FrozenEmbedding, PromptDims, Result, Selection,
    TargetSpec, Unmatched, VirtualModule, VirtualTokens, candidates, insert_saved, select_saved, task_keys,
};
use serde_json::{Map, Value, json};

/// Width of an encoder's hidden layer, at most.
pub(crate) const MAX_ENCODER_WIDTH: usize = 1 << 16;

/// A key of our own for a prefix: false where its sequence's positions begin at 0 all the same, as in AdapterHub's package.
pub(crate) const MOVES_POSITIONS: &str = "moves_positions";

/// The config of a soft prompt as read.
#[derive(Debug, Clone)]
pub(crate) struct SoftPrompt {
    count: usize,
    /// Whether the sequence's positions begin after a prefix, as PEFT has it.
    moves_positions: bool,
    /// `modules_to_save` and `task_type`.
    saved: TargetSpec,
    raw: Map<String, Value>,
}

/// What a soft prompt is on one base model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Virtual tokens.
    pub(crate) count: usize,
    /// `token_dim` in the config: the width that PEFT counts with.
    pub(crate) token_dim: usize,
    /// `num_attention_heads` in the config.
    pub(crate) heads: usize,
    /// The base.
    pub(crate) dims: PromptDims,
    /// PEFT's name for what the base's head computes.
    task: &'static str,
}

/// PEFT's keys for a soft prompt with its `own` beside the shared ones.
pub(crate) fn defaults(peft_type: &str, own: &Value) -> Map<String, Value> {
    let shared = json!({
        "modules_to_save": null, "num_attention_heads": null, "num_layers": null, "num_transformer_submodules": null,
        "num_virtual_tokens": null, "token_dim": null
    });
    let mut all = peft_defaults(peft_type, shared);
    all.extend(own.as_object().into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())));
    all
}

impl Shape {
    /// Rows of the stored embeddings. For an encoder–decoder PEFT makes virtual tokens for both, and uses the first half.
    pub(crate) fn stored_rows(&self) -> usize {
        self.count * self.dims.submodules
    }

    /// Which layer's keys and values of a prefix the `layer`th of a model's decoder gets. For an encoder–decoder
    /// `PeftModel.get_prompt` repeats the list of all layers and deals it out, two layers' at a time, of which the decoder's
    /// self-attention takes the first.
    pub(crate) fn prefix_layer(&self, layer: usize) -> usize {
        (layer * self.dims.submodules).checked_rem(self.dims.layers).unwrap_or(0)
    }
}

impl SoftPrompt {
    pub(crate) fn read(config: &Map<String, Value>) -> Result<Self> {
        let Some(count) = ConfigKeys(config).count("num_virtual_tokens", 1 << 24)? else {
            return Err(Error::config("num_virtual_tokens", "is not given; 20 is usual"));
        };
        let saved = ["modules_to_save", "task_type"].into_iter();
        let saved = saved.filter_map(|key| Some((key.to_owned(), config.get(key)?.clone()))).collect();
        let moves_positions = ConfigKeys(config).flag(MOVES_POSITIONS, true)?;
        Ok(Self { count, moves_positions, saved: TargetSpec::from_config(&saved)?, raw: config.clone() })
    }

    /// Whether the config has this key.
    pub(crate) fn says(&self, key: &str) -> bool {
        self.raw.contains_key(key)
    }

    /// As PEFT completes it for the task of `base` ([`task_keys`]).
    pub(crate) fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.extend(task_keys(&self.saved, base)?);
        Self::read(&raw)
    }

    /// Checks the config against a base; `by_key_heads` counts the width of keys as prefixes do, else that of embeddings.
    pub(crate) fn on(&self, base: &dyn BaseModel, by_key_heads: bool) -> Result<Shape> {
        let Some(dims) = base.prompt_dims() else {
            let message = format!("a model of type `{}` takes no virtual tokens here", base.model_type());
            return Err(Error::config("num_virtual_tokens", message));
        };
        // What PEFT cannot do, AdapterHub's package may.
        if by_key_heads && !dims.prefixes && self.moves_positions {
            let message = format!(
                "prefix tuning is not for `{}`, whose layers take no keys and values in front of their own in transformers; use \
                 prompt or p_tuning",
                base.model_type()
            );
            return Err(Error::config("type", message));
        }
        if self.count >= dims.max_positions {
            let message = format!("{} leaves no room in the {} positions of the model", self.count, dims.max_positions);
            return Err(Error::config("num_virtual_tokens", message));
        }
        let (token_dim, heads) = match by_key_heads {
            true => (dims.key_value_size(), dims.key_value_heads),
            false => (dims.hidden_size, dims.attention_heads),
        };
        let keys = ConfigKeys(&self.raw);
        for (key, of_model) in [
            ("num_layers", dims.layers),
            ("num_attention_heads", heads),
            ("token_dim", token_dim),
            ("num_transformer_submodules", dims.submodules),
        ] {
            if let Some(given) = keys.get(key).filter(|v| v.as_u64() != Some(of_model as u64)) {
                let message = format!("is {given}, and this base model has {of_model}; it was made for another model");
                return Err(Error::config(key, message));
            }
        }
        Ok(Shape { count: self.count, token_dim, heads, dims, task: base.task().peft_name() })
    }

    /// The config as PEFT writes it.
    pub(crate) fn written(&self, shape: &Shape, defaults: Map<String, Value>) -> Map<String, Value> {
        let mut out = completed(defaults, &self.raw);
        if self.saved.task_type.is_none() {
            out.insert("task_type".into(), shape.task.into());
        }
        for (key, value) in [
            ("num_layers", shape.dims.layers),
            ("num_attention_heads", shape.heads),
            ("token_dim", shape.token_dim),
            ("num_transformer_submodules", shape.dims.submodules),
        ] {
            out.insert(key.into(), value.into());
        }
        out
    }

    /// The adapter that puts `module` in front of every sequence and trains what `modules_to_save` names.
    ///
    /// # Errors
    /// With [`Unmatched::Error`], a name that no module has.
    pub(crate) fn adapter(
        &self,
        config: Map<String, Value>,
        module: VirtualModule,
        base: &dyn BaseModel,
        unmatched: Unmatched,
    ) -> Result<Built> {
        let selection = select_saved(&self.saved, &candidates(base.sites()), unmatched)?;
        let mut adapter = Adapter::new(config, base.sites());
        let mut tokens = VirtualTokens { count: self.count, moves_positions: self.moves_positions, module };
        if tokens.is_prompt() {
            tokens.moves_positions = true;
            refuse_table(&selection, word_embedding(base)?)?;
        }
        adapter.set_virtual_tokens(tokens);
        insert_saved(&mut adapter, &selection, base)?;
        Ok(Built { adapter, selection })
    }
}

/// Refuses a trained copy of the token embedding beside a prompt: PEFT takes the embeddings of the sequence from the base.
fn refuse_table(selection: &Selection, table: &FrozenEmbedding) -> Result<()> {
    let Some(saved) = selection.saved.iter().find(|saved| saved.members.contains(&table.site().index())) else {
        return Ok(());
    };
    let message = format!(
        "`{}` is or holds the token embedding, of which PEFT stores a copy beside a prompt and neither reads nor trains it; \
         leave it out, or use prefix",
        saved.path
    );
    Err(Error::config("modules_to_save", message))
}

/// The token embedding of a base.
///
/// # Errors
/// When the base has none.
pub fn word_embedding(base: &dyn BaseModel) -> Result<&FrozenEmbedding> {
    for site in base.sites().iter() {
        if let BaseLayer::Embedding(e) = base.layer(site.id)? {
            return Ok(e);
        }
    }
    Err(Error::config("num_virtual_tokens", "the base model has no token embedding to put a prompt beside"))
}
