//! Multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861; PEFT `tuners/multitask_prompt_tuning`): one prompt for all tasks,
//! times a matrix of low rank for each.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::{
    BaseModel, Built, ConfigKeys, Context, Ctx, Error, ExpectedTensor, Parameter, PromptModule, Result, Role,
    SafetensorsFile, Unmatched, VirtualModule, check_finite,
};
use serde_json::{Map, Value, json};

use crate::PROMPT_EMBEDDINGS;
use crate::keys::{Shape, SoftPrompt};
use crate::network::Starts;
use crate::prompt::{self, PromptStart, stored, used};

const PEFT_TYPE: &str = "MULTITASK_PROMPT_TUNING";
const COLS: &str = "prefix_task_cols";
const ROWS: &str = "prefix_task_rows";
/// Tasks and ranks, at most.
const MOST: usize = 1 << 16;
const PATH: &str = "prompt_tuning_init_state_dict_path";
const TASK: &str = "prompt_tuning_init_task";

/// What is taken from an adapter of other tasks: `prompt_tuning_init`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    /// The prompt, and the mean of the tasks' factors.
    Average,
    /// The prompt, and the factors of one task.
    Exact(usize),
    /// The prompt alone.
    Shared,
}

/// The settings of multitask prompt tuning.
#[derive(Debug, Clone)]
pub struct MultitaskConfig {
    shared: SoftPrompt,
    /// How the prompt starts, where it does not come from other tasks.
    pub start: PromptStart,
    /// Where the tokenizer for [`PromptStart::Text`] lies.
    pub tokenizer: Option<String>,
    source: Option<(Source, String)>,
    ranks: usize,
    tasks: usize,
}

fn known() -> Map<String, Value> {
    let mut all = prompt::known();
    let own = json!({
        "num_ranks": 1, "num_tasks": 1, "peft_type": PEFT_TYPE, "prompt_tuning_init_state_dict_path": null,
        "prompt_tuning_init_task": 0
    });
    all.extend(own.as_object().cloned().unwrap_or_default());
    all
}

impl MultitaskConfig {
    /// Reads the config of an existing adapter. Keys that PEFT may add later are ignored, as PEFT does.
    ///
    /// # Errors
    /// A value of the wrong type or out of range; the message names the key.
    pub fn from_adapter_config(config: &Map<String, Value>) -> Result<Self> {
        let keys = ConfigKeys(config);
        let source = match keys.text("prompt_tuning_init")? {
            Some("AVERAGE_SOURCE_TASKS") => Some(Source::Average),
            Some("EXACT_SOURCE_TASK") => {
                let task = keys.get(TASK).map_or(Some(0), Value::as_u64).and_then(|task| usize::try_from(task).ok());
                Some(Source::Exact(task.ok_or_else(|| Error::config(TASK, "is not the number of a task"))?))
            }
            Some("ONLY_SOURCE_SHARED") => Some(Source::Shared),
            Some("SAMPLE_VOCAB") => {
                let message = "is \"SAMPLE_VOCAB\", which multitask prompts do not know; use \"RANDOM\" or \"TEXT\"";
                return Err(Error::config("prompt_tuning_init", message));
            }
            _ => None,
        };
        let path = keys.text(PATH)?.map(str::to_owned);
        let source = match (source, path) {
            (Some(source), Some(path)) => Some((source, path)),
            (Some(_), None) => return Err(Error::config(PATH, "is not given, and the prompt starts from its file")),
            (None, _) => None,
        };
        let mut of_prompt = config.clone();
        if source.is_some() {
            of_prompt.insert("prompt_tuning_init".into(), "RANDOM".into());
        }
        let (start, tokenizer) = prompt::read_start(ConfigKeys(&of_prompt))?;
        Ok(Self {
            shared: SoftPrompt::read(config)?,
            start,
            tokenizer,
            source,
            ranks: keys.count("num_ranks", MOST)?.unwrap_or(1),
            tasks: keys.count("num_tasks", MOST)?.unwrap_or(1),
        })
    }

