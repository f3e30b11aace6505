//! Llama-Adapter (Zhang et al. 2023, arXiv:2303.16199; PEFT `tuners/adaption_prompt`): tokens that the queries of the last layers
//! see with a softmax of its own, times a gate that starts at 0.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::config_keys::{completed, peft_defaults};
use peft_core::kernels::{AttentionPlan, SequenceSpan, Stream, attention};
use peft_core::{
    Adapter, AttentionModule, BaseModel, Built, ConfigKeys, Ctx, Error, ExpectedTensor, FrozenLinear, Heads, Parameter,
    Result, Role, Selection, SiteAdapter, SiteModule, SublayerKind, SublayerSite, TargetSpec, parameter_name,
    task_keys,
};
use serde_json::{Map, Value, json};

const NAME: &str = "adaption_prompt";
const LEN: &str = "adapter_len";
const LAYERS: &str = "adapter_layers";

/// Whose attention PEFT knows: `model_type`, its name for the attention's module, and where what the tokens give is added.
const MODELS: [(&str, &str, Added); 3] = [
    ("llama", "self_attn", Added::Projected),
    ("mistral", "self_attn", Added::Projected),
    ("gpt2", "attn", Added::AsItIs),
];

/// How what the heads read of the tokens is added to the attention's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Added {
    /// Through the attention's last layer, its bias included.
    Projected,
    /// Behind the attention's last layer, without one.
    AsItIs,
}

/// The settings of a Llama-Adapter.
#[derive(Debug, Clone)]
pub struct AdaptionConfig {
    len: usize,
    layers: usize,
    /// `task_type`.
    task: TargetSpec,
    raw: Map<String, Value>,
}

/// What it is on one base model.
struct On {
    added: Added,
    /// The attentions that get tokens, from below.
    attentions: Vec<SublayerSite>,
    /// PEFT's name for the attention's module.
    target: &'static str,
}

fn known() -> Map<String, Value> {
    peft_defaults("ADAPTION_PROMPT", json!({LAYERS: null, LEN: null, "target_modules": null}))
}

