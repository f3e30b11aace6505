//! The model that preference objectives compare with: the base without an adapter, or an adapter as it was.
//!
//! It is the same weights along another route, so that there is no second model. The likelihoods of a run's answers are made once, before
//! the first step (TRL's `precompute_ref_log_probs`), and only of the rows that the run's steps will read: never more passes than one a
//! row, where a pass in every step would be one a row and epoch. They are 8 bytes an answer. What is made depends on the plan alone, not on
//! where a run was interrupted. KTO's answers behind other prompts are other pairs in every epoch; these are made step by step.

use std::sync::Arc;

use peft_core::{Adapter, AdapterSet, Ctx, Error, Result, Route, Segmented};

use crate::data::{Batch, Mismatched, PreferenceBatch, Preferences, Sampler};
use crate::driver::token_losses;
use crate::preference::{Preference, PreferenceStep};

/// A reference, and what is known of it.
#[derive(Debug)]
pub struct Reference {
    set: AdapterSet,
    route: Route,
    /// By sequence of the data; NaN where not made.
    known: Vec<f64>,
    /// Sum over the data's answers behind prompts that are not theirs.
    pub(crate) mismatched: Option<f64>,
}

impl Reference {
    /// Nothing known yet of `preferences` under the base, or under an adapter.
    #[must_use]
    pub fn new(adapter: Option<Arc<Adapter>>, preferences: &Preferences) -> Self {
        let (set, route) = match adapter {
            Some(adapter) => (AdapterSet::one("reference", adapter), Route::Uniform(0)),
            None => (AdapterSet::empty(), Route::Base),
        };
        Self { set, route, known: vec![f64::NAN; preferences.sequences()], mismatched: None }
    }

    /// Makes the likelihoods of the answers of `rows` that are not known, in batches of `answers` answers of similar lengths, until
    /// `stop` says so.
    ///
    /// # Errors
    /// When a tensor operation fails, or a likelihood is 0.
    pub fn learn<M: Segmented>(
        &mut self,
        model: &M,
        preferences: &Preferences,
        rows: &[usize],
        answers: usize,
        stop: impl Fn() -> bool,
    ) -> Result<()> {
        let unknown = |sequence: &usize| self.known.get(*sequence).is_some_and(|known| known.is_nan());
        let mut sequences: Vec<usize> = preferences.answers_of(rows).filter(unknown).collect();
        sequences.sort_by_key(|&s| (preferences.length(s), s));
        sequences.dedup();
        for sequences in sequences.chunks(answers.max(1)) {
            if stop() {
                break;
            }
            let sums = self.log_likelihoods(model, &preferences.alone(sequences))?;
            for (&sequence, sum) in sequences.iter().zip(sums) {
                if let Some(known) = self.known.get_mut(sequence) {
                    *known = sum;
                }
            }
        }
        Ok(())
    }

    /// The log-likelihood of the counted tokens of each sequence.
    pub(crate) fn log_likelihoods<M: Segmented>(&self, model: &M, batch: &Batch) -> Result<Vec<f64>> {
        let sums = log_likelihoods(model, batch, &Ctx::eval(&self.set, &self.route))?;
        if sums.iter().any(|sum| !sum.is_finite()) {
            return Err(Error::msg("the reference gives an answer a likelihood of zero; check the rows, or use f32"));
        }
        Ok(sums)
    }

    fn put(&self, batch: &mut PreferenceBatch) -> Result<()> {
        let known = |sequence: &usize| self.known.get(*sequence).copied().filter(|known| !known.is_nan());
        let reference: Option<Vec<f64>> = batch.batch.rows.iter().map(known).collect();
        batch.reference = reference
            .ok_or_else(|| Error::msg("a row's likelihood under the reference was not made before the step"))?;
        Ok(())
    }

    /// Packs rows, and puts in what the objective compares with.
    pub(crate) fn batch(
        &self,
        preferences: &Preferences,
        rows: &[usize],
        objective: &Preference,
    ) -> Result<PreferenceBatch> {
        let mut batch = preferences.batch(rows, objective.counts_prompts());
        if objective.has_reference() {
            self.put(&mut batch)?;
        }
        Ok(batch)
    }

