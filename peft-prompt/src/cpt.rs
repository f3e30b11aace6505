//! Context-aware prompt tuning (Blau et al. 2024, arXiv:2410.17222; PEFT `tuners/cpt`): the tokens of examples stand in front of
//! every sequence, their embeddings are moved within a small ball around where they were, and their labels count too.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::{
    BaseModel, Built, ConfigKeys, Context, Ctx, Error, ExpectedTensor, Parameter, PromptModule, PromptTarget, Result,
    Role, Task, TrainingHook, Unmatched, VirtualModule,
};
use serde_json::{Map, Value, json};

use crate::PROMPT_EMBEDDINGS;
use crate::keys::{Shape, SoftPrompt, defaults, word_embedding};
use crate::prompt::stored;

const PEFT_TYPE: &str = "CPT";
/// Where the ball of each token lies; in checkpoints alone.
const CENTER: &str = "cpt_center";
/// PEFT gives its radii for this width of embeddings.
const WIDTH: f64 = 2048.0;
/// The radius of tokens that stay where they are.
const STILL: f64 = 1e-10;
/// Tokens of the context, at most.
const MOST: usize = 1 << 20;

/// The settings of context-aware prompt tuning.
#[derive(Debug, Clone)]
pub struct CptConfig {
    shared: SoftPrompt,
    ids: Vec<u32>,
    /// What each token is: 0 nothing, else `4·k + 1` of an example's input template, `+ 2` its input, `+ 3` its output
    /// template, `4·k` its label.
    kinds: Vec<u32>,
    /// `opt_loss_decay_factor` where `opt_weighted_loss_type` is `decay`, else 1.
    decay: f64,
    epsilon: f64,
    format_epsilon: f64,
}

fn known() -> Map<String, Value> {
    let own = json!({
        "cpt_mask": null, "cpt_token_ids": null, "cpt_tokens_type_mask": null, "opt_loss_decay_factor": 1.0,
        "opt_projection_epsilon": 0.1, "opt_projection_format_epsilon": 0.1, "opt_weighted_loss_type": "none",
        "tokenizer_name_or_path": null
    });
    defaults(PEFT_TYPE, &own)
}

/// A list of whole numbers, one a token of the context.
fn numbers(keys: ConfigKeys<'_>, key: &str) -> Result<Option<Vec<u32>>> {
    let Some(value) = keys.get(key).filter(|v| !v.is_null()) else { return Ok(None) };
    let list = value.as_array().filter(|list| !list.is_empty() && list.len() <= MOST);
    let list = list.ok_or_else(|| Error::config(key, "is not a list of numbers, one a token"))?;
    let number = |v: &Value| {
        let number = v.as_u64().and_then(|n| u32::try_from(n).ok());
        number.ok_or_else(|| Error::config(key, format!("holds {v}, which is not a whole number of 0 or more")))
    };
    Ok(Some(list.iter().map(number).collect::<Result<_>>()?))
}

