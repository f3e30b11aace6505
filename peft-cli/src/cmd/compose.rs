//! `peft-cli compose`: several bottleneck adapters in one, as they are.

use anyhow::{Result, bail};
use peft_core::{AdapterConfig, BaseModel};
use peft_train::{adapter_files, class_labels, methods};
use serde_json::{Map, Value, json};

use crate::args::{ComposeArgs, Setup, WeightedAdapter};
use crate::open;

pub(crate) fn run(args: &ComposeArgs) -> Result<()> {
    open::refuse_filled(&args.output)?;
    let folders = args.adapter.iter().map(|a| open::adapter(&a.adapter)).collect::<Result<Vec<_>>>()?;
    let weights: Vec<f64> = args.adapter.iter().map(|a| a.weight).collect();
    if let (Setup::Stack, Some(one)) = (args.setup, args.adapter.iter().find(|a| a.weight != 1.0)) {
        bail!("{}={}: weights go with --setup average", one.adapter, one.weight);
    }
    let base = open::base(&args.model, folders.iter().map(std::path::PathBuf::as_path))?;
    let parts: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    let mut table = Map::from_iter([("adapters".to_owned(), parts.into())]);
    match args.setup {
        Setup::Stack => table.insert("setup".into(), "stack".into()),
        Setup::Average => {
            table.insert("weights".into(), weights.into());
            table.insert("setup".into(), "average".into())
        }
    };
    let mut adapter = methods::compose(&table, &base)?;
    adapter.config.insert("base_model_name_or_path".into(), args.model.clone().into());
    if let (Some(last), true) = (folders.last(), !adapter.parameters().is_empty()) {
        adapter.labels = class_labels::read(last)?.unwrap_or_default();
    }
    let (config, tensors) = adapter.exported()?;
    let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    adapter_files::write(&args.output, &AdapterConfig::new(config)?, &adapter.labels, tensors)?;
    let (parameters, places) =
        (adapter.tensors().iter().map(|(_, t)| t.elem_count()).sum::<usize>(), adapter.touched().count());
    if args.json {
        let of = |a: &WeightedAdapter| json!({"adapter": a.adapter, "weight": a.weight});
        let adapters: Vec<Value> = args.adapter.iter().map(of).collect();
        out!("{}", json!({"output": args.output, "adapters": adapters, "places": places, "parameters": parameters}));
    }
    eprintln!(
        "{} adapters at {places} places of {}, {parameters} parameters; written to {}",
        args.adapter.len(),
        base.model_type(),
        args.output.display()
    );
    Ok(())
}
