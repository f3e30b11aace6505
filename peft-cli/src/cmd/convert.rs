//! `peft-cli convert`: an adapter in another program's form.

use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::Device;
use peft_adapters::adapterhub::{self, HubModel};
use peft_core::{AdapterFolder, BaseModel, atomic, write_adapter};
use peft_models::source::Placement;
use peft_models::{AnyModel, ModelFiles};
use peft_train::{adapter_files, class_labels};
use serde_json::{Value, json};

use crate::args::{ConvertArgs, ConvertTo};
use crate::open;

pub(crate) fn run(args: &ConvertArgs) -> Result<()> {
    let (dir, output) = (open::adapter(&args.adapter)?, &args.output);
    if output.exists() && std::fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("{} holds files already: give --output a folder that is new or empty", output.display());
    }
    let base = match (args.to, &args.model) {
        (ConvertTo::Peft, Some(spec)) => Some(base_model(spec, &dir)?),
        _ => None,
    };
    let adapter = adapter_files::open(&dir, base.as_ref().map(|model| model as &dyn BaseModel))?;
    let labels = class_labels::read(&dir)?.unwrap_or_default();
    let written = match args.to {
        ConvertTo::Adapterhub => {
            let model = hub_model(&adapter, args.model.as_deref())?;
            adapterhub::write(output, &adapter, &args.name, &labels, &model)
        }
        ConvertTo::Peft => peft_folder(output, &adapter, &labels),
    };
    written.with_context(|| format!("adapter {}", args.adapter))?;
    if args.json {
        out!("{}", json!({"output": output, "tensors": adapter.keys().len()}));
    }
    eprintln!("written to {}", output.display());
    Ok(())
}

fn peft_folder(output: &Path, adapter: &AdapterFolder, labels: &[String]) -> peft_core::Result<()> {
    let tensors = adapter.keys().map(|key| Ok((key, adapter.tensor(key, &Device::Cpu)?)));
    let tensors = tensors.collect::<peft_core::Result<Vec<_>>>()?;
    atomic::replace_dir(output, |dir| {
        if !labels.is_empty() {
            class_labels::write(dir, labels)?;
        }
        write_adapter(dir, adapter.config(), tensors.iter().map(|(key, t)| (*key, t)))
    })
}

/// The base model, read matrix by matrix as it is compared with.
fn base_model(spec: &str, adapter: &Path) -> Result<AnyModel> {
    let mut files = open::model(spec)?;
    open::settle_classes(&mut files, &[], Some(adapter))?;
    Ok(files.load_deferred(&Placement::cpu(None), 0)?)
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