    /// The micro-batches of a step, of so many `rows` each. KTO's answers change prompts over the whole step, the chosen ones of all
    /// micro-batches first.
    pub(crate) fn micro_batches<M: Segmented>(
        &self,
        model: &M,
        preferences: &Preferences,
        rows: &[Vec<usize>],
        objective: &Preference,
    ) -> Result<Vec<PreferenceBatch>> {
        let batches = rows.iter().map(|rows| self.batch(preferences, rows, objective));
        let mut batches = batches.collect::<Result<Vec<_>>>()?;
        if !objective.takes_single_answers() {
            return Ok(batches);
        }
        let mut left = preferences.mismatched(&in_order(&batches)).into_iter();
        for batch in &mut batches {
            let pairs: Vec<_> = left.by_ref().take(batch.batch.sequences()).collect();
            let mismatched = preferences.pack_mismatched(&pairs);
            let reference = self.log_likelihoods(model, &mismatched)?;
            batch.mismatched = Some(Box::new(Mismatched { batch: mismatched, reference }));
        }
        Ok(batches)
    }
}

/// The rows that the steps of a run read from its beginning.
pub(crate) fn rows_of_run(sampler: &Sampler, batches: u64) -> Vec<usize> {
    let mut sampler = sampler.restarted();
    let mut rows = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..batches {
        rows.extend(sampler.next_batch().into_iter().filter(|row| seen.insert(*row)));
        if seen.len() == sampler.rows() {
            break;
        }
    }
    rows
}

/// The data's sequences in the batches of a step: first those of all chosen answers.
fn in_order(batches: &[PreferenceBatch]) -> Vec<usize> {
    let firsts = batches.iter().flat_map(|b| b.batch.rows.iter().take(b.rows.len()));
    firsts.chain(batches.iter().flat_map(|b| b.batch.rows.iter().skip(b.rows.len()))).copied().collect()
}

/// The log-likelihood of the counted tokens of each sequence, in nats.
pub(crate) fn log_likelihoods<M: Segmented>(model: &M, batch: &Batch, ctx: &Ctx<'_>) -> Result<Vec<f64>> {
    let losses = token_losses(model, batch, ctx)?;
    let positions = batch.targets().positions;
    let mut first = 0;
    let sums = batch.bounds.iter().skip(1).map(|&end| {
        let next = positions.partition_point(|&p| (p as usize) < end);
        let own = losses.get(first..next).unwrap_or_default();
        first = next;
        -own.iter().map(|&x| f64::from(x)).sum::<f64>()
    });
    Ok(sums.collect())
}