impl AdaptionConfig {
    /// Reads the config of an existing adapter. Keys that PEFT may add later are ignored, as PEFT does.
    ///
    /// # Errors
    /// A value of the wrong type or out of range, or one that is missing; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(config);
        let count = |key, usual: &str| match keys.count(key, 1 << 24)? {
            Some(n) => Ok(n),
            None => Err(Error::config(key, format!("is not given; {usual}"))),
        };
        let task = config.get("task_type").map(|task| ("task_type".to_owned(), task.clone()));
        Ok(Self {
            len: count(LEN, "the paper has 10 tokens a layer")?,
            layers: count(LAYERS, "the paper has 30 of the 32 layers of LLaMA 7B, counted from the last")?,
            task: TargetSpec::from_config(&task.into_iter().collect())?,
            raw: config.clone(),
        })
    }

    /// Reads the `[method]` table of a recipe: PEFT's keys, where an unknown one is an error with the nearest known.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type or out of range; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        ConfigKeys(config).refuse_unknown(NAME, &known())?;
        Self::from_adapter_config(config)
    }

    /// This config as PEFT completes it for the task of `base`. PEFT trains no class head beside it.
    ///
    /// # Errors
    /// A `task_type` that is not the base's.
    pub fn for_base(&self, base: &dyn BaseModel) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.extend(task_keys(&self.task, base)?.into_iter().filter(|(key, _)| key == "task_type"));
        Ok(Self { raw, ..self.clone() })
    }

    /// The tensors of PEFT's file for this config on `base`.
    ///
    /// # Errors
    /// When the config does not fit the base; the message names the key.
    pub fn stored(&self, base: &dyn BaseModel) -> Result<Vec<ExpectedTensor>> {
        let mut expected = Vec::new();
        for at in self.on(base)?.attentions {
            let [prompt, gate] = names(base, &at)?;
            expected.push(ExpectedTensor::required(prompt, [1, self.len, at.hidden_size]));
            expected.push(ExpectedTensor::required(gate, [1]));
        }
        Ok(expected)
    }

    fn on(&self, base: &dyn BaseModel) -> Result<On> {
        let model_type = base.model_type();
        let Some(&(_, target, added)) = MODELS.iter().find(|(name, ..)| *name == model_type) else {
            let known = MODELS.map(|(name, ..)| name).join(", ");
            let message =
                format!("{NAME} is for models of type {known}, as in PEFT, and this one is `{model_type}`; use prefix");
            return Err(Error::config("type", message));
        };
        if let Some(given) = ConfigKeys(&self.raw).get("target_modules").filter(|given| *given != target) {
            let message =
                format!("is {given}, and a model of type `{model_type}` has \"{target}\" there; leave it out");
            return Err(Error::config("target_modules", message));
        }
        if let Some(path) = base.fresh_layers().first() {
            let message = format!(
                "{NAME} trains no class head, and the base has no weights for `{path}`; use prefix, or a base with a trained head"
            );
            return Err(Error::config("type", message));
        }
        let positions = base.prompt_dims().map_or(0, |dims| dims.max_positions);
        if self.len > positions {
            let message = format!("{} is more than the {positions} positions of the model", self.len);
            return Err(Error::config(LEN, message));
        }
        let mut attentions = base.sublayers();
        attentions.retain(|at| at.kind == SublayerKind::Attention);
        let Some(below) = attentions.len().checked_sub(self.layers) else {
            let message = format!("{} is more than the {} layers of the model", self.layers, attentions.len());
            return Err(Error::config(LAYERS, message));
        };
        attentions.drain(..below);
        Ok(On { added, attentions, target })
    }

    /// Makes the adapter that this config describes on `base`. Random starts are a function of `seed` and the site.
    ///
    /// # Errors
    /// When the config does not fit the base; the message names the key.
    pub fn build(&self, base: &dyn BaseModel, seed: u64) -> Result<Built> {
        let On { added, attentions, target } = self.on(base)?;
        let mut config = completed(known(), &self.raw);
        config.insert("target_modules".into(), target.into());
        let mut adapter = Adapter::new(config, base.sites());
        for at in attentions {
            let [prompt, gate] = names(base, &at)?;
            let (stream, shape) = (Stream { seed, step: 0, site: at.end.0 }, (1, self.len, at.hidden_size));
            let start = Tensor::from_vec(stream.normal_vec(self.len * at.hidden_size, 1.0), shape, &Device::Cpu)?;
            let closed = Tensor::zeros(1, DType::F32, base.device())?;
            let module = AdaptionPrompt {
                // Behind a closed gate nothing moves on the first step.
                prompt: Parameter::new(prompt, &start.to_device(base.device())?, Role::ZeroAtStart)?,
                gate: Parameter::new(gate, &closed, Role::NoDecay)?,
                added,
            };
            adapter.insert(at.end, SiteAdapter::new(Some(SiteModule::Attention(Arc::new(module))), None))?;
        }
        Ok(Built { adapter, selection: Selection::default() })
    }
}

/// The keys of the tokens and of the gate of the attention that ends at `at`.
fn names(base: &dyn BaseModel, at: &SublayerSite) -> Result<[String; 2]> {
    let site = base.sites().get(at.end);
    let path = site.and_then(|site| Some(site.path.rsplit_once('.')?.0));
    let path = path.ok_or_else(|| Error::msg(format!("site {} is in no attention", at.end.0)))?;
    Ok(["adaption_prompt", "adaption_gate"].map(|name| parameter_name(path, name)))
}

/// `g · softmax(q·K(P)ᵀ / √head_dim) · V(P)` beside what the heads give, with the frozen layers' keys and values of the tokens P,
/// which have no positions.
#[derive(Debug)]
struct AdaptionPrompt {
    /// P, `[1, tokens, hidden]`.
    prompt: Parameter,
    /// g, `[1]`.
    gate: Parameter,
    added: Added,
}

