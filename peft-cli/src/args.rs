//! The command line, parsed and nothing more.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

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
    /// Write a complete model with one or more adapters merged into it
    Merge(MergeArgs),
    /// Write an adapter in another program's form
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
    /// Adapter folder or hub id
    #[arg(long)]
    pub(crate) adapter: Option<String>,
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
    /// Adapter folder or hub id
    #[arg(long)]
    pub(crate) adapter: Option<String>,
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

#[derive(Debug, ClapArgs)]
pub(crate) struct MergeArgs {
    /// Base model: a folder, a .gguf file or a hub id
    #[arg(long)]
    pub(crate) model: String,
    /// Adapter folder or hub id; several are merged one after another
    #[arg(long, required = true)]
    pub(crate) adapter: Vec<String>,
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

/// What an adapter can be converted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConvertTo {
    /// The files of AdapterHub's `adapters` package, for bottleneck adapters
    Adapterhub,
    /// adapter_config.json and adapter_model.safetensors, as training writes them
    Peft,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ConvertArgs {
    /// The adapter, of PEFT's, ours or AdapterHub's: a folder or a hub id
    #[arg(long)]
    pub(crate) adapter: String,
    /// The form to write
    #[arg(long)]
    pub(crate) to: ConvertTo,
    /// The folder to write, new or empty
    #[arg(long)]
    pub(crate) output: PathBuf,
    /// The base model. `adapterhub` needs it where the adapter does not name one on this machine; with `peft`, the copy of the
    /// base's output layer that AdapterHub stores beside an adapter is left out
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// What the adapter is called in formats that name it
    #[arg(long, default_value = "adapter")]
    pub(crate) name: String,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct InspectArgs {
    /// A model folder, a .gguf file, an adapter folder or a hub id
    pub(crate) path: String,
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
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
