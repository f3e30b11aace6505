//! Each tenant has a folder with an adapter; one base answers for all of them, a budget says how many adapters are in memory.
//! `cargo run --release -p per-tenant-adapters -- FOLDER [MB]` reads lines `TENANT<TAB>PROMPT` and answers each through the adapter
//! in `FOLDER/TENANT`, all that wait in one batch. Thousands of tenants cost a name each until they ask.

use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use peft_models::source::Placement;
use peft_models::{ModelFiles, tokenizer::Tokenizer};
use peft_serve::{Answer, Engine, EngineOptions, Refused, Registry, Request};
use peft_train::methods;

/// One base and the tenants' adapters.
struct Tenants {
    tokenizer: Arc<Tokenizer>,
    registry: Registry,
    engine: Engine,
}

impl Tenants {
    /// Registers the folders in `folder` by their names, without opening them; adapters may take `budget` bytes in memory.
    fn open(base: &Path, folder: &Path, budget: Option<u64>) -> Result<Self> {
        let files = ModelFiles::open(base)?;
        let (model, tokenizer) =
            (Arc::new(files.load_decoder(&Placement::cpu(None), 0)?), Arc::new(files.tokenizer()?));
        let opener = model.clone();
        let registry = Registry::new(move |folder: &Path| Ok(methods::open(folder, &*opener)?.adapter), budget);
        let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
        let folders = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
        registry.register(folders.filter_map(|path| Some((path.file_name()?.to_str()?.to_owned(), path.clone()))))?;
        Ok(Self {
            engine: Engine::start(model, Some(tokenizer.clone()), EngineOptions::default())?,
            tokenizer,
            registry,
        })
    }

    /// Begins an answer. It keeps the adapter that the tenant has now, whatever is published or put out of memory meanwhile.
    fn ask(&self, tenant: &str, prompt: &str) -> Result<Answer> {
        let mut request = Request::new(self.tokenizer.encode(prompt, true)?, 48);
        request.stop_tokens = self.tokenizer.eos_token_ids().to_vec();
        request.adapter = Some(self.registry.lease(tenant)?);
        loop {
            match self.engine.submit(request.clone()) {
                // The others are written meanwhile.
                Err(Refused::Busy { .. }) => std::thread::sleep(Duration::from_millis(5)),
                answer => return Ok(answer?),
            }
        }
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().context("usage: per-tenant-adapters FOLDER [MB of adapters in memory]")?;
    let budget =
        args.next().map(|mb| mb.parse::<u64>().with_context(|| format!("`{mb}` is not a number of MB"))).transpose()?;
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../quickstart/base");
    let tenants = Tenants::open(&base, folder.as_ref(), budget.map(|mb| mb << 20))?;
    let mut answers = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let Some((tenant, prompt)) = line.split_once('\t') else { bail!("`{line}`: write TENANT<TAB>PROMPT") };
        // One tenant's trouble is not the others'.
        answers.push((tenant.to_owned(), tenants.ask(tenant, prompt)));
    }
    for (tenant, answer) in answers {
        match answer.and_then(|answer| answer.complete_blocking().map_err(anyhow::Error::msg)) {
            Ok(all) => println!("{tenant}\t{}", all.text.replace('\n', " ")),
            Err(e) => println!("{tenant}\terror: {e:#}"),
        }
    }
    let stats = tenants.registry.stats();
    eprintln!("{} tenants, {} adapters opened, {} put out of memory", stats.registered, stats.opened, stats.evicted);
    Ok(())
}

#[cfg(test)]
mod tests;
