//! Isolated sessions, which this daemon does not have: it says so.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::error::Refusal;

/// Why.
const MESSAGE: &str = "isolated sessions are not available: the sandbox itself is the boundary";

/// `GET /v1/isolated/capabilities`.
pub(super) async fn capabilities() -> Response {
    Json(json!({
        "available": false,
        "isolator": "",
        "version": "",
        "message": MESSAGE,
        "setpriv_available": false,
        "userns_available": false,
        "commit_supported": false,
        "diff_supported": false,
    }))
    .into_response()
}

/// Anything else.
pub(super) async fn unavailable() -> Response {
    Refusal::unsupported(StatusCode::SERVICE_UNAVAILABLE, MESSAGE).into_response()
}
