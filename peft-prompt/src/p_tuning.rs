//! P-tuning (PEFT `tuners/p_tuning/model.py`): a prompt that a network makes in training.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_core::{
    AdapterSet, BaseModel, Built, ConfigKeys, Ctx, Error, ExpectedTensor, Parameter, PromptModule, Result, Role, Route,
    Unmatched, VirtualModule,
};
use serde_json::{Map, Value, json};

use crate::keys::{MAX_ENCODER_WIDTH, SoftPrompt, defaults};
use crate::network::{Linear, Starts, torch_bound};
use crate::prompt::{flat, stored, used};
use crate::{PROMPT_EMBEDDINGS, Stored};

const PEFT_TYPE: &str = "P_TUNING";
/// Layers of an LSTM, at most.
const MAX_LAYERS: usize = 16;

/// The settings of P-tuning.
#[derive(Debug, Clone)]
pub struct PTuningConfig {
    shared: SoftPrompt,
    lstm: bool,
    /// Width of the network; `None` is that of the embeddings.
    hidden: Option<usize>,
    /// Layers of the LSTM.
    layers: usize,
}

fn known() -> Map<String, Value> {
    let own = json!({
        "encoder_dropout": 0.0, "encoder_hidden_size": null, "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP"
    });
    defaults(PEFT_TYPE, &own)
}

impl PTuningConfig {
    /// Reads the config of an existing adapter. Keys that PEFT may add later are ignored, as PEFT does.
    ///
    /// # Errors
    /// A value of the wrong type or out of range; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(config);
        let lstm = match keys.text("encoder_reparameterization_type")? {
            None | Some("MLP") => false,
            Some("LSTM") => true,
            Some(other) => {
                let message = format!("\"{other}\" is neither \"MLP\" nor \"LSTM\"");
                return Err(Error::config("encoder_reparameterization_type", message));
            }
        };
        Ok(Self {
            shared: SoftPrompt::read(config)?,
            lstm,
            hidden: keys.count("encoder_hidden_size", MAX_ENCODER_WIDTH)?,
            layers: keys.count("encoder_num_layers", MAX_LAYERS)?.unwrap_or(2),
        })
    }

    /// Reads the `[method]` table of a recipe: PEFT's keys, where an unknown one is an error with the nearest known.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type or out of range; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(config);
        keys.refuse_unknown("p_tuning", &known())?;
        if keys.number("encoder_dropout", 0.0)? != 0.0 {
            return Err(Error::config("encoder_dropout", "is not built here; leave it at 0"));
        }
        Self::from_adapter_config(config)
    }

    /// The tensor of PEFT's file for this config on `base`.
    ///
    /// # Errors
    /// When the config does not fit the base; the message names the key.
    pub fn stored(&self, base: &dyn BaseModel) -> Result<ExpectedTensor> {
        Ok(stored(&self.shared.on(base, false)?))
    }

    /// This config as PEFT completes it for the task of `base` ([`peft_core::task_keys`]).
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        Ok(Self { shared: self.shared.for_base(base)?, ..self.clone() })
    }

    /// Makes the adapter that this config describes on `base`: with [`Stored::Flat`] the prompt itself is trained. Random
    /// starts are a function of `seed`.
    ///
    /// # Errors
    /// When the config does not fit the base; with [`Unmatched::Error`], a name in `modules_to_save` that is no module's. The
    /// message names the key.
    pub fn build(&self, base: &dyn BaseModel, seed: u64, stored: Stored, unmatched: Unmatched) -> Result<Built> {
        let shape = self.shared.on(base, false)?;
        let mut config = self.shared.written(&shape, known());
        let hidden = self.hidden.unwrap_or(shape.token_dim);
        config.insert("encoder_hidden_size".into(), hidden.into());
        if stored == Stored::Flat {
            return self.shared.adapter(config, flat(&shape, base, None)?, base, unmatched);
        }
        let mut starts = Starts::new(seed, base.device());
        let width = shape.token_dim;
        let embedding = starts.table("embedding.weight", shape.stored_rows(), width, false, Role::Plain)?;
        let (lstm, widths) = match self.lstm {
            true => (Some(Lstm::new(width, hidden, self.layers, &mut starts)?), vec![2 * hidden, 2 * hidden, width]),
            false => (None, vec![width, hidden, hidden, width]),
        };
        let layer = |(i, w): (usize, &[usize])| {
            Linear::new(&format!("mlp_head.{}", 2 * i), (w[0], w[1]), torch_bound(w[0]), Role::Plain, &mut starts)
        };
        let head = widths.windows(2).enumerate().map(layer).collect::<Result<_>>()?;
        let module = VirtualModule::Prompt(Arc::new(EncodedPrompt { embedding, lstm, head, count: shape.count }));
        self.shared.adapter(config, module, base, unmatched)
    }
}

