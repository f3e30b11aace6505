//! Prompt tuning (PEFT `tuners/prompt_tuning/model.py`).

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::{
    BaseModel, Built, ConfigKeys, Context, Ctx, Error, ExpectedTensor, Parameter, PromptModule, Result, Role,
    Unmatched, VirtualModule,
};
use serde_json::{Map, Value, json};

use crate::PROMPT_EMBEDDINGS;
use crate::keys::{Shape, SoftPrompt, defaults, word_embedding};
use crate::network::Starts;

const PEFT_TYPE: &str = "PROMPT_TUNING";

/// How a prompt starts: `prompt_tuning_init`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptStart {
    /// From a standard normal.
    Random,
    /// From the embeddings of random tokens.
    SampleVocab,
    /// From the embeddings of a text: `prompt_tuning_init_text`, cut or repeated to the number of virtual tokens.
    Text(String),
}

/// The settings of prompt tuning.
#[derive(Debug, Clone)]
pub struct PromptConfig {
    shared: SoftPrompt,
    /// How the prompt starts.
    pub start: PromptStart,
    /// Where the tokenizer for [`PromptStart::Text`] lies.
    pub tokenizer: Option<String>,
}

pub(crate) fn known() -> Map<String, Value> {
    let own = json!({
        "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": null, "tokenizer_kwargs": null,
        "tokenizer_name_or_path": null
    });
    defaults(PEFT_TYPE, &own)
}

impl PromptConfig {
    /// Reads the config of an existing adapter. Keys that PEFT may add later are ignored, as PEFT does.
    ///
    /// # Errors
    /// A value of the wrong type or out of range; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(config);
        let (start, tokenizer) = read_start(keys)?;
        Ok(Self { shared: SoftPrompt::read(config)?, start, tokenizer })
    }

    /// Reads the `[method]` table of a recipe: PEFT's keys, where an unknown one is an error with the nearest known.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type or out of range; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        ConfigKeys(config).refuse_unknown("prompt", &known())?;
        if let (Some(_), None | Some("RANDOM" | "SAMPLE_VOCAB")) = (
            ConfigKeys(config).get("prompt_tuning_init_text"),
            ConfigKeys(config).get("prompt_tuning_init").and_then(Value::as_str),
        ) {
            return Err(Error::config("prompt_tuning_init_text", "is used with prompt_tuning_init = \"TEXT\" only"));
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

    /// An adapter on `base` whose values are to be read from a file.
    ///
    /// # Errors
    /// When the config does not fit the base; the message names the key.
    pub fn open(&self, base: &dyn BaseModel) -> Result<Built> {
        let shape = self.shared.on(base, false)?;
        let module = flat(&shape, base, None)?;
        self.shared.adapter(self.shared.written(&shape, known()), module, base, Unmatched::Report)
    }

    /// Makes the adapter that this config describes on `base`. Random starts are a function of `seed`; `text_ids` are the
    /// tokens of the text to start from.
    ///
    /// # Errors
    /// When the config does not fit the base, the text has no tokens, or a name in `modules_to_save` is no module's; the
    /// message names the key.
    pub fn build(&self, base: &dyn BaseModel, seed: u64, text_ids: &[u32]) -> Result<Built> {
        let shape = self.shared.on(base, false)?;
        let mut starts = Starts::new(seed, base.device());
        let value = start_values(&self.start, &shape, base, &mut starts, text_ids)?;
        let module = flat(&shape, base, Some(value))?;
        self.shared.adapter(self.shared.written(&shape, known()), module, base, Unmatched::Error)
    }
}

