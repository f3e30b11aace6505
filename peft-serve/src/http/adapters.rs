//! Models and adapters: what can be asked for, and who is let to change it.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{ApiError, Shared, answer_json, body, seconds};
use crate::registry::{Listed, RegistryError};

fn base(shared: &Shared) -> Value {
    json!({
        "id": shared.options.model, "object": "model", "created": shared.started, "owned_by": "peft",
        "parent": null, "max_model_len": shared.parts.engine.context_length(),
    })
}

fn adapter(shared: &Shared, listed: &Listed) -> Value {
    json!({
        "id": listed.name, "object": "model", "created": seconds(listed.published), "owned_by": "peft",
        "parent": shared.options.model,
    })
}

/// `GET /v1/models`
pub(super) async fn models(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Result<Response, ApiError> {
    let access = shared.keys.check_user(&headers)?;
    let adapters = shared.parts.registry.list();
    let adapters = adapters.iter().filter(|a| access.has(&a.name)).map(|a| adapter(&shared, a));
    let base = access.has(&shared.options.model).then(|| base(&shared));
    let data: Vec<Value> = base.into_iter().chain(adapters).collect();
    Ok(answer_json(StatusCode::OK, &json!({"object": "list", "data": data})))
}

/// `GET /v1/models/{model}`
pub(super) async fn model(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    shared.keys.check_user(&headers)?.check(&name)?;
    if name == shared.options.model {
        return Ok(answer_json(StatusCode::OK, &base(&shared)));
    }
    match shared.parts.registry.get(&name) {
        Some(listed) => Ok(answer_json(StatusCode::OK, &adapter(&shared, &listed))),
        None => Err(ApiError::no_model(&name)),
    }
}

fn detailed(listed: &Listed) -> Value {
    json!({
        "name": listed.name, "object": "adapter", "path": listed.folder, "published": seconds(listed.published),
        "hash": listed.hash.map(|h| h.to_string()), "resident_bytes": listed.bytes,
    })
}

/// `GET /v1/adapters`
pub(super) async fn list(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Result<Response, ApiError> {
    shared.keys.check_admin(&headers)?;
    let data: Vec<Value> = shared.parts.registry.list().iter().map(detailed).collect();
    Ok(answer_json(StatusCode::OK, &json!({"object": "list", "data": data})))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Publish {
    name: String,
    path: String,
}

/// `POST /v1/adapters`
pub(super) async fn publish(State(shared): State<Arc<Shared>>, request: Request) -> Result<Response, ApiError> {
    shared.keys.check_admin(request.headers())?;
    let (parts, body) = request.into_parts();
    let Publish { name, path } = body::read(&parts.headers, body, &shared.options).await?;
    if name == shared.options.model {
        return Err(ApiError::invalid("name", format!("`{name}` is the base model")));
    }
    let opening = shared.clone();
    let opened = tokio::task::spawn_blocking(move || {
        let folder = (opening.parts.locate)(&path).map_err(|e| ApiError::invalid("path", e))?;
        let loaded = opening.parts.registry.load(&name, &folder);
        loaded.map_err(|e| match e {
            RegistryError::Name(_) => e.into(),
            other => ApiError::invalid("path", other.to_string()),
        })?;
        Ok::<_, ApiError>(name)
    });
    let name = opened.await.map_err(|_| ApiError::internal("the adapter could not be opened"))??;
    tracing::info!(adapter = name, "published");
    match shared.parts.registry.get(&name) {
        Some(listed) => Ok(answer_json(StatusCode::OK, &detailed(&listed))),
        None => Err(ApiError::not_found(format!("`{name}` was unloaded at once"), None)),
    }
}

/// `DELETE /v1/adapters/{name}`
pub(super) async fn unload(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    shared.keys.check_admin(&headers)?;
    if !shared.parts.registry.unload(&name) {
        return Err(ApiError::not_found(format!("no adapter is called `{name}`"), Some("model_not_found")));
    }
    tracing::info!(adapter = name, "unloaded");
    Ok(answer_json(StatusCode::OK, &json!({"name": name, "object": "adapter", "deleted": true})))
}