/// Embedding, an LSTM where there is one, then linear layers with ReLU between.
#[derive(Debug)]
struct EncodedPrompt {
    /// `[virtual tokens, hidden]`.
    embedding: Parameter,
    lstm: Option<Lstm>,
    head: Vec<Linear>,
    /// Rows that are put in front of sequences.
    count: usize,
}

impl EncodedPrompt {
    /// All rows, which are stored.
    fn all(&self, ctx: &Ctx<'_>) -> Result<Tensor> {
        let mut x = self.embedding.get(ctx);
        if let Some(lstm) = &self.lstm {
            x = lstm.forward(&x, ctx)?;
        }
        for (i, layer) in self.head.iter().enumerate() {
            x = layer.forward(&if i > 0 { x.relu()? } else { x }, ctx)?;
        }
        Ok(x)
    }
}

impl PromptModule for EncodedPrompt {
    fn embeddings(&self, ctx: &Ctx<'_>) -> Result<Tensor> {
        used(self.all(ctx)?, self.count)
    }

    fn parameters(&self) -> Vec<&Parameter> {
        let lstm = self.lstm.iter().flat_map(Lstm::parameters);
        std::iter::once(&self.embedding).chain(lstm).chain(self.head.iter().flat_map(Linear::parameters)).collect()
    }

    fn exported(&self) -> Result<Vec<(String, Tensor)>> {
        let set = AdapterSet::empty();
        let prompt = self.all(&Ctx::eval(&set, &Route::Base))?;
        Ok(vec![(PROMPT_EMBEDDINGS.to_owned(), prompt)])
    }
}

/// A bidirectional LSTM of several layers (`torch.nn.LSTM`): gates in the order input, forget, cell, output.
#[derive(Debug)]
struct Lstm {
    /// Forward and backward direction of each layer.
    layers: Vec<[Direction; 2]>,
    hidden: usize,
}

#[derive(Debug)]
struct Direction {
    /// `[4 · hidden, in]` and its bias.
    input: Linear,
    /// `[4 · hidden, hidden]` and its bias.
    recurrent: Linear,
}

impl Lstm {
    fn new(width: usize, hidden: usize, layers: usize, starts: &mut Starts<'_>) -> Result<Self> {
        let mut direction = |layer: usize, name: &str| -> Result<Direction> {
            let inp = if layer == 0 { width } else { 2 * hidden };
            let mut part = |part: &str, inp: usize| {
                let name = format!("lstm_head.{layer}{name}.{part}");
                Linear::new(&name, (inp, 4 * hidden), torch_bound(hidden), Role::Plain, starts)
            };
            Ok(Direction { input: part("ih", inp)?, recurrent: part("hh", hidden)? })
        };
        let layers = (0..layers).map(|l| Ok([direction(l, "")?, direction(l, ".reverse")?])).collect::<Result<_>>()?;
        Ok(Self { layers, hidden })
    }

    /// `[tokens, in]` to `[tokens, 2 · hidden]`.
    fn forward(&self, x: &Tensor, ctx: &Ctx<'_>) -> Result<Tensor> {
        let mut x = x.clone();
        for [ahead, back] in &self.layers {
            let tokens = x.dim(0)?;
            let ahead = ahead.run(&x, 0..tokens, self.hidden, ctx)?;
            let mut back = back.run(&x, (0..tokens).rev(), self.hidden, ctx)?;
            back.reverse();
            x = Tensor::cat(&[Tensor::cat(&ahead, 0)?, Tensor::cat(&back, 0)?], 1)?;
        }
        Ok(x)
    }

    fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let directions = self.layers.iter().flatten();
        directions.flat_map(|d| d.input.parameters().into_iter().chain(d.recurrent.parameters()))
    }
}

impl Direction {
    /// The hidden state `[1, hidden]` after each token, in the order in which they are met.
    fn run(&self, x: &Tensor, order: impl Iterator<Item = usize>, hidden: usize, ctx: &Ctx<'_>) -> Result<Vec<Tensor>> {
        let from_input = self.input.forward(x, ctx)?;
        let mut h = Tensor::zeros((1, hidden), DType::F32, x.device())?;
        let mut c = h.clone();
        let mut states = Vec::new();
        for t in order {
            let gates = (from_input.narrow(0, t, 1)? + self.recurrent.forward(&h, ctx)?)?;
            let gate = |i: usize| gates.narrow(1, i * hidden, hidden);
            c = ((sigmoid(&gate(1)?)? * &c)? + (sigmoid(&gate(0)?)? * gate(2)?.tanh()?)?)?;
            h = (sigmoid(&gate(3)?)? * c.tanh()?)?;
            states.push(h.clone());
        }
        Ok(states)
    }
}

/// `1 / (1 + e^−x)`, as `(tanh(x/2) + 1)/2`, which overflows nowhere.
fn sigmoid(x: &Tensor) -> candle_core::Result<Tensor> {
    (x * 0.5)?.tanh()?.affine(0.5, 0.5)
}
