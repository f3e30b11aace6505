//! The server of `peft-cli serve`: OpenAI's completions and chat over HTTP, adapters by name, and what runs it.
//!
//! Everything that a request can do wrong is an [`ApiError`] in OpenAI's shape; no request ends the server.

mod adapters;
mod answer;
mod body;
mod error;
mod keys;
mod metrics;
mod page;
mod prompt;
mod stream;

use std::convert::Infallible;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use peft_models::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;

pub use self::error::ApiError;
pub use self::keys::ApiKey;
use self::keys::Keys;
use self::metrics::Metrics;
use crate::handle::Engine;
use crate::registry::Registry;

/// Writes a conversation as the model was taught to read it: `messages` are objects `{role, content}`, the map holds what the
/// request gives the template besides. The error is the template's message.
pub type Chat = dyn Fn(&[Value], &Map<String, Value>) -> Result<String, String> + Send + Sync;

/// Finds the folder of what `POST /v1/adapters` calls `path`. The error is a message.
pub type Locate = dyn Fn(&str) -> Result<PathBuf, String> + Send + Sync;

/// What the server allows.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// What the base model is called.
    pub model: String,
    /// Keys of who may ask; none lets everybody.
    pub api_keys: Vec<ApiKey>,
    /// The key of who may publish and unload adapters, and do all else; without one nobody may.
    pub admin_key: Option<String>,
    /// Bytes of a body, at most.
    pub max_body: usize,
    /// Tokens of an answer, at most; what a chat gets that names no number.
    pub max_tokens: usize,
    /// Answers of one request, at most.
    pub max_choices: usize,
    /// Time for a whole request, waiting included.
    pub timeout: Duration,
}

impl ServerOptions {
    /// Limits for a server whose base is called `model`, without keys.
    #[must_use]
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            api_keys: Vec::new(),
            admin_key: None,
            max_body: 1 << 20,
            max_tokens: 1024,
            max_choices: 16,
            timeout: Duration::from_secs(300),
        }
    }
}

/// What the server is made of.
pub struct Parts {
    /// The engine, started with the tokenizer.
    pub engine: Engine,
    /// The adapters.
    pub registry: Arc<Registry>,
    /// The base model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The chat template, if there is one.
    pub chat: Option<Box<Chat>>,
    /// Where adapters to publish are.
    pub locate: Box<Locate>,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").field("engine", &self.engine).field("registry", &self.registry).finish_non_exhaustive()
    }
}

/// The state that all requests share.
struct Shared {
    parts: Parts,
    options: ServerOptions,
    keys: Keys,
    metrics: Metrics,
    /// Requests so far, for their ids.
    requests: AtomicU64,
    started: u64,
}

/// A server that has not begun to listen.
pub struct Server(Arc<Shared>);

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("model", &self.0.options.model).finish_non_exhaustive()
    }
}

impl Server {
    /// A server of these parts.
    #[must_use]
    pub fn new(parts: Parts, options: ServerOptions) -> Self {
        let metrics = Metrics::new(parts.engine.clone(), parts.registry.clone());
        let keys = Keys::of(&options);
        let (requests, started) = (AtomicU64::new(0), seconds(SystemTime::now()));
        Self(Arc::new(Shared { parts, options, keys, metrics, requests, started }))
    }

    /// Its routes, for a program that has routes of its own.
    pub fn router(&self) -> Router {
        let shared = self.0.clone();
        Router::new()
            .route("/v1/completions", post(answer::completions))
            .route("/v1/chat/completions", post(answer::chat))
            .route("/v1/models", get(adapters::models))
            .route("/v1/models/{model}", get(adapters::model))
            .route("/v1/adapters", get(adapters::list).post(adapters::publish))
            .route("/v1/adapters/{name}", delete(adapters::unload))
            .route("/health", get(health))
            .route("/metrics", get(metrics))
            .route("/openapi.json", get(openapi))
            .merge(page::routes())
            .fallback(not_found)
            .method_not_allowed_fallback(wrong_method)
            .layer(axum::middleware::from_fn_with_state(shared.clone(), count))
            .with_state(shared)
    }

    /// Answers requests until `shutdown` is ready; then takes no more, finishes those that run, and stops the engine. What has not
    /// come to its end within a request's time is left.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> std::io::Result<()> {
        let (begin, begun) = tokio::sync::oneshot::channel();
        let signal = async move {
            shutdown.await;
            tracing::info!("shutting down: requests that run are finished");
            let _ = begin.send(());
        };
        let patience = self.0.options.timeout + Duration::from_secs(5);
        let serving = axum::serve(listener, self.router()).with_graceful_shutdown(signal);
        let too_long = async move {
            // Without a signal there is nothing to wait for.
            if begun.await.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(patience).await;
        };
        tokio::select! {
            done = serving.into_future() => done?,
            () = too_long => tracing::warn!("some clients did not read their answers; they are left"),
        }
        self.0.parts.engine.shutdown();
        let _ = tokio::time::timeout(patience, self.0.parts.engine.stopped()).await;
        Ok(())
    }
}

impl Shared {
    fn next_request(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed)
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

fn answer_json(status: StatusCode, value: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

async fn health(State(shared): State<Arc<Shared>>) -> Response {
    match shared.parts.engine.is_running() {
        true => answer_json(StatusCode::OK, &json!({"status": "ok"})),
        false => ApiError::stopping().into_response(),
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match shared.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        Err(e) => ApiError::internal(format!("metrics: {e}")).into_response(),
    }
}

/// What clients and their generators read about all of this.
async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], include_str!("openapi.json")).into_response()
}

async fn not_found(request: Request) -> ApiError {
    ApiError::not_found(format!("there is no {} {}", request.method(), request.uri().path()), None)
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError::method(format!("{} does not take {}", request.uri().path(), request.method()))
}

/// Counts requests by route and status.
async fn count(
    State(shared): State<Arc<Shared>>,
    route: Option<axum::extract::MatchedPath>,
    request: Request,
    next: axum::middleware::Next,
) -> Result<Response, Infallible> {
    let response = next.run(request).await;
    let route = route.as_ref().map_or("other", |route| route.as_str());
    shared.metrics.request(route, response.status().as_u16());
    Ok(response)
}