    /// Reads the `[method]` table of a recipe: PEFT's keys, where an unknown one is an error with the nearest known.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type or out of range; the message names the key.
    pub fn from_recipe(config: &Map<String, Value>) -> Result<Self> {
        ConfigKeys(config).refuse_unknown("multitask_prompt", &known())?;
        let parsed = Self::from_adapter_config(config)?;
        let given = |key: &str| ConfigKeys(config).get(key).is_some();
        if parsed.source.is_none() && given(PATH) {
            let inits = "\"AVERAGE_SOURCE_TASKS\", \"EXACT_SOURCE_TASK\" or \"ONLY_SOURCE_SHARED\"";
            return Err(Error::config(PATH, format!("is used with prompt_tuning_init = {inits} only")));
        }
        if !matches!(parsed.start, PromptStart::Text(_)) && given("prompt_tuning_init_text") {
            return Err(Error::config("prompt_tuning_init_text", "is used with prompt_tuning_init = \"TEXT\" only"));
        }
        Ok(parsed)
    }

    /// The tensors of PEFT's file for this config on `base`.
    ///
    /// # Errors
    /// When the config does not fit the base; the message names the key.
    pub fn stored(&self, base: &dyn BaseModel) -> Result<Vec<ExpectedTensor>> {
        Ok(self.tensors(&self.on(base)?))
    }

    fn on(&self, base: &dyn BaseModel) -> Result<Shape> {
        let shape = self.shared.on(base, false)?;
        if shape.dims.submodules > 1 {
            let message = "multitask_prompt on an encoder-decoder is not built: PEFT puts the second half of the rows in front of the \
                           decoder's tokens; use prompt";
            return Err(Error::config("type", message));
        }
        Ok(shape)
    }

    fn tensors(&self, shape: &Shape) -> Vec<ExpectedTensor> {
        vec![
            stored(shape),
            ExpectedTensor::required(COLS, [self.tasks, shape.stored_rows(), self.ranks]),
            ExpectedTensor::required(ROWS, [self.tasks, self.ranks, shape.token_dim]),
        ]
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
        let shape = self.on(base)?;
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
        let values = [
            zeros(&[shape.stored_rows(), shape.token_dim])?,
            zeros(&[self.tasks, shape.stored_rows(), self.ranks])?,
            zeros(&[self.tasks, self.ranks, shape.token_dim])?,
        ];
        self.adapter(&shape, values, base, Unmatched::Report)
    }

    /// Makes the adapter that this config describes on `base`. Random starts are a function of `seed`; `text_ids` are the
    /// tokens of the text to start from.
    ///
    /// # Errors
    /// When the config does not fit the base, the text has no tokens, the file to start from is missing or does not fit, or a name
    /// in `modules_to_save` is no module's; the message names the key.
    pub fn build(&self, base: &dyn BaseModel, seed: u64, text_ids: &[u32]) -> Result<Built> {
        let shape = self.on(base)?;
        let mut starts = Starts::new(seed, base.device());
        let embeddings = prompt::start_values(&self.start, &shape, base, &mut starts, text_ids)?;
        let mut normal = |dims: (usize, usize, usize)| {
            let values = starts.stream().normal_vec(dims.0 * dims.1 * dims.2, 0.02);
            Tensor::from_vec(values, dims, &Device::Cpu)
        };
        let cols = normal((self.tasks, shape.stored_rows(), self.ranks))?;
        let rows = normal((self.tasks, self.ranks, shape.token_dim))?;
        let mut values = [embeddings, cols, rows];
        if let Some((source, path)) = &self.source {
            self.take(source, Path::new(path), &shape, &mut values).with_context(|| PATH)?;
        }
        self.adapter(&shape, values, base, Unmatched::Error)
    }

