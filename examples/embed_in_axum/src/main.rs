//! A web server of your own whose requests go through adapters: the registry and the engine, and two routes.
//! `cargo run --release -p embed-in-axum -- [NAME=FOLDER ...]`, then `curl localhost:3000/base -d 'Once upon a time'`;
//! `curl -X PUT localhost:3000/NAME -d FOLDER` publishes an adapter while others are in use.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::extract::{Path as Named, State};
use axum::http::StatusCode;
use axum::{Router, routing::post};
use peft_models::{ModelFiles, source::Placement, tokenizer::Tokenizer};
use peft_serve::{Engine, EngineOptions, Refused, Registry, RegistryError, Request};
use peft_train::methods;

/// What all requests share.
struct App {
    tokenizer: Arc<Tokenizer>,
    registry: Registry,
    engine: Engine,
}

type Failed = (StatusCode, String);

/// Goes on with a text through the adapter that the path names. A client that goes away drops the answer, which frees its place.
async fn write(State(app): State<Arc<App>>, Named(name): Named<String>, text: String) -> Result<String, Failed> {
    let bad = |e: &dyn std::fmt::Display| (StatusCode::BAD_REQUEST, e.to_string());
    let mut request = Request::new(app.tokenizer.encode(&text, true).map_err(|e| bad(&e))?, 48);
    request.stop_tokens = app.tokenizer.eos_token_ids().to_vec();
    // Opens files if the adapter is not in memory: a server with many of them does this in `spawn_blocking`.
    request.adapter = match name.as_str() {
        "base" => None,
        name => Some(app.registry.lease(name).map_err(|e| match e {
            RegistryError::Unknown { .. } => (StatusCode::NOT_FOUND, e.to_string()),
            _ => bad(&e),
        })?),
    };
    let answer = app.engine.submit(request).map_err(|e| match e {
        Refused::Invalid { .. } => bad(&e),
        Refused::Busy { .. } => (StatusCode::TOO_MANY_REQUESTS, e.to_string()),
        Refused::Stopping => (StatusCode::SERVICE_UNAVAILABLE, e.to_string()),
    })?;
    answer.complete().await.map(|all| all.text).map_err(|e| (StatusCode::INTERNAL_SERVER_ERROR, e))
}

/// Publishes the adapter in a folder. Requests in flight keep the one that they began with.
async fn publish(State(app): State<Arc<App>>, Named(name): Named<String>, folder: String) -> Result<String, Failed> {
    let load = move || app.registry.load(&name, Path::new(folder.trim())).map(|adapter| adapter.hash().to_string());
    let loaded =
        tokio::task::spawn_blocking(load).await.map_err(|e| (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))?;
    loaded.map_err(|e| (StatusCode::BAD_REQUEST, e.to_string()))
}

fn app(base: &Path) -> Result<App> {
    let files = ModelFiles::open(base)?;
    let (model, tokenizer) = (Arc::new(files.load_decoder(&Placement::cpu(None), 0)?), Arc::new(files.tokenizer()?));
    let opener = model.clone();
    let registry = Registry::new(move |folder: &Path| Ok(methods::open(folder, &*opener)?.adapter), None);
    let engine = Engine::start(model, Some(tokenizer.clone()), EngineOptions::default())?;
    Ok(App { tokenizer, registry, engine })
}

fn router(app: App) -> Router {
    Router::new().route("/{adapter}", post(write).put(publish)).with_state(Arc::new(app))
}

#[tokio::main]
async fn main() -> Result<()> {
    let app = app(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../quickstart/base"))?;
    for arg in std::env::args().skip(1) {
        let (name, folder) = arg.split_once('=').with_context(|| format!("`{arg}`: write NAME=FOLDER"))?;
        app.registry.load(name, Path::new(folder))?;
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    println!("listening on http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, router(app)).await?)
}

#[cfg(test)]
mod tests;
