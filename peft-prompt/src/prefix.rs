//! Prefix tuning (PEFT `tuners/prefix_tuning/model.py`).

use std::sync::Arc;

use candle_core::Tensor;
use peft_core::{
    AdapterSet, BaseModel, Built, ConfigKeys, Ctx, Error, ExpectedTensor, Gate, Parameter, PrefixModule, Result, Role,
    Route, Unmatched, VirtualModule,
};
use serde_json::{Map, Value, json};

use crate::keys::{MAX_ENCODER_WIDTH, MOVES_POSITIONS, Shape, SoftPrompt, defaults};
use crate::network::{Linear, Starts, torch_bound};
use crate::{PROMPT_EMBEDDINGS, Stored};

const PEFT_TYPE: &str = "PREFIX_TUNING";

/// The settings of a prefix.
#[derive(Debug, Clone)]
pub struct PrefixConfig {
    shared: SoftPrompt,
    /// Whether a network makes the prefix in training.
    projection: bool,
    /// Width of the network's hidden layer; `None` is that of a layer's keys.
    encoder_hidden_size: Option<usize>,
    /// Start from zeros.
    zero: bool,
    /// Outputs of the gate of each layer (UniPELT, arXiv:2110.07577), where it has one: one for keys and values, or one each.
    gate_outputs: Option<usize>,
}

/// Keys of our own, which say what PEFT has not: they stand in a config only where they differ from these.
const OWN_KEYS: [(&str, bool); 3] = [(USE_GATING, false), (SHARED_GATING, true), (MOVES_POSITIONS, true)];
const USE_GATING: &str = "use_gating";
const SHARED_GATING: &str = "shared_gating";

fn known() -> Map<String, Value> {
    defaults(PEFT_TYPE, &json!({"encoder_hidden_size": null, "init_weights": null, "prefix_projection": false}))
}

impl PrefixConfig {
    /// Reads the config of an existing adapter. Keys that PEFT may add later are ignored, as PEFT does.
    ///
    /// # Errors
    /// A value of the wrong type or out of range; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        let mut config = config.clone();
        for (key, usual) in OWN_KEYS {
            if ConfigKeys(&config).flag(key, usual)? == usual {
                config.remove(key);
            }
        }
        let keys = ConfigKeys(&config);
        let zero = match keys.text("init_weights")? {
            None => false,
            Some("zero") => true,
            Some(other) => {
                return Err(Error::config("init_weights", format!("\"{other}\" is not \"zero\", nor left out")));
            }
        };
        Ok(Self {
            shared: SoftPrompt::read(&config)?,
            projection: keys.flag("prefix_projection", false)?,
            encoder_hidden_size: keys.count("encoder_hidden_size", MAX_ENCODER_WIDTH)?,
            zero,
            gate_outputs: match keys.flag(USE_GATING, false)? {
                true => Some(if keys.flag(SHARED_GATING, true)? { 1 } else { 2 }),
                false => None,
            },
        })
    }

    /// Whether it says what PEFT has no place for, so that it is for a part of a union: a key of its own.
    #[must_use]
    pub fn beyond_peft(&self) -> Option<&'static str> {
        OWN_KEYS.into_iter().map(|(key, _)| key).find(|key| self.shared.says(key))
    }

    /// Reads the `[method]` table of a recipe: PEFT's keys, where an unknown one is an error with the nearest known.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type or out of range; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        let mut keys = known();
        keys.extend(OWN_KEYS.map(|(key, usual)| (key.to_owned(), usual.into())));
        ConfigKeys(config).refuse_unknown("prefix", &keys)?;
        Self::from_adapter_config(config)
    }

    /// The tensor of PEFT's file for this config on `base`.
    ///
    /// # Errors
    /// When the config does not fit the base; the message names the key.
    pub fn stored(&self, base: &dyn BaseModel) -> Result<ExpectedTensor> {
        let shape = self.shared.on(base, true)?;
        Ok(ExpectedTensor::required(PROMPT_EMBEDDINGS, [shape.count, 2 * shape.dims.layers * shape.token_dim]))
    }

    /// This config as PEFT completes it for the task of `base` ([`peft_core::task_keys`]).
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        Ok(Self { shared: self.shared.for_base(base)?, ..self.clone() })
    }

    /// Makes the adapter that this config describes on `base`: with [`Stored::Flat`] the prefix itself is trained, whatever
    /// `prefix_projection` says. Random starts are a function of `seed`.
    ///
    /// # Errors
    /// When the config does not fit the base; with [`Unmatched::Error`], a name in `modules_to_save` that is no module's. The
    /// message names the key.
    pub fn build(&self, base: &dyn BaseModel, seed: u64, stored: Stored, unmatched: Unmatched) -> Result<Built> {
        let shape = self.shared.on(base, true)?;
        let mut config = self.shared.written(&shape, known());
        let hidden = self.encoder_hidden_size.unwrap_or(shape.token_dim);
        config.insert("encoder_hidden_size".into(), hidden.into());
        let mut starts = Starts::new(seed, base.device());
        let module: Arc<dyn PrefixModule> = match self.projection && stored == Stored::Trained {
            true => Arc::new(ProjectedPrefix::new(&shape, hidden, self.zero, &mut starts)?),
            false => {
                let width = 2 * shape.dims.layers * shape.token_dim;
                let embeddings = starts.table(PROMPT_EMBEDDINGS, shape.count, width, self.zero, Role::Plain)?;
                Arc::new(FlatPrefix { embeddings, shape })
            }
        };
        let module = match self.gate_outputs {
            None => module,
            Some(outputs) => {
                let gate = |layer: usize| {
                    let width = [outputs, shape.dims.hidden_size];
                    Gate::start(&format!("prefix_gates.{layer}"), width, self.zero, starts.stream(), base.device())
                };
                let gates = (0..shape.dims.layers).map(gate).collect::<Result<_>>()?;
                Arc::new(GatedPrefix { prefix: module, gates })
            }
        };
        self.shared.adapter(config, VirtualModule::Prefix(module), base, unmatched)
    }
}