    /// Replaces the starts by what an adapter of other tasks holds.
    fn take(&self, source: &Source, path: &Path, shape: &Shape, values: &mut [Tensor; 3]) -> Result<()> {
        let file = SafetensorsFile::open(path)?;
        let get = |key: &str, dims: &[Option<usize>]| {
            let tensor = file.tensor(key, &Device::Cpu)?.to_dtype(DType::F32)?;
            let fits = tensor.rank() == dims.len()
                && tensor.dims().iter().zip(dims).all(|(n, want)| want.is_none_or(|w| w == *n));
            if !fits {
                let expected = dims.iter().map(|d| d.map_or("any".to_owned(), |d| d.to_string())).collect::<Vec<_>>();
                let message = format!("holds `{key}` of shape {:?}, not [{}]", tensor.dims(), expected.join(", "));
                return Err(Error::file(path, message));
            }
            check_finite(key, &tensor)?;
            Ok(tensor)
        };
        values[0] = get(PROMPT_EMBEDDINGS, &[Some(shape.stored_rows()), Some(shape.token_dim)])?;
        if *source == Source::Shared {
            return Ok(());
        }
        if self.tasks != 1 {
            let message =
                format!("{} tasks cannot start from the factors of one; use 1, or ONLY_SOURCE_SHARED", self.tasks);
            return Err(Error::config("num_tasks", message));
        }
        let factors = [
            get(COLS, &[None, Some(shape.stored_rows()), Some(self.ranks)])?,
            get(ROWS, &[None, Some(self.ranks), Some(shape.token_dim)])?,
        ];
        for (value, all) in values.iter_mut().skip(1).zip(factors) {
            let tasks = all.dim(0)?;
            *value = match source {
                Source::Exact(task) if *task < tasks => all.narrow(0, *task, 1)?.contiguous()?,
                Source::Exact(task) => {
                    let message = format!("{task} is not one of its tasks, 0 to {}", tasks.saturating_sub(1));
                    return Err(Error::config(TASK, message));
                }
                _ if tasks == 0 => return Err(Error::file(path, "holds the factors of no task")),
                _ => all.mean_keepdim(0)?,
            };
        }
        Ok(())
    }

    fn adapter(&self, shape: &Shape, values: [Tensor; 3], base: &dyn BaseModel, unmatched: Unmatched) -> Result<Built> {
        let [embeddings, cols, rows] = values;
        let parameter = |name: &str, value: Tensor| {
            Parameter::new(name, &value.to_dtype(DType::F32)?.to_device(base.device())?, Role::Plain)
        };
        let module = MultitaskPrompt {
            embeddings: parameter(PROMPT_EMBEDDINGS, embeddings)?,
            cols: parameter(COLS, cols)?,
            rows: parameter(ROWS, rows)?,
            count: shape.count,
            task: (self.tasks == 1).then_some(0),
        };
        let module = VirtualModule::Prompt(Arc::new(module));
        let mut built = self.shared.adapter(self.shared.written(shape, known()), module, base, unmatched)?;
        built.adapter.set_tasks(self.tasks);
        Ok(built)
    }
}

/// `E ⊙ (C_t·R_t)` for task `t`.
#[derive(Debug, Clone)]
struct MultitaskPrompt {
    /// E, `[rows, hidden]`.
    embeddings: Parameter,
    /// C, `[tasks, rows, ranks]`.
    cols: Parameter,
    /// R, `[tasks, ranks, hidden]`.
    rows: Parameter,
    /// Rows that are put in front of sequences.
    count: usize,
    /// `None` before it is settled.
    task: Option<usize>,
}

impl PromptModule for MultitaskPrompt {
    fn embeddings(&self, ctx: &Ctx<'_>) -> Result<Tensor> {
        let Some(task) = self.task else {
            return Err(Error::config("task_id", "is not given, and the prompt is another one for each task"));
        };
        let of_task = |p: &Parameter| p.get(ctx).narrow(0, task, 1)?.squeeze(0);
        let factor = of_task(&self.cols)?.matmul(&of_task(&self.rows)?)?;
        used((self.embeddings.get(ctx) * factor)?, self.count)
    }

    fn for_task(&self, task: usize) -> Option<Arc<dyn PromptModule>> {
        Some(Arc::new(Self { task: Some(task), ..self.clone() }))
    }

    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.embeddings, &self.cols, &self.rows]
    }
}
