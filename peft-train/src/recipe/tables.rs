//! The tables of a recipe and their defaults.

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::data::{FillInTheMiddle, SpanCorruption};

/// `[model]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelTable {
    /// A folder, a `.gguf` file or a hub id.
    pub path: Option<String>,
    /// `auto` (as stored), `f32`, `bf16` or `f16`. A CPU computes in `f32`, so that there `f32` leaves narrower weights as
    /// they are stored: they are widened exactly, panel by panel; and there `bf16` means that activations wait for the
    /// backward pass in `bf16`, too.
    pub dtype: String,
    /// `none`; other kinds come with quantised training.
    pub quantize: String,
    /// `auto`, `cpu`, `cuda:0` or `metal`.
    pub device: String,
    /// `pretrained`, or `random` to start from the config alone.
    pub init: String,
    /// What the head of an encoder is for that its checkpoint lacks: `classification`, `multi_label`, `regression`,
    /// `token_classification` or `question_answering`; left out, what the checkpoint's class says, or the adapter's head, or
    /// classification.
    pub head: Option<String>,
}

impl Default for ModelTable {
    fn default() -> Self {
        Self {
            path: None,
            dtype: "auto".into(),
            quantize: "none".into(),
            device: "auto".into(),
            init: "pretrained".into(),
            head: None,
        }
    }
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataTable {
    /// A path, or a list of `{path, weight}`.
    pub train: Option<Value>,
    /// As `train`, for evaluation.
    pub eval: Option<Value>,
    /// Name of the format; detected from the columns if left out.
    pub format: Option<String>,
    /// minijinja over the row's columns.
    pub template: Option<String>,
    /// Path or text of a chat template in place of the tokenizer's.
    pub chat_template: Option<String>,
    /// Words that a causal LM answers in place of the labels.
    pub label_words: Table,
    /// Names of the classes of a class head, in the order of their numbers; left out, the model's or those in the data.
    pub labels: Vec<String>,
    /// The possible answers of every row, of which its own is one; left out, the keys of `label_words`, or each row's own in a
    /// column `choices`. Evaluation then measures how often the right one is the likeliest.
    pub choices: Vec<String>,
    /// Tokens a row, at most.
    pub max_length: usize,
    /// Fill batches by tokens instead of rows.
    pub packing: bool,
    /// A new order every epoch.
    pub shuffle: bool,
    /// Similar lengths together.
    pub group_by_length: bool,
    /// Close rows of plain text with the end token.
    pub text_eos: bool,
    /// Writes the middle of some rows of plain text last, for a model that fills holes.
    pub fill_in_the_middle: Option<FillInTheMiddle>,
    /// Hides spans of rows of plain text, which an encoder–decoder learns to write.
    pub span_corruption: Option<SpanCorruption>,
}

impl Default for DataTable {
    fn default() -> Self {
        Self {
            train: None,
            eval: None,
            format: None,
            template: None,
            chat_template: None,
            label_words: Table::new(),
            labels: Vec::new(),
            choices: Vec::new(),
            max_length: 512,
            packing: false,
            shuffle: true,
            group_by_length: false,
            text_eos: false,
            fill_in_the_middle: None,
            span_corruption: None,
        }
    }
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainTable {
    /// Passes over the data, unless `max_steps` is given.
    pub epochs: f64,
    /// Optimiser steps.
    pub max_steps: Option<u64>,
    /// Rows a micro-batch.
    pub batch_size: usize,
    /// Micro-batches an optimiser step.
    pub gradient_accumulation: usize,
    /// `auto`, `true` or `false`.
    pub gradient_checkpointing: Value,
    /// What a step fits into: `"4GiB"`. It decides how many rows of a micro-batch go through at a time, and with `gradient_checkpointing
    /// = "auto"` how many blocks keep their record. Left out, half of the machine's free memory, or nine tenths of a card's.
    pub memory_budget: Option<String>,
    /// In what activations wait for the backward pass: `f32`, `bf16` (half their memory, gradients of activations rounded to
    /// 8 bits), or `auto`, which is `bf16` with a base asked for in it and `f32` otherwise.
    pub activation_dtype: String,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Name of the schedule.
    pub scheduler: String,
    /// Share of the steps for warm-up, unless `warmup_steps` is given.
    pub warmup_ratio: f64,
    /// Steps of warm-up.
    pub warmup_steps: Option<u64>,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest gradient norm; 0 is off.
    pub max_grad_norm: f64,
    /// `adamw` or `sgd`; or, by forward passes alone, `mezo`, `bbt` (Black-Box Tuning) or `bdpl` (Black-Box Prompt Learning).
    pub optimizer: String,
    /// AdamW's first decay.
    pub beta1: Option<f64>,
    /// AdamW's second decay.
    pub beta2: Option<f64>,
    /// AdamW's denominator offset.
    pub eps: Option<f64>,
    /// Momentum of SGD and MeZO.
    pub momentum: Option<f64>,
    /// MeZO: how far parameters are moved for a difference of losses; 1e-3 if left out.
    pub mezo_eps: Option<f64>,
    /// MeZO: differences that a step takes the mean of; 1 if left out.
    pub mezo_samples: Option<usize>,
    /// Black-Box Tuning: coordinates that are searched (of each layer with `prefix`); 500 if left out.
    pub bbt_dim: Option<usize>,
    /// Black-Box Tuning: candidates a step; 20 if left out.
    pub bbt_population: Option<usize>,
    /// Black-Box Tuning: the first step size of CMA-ES; 1 if left out.
    pub bbt_sigma: Option<f64>,
    /// Black-Box Tuning: size of the random projection; 1 if left out.
    pub bbt_alpha: Option<f64>,
    /// Black-Box Tuning: how the projection is drawn, `normal` (of the embeddings' size) or `uniform`.
    pub bbt_projection: Option<String>,
    /// Black-Box Tuning with `prefix`: the text whose hidden states the search begins with; random tokens if left out.
    pub bbt_init_text: Option<String>,
    /// Black-Box Prompt Learning: places of the prompt, each of which an n-gram fills; 10 if left out.
    pub bdpl_length: Option<usize>,
    /// Black-Box Prompt Learning: prompts that a step draws; 20 if left out.
    pub bdpl_samples: Option<usize>,
    /// Black-Box Prompt Learning: candidates for a place; 100 if left out.
    pub bdpl_vocabulary: Option<usize>,
    /// Black-Box Prompt Learning: words of the longest candidate; 3 if left out.
    pub bdpl_ngram: Option<usize>,
    /// Black-Box Prompt Learning: pointwise mutual information, in nats, from which two neighbouring words are one candidate; 2 if
    /// left out.
    pub bdpl_pmi: Option<f64>,
    /// What is lowered: `loss`; `t_few`, T-Few's losses on rows with choices; `dpo`, `ipo`, `kto`, `orpo` or `simpo` on rows with a
    /// preferred answer; or, with `mezo`, `bbt` and `bdpl`, minus `accuracy` or minus `f1`.
    pub objective: String,
    /// Preference objectives: DPO's, IPO's (τ), KTO's, ORPO's (λ) and SimPO's β; 0.1 if left out.
    pub beta: Option<f64>,
    /// DPO: `sigmoid`, `hinge` or `robust`; `sigmoid` if left out.
    pub loss_type: Option<String>,
    /// DPO, SimPO: the share of pairs that are taken to be the wrong way round; 0 if left out.
    pub label_smoothing: Option<f64>,
    /// KTO: weight of the losses of desirable answers; 1 if left out.
    pub desirable_weight: Option<f64>,
    /// KTO: weight of the losses of undesirable answers; 1 if left out.
    pub undesirable_weight: Option<f64>,
    /// SimPO: the margin of rewards that is aimed at; 0.5 if left out.
    pub simpo_gamma: Option<f64>,
    /// DPO, IPO, KTO: the model that answers are compared with: `base`, without an adapter, or `init_from`, the adapter of
    /// `method.init_from` as it was; `base` if left out.
    pub reference: Option<String>,
    /// T-Few: weight of the unlikelihood loss; 1 if left out.
    pub unlikelihood: Option<f64>,
    /// T-Few: weight of the length-normalised loss; 1 if left out.
    pub length_normalised: Option<f64>,
    /// LoRA+: learning rate of B over that of A.
    pub loraplus_lr_ratio: Option<f64>,
    /// Seed of initialisation, data order and dropout.
    pub seed: u64,
    /// Rows an evaluation batch; left out, `batch_size`.
    pub eval_batch_size: Option<usize>,
    /// Metric that picks the best adapter: `eval_loss` if left out, and with a preference objective that objective's loss.
    pub metric: String,
    /// Evaluations without progress before training stops; 0 never stops.
    pub early_stopping_patience: u32,
    /// Smallest gain that counts as progress.
    pub early_stopping_min_delta: f64,
}

impl Default for TrainTable {
    fn default() -> Self {
        Self {
            epochs: 1.0,
            max_steps: None,
            batch_size: 8,
            gradient_accumulation: 1,
            gradient_checkpointing: Value::String("auto".into()),
            memory_budget: None,
            activation_dtype: "auto".into(),
            learning_rate: 2e-4,
            scheduler: "cosine".into(),
            warmup_ratio: 0.03,
            warmup_steps: None,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            optimizer: "adamw".into(),
            beta1: None,
            beta2: None,
            eps: None,
            momentum: None,
            mezo_eps: None,
            mezo_samples: None,
            bbt_dim: None,
            bbt_population: None,
            bbt_sigma: None,
            bbt_alpha: None,
            bbt_projection: None,
            bbt_init_text: None,
            bdpl_length: None,
            bdpl_samples: None,
            bdpl_vocabulary: None,
            bdpl_ngram: None,
            bdpl_pmi: None,
            objective: "loss".into(),
            beta: None,
            loss_type: None,
            label_smoothing: None,
            desirable_weight: None,
            undesirable_weight: None,
            simpo_gamma: None,
            reference: None,
            unlikelihood: None,
            length_normalised: None,
            loraplus_lr_ratio: None,
            seed: 0,
            eval_batch_size: None,
            metric: "eval_loss".into(),
            early_stopping_patience: 0,
            early_stopping_min_delta: 0.0,
        }
    }
}

/// `[output]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OutputTable {
    /// The output folder.
    pub dir: Option<String>,
    /// Optimiser steps between checkpoints; 0 writes none.
    pub save_every: u64,
    /// Optimiser steps between evaluations; 0 evaluates at the end only.
    pub eval_every: u64,
    /// Checkpoints that are kept; 0 keeps all.
    pub keep_checkpoints: usize,
}

impl Default for OutputTable {
    fn default() -> Self {
        Self { dir: None, save_every: 0, eval_every: 0, keep_checkpoints: 2 }
    }
}

/// `[sample]`: prompts that are answered before and after training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SampleTable {
    /// The prompts.
    pub prompts: Vec<String>,
    /// Tokens an answer, at most.
    pub max_new_tokens: usize,
}

impl Default for SampleTable {
    fn default() -> Self {
        Self { prompts: Vec::new(), max_new_tokens: 32 }
    }
}

/// `[endpoint]`: an OpenAI-compatible API that returns log-probabilities.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EndpointTable {
    /// What requests go to, up to the version: `http://localhost:8000/v1`.
    pub url: Option<String>,
    /// The model's name there.
    pub model: Option<String>,
    /// `completions`, which is asked for the log-probabilities of the text it is given (`echo`), or `chat`, for those of the first
    /// token of its answer (`top_logprobs`).
    pub api: String,
    /// The environment variable that holds the API key; the key itself is never written anywhere.
    pub api_key_env: Option<String>,
    /// Seconds that an answer may take.
    pub timeout: f64,
    /// How often a request is sent again when the server is busy or does not answer.
    pub retries: u32,
}

impl Default for EndpointTable {
    fn default() -> Self {
        Self { url: None, model: None, api: "completions".into(), api_key_env: None, timeout: 60.0, retries: 3 }
    }
}