/// How a prompt starts, and where the tokenizer of its text lies.
pub(crate) fn read_start(keys: ConfigKeys<'_>) -> Result<(PromptStart, Option<String>)> {
    let text = keys.text("prompt_tuning_init_text")?;
    let start = match (keys.text("prompt_tuning_init")?, text) {
        (None | Some("RANDOM"), _) => PromptStart::Random,
        (Some("SAMPLE_VOCAB"), _) => PromptStart::SampleVocab,
        (Some("TEXT"), Some(text)) => PromptStart::Text(text.to_owned()),
        (Some("TEXT"), None) => {
            return Err(Error::config("prompt_tuning_init_text", "is not given, and prompt_tuning_init is \"TEXT\""));
        }
        (Some(other), _) => {
            let message = format!("\"{other}\" is none of \"RANDOM\", \"SAMPLE_VOCAB\", \"TEXT\"");
            return Err(Error::config("prompt_tuning_init", message));
        }
    };
    if keys.get("tokenizer_kwargs").is_some_and(|v| v.as_object().is_none_or(|map| !map.is_empty())) {
        return Err(Error::config("tokenizer_kwargs", "is not honoured here; leave it out"));
    }
    let tokenizer = keys.text("tokenizer_name_or_path")?.map(str::to_owned);
    Ok((start, tokenizer))
}

/// The rows `[stored rows, hidden]` that a prompt starts from.
pub(crate) fn start_values(
    start: &PromptStart,
    shape: &Shape,
    base: &dyn BaseModel,
    starts: &mut Starts,
    text_ids: &[u32],
) -> Result<Tensor> {
    let table = word_embedding(base)?;
    Ok(match start {
        PromptStart::Random => {
            let values = starts.stream().normal_vec(shape.stored_rows() * shape.token_dim, 1.0);
            Tensor::from_vec(values, (shape.stored_rows(), shape.token_dim), &Device::Cpu)?
        }
        PromptStart::SampleVocab => {
            let (stream, vocab) = (starts.stream(), table.weight().out_features());
            // The word scaled down: every token as likely as another up to 2⁻³².
            let id = |i: usize| ((u64::from(stream.word(i as u64)) * vocab as u64) >> 32) as u32;
            table.base(&(0..shape.stored_rows()).map(id).collect::<Vec<_>>())?
        }
        PromptStart::Text(_) if text_ids.is_empty() => {
            return Err(Error::config("prompt_tuning_init_text", "has no tokens"));
        }
        PromptStart::Text(_) => {
            let ids: Vec<u32> = text_ids.iter().copied().cycle().take(shape.stored_rows()).collect();
            table.base(&ids).with_context(|| "prompt_tuning_init_text")?
        }
    })
}

/// The tensor of a prompt's file.
pub(crate) fn stored(shape: &Shape) -> ExpectedTensor {
    ExpectedTensor::required(PROMPT_EMBEDDINGS, [shape.stored_rows(), shape.token_dim])
}

/// A prompt that is trained as it is, from `value` or zeros.
pub(crate) fn flat(shape: &Shape, base: &dyn BaseModel, value: Option<Tensor>) -> Result<VirtualModule> {
    let value = match value {
        Some(value) => value.to_dtype(DType::F32)?.to_device(base.device())?,
        None => Tensor::zeros((shape.stored_rows(), shape.token_dim), DType::F32, base.device())?,
    };
    let embeddings = Parameter::new(PROMPT_EMBEDDINGS, &value, Role::Plain)?;
    Ok(VirtualModule::Prompt(Arc::new(FlatPrompt { embeddings, count: shape.count })))
}

/// The rows of a prompt that are put in front of sequences.
pub(crate) fn used(all: Tensor, count: usize) -> Result<Tensor> {
    if all.dim(0)? == count { Ok(all) } else { Ok(all.narrow(0, 0, count)?.contiguous()?) }
}

/// A prompt that is trained as it is.
#[derive(Debug)]
struct FlatPrompt {
    /// `[virtual tokens, hidden]`.
    embeddings: Parameter,
    /// Rows that are put in front of sequences.
    count: usize,
}

impl PromptModule for FlatPrompt {
    fn embeddings(&self, ctx: &Ctx<'_>) -> Result<Tensor> {
        used(self.embeddings.get(ctx), self.count)
    }

    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.embeddings]
    }
}
