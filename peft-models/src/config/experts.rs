//! Mixtures of experts in a `config.json`.

use super::keys::Keys;
use super::{ConfigError, Family, MOST_LAYERS};

/// Far more experts than any real model has.
const MOST_EXPERTS: usize = 1 << 14;

/// How a family is configured about its experts.
#[derive(Debug, Clone, Copy)]
pub struct ExpertsRule {
    /// The width inside an expert where it is not `intermediate_size`: its key, and the width where that is absent.
    pub width: Option<(&'static str, usize)>,
    /// How many experts there are where no key says so.
    pub num_experts: usize,
    /// How many of them a token goes to where the key is absent.
    pub num_experts_per_tok: usize,
    /// Whether the weights of a token's experts add up to one: the key, or always.
    pub norm_topk_prob: Option<&'static str>,
    /// Whether `decoder_sparse_step` and `mlp_only_layers` name layers with an MLP.
    pub dense_layers: bool,
    /// The width of an expert for all tokens: its key, and the width where that is absent.
    pub shared: Option<(&'static str, usize)>,
}

/// The experts of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertsConfig {
    /// How many there are.
    pub num_experts: usize,
    /// How many of them each token goes to.
    pub num_experts_per_tok: usize,
    /// Width inside one.
    pub intermediate_size: usize,
    /// Width inside the one that all tokens go through, where there is one.
    pub shared_intermediate_size: Option<usize>,
    /// Whether the weights of a token's experts add up to one.
    pub norm_topk_prob: bool,
    /// Which layers have them.
    sparse: Vec<bool>,
}

impl ExpertsConfig {
    /// Whether a layer has experts in the place of an MLP.
    #[must_use]
    pub fn is_sparse(&self, layer: usize) -> bool {
        self.sparse.get(layer).copied().unwrap_or(false)
    }
}

/// The experts that a file describes; `None` where no layer has any.
pub(super) fn experts(
    keys: &Keys<'_>,
    family: &Family,
    layers: usize,
    intermediate_size: usize,
) -> Result<Option<ExpertsConfig>, ConfigError> {
    let Some(rule) = &family.experts else { return Ok(None) };
    refuse(keys)?;
    // transformers writes the one or the other and reads both.
    let key = if keys.value("num_local_experts").is_some() { "num_local_experts" } else { "num_experts" };
    let num_experts = keys.count(key)?.unwrap_or(rule.num_experts);
    let sparse = sparse_layers(keys, rule, layers.min(MOST_LAYERS))?;
    if !sparse.contains(&true) || (num_experts == 0 && rule.dense_layers) {
        return Ok(None);
    }
    let within = |key: &str, value: usize, most: usize| -> Result<usize, ConfigError> {
        if value == 0 || value > most {
            return Err(keys.invalid(key, format!("{value} is outside 1..={most}")));
        }
        Ok(value)
    };
    let num_experts = within(key, num_experts, MOST_EXPERTS)?;
    let per_token = keys.count("num_experts_per_tok")?.unwrap_or(rule.num_experts_per_tok);
    if per_token == 0 || per_token > num_experts {
        let reason = format!("a token cannot go to {per_token} of {num_experts} experts (`{key}`)");
        return Err(keys.invalid("num_experts_per_tok", reason));
    }
    let width = |(key, default): (&'static str, usize)| -> Result<usize, ConfigError> {
        within(key, keys.count(key)?.unwrap_or(default), 1 << 24)
    };
    Ok(Some(ExpertsConfig {
        num_experts,
        num_experts_per_tok: per_token,
        intermediate_size: rule.width.map_or(Ok(intermediate_size), width)?,
        shared_intermediate_size: rule.shared.map(width).transpose()?,
        norm_topk_prob: match rule.norm_topk_prob {
            None => true,
            Some(key) => keys.flag(key)?.unwrap_or(false),
        },
        sparse,
    }))
}

/// What would change the loss or the forward pass in training, and is not built here.
fn refuse(keys: &Keys<'_>) -> Result<(), ConfigError> {
    if keys.flag("output_router_logits")? == Some(true) {
        let reason = "true adds a loss for the balance of experts (`router_aux_loss_coef`), which is not built here; set it \
                      to false to train the loss of the tokens alone";
        return Err(keys.invalid("output_router_logits", reason.into()));
    }
    if keys.number("router_jitter_noise")?.is_some_and(|noise| noise != 0.0) {
        let reason = "noise on what routers read in training is not built here; set it to 0.0 to train without";
        return Err(keys.invalid("router_jitter_noise", reason.into()));
    }
    if keys.value("clip_qkv").is_some() {
        return Err(keys.invalid("clip_qkv", "queries, keys and values are not clipped here".into()));
    }
    Ok(())
}

fn sparse_layers(keys: &Keys<'_>, rule: &ExpertsRule, layers: usize) -> Result<Vec<bool>, ConfigError> {
    if !rule.dense_layers {
        return Ok(vec![true; layers]);
    }
    const STEP: &str = "decoder_sparse_step";
    const ONLY: &str = "mlp_only_layers";
    let step = keys.count(STEP)?.unwrap_or(1);
    if step == 0 {
        return Err(keys.invalid(STEP, "0 is not a period of layers".into()));
    }
    let mut sparse: Vec<bool> = (0..layers).map(|layer| (layer + 1).is_multiple_of(step)).collect();
    if let Some(value) = keys.value(ONLY) {
        let list = value.as_array().and_then(|items| items.iter().map(serde_json::Value::as_u64).collect());
        let list: Vec<u64> = list.ok_or_else(|| keys.wrong(ONLY, value, "a list of layers"))?;
        for layer in list {
            let place = usize::try_from(layer).ok().and_then(|layer| sparse.get_mut(layer));
            *place.ok_or_else(|| keys.invalid(ONLY, format!("{layer} is none of the {layers} layers")))? = false;
        }
    }
    Ok(sparse)
}
