//! The command line, parsed and nothing more.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use peft_lora::combine::CombineType;

/// Train, evaluate, merge and run adapters over a frozen base model.
///
/// Human output goes to stderr. With --json the last line of stdout is one JSON object. Exit status: 0 done, 1 the work
/// failed, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "peft-cli", version, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train an adapter as a recipe says; flags override the recipe
    Train(TrainArgs),
    /// Make a run of train.optimizer = "mezo" again from its record of a few kilobytes
    Replay(ReplayArgs),
    /// Measure the loss of a model, with or without an adapter, on a file of rows
    Eval(EvalArgs),
    /// Write text with a model, with or without an adapter
    Generate(GenerateArgs),
    /// Turn texts into vectors, as a sentence-transformers folder says it is done
    Embed(EmbedArgs),
    /// Answer OpenAI's completions and chats over HTTP, each request through its own adapter
    Serve(ServeArgs),
    /// Write a complete model with one or more adapters merged into it
    Merge(MergeArgs),
    /// Make one adapter of several: a weighted sum of what they change
    Combine(CombineArgs),
    /// Put bottleneck adapters together as they are: one behind the other, or the mean of what they make
    Compose(ComposeArgs),
    /// Write an adapter in another form: as a LoRA of a chosen rank, or another program's files
    Convert(ConvertArgs),
    /// Say what a model or an adapter is
    Inspect(InspectArgs),
    /// List the methods that can be trained
    Methods(MethodsArgs),
    /// Show this machine and how the tool would use it
    Doctor(DoctorArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// The base model and how to load it.
#[derive(Debug, ClapArgs)]
pub(crate) struct ModelArgs {
    /// Base model: a folder, a .gguf file or a hub id `org/name[@revision]`
    #[arg(long)]
    pub(crate) model: String,
    /// Type of the weights: auto (as stored), f32, bf16 or f16; a CPU computes in f32 and keeps what widens to it exactly
    #[arg(long, default_value = "auto")]
    pub(crate) dtype: String,
    /// Device: auto, cpu, cuda:0 or metal
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct TrainArgs {
    /// The recipe, a TOML file
    pub(crate) recipe: Option<PathBuf>,
    /// Base model: a folder, a .gguf file or a hub id (model.path)
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Adapter to start from (method.init_from)
    #[arg(long)]
    pub(crate) adapter: Option<String>,
    /// Training rows: .jsonl, .json, .csv, .parquet, .txt, or a folder of them (data.train)
    #[arg(long)]
    pub(crate) data: Option<String>,
    /// Format of the rows (data.format); detected from the columns if left out
    #[arg(long)]
    pub(crate) format: Option<String>,
    /// Method (method.type); `peft-cli methods` lists them
    #[arg(long)]
    pub(crate) method: Option<String>,
    /// Output folder (output.dir)
    #[arg(long)]
    pub(crate) output: Option<String>,
    /// Set any key of the recipe: table.key=value, the value in TOML or else a text
    #[arg(long = "set", value_name = "TABLE.KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Go on from the newest checkpoint in the output folder
    #[arg(long)]
    pub(crate) resume: bool,
    /// Check everything and print the plan without training
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ReplayArgs {
    /// The record: mezo.safetensors of a run, or the folder that it is in
    pub(crate) record: PathBuf,
    /// Base model: a folder, a .gguf file or a hub id; left out, the one that the record names
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// The adapter that the run started from, where the record's own start is not to be had
    #[arg(long)]
    pub(crate) adapter: Option<String>,
    /// Only so many steps, from the first; left out, all, and the result is checked against the run's own
    #[arg(long)]
    pub(crate) steps: Option<usize>,
    /// Output folder
    #[arg(long)]
    pub(crate) output: PathBuf,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Adapter folder or hub id; with several, each is measured, all in one pass
    #[arg(long)]
    pub(crate) adapter: Vec<String>,
    /// The task of all rows, for an adapter with several; left out, each row's own, in its column `task_id`
    #[arg(long)]
    pub(crate) task_id: Option<usize>,
    /// Rows to evaluate on
    #[arg(long)]
    pub(crate) data: PathBuf,
    /// Format of the rows; detected from the columns if left out
    #[arg(long)]
    pub(crate) format: Option<String>,
    /// Template over a row's columns
    #[arg(long)]
    pub(crate) template: Option<String>,
    /// Names of the classes of a class head, in the order of their numbers; left out, the adapter's or the model's
    #[arg(long, value_delimiter = ',')]
    pub(crate) labels: Vec<String>,
    /// A possible completion; give it for each. Accuracy is then the share of rows whose own completion is the likeliest (its text; the end token counts only where a choice begins with another)
    #[arg(long = "choice")]
    pub(crate) choices: Vec<String>,
    /// What rows of format preference are measured by: dpo, ipo, kto, orpo or simpo, with TRL's settings; dpo if left out, and kto where rows have one answer
    #[arg(long)]
    pub(crate) objective: Option<String>,
    /// Its beta; 0.1 if left out
    #[arg(long)]
    pub(crate) beta: Option<f64>,
    /// Rows a batch
    #[arg(long, default_value_t = 8)]
    pub(crate) batch_size: usize,
    /// Tokens a row, at most
    #[arg(long, default_value_t = 2048)]
    pub(crate) max_length: usize,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Adapter folder or hub id; with several, each writes, in one batch
    #[arg(long)]
    pub(crate) adapter: Vec<String>,
    /// The task, for an adapter with several
    #[arg(long)]
    pub(crate) task_id: Option<usize>,
    /// The prompt
    #[arg(long, required_unless_present = "chat")]
    pub(crate) prompt: Option<String>,
    /// Hold a conversation through the tokenizer's chat template; with --prompt, one turn of it
    #[arg(long)]
    pub(crate) chat: bool,
    /// Tokens to write, at most
    #[arg(long, default_value_t = 128)]
    pub(crate) max_new_tokens: usize,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f32,
    /// Sample from the likeliest tokens that make up this share
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// Seed of the sampling
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Print the result as JSON instead of streaming the text
    #[arg(long)]
    pub(crate) json: bool,
}

/// Answer OpenAI's completions and chats over HTTP, each request through its own adapter.
///
/// `model` of a request names an adapter, or the base. Requests of all adapters share batches; adapters are published and unloaded
/// while the server runs. docs/serving.md has the API, the limits, and what is not there.
#[derive(Debug, ClapArgs)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// An adapter folder or hub id with its name, `name=PATH`; without one, that of the folder. It is opened at once. Give it for each
    #[arg(long, value_name = "NAME=PATH")]
    pub(crate) adapter: Vec<String>,
    /// A folder whose folders are adapters, called as they are; each is opened on its first use
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter_dir: Option<PathBuf>,
    /// What the base model is called; left out, the name of its file or folder
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Address to listen on; 0.0.0.0 is all
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port to listen on; 0 is any that is free
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
    /// A key of who may ask; give it for each. Without one, everybody may
    #[arg(long, env = "PEFT_API_KEY", hide_env_values = true, value_delimiter = ',')]
    pub(crate) api_key: Vec<String>,
    /// A TOML file of keys with the models that each may ask for (docs/serving.md)
    #[arg(long, value_name = "FILE")]
    pub(crate) key_file: Option<PathBuf>,
    /// The key of who may publish and unload adapters; without one, nobody may
    #[arg(long, env = "PEFT_ADMIN_KEY", hide_env_values = true)]
    pub(crate) admin_key: Option<String>,
    /// MiB of adapters in memory; beyond, those that were used longest ago wait on disk. Left out, all stay
    #[arg(long, value_name = "MIB")]
    pub(crate) adapter_memory: Option<u64>,
    /// Sequences in a batch, at most
    #[arg(long, default_value_t = 16)]
    pub(crate) max_batch: usize,
    /// Tokens that the cache of keys and values holds, of all sequences together
    #[arg(long, default_value_t = 16_384)]
    pub(crate) cache_tokens: usize,
    /// Tokens of prompts that one step reads, at most
    #[arg(long, default_value_t = 256)]
    pub(crate) prefill_tokens: usize,
    /// Sequences that wait for a place in the batch, at most; more are refused with status 429
    #[arg(long, default_value_t = 256)]
    pub(crate) queue: usize,
    /// Tokens of a text, its prompt among them; left out, the model's positions
    #[arg(long)]
    pub(crate) context: Option<usize>,
    /// Tokens of an answer, at most
    #[arg(long, default_value_t = 1024)]
    pub(crate) max_tokens: usize,
    /// KiB of a request's body, at most
    #[arg(long, default_value_t = 1024)]
    pub(crate) max_body: usize,
    /// Seconds for a whole request, at most
    #[arg(long, default_value_t = 300)]
    pub(crate) timeout: u64,
    /// How the log is written to stderr; RUST_LOG says what of
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log: LogFormat,
}

/// How a log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people
    Text,
    /// An object a line
    Json,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct MergeArgs {
    /// Base model: a folder, a .gguf file or a hub id
    #[arg(long)]
    pub(crate) model: String,
    /// Adapter folder or hub id; several are merged one after another
    #[arg(long, required = true)]
    pub(crate) adapter: Vec<String>,
    /// The task to merge, for an adapter with several
    #[arg(long)]
    pub(crate) task_id: Option<usize>,
    /// Output folder, or file for GGUF
    #[arg(long)]
    pub(crate) output: PathBuf,
    /// Type of the written weights: auto (the base's), f32, bf16 or f16
    #[arg(long, default_value = "auto")]
    pub(crate) dtype: String,
    /// What to write: safetensors or gguf
    #[arg(long, default_value = "safetensors")]
    pub(crate) format: String,
    /// Type of the matrices in a GGUF file: q4_k, q8_0, …
    #[arg(long)]
    pub(crate) quantize: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Make one adapter of several: a weighted sum of what they change.
///
/// The types have PEFT's names and act on the changes of the weights, W ← W + Σ wᵢ·ΔWᵢ: `cat` (exact, ranks add up), `linear` (exact,
/// of the smallest rank that holds the sum), `svd` (the best of a given rank; the default), and on single elements of the changes
/// `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`, followed by the best of a given rank (the same as their names with `_svd`).
/// PEFT applies `linear` and those without `_svd` to A and B apart, whose product has terms of no adapter;
/// --peft-compatible does so too. docs/combining.md has the formulas.
#[derive(Debug, ClapArgs)]
pub(crate) struct CombineArgs {
    /// An adapter folder or hub id with its weight, `PATH=0.5`; a weight below zero takes away, none is 1. Give it for each
    #[arg(long, required = true, value_name = "PATH=WEIGHT", value_parser = WeightedAdapter::parse, allow_hyphen_values = true)]
    pub(crate) adapter: Vec<WeightedAdapter>,
    /// How: cat, linear, svd, ties, ties_svd, dare_linear, dare_linear_svd, dare_ties, dare_ties_svd, magnitude_prune or
    /// magnitude_prune_svd; left out, svd, and linear for IA³
    #[arg(long = "type", value_name = "TYPE", value_parser = combine_type)]
    pub(crate) kind: Option<CombineType>,
    /// The folder to write, new or empty
    #[arg(long)]
    pub(crate) output: PathBuf,
    /// The base model, for what depends on it: DoRA, methods other than LoRA, modules_to_save that differ
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Rank of the result; left out, the largest of the adapters', and for linear the smallest that holds the sum
    #[arg(long, alias = "rank", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) svd_rank: Option<u16>,
    /// The share of elements that ties, dare_… and magnitude_prune keep, above 0 and up to 1
    #[arg(long, default_value_t = 0.5, value_parser = density)]
    pub(crate) density: f64,
    /// Which sign wins in ties: that of the sum (total) or of more adapters (frequency)
    #[arg(long, value_enum, default_value_t = MajoritySignMethod::Total)]
    pub(crate) majority_sign_method: MajoritySignMethod,
    /// Seed of the elements that dare_… keeps
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Combine A and B apart where PEFT does (linear, ties, dare_linear, dare_ties, magnitude_prune), or the factors of IA³
    #[arg(long)]
    pub(crate) peft_compatible: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Put bottleneck adapters together as they are, in one adapter that goes wherever `--adapter` stands.
///
/// A stack has the first read what the sublayer made, and each of the others what the one before made; a class head is the last
/// one's. A mean adds up what they make, each multiplied by its weight; weights are divided by their sum.
/// Attention that is trained to choose among adapters is the method `fusion`; a new adapter trained on top of others is `composition`.
#[derive(Debug, ClapArgs)]
pub(crate) struct ComposeArgs {
    /// How they are put together
    #[arg(long, value_enum)]
    pub(crate) setup: Setup,
    /// An adapter folder or hub id of ours or AdapterHub's, in a mean with its weight, `PATH=0.5`; none is 1. Give it for each adapter,
    /// in order
    #[arg(long, required = true, value_name = "PATH=WEIGHT", value_parser = WeightedAdapter::parse, allow_hyphen_values = true)]
    pub(crate) adapter: Vec<WeightedAdapter>,
    /// The base model: a folder, a .gguf file or a hub id
    #[arg(long)]
    pub(crate) model: String,
    /// Output folder
    #[arg(long)]
    pub(crate) output: PathBuf,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// How adapters are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Setup {
    /// Each reads what the one before made
    Stack,
    /// The weighted mean of what they make
    Average,
}

/// An adapter and what its change is multiplied with.
#[derive(Debug, Clone)]
pub(crate) struct WeightedAdapter {
    pub(crate) adapter: String,
    pub(crate) weight: f64,
}

impl WeightedAdapter {
    fn parse(text: &str) -> Result<Self, String> {
        let Some((adapter, weight)) = text.rsplit_once('=') else {
            return Ok(Self { adapter: text.to_owned(), weight: 1.0 });
        };
        match weight.trim().parse::<f64>() {
            Ok(weight) if weight.is_finite() && !adapter.is_empty() => Ok(Self { adapter: adapter.to_owned(), weight }),
            _ => Err(format!("`{weight}` is not a finite number; write PATH=WEIGHT, such as style=0.5")),
        }
    }
}

fn combine_type(name: &str) -> Result<CombineType, String> {
    CombineType::from_name(name).map_err(|error| error.to_string())
}

fn share(text: &str) -> Result<f64, String> {
    text.parse::<f64>()
        .ok()
        .filter(|x| (0.0..=1.0).contains(x))
        .ok_or_else(|| format!("{text} is not a share from 0 to 1"))
}

fn density(text: &str) -> Result<f64, String> {
    share(text).and_then(|x| if x > 0.0 { Ok(x) } else { Err("nothing would be left".to_owned()) })
}

/// How ties elects the sign of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MajoritySignMethod {
    /// That of the sum
    Total,
    /// That of more adapters
    Frequency,
}

/// What an adapter can be converted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConvertTo {
    /// A LoRA of a chosen rank, from any method that changes weights of linear layers or embeddings
    Lora,
    /// A GGUF file with the factors of a LoRA, for llama.cpp's --lora
    Gguf,
    /// The files of mlx-lm, from a LoRA
    Mlx,
    /// The files of AdapterHub's `adapters` package, for bottleneck adapters, what is made of them, ReFT, LoRA, (IA)³, prefixes
    /// and unions of these
    Adapterhub,
    /// adapter_config.json and adapter_model.safetensors, as training writes them
    Peft,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ConvertArgs {
    /// The adapter, of PEFT's, ours, AdapterHub's, LLM-Adapters', mlx-lm's, torchtune's or kohya's: a folder or a hub id
    #[arg(long)]
    pub(crate) adapter: String,
    /// The form to write
    #[arg(long)]
    pub(crate) to: ConvertTo,
    /// The folder to write, new or empty; the file of `gguf`
    #[arg(long)]
    pub(crate) output: PathBuf,
    /// The base model. `gguf` needs it, `lora` but for a plain LoRA, `adapterhub` where the adapter does not name one on this machine, `peft` for
    /// an adapter of torchtune's or kohya's; with `peft`, the copy of the base's output layer that AdapterHub stores beside an adapter is left out
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// With `lora`, `gguf` and `mlx`: the task to take an adapter for that has several
    #[arg(long)]
    pub(crate) task_id: Option<usize>,
    /// With `lora`: the rank of every site
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) rank: Option<u16>,
    /// With `lora`: each site gets the smallest rank with at most this relative error (Frobenius norm of what its change lacks);
    /// left out like --rank, 0.01
    #[arg(long, value_parser = share, conflicts_with = "rank")]
    pub(crate) max_error: Option<f64>,
    /// What the adapter is called in formats that name it
    #[arg(long, default_value = "adapter")]
    pub(crate) name: String,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct EmbedArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// An adapter: a folder or a hub id
    #[arg(long)]
    pub(crate) adapter: Option<String>,
    /// Rows with a column `text`
    #[arg(long)]
    pub(crate) data: Option<PathBuf>,
    /// A text; may be given several times
    #[arg(long)]
    pub(crate) text: Vec<String>,
    /// A file for a line of JSON a text, instead of stdout
    #[arg(long)]
    pub(crate) output: Option<PathBuf>,
    /// mean, cls, max, lasttoken, weightedmean or mean_sqrt_len_tokens, instead of what the model's folder says (mean where it says nothing)
    #[arg(long)]
    pub(crate) pooling: Option<String>,
    /// Vectors of length 1, whatever the folder says
    #[arg(long, conflicts_with = "no_normalize")]
    pub(crate) normalize: bool,
    /// Vectors as long as they come
    #[arg(long)]
    pub(crate) no_normalize: bool,
    /// Tokens of a text, at most; the folder's max_seq_length if left out
    #[arg(long)]
    pub(crate) max_length: Option<usize>,
    /// Texts a pass
    #[arg(long, default_value_t = 32)]
    pub(crate) batch_size: usize,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct InspectArgs {
    /// A model folder, a .gguf file, an adapter folder or a hub id
    pub(crate) path: String,
    /// The base model, for an adapter of torchtune's or kohya's
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct MethodsArgs {
    /// Print the catalogue as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct DoctorArgs {
    /// Leave out the measurements of matrix products and memory, a few seconds a device
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
