//! `peft-cli serve`: adapters on one base over HTTP.

mod keys;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use peft_core::kernels::on_pool;
use peft_models::AnyModel;
use peft_serve::http::{Chat, Parts, Server, ServerOptions};
use peft_serve::{Engine, EngineOptions, Registry};
use peft_train::data::ChatTemplate;
use peft_train::methods;
use tokio::net::TcpListener;

use crate::args::ServeArgs;
use crate::open;

pub(crate) fn run(args: &ServeArgs) -> Result<()> {
    let api_keys = keys::read(args)?;
    let files = open::model(&args.model.model)?;
    let tokenizer = Arc::new(files.tokenizer()?);
    let placement = open::placement(&args.model.device, &args.model.dtype)?;
    let model = on_pool(|| files.load(&placement, 0))?;
    model.as_language_model()?;
    let AnyModel::Decoder(model) = model else { bail!("only a causal language model can be served") };
    let (model, base) = (Arc::new(model), model_name(args, files.path()));
    let opener = model.clone();
    let opener = move |folder: &Path| Ok(methods::open(folder, &*opener)?.adapter);
    let registry = Arc::new(Registry::new(opener, args.adapter_memory.map(|mib| mib.saturating_mul(1 << 20))));
    publish(args, &registry, &base)?;
    peft_alloc::keep_pages();

    let engine_options = EngineOptions {
        max_rows: args.max_batch,
        cache_tokens: args.cache_tokens,
        prefill_tokens: args.prefill_tokens,
        queue: args.queue,
        context: args.context,
    };
    let engine = Engine::start(model, Some(tokenizer.clone()), engine_options)?;
    let chat = chat(&tokenizer)?;
    let locate = |spec: &str| open::adapter(spec).map_err(|e| format!("{e:#}"));
    let parts = Parts { engine, registry: registry.clone(), tokenizer, chat, locate: Box::new(locate) };
    let options = ServerOptions {
        api_keys,
        admin_key: args.admin_key.clone(),
        max_body: args.max_body.saturating_mul(1024),
        max_tokens: args.max_tokens,
        timeout: Duration::from_secs(args.timeout),
        ..ServerOptions::new(&base)
    };
    let server = Server::new(parts, options);
    // Two threads move bytes; the model has the others.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let address = format!("{}:{}", args.host, args.port);
        let listener = TcpListener::bind(&address).await.with_context(|| format!("cannot listen on {address}"))?;
        let adapters = registry.stats().registered;
        tracing::info!(address = %listener.local_addr()?, model = base, adapters, "serving");
        eprintln!("listening on http://{}", listener.local_addr()?);
        server.serve(listener, signal()).await.context("the server failed")
    })?;
    // A file that a client had asked to open does not keep the program.
    runtime.shutdown_background();
    Ok(())
}

fn model_name(args: &ServeArgs, path: &Path) -> String {
    args.name.clone().unwrap_or_else(|| open::title(path))
}

/// Opens the adapters that were named, and registers those of the folder.
fn publish(args: &ServeArgs, registry: &Registry, base: &str) -> Result<()> {
    if let Some(dir) = &args.adapter_dir {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(dir).with_context(|| format!("--adapter-dir {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                found.push((open::title(&path), path));
            }
        }
        registry.register(found).context("--adapter-dir")?;
    }
    for spec in &args.adapter {
        let (name, path) = match spec.split_once('=') {
            Some((name, path)) => (name.to_owned(), open::adapter(path)?),
            None => {
                let path = open::adapter(spec)?;
                (open::title(&path), path)
            }
        };
        let began = Instant::now();
        let opened = on_pool(|| registry.load(&name, &path)).context("--adapter")?;
        tracing::info!(adapter = name, hash = %opened.hash(), seconds = began.elapsed().as_secs_f64(), "opened");
    }
    if registry.contains(base) {
        bail!("an adapter is called `{base}`, as the base model is: give the base another --name");
    }
    Ok(())
}

fn chat(tokenizer: &peft_models::tokenizer::Tokenizer) -> Result<Option<Box<Chat>>> {
    let Some(source) = tokenizer.chat_template() else { return Ok(None) };
    let (bos, eos) = (tokenizer.bos_token(), tokenizer.eos_token());
    let template = ChatTemplate::new(source, bos.as_deref(), eos.as_deref())?;
    Ok(Some(Box::new(move |messages, extra| template.render(messages, extra, true).map_err(|e| e.to_string()))))
}

/// Ready at the first SIGINT or SIGTERM; the second ends the program.
async fn signal() {
    next_signal().await;
    tokio::spawn(async {
        next_signal().await;
        eprintln!("stopped at once");
        std::process::exit(130);
    });
}

async fn next_signal() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let Ok(mut terminate) = signal(SignalKind::terminate()) else {
            let _ = interrupt.await;
            return;
        };
        tokio::select! {
            _ = interrupt => {}
            _ = terminate.recv() => {}
        }
    }
    #[cfg(not(unix))]
    let _ = interrupt.await;
}
