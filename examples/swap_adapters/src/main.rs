//! Loads one base, opens several adapters, and answers a batch whose rows use different adapters, in one forward pass a
//! token. Then swaps an adapter while a request that began earlier keeps the old one.
//! `cargo run --release -p swap-adapters [-- NAME=PATH ...]`; without names, the quickstart's three adapters.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use peft_core::{Adapter, AdapterSet};
use peft_models::generate::{GenerateOptions, Request, generate};
use peft_models::source::Placement;
use peft_models::tokenizer::Tokenizer;
use peft_models::{Decoder, ModelFiles};
use peft_train::methods;

/// The quickstart's adapters: name, recipe, a prompt.
const TASKS: [(&str, &str, &str); 3] = [
    ("style", "lora.toml", "Once upon a time there was a brave dog named Rex."),
    ("sentiment", "sentiment.toml", "Review: The soup was not good.\nSentiment:"),
    ("qa", "qa.toml", "What does a bee eat?\nTelegram:"),
];

/// What a server holds: the base never changes, the set is replaced as a whole.
struct Server {
    model: Decoder,
    tokenizer: Tokenizer,
    adapters: RwLock<Arc<AdapterSet>>,
}

impl Server {
    /// The set that a request works with from beginning to end.
    fn snapshot(&self) -> Arc<AdapterSet> {
        self.adapters.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes `adapter` the one called `name` for all requests that begin from now on.
    fn publish(&self, name: &str, adapter: Arc<Adapter>) {
        let next = Arc::new(self.snapshot().with(name, adapter));
        *self.adapters.write().unwrap_or_else(PoisonError::into_inner) = next;
    }

    /// Answers all rows in one batch, each `(adapter, prompt)` through its own adapter.
    fn answer(&self, set: &AdapterSet, rows: &[(Option<&str>, &str)]) -> Result<Vec<String>> {
        let request = |(name, prompt): &(Option<&str>, &str)| -> Result<Request> {
            let slot = name.map(|n| set.slot(n).with_context(|| format!("no adapter is called {n}"))).transpose()?;
            Ok(Request { prompt: self.tokenizer.encode(prompt, true)?, slot })
        };
        let requests = rows.iter().map(request).collect::<Result<Vec<_>>>()?;
        let stop = self.tokenizer.eos_token_ids().to_vec();
        let options = GenerateOptions { max_new_tokens: 24, stop, ..GenerateOptions::default() };
        let written = generate(&self.model, set, &requests, &options, |_, _| true)?;
        written.iter().map(|ids| Ok(self.tokenizer.decode(ids, true)?.trim().replace('\n', " "))).collect()
    }
}

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let named = adapters(&root)?;
    let files = ModelFiles::open(&root.join("examples/quickstart/base"))?;
    let model = files.load_decoder(&Placement::cpu(None), 0)?;
    let server = Server { model, tokenizer: files.tokenizer()?, adapters: RwLock::default() };
    for (name, path) in &named {
        let started = Instant::now();
        server.publish(name, Arc::new(methods::open(path, &server.model)?.adapter));
        println!("opened {name} in {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
    }

    let prompt = |name: &str| TASKS.iter().find(|t| t.0 == name).map_or(TASKS[0].2, |t| t.2);
    let mut rows: Vec<(Option<&str>, &str)> = named.iter().map(|(n, _)| (Some(n.as_str()), prompt(n))).collect();
    rows.push((None, TASKS[0].2));
    println!("\none batch, every row through its own adapter:");
    let before = server.snapshot();
    show(&rows, &server.answer(&before, &rows)?);

    let (Some((first, _)), Some((last, _))) = (named.first(), named.last()) else { return Ok(()) };
    let replacement = before.slot(last).and_then(|s| before.adapter(s)).context("the last adapter is gone")?;
    let started = Instant::now();
    server.publish(first, replacement.clone());
    println!("\n`{first}` now is what `{last}` is; published in {:.1} µs", started.elapsed().as_secs_f64() * 1e6);
    let row = [(Some(first.as_str()), prompt(last))];
    println!("a request that began before the swap:");
    show(&row, &server.answer(&before, &row)?);
    println!("a request that begins after it:");
    show(&row, &server.answer(&server.snapshot(), &row)?);
    Ok(())
}

/// The adapters of the command line, or the quickstart's.
fn adapters(root: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut named: Vec<(String, PathBuf)> = Vec::new();
    for arg in std::env::args().skip(1) {
        let (name, path) = arg.split_once('=').with_context(|| format!("`{arg}`: write name=PATH"))?;
        named.push((name.into(), path.into()));
    }
    if named.is_empty() {
        named = TASKS.iter().map(|(name, ..)| (name.to_string(), root.join("target/quickstart").join(name))).collect();
    }
    if let Some((name, path)) = named.iter().find(|(_, p)| !p.join("adapter_config.json").is_file()) {
        let recipe = TASKS.iter().find(|t| t.0 == name).map_or("YOUR-RECIPE.toml", |t| t.1);
        bail!(
            "no adapter in {}; train it first:\n  cargo run --release -p peft-cli -- train examples/quickstart/{recipe}",
            path.display()
        );
    }
    Ok(named)
}

fn show(rows: &[(Option<&str>, &str)], texts: &[String]) {
    for (i, ((adapter, prompt), text)) in rows.iter().zip(texts).enumerate() {
        println!("  {i}  {:<10} {} → {text}", adapter.unwrap_or("(base)"), prompt.replace('\n', " "));
    }
}
