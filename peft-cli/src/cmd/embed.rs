//! `peft-cli embed`: texts as vectors.

use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use peft_core::{AdapterSet, BaseModel};
use peft_models::pooling::{Pooling, PoolingMode, embed};
use peft_train::data::{DataSpec, EncodeOptions, Format, TextTokenizer, contexts};
use peft_train::methods;
use serde_json::json;

use crate::args::EmbedArgs;
use crate::open;

pub(crate) fn run(args: &EmbedArgs) -> Result<()> {
    let files = open::model(&args.model.model)?;
    let mut pooling = Pooling::of_folder(files.path())?.unwrap_or_default();
    if let Some(name) = &args.pooling {
        pooling.modes = vec![PoolingMode::of(name).context("--pooling")?];
    }
    pooling.normalize = (pooling.normalize || args.normalize) && !args.no_normalize;
    pooling.max_length = args.max_length.or(pooling.max_length);
    let texts = match (&args.data, args.text.as_slice()) {
        (Some(data), []) => contexts(&DataSpec::from(data.as_path()), Format::Text, &EncodeOptions::new(Format::Text))?,
        (None, [_, ..]) => args.text.clone(),
        _ => bail!("give either --data or --text"),
    };
    let tokenizer = open::text_tokenizer(&files.tokenizer()?)?;
    let model = files.load(&open::placement(&args.model.device, &args.model.dtype)?, 0)?;
    let longest = pooling.max_length.unwrap_or(usize::MAX).min(open::max_length(&files, usize::MAX, 0));
    let mut set = AdapterSet::empty();
    if let Some(spec) = &args.adapter {
        let adapter = methods::open(&open::adapter(spec)?, &model)?.adapter;
        if adapter.virtual_tokens().is_some_and(|tokens| tokens.is_prompt()) {
            bail!(
                "--adapter: a prompt's tokens would be pooled with the text's; embed takes adapters of other methods"
            );
        }
        set = set.with(spec, Arc::new(open::for_task(adapter, None)?.settled()?));
    }
    peft_alloc::keep_pages();
    let encode = |(i, text): (usize, &String)| -> Result<Vec<u32>> {
        let framed = tokenizer.encode_framed(text, None).map_err(|e| anyhow::anyhow!("text {}: {e}", i + 1))?;
        let (framed, _) = framed.cut_to(longest).context("--max-length leaves no room beside the special tokens")?;
        if framed.ids.is_empty() {
            bail!("text {} has no tokens", i + 1);
        }
        Ok(framed.ids)
    };
    let encoded = texts.iter().enumerate().map(encode).collect::<Result<Vec<_>>>()?;
    // Of like lengths together; results in the order of the texts.
    let mut order: Vec<usize> = (0..encoded.len()).collect();
    order.sort_by_key(|&i| encoded.get(i).map_or(0, Vec::len));
    let mut vectors: Vec<Vec<f32>> = vec![Vec::new(); encoded.len()];
    for rows in order.chunks(args.batch_size.max(1)) {
        let batch: Vec<Vec<u32>> = rows.iter().filter_map(|&i| encoded.get(i).cloned()).collect();
        let made = embed(&model, &set, &batch, &pooling)?;
        peft_core::check_finite("embedding", &made)?;
        for (&row, vector) in rows.iter().zip(made.to_vec2::<f32>()?) {
            if let Some(place) = vectors.get_mut(row) {
                *place = vector;
            }
        }
    }
    let lines = texts.iter().zip(&vectors).map(|(text, vector)| json!({"text": text, "embedding": vector}).to_string());
    match &args.output {
        None => lines.for_each(|line| out!("{line}")),
        Some(path) => peft_core::atomic::write_file_with(path, |file| {
            for line in lines {
                writeln!(file, "{line}")?;
            }
            Ok(())
        })?,
    }
    if args.output.is_some() {
        let width = vectors.first().map_or(0, Vec::len);
        out!("{}", json!({"texts": texts.len(), "width": width, "model_type": model.model_type()}));
    }
    Ok(())
}
