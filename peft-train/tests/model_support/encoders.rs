//! Tiny random encoders, and a batch for them.

use std::path::Path;

use candle_core::Tensor;
use peft_core::{HeadKind, Result};
use peft_models::Encoder;
use peft_models::config::EncoderConfig;
use peft_models::source::{Placement, RandomSource, WeightSource};
use peft_train::data::{Batch, Predictor};
use serde_json::json;

/// Random weights without those whose name begins with `absent`.
#[derive(Debug)]
pub(crate) struct Without<'a>(RandomSource, &'a str);

impl WeightSource for Without<'_> {
    fn contains(&self, name: &str) -> bool {
        !name.starts_with(self.1)
    }
    fn weight(&self, name: &str, dims: (usize, usize)) -> Result<peft_core::kernels::FrozenWeight> {
        assert!(self.contains(name), "{name} is absent");
        self.0.weight(name, dims)
    }
    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        self.0.vector(name, len)
    }
    fn describe(&self) -> String {
        self.0.describe()
    }
}

pub(crate) fn encoder(family: &str, absent: &str) -> Encoder {
    encoder_for(family, absent, HeadKind::Classification)
}

/// With a head of three outputs, for an answer of two.
pub(crate) fn encoder_for(family: &str, absent: &str, kind: HeadKind) -> Encoder {
    let mut config = match family {
        "distilbert" => json!({
            "model_type": family, "vocab_size": 37, "dim": 12, "hidden_dim": 20, "n_layers": 2, "n_heads": 3,
            "max_position_embeddings": 16, "id2label": {"0": "a", "1": "b", "2": "c"}
        }),
        _ => json!({
            "model_type": family, "vocab_size": 37, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
            "num_attention_heads": 3, "max_position_embeddings": 16, "id2label": {"0": "a", "1": "b", "2": "c"}
        }),
    };
    config["architectures"] = json!([format!("Any{}", kind.architecture())]);
    config["problem_type"] = json!(kind.problem_type());
    if kind == HeadKind::QuestionAnswering {
        config["id2label"] = json!({"0": "start", "1": "end"});
    }
    let config = EncoderConfig::from_hf_map(config.as_object().unwrap().clone(), Path::new("config.json")).unwrap();
    let placement = Placement::cpu(None);
    let random = RandomSource { seed: 3, std: 0.3, untied_head: true, placement: placement.clone() };
    Encoder::load(config, &Without(random, absent), &placement, 5).unwrap()
}

pub(crate) const FAMILIES: [&str; 4] = ["bert", "roberta", "xlm-roberta", "distilbert"];
pub(crate) const LENGTHS: [usize; 4] = [5, 1, 7, 3];

pub(crate) fn batch() -> Batch {
    let mut batch = Batch { bounds: vec![0], predictor: Predictor::Own, ..Batch::default() };
    for (row, &n) in LENGTHS.iter().enumerate() {
        batch.input_ids.extend((0..n).map(|i| ((row * 11 + i * 4 + 3) % 37) as u32));
        batch.position_ids.extend(0..n as u32);
        batch.bounds.push(batch.input_ids.len());
        batch.labels.extend((0..n).map(|i| if i == 0 { row as i32 % 3 } else { -100 }));
        batch.rows.push(row);
    }
    batch
}

/// The same tokens with what a head of this kind predicts.
pub(crate) fn batch_for(kind: HeadKind) -> Batch {
    let mut batch = Batch { kind, ..batch() };
    let of_tokens = |batch: &Batch, label: &dyn Fn(usize, usize, usize) -> i32| -> Vec<i32> {
        let rows = batch.bounds.windows(2).map(|pair| pair[1] - pair[0]).enumerate();
        rows.flat_map(|(row, n)| (0..n).map(move |t| (row, t, n))).map(|(row, t, n)| label(row, t, n)).collect()
    };
    match kind {
        HeadKind::Classification => {}
        HeadKind::Regression => batch.values = (0..12).map(|i| (i * 7 % 5) as f32 * 0.6 - 1.0).collect(),
        HeadKind::MultiLabel => batch.values = (0..12).map(|i| (i * 5 % 3 == 1) as u8 as f32).collect(),
        HeadKind::TokenClassification => {
            batch.labels = of_tokens(&batch, &|row, t, _| if t % 3 == 1 { -100 } else { ((row + t) % 3) as i32 });
        }
        HeadKind::QuestionAnswering => {
            let bits = |row: usize, t: usize, n: usize| i32::from(t == row % n) + 2 * i32::from(t == n - 1);
            batch.labels = of_tokens(&batch, &bits);
        }
    }
    batch
}

pub(crate) fn row(batch: &Batch, i: usize) -> Batch {
    let span = batch.bounds[i]..batch.bounds[i + 1];
    Batch {
        input_ids: batch.input_ids[span.clone()].to_vec(),
        position_ids: batch.position_ids[span.clone()].to_vec(),
        bounds: vec![0, span.len()],
        labels: batch.labels[span].to_vec(),
        rows: vec![i],
        predictor: Predictor::Own,
        kind: batch.kind,
        values: batch.values.chunks(3).nth(i).unwrap_or_default().to_vec(),
        ..Batch::default()
    }
}
