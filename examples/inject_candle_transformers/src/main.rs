//! A Llama of candle-transformers, as it is, with the adapters of a folder: merged while it loads, swapped in its own memory after.
//! `cargo run --release -p inject-candle-transformers -- PROMPT FOLDER [FOLDER ...]`, on the quickstart's base.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaConfig};
use peft_inject::{Base, Injected, inject};
use peft_models::tokenizer::Tokenizer;
use peft_train::methods;

struct App {
    base: Arc<Base>,
    config: Config,
    tokenizer: Tokenizer,
    model: Llama,
    injected: Injected,
}

impl App {
    /// Loads the base at `folder` and finds out what can be swapped.
    fn load(folder: &Path) -> Result<Self> {
        let base = Arc::new(Base::open(folder)?);
        let text = std::fs::read_to_string(folder.join("config.json"))?;
        let config = serde_json::from_str::<LlamaConfig>(&text)?.into_config(false);
        let (model, mut injected) = inject(&base, Vec::new(), DType::F32, &Device::Cpu, |vb| Llama::load(vb, &config))?;
        let prompt = Tensor::new(&[[5u32, 6, 7]], &Device::Cpu)?;
        injected.probe(|| model.forward(&prompt, 0, &mut Cache::new(false, DType::F32, &config, &Device::Cpu)?))?;
        Ok(Self { base, config, tokenizer: Tokenizer::from_folder(folder)?, model, injected })
    }

    /// Makes the adapter in `folder` the model's.
    fn swap(&mut self, folder: &Path) -> Result<()> {
        let adapter = methods::open(folder, &*self.base)?.adapter;
        Ok(self.injected.swap(vec![Arc::new(adapter)])?)
    }

    /// Goes on with a text for `new` tokens, taking the likeliest each time.
    fn write(&self, text: &str, new: usize) -> Result<String> {
        let mut ids = self.tokenizer.encode(text, true)?;
        let (prompt, mut seen) = (ids.len(), 0);
        let mut cache = Cache::new(true, DType::F32, &self.config, &Device::Cpu)?;
        for _ in 0..new {
            let unseen = ids.get(seen..).context("no token is left to read")?;
            let input = Tensor::new(unseen, &Device::Cpu)?.unsqueeze(0)?;
            let logits = self.model.forward(&input, seen, &mut cache)?;
            seen = ids.len();
            let next = logits.squeeze(0)?.argmax(0)?.to_scalar::<u32>()?;
            if self.tokenizer.eos_token_ids().contains(&next) {
                break;
            }
            ids.push(next);
        }
        Ok(self.tokenizer.decode(ids.get(prompt..).unwrap_or_default(), true)?)
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let prompt = args.next().context("usage: inject-candle-transformers PROMPT FOLDER [FOLDER ...]")?;
    let mut app = App::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../quickstart/base"))?;
    println!("base: {}", app.write(&prompt, 32)?);
    for folder in args {
        app.swap(folder.as_ref())?;
        println!("{folder}: {}", app.write(&prompt, 32)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