impl CptConfig {
    /// Reads the config of an existing adapter. Keys that PEFT may add later are ignored, as PEFT does.
    ///
    /// # Errors
    /// A value of the wrong type or out of range, or lists of unequal length; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(config);
        let Some(ids) = numbers(keys, "cpt_token_ids")? else {
            return Err(Error::config("cpt_token_ids", "is not given: the ids of the tokens that stand in front"));
        };
        let of_each = |key: &str| match numbers(keys, key)? {
            Some(list) if list.len() != ids.len() => {
                Err(Error::config(key, format!("has {} numbers for {} of cpt_token_ids", list.len(), ids.len())))
            }
            list => Ok(list.unwrap_or_else(|| vec![1; ids.len()])),
        };
        let (kinds, _) = (of_each("cpt_tokens_type_mask")?, of_each("cpt_mask")?);
        let decay = keys.number("opt_loss_decay_factor", 1.0)?;
        let decay = match keys.text("opt_weighted_loss_type")? {
            None | Some("none") => 1.0,
            Some("decay") if decay.is_finite() && decay >= 0.0 => decay,
            Some("decay") => return Err(Error::config("opt_loss_decay_factor", format!("{decay} is negative"))),
            Some(other) => {
                let message = format!("\"{other}\" is none of \"none\", \"decay\"");
                return Err(Error::config("opt_weighted_loss_type", message));
            }
        };
        let radius = |key: &str| match keys.number(key, 0.1)? {
            radius if radius.is_finite() && radius >= 0.0 => Ok(radius),
            radius => Err(Error::config(key, format!("{radius} is negative"))),
        };
        let mut of_prompt = config.clone();
        let count = of_prompt.insert("num_virtual_tokens".into(), ids.len().into());
        if let Some(count) = count.filter(|v| !v.is_null() && v.as_u64() != Some(ids.len() as u64)) {
            let message = format!("is {count}, and cpt_token_ids has {}; leave it out", ids.len());
            return Err(Error::config("num_virtual_tokens", message));
        }
        Ok(Self {
            shared: SoftPrompt::read(&of_prompt)?,
            kinds,
            decay,
            epsilon: radius("opt_projection_epsilon")?,
            format_epsilon: radius("opt_projection_format_epsilon")?,
            ids,
        })
    }

    /// Reads the `[method]` table of a recipe: PEFT's keys, where an unknown one is an error with the nearest known.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type or out of range; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        ConfigKeys(config).refuse_unknown("cpt", &known())?;
        Self::from_adapter_config(config)
    }

    /// The tensor of PEFT's file for this config on `base`.
    ///
    /// # Errors
    /// When the config does not fit the base; the message names the key.
    pub fn stored(&self, base: &dyn BaseModel) -> Result<ExpectedTensor> {
        Ok(stored(&self.on(base)?))
    }

    fn on(&self, base: &dyn BaseModel) -> Result<Shape> {
        if base.task() != Task::CausalLm {
            return Err(Error::config("type", "cpt is for causal language models alone, as PEFT has it"));
        }
        self.shared.on(base, false)
    }

    /// This config as PEFT completes it for the task of `base` ([`peft_core::task_keys`]).
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        Ok(Self { shared: self.shared.for_base(base)?, ..self.clone() })
    }

    /// An adapter on `base` for the values `embeddings: [tokens, hidden]` of a file, around which it is then trained further.
    ///
    /// # Errors
    /// When the config does not fit the base; the message names the key.
    pub fn open(&self, base: &dyn BaseModel, embeddings: &Tensor) -> Result<Built> {
        self.adapter(&self.on(base)?, embeddings, base, Unmatched::Report)
    }

    /// Makes the adapter that this config describes on `base`: the embeddings of its tokens.
    ///
    /// # Errors
    /// When the config does not fit the base, an id is outside the vocabulary, or a name in `modules_to_save` is no module's; the
    /// message names the key.
    pub fn build(&self, base: &dyn BaseModel) -> Result<Built> {
        let shape = self.on(base)?;
        let embeddings = word_embedding(base)?.base(&self.ids).with_context(|| "cpt_token_ids")?;
        self.adapter(&shape, &embeddings, base, Unmatched::Error)
    }

    fn adapter(&self, shape: &Shape, embeddings: &Tensor, base: &dyn BaseModel, unmatched: Unmatched) -> Result<Built> {
        let value = embeddings.to_dtype(DType::F32)?.to_device(base.device())?;
        let moves: Vec<f32> = self.kinds.iter().map(|kind| f32::from(u8::from(kind % 4 != 0))).collect();
        let prompt = CptPrompt {
            // Weight decay would pull the embeddings to 0, not back to where they were.
            embeddings: Parameter::new(PROMPT_EMBEDDINGS, &value, Role::NoDecay)?,
            center: Parameter::new(CENTER, &value, Role::NoDecay)?,
            moves: Tensor::from_vec(moves, (self.ids.len(), 1), &Device::Cpu)?.to_device(base.device())?,
        };
        let hook = Ball {
            embeddings: prompt.embeddings.clone(),
            center: prompt.center.clone(),
            radii: self.radii(shape.token_dim),
            targets: self.targets(),
        };
        let module = VirtualModule::Prompt(Arc::new(prompt));
        let mut built = self.shared.adapter(self.shared.written(shape, known()), module, base, unmatched)?;
        built.adapter.set_training_hook(Box::new(hook));
        Ok(built)
    }

    /// How far each token may move, for embeddings of this width.
    fn radii(&self, width: usize) -> Vec<f64> {
        let scale = (width as f64 / WIDTH).sqrt();
        let radius = |kind: &u32| match kind % 4 {
            2 => self.epsilon * scale,
            1 | 3 => self.format_epsilon * scale,
            _ => STILL,
        };
        self.kinds.iter().map(radius).collect()
    }

    /// The labels among the tokens. The rows' own weigh 1, those of the last example the factor, those of the one before its
    /// square, and so on.
    fn targets(&self) -> Vec<PromptTarget> {
        let is_label = |kind: u32| kind > 0 && kind.is_multiple_of(4);
        let mut groups: Vec<u32> = self.kinds.iter().copied().skip(1).filter(|kind| is_label(*kind)).collect();
        groups.sort_unstable_by(|a, b| b.cmp(a));
        groups.dedup();
        let tokens = self.ids.iter().zip(&self.kinds).enumerate().skip(1);
        tokens
            .filter_map(|(place, (id, kind))| {
                let age = groups.iter().position(|group| group == kind)?;
                let weight = self.decay.powi(i32::try_from(age + 1).unwrap_or(i32::MAX));
                Some(PromptTarget { place: place - 1, id: *id, weight })
            })
            .collect()
    }
}

/// Embeddings of tokens, of which those move that are no labels.
#[derive(Debug)]
struct CptPrompt {
    /// `[tokens, hidden]`.
    embeddings: Parameter,
    /// Where they were.
    center: Parameter,
    /// 1 for tokens that move, `[tokens, 1]`.
    moves: Tensor,
}

