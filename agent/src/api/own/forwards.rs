//! Port forwards: made, listed, taken away.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::failure::{Body, Failure, Result};
use super::{App, PREFIX};
use crate::api::rfc3339;
use crate::forward::{Forward, Wish};

/// What is told of one. Its token is not.
fn described(forward: &Forward) -> Value {
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let counters = &forward.counters;
    json!({
        "id": forward.id,
        "protocol": forward.plan.protocol,
        "listen": forward.address.to_string(),
        "target": forward.plan.target,
        "authenticated": forward.plan.needs_token(),
        "created_at": rfc3339(forward.created),
        "accepted": count(&counters.accepted),
        "refused": count(&counters.refused),
        "failed": count(&counters.failed),
        "open": count(&counters.open),
        "bytes_sent": count(&counters.sent),
        "bytes_received": count(&counters.received),
    })
}

/// `POST /forwards`.
pub(super) async fn create(State(app): State<Arc<App>>, Body(wish): Body<Wish>) -> Result<Response> {
    let plan = wish.plan().map_err(Failure::invalid)?;
    let target = plan.target.clone();
    let forward = app.forwards.create(plan).await.map_err(|e| match e.kind() {
        std::io::ErrorKind::QuotaExceeded => Failure::exhausted(e.to_string()),
        _ => Failure::of(&format!("listen for {target}"), &e),
    })?;
    let location = format!("{PREFIX}/forwards/{}", forward.id);
    Ok((StatusCode::CREATED, [("location", location)], Json(described(&forward))).into_response())
}

/// `GET /forwards`.
pub(super) async fn list(State(app): State<Arc<App>>) -> Response {
    let forwards: Vec<Value> = app.forwards.list().iter().map(|forward| described(forward)).collect();
    Json(json!({"forwards": forwards})).into_response()
}

fn missing(id: &str) -> Failure {
    Failure::not_found(format!("there is no forward {id}"))
}

/// `GET /forwards/{id}`.
pub(super) async fn get(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response> {
    let forward = app.forwards.get(&id).ok_or_else(|| missing(&id))?;
    Ok(Json(described(&forward)).into_response())
}

/// `DELETE /forwards/{id}`.
pub(super) async fn remove(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<StatusCode> {
    if app.forwards.remove(&id).await { Ok(StatusCode::NO_CONTENT) } else { Err(missing(&id)) }
}