impl AttentionModule for AdaptionPrompt {
    fn beside(&self, end: &FrozenLinear, heads: &Heads<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let dtype = heads.queries.dtype();
        let (keys, values) = (heads.keys_values)(&self.prompt.get(ctx).squeeze(0)?.to_dtype(dtype)?)?;
        let gated = values.broadcast_mul(&self.gate.get(ctx).to_dtype(dtype)?)?;
        let sequence = SequenceSpan { queries: 0..heads.queries.dim(0)?, keys: 0..keys.dim(0)?, prefix: 0..0 };
        let plan = AttentionPlan {
            causal: false,
            sequences: vec![sequence],
            ..AttentionPlan::causal(heads.heads, heads.kv_heads, heads.head_dim, &[])
        };
        let read = attention(heads.queries, &keys, &gated, &Arc::new(plan))?;
        match self.added {
            Added::Projected => end.base(&read),
            Added::AsItIs => Ok(read),
        }
    }

    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.prompt, &self.gate]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use peft_core::kernels::FrozenWeight;
    use peft_core::kernels::testing::{close, randn};
    use peft_core::{AdapterSet, Route, SiteId};

    use super::*;

    const HEADS: usize = 4;
    const KV_HEADS: usize = 2;
    const HEAD_DIM: usize = 3;

    fn layer(seed: u64, out: usize, inp: usize) -> FrozenLinear {
        let weight = FrozenWeight::dense(&randn(seed, (out, inp), 0.5).unwrap()).unwrap();
        FrozenLinear::new(SiteId(0), "layer", weight, Some(randn(seed + 1, out, 0.5).unwrap())).unwrap()
    }

    /// The same, head by head and with whole matrices of scores.
    fn reference(q: &Tensor, (k, v): (&Tensor, &Tensor), gate: f64) -> Tensor {
        let columns = |t: &Tensor, head: usize| t.narrow(1, head * HEAD_DIM, HEAD_DIM).unwrap().contiguous().unwrap();
        let read = (0..HEADS).map(|head| {
            let of = head / (HEADS / KV_HEADS);
            let scores = columns(q, head).matmul(&columns(k, of).t().unwrap()).unwrap();
            let weights = (scores / (HEAD_DIM as f64).sqrt()).unwrap().exp().unwrap();
            let shares = weights.broadcast_div(&weights.sum_keepdim(1).unwrap()).unwrap();
            (shares.matmul(&columns(v, of)).unwrap() * gate).unwrap()
        });
        Tensor::cat(&read.collect::<Vec<_>>(), 1).unwrap()
    }

    #[test]
    fn every_query_reads_all_tokens_whatever_else_it_sees() {
        let (hidden, tokens) = (HEADS * HEAD_DIM, 5);
        let (keys, values) = (layer(1, KV_HEADS * HEAD_DIM, hidden), layer(3, KV_HEADS * HEAD_DIM, hidden));
        let (end, queries) = (layer(5, hidden, hidden), randn(7, (9, hidden), 2.0).unwrap());
        let prompt = randn(8, (1, tokens, hidden), 1.0).unwrap();
        let (set, rows) = (AdapterSet::empty(), prompt.squeeze(0).unwrap());
        let ctx = Ctx::eval(&set, &Route::Base);
        let keys_values = |rows: &Tensor| Ok((keys.base(rows)?, values.base(rows)?));
        let heads = Heads {
            queries: &queries,
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            keys_values: &keys_values,
        };
        let (k, v) = keys_values(&rows).unwrap();
        let read = reference(&queries, (&k, &v), -0.7);
        for (added, want) in [(Added::Projected, end.base(&read).unwrap()), (Added::AsItIs, read)] {
            let module = AdaptionPrompt {
                prompt: Parameter::new("prompt", &prompt, Role::ZeroAtStart).unwrap(),
                gate: Parameter::new("gate", &Tensor::new(&[-0.7f32], &Device::Cpu).unwrap(), Role::NoDecay).unwrap(),
                added,
            };
            close(&format!("{added:?}"), &module.beside(&end, &heads, &ctx).unwrap(), &want, 1e-5).unwrap();
            module.gate.set(&Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap()).unwrap();
            let closed = module.beside(&end, &heads, &ctx).unwrap();
            let bias = end.bias().unwrap().broadcast_as((9, hidden)).unwrap();
            let want = if added == Added::Projected { bias } else { bias.zeros_like().unwrap() };
            close("closed", &closed, &want, 0.0).unwrap();
        }
    }
}