impl PromptModule for CptPrompt {
    fn embeddings(&self, ctx: &Ctx<'_>) -> Result<Tensor> {
        if !ctx.mode.tracks() {
            return Ok(self.embeddings.value());
        }
        let moving = self.embeddings.get(ctx).broadcast_mul(&self.moves)?;
        Ok((moving + self.embeddings.value().broadcast_mul(&(1.0 - &self.moves)?)?)?)
    }

    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.embeddings]
    }

    fn frozen(&self) -> Vec<&Parameter> {
        vec![&self.center]
    }
}

/// Brings what a step moved too far back to the edge of its ball.
#[derive(Debug)]
struct Ball {
    embeddings: Parameter,
    center: Parameter,
    radii: Vec<f64>,
    targets: Vec<PromptTarget>,
}

impl TrainingHook for Ball {
    fn after_step(&self, _: u64, _: &HashMap<&str, &Tensor>) -> Result<()> {
        let center = self.center.value();
        let moved = (self.embeddings.value() - &center)?;
        let lengths = moved.sqr()?.sum(1)?.sqrt()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let keep = |(length, radius): (&f64, &f64)| if length > radius { (radius / length) as f32 } else { 1.0 };
        let keep: Vec<f32> = lengths.iter().zip(&self.radii).map(keep).collect();
        let keep = Tensor::from_vec(keep, (lengths.len(), 1), &Device::Cpu)?.to_device(center.device())?;
        self.embeddings.set(&(center + moved.broadcast_mul(&keep)?)?)
    }

    fn prompt_targets(&self) -> &[PromptTarget] {
        &self.targets
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn config(text: Value) -> Result<CptConfig> {
        CptConfig::from_recipe(text.as_object().unwrap())
    }

    /// By hand, for two examples of template, input, output template, label.
    #[test]
    fn labels_of_older_examples_weigh_less() {
        let keys = json!({"cpt_token_ids": [5, 6, 7, 8, 9, 5, 6, 7, 3], "cpt_tokens_type_mask": [1, 2, 3, 4, 4, 5, 6, 7, 8],
            "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5, "opt_projection_epsilon": 0.2});
        let targets = config(keys.clone()).unwrap().targets();
        let target = |place, id, weight| PromptTarget { place, id, weight };
        assert_eq!(targets, [target(2, 8, 0.25), target(3, 9, 0.25), target(7, 3, 0.5)]);
        let radii = config(keys).unwrap().radii(512);
        assert_eq!(radii, [0.05, 0.1, 0.05, STILL, STILL, 0.05, 0.1, 0.05, STILL]);
        let plain = config(json!({"cpt_token_ids": [5, 6], "cpt_tokens_type_mask": [1, 4]})).unwrap();
        assert_eq!(plain.targets(), [target(0, 6, 1.0)]);
    }

    #[test]
    fn a_step_ends_on_the_edge() {
        let tensor = |rows: &[[f32; 2]; 3]| Tensor::new(rows, &Device::Cpu).unwrap();
        let center = Parameter::new("c", &tensor(&[[1.0, 0.0], [0.0, 0.0], [2.0, 2.0]]), Role::NoDecay).unwrap();
        let embeddings = Parameter::new("p", &tensor(&[[1.0, 4.0], [3.0, 4.0], [2.3, 2.4]]), Role::NoDecay).unwrap();
        let ball = Ball { embeddings, center, radii: vec![2.0, 1.0, 1.0], targets: Vec::new() };
        ball.after_step(0, &HashMap::new()).unwrap();
        let moved = ball.embeddings.value().to_vec2::<f32>().unwrap();
        for (row, want) in moved.iter().zip([[1.0, 2.0], [0.6, 0.8], [2.3, 2.4]]) {
            assert!(row.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "{moved:?}");
        }
    }

    #[test]
    fn wrong_values_name_the_key() {
        for (keys, says) in [
            (json!({}), "cpt_token_ids"),
            (json!({"cpt_token_ids": []}), "cpt_token_ids"),
            (json!({"cpt_token_ids": [1, -2]}), "-2"),
            (json!({"cpt_token_ids": [1, 2], "cpt_mask": [1]}), "cpt_mask"),
            (json!({"cpt_token_ids": [1, 2], "cpt_tokens_type_mask": [1, 2, 3]}), "cpt_tokens_type_mask"),
            (json!({"cpt_token_ids": [1, 2], "num_virtual_tokens": 3}), "num_virtual_tokens"),
            (json!({"cpt_token_ids": [1], "opt_weighted_loss_type": "fade"}), "decay"),
            (json!({"cpt_token_ids": [1], "opt_projection_epsilon": -0.1}), "opt_projection_epsilon"),
            (json!({"cpt_token_id": [1]}), "cpt_token_ids"),
        ] {
            let e = config(keys).unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        }
    }
}
