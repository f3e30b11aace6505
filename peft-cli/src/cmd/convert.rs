//! `peft-cli convert`: an adapter in another program's form.

use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::Device;
use peft_adapters::adapterhub::{self, HubModel};
use peft_core::{AdapterFolder, BaseModel, HeadKind, Labels};
use peft_lora::mlx;
use peft_models::ModelFiles;
use peft_models::gguf::write_gguf_adapter;
use peft_train::combine::{Input, unscaled};
use peft_train::{adapter_files, class_labels};
use serde_json::{Value, json};

use crate::args::{ConvertArgs, ConvertTo};
use crate::cmd::combine;
use crate::open;

pub(crate) fn run(args: &ConvertArgs) -> Result<()> {
    let (dir, output) = (open::adapter(&args.adapter)?, &args.output);
    open::refuse_filled(output)?;
    if args.to != ConvertTo::Lora && (args.rank.is_some() || args.max_error.is_some()) {
        bail!("--rank and --max-error go with --to lora");
    }
    if matches!(args.to, ConvertTo::Adapterhub | ConvertTo::Peft) && args.task_id.is_some() {
        bail!("--task-id goes with --to lora, gguf and mlx");
    }
    match args.to {
        ConvertTo::Lora => return combine::to_lora(args, &dir),
        ConvertTo::Gguf | ConvertTo::Mlx => return factors(args, &dir),
        ConvertTo::Adapterhub | ConvertTo::Peft => {}
    }
    let base = match (args.to, &args.model) {
        (ConvertTo::Peft, Some(spec)) => Some(open::base(spec, [dir.as_path()])?),
        _ => None,
    };
    let adapter = adapter_files::open(&dir, base.as_ref().map(|model| model as &dyn BaseModel))?;
    let labels = class_labels::read(&dir)?.unwrap_or_default();
    let written = match args.to {
        ConvertTo::Adapterhub => {
            if !labels.is_empty() && labels.kind != HeadKind::Classification {
                bail!(
                    "AdapterHub's heads are written for classification, and this adapter has one for {}",
                    labels.kind
                );
            }
            let model = hub_model(&adapter, args.model.as_deref())?;
            adapterhub::write(output, &adapter, &args.name, &labels.names, &model)
        }
        _ => peft_folder(output, &adapter, &labels),
    };
    written.with_context(|| format!("adapter {}", args.adapter))?;
    if args.json {
        out!("{}", json!({"output": output, "tensors": adapter.keys().len()}));
    }
    eprintln!("written to {}", output.display());
    Ok(())
}

/// `--to gguf` and `--to mlx`, which hold the factors of a LoRA and nothing else.
fn factors(args: &ConvertArgs, folder: &Path) -> Result<()> {
    let output = &args.output;
    let input = Input { name: &args.adapter, weight: 1.0, folder, task: args.task_id };
    let of = || format!("adapter {}", args.adapter);
    let model = args.model.as_deref().map(|spec| open::base(spec, [folder])).transpose()?;
    let lora = unscaled(input, model.as_ref().map(|model| model as &dyn BaseModel))?;
    let tensors = match args.to {
        ConvertTo::Mlx => mlx::write(output, &lora).with_context(of)?,
        _ => {
            let Some(spec) = &args.model else {
                bail!("llama.cpp orders the rows of some layers by the model's heads: give --model")
            };
            let files = open::model(spec)?;
            let factors = lora.plain_factors("llama.cpp").with_context(of)?;
            write_gguf_adapter(output, files.decoder_config()?, &factors)?
        }
    };
    if args.json {
        out!("{}", json!({"output": output, "tensors": tensors}));
    }
    eprintln!("written to {}", output.display());
    Ok(())
}

fn peft_folder(output: &Path, adapter: &AdapterFolder, labels: &Labels) -> peft_core::Result<()> {
    let tensors = adapter.keys().map(|key| Ok((key, adapter.tensor(key, &Device::Cpu)?)));
    let tensors = tensors.collect::<peft_core::Result<Vec<_>>>()?;
    adapter_files::write(output, adapter.config(), labels, tensors.iter().map(|(key, t)| (*key, t)))
}

/// The base model that was named, or the one that the adapter names where it is on this machine.
fn hub_model(adapter: &AdapterFolder, named: Option<&str>) -> Result<HubModel> {
    let own = adapter.config().get("base_model_name_or_path").and_then(Value::as_str);
    let files = match (named, own) {
        (Some(spec), _) => open::model(spec)?,
        (None, Some(path)) if Path::new(path).exists() => ModelFiles::open(Path::new(path))?,
        _ => bail!("AdapterHub's files say for which family of models they are: name the base with --model"),
    };
    let name = own.or(named).unwrap_or("").to_owned();
    Ok(HubModel { model_type: files.config().model_type().to_owned(), name })
}