/// Cuts `[tokens, 2 · width]` into keys and values.
fn keys_and_values(both: &Tensor, width: usize) -> Result<(Tensor, Tensor)> {
    Ok((both.narrow(1, 0, width)?.contiguous()?, both.narrow(1, width, width)?.contiguous()?))
}

/// A prefix with a gate in each layer.
#[derive(Debug)]
struct GatedPrefix {
    prefix: Arc<dyn PrefixModule>,
    gates: Vec<Gate>,
}

impl PrefixModule for GatedPrefix {
    fn keys_values(&self, layer: usize, ctx: &Ctx<'_>) -> Result<(Tensor, Tensor)> {
        self.prefix.keys_values(layer, ctx)
    }

    fn gate(&self, layer: usize) -> Option<&Gate> {
        self.gates.get(layer)
    }

    fn parameters(&self) -> Vec<&Parameter> {
        self.prefix.parameters().into_iter().chain(self.gates.iter().flat_map(Gate::parameters)).collect()
    }

    fn exported(&self) -> Result<Vec<(String, Tensor)>> {
        let of_gates = self.gates.iter().flat_map(Gate::parameters).map(|p| (p.name().to_string(), p.value()));
        Ok(self.prefix.exported()?.into_iter().chain(of_gates).collect())
    }
}

/// A prefix that is trained as it is.
#[derive(Debug)]
struct FlatPrefix {
    /// `[virtual tokens, layers · 2 · width]`: keys, then values, layer by layer.
    embeddings: Parameter,
    shape: Shape,
}

impl PrefixModule for FlatPrefix {
    fn keys_values(&self, layer: usize, ctx: &Ctx<'_>) -> Result<(Tensor, Tensor)> {
        let (layer, width) = (self.shape.prefix_layer(layer), self.shape.token_dim);
        keys_and_values(&self.embeddings.get(ctx).narrow(1, 2 * layer * width, 2 * width)?, width)
    }

    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.embeddings]
    }
}

/// A prefix that a network makes: `Linear(tanh(Linear(embedding)))`, the last layer cut by the model's layers so that each
/// block's backward pass touches its own part alone.
#[derive(Debug)]
struct ProjectedPrefix {
    /// `[virtual tokens, width]`.
    embedding: Parameter,
    hidden: Linear,
    layers: Vec<Linear>,
    shape: Shape,
}

impl ProjectedPrefix {
    fn new(shape: &Shape, hidden: usize, zero: bool, starts: &mut Starts<'_>) -> Result<Self> {
        let width = shape.token_dim;
        // Behind zeros nothing moves on the first step.
        let role = if zero { Role::ZeroAtStart } else { Role::Plain };
        let embedding = starts.table("embedding.weight", shape.count, width, false, role)?;
        let first = Linear::new("transform.0", (width, hidden), torch_bound(width), role, starts)?;
        let bound = if zero { 0.0 } else { torch_bound(hidden) };
        let layer =
            |l: usize| Linear::new(&format!("transform.2.{l}"), (hidden, 2 * width), bound, Role::Plain, starts);
        let layers = (0..shape.dims.layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { embedding, hidden: first, layers, shape: *shape })
    }

    /// `[virtual tokens, 2 · width]` of one layer.
    fn layer(&self, layer: usize, ctx: &Ctx<'_>) -> Result<Tensor> {
        let Some(last) = self.layers.get(layer) else {
            return Err(Error::msg(format!("layer {layer} of a prefix for {}", self.layers.len())));
        };
        last.forward(&self.hidden.forward(&self.embedding.get(ctx), ctx)?.tanh()?, ctx)
    }
}

impl PrefixModule for ProjectedPrefix {
    fn keys_values(&self, layer: usize, ctx: &Ctx<'_>) -> Result<(Tensor, Tensor)> {
        keys_and_values(&self.layer(self.shape.prefix_layer(layer), ctx)?, self.shape.token_dim)
    }

    fn parameters(&self) -> Vec<&Parameter> {
        let layers = self.layers.iter().flat_map(Linear::parameters);
        std::iter::once(&self.embedding).chain(self.hidden.parameters()).chain(layers).collect()
    }

    fn exported(&self) -> Result<Vec<(String, Tensor)>> {
        let set = AdapterSet::empty();
        let ctx = Ctx::eval(&set, &Route::Base);
        let layers = (0..self.layers.len()).map(|l| self.layer(l, &ctx)).collect::<Result<Vec<_>>>()?;
        Ok(vec![(PROMPT_EMBEDDINGS.to_owned(), Tensor::cat(&layers, 1)?.contiguous()?)])
    }
}
