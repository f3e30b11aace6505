//! Prompts judged by a model here: their tokens' embeddings are virtual tokens, as the adapter that is written has them.

use std::path::Path;
use std::sync::Arc;

use peft_core::{Adapter, AdapterSet, Ctx, Error, Labels, Result, Route, Segmented};
use peft_prompt::PromptConfig;
use serde_json::{Map, Value};

use super::run::{Judge, Readings};
use crate::checkpoint::write_adapter_files;
use crate::data::{Batch, Choices, Dataset};
use crate::driver::Measured;
use crate::objective::{MicroBatch, Objective, measure};
use crate::trainer::evaluate_rows;

/// The tokens of a prompt.
type Encode<'a> = dyn Fn(&str) -> Result<Vec<u32>> + 'a;

/// A model with the rows that prompts are put before.
pub struct LocalJudge<'a, M> {
    /// The model.
    pub model: &'a M,
    /// The tokens of a text, without special ones.
    pub encode: Box<Encode<'a>>,
    /// Further keys of the adapters' config: `base_model_name_or_path`, `tokenizer_name_or_path`.
    pub keys: Map<String, Value>,
    /// Names of the classes of a class head.
    pub labels: Labels,
    /// What training lowers.
    pub objective: Objective,
    /// Training rows.
    pub train: &'a Dataset,
    /// The same with all of their answers, where the objective compares these.
    pub choices: Option<&'a Choices>,
    /// Evaluation rows.
    pub eval: Option<&'a Dataset>,
    /// The same with all of their answers.
    pub eval_choices: Option<&'a Choices>,
    /// Rows an evaluation batch.
    pub eval_batch_size: usize,
}

impl<M> std::fmt::Debug for LocalJudge<'_, M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalJudge").field("objective", &self.objective).finish_non_exhaustive()
    }
}

impl<M: Segmented> LocalJudge<'_, M> {
    /// The adapter of PEFT's prompt tuning whose virtual tokens are the prompt's.
    ///
    /// # Errors
    /// A prompt without tokens, or one that the base has no room for.
    pub fn adapter(&self, prompt: &str) -> Result<Adapter> {
        let ids = (self.encode)(prompt)?;
        let mut config = self.keys.clone();
        config.insert("num_virtual_tokens".into(), ids.len().into());
        config.insert("prompt_tuning_init".into(), "TEXT".into());
        config.insert("prompt_tuning_init_text".into(), prompt.into());
        let built = PromptConfig::from_adapter_config(&config)?.for_base(self.model)?.build(self.model, 0, &ids)?;
        let mut adapter = built.adapter;
        adapter.config.extend(self.keys.clone());
        adapter.labels.clone_from(&self.labels);
        Ok(adapter)
    }

    fn set(&self, prompt: &str) -> Result<AdapterSet> {
        Ok(AdapterSet::one("prompt", Arc::new(self.adapter(prompt)?)))
    }
}

impl<M: Segmented> Judge for LocalJudge<'_, M> {
    fn judge(&mut self, prompts: &[String], rows: &[Vec<usize>]) -> Result<Vec<(Measured, f64)>> {
        let micro_batch = |rows: &Vec<usize>| match self.choices {
            Some(choices) => MicroBatch::Choices(choices.batch(rows)),
            None => MicroBatch::Rows(Batch::new(self.train, rows)),
        };
        let micro_batches: Vec<MicroBatch> = rows.iter().map(micro_batch).collect();
        if micro_batches.iter().all(|b| b.batch().targets().ids.is_empty()) {
            return Err(Error::msg("a batch has no counted token"));
        }
        let classes = self.choices.and_then(Choices::classes);
        let route = Route::Uniform(0);
        let judged = prompts.iter().map(|prompt| {
            let set = self.set(prompt)?;
            measure(self.objective, classes, self.model, &micro_batches, &Ctx::eval(&set, &route))
        });
        judged.collect()
    }

    fn evaluate(&mut self, prompt: &str) -> Result<Option<Readings>> {
        let Some(data) = self.eval else { return Ok(None) };
        evaluate_rows(self.model, &self.set(prompt)?, data, self.eval_choices, self.eval_batch_size).map(Some)
    }

    fn tokens(&self, rows: &[Vec<usize>]) -> u64 {
        rows.iter().flatten().map(|&row| self.train.row_length(row) as u64).sum()
    }

    fn write(&self, prompt: &str, folder: &Path) -> Result<()> {
        write_adapter_files(folder, &self.adapter(prompt)?)
    }
}
