//! `peft-cli merge`: a complete model with adapters merged into it.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::DType;
use peft_models::gguf::GgufType;
use peft_models::merge::{MAX_SHARD_BYTES, Merged, write_folder, write_gguf_file};
use peft_models::source::Placement;
use peft_train::methods;
use serde_json::json;

use crate::args::MergeArgs;
use crate::open;

pub(crate) fn run(args: &MergeArgs) -> Result<()> {
    let mut files = open::model(&args.model)?;
    let dtype = open::parse_dtype(&args.dtype)?;
    let stored = files.stored_dtype()?;
    let dtype =
        dtype.unwrap_or(if matches!(stored, DType::F32 | DType::F16 | DType::BF16) { stored } else { DType::F32 });
    let folders = args.adapter.iter().map(|spec| open::adapter(spec)).collect::<Result<Vec<_>>>()?;
    for folder in &folders {
        open::settle_classes(&mut files, &[], Some(folder))?;
    }
    // As stored, so that a merge in f32 starts from what the file says; read matrix by matrix as they are merged.
    let model = files.load_deferred(&Placement::cpu(None), 0)?;
    let (mut adapters, mut of_task) = (Vec::new(), false);
    for (spec, folder) in args.adapter.iter().zip(&folders) {
        let prepared = methods::open(folder, &model).with_context(|| format!("adapter {spec}"))?;
        // Of several adapters, those that depend on the task.
        let adapter = match prepared.adapter.tasks() {
            Some(_) => {
                of_task = true;
                open::for_task(prepared.adapter, args.task_id)?
            }
            None => prepared.adapter,
        };
        adapters.push(Arc::new(adapter));
    }
    if args.task_id.is_some() && !of_task {
        bail!("--task-id is given, and no adapter depends on the task; leave it out");
    }
    let merged = Merged::new(&model, adapters)?;
    let written = match args.format.as_str() {
        "safetensors" => {
            if args.quantize.is_some() {
                bail!("--quantize goes with --format gguf");
            }
            write_folder(&files, &merged, &args.output, dtype, MAX_SHARD_BYTES)?;
            dtype.as_str().to_string()
        }
        "gguf" => {
            let name = args.quantize.as_deref().unwrap_or(match dtype {
                DType::F32 => "f32",
                DType::BF16 => "bf16",
                _ => "f16",
            });
            let weights = GgufType::from_name(name).with_context(|| {
                format!(
                    "`{name}` is not a type of GGUF weights; known: {}",
                    GgufType::names().collect::<Vec<_>>().join(", ")
                )
            })?;
            write_gguf_file(&files, &merged, &args.output, weights)?;
            name.to_string()
        }
        other => bail!("`{other}` is not a format; use safetensors or gguf"),
    };
    if args.json {
        out!("{}", json!({"output": args.output, "dtype": written, "format": args.format, "tied": merged.tied()}));
    } else {
        eprintln!("merged {} into {} ({written})", args.adapter.join(", "), args.output.display());
    }
    Ok(())
}