/// What the micro-batches of a step share, KTO's `z` under the parameters as they are included.
pub(crate) fn step_of<M: Segmented>(
    objective: &Preference,
    model: &M,
    batches: &[&PreferenceBatch],
    ctx: &Ctx<'_>,
) -> Result<PreferenceStep> {
    let step = PreferenceStep::of(objective, batches.iter().copied());
    let (mut sum, mut answers) = (0.0, 0);
    for mismatched in batches.iter().filter_map(|batch| batch.mismatched.as_deref()) {
        let of_model = log_likelihoods(model, &mismatched.batch, ctx)?;
        sum += of_model.iter().zip(&mismatched.reference).map(|(own, reference)| own - reference).sum::<f64>();
        answers += of_model.len();
    }
    Ok(PreferenceStep { kl: (sum / answers.max(1) as f64).max(0.0), ..step })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use peft_models::Decoder;
    use peft_models::config::DecoderConfig;
    use peft_models::source::{Placement, RandomSource};
    use serde_json::json;

    use super::*;
    use crate::data::{DataSpec, Dataset, EncodeOptions, Format, SamplerOptions};

    fn decoder() -> Decoder {
        let config = json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 8,
            "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_act": "silu"});
        let config = DecoderConfig::from_hf_map(config.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
        let placement = Placement::cpu(None);
        let source = RandomSource { seed: 0, std: 0.3, untied_head: true, placement: placement.clone() };
        Decoder::load(config, &source, &placement).unwrap()
    }

    /// Prompts `[1]`, `[2, 2]`, `[3]`; answers begin with 10 where they are chosen and 20 where not.
    fn rows(max_length: Option<usize>) -> (Preferences, Dataset) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let text = [([1].as_slice(), 0, 3), (&[2, 2], 1, 1), (&[3], 2, 2)].map(|(prompt, i, n)| {
            let answer = |first: usize| (0..n).map(|k| first + i + 3 * k).collect::<Vec<_>>();
            json!({"prompt_ids": prompt, "chosen_ids": answer(10), "rejected_ids": answer(20)}).to_string()
        });
        std::fs::write(&path, text.join("\n")).unwrap();
        let options = EncodeOptions { max_length, preferences: true, ..EncodeOptions::new(Format::Preference) };
        let spec = DataSpec::from(path.as_path());
        let preferences = Preferences::load(&spec, None, &options, &Preference::named("kto").unwrap()).unwrap();
        (preferences, Dataset::load(&spec, Some(Format::Preference), None, &options).unwrap().0)
    }

    /// TRL's order: the answers of a batch go behind the prompt of the next; here over all micro-batches of a step.
    #[test]
    fn answers_change_prompts_over_the_whole_step() {
        let (rows, _) = rows(None);
        let model = decoder();
        let mut reference = Reference::new(None, &rows);
        reference.learn(&model, &rows, &[0, 1, 2], 2, || false).unwrap();
        let objective = Preference::named("kto").unwrap();
        let batches = reference.micro_batches(&model, &rows, &[vec![1, 0], vec![2]], &objective).unwrap();
        let ids: Vec<Vec<u32>> = batches
            .iter()
            .flat_map(|batch| {
                let batch = &batch.mismatched.as_ref().unwrap().batch;
                batch.bounds.windows(2).map(|b| batch.input_ids[b[0]..b[1]].to_vec()).collect::<Vec<_>>()
            })
            .collect();
        // In order: chosen of rows 1, 0, 2, then rejected of the same.
        let expected: [&[u32]; 6] =
            [&[2, 2, 22, 25], &[1, 11], &[3, 10, 13, 16], &[2, 2, 12, 15], &[1, 21], &[3, 20, 23, 26]];
        assert_eq!(ids, expected);
        assert_eq!(batches.iter().map(|b| b.mismatched.as_ref().unwrap().reference.len()).collect::<Vec<_>>(), [4, 2]);
        // Under the base, `z` of the base is 0.
        let set = AdapterSet::empty();
        let step =
            step_of(&objective, &model, &batches.iter().collect::<Vec<_>>(), &Ctx::eval(&set, &Route::Base)).unwrap();
        assert!(step.kl.abs() < 1e-6 && step.losses == 6, "{step:?}");
        let counted = |batch: &Batch| batch.targets().ids.len();
        assert_eq!(counted(&batches[0].mismatched.as_ref().unwrap().batch), 2 + 1 + 3 + 2);
    }

    #[test]
    fn mismatched_rows_are_no_longer_than_rows_may_be() {
        let (rows, _) = rows(Some(4));
        let batch = rows.pack_mismatched(&rows.mismatched(&rows.chosen_first(&[0, 1, 2])));
        assert!(batch.bounds.windows(2).all(|b| b[1] - b[0] <= 4), "{:?}", batch.bounds);
        assert_eq!(batch.labels.len(), batch.input_ids.len());
    }

    /// Only what the steps read is made, once, and the rest is said to be missing.
    #[test]
    fn only_rows_of_the_run_are_made() {
        let (rows, data) = rows(None);
        let options = SamplerOptions { batch_size: 1, shuffle: false, ..SamplerOptions::default() };
        let mut sampler = Sampler::new(&data, options).unwrap();
        assert_eq!(rows_of_run(&sampler, 2), [0, 1]);
        sampler.next_batch();
        assert_eq!(rows_of_run(&sampler, 7), [0, 1, 2]);
        let model = decoder();
        let mut reference = Reference::new(None, &rows);
        reference.learn(&model, &rows, &[0, 1], 3, || false).unwrap();
        let dpo = Preference::named("dpo").unwrap();
        assert_eq!(reference.batch(&rows, &[1, 0], &dpo).unwrap().reference.len(), 4);
        assert!(reference.batch(&rows, &[2], &dpo).is_err());
        let before = reference.known.clone();
        reference.learn(&model, &rows, &[2], 3, || true).unwrap();
        assert_eq!(before[..4], reference.known[..4]);
        assert!(reference.known[4..].iter().all(|x| x.is_nan()));
    }
}
