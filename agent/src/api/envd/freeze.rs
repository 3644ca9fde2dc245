//! `/freeze` and `/unfreeze`: all that was started here is stopped, and goes on.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{OriginalUri, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::App;
use super::files::Refusal;
use crate::api::query::Query;

/// The longest that is waited, in milliseconds.
const LONGEST: u64 = 60_000;

/// `POST /freeze`. With `maxWaitMs` it waits until all have stopped, and tells how it went.
pub(super) async fn freeze(State(app): State<Arc<App>>, OriginalUri(uri): OriginalUri) -> Response {
    let query = Query::of(&uri);
    let wait = match query.get("maxWaitMs").map(str::parse::<u64>) {
        None => None,
        Some(Ok(wait)) => Some(wait.min(LONGEST)),
        Some(Err(_)) => return Refusal(StatusCode::BAD_REQUEST, "maxWaitMs is not a number".into()).into_response(),
    };
    let mode = query.get("mode").unwrap_or("legacy").to_owned();
    if !matches!(mode.as_str(), "legacy" | "hierarchy") {
        return Refusal(StatusCode::BAD_REQUEST, "mode is neither legacy nor hierarchy".into()).into_response();
    }
    let freezer = app.freezer.clone();
    let longest = Duration::from_millis(wait.unwrap_or(0));
    let done = tokio::task::spawn_blocking(move || freezer.freeze(longest)).await;
    match (done, wait) {
        (Err(e), _) => Refusal(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
        (Ok(_), None) => StatusCode::NO_CONTENT.into_response(),
        (Ok(report), Some(_)) => Json(json!({
            "mode": mode,
            "visited": report.visited,
            "allowlisted": 0,
            "truncated": false,
            "preFrozen": report.before,
            "requested": report.requested,
            "frozen": report.frozen,
            "notFrozen": report.requested.saturating_sub(report.frozen + report.failed),
            "failed": report.failed,
            "unobservable": 0,
            "sweepMs": report.sweep.as_millis() as u64,
            "waitMs": report.wait.as_millis() as u64,
        }))
        .into_response(),
    }
}

/// `POST /unfreeze`.
pub(super) async fn thaw(State(app): State<Arc<App>>) -> StatusCode {
    let freezer = app.freezer.clone();
    let _ = tokio::task::spawn_blocking(move || freezer.thaw()).await;
    StatusCode::NO_CONTENT
}
