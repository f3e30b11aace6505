//! What changes the parameters in a step, as a recipe asks for it.

use anyhow::{Context, Result, bail};
use peft_train::bbt::{self, BbtConfig, Depth};
use peft_train::mezo::Mezo;
use peft_train::optim::{self, OptimizerKind, OptimizerOptions};
use peft_train::recipe::{Recipe, TrainTable};
use peft_train::{Plan, UpdateRule};

use super::{Run, bdpl, mezo};

/// The optimiser that a recipe names.
pub(super) fn kind(recipe: &Recipe) -> Result<OptimizerKind> {
    Ok(recipe.train.optimizer.parse()?)
}

/// The settings that a recipe gives Black-Box Tuning; the paper's where it gives none.
fn bbt_config(t: &TrainTable) -> Result<BbtConfig> {
    Ok(BbtConfig {
        dim: t.bbt_dim.unwrap_or(500),
        population: t.bbt_population.unwrap_or(20),
        sigma: t.bbt_sigma.unwrap_or(1.0),
        alpha: t.bbt_alpha.unwrap_or(1.0),
        projection: t.bbt_projection.as_deref().map(str::parse).transpose()?.unwrap_or_default(),
        seed: t.seed,
    })
}

impl Run {
    /// The rule, checked, before its first step. Where it begins with another adapter than the method does, that is set.
    pub(super) fn rule(&self) -> Result<UpdateRule> {
        let t = &self.recipe.train;
        let options = OptimizerOptions {
            beta1: t.beta1,
            beta2: t.beta2,
            eps: t.eps,
            momentum: t.momentum,
            mezo_eps: t.mezo_eps,
            mezo_samples: t.mezo_samples,
            ..OptimizerOptions::default()
        };
        let kind = kind(&self.recipe)?;
        optim::check_options(kind, &options)?;
        Ok(match kind {
            OptimizerKind::Mezo => Mezo::new(mezo::config(t))?.into(),
            OptimizerKind::Bbt => self.search()?.into(),
            _ => optim::build(kind, &options)?.into(),
        })
    }

    fn search(&self) -> Result<bbt::Bbt> {
        let text = match (&self.recipe.train.bbt_init_text, &self.tokenizer) {
            (None, _) => Vec::new(),
            (Some(text), Some(tokenizer)) => {
                let ids = tokenizer.encode(text, true).map_err(|e| anyhow::anyhow!("train.bbt_init_text: {e}"))?;
                if ids.is_empty() {
                    bail!("`train.bbt_init_text` has no tokens");
                }
                ids
            }
            (Some(_), None) => bail!("`train.bbt_init_text` needs a tokenizer, and the model has none"),
        };
        let adapter = &self.prepared.adapter;
        let search = bbt::start(&self.model, adapter, bbt_config(&self.recipe.train)?, &text).context("bbt")?;
        match search.depth() {
            Depth::Embeddings if !text.is_empty() => bail!(
                "`train.bbt_init_text` is for method.type = \"prefix\"; a prompt begins with \
                 method.prompt_tuning_init = \"TEXT\" and method.prompt_tuning_init_text"
            ),
            Depth::EveryBlock if self.recipe.method.contains_key("init_from") => bail!(
                "bbt makes a prefix of prompts in front of every block, and the keys and values of method.init_from are those \
                 of no known prompt: leave it out, or use --resume"
            ),
            _ => Ok(search),
        }
    }

    /// Passes over a micro-batch that the run's steps make, where it has no backward passes.
    pub(super) fn forward_calls(&self, plan: &Plan) -> Result<Option<u64>> {
        let t = &self.recipe.train;
        let a_step = match kind(&self.recipe)? {
            OptimizerKind::Mezo => 2 * mezo::config(t).samples,
            OptimizerKind::Bbt => bbt_config(t)?.population,
            OptimizerKind::Bdpl => bdpl::samples(t),
            _ => return Ok(None),
        };
        Ok(Some(plan.steps.saturating_mul(a_step as u64).saturating_mul(plan.accumulation as u64)))
    }
}
